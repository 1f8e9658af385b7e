"""What the samples of the transport's benchmark say: medians, spread, goals. Pure.

Throughput is compared with plain Postfix round by round: both ran within a minute of each other, so
a machine that grows slower over the run changes no ratio. The median of the ratios is the figure.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.figures import Goal, Missing, percentile, spread

PLAIN = "plain"

LOCAL, FAR = "umbra 0.2 ms", "umbra 40 ms"
SMALL, LARGE = 4096, 262144
HELD = 100_000
HUGE, AT_ONCE = 50_000_000, 10


@dataclass(frozen=True)
class Rate:
    """``messages`` were accepted in ``seconds``, in one burst."""

    variant: str
    connections: int
    size: int
    round: int
    messages: int
    seconds: float

    @property
    def per_second(self) -> float:
        """Accepted messages each second."""
        return self.messages / self.seconds


@dataclass(frozen=True)
class Latencies:
    """Seconds from MAIL to the last 250 of single messages, sent at a fixed pace."""

    variant: str
    connections: int
    size: int
    round: int
    seconds: list[float]


@dataclass(frozen=True)
class Held:
    """What was resident of the shadow's agent while it held so many shadow messages."""

    messages: int
    resident_kib: int


@dataclass(frozen=True)
class Peak:
    """What an agent took, at most, while ``messages`` of ``size`` bytes came in at once."""

    host: str
    messages: int
    size: int
    before_kib: int
    peak_kib: int


def ratios(rates: Sequence[Rate], variant: str, connections: int, size: int) -> list[float]:
    """The throughput of ``variant`` in each round as a share of plain Postfix's in that round."""
    cell = [rate for rate in rates if (rate.connections, rate.size) == (connections, size)]
    plain = {rate.round: rate.per_second for rate in cell if rate.variant == PLAIN}
    found = [
        rate.per_second / plain[rate.round]
        for rate in cell
        if rate.variant == variant and rate.round in plain
    ]
    if not found:
        raise Missing(f"no round with {variant} and {PLAIN}, {connections} connections, {size} B")
    return found


def added(
    latencies: Sequence[Latencies], variant: str, connections: int, size: int, percent: float
) -> list[float]:
    """By how many ms the percentile of ``variant`` is over plain Postfix's, in each round."""
    cell = [item for item in latencies if (item.connections, item.size) == (connections, size)]
    plain = {
        item.round: percentile(item.seconds, percent) for item in cell if item.variant == PLAIN
    }
    found = [
        (percentile(item.seconds, percent) - plain[item.round]) * 1000
        for item in cell
        if item.variant == variant and item.round in plain
    ]
    if not found:
        raise Missing(f"no round with {variant} and {PLAIN}, {connections} connections, {size} B")
    return found


def summary(rates: Sequence[Rate], latencies: Sequence[Latencies]) -> list[dict[str, Any]]:
    """One row for each variant, size and number of connections, in the order of the samples."""
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for key in dict.fromkeys((rate.variant, rate.size, rate.connections) for rate in rates):
        variant, size, connections = key
        values = [
            rate.per_second for rate in rates if (rate.variant, rate.size, rate.connections) == key
        ]
        rows[key] = {
            "variant": variant,
            "size": size,
            "connections": connections,
            "messages_per_s": spread(values),
            "of_plain": spread(ratios(rates, variant, connections, size)),
        }
    for key in dict.fromkeys((item.variant, item.size, item.connections) for item in latencies):
        variant, size, connections = key
        row = rows.setdefault(key, {"variant": variant, "size": size, "connections": connections})
        own = [item for item in latencies if (item.variant, item.size, item.connections) == key]
        for name, percent in (("p50", 50), ("p99", 99)):
            row[f"{name}_ms"] = spread([percentile(item.seconds, percent) * 1000 for item in own])
            row[f"{name}_added_ms"] = spread(added(latencies, variant, connections, size, percent))
    return list(rows.values())


def megabytes(kib: float) -> float:
    """Return KiB as MB of a million bytes."""
    return kib * 1024 / 1e6


def memory_goals(held: Sequence[Held], peaks: Sequence[Peak]) -> list[Goal]:
    """What the memory of the agents' processes decides."""
    found = []
    enough = [megabytes(item.resident_kib) for item in held if item.messages >= HELD]
    if enough:
        name = f"resident memory of the shadow's agent, {HELD} messages held"
        found.append(Goal(name, max(enough), 150.0, "MB", max(enough) < 150.0))
    for host in dict.fromkeys(item.host for item in peaks):
        cost = max(
            megabytes(item.peak_kib - item.before_kib)
            for item in peaks
            if (item.host, item.messages, item.size) == (host, AT_ONCE, HUGE)
        )
        name = f"memory that {AT_ONCE} messages of 50 MB at once cost, {host}"
        found.append(Goal(name, cost, 64.0, "MB", cost < 64.0))
    return found


def goals(rates: Sequence[Rate], latencies: Sequence[Latencies]) -> list[Goal]:
    """Every figure of speed that these samples decide; the others are not in the list."""

    def at_least(name: str, bound: float, values: Callable[[], list[float]]) -> Goal:
        value = statistics.median(values())
        return Goal.at_least(name, value, bound, "of plain Postfix")

    def at_most(name: str, bound: float, values: Callable[[], list[float]]) -> Goal:
        value = statistics.median(values())
        return Goal.at_most(name, value, bound, "ms")

    wanted: list[
        tuple[Callable[[str, float, Callable[[], list[float]]], Goal], str, float, Any]
    ] = []
    for size, text in ((SMALL, "4 KiB"), (LARGE, "256 KiB")):
        wanted += [
            (
                at_least,
                f"throughput, local link, 10 connections, {text}",
                0.80,
                lambda size=size: ratios(rates, LOCAL, 10, size),
            ),
            (
                at_least,
                f"throughput, 40 ms round trip, 50 connections, {text}",
                0.70,
                lambda size=size: ratios(rates, FAR, 50, size),
            ),
        ]
    wanted.append(
        (
            at_most,
            "added latency p50, local link, 10 connections, 4 KiB",
            3.0,
            lambda: added(latencies, LOCAL, 10, SMALL, 50),
        )
    )
    found = []
    for judge, name, bound, values in wanted:
        try:
            found.append(judge(name, bound, values))
        except Missing:
            continue
    return found
