"""The report of a run: a row for each operation, the goals. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from tests.model.machine import Tally

GOAL_OPERATIONS = 2000


def rows(tallies: Mapping[str, Tally]) -> list[dict[str, Any]]:
    """One row for each kind of operation; times are how long the shadow lacked it after the OK."""
    return [
        {
            "operation": kind,
            "acknowledged": tally.acknowledged,
            "refused": tally.refused,
            "unknown": tally.unknown,
            "compared": tally.compared,
            "before_ok": sum(late == 0 for late in tally.late_s),
            "last_refusal": tally.said,
            "late_p50_s": round(median(tally.late_s), 3) if tally.late_s else None,
            "late_max_s": round(max(tally.late_s), 3) if tally.late_s else None,
        }
        for kind, tally in sorted(tallies.items())
    ]


def goals(
    operations: int,
    failures: Sequence[Mapping[str, Any]],
    different: int,
    struck: int | None,
    wanted: int = GOAL_OPERATIONS,
) -> list[dict[str, Any]]:
    """What the run decides. ``struck``: the faults, None of a run without.

    ``wanted``: how many operations were asked for; a full run makes GOAL_OPERATIONS.
    """

    def goal(name: str, value: int, bound: int, unit: str, holds: bool) -> dict[str, Any]:
        return {"name": name, "value": value, "bound": bound, "unit": unit, "holds": holds}

    found = [
        goal("operations", operations, wanted, "operations", operations >= wanted),
        goal("acknowledged changes lost or altered", len(failures), 0, "changes", not failures),
        goal("users that differ by verify", different, 0, "users", different == 0),
    ]
    if struck is not None:
        found.append(goal("faults", struck, 1, "faults", struck >= 1))
    return found


def lines(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table for the terminal."""
    head = "operation", "acknowledged", "refused", "unknown", "before OK", "at most later"
    found = [f"{head[0]:24} {head[1]:>12} {head[2]:>8} {head[3]:>8} {head[4]:>10} {head[5]:>14}"]
    for row in table:
        late = "" if row["late_max_s"] is None else f"{row['late_max_s']:.3f} s"
        found.append(
            f"{row['operation']:24} {row['acknowledged']:>12} {row['refused']:>8}"
            f" {row['unknown']:>8} {row['before_ok']:>10} {late:>14}"
        )
        if row["last_refusal"]:
            found.append(f"    last refusal: {row['last_refusal'][:150]}")
    return found
