"""Whose state was dropped since the ledger was last written: what a process that is killed knew.

One line of JSON for each, ``[peer, user]``, in a directory in memory. It outlives the process,
costs no disk and never waits for one. It does not outlive the host, and need not: after a boot no
state holds (see the ledger's binding).

Two files in turn: one takes what is dropped, the other holds what the ledger is writing meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

Key = tuple[str, str]


class Dropped:
    """The record. All methods but ``open`` are called in the event loop.

    :param directory: ``/run/umbra``.
    """

    def __init__(self, directory: Path) -> None:
        self._paths = [directory / f"dropped.{number}" for number in range(2)]
        self._files: list[int] = []
        self._current = 0

    def open(self) -> set[Key] | None:
        """Return what a process that died has noted; None if that cannot be read, so all of it.

        :raises OSError: the files cannot be used.
        """
        self._files = [
            os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            for path in self._paths
        ]
        try:
            lines = [line for path in self._paths for line in path.read_bytes().splitlines()]
            return {(str(peer), str(user)) for peer, user in map(json.loads, lines)}
        except ValueError:
            return None

    def clear(self) -> None:
        """Forget all: it is in the ledger."""
        for file in self._files:
            os.ftruncate(file, 0)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            os.close(file)
        self._files = []

    def note(self, key: Key) -> bool:
        """Note one; False if there is no room, which is logged."""
        line = json.dumps(key).encode() + b"\n"
        try:
            if os.write(self._files[self._current], line) == len(line):
                return True
            reason = "no room"
        except OSError as error:
            reason = str(error)
        log.error("%s cannot be written: %s", self._paths[self._current], reason)
        return False

    def turn(self) -> None:
        """The ledger begins to write all that was noted; what comes now is for its next time."""
        # Not empty: writing it has failed, and both are for the next time.
        if os.fstat(self._files[1 - self._current]).st_size == 0:
            self._current = 1 - self._current

    def written(self) -> None:
        """The ledger has written what was noted before ``turn``."""
        os.ftruncate(self._files[1 - self._current], 0)
