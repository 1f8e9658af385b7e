"""umbractl against an API that is played: what people read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from umbra import cli

QUEUE = {
    "node": "mail-b",
    "messages": [
        {
            "origin": "mail-a", "state": "held", "messages": 12, "bytes": 3_000_000,
            "oldest_s": 7300.0, "next": "held: discarded when mail-a has delivered them",
        }
    ],
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


ANSWER = {
    "recipient": "bob@example.com", "since": "2027-01-15T08:00:00Z",
    "until": "2027-01-15T09:00:00Z", "dry_run": True, "found": 4, "present": 2, "queued": 0,
    "resubmitted": 1, "failed": {},
    "messages": [
        {
            "shadow_id": "0" * 32, "message_id": "<1@example.org>", "sender": "",
            "accepted": "2027-01-15T08:30:00Z", "bytes": 2048,
        }
    ],
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
