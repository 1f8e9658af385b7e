"""The report of a run: a row for each fault, the goals, a line for each trial. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from plugins.module_utils import _tables
from tests.faults.trial import COUNTED, Result

GOAL_TRIALS = 200
HEAD = (
    "fault", "trials", "failed", "messages", "lost", "duplicated", "changes", "lost",
    "longest refusal s",
)  # fmt: skip


def rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One row for each fault, in the order of their first trials."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.plan.fault, []).append(result)
    return [row(name, group) for name, group in grouped.items()]


def row(name: str, results: Sequence[Result]) -> dict[str, Any]:
    """The sums of some trials; times are the longest."""
    return {
        "fault": name,
        "trials": len(results),
        "failed": sum(bool(result.reasons) for result in results),
        "acknowledged": sum(result.acknowledged for result in results),
        "changes_acknowledged": sum(result.changes_acknowledged for result in results),
        **{
            counted: sum(result.counts.get(counted, 0) for result in results) for counted in COUNTED
        },
        "refusal_s": max((r.refusal_s for r in results if r.refusal_s is not None), default=None),
        "healed_s": max((r.healed_s for r in results if r.healed_s is not None), default=None),
    }


def lines(results: Sequence[Result]) -> list[str]:
    """The table for the terminal, and below it what has failed, in words."""
    keys = (
        "fault", "trials", "failed", "acknowledged", "lost", "duplicated",
        "changes_acknowledged", "changes_lost", "refusal_s",
    )  # fmt: skip
    table = [[item[key] for key in keys] for item in [*rows(results), row("all", results)]]
    failed = [
        f"Trial {result.plan.number}, {result.plan.fault}: {' '.join(result.reasons)}"
        for result in results
        if result.reasons
    ]
    return [*_tables.table(HEAD, table), *([""] if failed else []), *failed]


def line(result: Result, trials: int) -> str:
    """One trial, as it ends."""
    figures = f"{result.acknowledged} messages, {result.changes_acknowledged} changes"
    for name in COUNTED:
        if result.counts.get(name):
            figures += f", {result.counts[name]} {name.replace('_', ' ')}"
    if result.refusal_s is not None:
        figures += f", refusal {result.refusal_s:.2f} s"
    if result.healed_s is not None:
        figures += f", protected after {result.healed_s:.1f} s"
    word = "FAILED" if result.reasons else "ok"
    return (
        f"{result.plan.number:3}/{trials} {word:6} {result.plan.fault}: {figures}"
        f" ({result.seconds:.0f} s)" + (f": {result.reasons[0]}" if result.reasons else "")
    )


def goals(results: Sequence[Result]) -> list[dict[str, Any]]:
    """What these trials decide."""
    total = row("all", results)
    wanted = [
        ("trials", total["trials"], GOAL_TRIALS, total["trials"] >= GOAL_TRIALS),
        *((name, total[name], 0, total[name] == 0) for name in COUNTED),
        ("failed trials", total["failed"], 0, total["failed"] == 0),
    ]
    units = {"trials": "trials", "failed trials": "trials", "changes_lost": "changes"}
    return [
        {"name": name, "value": value, "bound": bound, "unit": units.get(name, "messages"),
         "holds": holds}
        for name, value, bound, holds in wanted
    ]  # fmt: skip


def report(
    seed: int, results: Sequence[Result], about: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """The file: raw results first, then what follows from them."""
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        **about,
        "trials": [result.to_json() for result in results],
        "faults": rows(results),
        "goals": goals(results),
    }
