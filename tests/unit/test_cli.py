"""umbractl against an API that is played: what people read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from umbra import cli

ROW = {
    "origin": "mail-a", "state": "held", "messages": 12, "bytes": 3_000_000,
    "oldest_s": 7300.0, "next": "held: discarded when mail-a has delivered them",
}  # fmt: skip
QUEUE = {
    "node": "mail-b",
    "messages": [ROW],
    "copies": [{"holder": "mail-b", "messages": 0}, {"holder": "mail-a", "messages": 7}],
}  # fmt: skip


class Played:
    """Stands for the API: answers by path, and keeps what it was asked."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str, Any]] = []

    def call(self, method: str, path: str, body: Any = None, **_: Any) -> Any:
        self.asked.append((method, path, body))
        return self.answers[path]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played({"/queue": QUEUE})
    monkeypatch.setattr(cli, "call", played.call)
    return played


def run(*words: str) -> str:
    result = CliRunner().invoke(cli.cli, words)
    assert result.exit_code == 0, result.output
    return result.output


def test_queue_is_a_table(api: Played) -> None:
    lines = run("queue").splitlines()
    assert lines[0].split() == ["primary", "messages", "size", "oldest", "next"]
    assert lines[1].split()[:6] == ["mail-a", "12", "3", "MiB", "2", "h"]
    assert lines[1].endswith("held: discarded when mail-a has delivered them")
    assert lines[2:] == [
        "copies of this node's own queue here: 0",
        "copies of this node's own queue at mail-a: 7",
    ]


def test_queue_as_json_is_the_answer(api: Played) -> None:
    assert json.loads(run("queue", "--json")) == QUEUE


MESSAGE = {
    "shadow_id": "0" * 32, "message_id": "<1@example.org>", "sender": "",
    "accepted": "2027-01-15T08:30:00Z", "bytes": 2048,
}  # fmt: skip
ANSWER = {
    "recipient": "bob@example.com", "since": "2027-01-15T08:00:00Z",
    "until": "2027-01-15T09:00:00Z", "dry_run": True, "found": 4, "present": 2, "queued": 0,
    "resubmitted": 1, "failed": {}, "messages": [MESSAGE],
}  # fmt: skip


def test_resubmit_tells_what_it_did_with_each(api: Played) -> None:
    api.answers["/resubmit"] = ANSWER
    lines = run("resubmit", "--recipient", "bob@example.com", "--since", "2h", "--dry-run")
    assert "2027-01-15 08:30:00 UTC  <>      <1@example.org>  2 KiB" in lines
    assert [line.strip() for line in lines.splitlines()[-5:]] == [
        "4 in the safety net",
        "2 in the mailbox already",
        "0 in the queue still",
        "1 would be sent again",
        "0 refused",
    ]
    body = {"recipient": "bob@example.com", "since": "2h", "until": None, "dry_run": True}
    assert api.asked == [("POST", "/resubmit", body)]


def test_resubmit_fails_when_something_was_refused(api: Played) -> None:
    api.answers["/resubmit"] = {**ANSWER, "dry_run": False, "failed": {"f" * 32: "451 no"}}
    result = CliRunner().invoke(cli.cli, ["resubmit", "--recipient", "bob@example.com"])
    assert result.exit_code == 1
    assert "1 sent again" in result.output
    assert f"{'f' * 32}: 451 no" in result.output


def test_an_empty_queue_is_said_in_words(api: Played) -> None:
    api.answers["/queue"] = {"node": "mail-b", "messages": [], "copies": []}
    assert run("queue") == "mail-b holds no message.\n"


def test_what_was_set_aside_is_named_tried_again_and_dropped(api: Played) -> None:
    row = {"shadow_id": "f" * 32, "message_id": "<1@x>", "origin": "mail-a", "reason": "554 no"}
    api.answers = {"/queue": {**QUEUE, "parked": [row]}, "/parked": {"changed": True}}
    assert f"parked {'f' * 32} (<1@x>) of mail-a: 554 no" in run("queue")
    run("queue", "--retry")
    run("queue", "--drop", "f" * 32)
    assert api.asked[1:] == [("POST", "/parked", {}), ("POST", "/parked", {"drop": "f" * 32})]


NODE = {
    "node": "mail-b", "site": "beta", "role": "shadow", "state": "syncing", "reachable": True,
    "lag_changes": 0, "lag_s": 0.0, "shadow_messages": 0, "shadow_bytes": 0, "since": "",
    "reasons": [], "cause": "mail-a has not taken this node into the protected set",
    "policy": "blocked", "service_addresses": [],
}  # fmt: skip
REPORT = {
    "group": "mail", "node": "mail-b", "protected": False, "reasons": ["no node is primary"],
    "epoch": 4, "primary": None, "mode": "alone", "inventory_role": "shadow",
    "last_switchover": None, "nodes": [NODE], "checks": [], "coordinator": "etcd",
    "paused": True, "protected_set": [], "service_addresses": [],
}  # fmt: skip


