"""What Postfix's queue holds, read from its directories (QSHAPE_README and postsuper(1))."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from pathlib import Path

# The order in which a message moves: a listing in this order cannot miss a file that moves on
# meanwhile.
QUEUES = ("maildrop", "incoming", "active", "deferred", "hold", "corrupt")
ARRIVING = "arriving"
QUEUE_ID = re.compile(r"[0-9A-Za-z]{5,30}\Z")
_FAILED = b"recipient="
# A log with more is none of Postfix's: 100,000 recipients that failed take less than half.
MAX_LOG = 64 * 1024 * 1024


def queue_files(spool: Path) -> dict[str, str]:
    """Return the queue of each queue file, by queue id.

    A file in ``incoming`` that Postfix has not committed (made executable) yet counts as
    ``arriving``; one whose writer died before that is none: Postfix will never deliver it, and
    removes it at some later start. Nor is a file whose name is no queue id. A file that moves on
    while we look is found in the later queue.
    OSError if a queue cannot be read.
    """
    found: dict[str, str] = {}
    for queue in QUEUES:
        pending = [spool / queue]
        while pending:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
                    elif not QUEUE_ID.match(entry.name):
                        continue
                    elif queue != "incoming":
                        found[entry.name] = queue
                    elif place := _incoming(entry.path):
                        found[entry.name] = place
    return found


def owed_bounces(spool: Path) -> dict[str, list[str]]:
    """Return the recipients of whose failure the sender has not been told yet, by queue id.

    Postfix notes them in a log of the message's name (bounce(8)), marks them as done in the queue
    file, and removes the log once the bounce is accepted. OSError if the logs cannot be read, or
    are longer than any of Postfix's.
    """
    found: dict[str, list[str]] = {}
    pending = [spool / "bounce"]
    while pending:
        # Hashed or not: hash_queue_names tells, and long queue ids do not show their directory.
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found[entry.name] = _failed(entry.path)
    return found


def _failed(path: str) -> list[str]:
    """Return the recipients in a log; none if it is no file. The directory is another user's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            return []
        raise
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return []
        lines = file.read(MAX_LOG + 1).split(b"\n")
        if file.tell() > MAX_LOG:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    return [
        line.removeprefix(_FAILED).decode(errors="replace")
        for line in lines
        if line.startswith(_FAILED)
    ]


def _incoming(path: str) -> str | None:
    """Return where a file in ``incoming`` is; None if it has gone or nobody will finish it."""
    try:
        if os.stat(path, follow_symlinks=False).st_mode & stat.S_IXUSR:
            return "incoming"
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if _written(descriptor):
            return ARRIVING
        # Nobody writes any more; it may have been committed since we looked.
        return "incoming" if os.fstat(descriptor).st_mode & stat.S_IXUSR else None
    finally:
        os.close(descriptor)


def _written(descriptor: int) -> bool:
    """Return whether somebody may still write to a file, as far as the kernel tells.

    cleanup(8) has its file open for writing until it is committed, and the kernel grants no read
    lease on such a file (fcntl(2), F_SETLEASE). Needs CAP_LEASE for a file of somebody else.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP):
            return True  # EAGAIN: a writer. Else there are no leases here, so nobody can tell.
        raise
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
