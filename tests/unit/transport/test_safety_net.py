"""The safety net: what is kept on which node, for how long, and how an older store comes along."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.unit.transport.support import (
    ENVELOPE,
    FakeGroup,
    FakeLink,
    MilterClient,
    active,
    content,
    shadow_id_of,
)

from umbra.config import ShadowPolicy
from umbra.peer.exchange import PeerError
from umbra.transport import ids, metrics, safety_net
from umbra.transport.backfill import BackFill
from umbra.transport.discard import Discarder, Holder, LocalHolder, PeerHolder
from umbra.transport.milter_server import MilterServer
from umbra.transport.resubmit import narrow
from umbra.transport.safety_net import SafetyNet
from umbra.transport.service import ShadowService
from umbra.transport.shadowing import RESUBMISSION, Shadowing
from umbra.transport.store import ShadowStore, State

LARGE = os.urandom(700_000)


class Bench:
    """A primary, a, and its shadow, b, both with a net; the queue is ``files``."""

    def __init__(self, path: Path) -> None:
        self.path = path / "milter.sock"
        self.own = ShadowStore(path / "own", keep=True)
        self.shadow = ShadowStore(path / "shadow", keep=True)
        self.link = FakeLink(
            "b", ShadowService(self.shadow, lambda: 7, lambda node: True).handlers()
        )
        self.group = FakeGroup(self.link)
        self.files = {"4abcDEF"}
        holders: list[Holder] = [LocalHolder(self.own, "a")]
        holders.append(PeerHolder(self.link))  # type: ignore[arg-type]
        self.discarder = Discarder(holders, active(self.queue_ids))
        self.net = SafetyNet(self.own, hold=3600, max_size=1 << 30)
        self.shadowing = Shadowing(
            "a", self.group, self.own, self.discarder, {},
            policy=ShadowPolicy.ACCEPT, timeout=5, net=self.net,
        )  # fmt: skip

    async def queue_ids(self) -> set[str]:
        return set(self.files)

    async def deliver(self, body: bytes, **options: bytes) -> list[tuple[bytes, bytes]]:
        client = await MilterClient.connect(self.path, **options)
        try:
            return await client.message(((b"Subject", b" x"),), body)
        finally:
            await client.close()

    async def leave(self) -> None:
        self.files = set()
        for _ in range(3):
            await self.discarder.discard()


async def kept(store: ShadowStore) -> dict[str, bytes]:
    metas = [meta async for meta in store.in_order(State.DELIVERED)]
    return {meta.shadow_id: await content(store.content(meta)) for meta in metas}


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    await bench.own.open()
    await bench.shadow.open()
    server = MilterServer(bench.path, bench.shadowing)
    await server.start()
    yield bench
    await server.stop()
    await bench.own.close()
    await bench.shadow.close()


@pytest.mark.parametrize("body", [b"text\r\n", LARGE], ids=["small", "large"])
async def test_either_node_has_what_was_delivered(bench: Bench, body: bytes) -> None:
    shadow_id = shadow_id_of(await bench.deliver(body))
    assert await kept(bench.shadow) == {}
    await bench.net.flush()
    await bench.leave()
    whole = b"Subject: x\r\n\r\n" + body
    assert await kept(bench.own) == {shadow_id: whole}
    assert await kept(bench.shadow) == {shadow_id: whole}
    assert [row.state for row in await bench.shadow.stats()] == [State.DELIVERED]
    assert bench.discarder.counts() == {"a": 0, "b": 0}


@pytest.mark.parametrize("body", [b"text\r\n", LARGE], ids=["small", "large"])
async def test_what_was_refused_is_kept_by_nobody(bench: Bench, body: bytes) -> None:
    bench.shadowing.policy = ShadowPolicy.DEFER
    real = bench.link.handlers["shadow-store"]

    async def too_late(*args: object) -> dict[str, object]:
        await real(*args)  # type: ignore[arg-type]
        raise PeerError("timeout", "the answer was lost")

    bench.link.handlers = {**bench.link.handlers, "shadow-store": too_late}
    assert (await bench.deliver(body))[-1][0] == b"y"
    assert [row.state for row in await bench.shadow.stats()] == [State.HELD]
    await bench.net.flush()
    await bench.leave()
    assert await bench.shadow.stats() == []
    assert await bench.own.stats() == []
    assert os.listdir(bench.own._spool) == os.listdir(bench.shadow._spool) == []


async def test_what_was_accepted_alone_is_kept_here(bench: Bench) -> None:
    bench.group.peers = []
    shadow_id = shadow_id_of(await bench.deliver(b"alone\r\n"))
    await bench.leave()
    assert list(await kept(bench.own)) == [shadow_id]


async def test_a_back_filled_message_is_kept_by_both(bench: Bench) -> None:
    bench.group.peers = []
    shadow_id = shadow_id_of(await bench.deliver(b"alone\r\n"))
    fill = BackFill("a", bench.own, bench.discarder, lambda: 0)
    assert (await fill.run(bench.link)).complete  # type: ignore[arg-type]
    await bench.leave()
    assert list(await kept(bench.own)) == list(await kept(bench.shadow)) == [shadow_id]


async def test_a_replay_is_not_kept_a_second_time(bench: Bench) -> None:
    shadow_id_of(await bench.deliver(b"again\r\n", daemon=RESUBMISSION))
    await bench.net.flush()
    await bench.leave()
    assert await kept(bench.own) == await kept(bench.shadow) == {}


async def test_without_a_net_nothing_is_kept(tmp_path: Path) -> None:
    store = ShadowStore(tmp_path / "s")
    net = SafetyNet(store, hold=0, max_size=1 << 30)
    assert not net.wanted
    await store.open()
    shadow_id = await held(store)
    await store.discard([shadow_id], origin="a")
    assert await store.stats() == []
    await store.close()


async def held(store: ShadowStore, size: int = 10) -> str:
    shadow_id = ids.new()
    writer = store.begin(shadow_id, origin="a", queue_id="q", envelope=ENVELOPE, epoch=1)
    await writer.write(os.urandom(size))
    await writer.commit()
    return shadow_id


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ShadowStore]:
    store = ShadowStore(tmp_path / "s", keep=True)
    await store.open()
    yield store
    await store.close()


async def test_a_flush_that_is_cancelled_keeps_its_account(store: ShadowStore) -> None:
    net = SafetyNet(store, hold=3600, max_size=1 << 30)
    for cancelled in (True, False):
        shadow_id = ids.new()
        writer = store.begin(shadow_id, origin="a", queue_id="q", envelope=ENVELOPE, epoch=1)
        await writer.write(b"x" * 1000)
        net.keep(writer)
        flush = asyncio.create_task(net.flush())
        await asyncio.sleep(0)
        if cancelled:
            flush.cancel()
    await net.flush()
    assert net._bytes == 0
    assert await store.find(shadow_id) is not None, "what another call was writing is not there"
    await flush


async def test_the_oldest_goes_first_when_it_is_too_much(store: ShadowStore) -> None:
    made = [await held(store, 300_000 if n % 2 else 1000) for n in range(6)]
    for shadow_id in made:
        await store.discard([shadow_id], origin="a")
    assert await SafetyNet(store, hold=3600, max_size=302_000).purge() == 4
    assert list(await kept(store)) == made[4:]
    assert len(os.listdir(store._spool)) == 1


async def test_what_is_too_old_goes_and_what_is_held_stays(
    store: ShadowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safety_net, "PURGE_BATCH", 2)
    old = [await held(store) for _ in range(5)]
    await store.discard(old, origin="a")
    net = SafetyNet(store, hold=0.2, max_size=1 << 30)
    assert await net.purge() == 0
    await asyncio.sleep(0.25)
    new = await held(store)
    assert await net.purge() == 5
    assert [(row.state, row.count) for row in await store.stats()] == [(State.HELD, 1)]
    assert await store.find(new)


@pytest.mark.parametrize("by", ["queue", "account"])
async def test_what_is_in_the_queue_still_is_not_too_old(
    store: ShadowStore, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """A shadow that comes back has its copy from here."""
    monkeypatch.setattr(safety_net, "PURGE_BATCH", 2)
    old = [await held(store) for _ in range(7)]
    await store.discard(old, origin="a")
    deferred = old[:3]
    for name in old[3:]:
        await store._write(
            lambda database, name=name: (
                database.execute(  # type: ignore[misc]
                    "UPDATE message SET queue_id = 'gone' WHERE shadow_id = ?", (name,)
                ).rowcount
            )
        )

    async def queued() -> set[str]:
        return {"q"} if by == "queue" else set(deferred)

    await asyncio.sleep(0.05)
    net = SafetyNet(store, hold=0.01, max_size=1 << 30, queued=queued)
    assert await net.purge() == 4
    assert sorted(await kept(store)) == sorted(deferred)


async def test_mail_goes_before_history(
    store: ShadowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.discard([await held(store)], origin="a")
    waiting = await held(store)
    net = SafetyNet(store, hold=3600, max_size=1 << 30)

    async def room() -> int:
        return 0

    monkeypatch.setattr(store, "room", room)
    task = asyncio.create_task(net.run())
    async with asyncio.timeout(5):
        while len(await store.stats()) > 1:  # noqa: ASYNC110 (it is the store that changes)
            await asyncio.sleep(0.01)
    assert not net.wanted
    assert await store.find(waiting)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_claim_keeps_what_was_delivered(store: ShadowStore) -> None:
    await held(store)
    gone = await store.claim("a", {}, narrow)
    assert len(gone) == 1
    assert [row.state for row in await store.stats()] == [State.DELIVERED]


async def test_a_kept_message_that_is_in_transit_again_is_held_again(store: ShadowStore) -> None:
    shadow_id = await held(store)
    await store.discard([shadow_id], origin="a")
    writer = store.begin(shadow_id, origin="c", queue_id="q2", envelope=ENVELOPE, epoch=2)
    await writer.write(b"the same")
    await writer.commit()
    assert [(row.origin, row.state) for row in await store.stats()] == [("c", State.HELD)]
    # The primary's own copy never takes a message out of another state.
    late = store.begin(shadow_id, origin="a", queue_id="q", envelope=ENVELOPE, epoch=1)
    await late.commit(delivered=True)
    assert [(row.origin, row.state) for row in await store.stats()] == [("c", State.HELD)]


async def test_a_batch_is_discarded_in_one_transaction(store: ShadowStore) -> None:
    made = await asyncio.gather(*(held(store) for _ in range(200)))
    before = metrics.COMMITS._value.get()
    assert len(await store.discard(made, origin="a")) == 200
    assert metrics.COMMITS._value.get() == before + 1


async def test_a_store_of_version_1_is_taken_over(tmp_path: Path) -> None:
    directory = tmp_path / "s"
    store = ShadowStore(directory)
    await store.open()
    large, small = await held(store, 300_000), await held(store, 4096)
    text = await content(store.content(await store.find(small)))  # type: ignore[arg-type]
    await store.close()
    with sqlite3.connect(directory / "shadow.db", isolation_level=None) as database:
        # As version 1 had it: the content in the row, no column of the safety net.
        for statement in (
            "DROP TRIGGER went",
            "DROP INDEX net",
            "ALTER TABLE message DROP COLUMN delivered",
            "ALTER TABLE message ADD COLUMN content BLOB",
            "UPDATE message SET content ="
            " (SELECT data FROM content WHERE content.number = message.number)",
            "DROP TABLE content",
            "CREATE TRIGGER went AFTER DELETE ON message BEGIN UPDATE holding SET"
            " count = count - 1, bytes = bytes - OLD.size"
            " WHERE origin = OLD.origin AND state = OLD.state; END",
            "PRAGMA user_version = 1",
        ):
            database.execute(statement)
    database.close()
    store = ShadowStore(directory, keep=True)
    await store.open()
    meta = await store.find(small)
    assert meta is not None
    assert await content(store.content(meta)) == text
    await store.discard([small, large], origin="a")
    assert [(row.state, row.count) for row in await store.stats()] == [(State.DELIVERED, 2)]
    assert await store.purge(time.time() + 1, 0, 10) == 2
    assert await store.stats() == []
    await store.close()
    with sqlite3.connect(directory / "shadow.db") as database:
        assert database.execute("SELECT COUNT(*) FROM content").fetchone() == (0,)
    database.close()
