"""Which shadows changes wait for."""

from __future__ import annotations

from umbra.mailbox.mirror import Phase
from umbra.mailbox.selection import chosen

BOTH = ("b", "c")


def test_the_first_ones_are_chosen_when_nobody_is_ready() -> None:
    phases = {"b": Phase.RECORDING, "c": Phase.CATCHING_UP}
    assert chosen(phases, BOTH, 1) == {"b"}
    assert chosen(phases, BOTH, 2) == {"b", "c"}


def test_who_waits_already_stays() -> None:
    phases = {"b": Phase.CATCHING_UP, "c": Phase.PROTECTED}
    assert chosen(phases, BOTH, 1) == {"c"}
    assert chosen({"b": Phase.PROTECTED, "c": Phase.PROTECTED}, BOTH, 1) == {"b"}


def test_who_does_not_answer_gives_way() -> None:
    phases = {"b": Phase.RECORDING, "c": Phase.CATCHING_UP}
    assert chosen(phases, ["c"], 1) == {"c"}
    assert chosen(phases, [], 1) == {"b"}