def test_the_status_shows_the_coordinator_with_cause_and_policy(api: Played) -> None:
    api.answers["/status"] = REPORT
    result = CliRunner().invoke(cli.cli, ["status"])
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert (
        "coordinator etcd: protected nobody; automatic failover paused (umbractl unpause)" in lines
    )
    assert f"  mail-b: syncing: {NODE['cause']}; policy blocked" in lines


def test_the_status_shows_where_each_service_address_is(api: Played) -> None:
    first, second = "192.0.2.20", "2001:db8:a::20"
    nodes = [{**NODE, "service_addresses": [first]}, {**NODE, "node": "mail-a"}]
    api.answers["/status"] = {**REPORT, "nodes": nodes, "service_addresses": [first, second]}
    lines = CliRunner().invoke(cli.cli, ["status"]).output.splitlines()
    assert f"service address {first}: mail-b" in lines
    assert f"service address {second}: nowhere" in lines
    nodes[1]["service_addresses"] = [first]
    lines = CliRunner().invoke(cli.cli, ["status"]).output.splitlines()
    assert f"service address {first}: mail-b and mail-a" in lines


def test_a_static_group_shows_nothing_of_it(api: Played) -> None:
    node = {**NODE, "cause": "", "policy": ""}
    api.answers["/status"] = {**REPORT, "coordinator": "static", "nodes": [node]}
    result = CliRunner().invoke(cli.cli, ["status"])
    assert isinstance(result.exception, SystemExit)
    assert "coordinator" not in result.output
    assert "service address" not in result.output


@pytest.mark.parametrize(
    ("typed", "done"), [("lose 3 ? 240", True), ("mail-b", False), ("lose nothing", False)]
)
def test_a_forced_failover_names_what_is_lost_and_wants_it_typed(
    api: Played, typed: str, done: bool
) -> None:
    loss = {
        "certain": False, "messages": 3, "changes": None, "seconds": 240.0,
        "others": {"mail-c": 1.5}, "renewed": True,
    }  # fmt: skip
    answers: list[Any] = [loss, {"to": "mail-b", "epoch": 5}]
    asked: list[Any] = []

    def call(method: str, path: str, body: Any = None, **_: Any) -> Any:
        if path == "/status":
            return REPORT
        asked.append(body)
        return answers[len(asked) - 1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "call", call)
        words = ["failover", "--candidate", "mail-b", "--accept-loss"]
        result = CliRunner().invoke(cli.cli, words, input=f"{typed}\n")
    assert "3 messages" in result.output
    assert "mail-c had everything 1.5 seconds ago." in result.output
    assert "mail-b had everything, but on another disk: this one began anew." in result.output
    assert (result.exit_code == 0) is done
    assert len(asked) == 1 + done
    assert asked[0]["dry_run"]


@pytest.mark.parametrize(("word", "on"), [("pause", True), ("unpause", False)])
def test_automatic_failover_is_paused_and_unpaused(api: Played, word: str, on: bool) -> None:
    api.answers["/pause"] = {"paused": on, "changed": True}
    run(word)
    api.answers["/pause"]["changed"] = False
    assert "already" in run(word)
    assert api.asked[-1] == ("POST", "/pause", {"on": on})


ODD = "<a[/b]c\x9b2J\ud800@x>"


def test_what_a_sender_chose_is_shown_as_it_is(api: Played) -> None:
    """And is neither markup nor a command to the terminal: the replay was made by then."""
    row: dict[str, Any] = {**MESSAGE, "sender": f"[red]{ODD}", "message_id": ODD}
    api.answers["/resubmit"] = {
        **ANSWER, "recipient": "[/x]@x", "messages": [row], "failed": {"f" * 32: f"451 {ODD}"},
    }  # fmt: skip
    result = CliRunner().invoke(cli.cli, ["resubmit", "--recipient", "[/x]@x"])
    assert result.exit_code == 1
    assert "[red]<a[/b]c?2J?@x>  <a[/b]c?2J?@x>" in result.output
    assert "[/x]@x, accepted from" in result.output
    assert f"{'f' * 32}: 451 <a[/b]c?2J?@x>" in result.output


def test_nothing_else_is_taken_for_markup(api: Played) -> None:
    parked = {"shadow_id": "f", "message_id": ODD, "origin": "[/a]", "reason": f"554 {ODD}"}
    row = {**ROW, "origin": "[/a]", "next": "held for [/a]"}
    copies = [{"holder": "[/b]", "messages": 7}]
    api.answers["/queue"] = {**QUEUE, "messages": [row], "copies": copies, "parked": [parked]}
    said = run("queue")
    assert "held for [/a]" in said
    assert "at [/b]: 7" in said
    assert "parked f (<a[/b]c?2J?@x>) of [/a]: 554 <a[/b]c?2J?@x>" in said
    change = {"from": "[/a]", "to": "[/b]", "at": "", "planned": True, "outage_s": None}
    node = {**NODE, "node": "[/a]", "site": "[/b]", "since": "[/c]"}
    api.answers["/status"] = {**REPORT, "last_switchover": change, "nodes": [node]}
    output = CliRunner().invoke(cli.cli, ["status"]).output
    assert "last switchover: [/a] to [/b]" in output
