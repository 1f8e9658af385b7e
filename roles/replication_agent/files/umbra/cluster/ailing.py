"""Why a primary gives its role away by itself, and to whom: pure decisions.

A host that hangs or is gone is replaced by a shadow, since its proof of work ends. This is about
one that works on, but worse than a shadow would: its mail servers crash again and again, a disk is
full, its clients do not reach it. A switchover loses nothing, where waiting for the worse may.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from umbra.cluster.protocol import Policy


@dataclass(frozen=True)
class Rules:
    """When a host is ailing. Times in seconds.

    :param crashes: so many crashes of one server within ``window``; 0 does not count them.
    :param least_free: a file system with fewer bytes free is full; 0 does not look.
    :param settle: what passes sooner is no reason.
    """

    crashes: int
    window: float
    least_free: int
    settle: float = 5.0


@dataclass(frozen=True)
class Observed:
    """What was seen on this host at one time.

    :param crashed: the servers that have crashed since the last look, each as often as it did.
    :param free: bytes that are free, by file system.
    :param clients: whether anything on the clients' side answers; None if nobody can tell.
    """

    crashed: tuple[str, ...] = ()
    free: Mapping[str, int] = field(default_factory=dict)
    clients: bool | None = None


@dataclass(frozen=True)
class History:
    """What is remembered: crashes with their times, and since when what stands has stood."""

    crashes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    since: Mapping[str, float] = field(default_factory=dict)


def observe(rules: Rules, history: History, seen: Observed, now: float) -> History:
    """Return the history with what was seen at ``now``."""
    crashes = {
        server: tuple(at for at in times if now - at < rules.window)
        for server, times in history.crashes.items()
    }
    for server in seen.crashed:
        crashes[server] = (*crashes.get(server, ()), now)
    standing = [
        f"the disk of {path} is full" for path, free in seen.free.items() if free < rules.least_free
    ]
    if seen.clients is False:
        standing.append("nothing on the clients' side answers")
    since = {what: history.since.get(what, now) for what in standing}
    return History(crashes, since)


def ailments(rules: Rules, history: History, now: float) -> list[str]:
    """Return why another host should serve; empty if this one may go on."""
    found = [
        f"{server} has crashed {len(times)} times within {rules.window:g} s"
        for server, times in history.crashes.items()
        if rules.crashes and len(times) >= rules.crashes
    ]
    return found + [what for what, at in history.since.items() if now - at >= rules.settle]


@dataclass(frozen=True)
class Candidate:
    """A shadow, as it says of itself.

    :param whole: it has all that was acknowledged, and answers.
    """

    node: str
    site: str
    whole: bool
    ailing: bool
    policy: Policy
    preference: int


def successor(candidates: Collection[Candidate], site: str) -> Candidate | None:
    """Return who takes over from an ailing primary at ``site``; None if nobody would do better."""
    fit = [
        candidate
        for candidate in candidates
        if candidate.whole
        and not candidate.ailing
        and candidate.policy.allows(site, candidate.site)
    ]
    return min(fit, key=lambda candidate: (candidate.preference, candidate.node), default=None)
