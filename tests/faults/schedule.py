"""Which fault comes when: from a seed alone, so that a run can be had again. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

EARLIEST_S, LATEST_S = 1.0, 3.0
"""Seconds of load before the fault: enough for all connections to be in use."""


@dataclass(frozen=True)
class Plan:
    """One trial to make; ``seed`` decides all that is random in it."""

    number: int
    fault: str
    seed: str
    moment_s: float


def plan(seed: int, number: int, fault: str) -> Plan:
    """The plan of trial ``number``; the same whatever other trials are made."""
    own = f"{seed}-{number}-{fault}"
    return Plan(number, fault, own, round(random.Random(own).uniform(EARLIEST_S, LATEST_S), 3))


def schedule(seed: int, faults: Sequence[str], trials: int) -> list[Plan]:
    """Every fault in turn, in an order that each round draws anew.

    So even a short run has each fault about equally often, and none always follows the same other.
    """
    plans: list[Plan] = []
    turn = 0
    while len(plans) < trials:
        order = list(faults)
        random.Random(f"{seed}-round-{turn}").shuffle(order)
        plans += [plan(seed, len(plans) + place, name) for place, name in enumerate(order, 1)]
        turn += 1
    return plans[:trials]
