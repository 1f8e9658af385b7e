"""An exchange without a link: the handler's data come to the asker, and the other way."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

from umbra.peer.identity import PeerIdentity
from umbra.peer.server import Handler


class Side:
    """One side of an exchange."""

    def __init__(
        self,
        to: asyncio.Queue[bytes | None],
        come: asyncio.Queue[bytes | None],
        task: asyncio.Task[dict[str, Any]] | None = None,
    ) -> None:
        self._to, self._come, self._task = to, come, task

    async def send(self, data: bytes) -> None:
        for start in range(0, len(data), 50):  # in pieces that end anywhere
            self._to.put_nowait(data[start : start + 50])

    async def end(self) -> None:
        self._to.put_nowait(None)

    async def receive(self) -> bytes | None:
        return await self._come.get()

    async def result(self) -> dict[str, Any]:
        assert self._task is not None
        return await self._task


def serve(handler: Handler, peer: PeerIdentity, args: Mapping[str, Any]) -> Side:
    """Have the handler answer; the asker's side."""
    up, down = asyncio.Queue[bytes | None](), asyncio.Queue[bytes | None]()

    async def answer() -> dict[str, Any]:
        return await handler(peer, args, cast(Any, Side(down, up)))

    task = asyncio.create_task(answer())
    task.add_done_callback(lambda _: down.put_nowait(None))
    return Side(up, down, task)
