"""Files of large contents, beside the store's database."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

READ_SIZE = 256 * 1024


class SpoolFile:
    """A new file that is written piece by piece. Used from worker threads, one operation at a time.

    The file counts only when a committed row names it; whatever else lies in the directory is
    removed at the next start.
    """

    def __init__(self, directory: Path, shadow_id: str) -> None:
        # Two stores of one id may run at once (a retry overtakes): each has its own file.
        self.path = directory / f"{shadow_id}.{secrets.token_hex(4)}"
        self._lock = threading.Lock()
        self._file = -1
        self._dropped = False

    def write(self, parts: list[bytes]) -> None:
        """Append; the first time makes the file.

        OSError if there is no room. Does nothing once the file was dropped.
        """
        with self._lock:
            if self._dropped:
                return
            if self._file < 0:
                self._file = os.open(
                    self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
                )
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[os.write(self._file, view) :]

    def sync(self) -> None:
        """Put the content on stable storage and close the file.

        Its directory entry is for the caller to sync.
        """
        with self._lock:
            os.fsync(self._file)
            self._close()

    def drop(self) -> None:
        """Close and remove. Harmless when repeated."""
        with self._lock:
            self._dropped = True
            self._close()
            self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        # Not closed twice: another thread may have been given the number.
        if self._file >= 0:
            number, self._file = self._file, -1
            os.close(number)


def read(path: Path) -> Iterator[bytes]:
    """Read a file piece by piece."""
    with path.open("rb", buffering=0) as file:
        while piece := file.read(READ_SIZE):
            yield piece


def sync_directory(path: Path) -> None:
    """Put a directory's entries on stable storage."""
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sweep(directory: Path, wanted: set[str]) -> int:
    """Remove the files that are not ``wanted``; return how many they were."""
    removed = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name not in wanted:
                os.unlink(entry.path)
                removed += 1
    return removed
