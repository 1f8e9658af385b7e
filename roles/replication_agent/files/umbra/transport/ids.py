"""Shadow ids: ordered by time, never guessable."""

from __future__ import annotations

import re
import secrets
import time

HEADER = "X-Umbra-Id"

_FORM = re.compile(r"[0-9a-f]{32}")
_RANDOM_BITS = 76


def new() -> str:
    """Return a new id, ordered by time.

    52 bits of microseconds since 1970 (until 2112), then 76 random bits, in hex.

    Nobody outside can know an id before its message is delivered, so no message from outside can
    pass for a duplicate of one that is in transit.
    """
    return f"{time.time_ns() // 1000 << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS):032x}"


def first(moment: float) -> str:
    """Return the smallest id of a moment in seconds since 1970: ids from then on are not under it.

    A moment that an id cannot have is brought to the next one that it can.
    """
    microseconds = min(max(0, int(moment * 1_000_000)), (1 << 52) - 1)
    return f"{microseconds << _RANDOM_BITS:032x}"


def valid(text: object) -> bool:
    """Tell whether ``text`` has the form of a shadow id."""
    return isinstance(text, str) and _FORM.fullmatch(text) is not None
