"""The static coordinator: the state of this node on its own disk, moved only by an operator.

``state.json`` is replaced atomically and synced with its directory before anything acts on it. A
crash leaves the old or the new one, whole.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from umbra import document
from umbra.cluster.state import Change, Durable, Mode, Role


class StateError(Exception):
    """The state on disk cannot be used; one sentence for people. The node must stay closed."""


class StateFile:
    """``state.json`` of one node in one group."""

    def __init__(self, path: Path, group: str, node: str) -> None:
        self._path = path
        self._owner = {"group": group, "node": node}

    def load(self) -> Durable | None:
        """Return the state, or None on a new node.

        StateError if it is damaged or of another node.
        """
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StateError(f"{self._path} cannot be read: {error}") from None
        try:
            owner = {"group": raw["group"], "node": raw["node"]}
            durable = _decode(raw)
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"{self._path} is damaged: {error!r}") from None
        if owner != self._owner:
            raise StateError(
                f"{self._path} is that of {owner['node']} in {owner['group']},"
                f" not of {self._owner['node']}"
            )
        return durable

    async def write(self, durable: Durable) -> None:
        """Make ``durable`` durable, in a thread. OSError if it is not.

        Who is cancelled meanwhile waits for the end: a thread cannot be stopped, and the next one
        must neither write beside it nor be overtaken by it.
        """
        saving = asyncio.create_task(asyncio.to_thread(self.save, durable))
        cancelled: asyncio.CancelledError | None = None
        while not saving.done():
            try:
                await asyncio.wait([saving])
            except asyncio.CancelledError as error:
                cancelled = error
        failed = saving.exception()
        if cancelled is not None:
            raise cancelled
        if failed is not None:
            raise failed

    def save(self, durable: Durable) -> None:
        """Make ``durable`` durable. OSError if it is not."""
        document.write(self._path, {**self._owner, **_encode(durable)})


def first(role: str, now: str) -> Durable:
    """Return the state of a node that has none: the inventory's role counts, this once.

    Its epoch is under that of every group that has ever served: a primary that was installed anew
    becomes a shadow there, and does not make the copy what it is itself, empty.
    ``protected`` here means only that another node may hold the right: a node that was installed
    anew stays closed until a peer was heard.
    """
    return Durable(
        storage_id=secrets.token_hex(8), epoch=0, role=Role(role), mode=Mode.PROTECTED, since=now
    )


def _encode(durable: Durable) -> dict[str, Any]:
    change = durable.last_change
    return {**asdict(durable), "last_change": change.to_json() if change else None}


def _decode(raw: dict[str, Any]) -> Durable:
    change = raw["last_change"]
    return Durable(
        storage_id=str(raw["storage_id"]),
        epoch=int(raw["epoch"]),
        role=Role(raw["role"]),
        mode=Mode(raw["mode"]),
        since=str(raw["since"]),
        handing_to=raw["handing_to"],
        offered=int(raw["offered"]),
        merged=bool(raw["merged"]),
        unshared=bool(raw.get("unshared", True)),
        last_change=Change.from_json(change) if change else None,
        acted=None if (acted := raw.get("acted")) is None else int(acted),
        silence=None if (silence := raw.get("silence")) is None else float(silence),
        marked=bool(raw.get("marked", False)),
        # Of an agent that did not note it: its last epoch. Who missed a promotion is behind that.
        merged_under=int(raw.get("merged_under", raw["epoch"])),
    )
