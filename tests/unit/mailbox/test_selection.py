"""Which shadows changes wait for."""

from __future__ import annotations

from umbra.mailbox.mirror import Phase
from umbra.mailbox.selection import chosen

BOTH = ("b", "c")


def equal(name: str) -> tuple[bool, int]:
    return False, 0


def b_first(name: str) -> tuple[bool, int]:
    return name == "c", 0


def b_preferred(name: str) -> tuple[bool, int]:
    return False, {"b": 0, "c": 1}[name]


def test_whoever_has_everything_first_is_waited_for_when_nobody_is_ready() -> None:
    phases = {"b": Phase.RECORDING, "c": Phase.CATCHING_UP}
    assert chosen(phases, BOTH, 1, equal) == {"b", "c"}
    assert chosen(phases, BOTH, 2, equal) == {"b", "c"}


def test_who_waits_already_stays() -> None:
    phases = {"b": Phase.CATCHING_UP, "c": Phase.PROTECTED}
    assert chosen(phases, BOTH, 1, equal) == {"c"}
    assert chosen({"b": Phase.PROTECTED, "c": Phase.PROTECTED}, BOTH, 1, equal) == {"b"}


def test_who_does_not_answer_gives_way() -> None:
    phases = {"b": Phase.RECORDING, "c": Phase.PROTECTED}
    assert chosen(phases, ["c"], 1, b_first) == {"c"}
    assert chosen({"b": Phase.RECORDING, "c": Phase.RECORDING}, [], 1, equal) == {"b"}


def test_who_may_take_over_by_itself_comes_back_without_a_gap() -> None:
    for rank in (b_first, b_preferred):
        for phase in (Phase.RECORDING, Phase.CATCHING_UP, Phase.JOINING):
            phases = {"c": Phase.PROTECTED, "b": phase}
            assert chosen(phases, BOTH, 1, rank) == {"b", "c"}
        assert chosen({"c": Phase.PROTECTED, "b": Phase.PROTECTED}, BOTH, 1, rank) == {"b"}
        assert chosen({"c": Phase.CATCHING_UP, "b": Phase.PROTECTED}, BOTH, 1, rank) == {"b"}


def test_while_a_user_is_suspended_nobody_waits_for_more_than_must_have_it() -> None:
    phases = {"b": Phase.JOINING, "c": Phase.JOINING}
    assert chosen(phases, BOTH, 1, b_first, Phase.JOINING) == {"b"}
    phases = {"b": Phase.CATCHING_UP, "c": Phase.JOINING}
    assert chosen(phases, BOTH, 1, b_first, Phase.JOINING) == {"b", "c"}
