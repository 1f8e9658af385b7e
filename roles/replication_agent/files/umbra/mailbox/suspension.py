"""What an operator has suspended: the mirror of the whole group, or that of single users.

On disk before it counts (``suspended.json``, replaced atomically and synced), so that it outlives
the agent. One that nobody remembers is in the status: the group is degraded for as long as it
lasts.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


class SuspensionError(Exception):
    """The file cannot be used; one sentence for people."""


@dataclass(frozen=True)
class Suspension:
    """Why, and since when (ISO 8601, UTC)."""

    reason: str
    since: str


class Suspensions:
    """The suspensions of this node, by user; "" stands for the whole group.

    :param directory: ``/var/lib/umbra/mirror``.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "suspended.json"
        self.rows: dict[str, Suspension] = {}

    def load(self) -> None:
        """Read what is on disk. SuspensionError if it is damaged."""
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
            self.rows = {str(user): Suspension(**row) for user, row in raw.items()}
        except FileNotFoundError:
            self.rows = {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise SuspensionError(f"{self._path} cannot be used: {error}") from None

    def suspend(self, user: str, reason: str, since: str) -> None:
        """Note a suspension, durably; a later reason replaces the former. OSError if it is not."""
        before = self.rows.get(user)
        self._save({**self.rows, user: Suspension(reason, before.since if before else since)})

    def resume(self, user: str) -> bool:
        """End a suspension, durably; False if there was none. OSError if it is not."""
        if user not in self.rows:
            return False
        self._save({name: row for name, row in self.rows.items() if name != user})
        return True

    @property
    def group(self) -> bool:
        """Whether the mirror of everybody is suspended."""
        return "" in self.rows

    @property
    def users(self) -> set[str]:
        """Single users whose mirror is suspended."""
        return self.rows.keys() - {""}

    def sentences(self, node: str) -> list[str]:
        """Say what is suspended and what that means while ``node`` is primary."""
        return [
            f"the mirror of {user or 'all mailboxes'} is suspended since {row.since}"
            f" ({row.reason}): their changes are only on {node} until it is resumed"
            for user, row in sorted(self.rows.items())
        ]

    def _save(self, rows: dict[str, Suspension]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = self._path.with_suffix(".new")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({user: asdict(row) for user, row in rows.items()}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self.rows = rows
