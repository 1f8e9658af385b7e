"""What the transport's tests share: a milter client, a group, a link and a queue in memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity
from umbra.peer.link import PeerLink
from umbra.peer.server import Handler
from umbra.transport.envelope import Envelope, Recipient
from umbra.transport.ports import Refusal

ENVELOPE = Envelope(
    sender="ann@example.org",
    sender_args=("BODY=8BITMIME",),
    recipients=(Recipient("bob@example.com", ("NOTIFY=FAILURE",)),),
    client_name="mail.example.org",
    client_address="192.0.2.1",
    helo="mail.example.org",
    message_id="<1@example.org>",
    received=1_700_000_000.0,
)
LONG = ENVELOPE.only([Recipient(f"user{number}@example.com", ()) for number in range(2000)])
"""An envelope that does not fit a frame."""


class MilterClient:
    """Speaks the MTA's side as Postfix does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, path: Path, daemon: bytes = b"mail.example.com") -> MilterClient:
        client = cls(*await asyncio.open_unix_connection(path))
        await client.put(b"O", struct.pack(">III", 6, 0x1FF, 0x1FFFFF))
        kind, data = await client.get()
        assert kind == b"O"
        version, actions, _ = struct.unpack_from(">III", data)
        assert (version, actions) == (6, 0x121)
        await client.put(b"D", b"C{daemon_name}\0" + daemon + b"\0")
        await client.put(b"C", b"client.example.org\x004\x04\xd2192.0.2.7\0")
        await client.put(b"H", b"client.example.org\0")
        return client

    async def put(self, kind: bytes, data: bytes = b"") -> None:
        self.writer.write(struct.pack(">I", len(data) + 1) + kind + data)
        await self.writer.drain()

    async def get(self) -> tuple[bytes, bytes]:
        head = await self.reader.readexactly(5)
        (length,) = struct.unpack_from(">I", head)
        return head[4:], await self.reader.readexactly(length - 1)

    async def mail(self, sender: bytes = b"<ann@example.org>", *args: bytes) -> tuple[bytes, bytes]:
        await self.put(b"M", b"\0".join((sender, *args)) + b"\0")
        return await self.get()

    async def rcpt(self, address: bytes = b"<bob@example.com>", *args: bytes) -> None:
        await self.put(b"R", b"\0".join((address, *args)) + b"\0")

    async def content(
        self, headers: Sequence[tuple[bytes, bytes]], body: bytes, queue_id: bytes
    ) -> list[tuple[bytes, bytes]]:
        await self.put(b"D", b"Ti\0" + queue_id + b"\0")
        for name, value in headers:
            await self.put(b"L", name + b"\0" + value + b"\0")
        await self.put(b"N")
        for start in range(0, len(body), 65535):
            await self.put(b"B", body[start : start + 65535])
        await self.put(b"E")
        return await self.answers()

    async def answers(self) -> list[tuple[bytes, bytes]]:
        """Everything up to the decision about the message."""
        got = [await self.get()]
        while got[-1][0] not in (b"a", b"c", b"y", b"t"):
            got.append(await self.get())
        return got

    async def message(
        self,
        headers: Sequence[tuple[bytes, bytes]] = ((b"Subject", b" hello"),),
        body: bytes = b"text\r\n",
        queue_id: bytes = b"4abcDEF",
    ) -> list[tuple[bytes, bytes]]:
        first = await self.mail()
        if first[0] != b"c":
            return [first]
        await self.rcpt()
        return await self.content(headers, body, queue_id)

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


def shadow_id_of(answers: list[tuple[bytes, bytes]]) -> str:
    """The id that the milter has made the first header, of an accepted message."""
    assert [kind for kind, _ in answers] == [b"i", b"a"]
    place, header = answers[0][1][:4], answers[0][1][4:]
    name, value, _ = header.split(b"\0")
    assert (place, name) == (b"\0\0\0\1", b"X-Umbra-Id")
    assert value.startswith(b" ")
    return value[1:].decode()


def active(queue_ids: Callable[[], Awaitable[set[str]]]) -> Callable[[], Awaitable[dict[str, str]]]:
    """Return what lists these queue files with their queue, which is the active one for all."""

    async def queue() -> dict[str, str]:
        return dict.fromkeys(await queue_ids(), "active")

    return queue


