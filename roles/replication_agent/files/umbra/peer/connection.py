"""A TLS connection of the peer link, as an asyncio protocol that carries frames.

Both directions are bounded: what has come and is not read stops the reading, so that TCP brakes the
sender; a writer waits while the transport's buffer is full. Frames that are written in one turn of
the loop leave in one piece: a small message is one TLS record and one packet.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from umbra.peer import frames
from umbra.peer.frames import FrameError, FrameType

HIGH = 2 * frames.MAX_PAYLOAD
"""Unread bytes above which the transport is not read; more than any frame, or it never ended."""

LOW = frames.MAX_PAYLOAD // 2
WRITE_HIGH = 128 * 1024

KEEPALIVE_IDLE = 10
KEEPALIVE_INTERVAL = 5
DEAD_AFTER = 30
"""Seconds without any answer of the other host's kernel after which it ends the connection."""

NO_LINGER = struct.pack("ii", 1, 0)
"""Closing resets the connection."""

LINGER = 1.0
"""Seconds that the other side has to read why it was refused."""


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


class Connection(asyncio.Protocol):
    """A connection on which frames are read and written; no time-outs of its own.

    One task reads at a time.

    :param made: called when the connection is there and its certificates are checked.
    """

    def __init__(self, made: Callable[[Connection], None] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._made = made
        self._decoder = frames.Decoder()
        self._waiter: asyncio.Future[None] | None = None
        self._reading = True
        self._writable = asyncio.Event()
        self._writable.set()
        self._out: list[bytes] = []
        self._out_size = 0
        self._lost: str | None = None
        self._dropping = False
        self._transport: asyncio.Transport

    # -- what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport: the certificates were checked."""
        # uvloop's transports are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(WRITE_HIGH)
        _watch(transport.get_extra_info("socket"))
        if self._made is not None:
            self._made(self)

    def data_received(self, data: bytes) -> None:
        """Keep what has come for whoever reads; brake the sender if nobody does."""
        if self._dropping:
            return
        decoder = self._decoder
        decoder.feed(data)
        if self._waiter is not None and decoder.ready:
            self._wake()
        if self._reading and len(decoder) > HIGH:
            self._reading = False
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        """Let writers wait: the transport's buffer is full."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Let them go on."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake all who wait; what has come before can still be read."""
        self._lost = f"the connection ended: {exc or 'closed'}"
        self._out.clear()
        self._writable.set()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- what exchanges call

    def extra(self, name: str) -> Any:
        """Return what the transport knows, for example ``ssl_object`` or ``peername``."""
        return self._transport.get_extra_info(name)

    @property
    def usable(self) -> bool:
        """True if nothing has come that nobody asked for and neither side has closed."""
        return self._lost is None and not self._transport.is_closing() and len(self._decoder) == 0

    async def read(self) -> tuple[FrameType, bytes]:
        """Return the next frame.

        PeerError ``unreachable`` at the end of the stream, ``protocol`` for what is no frame.
        """
        while (frame := self._next()) is None:
            if self._lost is not None:
                raise PeerError("unreachable", self._lost)
            self._resume()  # the rest of a frame may be more than LOW
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return frame

    def _next(self) -> tuple[FrameType, bytes] | None:
        try:
            frame = self._decoder.next()
        except FrameError as error:
            raise PeerError("protocol", str(error)) from None
        if not self._reading and len(self._decoder) < LOW:
            self._resume()
        return frame

    def _resume(self) -> None:
        if not self._reading and not self._transport.is_closing():
            self._reading = True
            self._transport.resume_reading()

    async def read_json(self, expected: FrameType) -> dict[str, Any]:
        """Return the object of the next frame, of type ``expected``; an ERROR frame is raised."""
        kind, payload = await self.read()
        if kind is FrameType.ERROR:
            raise error_of(payload)
        if kind is not expected:
            raise PeerError("protocol", f"{kind.name} where {expected.name} was expected")
        return object_of(payload)

    def refusal(self) -> PeerError | None:
        """Return the ERROR that has come while this side was still sending, if that is next."""
        try:
            head = self._decoder.head()
        except FrameError:
            return None
        if head is None or head[0] is not FrameType.ERROR or (frame := self._next()) is None:
            return None
        return error_of(frame[1])

    async def write(self, data: bytes) -> None:
        """Write frames; wait while the transport's buffer is full."""
        if self._lost is not None:
            raise PeerError("unreachable", self._lost)
        self._put(data)
        if not self._writable.is_set():
            await self._writable.wait()
            if self._lost is not None:
                raise PeerError("unreachable", self._lost)

    def _put(self, data: bytes) -> None:
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(data)
        self._out_size += len(data)
        if self._out_size >= frames.MAX_PAYLOAD:
            self._flush()

    def _flush(self) -> None:
        if self._out:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            self._out.clear()
            self._out_size = 0
            self._transport.write(data)

    def close(self) -> None:
        """Close at once; what is unsent is dropped, by the kernel too.

        Its retransmissions would otherwise bring a message that was given up to a shadow that
        comes back seconds later.
        """
        self._out.clear()
        # Of a transport that is closing the number of the socket may be another's already.
        if self._lost is None and not self._transport.is_closing():
            peer = self._transport.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self._transport.abort()

    async def refuse(self, error: PeerError) -> None:
        """Say why the exchange failed; the connection is of no more use.

        What still comes is dropped until the other side has closed, ``LINGER`` seconds at most:
        closing with something unread resets a connection, and the reason might be lost with it.
        """
        text = {"code": error.code, "text": error.text[:1000]}
        self._dropping = True
        self._decoder = frames.Decoder()
        self._resume()
        with suppress(PeerError, TimeoutError):
            async with asyncio.timeout(LINGER):
                await self.write(frames.encode_json(FrameType.ERROR, text))
                await self.read()


def _watch(peer: socket.socket) -> None:
    """Have the kernel send small writes at once, and end the connection of a dead host.

    Also while nothing is under way, so that neither side collects connections of the dead. A host
    that lives and only does not read for so long is taken for dead, too.
    """
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER * 1000)


def object_of(payload: bytes) -> dict[str, Any]:
    """Return the JSON object of a frame, or raise PeerError ``protocol``."""
    try:
        return frames.decode_json(payload)
    except FrameError as error:
        raise PeerError("protocol", str(error)) from None


def error_of(payload: bytes) -> PeerError:
    """Return what an ERROR frame says."""
    value = object_of(payload)
    return PeerError(str(value.get("code", "protocol")), str(value.get("text", "")))
