"""Cuts from Dovecot's transaction logs what a power cut has left unfinished at their ends.

A file system may keep a file's new length and lose what was written there. Dovecot (2.4.1) takes
such an end for corruption of the whole log, throws it away and goes on with the last index that it
has: messages that were on the disk are gone from the mailbox. Whatever was synced lies before the
first unfinished record, so the rest was acknowledged to nobody.

The index itself may be newer than what is left of its log. Dovecot then goes on with the index and
a new log, and the number of the lost one is missing between that and the one before it (``.2``),
which no sync of the mailbox gets past: "Missing middle file". So the one before goes, too; all that
it says is in the index.

Format: struct mail_transaction_log_header and mail_transaction_header in Dovecot's
src/lib-index/mail-transaction-log.h, struct mail_index_header in mail-index.h. A log is cut in one
step; if this dies half-way, Dovecot makes of the rest what it would have made of all.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

NAMES = ("dovecot.index.log", "dovecot.list.index.log")
# What was written so long before the newest log (seconds) was on the disk: Linux writes back within
# half a minute.
RECENT = 3600.0
# Far over what Dovecot writes: it begins a new log after 1 MiB (mail_index_log_rotate_max_size).
MAX_LOG = 256 * 1024 * 1024

_HEADER_MIN = 24
_LOG_NUMBER = slice(8, 12)
_INDEX_LOG_NUMBER, _INDEX_LOG_OFFSET = slice(60, 64), slice(68, 72)
_MAJOR = b"\x01"
_BOUNDARY = 0x00080000
_TYPE_MASK = 0x0FFFFFFF


def size_of(field: bytes) -> int:
    """Decode a record's length: four times seven bits, each byte with its highest bit set.

    0 if that is not what it is.
    """
    if any(not byte & 0x80 for byte in field):
        return 0
    high, middle, low, last = (byte & 0x7F for byte in field)
    return (high << 21 | middle << 14 | low << 7 | last) << 2


def _number(field: bytes) -> int:
    return int.from_bytes(field, sys.byteorder)


def whole(log: bytes) -> int | None:
    """Return how many bytes of a log are whole transactions; None if it is no log."""
    at = _number(log[2:4])
    if log[:1] != _MAJOR or not _HEADER_MIN <= at <= len(log):
        return None
    begun, until = at, at  # the transaction of several records that is being read
    while at + 8 <= len(log):
        size = size_of(log[at : at + 4])
        if size < 8 or at + size > len(log):
            break
        if _number(log[at + 4 : at + 8]) & _TYPE_MASK == _BOUNDARY and size >= 12:
            begun, until = at, at + _number(log[at + 8 : at + 12])
        at += size
    return begun if at < until else at


def recent_logs(mail: Path) -> Iterator[Path]:
    """Return the logs that were written last."""
    found = {
        path: path.lstat().st_mtime
        for directory, _, names in os.walk(mail)
        for path in (Path(directory) / name for name in names if name in NAMES)
    }
    newest = max(found.values(), default=0.0)
    return (path for path, written in found.items() if written >= newest - RECENT)


def _open(path: Path) -> BinaryIO:
    """Open a file of Dovecot's. OSError if it is anything else, which might never be read."""
    number = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_LOG:
        os.close(number)
        raise OSError(errno.EINVAL, "not a file of Dovecot's", str(path))
    return open(number, "r+b")


def mend(path: Path) -> int:
    """Cut a log's unfinished end; return how many bytes that were."""
    with _open(path) as file:
        log = file.read()
        keep = whole(log)
        if keep is None or keep == len(log):
            return 0
        file.truncate(keep)
        os.fsync(file.fileno())
    return len(log) - keep


def needless(path: Path) -> Path | None:
    """Return the log before one that Dovecot will throw away, if the index needs neither."""
    index, before = path.with_suffix(""), path.with_name(path.name + ".2")
    if not (index.exists() and before.exists()):
        return None
    with _open(index) as file:
        header = file.read(_INDEX_LOG_OFFSET.stop)
    number, offset = _number(header[_INDEX_LOG_NUMBER]), _number(header[_INDEX_LOG_OFFSET])
    lost = _number_of(path) == number and path.stat().st_size < offset
    return before if lost and _number_of(before) < number else None


def _number_of(path: Path) -> int:
    with _open(path) as file:
        return _number(file.read(_LOG_NUMBER.stop)[_LOG_NUMBER])


def main(mail: str) -> int:
    """Mend all logs below ``mail``; Dovecot must not run."""
    for path in recent_logs(Path(mail)):
        try:
            if cut := mend(path):
                print(f"{path}: {cut} bytes were unfinished when the power was cut; cut")
            if before := needless(path):
                before.unlink()
                print(f"{before}: the log after it is lost, and all of it is in the index; removed")
        except OSError as error:  # Dovecot will say what it makes of it
            print(f"{path}: {error.strerror}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
