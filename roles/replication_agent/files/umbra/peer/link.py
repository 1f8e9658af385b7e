"""The client side of the link to one peer: a pool of connections, one exchange at a time on each.

Nothing waits behind another message, and TCP's flow control bounds the memory of each exchange. A
dead connection is noticed when it
is used; what was in flight on it failed with ``unreachable``, and every operation is safe to
repeat.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from umbra.peer import frames
from umbra.peer.connection import Connection, PeerError
from umbra.peer.exchange import Exchange
from umbra.peer.frames import FrameType
from umbra.peer.identity import Identity

CONNECT_TIMEOUT = 2.0
MAX_CONNECTIONS = 256


class PeerLink:
    """The link to one peer.

    :param hello: what this node says of itself in a HELLO.
    :param epoch: returns this node's epoch, sent with each request.
    """

    def __init__(
        self,
        name: str,
        address: str,
        port: int,
        identity: Identity,
        hello: Mapping[str, Any],
        epoch: Callable[[], int],
    ) -> None:
        self.name = name
        self._address = address
        self._port = port
        self._identity = identity
        self._hello = hello
        self._epoch = epoch
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)

    async def request(self, op: str, args: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        """Run an exchange without DATA and return the answer.

        PeerError if it fails or takes over ``timeout`` seconds.
        """
        async with self.exchange(op, args, timeout=timeout) as exchange:
            return await exchange.result()

    @asynccontextmanager
    async def exchange(
        self, op: str, args: Mapping[str, Any], *, timeout: float
    ) -> AsyncIterator[Exchange]:
        """Run one exchange in the ``async with`` block, which must take its ``result()``.

        The block as a whole is bounded by ``timeout`` seconds, PeerError ``timeout`` after that;
        :meth:`Exchange.extend` gives it more. A block that fails closes the connection: the other
        side then knows that the exchange is void.
        """
        try:
            async with asyncio.timeout(timeout) as limit, self._slots:
                connection = await self._connection()
                self._busy.add(connection)
                exchange = Exchange(connection, limit)
                try:
                    await connection.write(self._request(op, args))
                    yield exchange
                finally:
                    self._busy.discard(connection)
                    if exchange.finished and connection.usable:
                        self._idle.append(connection)
                    else:
                        connection.close()
        except TimeoutError:
            raise PeerError("timeout", f"{self.name} did not finish {op} in time") from None

    def _request(self, op: str, args: Mapping[str, Any]) -> bytes:
        request = {"op": op, "epoch": self._epoch(), "args": args}
        try:
            return frames.encode_json(FrameType.REQUEST, request)
        except ValueError as error:
            # What is in it may be a user's choice: this exchange fails, not the agent.
            raise PeerError("protocol", f"{op} cannot be asked of {self.name}: {error}") from None

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.close()
        return await self._connect()

    async def _connect(self) -> Connection:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                _, connection = await asyncio.get_running_loop().create_connection(
                    Connection, self._address, self._port, ssl=self._identity.client
                )
        except TimeoutError:
            raise PeerError(
                "unreachable", f"{self.name} does not answer at {self._address}"
            ) from None
        except ssl.SSLError as error:
            raise PeerError(
                "refused", f"{self.name} is not who it should be: {error.reason}"
            ) from None
        except OSError as error:
            raise PeerError(
                "unreachable", f"{self.name} cannot be reached: {error.strerror or error}"
            ) from None
        try:
            if self._identity.name_of(connection.extra("ssl_object")) != self.name:
                raise PeerError(
                    "refused", f"the certificate at {self._address} is not that of {self.name}"
                )
            await connection.write(frames.encode_json(FrameType.HELLO, self._hello))
            await connection.read_json(FrameType.HELLO)
        except BaseException:
            connection.close()
            raise
        return connection

    def cut(self) -> None:
        """Drop all connections: what waits for a peer that was found dead fails now."""
        self.reset()
        for connection in self._busy:
            connection.close()

    def reset(self) -> None:
        """Drop the idle connections, for example of a peer that was found dead."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
