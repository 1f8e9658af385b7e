"""The milter's socket: carries conversations over a unix socket."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import cast

from umbra.transport import metrics
from umbra.transport.milter import (
    TEMPFAIL,
    Application,
    Conversation,
    Decoder,
    Message,
    ProtocolError,
    Step,
)

log = logging.getLogger(__name__)

BACKLOG = 512

MAX_AHEAD = 256 * 1024
"""Bytes that may come while a message is being decided about. Postfix waits for the answer."""


class MilterServer:
    """Listens for Postfix.

    A unix socket, because over TCP each added header cost 40 ms (delayed ACK). No time-out watches
    an idle connection: Postfix keeps it as long as its SMTP session, which Postfix bounds, and the
    kernel tells when the process at the other end is gone.
    """

    def __init__(self, path: Path, application: Application, *, mode: int = 0o666) -> None:
        self._path = path
        self._mode = mode
        self._application = application
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()

    async def start(self) -> None:
        """Listen. OSError if the socket cannot be made. Its directory decides who reaches it."""
        with suppress(FileNotFoundError):
            self._path.unlink()  # left by a process that was killed
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(os.fspath(self._path))
            self._path.chmod(self._mode)
            self._server = await asyncio.get_running_loop().create_unix_server(
                lambda: _Connection(self._application, self._connections),
                sock=listener,
                backlog=BACKLOG,
            )
        except BaseException:
            listener.close()
            raise

    async def stop(self) -> None:
        """Stop listening and cut all connections.

        A message that was not answered is not acknowledged: Postfix tempfails it.
        """
        if self._server is None:
            return
        self._server.close()
        with suppress(FileNotFoundError):
            self._path.unlink()
        tasks = [task for connection in self._connections if (task := connection.cut()) is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._server = None


class _Connection(asyncio.Protocol):
    def __init__(self, application: Application, connections: set[_Connection]) -> None:
        self._conversation = Conversation(application, self)
        self._connections = connections
        self._decoder = Decoder()
        self._packets: deque[tuple[int, bytes]] = deque()
        self._finishing: asyncio.Task[None] | None = None
        self._ahead = 0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        # What is being finished can no longer be acknowledged: Postfix removes the queue file, and
        # discard the shadow's copy.
        if self._finishing is not None:
            self._finishing.cancel()
        else:
            self._conversation.abort()

    def cut(self) -> asyncio.Task[None] | None:
        """Close; return the task to wait for, if one runs."""
        self._transport.abort()
        if self._finishing is not None:
            self._finishing.cancel()
        return self._finishing

    def pause(self) -> None:
        self._transport.pause_reading()

    def resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        try:
            if self._finishing is not None:
                self._ahead += len(data)
                if self._ahead > MAX_AHEAD:
                    raise ProtocolError(f"over {MAX_AHEAD} bytes before the answer to a message")
            self._packets.extend(self._decoder.feed(data))
        except ProtocolError as error:
            self._refuse(error)
            return
        self._work()

    def _work(self) -> None:
        packets = self._packets
        while packets and self._finishing is None and not self._transport.is_closing():
            command, data = packets.popleft()
            try:
                answer = self._conversation.receive(command, data)
            except ProtocolError as error:
                self._refuse(error)
                return
            if isinstance(answer, bytes):
                self._transport.write(answer)
            elif answer is Step.FINISH:
                message = self._conversation.message
                assert message is not None
                self._finishing = asyncio.get_running_loop().create_task(self._finish(message))
            elif answer is Step.CLOSE:
                self._transport.close()

    async def _finish(self, message: Message) -> None:
        try:
            answer = await message.finish()
        except asyncio.CancelledError:
            self._conversation.abort()
            raise
        except Exception:
            # A fault of ours must neither accept the message nor leave Postfix waiting.
            log.exception("a message was not decided about")
            self._conversation.abort()
            answer = TEMPFAIL
        self._transport.write(answer)
        self._finishing = None
        self._ahead = 0
        self._conversation.finished()
        self._work()

    def _refuse(self, error: ProtocolError) -> None:
        metrics.MILTER_ERRORS.inc()
        log.warning("milter connection closed: %s", error)
        self._transport.abort()
