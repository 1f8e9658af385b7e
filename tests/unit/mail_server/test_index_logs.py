"""The ends of Dovecot's transaction logs after a power cut."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from roles.mail_server.files.umbra_boot.index_logs import (
    MAX_LOG,
    main,
    mend,
    needless,
    recent_logs,
    size_of,
    whole,
)

HEADER = bytes([1, 3]) + (40).to_bytes(2, sys.byteorder) + bytes(36)
APPEND, BOUNDARY = 0x10000002, 0x10080000


def number(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


def encoded(size: int) -> bytes:
    groups = [size >> 2 >> shift & 0x7F for shift in (21, 14, 7, 0)]
    return bytes(0x80 | group for group in groups)


def record(content: bytes, kind: int = APPEND) -> bytes:
    return encoded(8 + len(content)) + number(kind) + content


def transaction(*records: bytes) -> bytes:
    size = 12 + sum(map(len, records))
    return record(number(size), BOUNDARY) + b"".join(records)


@pytest.mark.parametrize("size", [8, 12, 508, 512, 65536, 0x3FFFFFFC])
def test_a_length_as_dovecot_writes_it(size: int) -> None:
    assert size_of(encoded(size)) == size


def test_an_unfinished_length_is_none() -> None:
    assert size_of(bytes(4)) == size_of(b"\x80\x80\x80\x02") == 0


ONE = record(b"x" * 16)
TWO = transaction(record(b"a" * 4), record(b"b" * 24))


@pytest.mark.parametrize(
    ("kept", "lost"),
    [
        (HEADER + ONE + TWO, b""),
        (HEADER + ONE, bytes(600)),  # the new length, without what was written
        (HEADER + ONE, bytes(4)),
        (HEADER + ONE, bytes(100) + ONE),  # the next page was written back, this one was not
        (HEADER + ONE, record(b"y" * 400)[:200]),
        (HEADER + ONE, TWO[:-1]),
        (HEADER + ONE, TWO[:24]),
        (HEADER + ONE, TWO[:24] + bytes(len(TWO) - 24)),  # half of a transaction
        (HEADER, bytes(8)),
    ],
)
def test_what_is_whole_stays_and_nothing_else(kept: bytes, lost: bytes, tmp_path: Path) -> None:
    assert whole(kept + lost) == len(kept)
    path = tmp_path / "dovecot.index.log"
    path.write_bytes(kept + lost)
    assert mend(path) == len(lost)
    assert path.read_bytes() == kept
    assert mend(path) == 0


@pytest.mark.parametrize("log", [b"", bytes(40), HEADER[:20], b"\x02" + HEADER[1:] + bytes(50)])
def test_what_is_no_log_is_left_to_dovecot(log: bytes, tmp_path: Path) -> None:
    path = tmp_path / "dovecot.index.log"
    path.write_bytes(log)
    assert mend(path) == 0
    assert path.read_bytes() == log


def test_only_logs_that_were_written_last(tmp_path: Path) -> None:
    mail = tmp_path / "mail"
    new = mail / "example.org/ann/mail/mailboxes/INBOX/dbox-Mails/dovecot.index.log"
    old = mail / "example.org/bob/mail/dovecot.list.index.log"
    other = mail / "example.org/bob/mail/dovecot.mailbox.log"
    for path in (new, old, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(HEADER + ONE + bytes(12))
    os.utime(old, (1, new.stat().st_mtime - 4000))
    assert list(recent_logs(mail)) == [new]
    (mail / "dovecot.index.log").symlink_to(tmp_path / "nowhere")
    assert main(str(mail)) == 0
    assert new.read_bytes() == HEADER + ONE
    assert old.read_bytes() == other.read_bytes() == HEADER + ONE + bytes(12)


def test_what_is_no_file_keeps_no_boot_waiting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dovecot's processes could make it."""
    places = [tmp_path / name for name in ("a", "b", "c")]
    for place in places:
        place.mkdir()
    os.mkfifo(places[0] / "dovecot.index.log")
    numbered(places[1], "dovecot.index.log", 5)
    numbered(places[1], "dovecot.index.log.2", 4)
    os.mkfifo(places[1] / "dovecot.index")
    with (places[2] / "dovecot.index.log").open("wb") as file:
        file.truncate(MAX_LOG + 1)
    assert main(str(tmp_path)) == 0
    assert capsys.readouterr().err.count("not a file of Dovecot's") == 3


def test_no_mail_yet(tmp_path: Path) -> None:
    assert main(str(tmp_path / "none")) == 0


def numbered(directory: Path, name: str, log: int, size: int = 40) -> Path:
    path = directory / name
    path.write_bytes((HEADER[:8] + number(log) + HEADER[12:]).ljust(size, b"\0"))
    return path


def index(directory: Path, log: int, offset: int) -> None:
    header = bytes(60) + number(log) + number(0) + number(offset)
    (directory / "dovecot.index").write_bytes(header + bytes(272))


@pytest.mark.parametrize(
    ("before", "log", "size", "at", "offset", "goes"),
    [
        (4, 5, 18008, 5, 18804, True),  # found in a returning host
        (4, 5, 18804, 5, 18804, False),  # the log has all that the index has
        (4, 5, 18804, 4, 18804, False),  # the index needs both
        (5, 6, 100, 5, 18804, False),
        (5, 5, 100, 5, 18804, False),  # and what is in the one before is not sure to be in it
    ],
)
def test_what_would_leave_a_hole_between_two_logs_goes(
    tmp_path: Path, before: int, log: int, size: int, at: int, offset: int, goes: bool
) -> None:
    """Dovecot would say "Missing middle file" at each sync of the mailbox, for ever."""
    older = numbered(tmp_path, "dovecot.index.log.2", before)
    path = numbered(tmp_path, "dovecot.index.log", log, size)
    index(tmp_path, at, offset)
    assert needless(path) == (older if goes else None)
    older.unlink()
    assert needless(path) is None


def test_an_index_that_is_no_index_changes_nothing(tmp_path: Path) -> None:
    numbered(tmp_path, "dovecot.index.log.2", 4)
    path = numbered(tmp_path, "dovecot.index.log", 5)
    (tmp_path / "dovecot.index").write_bytes(b"")
    assert needless(path) is None
