"""The carrier: what passes and what does not, and that copying ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from umbra.mailbox import carrier as module
from umbra.mailbox.carrier import (
    CLIENT_HELLO,
    SERVER_HELLO,
    DsyncCarrier,
    DsyncHandler,
    Refused,
    parse_command,
    valid_user,
)
from umbra.mailbox.disk import MailDisk
from umbra.mailbox.doveadm import Doveadm, Outcome, SyncResult
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity

Pipe = asyncio.Queue[bytes | PeerError | None]
USER = "a@example.org"
OPTION = b"\t\tOPTION\tlog-passthrough"
COMMAND = b"x\tproxy-ttl=1\ta@example.org\tdsync-server\t-ua@example.org"
Handler = Callable[[PeerIdentity, Mapping[str, Any], Any], Awaitable[dict[str, Any]]]


class FakeExchange:
    """One side of an exchange in memory."""

    def __init__(self, out: Pipe, into: Pipe) -> None:
        self.out, self.into = out, into
        self.answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.ended = self.received_end = False

    async def send(self, data: bytes) -> None:
        await self.out.put(data)

    async def end(self) -> None:
        if not self.ended:
            self.ended = True
            await self.out.put(None)

    async def receive(self) -> bytes | None:
        data = await self.into.get()
        if isinstance(data, PeerError):
            raise data
        self.received_end |= data is None
        return data

    async def result(self) -> dict[str, Any]:
        await self.end()
        while not self.received_end:
            await self.receive()
        return await self.answer


class FakeLink:
    """A link whose other end is ``handler``, with little room in each direction."""

    name = "mail-b"

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    @asynccontextmanager
    async def exchange(
        self,
        op: str,
        args: Mapping[str, Any],
        *,
        timeout: float,
    ) -> AsyncIterator[FakeExchange]:
        assert op == "dsync"
        up: Pipe = asyncio.Queue(2)
        down: Pipe = asyncio.Queue(2)
        client, server = FakeExchange(up, down), FakeExchange(down, up)

        async def serve() -> None:
            try:
                client.answer.set_result(
                    await self.handler(PeerIdentity("mail-a", "storage"), args, server)
                )
            except PeerError as error:
                client.answer.set_exception(error)
                await down.put(error)

        task = asyncio.create_task(serve())
        try:
            yield client
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if client.answer.done() and not client.answer.cancelled():
                client.answer.exception()


class Disk(MailDisk):
    """Has everything at once, unless told otherwise."""

    def __init__(self, settle: Callable[[], Awaitable[None]] | None = None) -> None:
        super().__init__(settle or self.nothing)
        self.sentence = ""

    async def nothing(self) -> None:
        """Need no time."""

    async def full(self) -> str:
        return self.sentence

    def full_now(self) -> str:
        return self.sentence


class FakeDoveadm:
    """Plays ``doveadm sync``: connects to the destination as dsync does and runs ``talk``."""

    def __init__(self, talk: Callable[..., Awaitable[Outcome]], user: str = USER) -> None:
        self.talk, self.user = talk, user
        self.state: str | None = None

    async def sync(
        self,
        user: str,
        destination: str,
        state: str,
        limit: float,
        *,
        merge: bool = False,
        apart: Sequence[str] = (),
        only: str = "",
    ) -> SyncResult:
        reader, writer = await asyncio.open_unix_connection(destination.removeprefix("tcp:"))
        try:
            writer.write(CLIENT_HELLO)
            if await reader.read(len(SERVER_HELLO)) != SERVER_HELLO:
                return SyncResult(Outcome.FAILED, reason="no hello")
            writer.write(OPTION + b"\n" + COMMAND.replace(USER.encode(), self.user.encode()))
            writer.write(b"\n")
            return SyncResult(await self.talk(reader, writer), self.state, "talk")
        finally:
            writer.close()


@asynccontextmanager
async def server(path: Path, talk: Callable[..., Awaitable[None]]) -> AsyncIterator[Path]:
    """Play the doveadm-server of the shadow."""
    socket = path / "doveadm-server"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Before Python 3.11.6 a connection stays open when its handler fails.
        try:
            assert await reader.readline() == CLIENT_HELLO
            writer.write(SERVER_HELLO)
            assert await reader.readline() == OPTION + b"\n"
            assert await reader.readline() == COMMAND + b"\n"
            await talk(reader, writer)
        finally:
            writer.close()

    async with await asyncio.start_unix_server(serve, socket):
        yield socket


@asynccontextmanager
async def pair(path: Path, doveadm: FakeDoveadm, handler: Handler) -> AsyncIterator[DsyncCarrier]:
    carrier = DsyncCarrier(path, FakeLink(handler), cast(Doveadm, doveadm))
    await carrier.start()
    try:
        yield carrier
    finally:
        await carrier.stop()


@pytest.mark.parametrize(
    ("lines", "user"),
    [
        ([], None),
        ([OPTION], None),
        ([OPTION, COMMAND], USER),
        ([b"\ta@example.org\tdsync-server\t-u\ta@example.org"], USER),
        ([b"D\ta@example.org\tdsync-server\t-ua@example.org"], USER),
    ],
)
def test_parse_command(lines: list[bytes], user: str | None) -> None:
    assert parse_command(lines) == user


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"GET / HTTP/1.1",
        b"\t\tstop",
        b"\ta@example.org\texpunge\t-ua@example.org",
        b"\ta@example.org\tdsync-server\t-ub@example.org",
        b"\ta@example.org\tdsync-server\t-ua@example.org\t-r/etc/passwd",
        b"\ta@example.org\tdsync-server",
        b"\t-A\tdsync-server\t-u-A",
        b"\t\tdsync-server\t-u",
        b"Z\ta@example.org\tdsync-server\t-ua@example.org",
        b"\t\xff\tdsync-server\t-u\xff",
    ],
)
def test_nothing_else_passes(line: bytes) -> None:
    with pytest.raises(Refused):
        parse_command([OPTION, line])


def test_valid_user() -> None:
    assert valid_user("Jürgen+x@example.org")
    for bad in ("", "-A", "a\tb", "a\nb", "a" * 400, None, 7, "a\0"):
        assert not valid_user(bad)


async def test_both_ways_and_to_the_end(tmp_path: Path) -> None:
    """Several megabytes each way through small buffers, then both ends close."""
    blob = bytes(range(256)) * 8192 + b"\n"

    async def master(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        writer.write(blob)
        got = await reader.readexactly(len(blob))
        return Outcome.SYNCED if got == blob else Outcome.FAILED

    async def slave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(len(blob)) == blob
        writer.write(blob)
        await writer.drain()

    async with server(tmp_path, slave) as socket:
        seen: list[str] = []
        handler = DsyncHandler(lambda: False, Disk(), socket, seen=seen.append)
        async with pair(tmp_path, FakeDoveadm(master), handler) as carrier:
            results = [
                await carrier.sync(
                    USER,
                    "",
                )
                for _ in range(3)
            ]
    assert {result.outcome for result in results} == {Outcome.SYNCED}
    assert seen == [USER] * 3


async def test_a_user_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    async def master(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        return Outcome.SYNCED if await reader.read(1) else Outcome.FAILED

    async def never(*_: object) -> dict[str, Any]:
        raise AssertionError("it got through")

    doveadm = FakeDoveadm(master, user="other@example.org")
    async with pair(tmp_path, doveadm, never) as carrier:
        result = await carrier.sync(USER, "")
    assert result.outcome is Outcome.FAILED


async def test_a_primary_refuses_and_that_is_a_lost_peer(tmp_path: Path) -> None:
    async def master(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        await reader.read()
        return Outcome.FAILED

    seen: list[str] = []
    handler = DsyncHandler(lambda: True, Disk(), tmp_path / "none", seen=seen.append)
    async with pair(tmp_path, FakeDoveadm(master), handler) as carrier:
        result = await asyncio.wait_for(carrier.sync(USER, ""), 5)
    assert result.outcome is Outcome.LOST
    assert "primary" in result.reason
    assert seen == []


async def test_a_dead_dovecot_on_the_shadow_ends_the_sync(tmp_path: Path) -> None:
    async def master(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        await reader.read()
        return Outcome.FAILED

    handler = DsyncHandler(lambda: False, Disk(), tmp_path / "none")
    async with pair(tmp_path, FakeDoveadm(master), handler) as carrier:
        result = await asyncio.wait_for(carrier.sync(USER, ""), 5)
    assert result.outcome is Outcome.LOST


async def test_cut_ends_what_hangs(tmp_path: Path) -> None:
    async def master(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        await reader.read()
        return Outcome.FAILED

    async def slave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with server(tmp_path, slave) as socket:
        handler = DsyncHandler(lambda: False, Disk(), socket)
        async with pair(tmp_path, FakeDoveadm(master), handler) as carrier:
            task = asyncio.create_task(carrier.sync(USER, ""))
            await asyncio.sleep(0.1)
            assert not task.done()
            carrier.cut()
            result = await asyncio.wait_for(task, 5)
    assert result.outcome is not Outcome.SYNCED


async def test_one_users_sync_gives_way_and_no_others(tmp_path: Path) -> None:
    goes_on = asyncio.Event()
    users = (USER, "b@example.org")

    class Doveadm(FakeDoveadm):
        async def sync(self, user: str, *args: Any, **options: Any) -> SyncResult:
            return await FakeDoveadm(self.talk, user).sync(user, *args, **options)

    async def master(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        return Outcome.SYNCED if await reader.read(1) else Outcome.FAILED

    async def handler(_: PeerIdentity, args: Mapping[str, Any], exchange: Any) -> dict[str, Any]:
        await goes_on.wait()
        await exchange.send(b"x")
        await exchange.end()
        return {}

    async with pair(tmp_path, Doveadm(master), handler) as carrier:
        carrier.cut(USER)  # none runs
        broken, other = (asyncio.create_task(carrier.sync(user, "")) for user in users)
        await asyncio.sleep(0.1)
        carrier.cut(USER)
        assert (await asyncio.wait_for(broken, 5)).outcome is Outcome.GAVE_WAY
        assert not other.done()
        goes_on.set()
        assert (await asyncio.wait_for(other, 5)).outcome is Outcome.SYNCED
        assert (await asyncio.wait_for(carrier.sync(USER, ""), 5)).outcome is Outcome.SYNCED


async def test_a_sync_that_has_ended_here_need_not_give_way(tmp_path: Path) -> None:
    on_disk = asyncio.Event()

    async def settle() -> None:
        await on_disk.wait()

    async def master(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        return Outcome.SYNCED if await reader.read(1) else Outcome.FAILED

    async def slave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x")

    async with server(tmp_path, slave) as socket:
        handler = DsyncHandler(lambda: False, Disk(settle), socket)
        async with pair(tmp_path, FakeDoveadm(master), handler) as carrier:
            task = asyncio.create_task(carrier.sync(USER, ""))
            await asyncio.sleep(0.2)
            carrier.cut(USER)
            await asyncio.sleep(0.1)
            assert not task.done()
            on_disk.set()
            assert (await asyncio.wait_for(task, 5)).outcome is Outcome.SYNCED


@pytest.mark.parametrize("slave_closes_first", [True, False])
async def test_a_sync_has_ended_when_the_peers_disk_has_it(
    tmp_path: Path, slave_closes_first: bool
) -> None:
    on_disk = asyncio.Event()

    async def settle() -> None:
        await on_disk.wait()

    async def master(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        writer.write(b"x\n")
        return Outcome.SYNCED if await reader.read(1) else Outcome.FAILED

    async def slave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(1))
        if not slave_closes_first:
            await reader.read()

    async with server(tmp_path, slave) as socket:
        handler = DsyncHandler(lambda: False, Disk(settle), socket)
        async with pair(tmp_path, FakeDoveadm(master), handler) as carrier:
            task = asyncio.create_task(carrier.sync(USER, ""))
            await asyncio.sleep(0.2)
            assert not task.done()
            on_disk.set()
            assert (await asyncio.wait_for(task, 1)).outcome is Outcome.SYNCED
            on_disk.clear()
            task = asyncio.create_task(carrier.sync(USER, ""))
            await asyncio.sleep(0.2)
            carrier.cut()
            assert (await asyncio.wait_for(task, 1)).outcome is Outcome.LOST


async def test_a_dsync_that_was_broken_off_is_waited_for(tmp_path: Path) -> None:
    """It goes on with what it was sent: it must not meet the next one, nor an open primary."""
    goes_on = asyncio.Event()
    ends: list[bytes] = []

    async def master(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        writer.write(b"x\n")
        return Outcome.SYNCED if await reader.read(1) else Outcome.FAILED

    async def slave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"x\n"
        await goes_on.wait()
        ends.append(await reader.read())

    async with server(tmp_path, slave) as socket:
        handler = DsyncHandler(lambda: False, Disk(), socket)
        async with pair(tmp_path, FakeDoveadm(master), handler) as carrier:
            task = asyncio.create_task(carrier.sync(USER, ""))
            await asyncio.sleep(0.2)
            carrier.cut()
            assert (await asyncio.wait_for(task, 5)).outcome is not Outcome.SYNCED
            again = asyncio.create_task(carrier.sync(USER, ""))
            opening = asyncio.create_task(handler.quiet())
            await asyncio.sleep(0.2)
            assert not opening.done()
            assert not ends
            await handler.quiet("other@example.org")
            goes_on.set()
            await asyncio.wait_for(opening, 1)
            assert ends == [b""], "it has heard that nothing more comes"
            carrier.cut()
            await again
            await asyncio.wait_for(handler.quiet(), 5)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_dsync_whose_connection_is_gone_has_ended(
    tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def gone() -> None:
        async with server(tmp_path, never) as socket:
            _, writer = await asyncio.open_unix_connection(socket)
            writer.transport.abort()
            await asyncio.sleep(0.05)
            handler = DsyncHandler(lambda: False, Disk(), socket)
            handler._broken_off(USER, writer)
            await handler.quiet()

    async def never(*_: object) -> None:
        raise AssertionError("nothing was said")

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(gone())


async def test_a_node_does_not_open_over_a_dsync_that_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stays = asyncio.Event()

    async def master(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        return Outcome.SYNCED if await reader.read(1) else Outcome.FAILED

    async def slave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stays.wait()

    async with server(tmp_path, slave) as socket:
        handler = DsyncHandler(lambda: False, Disk(), socket)
        async with pair(tmp_path, FakeDoveadm(master), handler) as carrier:
            task = asyncio.create_task(carrier.sync(USER, ""))
            await asyncio.sleep(0.2)
            carrier.cut()
            await task
            monkeypatch.setattr(module, "LINGER", 0.1)
            with pytest.raises(OSError, match="1 dsyncs that were broken off have not ended"):
                await handler.quiet()
            # Of its user alone: the node can take the syncs of all others.
            result = await carrier.sync(USER, "")
            assert result.outcome is Outcome.FAILED
            assert "have not ended" in result.reason
            stays.set()
            await asyncio.wait_for(handler.quiet(), 5)


@pytest.mark.parametrize("from_the_begin", [True, False])
async def test_a_disk_without_room_has_nothing(tmp_path: Path, from_the_begin: bool) -> None:
    async def master(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        return Outcome.SYNCED if await reader.read(1) else Outcome.FAILED

    async def slave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x")
        disk.sentence = "no room"

    async with server(tmp_path, slave) as socket:
        disk = Disk()
        disk.sentence = "no room" if from_the_begin else ""
        handler = DsyncHandler(lambda: False, disk, socket)
        async with pair(tmp_path, FakeDoveadm(master), handler) as carrier:
            result = await asyncio.wait_for(carrier.sync(USER, ""), 5)
    assert (result.outcome, result.reason) == (Outcome.LOST, "no room")


async def test_a_side_that_does_not_end_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALL_SECONDS", 0.1)

    async def master(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        writer.write_eof()
        await reader.read()
        return Outcome.FAILED

    async def slave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        await asyncio.sleep(2)

    async with server(tmp_path, slave) as socket:
        handler = DsyncHandler(lambda: False, Disk(), socket)
        async with pair(tmp_path, FakeDoveadm(master), handler) as carrier:
            await asyncio.wait_for(carrier.sync(USER, ""), 1)


@pytest.mark.parametrize("user", ["", "-A", None, 5, "a\nb"])
async def test_the_shadow_checks_the_user_itself(tmp_path: Path, user: object) -> None:
    handler = DsyncHandler(lambda: False, Disk(), tmp_path / "none")
    queue: Pipe = asyncio.Queue()
    with pytest.raises(PeerError, match="no such user"):
        await handler(PeerIdentity("mail-a", "x"), {"user": user}, FakeExchange(queue, queue))


async def test_the_shadow_prepares_while_dsync_starts(tmp_path: Path) -> None:
    prepared = asyncio.Event()

    async def handler(_: PeerIdentity, args: Mapping[str, Any], exchange: Any) -> dict[str, Any]:
        assert args == {"user": USER}
        prepared.set()
        while await exchange.receive() is not None:
            pass
        await exchange.end()
        return {}

    class Slow(FakeDoveadm):
        async def sync(self, *args: Any, **options: Any) -> SyncResult:
            await asyncio.wait_for(prepared.wait(), 2)
            return await super().sync(*args, **options)

    async def master(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        return Outcome.SYNCED

    async with pair(tmp_path, Slow(master), handler) as carrier:
        assert (await carrier.sync(USER, "")).outcome is Outcome.SYNCED


async def test_a_sync_that_never_connects_leaves_nothing(tmp_path: Path) -> None:
    async def handler(_: PeerIdentity, args: Mapping[str, Any], exchange: Any) -> dict[str, Any]:
        await exchange.receive()
        return {}

    class Absent(FakeDoveadm):
        async def sync(self, *args: Any, **options: Any) -> SyncResult:
            return SyncResult(Outcome.NO_USER, reason="the user is unknown")

    async def master(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        return Outcome.SYNCED

    async with pair(tmp_path, Absent(master), handler) as carrier:
        assert (await carrier.sync(USER, "")).outcome is Outcome.NO_USER
        assert not carrier._streams
