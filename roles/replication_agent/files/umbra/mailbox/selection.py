"""Which shadows changes wait for, when there are more than must have them; pure.

The same ones for every change: if any so many of the shadows were enough for each change, none of
them would have all. First come those who may take over by themselves: another one would protect the
group and, when the primary is lost, wait for a person. Among equals a shadow that waits already
stays chosen, so that nobody is compared because another one has come back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from umbra.mailbox.mirror import Phase


def chosen(
    phases: Mapping[str, Phase],
    answering: Collection[str],
    copies: int,
    rank: Callable[[str], tuple[bool, int]],
    furthest: Phase = Phase.PROTECTED,
) -> set[str]:
    """Return the shadows that changes wait for; the others follow.

    Until the best are ``furthest`` all that answer are waited for, as soon as they can be: so there
    is no gap when one takes another's place.

    :param phases: how far each shadow is, in the order of the inventory.
    :param answering: those that can be copied to now. The rest comes last.
    :param copies: how many must have each change.
    :param rank: the smallest come first; see ``Group.rank``.
    :param furthest: how far the operator lets them get.
    """
    # Sorting is stable, so the order of the inventory decides last.
    ranked = sorted(
        phases, key=lambda name: (name not in answering, rank(name), not phases[name].waits)
    )
    best = set(ranked[:copies])
    if all(phases[name].rank >= furthest.rank for name in best):
        return best
    return best | set(answering)
