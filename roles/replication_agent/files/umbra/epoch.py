"""Epochs, as they come from other hosts."""

from __future__ import annotations

MAX_WHOLE = 2**53 - 1
"""What JSON, SQLite and a metric carry unchanged, whoever reads it."""


def epoch_of(value: object) -> int:
    """Return ``value`` if it can be an epoch. ValueError if it cannot: it would end on the disk."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_WHOLE:
        raise ValueError(f"{value!r:.40} is no epoch")
    return value
