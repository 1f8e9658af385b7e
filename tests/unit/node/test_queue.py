"""The queue as its directories show it; real files and writers, no Postfix."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from umbra.node import queue as module
from umbra.node.queue import QUEUES, owed_bounces, queue_files

COMMITTED, UNCOMMITTED = 0o700, 0o600


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    for queue in QUEUES:
        (tmp_path / queue).mkdir()
    return tmp_path


def test_each_file_has_its_place(spool: Path) -> None:
    (spool / "deferred" / "A").mkdir()
    for place in ("active/4hK2pl0Zzz", "deferred/A/A1B2C3D4E5", "incoming/4hK2pm0Zzz"):
        (spool / place).touch(COMMITTED)
    (spool / "incoming" / "4hK2pn0Zzz").touch(UNCOMMITTED)
    with (spool / "incoming" / "4hK2pn0Zzz").open("wb"):
        assert queue_files(spool) == {
            "4hK2pl0Zzz": "active",
            "A1B2C3D4E5": "deferred",
            "4hK2pm0Zzz": "incoming",
            "4hK2pn0Zzz": "arriving",
        }


def test_what_has_no_queue_id_for_a_name_is_no_message(spool: Path) -> None:
    """One left there by hand would be newer than all messages for ever, and nothing discarded."""
    (spool / "deferred" / "4").mkdir()
    for place in ("hold/4hK2pl0Zzz.bak", "active/backup-2026", "deferred/4/x", "maildrop/1.2"):
        (spool / place).touch(COMMITTED)
    assert queue_files(spool) == {}


def test_a_file_whose_writer_was_killed_is_no_message(spool: Path) -> None:
    path = spool / "incoming" / "4hK2pn0Zzz"
    path.touch(UNCOMMITTED)
    script = "import sys, time; file = open(sys.argv[1], 'wb'); print(flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        assert queue_files(spool) == {path.name: "arriving"}
        writer.kill()
        writer.wait()
    assert queue_files(spool) == {}


def test_looking_does_not_hinder_the_writer(spool: Path) -> None:
    path = spool / "incoming" / "4hK2pn0Zzz"
    path.touch(UNCOMMITTED)
    with path.open("wb") as file:
        assert queue_files(spool) == {path.name: "arriving"}
        file.write(b"more")
        os.fchmod(file.fileno(), COMMITTED)
    assert queue_files(spool) == {path.name: "incoming"}


def test_a_file_that_is_committed_meanwhile_counts(
    spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spool / "incoming" / "4hK2pn0Zzz"
    path.touch(UNCOMMITTED)

    def written(descriptor: int) -> bool:
        os.fchmod(descriptor, COMMITTED)
        return False

    monkeypatch.setattr("umbra.node.queue._written", written)
    assert queue_files(spool) == {path.name: "incoming"}


def test_without_leases_it_is_believed_to_arrive(
    spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (spool / "incoming" / "4hK2pn0Zzz").touch(UNCOMMITTED)

    def fcntl(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("umbra.node.queue.fcntl.fcntl", fcntl)
    assert queue_files(spool) == {"4hK2pn0Zzz": "arriving"}


def test_a_queue_that_cannot_be_read_is_no_empty_queue(spool: Path) -> None:
    (spool / "hold").rmdir()
    with pytest.raises(FileNotFoundError):
        queue_files(spool)


def test_a_bounce_log_is_a_file_of_some_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is Postfix's, and who reads it is root."""
    logs = tmp_path / "bounce"
    logs.mkdir()
    (logs / "4hK2pl0Zzz").write_text("recipient=eve@remote\nstatus=5.1.1\n")
    (logs / "4hK2pm0Zzz").symlink_to("/dev/zero")
    os.mkfifo(logs / "4hK2pn0Zzz")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(logs / "4hK2pp0Zzz"))
        found = owed_bounces(tmp_path)
    assert {name: failed for name, failed in found.items() if failed} == {
        "4hK2pl0Zzz": ["eve@remote"]
    }
    monkeypatch.setattr(module, "MAX_LOG", 20)
    with pytest.raises(OSError, match=r"too large.*4hK2pl0Zzz"):
        owed_bounces(tmp_path)
