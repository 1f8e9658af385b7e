"""One exchange on a connection of the peer link, as either side sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from umbra.peer import frames
from umbra.peer.connection import Connection, PeerError, error_of, object_of
from umbra.peer.frames import FrameType
from umbra.peer.rows import line_of, received_rows

__all__ = ["Connection", "Exchange", "PeerError"]


class Exchange:
    """A running exchange. Only one task receives and only one sends; they may be two tasks.

    :param limit: the client's time-out of the whole; None on the server's side.
    """

    def __init__(self, connection: Connection, limit: asyncio.Timeout | None = None) -> None:
        self._connection = connection
        self._client = limit is not None
        self._limit = limit
        self._sent_end = False
        self._received_end = False
        self._result: dict[str, Any] | None = None

    def extend(self, seconds: float) -> None:
        """Client only. Give the exchange so many seconds more than it had."""
        if self._limit is not None and (when := self._limit.when()) is not None:
            self._limit.reschedule(when + seconds)

    def renew(self, seconds: float) -> None:
        """Client only. Let the exchange end so many seconds from now, because it has moved on."""
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + seconds)

    async def send(self, data: bytes) -> None:
        """Send ``data`` of any length as DATA; waits while the other side does not read."""
        if data:
            await self._write(frames.encode_data(data))

    async def end(self) -> None:
        """Say that nothing more comes from this side. Saying it twice is harmless."""
        if not self._sent_end:
            self._sent_end = True
            await self._write(frames.encode(FrameType.END))

    async def _write(self, data: bytes) -> None:
        # The server may have refused while this side still sends; what it said explains more than
        # the connection's end.
        if self._client and (refusal := self._connection.refusal()) is not None:
            raise refusal
        await self._connection.write(data)

    async def receive(self) -> bytes | None:
        """Return the next DATA, or None when the other side has ended."""
        if self._received_end:
            return None
        kind, payload = await self._connection.read()
        if kind is FrameType.DATA:
            return payload
        self._received_end = True
        if kind is FrameType.END:
            return None
        if self._client and kind is FrameType.RESPONSE:
            self._result = object_of(payload)
            return None
        if self._client and kind is FrameType.ERROR:
            raise error_of(payload)
        raise PeerError("protocol", f"unexpected {kind.name}")

    async def result(self) -> dict[str, Any]:
        """Client only.

        End this side, drop DATA that is still coming and return the server's answer.
        """
        await self.end()
        while self._result is None:
            if self._received_end:
                self._result = await self._connection.read_json(FrameType.RESPONSE)
            else:
                await self.receive()
        return self._result

    @property
    def finished(self) -> bool:
        """True when the connection carries nothing more of this exchange and may serve another."""
        if self._client:
            return self._sent_end and self._result is not None
        return self._received_end

    async def receive_lines(self) -> AsyncIterator[dict[str, Any]]:
        """Give the objects that come as JSON lines. PeerError ``protocol`` for anything else."""
        async for row in received_rows(self):
            if not isinstance(row, dict):
                raise PeerError("protocol", "a line is not a JSON object")
            yield row

    async def send_lines(self, rows: list[dict[str, Any]]) -> None:
        """Send objects as JSON lines."""
        await self.send(b"".join(map(line_of, rows)))
