"""The link over real TLS connections: exchanges, back pressure, refusals."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from umbra.peer import frames
from umbra.peer.exchange import Connection, Exchange, PeerError
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


async def until_closed(connection: Connection) -> None:
    while True:
        await connection.read()


async def echo(peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange) -> dict[str, Any]:
    while (data := await exchange.receive()) is not None:
        await exchange.send(data)
    await exchange.end()
    return {"from": peer.node, **args}


async def test_request_and_answer(identities: Path) -> None:
    async with linked(identities, {"echo": echo}) as link:
        assert await link.request("echo", {"x": 1}, timeout=5) == {"from": "a", "x": 1}
        assert link.peer == PeerIdentity("b", "s1")


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


async def test_exchanges_do_not_wait_for_each_other(identities: Path) -> None:
    gate = asyncio.Event()

    async def slow(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        await gate.wait()
        return {}

    async with linked(identities, {"slow": slow, "echo": echo}) as link:
        waiting = [asyncio.create_task(link.request("slow", {}, timeout=5)) for _ in range(20)]
        assert await link.request("echo", {}, timeout=2)
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
        with pytest.raises(PeerError):
            await until_closed(connection)
        assert await link.request("echo", {}, timeout=5)
