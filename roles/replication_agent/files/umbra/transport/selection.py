"""Whose copies of a message count; pure decisions.

Each synchronous shadow gets each message, because each may be promoted next and must lack nothing.
A shadow that fails is taken out of them, durably, before a message is accepted without it. The
settings say how many of those that have the message, and at which site, are enough to accept it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum


class ShadowPreference(StrEnum):
    """Whose copies of a message count, by site."""

    PREFER_REMOTE = "prefer_remote"
    REMOTE_ONLY = "remote_only"
    LOCAL_ONLY = "local_only"


def counting(
    holders: Collection[str], sites: Mapping[str, str], own: str, preference: ShadowPreference
) -> list[str]:
    """Return those of ``holders`` whose copies count.

    :param sites: the site of each shadow.
    :param own: the primary's site.
    """
    match preference:
        case ShadowPreference.REMOTE_ONLY:
            return [name for name in holders if sites[name] != own]
        case ShadowPreference.LOCAL_ONLY:
            return [name for name in holders if sites[name] == own]
    # All are asked anyway, so a remote one that is there has it.
    return list(holders)


def enough(
    holders: Collection[str],
    sites: Mapping[str, str],
    own: str,
    preference: ShadowPreference,
    copies: int,
) -> bool:
    """Tell whether a message that ``holders`` have may be accepted as shadowed."""
    return len(counting(holders, sites, own, preference)) >= copies
