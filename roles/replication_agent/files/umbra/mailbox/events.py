"""Whose Sieve scripts changed: Dovecot notifies nobody, but its event exporter writes it down.

One JSON line for each ManageSieve command that changes a script, written at once and never waited
for (2.4.1, checked by experiment). The file is read from where it was left; an agent that starts
reads it from its beginning, so that nothing that happened while it was down is missed. When it has
grown it is emptied; a line that comes just then is lost, and the comparison of all users makes up
for it.

Only a primary takes events, as only it can copy what they tell of. What is written while this node
may not act stays in the file for its next term; see ``keep``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from umbra.mailbox.carrier import valid_user

LARGE = 1024 * 1024


class ScriptEvents:
    """The file of events, ``/var/lib/umbra-events/sieve``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._kept: set[str] = set()

    def take(self) -> set[str]:
        """Return the users of the events since the last call. OSError if it cannot be read."""
        users = self._read() | self._kept
        self._kept = set()
        return users

    def keep(self) -> None:
        """Leave the events for a later ``take``. OSError if the file cannot be read.

        A shadow's file grows slowly, by what an administrator does there and by annotations that
        are copied to it; but it may be a shadow for years, so a large file is read and emptied.
        """
        if self._unread() >= LARGE:
            self._kept |= self._read()

    def _unread(self) -> int:
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return 0
        if size < self._offset:
            self._offset = 0  # somebody else emptied it
        return size - self._offset

    def _read(self) -> set[str]:
        if not self._unread():
            return set()
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        if self._offset >= LARGE:
            os.truncate(self._path, 0)
            self._offset = 0
        return {user for line in whole.splitlines() if (user := _user(line))}


def _user(line: bytes) -> str:
    try:
        user = json.loads(line)["fields"]["user"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return str(user) if valid_user(user) else ""
