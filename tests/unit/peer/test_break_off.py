"""A node that asks for the role of another breaks off what that one has asked of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.unit.peer.test_link import HELLO, any_epoch, free_port, linked

from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.identity import Identity, PeerIdentity
from umbra.peer.link import PeerLink
from umbra.peer.server import PeerServer


async def test_what_waits_for_a_dead_peer_fails_when_that_is_known(identities: Path) -> None:
    begun = asyncio.Event()

    async def hang(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        begun.set()
        await asyncio.get_running_loop().create_future()
        return {}

    async def fine(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        return {}

    async with linked(identities, {"hang": hang, "fine": fine}) as link:
        waiting = asyncio.create_task(link.request("hang", {}, timeout=30))
        await begun.wait()
        link.cut()
        with pytest.raises(PeerError) as caught:
            async with asyncio.timeout(5):
                await waiting
        assert caught.value.code == "unreachable"
        assert await link.request("fine", {}, timeout=5) == {}


async def test_only_the_named_operations_of_lower_epochs_end_and_none_of_them_is_answered(
    identities: Path,
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    ended: list[str] = []

    async def work(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        begun.set()
        try:
            await go_on.wait()
        finally:
            ended.append(str(args["as"]))
        return {}

    port = free_port()
    server = PeerServer(
        "127.0.0.1", port, Identity(identities / "b", {"a": None}), {**HELLO, "node": "b"},
        any_epoch, {"store": work, "status": work},
    )  # fmt: skip
    await server.start()
    link = PeerLink(
        "b", "127.0.0.1", port, Identity(identities / "a", {"b": None}), {**HELLO, "node": "a"},
        lambda: 5,
    )  # fmt: skip
    try:
        store = asyncio.create_task(link.request("store", {"as": "store"}, timeout=5))
        await begun.wait()
        begun.clear()
        status = asyncio.create_task(link.request("status", {"as": "status"}, timeout=5))
        await begun.wait()
        server.break_off({"store", "dsync"}, 5)
        await asyncio.sleep(0)
        assert ended == []
        server.break_off({"store", "dsync"}, 6)
        with pytest.raises(PeerError) as caught:
            await store
        assert caught.value.code == "unreachable"
        assert ended == ["store"]
        go_on.set()
        assert await status == {}
        assert await link.request("store", {"as": "later"}, timeout=5) == {}
    finally:
        link.reset()
        await server.stop()
