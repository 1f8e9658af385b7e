"""Which shadows changes wait for, when there are more than must have them; pure.

The same ones for every change: if any so many of the shadows were enough for each change, none of
them would have all. A shadow that waits already stays chosen, so that nobody is compared because
another one has come back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from umbra.mailbox.mirror import Phase


def chosen(phases: Mapping[str, Phase], answering: Collection[str], copies: int) -> set[str]:
    """Return the shadows that changes wait for; the others follow.

    :param phases: how far each shadow is, in the order of preference.
    :param answering: those that can be copied to now. The rest comes last.
    :param copies: how many must have each change.
    """
    order = list(phases)
    ranked = sorted(
        order,
        key=lambda name: (name not in answering, not phases[name].waits, order.index(name)),
    )
    return set(ranked[:copies])
