"""Whose Sieve scripts changed: Dovecot notifies nobody, but its event exporter writes it down.

One JSON line for each ManageSieve command that changes a script, written at once and never waited
for (2.4.1, checked by experiment). The file is read from where it was left; an agent that starts
reads it from its beginning, so that nothing that happened while it was down is missed. When it has
grown it is emptied; a line that comes just then is lost, and the comparison of all users makes up
for it.
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

    def take(self) -> set[str]:
        """Return the users of the events since the last call. OSError if it cannot be read."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return set()
        if size < self._offset:
            self._offset = 0  # somebody else emptied it
        if size == self._offset:
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
    except (ValueError, KeyError, TypeError):
        return ""
    return str(user) if valid_user(user) else ""
