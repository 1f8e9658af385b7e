"""Back-fill: what was accepted alone gets to the shadow, and the end is told truly."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.unit.transport.support import ENVELOPE, LONG, FakeLink, active, content
from tests.unit.transport.test_store import spoil

from umbra.peer.exchange import PeerError
from umbra.transport import backfill, ids, service
from umbra.transport.backfill import BackFill, BackFilled
from umbra.transport.discard import Copies, Discarder, LocalHolder, PeerHolder
from umbra.transport.resubmit import narrow
from umbra.transport.service import ShadowService
from umbra.transport.store import Meta, ShadowStore, State

CONTENT = os.urandom(300_000)


@dataclass
class Bench:
    own: ShadowStore
    shadow: ShadowStore
    link: FakeLink
    discarder: Discarder
    back_fill: BackFill
    storing: int = 0

    async def alone(
        self,
        data: bytes,
        queue_id: str = "4abc",
        origin: str = "a",
        state: State = State.UNSHADOWED,
    ) -> str:
        shadow_id = ids.new()
        writer = self.own.begin(
            shadow_id, origin=origin, queue_id=queue_id, envelope=ENVELOPE, epoch=2, state=state
        )
        await writer.write(data)
        await writer.commit()
        return shadow_id


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    own, shadow = ShadowStore(tmp_path / "own"), ShadowStore(tmp_path / "shadow")
    await own.open()
    await shadow.open()
    link = FakeLink("b", ShadowService(shadow, lambda: 2, lambda node: True).handlers())

    async def queue_ids() -> set[str]:
        return set()

    discarder = Discarder([LocalHolder(own, "a"), PeerHolder(link)], active(queue_ids))  # type: ignore[arg-type]
    bench: Bench
    back_fill = BackFill("a", own, discarder, lambda: bench.storing)
    bench = Bench(own, shadow, link, discarder, back_fill)
    yield bench
    await own.close()
    await shadow.close()


async def test_everything_is_copied_and_its_own_copy_goes(bench: Bench) -> None:
    data = {await bench.alone(body): body for body in (b"one", b"", os.urandom(500_000))}
    assert await bench.back_fill.run(bench.link) == BackFilled(3, complete=True)  # type: ignore[arg-type]
    for shadow_id, body in data.items():
        meta = await bench.shadow.find(shadow_id)
        assert meta is not None
        assert (meta.origin, meta.queue_id, meta.state) == ("a", "4abc", State.HELD)
        assert await content(bench.shadow.content(meta)) == body
    assert await bench.own.stats() == []
    assert await bench.back_fill.run(bench.link) == BackFilled(0, complete=True)  # type: ignore[arg-type]


async def test_a_large_message_has_the_time_of_a_slow_line(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backfill, "TIMEOUT", 0.2)
    monkeypatch.setattr(service, "RECEIVE_TIMEOUT", 0.2)
    await bench.alone(b"x")
    whole = bench.own.content

    async def slow(meta: Meta) -> AsyncIterator[bytes]:
        for _ in range(5):
            await asyncio.sleep(0.1)
            yield b"x"
        async for piece in whole(meta):
            yield piece

    monkeypatch.setattr(bench.own, "content", slow)
    assert (await bench.back_fill.run(bench.link)).copied == 1  # type: ignore[arg-type]


async def test_a_break_keeps_what_is_not_copied(bench: Bench) -> None:
    for number in range(5):
        await bench.alone(b"x", f"q{number}")
    calls = iter([None, None, PeerError("unreachable", "gone")])
    bench.link.fail = lambda op: next(calls)
    with pytest.raises(PeerError):
        await bench.back_fill.run(bench.link)  # type: ignore[arg-type]
    assert [holding.count for holding in await bench.own.stats()] == [3]
    bench.link.fail = lambda op: None
    assert (await bench.back_fill.run(bench.link)).copied == 3  # type: ignore[arg-type]
    assert [holding.count for holding in await bench.shadow.stats()] == [5]
    assert bench.discarder.counts()["b"] == 5


async def test_it_is_not_complete_while_a_message_is_on_its_way_into_the_store(
    bench: Bench,
) -> None:
    bench.storing = 1
    assert not (await bench.back_fill.run(bench.link)).complete  # type: ignore[arg-type]


async def test_it_is_not_complete_while_a_resubmission_waits(bench: Bench) -> None:
    await bench.alone(b"x", origin="c", state=State.HELD)
    await bench.own.claim("c", None, narrow)
    assert not (await bench.back_fill.run(bench.link)).complete  # type: ignore[arg-type]
    async for meta in bench.own.in_order(State.RESUBMITTING):
        await bench.own.park(meta.shadow_id)  # nobody can copy it, and nobody waits for it
    assert (await bench.back_fill.run(bench.link)).complete  # type: ignore[arg-type]


async def test_what_was_resubmitted_alone_behind_the_look_is_not_missed(bench: Bench) -> None:
    resubmitted = await bench.alone(b"x", "old", origin="c", state=State.HELD)
    await bench.alone(b"y", "q2")  # its id is later
    await bench.own.claim("c", None, narrow)
    meta = await bench.own.find(resubmitted)
    assert meta is not None
    send = bench.back_fill._send

    async def sending(*args: Any) -> None:
        await bench.own.keep_unshadowed(meta, "q1", origin="a")
        await send(*args)

    bench.back_fill._send = sending  # type: ignore[assignment,method-assign]
    assert await bench.back_fill.run(bench.link) == BackFilled(1, complete=False)  # type: ignore[arg-type]
    assert await bench.back_fill.run(bench.link) == BackFilled(1, complete=True)  # type: ignore[arg-type]


async def test_a_shadow_gets_what_the_queue_has_and_it_was_not_there_to_take(bench: Bench) -> None:
    own = await bench.alone(b"own", "q1")
    taken_over = await bench.alone(b"taken over", "old", origin="c", state=State.HELD)
    await bench.alone(b"finished", "q9")
    bench.own._keep = True
    await bench.own.claim("c", None, narrow)
    await bench.own.note_queue_id(taken_over, "q2")
    await bench.own.discard([taken_over], origin="c", state=State.RESUBMITTING)
    await bench.own.discard([own], origin="a", state=State.UNSHADOWED)
    there = await bench.alone(b"there already", "q3")
    await bench.own.discard([there], origin="a", state=State.UNSHADOWED)
    bench.discarder.add("b", "q3", there)
    await bench.back_fill.run_queue(bench.link, {"q1", "q2", "q4"})  # type: ignore[arg-type]
    held = {
        copy.queue_id: copy.shadow_id async for page in bench.shadow.copies("a") for copy in page
    }
    assert held == {"q1": own, "q2": taken_over}
    assert bench.discarder.covered("b") == {"q1": own, "q2": taken_over, "q3": there}
    meta = await bench.shadow.find(taken_over)
    assert meta is not None
    assert await content(bench.shadow.content(meta)) == b"taken over"


async def test_a_file_that_was_requeued_is_found_by_the_id_that_it_bears(bench: Bench) -> None:
    bench.own._keep = True
    shadow_id = await bench.alone(CONTENT, "q1")
    await bench.own.discard([shadow_id], origin="a", state=State.UNSHADOWED)
    await bench.back_fill.run_queue(bench.link, {"q2", "q3"}, {"q2": shadow_id, "q3": ""})  # type: ignore[arg-type]
    [meta] = [meta async for meta in bench.shadow.in_order(State.HELD)]
    assert (meta.shadow_id, meta.queue_id) == (shadow_id, "q2")
    assert await content(bench.shadow.content(meta)) == CONTENT
    assert bench.discarder.covered("b") == {"q2": shadow_id}


async def test_the_copy_of_a_file_that_was_requeued_gets_its_new_name(bench: Bench) -> None:
    """A handover would take it for finished by the old one."""
    bench.back_fill._shadows = lambda: [bench.link]  # type: ignore[list-item]
    shadow_id = ids.new()
    writer = bench.shadow.begin(shadow_id, origin="a", queue_id="q1", envelope=ENVELOPE, epoch=2)
    await writer.write(CONTENT)
    await writer.commit()
    bench.discarder.add("b", "q2", shadow_id, sure=False)
    await bench.back_fill.run_queue(bench.link, {"q2"})  # type: ignore[arg-type]
    [meta] = [meta async for meta in bench.shadow.in_order(State.HELD)]
    assert (meta.shadow_id, meta.queue_id) == (shadow_id, "q2")
    assert await content(bench.shadow.content(meta)) == CONTENT
    assert bench.discarder.covered("b") == {"q2": shadow_id}


async def test_what_nothing_can_copy_is_said(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.back_fill.run_queue(bench.link, {"q4"})  # type: ignore[arg-type]
    assert "b has no copy of 1 messages of the queue" in caplog.text


@pytest.fixture
async def other(tmp_path: Path, bench: Bench) -> AsyncIterator[FakeLink]:
    """Another shadow, which has a message of the queue that this node has not."""
    store = ShadowStore(tmp_path / "other")
    await store.open()
    link = FakeLink("c", ShadowService(store, lambda: 2, lambda node: True).handlers())
    bench.discarder._holders["c"] = PeerHolder(link)  # type: ignore[arg-type]
    bench.discarder._copies["c"] = Copies()
    bench.back_fill._shadows = lambda: [bench.link, link]  # type: ignore[list-item]
    for queue_id, envelope in (("q1", ENVELOPE), ("q2", LONG)):
        shadow_id = ids.new()
        writer = store.begin(shadow_id, origin="a", queue_id=queue_id, envelope=envelope, epoch=1)
        await writer.write(CONTENT)
        await writer.commit()
        bench.discarder.add("c", queue_id, shadow_id)
    yield link
    await store.close()


async def test_what_another_shadow_alone_has_is_copied_from_there(
    bench: Bench, other: FakeLink
) -> None:
    # Whether it is still on hold is told by the next listing of the queue.
    args = {"shadow_ids": list(bench.discarder.covered("c").values()), "held": True}
    await other.request("shadow-hold", args, timeout=1)
    await bench.back_fill.run_queue(bench.link, {"q1", "q2"})  # type: ignore[arg-type]
    found = {meta.queue_id: meta async for meta in bench.shadow.in_order(State.HELD)}
    assert bench.discarder.covered("b") == bench.discarder.covered("c")
    assert {key: meta.shadow_id for key, meta in found.items()} == bench.discarder.covered("c")
    assert [meta.envelope for meta in found.values()] == [ENVELOPE, LONG]
    for meta in found.values():
        assert await content(bench.shadow.content(meta)) == CONTENT


async def test_a_shadow_does_not_lack_what_another_could_be_promoted_with(
    bench: Bench, other: FakeLink
) -> None:
    other.fail = lambda op: PeerError("unreachable", "c does not answer")
    with pytest.raises(PeerError, match="c does not answer"):
        await bench.back_fill.run_queue(bench.link, {"q1"})  # type: ignore[arg-type]
    del other.handlers["shadow-fetch"]  # type: ignore[attr-defined]
    other.fail = lambda op: None
    with pytest.raises(PeerError, match="unknown operation"):  # an older agent
        await bench.back_fill.run_queue(bench.link, {"q1"})  # type: ignore[arg-type]


async def test_a_copy_that_is_lost_there_too_is_told(
    bench: Bench, other: FakeLink, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (tmp_path / "other" / "spool").iterdir():
        path.unlink()
    await bench.back_fill.run_queue(bench.link, {"q1"})  # type: ignore[arg-type]
    assert "c has no copy of the message q1" in caplog.text
    assert "b has no copy of 1 messages of the queue" in caplog.text
    assert await bench.shadow.stats() == []


async def test_a_content_that_cannot_be_read_is_told_and_stops_no_other_message(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = await bench.alone(os.urandom(500_000), "q1")
    await bench.alone(b"x", "q2")
    [path] = (tmp_path / "own" / "spool").iterdir()
    path.unlink()
    assert await bench.back_fill.run(bench.link) == BackFilled(1, complete=True)  # type: ignore[arg-type]
    assert [meta.queue_id async for meta in bench.shadow.in_order(State.HELD)] == ["q2"]
    assert bench.discarder.covered("b").keys() == {"q2"}
    # It is still counted as what only this node has.
    assert [meta.shadow_id async for meta in bench.own.in_order(State.UNSHADOWED)] == [lost]
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "b gets no copy of the message q1" in record.getMessage()


async def test_an_envelope_that_cannot_be_read_is_told_and_stops_no_other_message(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    odd = await bench.alone(b"one")
    good = await bench.alone(b"two")
    await spoil(bench.own, odd, b"{")
    assert (await bench.back_fill.run(bench.link)).copied == 1  # type: ignore[arg-type]
    assert await bench.shadow.find(good) is not None
    assert f"the envelope of {odd} cannot be read" in caplog.text
