"""The queue view says what is held for whom and what becomes of it."""

from __future__ import annotations

from umbra.transport import view
from umbra.transport.store import Holding, State


def test_each_origin_and_state_has_a_line_with_its_next_action() -> None:
    rows = [
        Holding("mail-b", State.RESUBMITTING, 2, 700, 1000.0),
        Holding("mail-a", State.UNSHADOWED, 1, 5, 1090.0),
        Holding("mail-b", State.HELD, 3, 900, 1200.0),
    ]
    answer = view.queue("mail-a", rows, {"mail-c": 4, "mail-a": 1}, 1100.0)
    assert [
        (row["origin"], row["state"], row["messages"], row["bytes"], row["oldest_s"])
        for row in answer["messages"]
    ] == [
        ("mail-a", "unshadowed", 1, 5, 10.0),
        ("mail-b", "held", 3, 900, 0.0),  # a clock that was set back gives no negative age
        ("mail-b", "resubmitting", 2, 700, 100.0),
    ]
    assert "mail-b is gone" in answer["messages"][2]["next"]
    assert answer["copies"] == [
        {"holder": "mail-a", "messages": 1},
        {"holder": "mail-c", "messages": 4},
    ]


def test_every_state_has_a_next_action() -> None:
    assert set(view.NEXT) == set(State)
