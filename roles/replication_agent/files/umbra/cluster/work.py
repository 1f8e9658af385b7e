"""Proof that this node can do its work: without a recent one it claims no right to act.

The disks of mail and queue have just taken a write, and Postfix and Dovecot have just greeted. A
disk that stalls, a server that hangs: then nothing comes back, and the age of the last proof tells.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from umbra.transport.resubmit import PORT

log = logging.getLogger(__name__)

# ports, what the server says first, what ends the session politely. Both are asked at ports of our
# own: those of the world may be closed by the administrator (Dovecot's) or have no process left
# (Postfix's), which is no reason to move the primary. A Dovecot of before has only the world's.
POSTFIX = ((PORT,), b"220", b"QUIT\r\n")
DOVECOT = ((27, 143), b"* OK", b"a LOGOUT\r\n")
ADDRESS = "127.0.0.1"
WARM = 6
"""Processes that wait for clients when a node becomes primary."""
WARM_UP = 1.0
"""Seconds for that."""
Server = tuple[Sequence[int], bytes, bytes]


async def greeting(ports: Sequence[int], expected: bytes, goodbye: bytes) -> None:
    """Return when the local server has greeted at the first of its ports that takes a connection.

    OSError if it says something else.
    """
    for port in ports:
        try:
            reader, writer = await asyncio.open_connection(ADDRESS, port)
            break
        except ConnectionRefusedError:
            if port == ports[-1]:
                raise
    try:
        line = await reader.readline()
        if not line.startswith(expected):
            raise OSError(f"port {port} answered {line[:80]!r}")
        writer.write(goodbye)
        await writer.drain()
        await reader.readline()
    finally:
        writer.close()


async def warm_up(port: int = 25) -> None:
    """Have Postfix load a process for each of the first clients, so that none of them waits for it.

    What fails is left to the clients: Postfix starts what they need then.
    """
    writers: list[asyncio.StreamWriter] = []

    async def greeted() -> None:
        reader, writer = await asyncio.open_connection(ADDRESS, port)
        writers.append(writer)
        if not await reader.read(1):
            raise OSError(f"port {port} is closed again")

    try:
        async with asyncio.timeout(WARM_UP):
            # Held until all are served: else the first process would serve the others as well.
            found = await asyncio.gather(*(greeted() for _ in range(WARM)), return_exceptions=True)
        if errors := [error for error in found if error is not None]:
            log.info("Postfix has no processes ready for clients: %s", errors[0])
        for writer in writers:
            writer.write(POSTFIX[2])
    except TimeoutError:
        log.info("Postfix has no processes ready for clients within %g s", WARM_UP)
    finally:
        for writer in writers:
            writer.close()


class Trouble:
    """What fails with each try. Tries that take their time are none.

    :param patience: seconds from the first failure to one that makes it hopeless.
    """

    def __init__(self, patience: float, clock: Callable[[], float]) -> None:
        self._patience = patience
        self._clock = clock
        self._since: float | None = None
        self.error = ""
        self.hopeless = False

    def failed(self, error: str) -> None:
        """Note that a try has failed."""
        now = self._clock()
        self._since = now if self._since is None else self._since
        self.error = error
        self.hopeless = now - self._since >= self._patience

    def over(self) -> None:
        """Note that it works."""
        self._since, self.error, self.hopeless = None, "", False


class Work:
    """Proves it again and again.

    :param disks: writes to the disks of mail and queue; OSError if that fails.
    :param proven: told when a proof that succeeded began, on ``clock``.
    :param servers: which servers have to greet; empty if this node has to prove nothing now.
    :param interval: seconds between proofs.
    :param timeout: seconds after which a proof counts for nothing any more.
    """

    def __init__(
        self,
        disks: Callable[[], Awaitable[None]],
        proven: Callable[[float], None],
        servers: Callable[[], Sequence[Server]],
        clock: Callable[[], float],
        *,
        interval: float,
        timeout: float,
        greet: Callable[[Sequence[int], bytes, bytes], Awaitable[None]] = greeting,
    ) -> None:
        self._disks = disks
        self._proven = proven
        self._servers = servers
        self._clock = clock
        self._interval = interval
        self._timeout = timeout
        self._greet = greet
        self._now = asyncio.Event()
        self.error = ""

    def at_once(self) -> None:
        """Prove it now, whatever the interval."""
        self._now.set()

    async def run(self) -> None:
        """Prove it until cancelled."""
        while True:
            if servers := self._servers():
                await self._prove(servers)
            try:
                async with asyncio.timeout(self._interval):
                    await self._now.wait()
            except TimeoutError:
                pass
            self._now.clear()

    async def _prove(self, servers: Sequence[Server]) -> None:
        began = self._clock()
        greetings = [self._greet(*server) for server in servers]
        try:
            async with asyncio.timeout(self._timeout):
                # Before Python 3.13 a task group forgets a cancellation if a part of it fails.
                found = await asyncio.gather(self._disks(), *greetings, return_exceptions=True)
        except TimeoutError:
            self._failed(f"disks or servers did not answer within {self._timeout:g} s")
            return
        errors = [error for error in found if error is not None]
        for error in errors:
            if not isinstance(error, OSError):
                raise error
        if errors:
            self._failed("; ".join(str(error) for error in errors))
            return
        if self.error:
            log.info("this node can do its work")
        self.error = ""
        self._proven(began)

    def _failed(self, reason: str) -> None:
        if not self.error:
            log.warning("this node cannot prove that it can do its work: %s", reason)
        self.error = reason
