"""What the samples of the mailboxes' benchmark say: medians, spread, goals. Pure.

Throughput is compared round by round, because variants of one round ran within a minute of each
other. Percentiles of latency are taken in each round; the figure is the median of the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.bench.figures import Goal, Missing, percentile, spread

ALONE, ASYNC, SYNC = "alone", "async", "sync"
OLD, OLD_SYNC = "dovecot 2.3", "dovecot 2.3 sync"
OPERATIONS = ("append", "store", "move", "lmtp")
MANY = 16
SMALL, LARGE = 100, 100_000


@dataclass(frozen=True)
class Burst:
    """Changes of ``clients`` sessions of ``users`` users, as fast as they were answered, in ms."""

    variant: str
    operation: str
    clients: int
    users: int
    round: int
    seconds: float
    ms: list[float]

    @property
    def per_second(self) -> float:
        """Answered changes each second."""
        return len(self.ms) / self.seconds


@dataclass(frozen=True)
class Lag:
    """From the answer (and from the command) until the other node's clients see a change, in ms.

    One that was visible before it was answered has a lag of 0. ``unseen``: how many never were.
    """

    variant: str
    operation: str
    round: int
    from_answer: list[float]
    from_command: list[float]
    unseen: int


@dataclass(frozen=True)
class Size:
    """Single changes in a mailbox of ``messages``, one after the other, in ms."""

    operation: str
    messages: int
    round: int
    ms: list[float]


@dataclass(frozen=True)
class Many:
    """What ``mailboxes`` users cost an agent.

    :param resident_mib: of each agent.
    :param idle: share of a core that each agent took while nothing changed, in per cent.
    :param compared_s: seconds in which a started agent compared all of them.
    :param changed: users who changed while the shadow was away,
    :param caught_up_s: and the seconds until they were mirrored.
    """

    mailboxes: int
    resident_mib: dict[str, float]
    idle: dict[str, float]
    compared_s: float
    changed: int
    caught_up_s: float


@dataclass(frozen=True)
class Copy:
    """A whole copy of ``megabytes`` of mail."""

    way: str
    round: int
    megabytes: float
    seconds: float

    @property
    def rate(self) -> float:
        """Megabytes a second."""
        return self.megabytes / self.seconds


SEED, PLAIN = "umbractl seed", "doveadm backup"


@dataclass
class Samples:
    """All that was measured in one run."""

    bursts: list[Burst] = field(default_factory=list)
    lags: list[Lag] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    many: list[Many] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)


def cells(samples: Iterable[Burst], **wanted: Any) -> list[Burst]:
    """The bursts with these attributes; Missing if there is none."""
    found = [
        item
        for item in samples
        if all(getattr(item, name) == value for name, value in wanted.items())
    ]
    if not found:
        raise Missing(str(wanted))
    return found


def percentiles(bursts: Iterable[Burst], percent: float) -> list[float]:
    """The percentile of each round, in ms."""
    return [percentile(burst.ms, percent) for burst in bursts]


def ratios(bursts: Sequence[Burst], operation: str, clients: int) -> list[float]:
    """``async``'s throughput in each round as a share of Dovecot's alone in that round."""
    cell = {"operation": operation, "clients": clients, "users": clients}
    alone = {item.round: item.per_second for item in cells(bursts, variant=ALONE, **cell)}
    found = [
        item.per_second / alone[item.round]
        for item in cells(bursts, variant=ASYNC, **cell)
        if item.round in alone
    ]
    if not found:
        raise Missing("no round with both")
    return found


def lags(samples: Iterable[Lag], variant: str, operation: str) -> list[float]:
    """All lags from the answer, in ms."""
    found = [
        value
        for item in samples
        if (item.variant, item.operation) == (variant, operation)
        for value in item.from_answer
    ]
    if not found:
        raise Missing(variant)
    return found


def sized(samples: Iterable[Size], operation: str, messages: int) -> float:
    """The median over the rounds of the median of a round, in ms."""
    found = [
        statistics.median(item.ms)
        for item in samples
        if (item.operation, item.messages) == (operation, messages)
    ]
    if not found:
        raise Missing(operation)
    return statistics.median(found)


def goals(samples: Samples) -> list[Goal]:
    """Every figure that these samples decide; one that they do not is not in the list."""
    both = ("append", "store")
    judges: list[Callable[[Samples], Goal]] = [
        *(partial(_soon, op, percent) for op in both for percent in (50, 99)),
        *(partial(_shorter, op, variant) for op in both for variant in (SYNC, ASYNC)),
        *(partial(_throughput, op) for op in OPERATIONS),
        *(partial(_undisturbed, op) for op in OPERATIONS),
        *(partial(_grows, op) for op in both),
        _memory,
        _idle,
        _seeded,
    ]
    found = []
    for judge in judges:
        with suppress(Missing):
            found.append(judge(samples))
    return found


def _soon(operation: str, percent: int, samples: Samples) -> Goal:
    own = cells(samples.bursts, variant=SYNC, operation=operation, clients=1, users=1)
    value = statistics.median(percentiles(own, percent))
    name = f"sync {operation} p{percent}, local link, 1 client"
    return Goal.at_most(name, value, {50: 12.0, 99: 40.0}[percent], "ms")


def _shorter(operation: str, variant: str, samples: Samples) -> Goal:
    ours = statistics.median(lags(samples.lags, variant, operation))
    theirs = statistics.median(lags(samples.lags, OLD, operation))
    name = f"replication lag of {operation}, Dovecot 2.3 against {variant}"
    # The watcher looks once a millisecond: less than that is not told apart.
    return Goal.at_least(name, theirs / max(ours, 1.0), 5.0, "times")


def _throughput(operation: str, samples: Samples) -> Goal:
    own = cells(samples.bursts, variant=SYNC, operation=operation, clients=MANY, users=MANY)
    name = f"sync {operation}, {MANY} clients of {MANY} users"
    return Goal.at_least(name, statistics.median(i.per_second for i in own), 300.0, "operations/s")


def _undisturbed(operation: str, samples: Samples) -> Goal:
    shares = {n: statistics.median(ratios(samples.bursts, operation, n)) for n in (1, 4, MANY)}
    worst = min(shares, key=lambda n: shares[n])
    name = f"async {operation}, the worst of 1, 4 and {MANY} clients: {worst}"
    return Goal.at_least(name, shares[worst], 0.85, "of Dovecot alone")


def _grows(operation: str, samples: Samples) -> Goal:
    value = sized(samples.sizes, operation, LARGE) / sized(samples.sizes, operation, SMALL)
    name = f"sync {operation} with {LARGE} messages against {SMALL}"
    return Goal.at_most(name, value, 1.5, "times")


def _memory(samples: Samples) -> Goal:
    value = max(_many(samples.many).resident_mib.values())
    return Goal.at_most("10000 mailboxes, resident memory, the larger agent", value, 150.0, "MiB")


def _idle(samples: Samples) -> Goal:
    value = max(_many(samples.many).idle.values())
    return Goal.at_most("10000 mailboxes, idle, the busier agent", value, 1.0, "% of a core")


def _seeded(samples: Samples) -> Goal:
    plain = {item.round: item.rate for item in samples.copies if item.way == PLAIN}
    shares = [
        item.rate / plain[item.round]
        for item in samples.copies
        if item.way == SEED and item.round in plain
    ]
    if not shares:
        raise Missing("seeding")
    return Goal.at_least(
        "seeding", statistics.median(shares), 0.8, "of a parallel doveadm backup's rate"
    )


def _many(samples: Iterable[Many]) -> Many:
    for item in samples:
        if item.mailboxes == 10_000:
            return item
    raise Missing("10000 mailboxes")


def summary(samples: Samples) -> dict[str, list[dict[str, Any]]]:
    """Rows for people, one for each cell."""
    bursts = []
    for key in dict.fromkeys(
        (item.operation, item.clients, item.users, item.variant) for item in samples.bursts
    ):
        operation, clients, users, variant = key
        own = cells(
            samples.bursts, operation=operation, clients=clients, users=users, variant=variant
        )
        bursts.append(
            {
                "operation": operation,
                "clients": clients,
                "users": users,
                "variant": variant,
                "per_s": spread([item.per_second for item in own]),
                "p50_ms": spread(percentiles(own, 50)),
                "p99_ms": spread(percentiles(own, 99)),
            }
        )
    found = []
    for variant, operation in dict.fromkeys((i.variant, i.operation) for i in samples.lags):
        own_lags = [i for i in samples.lags if (i.variant, i.operation) == (variant, operation)]
        commands = [value for item in own_lags for value in item.from_command]
        found.append(
            {
                "variant": variant,
                "operation": operation,
                "lag_ms": spread(lags(samples.lags, variant, operation)),
                "from_command_ms": spread(commands),
                "unseen": sum(item.unseen for item in own_lags),
            }
        )
    sizes = [
        {
            "operation": operation,
            "messages": messages,
            "p50_ms": spread(
                [
                    statistics.median(item.ms)
                    for item in samples.sizes
                    if (item.operation, item.messages) == (operation, messages)
                ]
            ),
        }
        for operation, messages in dict.fromkeys((i.operation, i.messages) for i in samples.sizes)
    ]
    many = [
        {
            "mailboxes": item.mailboxes,
            "resident_mib": item.resident_mib,
            "idle_percent": item.idle,
            "compared_users_per_s": item.mailboxes / item.compared_s,
            "caught_up_users_per_s": item.changed / item.caught_up_s,
        }
        for item in samples.many
    ]
    copies = [
        {"way": way, "mb_per_s": spread([i.rate for i in samples.copies if i.way == way])}
        for way in dict.fromkeys(item.way for item in samples.copies)
    ]
    return {"changes": bursts, "lag": found, "sizes": sizes, "many": many, "copies": copies}
