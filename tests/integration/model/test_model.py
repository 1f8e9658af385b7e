"""A short run of the model test: random operations, each OK held against the shadow's own disk."""

from __future__ import annotations

import pytest
from tests.integration import lab
from tests.model.__main__ import BUILD, make
from tests.model.machine import SELECTION

pytestmark = [pytest.mark.usefixtures("protected"), pytest.mark.timeout(240)]
SEED = 4711


def held(made: dict[str, object]) -> None:
    """Every goal of a run holds."""
    goals = made["goals"]
    assert isinstance(goals, list)
    assert goals
    assert [goal for goal in goals if not goal["holds"]] == [], (
        made["failures"] or made["different"]
    )


def test_random_operations_are_on_the_shadow_when_they_are_ok() -> None:
    made = make(150, SEED, (), BUILD / "selection.json")
    held(made)
    assert made["operations"] >= 150


def test_nothing_is_lost_when_something_breaks() -> None:
    made = make(60, SEED, SELECTION, BUILD / "selection_faults.json")
    held(made)
    lab.wait("the group is protected", lambda: lab.status(lab.NODES[0])["protected"], 60)
