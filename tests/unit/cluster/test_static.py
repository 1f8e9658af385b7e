"""The state on disk: whole, of this node, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from umbra.cluster import static
from umbra.cluster.state import Change, Durable, Mode, Role
from umbra.cluster.static import StateError, StateFile

CHANGE = Change("a", "b", "2026-01-01T00:00:00.000Z", planned=True, outage_s=0.25)
DURABLE = Durable(
    "s1", 7, Role.PRIMARY, Mode.ALONE, "2026-01-01T00:00:00.000Z", "b", 8, True, CHANGE
)


def test_round_trip(tmp_path: Path) -> None:
    states = StateFile(tmp_path / "state.json", "mail", "a")
    assert states.load() is None
    states.save(DURABLE)
    assert states.load() == DURABLE
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_the_state_of_an_older_agent_is_read_as_one_that_was_merged_under_its_epoch(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state.json"
    states = StateFile(path, "mail", "a")
    states.save(replace(DURABLE, merged_under=7))
    assert states.load() == replace(DURABLE, merged_under=7)
    raw = json.loads(path.read_text())
    del raw["merged_under"]
    path.write_text(json.dumps(raw))
    assert states.load() == replace(DURABLE, merged_under=DURABLE.epoch)


def test_the_state_of_another_node_is_refused(tmp_path: Path) -> None:
    StateFile(tmp_path / "state.json", "mail", "a").save(DURABLE)
    with pytest.raises(StateError, match="that of a in mail, not of b"):
        StateFile(tmp_path / "state.json", "mail", "b").load()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"group": "mail", "node": "a", "epoch": 1}']
)
def test_a_damaged_state_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(StateError):
        StateFile(tmp_path / "state.json", "mail", "a").load()


def test_an_interrupted_write_leaves_the_old_state(tmp_path: Path) -> None:
    states = StateFile(tmp_path / "state.json", "mail", "a")
    states.save(DURABLE)
    (tmp_path / "state.new").write_text('{"half":')
    assert states.load() == DURABLE


def test_a_new_node_has_an_own_store_and_no_right_yet() -> None:
    one, two = (static.first("primary", CHANGE.at) for _ in range(2))
    assert one.storage_id != two.storage_id
    assert one.mode is Mode.PROTECTED  # so that it waits for a peer before it opens
