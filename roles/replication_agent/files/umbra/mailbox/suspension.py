"""What an operator has suspended: the mirror of the whole group, or that of single users.

On disk before it counts (``suspended.json``, replaced atomically and synced), so that it outlives
the agent. One that nobody remembers is in the status: the group is degraded for as long as it
lasts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from umbra import document
from umbra.document import DocumentError


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
        """Read what is on disk. DocumentError if it is damaged."""
        try:
            rows = document.read(self._path)
            self.rows = {user: Suspension(**row) for user, row in rows.items()}
        except TypeError as error:
            raise DocumentError(f"{self._path} cannot be used: {error}") from None

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
        document.write(self._path, {user: asdict(row) for user, row in rows.items()})
        self.rows = rows
