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


def test_an_empty_queue_is_said_in_words(api: Played) -> None:
    api.answers["/queue"] = {"node": "mail-b", "messages": [], "copies": []}
    assert run("queue") == "mail-b holds no message.\n"
