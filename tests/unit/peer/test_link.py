"""The link over real TLS connections, on both event loops: exchanges, back pressure, refusals."""

from __future__ import annotations

import asyncio
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from umbra.peer import frames
from umbra.peer import server as server_module
from umbra.peer.exchange import Connection, Exchange, PeerError
from umbra.peer.frames import FrameType
from umbra.peer.identity import Identity, PeerIdentity
from umbra.peer.link import PeerLink
from umbra.peer.server import Handler, PeerServer

HELLO = {"version": frames.VERSION, "group": "mail", "storage_id": "s1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def any_epoch(peer: str, op: str, epoch: int) -> None:
    if epoch < 5:
        raise PeerError("stale-epoch", f"{peer}'s epoch {epoch} is over")


@asynccontextmanager
async def linked(
    identities: Path, handlers: Mapping[str, Handler], *, caller: str = "a", **hello: Any
) -> AsyncIterator[PeerLink]:
    port = free_port()
    identity = Identity(identities / "b", {"a": None})
    server = PeerServer("127.0.0.1", port, identity, {**HELLO, "node": "b"}, any_epoch, handlers)
    await server.start()
    mine = {**HELLO, "node": caller, **hello}
    link = PeerLink(
        "b", "127.0.0.1", port, Identity(identities / caller, {"b": None}), mine, lambda: 5
    )
    try:
        yield link
    finally:
        link.reset()
        await server.stop()


async def until_closed(connection: Connection) -> PeerError:
    while True:
        try:
            await connection.read()
        except PeerError as error:
            return error


async def echo(peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange) -> dict[str, Any]:
    while (data := await exchange.receive()) is not None:
        await exchange.send(data)
    await exchange.end()
    return {"from": peer.node, **args}


async def test_request_and_answer(identities: Path) -> None:
    async with linked(identities, {"echo": echo}) as link:
        assert await link.request("echo", {"x": 1}, timeout=5) == {"from": "a", "x": 1}


async def test_data_goes_both_ways_and_the_connection_is_used_again(identities: Path) -> None:
    async with linked(identities, {"echo": echo}) as link:
        for size in (0, 1, frames.MAX_PAYLOAD, 1_000_000):
            content, got = bytes(size), b""
            async with link.exchange("echo", {}, timeout=10) as exchange:

                async def feed(exchange: Exchange = exchange, content: bytes = content) -> None:
                    await exchange.send(content)
                    await exchange.end()

                feeding = asyncio.create_task(feed())
                while (data := await exchange.receive()) is not None:
                    got += data
                await feeding
                assert (await exchange.result())["from"] == "a"
            assert got == content
        assert len(link._idle) == 1


@pytest.mark.parametrize("end", [True, False])
async def test_the_answer_is_an_end_too(identities: Path, end: bool) -> None:
    """Agents of two versions work together: one tells its end before, the other does not."""
    keys: set[int] = set()

    async def answer(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        keys.add(id(exchange._connection))
        while (data := await exchange.receive()) is not None:
            await exchange.send(data)
        if end:
            await exchange.end()
            await asyncio.sleep(0.05)
        return {"answered": True}

    async with linked(identities, {"answer": answer}) as link:
        for _ in range(3):
            async with link.exchange("answer", {}, timeout=5) as exchange:
                await exchange.send(b"x")
                await exchange.end()
                assert await exchange.receive() == b"x"
                assert await exchange.receive() is None
                assert await exchange.result() == {"answered": True}
    assert len(keys) == 1


async def test_one_address_has_so_many_handshakes_at_a_time(
    identities: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_HANDSHAKES", 3)
    monkeypatch.setattr(server_module, "HELLO_TIMEOUT", 0.5)
    async with linked(identities, {"echo": echo}) as link:
        began = asyncio.get_running_loop().time()
        mute = [await asyncio.open_connection("127.0.0.1", link._port) for _ in range(6)]
        ended = []

        async def watch(reader: asyncio.StreamReader) -> None:
            with suppress(ConnectionError):
                await reader.read()
            ended.append(asyncio.get_running_loop().time() - began)

        watching = [asyncio.create_task(watch(reader)) for reader, _ in mute]
        await asyncio.sleep(0.2)
        assert len(ended) == 3
        with pytest.raises(PeerError):
            await link.request("echo", {}, timeout=5)
        await asyncio.gather(*watching)
        assert all(0.4 < seconds < 3 for seconds in ended[3:])
        for _, writer in mute:
            writer.close()
        assert await link.request("echo", {}, timeout=5)  # their time is over


async def test_exchanges_do_not_wait_for_each_other(identities: Path) -> None:
    gate = asyncio.Event()

    async def slow(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        await gate.wait()
        return {}

    async with linked(identities, {"slow": slow, "echo": echo}) as link:
        waiting = [asyncio.create_task(link.request("slow", {}, timeout=60)) for _ in range(20)]
        assert await link.request("echo", {}, timeout=30)  # the gate is shut
        gate.set()
        await asyncio.gather(*waiting)


@pytest.mark.parametrize(
    ("op", "code"),
    [("unknown", "refused"), ("fails", "own-code"), ("breaks", "failed"), ("hangs", "timeout")],
)
async def test_errors_have_a_code_and_do_not_harm_the_next(
    identities: Path, op: str, code: str
) -> None:
    async def fails(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        raise PeerError("own-code", "why")

    async def breaks(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        raise RuntimeError("a defect")

    async def hangs(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async with linked(
        identities, {"fails": fails, "breaks": breaks, "hangs": hangs, "echo": echo}
    ) as link:
        with pytest.raises(PeerError) as caught:
            await link.request(op, {}, timeout=0.5)
        assert caught.value.code == code
        assert await link.request("echo", {}, timeout=5)


async def test_a_request_that_fits_no_frame_fails_alone(identities: Path) -> None:
    async with linked(identities, {"echo": echo}) as link:
        with pytest.raises(PeerError) as failed:
            await link.request("echo", {"x": "x" * frames.MAX_PAYLOAD}, timeout=5)
        assert failed.value.code == "protocol"
        assert await link.request("echo", {"x": 1}, timeout=5) == {"from": "a", "x": 1}


async def test_a_superseded_node_is_refused(identities: Path) -> None:
    async with linked(identities, {"echo": echo}) as link:
        link._epoch = lambda: 4
        with pytest.raises(PeerError, match="epoch 4 is over"):
            await link.request("echo", {}, timeout=5)


@pytest.mark.parametrize(
    ("caller", "hello", "word"),
    [
        ("a", {"group": "other"}, "group 'other'"),
        ("a", {"node": "b"}, "certificate of 'a'"),
        ("a", {"version": 99}, "version 99"),
        ("stranger", {}, "."),
    ],
)
async def test_who_does_not_belong_is_refused(
    identities: Path, caller: str, hello: dict[str, Any], word: str
) -> None:
    async with linked(identities, {"echo": echo}, caller=caller, **hello) as link:
        with pytest.raises(PeerError, match=word):
            await link.request("echo", {}, timeout=5)


async def test_a_wrong_key_is_counted_and_told_in_the_journal(
    identities: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = refused("tls")
    async with linked(identities, {"echo": echo}, caller="stranger") as link:
        with pytest.raises(PeerError):
            await link.request("echo", {}, timeout=5)
        assert refused("tls") == before + 1
        assert "refused in the TLS handshake: self-signed certificate" in caplog.text
        # What speaks no TLS at all.
        reader, writer = await asyncio.open_connection(link._address, link._port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n" * 10)
        assert await asyncio.wait_for(reader.read(), 5) is not None
        writer.close()
        assert refused("tls") == before + 2


async def test_a_refused_operation_is_counted_and_told_in_the_journal(
    identities: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with linked(identities, {"echo": echo}) as link:
        before = refused("refused")
        with pytest.raises(PeerError):
            await link.request("unknown", {}, timeout=5)
        assert refused("refused") == before + 1
        assert "operation 'unknown' of a refused: unknown operation" in caplog.text


async def test_too_many_connections_are_refused_and_told(
    identities: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 1)
    before = refused("overloaded")
    async with linked(identities, {"echo": echo}) as link:
        first = await link._connect()
        with pytest.raises(PeerError):
            await link._connect()
        assert refused("overloaded") == before + 1
        assert "there are 1 already" in caplog.text
        first.close()


async def test_nobody_there(identities: Path) -> None:
    link = PeerLink(
        "b", "127.0.0.1", free_port(), Identity(identities / "a", {"b": None}), HELLO, lambda: 5
    )
    with pytest.raises(PeerError) as caught:
        await link.request("echo", {}, timeout=5)
    assert caught.value.code == "unreachable"


async def test_garbage_is_refused_and_others_are_served(identities: Path) -> None:
    async with linked(identities, {"echo": echo}) as link:
        assert await link.request("echo", {}, timeout=5)
        connection = await link._connect()
        await connection.write(b"\xff" * 64)
        assert (await until_closed(connection)).code == "unreachable"
        assert await link.request("echo", {}, timeout=5)


def refused(code: str) -> float:
    return REGISTRY.get_sample_value("umbra_peer_refused_total", {"code": code}) or 0.0


REQUEST = frames.encode_json(FrameType.REQUEST, {"op": "echo", "epoch": 5, "args": {}})


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frames.HEADER.pack(frames.MAX_PAYLOAD + 1, FrameType.REQUEST), "protocol"),
        (frames.HEADER.pack(2, 99) + b"{}", "protocol"),
        (frames.encode(FrameType.DATA, b"x"), "protocol"),
        (frames.encode(FrameType.REQUEST, b"[1]"), "protocol"),
        (frames.encode(FrameType.REQUEST, b"{}"), "protocol"),
        (REQUEST + frames.encode(FrameType.HELLO, b"{}"), "protocol"),
        (REQUEST + REQUEST, "protocol"),
        (REQUEST + frames.encode(FrameType.DATA, b"x") + b"\xff" * 9, "protocol"),
    ],
)
async def test_what_breaks_the_protocol_is_counted_and_ends_that_connection_only(
    identities: Path, data: bytes, code: str
) -> None:
    async with linked(identities, {"echo": echo}) as link:
        before = refused(code)
        bad, good = await link._connect(), await link._connect()
        await bad.write(data)
        await until_closed(bad)
        assert refused(code) == before + 1
        await good.write(REQUEST + frames.encode(FrameType.END))
        assert (await good.read())[0] is FrameType.END
        assert (await good.read())[0] is FrameType.RESPONSE
        for connection in (bad, good):
            connection.close()


async def test_frames_may_come_byte_by_byte(identities: Path) -> None:
    async with linked(identities, {"echo": echo}) as link:
        connection = await link._connect()
        for byte in REQUEST + frames.encode(FrameType.DATA, b"abc") + frames.encode(FrameType.END):
            await connection.write(bytes([byte]))
            await asyncio.sleep(0)
        assert await connection.read() == (FrameType.DATA, b"abc")
        assert (await connection.read())[0] is FrameType.END
        assert (await connection.read())[0] is FrameType.RESPONSE
        connection.close()


async def test_half_a_frame_and_silence_hold_up_nobody_and_a_cut_ends_it(
    identities: Path,
) -> None:
    async with linked(identities, {"echo": echo}) as link:
        before = refused("protocol")
        stuck = [await link._connect() for _ in range(20)]
        for connection in stuck:
            await connection.write(REQUEST + struct.pack(">IB", 60_000, FrameType.DATA) + b"half")
        for _ in range(5):
            assert await link.request("echo", {}, timeout=2)
        for connection in stuck:
            connection.close()
        assert await link.request("echo", {}, timeout=2)
        assert refused("protocol") == before  # cut off is not malformed


async def test_who_connects_and_says_nothing_is_dropped(
    identities: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "HELLO_TIMEOUT", 0.2)
    async with linked(identities, {"echo": echo}) as link:
        _, connection = await asyncio.get_running_loop().create_connection(
            Connection, link._address, link._port, ssl=link._identity.client
        )
        _, raw = await asyncio.open_connection(link._address, link._port)  # not even TLS
        async with asyncio.timeout(5):
            await until_closed(connection)
        connection.close()
        raw.transport.abort()
        assert await link.request("echo", {}, timeout=2)


async def test_a_refusal_in_the_middle_of_a_stream_is_told(identities: Path) -> None:
    async def full(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        await exchange.receive()
        raise PeerError("store-full", "no room")

    async with linked(identities, {"full": full, "echo": echo}) as link:

        async def stream() -> None:
            async with link.exchange("full", {}, timeout=10) as exchange:
                while True:
                    await exchange.send(bytes(256 * 1024))

        with pytest.raises(PeerError) as caught:
            await stream()
        assert caught.value.code == "store-full"
        assert await link.request("echo", {}, timeout=2)


async def test_who_does_not_read_brakes_the_sender(identities: Path) -> None:
    gate = asyncio.Event()
    sent = 0

    async def late(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        await gate.wait()
        got = 0
        while (data := await exchange.receive()) is not None:
            got += len(data)
        return {"got": got}

    async with linked(identities, {"late": late}) as link:
        piece, total = bytes(256 * 1024), 128

        async def feed(exchange: Exchange) -> None:
            nonlocal sent
            for _ in range(total):
                await exchange.send(piece)
                sent += 1

        async with link.exchange("late", {}, timeout=30) as exchange:
            feeding = asyncio.create_task(feed(exchange))
            before = -1
            while sent != before:  # until nothing goes any more
                before = sent
                await asyncio.sleep(0.3)
            assert sent < total  # what the kernel buffers, not all 32 MB
            gate.set()
            await feeding
            assert await exchange.result() == {"got": total * len(piece)}


async def test_ten_large_streams_need_little_memory(identities: Path) -> None:
    async def sink(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        got = 0
        while (data := await exchange.receive()) is not None:
            got += len(data)
            await asyncio.sleep(0)  # slower than what comes
        return {"got": got}

    async with linked(identities, {"sink": sink}) as link:
        piece, count = bytes(64 * 1024), 80

        async def one() -> None:
            async with link.exchange("sink", {}, timeout=60) as exchange:
                for _ in range(count):
                    await exchange.send(piece)
                assert await exchange.result() == {"got": count * len(piece)}

        await link.request("sink", {}, timeout=5)
        tracemalloc.start()
        try:
            await asyncio.gather(*(one() for _ in range(10)))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 16 * 1024 * 1024  # of 50 MB that went through, both ends in this process


async def test_the_time_out_is_of_the_whole_and_can_be_extended(identities: Path) -> None:
    async def slow(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        await asyncio.sleep(0.4)
        return {}

    async with linked(identities, {"slow": slow}) as link:
        async with link.exchange("slow", {}, timeout=0.2) as exchange:
            exchange.extend(5)
            assert await exchange.result() == {}
        async with link.exchange("slow", {}, timeout=0.2) as exchange:
            await asyncio.sleep(0.1)
            exchange.renew(0.5)
            assert await exchange.result() == {}
        with pytest.raises(PeerError, match="in time"):
            await link.request("slow", {}, timeout=0.2)


async def test_a_void_exchange_resets_its_connection(identities: Path) -> None:
    """Nothing of it is sent again when the other side can be reached again."""
    seen: asyncio.Queue[PeerError] = asyncio.Queue()

    async def waits(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        try:
            while await exchange.receive() is not None:
                pass
        except PeerError as error:
            seen.put_nowait(error)
        return {}

    async def give_up(link: PeerLink) -> None:
        async with link.exchange("waits", {}, timeout=0.1) as exchange:
            await exchange.send(b"half of it")
            await asyncio.sleep(5)

    async with linked(identities, {"waits": waits}) as link:
        with pytest.raises(PeerError, match="in time"):
            await give_up(link)
        async with asyncio.timeout(5):
            assert "reset" in (await seen.get()).text


async def test_the_kernel_watches_the_other_host(identities: Path) -> None:
    async with linked(identities, {"echo": echo}) as link:
        await link.request("echo", {}, timeout=5)
        peer = link._idle[0].extra("socket")
        for level, option, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
        ):
            assert peer.getsockopt(level, option) == value


async def test_a_small_exchange_leaves_in_one_piece(
    identities: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with linked(identities, {"echo": echo}) as link:
        await link.request("echo", {}, timeout=5)
        written: list[int] = []
        connection = link._idle[0]

        class Spy:
            def __init__(self, transport: Any) -> None:
                self._spied = transport

            def __getattr__(self, name: str) -> Any:
                return getattr(self._spied, name)

            def write(self, data: bytes) -> None:
                written.append(len(data))
                self._spied.write(data)

        monkeypatch.setattr(connection, "_transport", Spy(connection._transport))
        async with link.exchange("echo", {}, timeout=5) as exchange:
            await exchange.send(bytes(4096))
            await exchange.result()
        assert len(written) == 1
        assert written[0] > 4096


async def test_an_answer_that_does_not_fit_a_frame_is_a_refusal_in_words(
    identities: Path,
) -> None:
    async def many(*_: Any) -> dict[str, Any]:
        return {"uncovered": ["4bcdefgh"] * 10_000}

    async with linked(identities, {"many": many}) as link:
        with pytest.raises(
            PeerError, match="the answer to many cannot be sent: a payload"
        ) as caught:
            await link.request("many", {}, timeout=5)
        assert caught.value.code == "failed"


@pytest.mark.parametrize("epoch", [None, -1, True, 1.5, 2**53, "5"])
async def test_a_request_has_an_epoch_that_there_can_be(identities: Path, epoch: Any) -> None:
    """It would end on the disk, and in a database that takes no greater number."""
    async with linked(identities, {"echo": echo}) as link:
        link._epoch = lambda: epoch
        with pytest.raises(PeerError, match="epoch") as caught:
            await link.request("echo", {}, timeout=5)
        assert caught.value.code == "protocol"


async def test_nonsense_that_comes_again_and_again_is_told_once(
    identities: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["no sense: lag", "no sense: lag", "", "no sense: lag", "no sense: reasons"]

    async def status(*_: Any) -> dict[str, Any]:
        if text := texts.pop(0):
            raise PeerError("protocol", text)
        return {}

    async with linked(identities, {"status": status}) as link:
        while texts:
            with suppress(PeerError):
                await link.request("status", {}, timeout=5)
    assert caplog.text.count("no sense: lag") == 2
    assert caplog.text.count("no sense: reasons") == 1