class FakeExchange:
    """Both sides of an exchange, joined by queues of one element: they go at each other's pace."""

    def __init__(self, to: asyncio.Queue[bytes | None], come: asyncio.Queue[bytes | None]) -> None:
        self._to = to
        self._come = come
        self._ended = self._over = False
        self.limit: asyncio.Timeout | None = None
        self.answer: asyncio.Future[dict[str, Any]] | None = None

    def extend(self, seconds: float) -> None:
        assert self.limit is not None
        when = self.limit.when()
        assert when is not None
        self.limit.reschedule(when + seconds)

    def renew(self, seconds: float) -> None:
        if self.limit is not None:
            self.limit.reschedule(asyncio.get_running_loop().time() + seconds)

    async def send(self, data: bytes) -> None:
        if data:
            await self._to.put(data)

    async def end(self) -> None:
        if not self._ended:
            self._ended = True
            await self._to.put(None)

    async def receive(self) -> bytes | None:
        if self._over:
            return None
        coming = asyncio.ensure_future(self._come.get())
        try:
            if self.answer is not None:  # a handler that has failed sends no more
                both: list[asyncio.Future[Any]] = [coming, self.answer]
                await asyncio.wait(both, return_when="FIRST_COMPLETED")
                if self._come.empty() and not coming.done():
                    return None
            data = await coming
        finally:
            coming.cancel()
        self._over = data is None
        return data

    async def send_lines(self, rows: Sequence[Mapping[str, Any]]) -> None:
        await self.send(b"".join(json.dumps(row).encode() + b"\n" for row in rows))

    async def receive_lines(self) -> AsyncIterator[dict[str, Any]]:
        text = b""
        while (data := await self.receive()) is not None:
            text += data
        for line in text.splitlines():
            yield json.loads(line)

    async def result(self) -> dict[str, Any]:
        await self.end()
        assert self.answer is not None
        return await self.answer


class FakeLink:
    """A link whose other end is in this process. ``fail`` breaks it, ``hold`` lets it hang."""

    def __init__(self, name: str, handlers: Mapping[str, Handler], caller: str = "a") -> None:
        self.name = name
        self.handlers = handlers
        self.caller = PeerIdentity(caller, "s1")
        self.fail: Callable[[str], PeerError | None] = lambda op: None
        self.hold = False
        self.ops: list[str] = []

    @asynccontextmanager
    async def exchange(
        self, op: str, args: Mapping[str, Any], *, timeout: float
    ) -> AsyncIterator[FakeExchange]:
        self.ops.append(op)
        try:
            async with asyncio.timeout(timeout) as limit:
                async with self._running(op, args) as exchange:
                    exchange.limit = limit
                    yield exchange
        except TimeoutError:
            raise PeerError("timeout", f"{self.name} did not finish {op} in time") from None

    @asynccontextmanager
    async def _running(self, op: str, args: Mapping[str, Any]) -> AsyncIterator[FakeExchange]:
        if self.hold:
            await asyncio.sleep(3600)
        if error := self.fail(op):
            raise error
        there: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        back: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        near, far = FakeExchange(there, back), FakeExchange(back, there)
        if op not in self.handlers:
            raise PeerError("refused", f"unknown operation {op!r}")
        task = asyncio.ensure_future(self.handlers[op](self.caller, args, cast(Any, far)))
        near.answer = cast("asyncio.Future[dict[str, Any]]", task)
        try:
            # A handler that fails while the caller still sends must not leave the caller waiting.
            yield near
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def request(self, op: str, args: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        async with self.exchange(op, args, timeout=timeout) as exchange:
            return await exchange.result()


class FakeGroup:
    """A group whose state a test sets."""

    def __init__(self, *peers: FakeLink) -> None:
        self.epoch = 7
        self.peers = list(peers)
        self.refusal: Refusal | None = None
        self.failures: list[tuple[str, str]] = []
        self.demoted: Exception | None = None
        self.in_flight = 0
        self.steps: list[str] = []

    def accepting(self) -> Refusal | None:
        return self.refusal

    def shadows(self) -> Sequence[PeerLink]:
        return cast(Sequence[PeerLink], tuple(self.peers))

    async def shadow_failed(self, peer: str, reason: str) -> None:
        if self.demoted:
            raise self.demoted
        self.steps.append("alone")
        self.failures.append((peer, reason))
        self.peers = [item for item in self.peers if item.name != peer]

    def may_acknowledge(self, epoch: int, holders: Collection[str]) -> bool:
        return epoch == self.epoch and (self.refusal is None or self.refusal.code == 421)

    @contextmanager
    def begin_work(self) -> Iterator[None]:
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


async def content(pieces: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in pieces])
