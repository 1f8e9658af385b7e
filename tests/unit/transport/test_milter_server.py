"""The milter over a real unix socket, against a client that speaks Postfix's side."""

from __future__ import annotations

import asyncio
import stat
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop
from prometheus_client import REGISTRY
from tests.unit.transport.support import MilterClient

from umbra.transport import milter, milter_server
from umbra.transport.milter import Flow, Transaction
from umbra.transport.milter_server import MilterServer


class Taker:
    def __init__(self, app: App, flow: Flow) -> None:
        self.app = app
        self.flow = flow
        self.size = 0
        self.cancelled = False
        self.aborted = 0

    def header(self, name: bytes, lines: bytes) -> None:
        self.size += len(lines)

    def body(self, data: bytes) -> None:
        self.size += len(data)
        if self.app.brake and self.size > 1_000_000:
            self.flow.pause()

    async def finish(self) -> bytes:
        try:
            return await self.app.decide()
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    def abort(self) -> None:
        self.aborted += 1


class App:
    def __init__(self) -> None:
        self.taken: list[Taker] = []
        self.brake = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    def mail(self, transaction: Transaction) -> bytes | None:
        return None

    def message(self, transaction: Transaction, flow: Flow) -> Taker:
        self.taken.append(Taker(self, flow))
        return self.taken[-1]

    async def decide(self) -> bytes:
        await self.gate.wait()
        if self.error:
            raise self.error
        return milter.ACCEPT


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
async def path(tmp_path: Path, app: App) -> AsyncIterator[Path]:
    path = tmp_path / "milter.sock"
    path.write_text("left by a process that was killed")
    server = MilterServer(path, app, mode=0o660)
    await server.start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    yield path
    await server.stop()
    assert not path.exists()


async def eventually(condition: object) -> None:
    async with asyncio.timeout(5):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_several_messages_on_one_connection(path: Path, app: App) -> None:
    client = await MilterClient.connect(path)
    for _ in range(3):
        assert await client.message() == [(b"a", b"")]
    await client.put(b"Q")
    assert await client.reader.read() == b""
    await client.close()
    assert len(app.taken) == 3


async def test_an_unexpected_error_is_a_temporary_failure(
    path: Path, app: App, caplog: pytest.LogCaptureFixture
) -> None:
    client = await MilterClient.connect(path)
    app.error = RuntimeError("a fault of ours")
    assert await client.message() == [(b"t", b"")]
    assert app.taken[0].aborted
    assert "not decided about" in caplog.text
    app.error = None
    assert await client.message() == [(b"a", b"")]
    await client.close()


async def test_a_lost_connection_cancels_what_is_being_finished(path: Path, app: App) -> None:
    app.gate.clear()
    client = await MilterClient.connect(path)
    sending = asyncio.create_task(client.message())
    await eventually(lambda: app.taken and app.taken[0].size)
    await asyncio.sleep(0.05)
    sending.cancel()
    await client.close()
    await eventually(lambda: app.taken[0].cancelled and app.taken[0].aborted)


async def test_a_lost_connection_aborts_a_message_in_the_middle(path: Path, app: App) -> None:
    client = await MilterClient.connect(path)
    await client.mail()
    await client.rcpt()
    await client.put(b"B", b"some")
    await eventually(lambda: app.taken)
    await client.close()
    await eventually(lambda: app.taken[0].aborted)


async def test_the_brake_holds_back_the_sender(path: Path, app: App) -> None:
    app.brake = True
    client = await MilterClient.connect(path)
    await client.mail()
    await client.rcpt()
    sending = asyncio.create_task(client.content((), bytes(20_000_000), b"4abc"))
    await eventually(lambda: app.taken and app.taken[0].size > 1_000_000)
    await asyncio.sleep(0.2)
    assert app.taken[0].size < 3_000_000
    assert not sending.done()
    app.brake = False
    app.taken[0].flow.resume()
    assert await sending == [(b"a", b"")]
    assert app.taken[0].size == 20_000_002
    await client.close()


def refusals() -> float:
    return REGISTRY.get_sample_value("umbra_milter_protocol_errors_total") or 0.0


async def test_malformed_input_closes_the_connection(
    path: Path, app: App, caplog: pytest.LogCaptureFixture
) -> None:
    for garbage in (b"\xff\xff\xff\xffB", struct.pack(">I", 1) + b"B", b"\0\0\0\0\0"):
        before = refusals()
        caplog.clear()
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(garbage)
        assert await reader.read() == b""
        assert refusals() == before + 1
        assert "milter connection closed" in caplog.text
        writer.close()
    client = await MilterClient.connect(path)
    assert await client.message() == [(b"a", b"")]
    await client.close()


async def test_who_does_not_wait_for_the_answer_is_cut_off(path: Path, app: App) -> None:
    app.gate.clear()
    before = refusals()
    client = await MilterClient.connect(path)
    sending = asyncio.create_task(client.message())
    await eventually(lambda: app.taken and app.taken[0].size)
    await asyncio.sleep(0.05)
    with suppress(ConnectionError):
        for _ in range(2 * milter_server.MAX_AHEAD // 4096):
            await client.put(b"B", bytes(4091))
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await sending
    assert refusals() == before + 1
    await eventually(lambda: app.taken[0].aborted)
    assert app.taken[0].size < milter_server.MAX_AHEAD
    await client.close()


async def test_stop_cuts_what_is_unanswered(tmp_path: Path, app: App) -> None:
    app.gate.clear()
    path = tmp_path / "other.sock"
    server = MilterServer(path, app)
    await server.start()
    client = await MilterClient.connect(path)
    sending = asyncio.create_task(client.message())
    await eventually(lambda: app.taken and app.taken[0].size)
    await server.stop()
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await sending
    await client.close()


def test_it_serves_on_uvloop_as_in_the_agent(tmp_path: Path) -> None:
    async def talk() -> None:
        app = App()
        app.brake = True
        server = MilterServer(tmp_path / "milter.sock", app)
        await server.start()
        client = await MilterClient.connect(tmp_path / "milter.sock")
        assert await client.message() == [(b"a", b"")]
        await client.mail()
        await client.rcpt()
        sending = asyncio.create_task(client.content((), bytes(10_000_000), b"4abc"))
        await eventually(lambda: len(app.taken) == 2 and app.taken[1].size > 1_000_000)
        app.brake = False
        app.taken[1].flow.resume()
        assert await sending == [(b"a", b"")]
        await client.close()
        await server.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(talk())
