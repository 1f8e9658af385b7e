"""What every benchmark says of its samples: medians, spread, percentiles, goals. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """A figure of the specification: ``value`` must be at least or at most ``bound``."""

    name: str
    value: float
    bound: float
    unit: str
    holds: bool

    @classmethod
    def at_least(cls, name: str, value: float, bound: float, unit: str) -> Goal:
        """A goal that a greater value reaches."""
        return cls(name, value, bound, unit, value >= bound)

    @classmethod
    def at_most(cls, name: str, value: float, bound: float, unit: str) -> Goal:
        """A goal that a smaller value reaches."""
        return cls(name, value, bound, unit, value <= bound)


class Missing(Exception):
    """The samples do not decide the figure."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of ``values``."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that is not under ``percent`` of all (nearest rank)."""
    ordered = sorted(values)
    if not ordered:
        raise Missing("no value")
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def lines(goals: Iterable[dict[str, Any]]) -> str:
    """The goals for people."""
    return "\n".join(
        f"{'holds' if goal['holds'] else 'FAILS'}  {goal['name']}:"
        f" {goal['value']:.2f} {goal['unit']} (bound {goal['bound']:g})"
        for goal in goals
    )
