"""Seeding: a peer's whole copy is built, or built anew, while this node serves.

It is the catch-up that every peer goes through, made to trust nothing that is known of the peer:
all states are dropped, so every user is compared from scratch. What is done stays done: a user who
is finished has a state in the ledger, so whatever interrupts a seeding, the catch-up that follows
passes over him in milliseconds. Only the wish itself and its rate are kept here; they are removed
when all users have been copied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic

from umbra import document
from umbra.document import DocumentError

# Slices in which a sender waits for its turn, so that it notices another rate (seconds).
SLICE = 0.25
# dsync gives up on a stream that stands still for 60 s; at this rate a chunk takes less than 1 s.
LEAST_RATE = 100_000.0


def rate_of(value: object) -> float:
    """Return a rate that was asked for, in bytes a second; 0 is no limit.

    ValueError in the operator's unit, which is megabytes.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("rate must be a number of bytes a second")
    if value and not value >= LEAST_RATE:
        raise ValueError(f"rate must be 0 for no limit, or at least {LEAST_RATE / 1e6:g} MB/s")
    return float(value)


@dataclass(frozen=True)
class Seed:
    """Since when (ISO 8601, UTC), and how fast at most (bytes a second, 0 for no limit)."""

    since: str
    rate: float


class Seeds:
    """The seedings that are not complete, by peer; durable.

    :param directory: ``/var/lib/umbra/mirror``.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "seeding.json"
        self.rows: dict[str, Seed] = {}

    def load(self) -> None:
        """Read what is on disk. DocumentError if it is damaged."""
        try:
            self.rows = {peer: Seed(**row) for peer, row in document.read(self._path).items()}
        except TypeError as error:
            raise DocumentError(f"{self._path} cannot be used: {error}") from None

    def put(self, peer: str, seed: Seed | None) -> None:
        """Note a seeding, or its end (None). OSError if it is not on disk."""
        rows = {name: row for name, row in self.rows.items() if name != peer}
        if seed is not None:
            rows[peer] = seed
        if rows != self.rows:
            document.write(self._path, {name: asdict(row) for name, row in rows.items()})
            self.rows = rows


class Pacer:
    """Counts what is sent to one peer, and holds it to a rate.

    :param rate: returns how many bytes a second may be sent now, 0 for no limit.
    """

    def __init__(self, rate: Callable[[], float]) -> None:
        self._rate = rate
        self._free = 0.0  # when the next byte may go
        self.sent = 0

    async def spend(self, count: int) -> None:
        """Wait until ``count`` bytes may be sent."""
        self.sent += count
        rate = self._rate()
        if not rate:
            return
        mine = max(self._free, monotonic())
        self._free = mine + count / rate
        while (left := mine - monotonic()) > 0:
            await asyncio.sleep(min(left, SLICE))
            if not self._rate():
                self._free = 0.0
                return
