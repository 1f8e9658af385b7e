"""Points in time as an operator writes them."""

from __future__ import annotations

import re
from datetime import UTC, datetime

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|w)")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
EXAMPLES = "30min, 2h, 3d, 2026-11-22 or 2026-11-22T10:30 (UTC, or with an offset)"


def parse(text: str, now: float) -> float:
    """Return what ``text`` means, in seconds since 1970: so long ago, or a time of ISO 8601.

    A time without an offset is UTC, as in all that the agent prints. ValueError with a sentence.
    """
    if match := _AGO.fullmatch(text.strip()):
        return now - float(match[1]) * _SECONDS[match[2]]
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"{text!r} is no time; write for example {EXAMPLES}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def shown(moment: float) -> str:
    """Return a time as the API tells it: ISO 8601, UTC, seconds."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
