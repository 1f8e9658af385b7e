"""What other shadows hold for former primaries: finished, or carried on by the new primary."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.unit.transport.support import ENVELOPE, LONG, FakeLink, content

from umbra.peer.exchange import PeerError
from umbra.transport import ids
from umbra.transport.envelope import Envelope
from umbra.transport.resubmit import narrow
from umbra.transport.service import ShadowService
from umbra.transport.settle import Settlement
from umbra.transport.store import ShadowStore, State, StoreError

HOLD = 3600.0


@dataclass
class Bench:
    """b, which has taken over from a, and its shadow c."""

    own: ShadowStore
    there: ShadowStore
    link: FakeLink
    settlement: Settlement
    serving: bool = True
    told: int = 0

    async def run(self, since: int = 1) -> None:
        await self.settlement.run(self.link, since)  # type: ignore[arg-type]

    async def resubmitting(self) -> list[str]:
        return [meta.shadow_id async for meta in self.own.in_order(State.RESUBMITTING)]

    async def held(self) -> list[str]:
        return [meta.shadow_id async for meta in self.there.in_order(State.HELD)]

    def resubmit(self) -> None:
        self.told += 1


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    own, there = (
        ShadowStore(tmp_path / "own", keep=True),
        ShadowStore(tmp_path / "there", keep=True),
    )
    await own.open()
    await there.open()
    service = ShadowService(there, lambda: 3, lambda node: node == "b")
    bench: Bench
    settlement = Settlement(own, HOLD, lambda: bench.serving, lambda: bench.resubmit())
    bench = Bench(own, there, FakeLink("c", service.handlers(), caller="b"), settlement)
    yield bench
    await own.close()
    await there.close()


async def put(
    store: ShadowStore,
    shadow_id: str = "",
    *,
    data: bytes = b"x",
    envelope: Envelope = ENVELOPE,
    **row: Any,
) -> str:
    shadow_id = shadow_id or ids.new()
    row = {"origin": "a", "queue_id": "4abc", "epoch": 1, **row}
    writer = store.begin(shadow_id, envelope=envelope, **row)
    await writer.write(data)
    await writer.commit()
    return shadow_id


async def test_what_is_finished_here_or_carried_on_goes_there(bench: Bench) -> None:
    delivered = await put(bench.own)
    await bench.own.discard([delivered], origin="a")
    queued = await put(bench.own, origin="b", state=State.UNSHADOWED)
    for shadow_id in (delivered, queued):
        await put(bench.there, shadow_id)
    own = await put(bench.there, origin="b")
    await bench.run()
    assert await bench.held() == [own]
    assert (await bench.resubmitting(), bench.told) == ([], 0)


@pytest.mark.parametrize("origin", ["a", "gone from the group"])
@pytest.mark.parametrize(
    ("data", "envelope"), [(b"x", ENVELOPE), (os.urandom(700_000), ENVELOPE), (b"", LONG)]
)
async def test_what_is_unknown_here_is_fetched_and_carried_on(
    bench: Bench, origin: str, data: bytes, envelope: Envelope
) -> None:
    lost = await put(bench.there, origin=origin, data=data, envelope=envelope)
    await bench.run()
    assert (await bench.resubmitting(), bench.told) == ([lost], 1)
    meta = await bench.own.find(lost)
    assert meta is not None
    assert (meta.origin, meta.queue_id, meta.epoch, meta.envelope) == (origin, "4abc", 1, envelope)
    assert await content(bench.own.content(meta)) == data
    # Two nodes have it until it is carried on.
    assert await bench.held() == [lost]
    await bench.own.discard([lost], origin=origin, state=State.RESUBMITTING, delivered=False)
    await bench.run()
    assert (await bench.held(), bench.told) == ([], 1)


async def test_what_another_primary_had_still_is_not_finished_here(bench: Bench) -> None:
    """Its own safety net has it since its own term, and somebody promoted it by force."""
    lost = await put(bench.own, origin="b", state=State.UNSHADOWED)
    await bench.own.discard([lost], origin="b", state=State.UNSHADOWED)
    await put(bench.there, lost, epoch=2)
    await bench.run()
    assert await bench.resubmitting() == [lost]


async def test_who_has_not_given_back_yet_what_it_had_taken_over_is_asked_again(
    bench: Bench,
) -> None:
    shadow_id = await put(bench.there)
    await bench.there.claim("a", None, lambda envelope, left: envelope)
    with pytest.raises(PeerError, match="not given back yet"):
        await bench.run()
    assert await bench.resubmitting() == []
    await bench.there.give_back()
    await bench.run()
    assert await bench.resubmitting() == [shadow_id]


async def test_a_copy_of_what_was_set_aside_here_stays(bench: Bench) -> None:
    shadow_id = await put(bench.there)
    await put(bench.own, shadow_id, state=State.RESUBMITTING)
    await bench.own.park(shadow_id)
    await bench.run()
    assert await bench.held() == [shadow_id]
    assert await bench.resubmitting() == []


@pytest.mark.parametrize(("since", "fetched"), [(1, False), (2, True)], ids=["whole", "by force"])
async def test_what_is_older_than_the_memory_was_finished_unless_it_never_came_here(
    bench: Bench, since: int, fetched: bool
) -> None:
    old = f"{1:032x}"
    await put(bench.there, old)
    await bench.run(since)
    assert await bench.resubmitting() == [old] * fetched
    assert await bench.held() == [old] * fetched


async def test_what_cannot_be_read_stays_there_and_stops_no_other(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = await put(bench.there, data=os.urandom(700_000))
    for path in (tmp_path / "there" / "spool").iterdir():
        path.unlink()
    other = await put(bench.there)
    await bench.run()
    assert await bench.resubmitting() == [other]
    assert await bench.held() == [lost, other]
    assert f"{lost} of c stays held there" in caplog.text


async def test_who_is_not_primary_any_more_gives_back_what_was_fetched(bench: Bench) -> None:
    lost = await put(bench.there)
    bench.serving = False
    with pytest.raises(StoreError, match="not primary any more"):
        await bench.run()
    meta = await bench.own.find(lost)
    assert meta is not None
    assert (meta.state, meta.origin) == (State.HELD, "a")


async def test_an_agent_that_cannot_tell_keeps_what_it_has(bench: Bench) -> None:
    await put(bench.there)
    for op in ("shadow-left", "shadow-fetch"):
        del bench.link.handlers[op]  # type: ignore[attr-defined]
    with pytest.raises(PeerError, match="unknown operation"):
        await bench.run()
    # And this one, if it is asked by such an agent.
    await bench.link.request("shadow-settled", {"since": 0}, timeout=5)
    assert len(await bench.held()) == 1


async def test_what_is_fetched_is_this_node_s_as_what_it_had_held(bench: Bench) -> None:
    """Also over a change of primary: it is claimed as anything else then."""
    lost = await put(bench.there)
    await bench.run()
    await bench.own.give_back()
    bench.settlement.forget()
    await bench.own.claim("a", None, narrow)
    assert await bench.resubmitting() == [lost]
