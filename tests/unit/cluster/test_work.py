"""Proof of work: what fails, hangs or answers nonsense proves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from umbra.cluster import work
from umbra.cluster.work import DOVECOT, POSTFIX, Server, Work, greeting, warm_up


class Host:
    """Disks and servers, and what was proven of them."""

    def __init__(self) -> None:
        self.proven: list[float] = []
        self.disks = asyncio.Event()
        self.disks.set()
        self.refuses = False
        self.wanted: tuple[Server, ...] = (POSTFIX, DOVECOT)
        self.work = Work(
            self.prove, self.proven.append, lambda: self.wanted, lambda: 7.0,
            interval=0.02, timeout=0.1, greet=self.greet,
        )  # fmt: skip

    async def prove(self) -> None:
        await self.disks.wait()

    async def greet(self, ports: Sequence[int], expected: bytes, goodbye: bytes) -> None:
        if self.refuses and ports == POSTFIX[0]:
            raise OSError("connection refused")


async def watch(host: Host, seconds: float) -> int:
    host.proven.clear()
    task = asyncio.create_task(host.work.run())
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return len(host.proven)


async def test_what_works_is_proven_again_and_again() -> None:
    host = Host()
    assert await watch(host, 0.3) > 3
    assert host.work.error == ""


async def test_a_disk_that_stalls_proves_nothing() -> None:
    host = Host()
    host.disks.clear()
    assert await watch(host, 0.3) == 0
    assert "did not answer within 0.1 s" in host.work.error


async def test_a_server_that_is_away_proves_nothing_unless_it_is_stopped_on_purpose() -> None:
    host = Host()
    host.refuses = True
    assert await watch(host, 0.2) == 0
    assert host.work.error == "connection refused"
    host.wanted = (DOVECOT,)
    assert await watch(host, 0.2) > 0
    host.wanted = ()
    assert await watch(host, 0.2) == 0


async def test_a_server_of_before_is_asked_at_the_port_that_it_has() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"* OK ready\r\n")
        await reader.readline()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await greeting([9, port], b"* OK", b"a LOGOUT\r\n")
    with pytest.raises(ConnectionRefusedError):
        await greeting([9, port], b"* OK", b"a LOGOUT\r\n")


async def test_it_ends_when_it_is_told_to_in_the_moment_in_which_a_server_refuses() -> None:
    """A task group of Python 3.11 and 3.12 forgets that it was cancelled if a part of it fails."""
    host = Host()
    host.refuses = True
    real = host.greet
    task = asyncio.create_task(host.work.run())

    async def greet(ports: Sequence[int], expected: bytes, goodbye: bytes) -> None:
        task.cancel()
        await real(ports, expected, goodbye)

    host.work._greet = greet
    async with asyncio.timeout(2):
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


@pytest.mark.parametrize("says", [b"220 mail ESMTP\r\n", b"554 no\r\n", b""])
async def test_only_a_greeting_is_one(says: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        if await reader.readline():
            writer.write(b"221 bye\r\n")
        writer.close()
        ended.set()

    ended = asyncio.Event()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        if says.startswith(b"220"):
            await greeting([port], b"220", b"QUIT\r\n")
        elif says:
            with pytest.raises(OSError, match="answered"):
                await greeting([port], b"220", b"QUIT\r\n")
        else:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await greeting([port], b"220", b"QUIT\r\n")
        await ended.wait()
        await asyncio.sleep(0)


@pytest.mark.parametrize("greets", [True, False], ids=["greets", "hangs"])
async def test_all_processes_for_the_first_clients_are_held_at_once(
    greets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "WARM_UP", 0.2)
    connected, all_there = 0, asyncio.Event()
    said: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connected
        connected += 1
        if connected == work.WARM:
            all_there.set()
        await all_there.wait()  # served by the process of another one, it would never be
        if greets:
            writer.write(b"220 mail ESMTP\r\n")
        said.put_nowait(await reader.readline())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, asyncio.timeout(1):
        await warm_up(server.sockets[0].getsockname()[1])
        for _ in range(work.WARM):
            assert await said.get() == (b"QUIT\r\n" if greets else b"")


async def test_a_closed_port_is_left_to_the_clients(caplog: pytest.LogCaptureFixture) -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    with caplog.at_level("INFO"):
        await warm_up(port)
    assert "no processes ready" in caplog.text
