"""What a WAN does to a packet: settings of a link, and the decision when to deliver. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from itertools import permutations
from typing import Any

from .plan import SITES

# A link with a rate queues this much; the rest is dropped, as a router's full buffer does.
QUEUE_S = 0.5


@dataclass(frozen=True)
class Settings:
    """One direction between two sites: one-way delay, lost packets, rate (0: no limit), cut.

    With a jitter each packet takes up to so much longer.
    """

    delay_ms: float = 2.0
    jitter_ms: float = 0.0
    loss_percent: float = 0.0
    rate_kbit: float = 0.0
    cut: bool = False

    def __post_init__(self) -> None:
        """Refuse what no link can do."""
        if not 0 <= self.delay_ms <= 10_000:
            raise ValueError("The delay must be 0 to 10000 ms.")
        if not 0 <= self.jitter_ms <= 10_000:
            raise ValueError("The jitter must be 0 to 10000 ms.")
        if not 0 <= self.loss_percent <= 100:
            raise ValueError("The loss must be 0 to 100 percent.")
        if self.rate_kbit < 0:
            raise ValueError("The rate must not be negative.")

    @property
    def plain(self) -> bool:
        """Whether 64 KiB bundles of segments may pass: the rest is about single packets."""
        return self.loss_percent == self.rate_kbit == self.jitter_ms == 0


Table = dict[tuple[str, str], Settings]
PAIRS = tuple((a.name, b.name) for a, b in permutations(SITES, 2))


def uniform(settings: Settings) -> Table:
    """The same settings for every pair."""
    return dict.fromkeys(PAIRS, settings)


def dump(table: Table) -> dict[str, Any]:
    """A table as JSON objects, keyed `from>to`."""
    return {f"{a}>{b}": asdict(settings) for (a, b), settings in table.items()}


def load(data: dict[str, Any]) -> Table:
    """The inverse of `dump`; ValueError if it is not a whole table."""
    known = {field.name for field in fields(Settings)}
    if set(data) != {f"{a}>{b}" for a, b in PAIRS} or any(set(v) != known for v in data.values()):
        raise ValueError("The WAN's settings do not name every pair of sites once.")
    return {pair: Settings(**data[f"{pair[0]}>{pair[1]}"]) for pair in PAIRS}


class Link:
    """One direction between two sites, as the relay sees it."""

    def __init__(self, settings: Settings) -> None:
        """Begin with an idle link."""
        self.forwarded = 0
        self.dropped = 0
        self._line_free = 0.0
        self._last = 0.0
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Change the settings; packets on their way keep their time of arrival."""
        self.settings = settings
        self._delay = settings.delay_ms / 1000
        self._jitter = settings.jitter_ms / 1000
        self._loss = settings.loss_percent / 100
        self._byte_s = 8 / (settings.rate_kbit * 1000) if settings.rate_kbit else 0.0

    def arrival(self, now: float, size: int, chance: float, tardiness: float = 0.0) -> float | None:
        """When a packet of `size` bytes arrives, None if it is lost.

        `chance`, whether it is, and `tardiness`, how late, are random in [0, 1). Never earlier
        than the packet before it: a shorter delay must not turn the order around.
        """
        if self.settings.cut or chance < self._loss:
            self.dropped += 1
            return None
        sent = now
        if self._byte_s:
            start = max(now, self._line_free)
            if start - now > QUEUE_S:
                self.dropped += 1
                return None
            sent = self._line_free = start + size * self._byte_s
        self._last = max(sent + self._delay + tardiness * self._jitter, self._last)
        self.forwarded += 1
        return self._last
