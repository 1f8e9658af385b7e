"""What the samples of the failover benchmark say: percentiles, the parts of an outage, goals. Pure.

Clients' times are of the monotonic clock, the journal's of the wall clock; both are of the one
kernel that all lab hosts share, so one offset joins them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugins.module_utils import _accounting as accounting
from tests.bench.figures import Goal, Missing, percentile, spread

LOST, MOVED = "host lost", "switchover"
NEAR_MS = 2.0
"""One-way delay of the line at which the goals hold."""

BOUNDS = {
    (LOST, "default"): (3.2, 4.0),
    (LOST, "lan-fast"): (1.8, 3.0),
    (MOVED, "default"): (0.5, 1.5),
    (MOVED, "lan-fast"): (0.5, 1.5),
}
"""Seconds, p50 and p99."""

PARTS = ("noticed", "decided", "first message", "first change")
STEPS = ("drain", "close", "flush", "hand over")
_STATE = re.compile(r"state: (\S+) \(")
_STEP = re.compile(r"switchover: (.+) took ([\d.]+) s")


@dataclass(frozen=True)
class Change:
    """One change of primary, as clients outside saw it. Seconds."""

    kind: str
    profile: str
    delay_ms: float
    number: int
    smtp_s: float
    imap_s: float
    protected_s: float
    parts: Mapping[str, float]


def window(ends: Sequence[int], began: int, until: int) -> float:
    """The longest time between two acknowledgements that touches began to until (ns), seconds."""
    return accounting.outage_s(ends, began, until, max([until, *ends]))


def parts(
    began: float, states: Iterable[tuple[float, str]], message: float, change: float
) -> dict[str, float]:
    """Cut an outage into pieces: seconds each.

    :param began: when the host was lost (wall clock).
    :param states: when the new primary's agent said which line of its journal.
    :param message: when the first message was acknowledged by it, ``change`` the first change.
    """
    at: dict[str, float] = {}
    for when, line in states:
        if when > began and (found := _STATE.search(line)):
            at.setdefault(found[1], when)
    if not {"candidate", "primary"} <= at.keys():
        return {}
    decided = at["primary"]
    steps = (
        at["candidate"] - began,
        decided - at["candidate"],
        message - decided,
        change - decided,
    )
    return {name: round(step, 3) for name, step in zip(PARTS, steps, strict=True)}


def steps(lines: Iterable[str]) -> dict[str, float]:
    """How long each step of a switchover took, by the former primary's journal: seconds."""
    found = (_STEP.search(line) for line in lines)
    return {step[1]: float(step[2]) for step in found if step and step[1] in STEPS}


def summary(changes: Sequence[Change]) -> list[dict[str, Any]]:
    """One row for each kind, profile and delay."""
    rows = []
    for key in dict.fromkeys((c.kind, c.profile, c.delay_ms) for c in changes):
        cell = [c for c in changes if (c.kind, c.profile, c.delay_ms) == key]
        row: dict[str, Any] = dict(zip(("kind", "profile", "delay_ms"), key, strict=True))
        row["changes"] = len(cell)
        for name in ("smtp_s", "imap_s", "protected_s"):
            values = [getattr(change, name) for change in cell]
            row[name] = {
                **spread(values), "p50": percentile(values, 50), "p99": percentile(values, 99),
            }  # fmt: skip
        row["parts"] = {
            part: spread([c.parts[part] for c in cell if part in c.parts])
            for part in (*PARTS, *STEPS)
            if any(part in c.parts for c in cell)
        }
        rows.append(row)
    return rows


def goals(changes: Sequence[Change]) -> list[Goal]:
    """What these samples decide; a client's outage is the longer one of SMTP and IMAP."""
    found = []
    for (kind, profile), bounds in BOUNDS.items():
        values = [
            max(c.smtp_s, c.imap_s)
            for c in changes
            if (c.kind, c.profile, c.delay_ms) == (kind, profile, NEAR_MS)
        ]
        for percent, bound in zip((50, 99), bounds, strict=True):
            try:
                value = percentile(values, percent)
            except Missing:
                continue
            name = f"{kind}, {profile}: SMTP and IMAP back, p{percent} of {len(values)}"
            found.append(Goal.at_most(name, value, bound, "s"))
    return found
