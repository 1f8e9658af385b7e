"""What the failover benchmark makes of its samples."""

from __future__ import annotations

import pytest
from tests.bench.failover import figures
from tests.bench.failover.figures import LOST, MOVED, Change

S = 1_000_000_000


def change(kind: str, smtp: float, imap: float, delay: float = 2.0) -> Change:
    return Change(kind, "default", delay, 1, smtp, imap, 9.0, {})


def test_an_outage_is_the_longest_pause_that_touches_the_window() -> None:
    ends = [S, 2 * S, 5 * S, 6 * S, 20 * S]
    assert figures.window(ends, int(2.5 * S), 7 * S) == 14
    assert figures.window(ends[:4], int(2.5 * S), int(5.5 * S)) == 3


def test_an_outage_that_never_ended_lasts_until_the_end() -> None:
    assert figures.window([S], 2 * S, 9 * S) == 8


def test_the_parts_of_an_outage_add_up_to_it() -> None:
    states = [
        (99.0, "state: ready (it has everything)"),
        (102.5, "state: candidate (mail-a is silent)"),
        (102.6, "another line"),
        (102.75, "state: promoting (it has the key)"),
        (103.0, "state: primary (open)"),
    ]
    parts = figures.parts(100.0, states, 103.2, 103.5)
    assert parts == {
        "noticed": 2.5,
        "decided": 0.5,
        "first message": 0.2,
        "first change": 0.5,
    }
    assert sum(list(parts.values())[:3]) == pytest.approx(3.2)


def test_the_steps_of_a_switchover_are_those_of_its_outage() -> None:
    lines = [
        "switchover: prepare took 1.200 s",
        "switchover: drain took 0.010 s",
        "switchover: close took 0.250 s",
        "another line",
        "switchover: hand over took 0.100 s",
        "switchover: tidy took 0.300 s",
    ]
    assert figures.steps(lines) == {"drain": 0.01, "close": 0.25, "hand over": 0.1}


def test_a_promotion_that_was_not_seen_has_no_parts() -> None:
    assert figures.parts(100.0, [(102.5, "state: candidate (x)")], 103, 104) == {}


def test_goals_take_the_slower_protocol_and_the_near_line_only() -> None:
    changes = [
        *(change(LOST, 2.0, 3.0) for _ in range(19)),
        change(LOST, 4.5, 1.0),
        change(LOST, 9.0, 9.0, delay=40.0),
        change(MOVED, 0.3, 0.4),
    ]
    goals = {goal.name: goal for goal in figures.goals(changes)}
    assert goals["host lost, default: SMTP and IMAP back, p50 of 20"].value == 3.0
    assert goals["host lost, default: SMTP and IMAP back, p50 of 20"].holds
    assert not goals["host lost, default: SMTP and IMAP back, p99 of 20"].holds
    assert goals["switchover, default: SMTP and IMAP back, p50 of 1"].holds
    assert len(goals) == 4


def test_the_summary_has_a_row_for_each_cell() -> None:
    rows = figures.summary([change(LOST, 2.0, 3.0), change(LOST, 4.0, 5.0, 40.0)])
    assert [(row["delay_ms"], row["smtp_s"]["p50"]) for row in rows] == [(2.0, 2.0), (40.0, 4.0)]
