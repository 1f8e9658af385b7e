"""What replication_agent refuses before anything is changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.roles.stage import Stage

START = "--start-at-task=Refuse a command that is no list"


@pytest.mark.parametrize(
    ("owner", "words"),
    [
        (None, ""),
        ({"group": "mail", "node": "a"}, ""),
        ({"group": "mail", "node": "old"}, "a has the state of old in group mail, and the"),
        ({"group": "post", "node": "a"}, "a has the state of a in group post, and the inventory"),
    ],
)
def test_a_node_keeps_its_name_and_group(
    tmp_path: Path, owner: dict[str, str] | None, words: str
) -> None:
    stage = Stage(tmp_path, "replication_agent")
    if owner:
        stage.write("var/lib/umbra/state.json", json.dumps({**owner, "epoch": 3}))
    variables = {"replication_agent_group": "mail"}
    code, text = stage.play(["a"], ["preflight"], variables, "--check", START)
    assert (code != 0) is bool(words), text
    assert words in text
