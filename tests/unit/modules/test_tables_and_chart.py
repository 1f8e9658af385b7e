"""What is shown: tables for the terminal and the geometry of the chart."""

from typing import Any

import pytest
from ansible_collections.umbra.mail.plugins.filter.health_table import health_table
from ansible_collections.umbra.mail.plugins.module_utils import _chart as charts
from ansible_collections.umbra.mail.plugins.module_utils import _tables as tables

CHECK = {"name": "lag", "passed": True, "value": 0.0, "threshold": 5.0, "message": "Fine."}


def test_table_aligns_numbers_right_and_text_left() -> None:
    assert tables.table(["name", "count"], [["a", 5], ["long one", 12345]]) == [
        "name      count",
        "--------  -----",
        "a             5",
        "long one  12345",
    ]


def test_table_without_rows() -> None:
    assert tables.table(["a", "b"], []) == ["a  b", "-  -"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (True, "yes"), (False, "no"), ([], "none"), ([25, 993], "25,993"), (1.5, "1.5")],
)
def test_shown(value: Any, text: str) -> None:
    assert tables.shown(value) == text


def test_health_of_a_pair_with_one_node_down() -> None:
    status = {"nodes": [{"node": "mail-a", "role": "primary", "reachable": True, "lag_s": 0.0}]}
    lines = health_table(
        {
            "mail-b": {"unreachable": True, "msg": "no route to host"},
            "mail-a": {"checks": [CHECK], "status": status},
        }
    )
    text = "\n".join(lines)
    assert "mail-b  FAILED  host reachable" in text
    assert "FAILED mail-b, host reachable: no route to host" in text
    assert max(map(len, lines)) <= 80
    assert "mail-a  passed  lag" in text
    assert lines[0].startswith("node")
    assert "primary" in lines[2]


def test_health_when_no_agent_answers() -> None:
    lines = health_table({"mail-a": {"checks": [CHECK], "status": {}}, "mail-b": {}})
    assert lines[-1] == "FAILED mail-b, host reachable: The host cannot be reached."


def test_sentence_of_a_failed_check_is_shown_and_wrapped() -> None:
    failed = {**CHECK, "passed": False, "message": "word " * 40}
    lines = health_table({"mail-a": {"checks": [failed], "status": {}}})
    assert len(lines) == 3 + 4
    assert max(map(len, lines)) <= 80


def test_area_steps() -> None:
    path = charts.area([0, 2, 2, 1], 2, 10.0, 0.0)
    assert path == "M0 110H10.00V0.00H30.00V55.00H40.00V110Z"


@pytest.mark.parametrize("duration", [0.1, 3.0, 47.0, 180.0, 3600.0])
def test_ticks_are_few_and_round(duration: float) -> None:
    found = charts.ticks(duration)
    assert found[0] == 0
    assert len(found) <= 13
    assert found[-1] <= duration


def test_chart() -> None:
    timeline = {"bin_ms": 100, "messages": [1, 3], "changes": [0, 0], "failed": [0, 4]}
    moves = [{"from": "mail-a", "to": "mail-b", "begin_s": 0.1, "end_s": 0.1}]
    chart = charts.chart(timeline, moves)
    assert [lane["peak"] for lane in chart["lanes"]] == [3, 1]
    assert chart["failed"] == [{"x": 500.0, "width": 500.0, "count": 4}]
    assert chart["moves"] == [{"x": 500.0, "width": 2.0, "label": "mail-a → mail-b"}]
