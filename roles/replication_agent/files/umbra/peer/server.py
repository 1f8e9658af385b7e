"""The server side of the peer link.

Checks who calls and under which epoch, then runs the operation's handler.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
from collections import Counter as Counts
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from prometheus_client import Counter

from umbra import listener
from umbra.epoch import epoch_of
from umbra.peer import frames
from umbra.peer.connection import Connection, PeerError
from umbra.peer.exchange import Exchange
from umbra.peer.frames import FrameType
from umbra.peer.identity import Identity, PeerIdentity

log = logging.getLogger(__name__)

Handler = Callable[[PeerIdentity, Mapping[str, Any], Exchange], Awaitable[dict[str, Any]]]
EpochCheck = Callable[[str, str, int], Awaitable[None]]

HELLO_TIMEOUT = 5.0
# TLS handshakes of one address at a time, over all that a peer's pool begins at once.
MAX_HANDSHAKES = 256
BACKLOG = 100
DRAIN_TIMEOUT = 1.0
MAX_CONNECTIONS = 1024

REFUSED = Counter(
    "umbra_peer_refused_total", "Exchanges and connections refused on the peer link", ["code"]
)


class _Handshake(ssl.SSLObject):
    """Tells who is refused in the TLS handshake; of these asyncio says nothing."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            REFUSED.labels("tls").inc()
            reason = getattr(error, "verify_message", "") or error.reason
            log.warning("peer connection refused in the TLS handshake: %s", reason)
            raise


