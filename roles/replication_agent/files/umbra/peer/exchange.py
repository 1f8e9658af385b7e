"""One exchange on a connection of the peer link, as either side sees it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from umbra.peer import frames
from umbra.peer.frames import FrameType


class PeerError(Exception):
    """An exchange failed.

    :param code: ``unreachable``, ``timeout``, ``stale-epoch``, ``refused``, ``protocol`` or the
        code of an operation.
    :param text: one sentence for people.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code
        self.text = text


class Connection:
    """A TLS connection of which frames are read and written; no time-outs of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @property
    def usable(self) -> bool:
        """False once either side has closed."""
        return not (self._reader.at_eof() or self._writer.is_closing())

    async def read(self) -> tuple[FrameType, bytes]:
        """Return the next frame.

        PeerError ``unreachable`` at the end of the stream, ``protocol`` for what is no frame.
        """
        try:
            kind, length = frames.decode_header(await self._reader.readexactly(frames.HEADER.size))
            return kind, await self._reader.readexactly(length) if length else b""
        except frames.FrameError as error:
            raise PeerError("protocol", str(error)) from None
        except (OSError, EOFError) as error:
            raise PeerError(
                "unreachable", f"the connection ended: {error or type(error).__name__}"
            ) from None

    async def read_json(self, expected: FrameType) -> dict[str, Any]:
        """Return the object of the next frame, of type ``expected``; an ERROR frame is raised."""
        kind, payload = await self.read()
        if kind is FrameType.ERROR:
            raise error_of(payload)
        if kind is not expected:
            raise PeerError("protocol", f"{kind.name} where {expected.name} was expected")
        return object_of(payload)

    async def write(self, data: bytes) -> None:
        """Write frames; wait while the transport's buffer is full."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise PeerError("unreachable", f"the connection ended: {error}") from None

    def close(self) -> None:
        """Close at once, without waiting for what is unsent."""
        self._writer.transport.abort()


def object_of(payload: bytes) -> dict[str, Any]:
    """Return the JSON object of a frame, or raise PeerError ``protocol``."""
    try:
        return frames.decode_json(payload)
    except frames.FrameError as error:
        raise PeerError("protocol", str(error)) from None


def error_of(payload: bytes) -> PeerError:
    """Return what an ERROR frame says."""
    value = object_of(payload)
    return PeerError(str(value.get("code", "protocol")), str(value.get("text", "")))


def error_frame(error: PeerError) -> bytes:
    """Return ``error`` as an ERROR frame."""
    return frames.encode_json(FrameType.ERROR, {"code": error.code, "text": error.text[:1000]})


class Exchange:
    """A running exchange. Only one task receives and only one sends; they may be two tasks."""

    def __init__(self, connection: Connection, *, client: bool) -> None:
        self._connection = connection
        self._client = client
        self._sent_end = False
        self._received_end = False
        self._result: dict[str, Any] | None = None

    async def send(self, data: bytes) -> None:
        """Send ``data`` of any length as DATA; waits while the other side does not read."""
        if data:
            await self._connection.write(frames.encode_data(data))

    async def end(self) -> None:
        """Say that nothing more comes from this side. Saying it twice is harmless."""
        if not self._sent_end:
            self._sent_end = True
            await self._connection.write(frames.encode(FrameType.END))

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

    async def receive_lines(self, limit: int = 64 * 1024) -> list[dict[str, Any]]:
        """Return all that comes as JSON lines.

        A line over ``limit`` bytes is a PeerError ``protocol``.
        """
        rows: list[dict[str, Any]] = []
        rest = b""
        while (data := await self.receive()) is not None:
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > limit:
                raise PeerError("protocol", f"a line is over {limit} bytes")
            rows += [object_of(line) for line in lines if line]
        if rest:
            raise PeerError("protocol", "the last line is cut off")
        return rows

    async def send_lines(self, rows: list[dict[str, Any]]) -> None:
        """Send objects as JSON lines."""
        await self.send(
            b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)
        )
