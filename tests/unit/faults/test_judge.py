"""The account of a trial, from logs and mailboxes that are made up."""

from typing import Any

import pytest
from tests.faults import load
from tests.faults.trial import judge, turns

SENT = {"head": "h", "body": "b", "size": 2}
USER = "user01@example.org"
SECOND = 1_000_000_000
Log = list[dict[str, Any]]
Views = dict[str, Any]


def send(
    number: int, outcome: str = "ok", end: float | None = None, node: str = "mail-a"
) -> dict[str, Any]:
    at = int((number if end is None else end) * SECOND)
    return {
        "type": "op", "kind": "send", "id": f"r-{number}", "start": at - 1000, "end": at,
        "node": node, "outcome": outcome, "answer": "250 ok", "recipients": [USER],
        "content": "plain", "sent": SENT,
    }  # fmt: skip


def message(number: int, uid: int | None = None) -> dict[str, Any]:
    return {"uid": uid or number, "id": f"r-{number}", "flags": [], **SENT}


@pytest.fixture
def log() -> Log:
    """One message a second, acknowledged, from second 1 on."""
    begin = {"type": "begin", "at": 0, "wall": 0.0, "run": "r"}
    end = {"type": "end", "at": 100 * SECOND, "wall": 100.0}
    return [begin, *(send(number) for number in range(1, load.ENOUGH + 11)), end]


@pytest.fixture
def views(log: Log) -> Views:
    count = sum(item["type"] == "op" for item in log)
    return {
        node: {
            USER: {"INBOX": {"uidvalidity": 1, "messages": [message(n + 1) for n in range(count)]}}
        }
        for node in ("mail-a", "mail-b")
    }


def inbox(views: Views, node: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = views[node][USER]["INBOX"]["messages"]
    return found


def verdict(log: Log, views: Views) -> tuple[dict[str, Any], list[str]]:
    return judge(log, views, 10 * SECOND, 20 * SECOND)


def test_all_there_once_on_both_nodes(log: Log, views: Views) -> None:
    figures, reasons = verdict(log, views)
    assert reasons == []
    assert figures["acknowledged"] == load.ENOUGH + 10
    assert set(figures["counts"].values()) == {0}
    assert figures["refusal_s"] == 1.0


@pytest.mark.parametrize("nodes", [["mail-a"], ["mail-b"], ["mail-a", "mail-b"]])
def test_a_message_that_is_missing_on_either_node_is_lost(
    log: Log, views: Views, nodes: list[str]
) -> None:
    for node in nodes:
        del inbox(views, node)[4]
    figures, reasons = verdict(log, views)
    assert figures["counts"]["lost"] == 1
    assert any("r-5 (plain)" in reason for reason in reasons)


def test_a_second_copy_is_a_duplicate(log: Log, views: Views) -> None:
    for node in views:
        inbox(views, node).append(message(5, uid=1000))
    figures, reasons = verdict(log, views)
    assert figures["counts"]["duplicated"] == 1
    assert reasons


def test_a_refused_message_must_not_be_there_and_an_unknown_one_may(log: Log, views: Views) -> None:
    log[-1:-1] = [send(901, "refused", 30.5), send(902, "unknown", 30.6)]
    assert verdict(log, views)[1] == []
    for node in views:
        inbox(views, node).append(message(902))
    assert verdict(log, views)[1] == []
    for node in views:
        inbox(views, node).append(message(901))
    figures, reasons = verdict(log, views)
    assert figures["counts"]["refused_but_present"] == 1
    assert reasons


def test_who_is_told_so_does_not_know(log: Log, views: Views) -> None:
    log[5].update(outcome="refused", answer="451 4.3.0 Error: queue file write error")
    assert verdict(log, views)[0]["counts"]["refused_but_present"] == 1
    figures, reasons = judge(log, views, 10 * SECOND, 20 * SECOND, unsure="file write error")
    assert (figures["unknown"], reasons) == (1, [])
    assert judge(log, views, 10 * SECOND, 20 * SECOND, unsure="another")[1]


def test_a_change_counts_as_an_acknowledgement(log: Log, views: Views) -> None:
    change = {
        **send(30), "kind": "create", "node": "mail-b", "user": USER, "generation": "0",
        "mailbox": "failover-test-r-0-a",
    }  # fmt: skip
    assert turns([*log[:30], change, *log[30:]]) == ["mail-a", "mail-b", "mail-a"]


def test_the_longest_gap_that_touches_the_fault_counts(log: Log, views: Views) -> None:
    for number in (15, 16, 17, 40, 41, 42, 43, 44):
        log[number]["outcome"] = "unreached"
        for node in views:
            inbox(views, node)[:] = [m for m in inbox(views, node) if m["id"] != f"r-{number}"]
    assert verdict(log, views)[0]["refusal_s"] == 4.0


def test_mail_must_flow_after_the_recovery(log: Log, views: Views) -> None:
    _, reasons = judge(log, views, 10 * SECOND, 60 * SECOND)
    assert reasons == ["No message was taken after the group was protected again."]


def test_too_little_load_proves_nothing(log: Log, views: Views) -> None:
    few = [*log[: load.ENOUGH], log[-1]]
    for node in views:
        del inbox(views, node)[load.ENOUGH - 1 :]
    _, reasons = verdict(few, views)
    assert any(f"a test needs {load.ENOUGH}" in reason for reason in reasons)


def test_a_load_that_broke_off_proves_nothing(log: Log, views: Views) -> None:
    assert verdict(log[:-1], views)[1] == ["The workload ended before it was told to."]


def test_one_node_acknowledges_at_a_time(log: Log, views: Views) -> None:
    for item in log[13:-1]:
        item["node"] = "mail-b"
    assert turns(log) == ["mail-a", "mail-b"]
    assert verdict(log, views)[1] == [
        "More than one node acknowledged at a time: mail-a, then mail-b."
    ]
    assert judge(log, views, 10 * SECOND, 20 * SECOND, most_turns=2)[1] == []
    log[20]["node"] = "mail-a"
    [reason] = judge(log, views, 10 * SECOND, 20 * SECOND, most_turns=2)[1]
    assert reason.endswith("mail-a, then mail-b, then mail-a, then mail-b.")


def test_an_answer_that_was_long_on_its_way_is_no_second_turn() -> None:
    late = send(3, end=9.0)
    late["start"] = 4 * SECOND
    assert turns([send(1), send(2), late, *(send(n, node="mail-b") for n in (8, 10))]) == [
        "mail-a", "mail-b",
    ]  # fmt: skip