class PeerServer:
    """Listens on the tunnel address.

    :param hello: what this node says of itself in a HELLO.
    :param check_epoch: called with (peer, op, epoch) before each operation; raises PeerError
        ``stale-epoch`` for one that is lower
        than this node has seen.
    """

    def __init__(
        self,
        address: str,
        port: int,
        identity: Identity,
        hello: Mapping[str, Any],
        check_epoch: EpochCheck,
        handlers: Mapping[str, Handler],
    ) -> None:
        self._address = address
        self._port = port
        self._identity = identity
        self._hello = hello
        self._check_epoch = check_epoch
        self._handlers = handlers
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[asyncio.Task[Any], tuple[str, int]] = {}
        self._senseless: dict[tuple[str, str], str] = {}
        self._listener: socket.socket | None = None
        self._listening: asyncio.Task[None] | None = None
        self._handshakes: Counts[str] = Counts()
        self._shaking: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. OSError if the address is not there (is the tunnel up?) or taken."""
        self._identity.server.sslobject_class = _Handshake
        self._listener = listener.bound("link", self._address, self._port)
        self._listener.listen(BACKLOG)
        self._listening = asyncio.create_task(self._listen(self._listener), name="peer link")

    async def _listen(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, (address, *_) = await loop.sock_accept(listening)
            except OSError as error:  # out of file descriptors, for example
                log.warning("no peer can connect: %s", error)
                await asyncio.sleep(1.0)
                continue
            if self._handshakes[address] >= MAX_HANDSHAKES:
                self._overloaded(address, MAX_HANDSHAKES)
                connection.close()
            else:
                task = loop.create_task(self._shake(connection, address))
                self._shaking.add(task)
                task.add_done_callback(self._shaking.discard)
            # Who connects again and again must not keep the loop from others.
            await asyncio.sleep(0)

    async def _shake(self, connection: socket.socket, address: str) -> None:
        self._handshakes[address] += 1
        try:
            with suppress(OSError):  # _Handshake has told
                await asyncio.get_running_loop().connect_accepted_socket(
                    lambda: Connection(self._made),
                    connection,
                    ssl=self._identity.server,
                    ssl_handshake_timeout=HELLO_TIMEOUT,
                )
        finally:
            self._handshakes[address] -= 1
            if not self._handshakes[address]:
                del self._handshakes[address]

    @staticmethod
    def _overloaded(address: object, most: int) -> None:
        REFUSED.labels("overloaded").inc()
        log.warning("peer connection from %s closed: there are %d already", address, most)

    def break_off(self, operations: Collection[str], below: float = math.inf) -> None:
        """End what runs of these operations under an epoch ``below`` that one.

        The other side sees them as failed.
        """
        for task, (op, epoch) in self._running.items():
            if op in operations and epoch < below:
                task.cancel()

    async def stop(self) -> None:
        """Close the listener and cancel what runs; clients see their exchanges as failed."""
        tasks = [*self._tasks, *self._shaking, *([self._listening] if self._listening else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    def _made(self, connection: Connection) -> None:
        if len(self._tasks) >= MAX_CONNECTIONS:
            self._overloaded(connection.extra("peername"), MAX_CONNECTIONS)
            connection.close()
            return
        task = asyncio.get_running_loop().create_task(self._accept(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, connection: Connection) -> None:
        try:
            peer = await self._greet(connection)
            while await self._serve(peer, connection):
                pass
        except PeerError as error:
            if error.code != "unreachable":
                REFUSED.labels(error.code).inc()
                log.warning(
                    "peer connection from %s closed: %s", connection.extra("peername"), error
                )
        finally:
            connection.close()

    async def _greet(self, connection: Connection) -> PeerIdentity:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT):
                hello = await connection.read_json(FrameType.HELLO)
        except TimeoutError:
            raise PeerError("timeout", "no HELLO") from None
        name = self._identity.name_of(connection.extra("ssl_object"))
        refusal = self._refusal(name, hello)
        if refusal is not None:
            await connection.refuse(refusal)
            raise refusal
        await connection.write(frames.encode_json(FrameType.HELLO, self._hello))
        assert name is not None
        return PeerIdentity(name, str(hello.get("storage_id", "")))

    def _refusal(self, name: str | None, hello: Mapping[str, Any]) -> PeerError | None:
        if name is None:
            return PeerError("refused", "the certificate is not that of a node of this group")
        if hello.get("version") != frames.VERSION:
            return PeerError(
                "refused", f"protocol version {hello.get('version')}, here {frames.VERSION}"
            )
        if hello.get("group") != self._hello["group"]:
            return PeerError(
                "refused", f"group {hello.get('group')!r}, here {self._hello['group']!r}"
            )
        if hello.get("node") != name:
            return PeerError(
                "refused", f"node {hello.get('node')!r} with the certificate of {name!r}"
            )
        return None

    async def _serve(self, peer: PeerIdentity, connection: Connection) -> bool:
        """Run one exchange; True if the connection may carry another."""
        request = await connection.read_json(FrameType.REQUEST)
        op, args = request.get("op"), request.get("args")
        exchange = Exchange(connection)
        try:
            if not (isinstance(op, str) and isinstance(args, dict)):
                raise PeerError("protocol", "a request needs op, epoch and args")
            epoch = _epoch(request.get("epoch"))
            handler = self._handlers.get(op)
            if handler is None:
                raise PeerError("refused", f"unknown operation {op!r}")
            task = asyncio.current_task()
            assert task is not None
            # Before the check, so that no change of role can come between.
            self._running[task] = op, epoch
            try:
                await self._check_epoch(peer.node, op, epoch)
                answer = _response(op, await handler(peer, args, exchange))
            finally:
                del self._running[task]
            # Only a drained exchange leaves the connection at a frame boundary of the next one.
            if not exchange.finished:
                async with asyncio.timeout(DRAIN_TIMEOUT):
                    while await exchange.receive() is not None:
                        pass
        except PeerError as error:
            refusal = error
        except TimeoutError:
            refusal = PeerError("timeout", f"{op} took too long")
        except Exception:
            log.exception("operation %s of %s failed", op, peer.node)
            refusal = PeerError("failed", f"{op} failed; see the journal of the peer")
        else:
            self._senseless.pop((peer.node, op), None)
            await connection.write(answer)
            return True
        if refusal.code != "unreachable":  # the peer gave up: no refusal of ours
            REFUSED.labels(refusal.code).inc()
            if not self._repeats(peer.node, op, refusal):
                log.warning("operation %r of %s refused: %s", op, peer.node, refusal)
        await connection.refuse(refusal)
        return False

    def _repeats(self, peer: str, op: object, refusal: PeerError) -> bool:
        """Whether this is the same nonsense as the last time: it may come with each heartbeat."""
        if refusal.code != "protocol" or not isinstance(op, str) or op not in self._handlers:
            return False
        last = self._senseless.get((peer, op))
        self._senseless[peer, op] = refusal.text
        return last == refusal.text


def _epoch(value: object) -> int:
    try:
        return epoch_of(value)
    except ValueError as error:
        raise PeerError("protocol", f"a request needs an epoch: {error}") from None


def _response(op: str, answer: Mapping[str, Any]) -> bytes:
    try:
        return frames.encode_json(FrameType.RESPONSE, answer)
    except ValueError as error:
        raise PeerError("failed", f"the answer to {op} cannot be sent: {error}") from None
