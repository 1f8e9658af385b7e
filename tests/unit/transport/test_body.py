"""The pipe between the milter and those who store."""

from __future__ import annotations

import asyncio
import os

from umbra.transport.body import HIGH, MEMORY_LIMIT, Body


class Brake:
    def __init__(self) -> None:
        self.paused = False
        self.steps: list[str] = []

    def pause(self) -> None:
        assert not self.paused
        self.paused = True

    def resume(self) -> None:
        assert self.paused
        self.paused = False


async def drain(body: Body) -> bytes:
    reader = body.reader()
    data = b""
    while (piece := await reader.read()) is not None:
        data += piece
        await asyncio.sleep(0)
    reader.close()
    return data


async def test_a_small_content_comes_in_one_piece_and_as_often_as_asked() -> None:
    body = Body(Brake())
    assert not any(body.write(part) for part in (b"a", b"b", b"c"))
    body.end()
    reader = body.reader()
    assert await reader.read() == b"abc"
    assert await reader.read() is None
    reader.close()
    assert await drain(body) == b"abc"


async def test_an_empty_content_ends() -> None:
    body = Body(Brake())
    body.end()
    assert await drain(body) == b""


async def test_a_large_content_is_braked_by_the_slowest_reader() -> None:
    brake = Brake()
    body = Body(brake)
    sent = b""
    assert not body.write(bytes(MEMORY_LIMIT))
    assert body.write(b"one more")
    sent = bytes(MEMORY_LIMIT) + b"one more"
    fast, slow = asyncio.create_task(drain(body)), body.reader()
    await asyncio.sleep(0)
    body.flow()
    most = 0
    for _ in range(100):
        while brake.paused:
            await slow.read()
            await asyncio.sleep(0)
        piece = os.urandom(60_000)
        sent += piece
        body.write(piece)
        most = max(most, body._held)
        await asyncio.sleep(0)
    assert most <= HIGH + 60_000
    slow.close()
    body.end()
    assert await fast == sent
    assert not brake.paused


async def test_with_all_readers_gone_nothing_is_kept_and_nothing_stalls() -> None:
    brake = Brake()
    body = Body(brake)
    body.write(bytes(MEMORY_LIMIT + 1))
    reader = body.reader()
    body.flow()
    for _ in range(20):
        body.write(bytes(60_000))
        if brake.paused:
            break
    assert brake.paused
    reader.close()
    assert not brake.paused
    for _ in range(50):
        body.write(bytes(60_000))
    assert not brake.paused
    assert body._held == 0


async def test_nothing_is_dropped_before_all_readers_are_there() -> None:
    body = Body(Brake())
    body.write(bytes(MEMORY_LIMIT + 1))
    early = body.reader()
    await early.read()
    body.write(b"more")
    late = asyncio.create_task(drain(body))
    await asyncio.sleep(0)
    body.flow()
    body.end()
    early.close()
    assert await late == bytes(MEMORY_LIMIT + 1) + b"more"
