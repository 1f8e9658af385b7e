"""The module failover_account_info: from files to the result."""

import json
from pathlib import Path

import pytest
from ansible_collections.umbra.mail.plugins.modules import failover_account_info as module

LOG = [
    {"type": "begin", "at": 0, "wall": 0.0, "run": "r"},
    {
        "type": "op",
        "kind": "send",
        "id": "m1",
        "start": 1,
        "end": 2_000_000,
        "outcome": "ok",
        "answer": "250",
        "recipients": ["user01@example.org"],
        "content": "sample python/msg_01.txt",
        "sent": {"head": "h", "body": "b", "size": 2},
    },
    {"type": "end", "at": 3_000_000},
]
STORED = {"uid": 1, "id": "m1", "flags": [], "head": "h", "body": "b", "size": 2}
VIEW = {"user01@example.org": {"INBOX": {"uidvalidity": 1, "messages": [STORED]}}}


def params(directory: Path) -> dict[str, object]:
    return {
        "directory": str(directory),
        "views": ["outside"],
        "moves": [],
        "min_messages": 1,
        "min_changes": 0,
    }


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(item) + "\n" for item in LOG))
    (tmp_path / "marks.jsonl").write_text("")
    (tmp_path / "outside.json").write_text(json.dumps(VIEW))
    return tmp_path


def test_result(evidence: Path) -> None:
    result = module.result(params(evidence))
    assert result["report"]["verdict"] == "pass"
    assert result["report"]["samples_sent"] == 1
    assert "verdict: pass" in result["table"]
    assert result["chart"]["bins"] == 1
    json.dumps(result)


def test_half_a_line_at_the_end_is_left_out(evidence: Path) -> None:
    with (evidence / "log.jsonl").open("a") as file:
        file.write('{"type": "op", "ki')
    assert module.result(params(evidence))["report"]["acknowledged"] == 1


def test_half_a_line_in_the_middle_is_an_error(evidence: Path) -> None:
    text = (evidence / "log.jsonl").read_text()
    (evidence / "log.jsonl").write_text('{"type": "op", "ki\n' + text)
    with pytest.raises(ValueError, match=r"Invalid|Unterminated"):
        module.result(params(evidence))


def test_missing_view_is_an_error(evidence: Path) -> None:
    (evidence / "outside.json").unlink()
    with pytest.raises(FileNotFoundError):
        module.result(params(evidence))
