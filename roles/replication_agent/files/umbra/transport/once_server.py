r"""Where Dovecot's deliveries ask: a unix socket that speaks Dovecot's script protocol.

Sieve's ``execute`` sends the protocol's version, options, then the program's arguments, each on a
line, and an empty line; here the arguments are shadow id and recipient. The answer is the output,
``new`` or ``there``, and ``+\n`` for success (2.4.1, checked by experiment).

The socket outlives this process: systemd keeps it (``FDSTORE``), so that a delivery that comes
while there is no agent waits for the next one. Who gets no answer asks again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from pathlib import Path
from typing import Protocol

from umbra import systemd
from umbra.mailbox.carrier import valid_user
from umbra.transport import ids, metrics

log = logging.getLogger(__name__)

NAME = "once"
MAX_REQUEST = 4096
BACKLOG = 512
READ_TIMEOUT = 10.0
_PEER = struct.Struct("3i")


class Refused(Exception):
    """A request that is not what it must be."""


class Application(Protocol):
    """What answers."""

    async def delivered(self, shadow_id: str, recipient: str, process: int) -> bool:
        """See ``Once.delivered``."""
        ...


def parse(request: bytes) -> tuple[str, str]:
    """Return shadow id and recipient. Refused if they are not there."""
    lines = request.decode("utf-8", "replace").splitlines()
    if len(lines) < 4 or not lines[0].startswith("VERSION\tscript\t") or lines[-1]:
        raise Refused(f"not a request of Dovecot's script protocol: {request[:80]!r}")
    shadow_id, recipient = lines[-3:-1]
    if not ids.valid(shadow_id) or not valid_user(recipient):
        raise Refused(f"not an id and a recipient: {request[-160:]!r}")
    return shadow_id, recipient


class OnceServer:
    """Listens for questions. The directory of ``path`` says who may ask."""

    def __init__(self, path: Path, application: Application) -> None:
        self._path = path
        self._application = application
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. OSError if the directory is not there."""
        listener = systemd.stored_socket(NAME)
        if listener is not None and not self._is_there(listener):
            listener.close()
            systemd.forget_socket(NAME)
            listener = None
        if listener is None:
            self._path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self._path))
            self._path.chmod(0o666)
            listener.listen(BACKLOG)
            systemd.store_socket(NAME, listener)
        listener.setblocking(False)
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept(listener), name="deliveries")

    def _is_there(self, listener: socket.socket) -> bool:
        return listener.getsockname() == str(self._path) and self._path.exists()

    async def stop(self) -> None:
        """Stop answering; who still waits asks the next agent. The path stays for it."""
        tasks = [*self._tasks, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = self._accepting = None

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of file descriptors, for example
                log.warning("no delivery can ask: %s", error)
                await asyncio.sleep(1.0)
                continue
            task = loop.create_task(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.setblocking(False)
            try:
                shadow_id, recipient = parse(await self._read(connection))
                raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
                process, _, _ = _PEER.unpack(raw)
                there = await self._application.delivered(shadow_id, recipient, process)
                connection.send(b"there+\n" if there else b"new+\n")
            except Refused as error:
                metrics.ONCE_REFUSED.inc()
                log.warning("question of a delivery refused: %s", error)
            except (OSError, TimeoutError) as error:
                log.info("a delivery got no answer: %s", error or type(error).__name__)

    async def _read(self, connection: socket.socket) -> bytes:
        try:
            request = connection.recv(MAX_REQUEST)  # mostly it is there, and whole
        except BlockingIOError:
            request = b""
        if request.endswith(b"\n\n"):
            return request
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(READ_TIMEOUT):
            while not request.endswith(b"\n\n"):
                data = await loop.sock_recv(connection, MAX_REQUEST)
                request += data
                if not data or len(request) > MAX_REQUEST:
                    raise Refused(f"it does not end: {request[:80]!r}")
        return request
