"""Discard: never early, never forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Set
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.transport.support import ENVELOPE, FakeLink

from umbra.node.helper import HelperError
from umbra.peer.exchange import PeerError
from umbra.transport import discard as module
from umbra.transport import ids
from umbra.transport.discard import Copies, Discarder, Listing, LocalHolder, PeerHolder, Reconciled
from umbra.transport.service import ShadowService
from umbra.transport.store import ShadowStore, State, StoreFull


class Queue:
    """The queue as the helper lists it; ``during`` happens while a listing runs."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.on_hold: set[str] = set()
        self.during: Any = None
        self.error = False
        self.listings = 0

    async def __call__(self) -> dict[str, str]:
        self.listings += 1
        if self.error:
            raise HelperError("cannot read the queue")
        seen = {key: "hold" if key in self.on_hold else "active" for key in self.files}
        if self.during:
            self.during()
        return seen


@pytest.fixture
async def shadow(tmp_path: Path) -> AsyncIterator[ShadowStore]:
    store = ShadowStore(tmp_path / "shadow")
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def link(shadow: ShadowStore) -> FakeLink:
    return FakeLink("b", ShadowService(shadow, lambda: 1, lambda node: True).handlers())


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture
def discarder(link: FakeLink, queue: Queue) -> Discarder:
    return Discarder([PeerHolder(link)], queue, interval=0.01)  # type: ignore[arg-type]


async def held(store: ShadowStore, queue_id: str, *, origin: str = "a") -> str:
    shadow_id = ids.new()
    writer = store.begin(shadow_id, origin=origin, queue_id=queue_id, envelope=ENVELOPE, epoch=1)
    await writer.write(b"x")
    await writer.commit()
    return shadow_id


async def left(store: ShadowStore, state: State = State.HELD) -> list[str]:
    return [meta.queue_id async for meta in store.in_order(state)]


async def test_a_copy_goes_after_two_listings_without_its_file(
    shadow: ShadowStore, queue: Queue, discarder: Discarder
) -> None:
    queue.files = {"q1", "q2"}
    for queue_id in ("q1", "q2"):
        discarder.add("b", queue_id, await held(shadow, queue_id))
    for _ in range(3):
        await discarder.discard()
    assert await left(shadow) == ["q1", "q2"]
    queue.files = {"q2"}
    await discarder.discard()
    assert await left(shadow) == ["q1", "q2"]
    await discarder.discard()
    assert await left(shadow) == ["q2"]
    assert discarder.counts()["b"] == 1


async def test_what_is_to_be_carried_on_here_keeps_its_copies(
    tmp_path: Path, shadow: ShadowStore, link: FakeLink, queue: Queue
) -> None:
    """The queue file of a try that was refused is gone, and the message is not delivered."""
    own = ShadowStore(tmp_path / "own")
    await own.open()
    discarder = Discarder([PeerHolder(link)], queue, needed=own.to_carry_on)  # type: ignore[arg-type]
    shadow_id, delivered = await held(shadow, "q1"), await held(shadow, "q2")
    writer = own.begin(shadow_id, origin="c", queue_id="q0", envelope=ENVELOPE, epoch=1)
    await writer.commit()
    await own.claim("c", None, lambda envelope, left: envelope)
    discarder.add("b", "q1", shadow_id)
    discarder.add("b", "q2", delivered)
    for _ in range(4):
        await discarder.discard()
    assert await left(shadow) == ["q1"]
    await own.park(shadow_id)
    for _ in range(2):
        await discarder.discard()
    assert await left(shadow) == ["q1"]
    await own.discard([shadow_id], origin="c", state=State.PARKED)
    for _ in range(2):
        await discarder.discard()
    assert await left(shadow) == []
    await own.close()


async def test_an_own_store_that_cannot_be_read_keeps_all(
    shadow: ShadowStore, link: FakeLink, queue: Queue
) -> None:
    async def fails(shadow_ids: Set[str]) -> Set[str]:
        raise StoreFull("no space left")

    discarder = Discarder([PeerHolder(link)], queue, needed=fails)  # type: ignore[arg-type]
    discarder.add("b", "q1", await held(shadow, "q1"))
    for _ in range(4):
        await discarder.discard()
    assert await left(shadow) == ["q1"]


async def on_hold(store: ShadowStore) -> list[str]:
    return [meta.queue_id async for meta in store.in_order(State.HELD) if meta.envelope.held]


async def test_a_shadow_knows_what_is_on_hold(
    shadow: ShadowStore, link: FakeLink, queue: Queue, discarder: Discarder
) -> None:
    """``postsuper -h``, ``-H``: after a failover nobody else could tell it."""
    queue.files = {"q1", "q2", "q3"}
    for queue_id in sorted(queue.files):
        discarder.add("b", queue_id, await held(shadow, queue_id))
    await discarder.discard()
    assert link.ops == []
    queue.on_hold = {"q1", "q2"}
    for _ in range(3):
        await discarder.discard()
    assert link.ops == ["shadow-hold"], "it is told once"
    assert await on_hold(shadow) == ["q1", "q2"]
    queue.on_hold = {"q2"}
    await discarder.discard()
    assert await on_hold(shadow) == ["q2"]
    # A listing that misses a file says nothing of it.
    queue.files = {"q1", "q3"}
    await discarder.discard()
    assert await on_hold(shadow) == ["q2"]


async def test_what_is_on_hold_is_told_again_where_that_was_not_heard(
    shadow: ShadowStore, link: FakeLink, queue: Queue, discarder: Discarder
) -> None:
    queue.files = queue.on_hold = {"q1"}
    shadow_id = await held(shadow, "q1")
    discarder.add("b", "q1", shadow_id)
    link.fail = lambda op: PeerError("unreachable", "gone")
    await discarder.discard()
    assert await on_hold(shadow) == []
    link.fail = lambda op: None
    await discarder.discard()
    assert await on_hold(shadow) == ["q1"]
    # Stored once more, by a catch-up: as not on hold.
    writer = shadow.begin(shadow_id, origin="a", queue_id="q1", envelope=ENVELOPE, epoch=1)
    await writer.commit()
    discarder.add("b", "q1", shadow_id)
    await discarder.discard()
    assert await on_hold(shadow) == ["q1"]


async def test_an_agent_that_starts_learns_what_the_shadow_takes_to_be_on_hold(
    shadow: ShadowStore, link: FakeLink, queue: Queue, discarder: Discarder
) -> None:
    queue.files = {"q1", "q2"}
    ids_ = [await held(shadow, queue_id) for queue_id in ("q1", "q2")]
    await shadow.hold(ids_, True, origin="a")
    queue.on_hold = {"q2"}  # q1 was released while the agent was dead
    await discarder.reconcile("b")
    await discarder.discard()
    assert link.ops == ["shadow-list", "shadow-hold"]
    assert await on_hold(shadow) == ["q2"]


async def test_what_is_still_on_its_way_to_a_shadow_is_told_again(
    shadow: ShadowStore, link: FakeLink, queue: Queue, discarder: Discarder
) -> None:
    queue.files = queue.on_hold = {"q1"}
    shadow_id = ids.new()
    discarder.add("b", "q1", shadow_id, sure=False)
    await discarder.discard()
    writer = shadow.begin(shadow_id, origin="a", queue_id="q1", envelope=ENVELOPE, epoch=1)
    await writer.commit()
    await discarder.discard()
    assert await on_hold(shadow) == ["q1"]
    await discarder.discard()
    assert link.ops == ["shadow-hold"] * 2


async def test_an_agent_of_before_is_not_told_each_second(
    shadow: ShadowStore, link: FakeLink, queue: Queue, discarder: Discarder
) -> None:
    queue.files = queue.on_hold = {"q1"}
    discarder.add("b", "q1", await held(shadow, "q1"))
    link.fail = lambda op: PeerError("refused", "unknown operation 'shadow-hold'")
    for _ in range(3):
        await discarder.discard()
    assert link.ops == ["shadow-hold"]
    link.fail = lambda op: None
    await discarder.reconcile("b")
    await discarder.discard()
    assert await on_hold(shadow) == ["q1"]


async def test_who_is_no_primary_tells_nobody_what_is_on_hold(
    shadow: ShadowStore, link: FakeLink, queue: Queue
) -> None:
    discarder = Discarder([PeerHolder(link)], queue, acts=lambda: False)  # type: ignore[arg-type]
    queue.files = queue.on_hold = {"q1"}
    discarder.add("b", "q1", await held(shadow, "q1"))
    for _ in range(2):
        await discarder.discard()
    assert link.ops == []


async def test_only_its_own_messages_are_put_on_hold_by_a_node(
    shadow: ShadowStore, link: FakeLink
) -> None:
    """The link's peer is node a."""
    mine, anothers = await held(shadow, "q1"), await held(shadow, "q9", origin="c")
    args = {"shadow_ids": [mine, anothers, ids.new()], "held": True}
    await link.request("shadow-hold", args, timeout=1)
    assert await on_hold(shadow) == ["q1"]


class Files:
    """The ids that queue files bear; ``unread`` cannot be told yet."""

    def __init__(self, **names: str) -> None:
        self.names = names
        self.unread: set[str] = set()
        self.asked: list[str] = []

    async def __call__(self, queue_ids: Set[str]) -> Mapping[str, str]:
        self.asked += queue_ids
        return {key: self.names.get(key, "") for key in queue_ids - self.unread}


async def test_a_message_that_was_requeued_keeps_its_copy(
    shadow: ShadowStore, queue: Queue, discarder: Discarder
) -> None:
    """``postsuper -r``: a new file, which no milter is asked about."""
    one, two = await held(shadow, "q1"), await held(shadow, "q2")
    discarder.add("b", "q1", one)
    discarder.add("b", "q2", two)
    # q0 was there before; q3 is from elsewhere.
    files = discarder._names = Files(q9=one)
    queue.files = {"q0", "q1", "q2"}
    await discarder.discard()
    queue.files = {"q0", "q3", "q9"}
    for _ in range(4):
        await discarder.discard()
    assert await left(shadow) == ["q1"]
    assert discarder.known() == {"q9": one}
    assert discarder.covered("b") == {}, "a handover knows it by the old name"
    assert "q0" not in files.asked
    queue.files = {"q0", "q3"}
    for _ in range(2):
        await discarder.discard()
    assert await left(shadow) == []


async def test_no_copy_goes_before_newer_files_were_looked_into(
    shadow: ShadowStore, queue: Queue, discarder: Discarder
) -> None:
    one = await held(shadow, "q1")
    discarder.add("b", "q1", one)
    files = discarder._names = Files(q9=one)
    files.unread = {"q9"}
    queue.files = {"q9"}
    for _ in range(5):
        await discarder.discard()
    assert await left(shadow) == ["q1"]
    files.unread = set()
    await discarder.discard()
    assert discarder.known() == {"q9": one}
    files.names = {}
    discarder.add("b", "q8", await held(shadow, "q8"))
    for _ in range(3):
        await discarder.discard()
    assert await left(shadow) == ["q1"]


async def test_a_file_that_one_listing_missed_keeps_its_copy(
    shadow: ShadowStore, queue: Queue, discarder: Discarder
) -> None:
    discarder.add("b", "q1", await held(shadow, "q1"))
    for files in ({"q1"}, set(), {"q1"}, set(), {"q1"}):
        queue.files = files
        await discarder.discard()
    assert await left(shadow) == ["q1"]


async def test_a_copy_made_while_a_listing_runs_is_not_judged_by_it(
    shadow: ShadowStore, queue: Queue, discarder: Discarder
) -> None:
    discarder.add("b", "q1", await held(shadow, "q1"))
    second = await held(shadow, "q2")
    # The listing has passed incoming when the message comes; both listings before the next do not
    # know it.
    queue.during = lambda: discarder.add("b", "q2", second)
    await discarder.discard()
    queue.during = None
    await discarder.discard()
    assert await left(shadow) == ["q2"]
    await discarder.discard()
    assert await left(shadow) == []


async def test_a_message_that_is_on_its_way_while_a_holder_is_asked_is_not_lost(
    discarder: Discarder, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = ids.new()
    discarder.add("b", "q1", name, sure=False)

    async def listing() -> Listing:
        discarder.add("b", "q1", name, sure=True)  # the answer to the message overtakes this one
        return Listing({}, set())

    monkeypatch.setattr(discarder._holders["b"], "listing", listing)
    assert await discarder.reconcile("b") == Reconciled(0, [])
    assert discarder.covered("b") == {"q1": name}


async def test_a_listing_that_fails_judges_nothing(
    shadow: ShadowStore, queue: Queue, discarder: Discarder
) -> None:
    discarder.add("b", "q1", await held(shadow, "q1"))
    queue.error = True
    for _ in range(3):
        await discarder.discard()
    assert await left(shadow) == ["q1"]


async def test_nothing_outstanding_lists_nothing(queue: Queue, discarder: Discarder) -> None:
    await discarder.discard()
    assert queue.listings == 0


async def test_a_shadow_that_is_away_is_told_later(
    shadow: ShadowStore, link: FakeLink, queue: Queue, discarder: Discarder
) -> None:
    discarder.add("b", "q1", await held(shadow, "q1"))
    link.fail = lambda op: PeerError("unreachable", "gone")
    for _ in range(4):
        await discarder.discard()
    assert discarder.counts()["b"] == 1
    link.fail = lambda op: None
    await discarder.discard()
    assert discarder.counts()["b"] == 0
    assert await left(shadow) == []


async def test_discards_go_in_batches(
    shadow: ShadowStore, link: FakeLink, queue: Queue, discarder: Discarder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "BATCH", 4)
    for number in range(10):
        discarder.add("b", f"q{number}", await held(shadow, f"q{number}"))
    for _ in range(2):
        await discarder.discard()
    assert link.ops == ["shadow-discard"] * 3
    assert await left(shadow) == []


async def test_after_a_restart_the_lists_are_compared(
    shadow: ShadowStore, queue: Queue, discarder: Discarder
) -> None:
    queue.files = {"q1", "q3"}
    for queue_id in ("q1", "q2"):
        await held(shadow, queue_id)
    await held(shadow, "q9", origin="c")
    discarder.add("b", "q3", ids.new())  # which b has lost
    assert await discarder.reconcile("b") == Reconciled(2, ["q3"])
    for _ in range(2):
        await discarder.discard()
    assert await left(shadow) == ["q1", "q9"]
    assert discarder.counts()["b"] == 1


async def test_what_only_may_have_arrived_is_not_missed(
    shadow: ShadowStore, queue: Queue, discarder: Discarder
) -> None:
    discarder.add("b", "q1", ids.new(), sure=False)
    assert await discarder.reconcile("b") == Reconciled(0, [])
    assert discarder.covered("b").keys() == set()


async def test_what_may_have_arrived_and_did_is_covered(
    shadow: ShadowStore, discarder: Discarder
) -> None:
    discarder.add("b", "q1", await held(shadow, "q1"), sure=False)
    discarder.add("b", "q2", await held(shadow, "q2"))
    assert discarder.covered("b").keys() == {"q2"}
    await discarder.reconcile("b")
    assert discarder.covered("b").keys() == {"q1", "q2"}


async def test_what_arrives_after_its_discard_is_found(
    shadow: ShadowStore, discarder: Discarder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that was given up here and lay in the network, or in a frozen process, until then."""
    monkeypatch.setattr(module, "DOUBT_INTERVAL", 0.05)
    discarder.add("b", "q1", ids.new(), sure=False)
    running = asyncio.create_task(discarder.run())
    for _ in range(500):
        if not discarder.counts()["b"]:
            break
        await asyncio.sleep(0.01)
    await held(shadow, "q1")
    for _ in range(500):
        if not await left(shadow):
            break
        await asyncio.sleep(0.01)
    assert await left(shadow) == []
    running.cancel()


async def test_a_list_of_many_pages_is_compared(shadow: ShadowStore, discarder: Discarder) -> None:
    await asyncio.gather(*(held(shadow, f"q{number}") for number in range(1100)))
    assert (await discarder.reconcile("b")).held == 1100
    assert discarder.counts()["b"] == 1100


async def test_copies_here_are_dropped_with_their_messages(tmp_path: Path, queue: Queue) -> None:
    own = ShadowStore(tmp_path / "own")
    await own.open()
    discarder = Discarder([LocalHolder(own, "a")], queue)
    writer = own.begin(
        ids.new(), origin="a", queue_id="q1", envelope=ENVELOPE, epoch=1, state=State.UNSHADOWED
    )
    await writer.commit()
    # As after a restart: known from the store alone.
    assert (await discarder.reconcile("a")).held == 1
    queue.files = {"q1"}
    await discarder.discard()
    await discarder.discard()
    assert await left(own, State.UNSHADOWED) == ["q1"]
    queue.files = set()
    await discarder.discard()
    await discarder.discard()
    assert await left(own, State.UNSHADOWED) == []
    await own.close()


async def test_a_former_primary_discards_nothing(
    shadow: ShadowStore, queue: Queue, discarder: Discarder
) -> None:
    discarder.add("b", "q1", await held(shadow, "q1"))
    discarder.forget()
    for _ in range(3):
        await discarder.discard()
    assert await left(shadow) == ["q1"]


@pytest.mark.parametrize(
    "args", [{}, {"shadow_ids": "x"}, {"shadow_ids": ["x"]}, {"shadow_ids": [1]}]
)
async def test_the_shadow_checks_what_it_is_told(link: FakeLink, args: dict[str, Any]) -> None:
    for op in ("shadow-discard", "shadow-hold"):
        with pytest.raises(PeerError) as caught:
            await link.request(op, {"held": True, **args}, timeout=1)
        assert caught.value.code == "protocol"


# -- the race between a listing and Postfix's renames, as a model

FLOW = ("incoming", "active", "deferred", "hold", "corrupt")


def seen(moves: list[tuple[int, int]], start: int) -> bool:
    """Whether a listing in the order of FLOW sees a file in ``start`` that moves at the given times
    to the given places.

    Directory d is read at time 2d+1 to 2d+2; a file seen there must be there all that time.
    """
    for directory in range(len(FLOW)):
        place, there = start, True
        for time, target in moves:
            if time <= 2 * directory + 1:
                place = target
            elif time < 2 * directory + 2:
                there = there and place != directory  # moved while it was read: may be missed
                place = target
        if place == directory and there:
            return True
    return False


@settings(deadline=None)
@given(
    st.integers(0, 4),
    st.lists(st.tuples(st.integers(0, 10), st.integers(0, 4)), max_size=4).map(
        lambda moves: sorted(moves, key=lambda move: move[0])
    ),
)
def test_a_file_that_moves_with_the_flow_is_always_seen(
    start: int, moves: list[tuple[int, int]]
) -> None:
    places = [start, *(target for _, target in moves)]
    forward = all(before <= after for before, after in pairwise(places))
    times = [time for time, _ in moves]
    if forward and len(set(times)) == len(times):
        assert seen(moves, start)


def test_the_model_knows_that_a_move_against_the_flow_can_be_missed() -> None:
    # From deferred to active, after active was read and before deferred is.
    assert not seen([(4, 1)], 2)


@settings(deadline=None)
@given(st.lists(st.sets(st.sampled_from(["q1", "q2", "q3"])), min_size=1, max_size=8))
def test_judging_is_absence_twice_in_a_row(listings: list[set[str]]) -> None:
    copies = Copies()
    for queue_id in ("q1", "q2", "q3"):
        copies.add(queue_id, queue_id, sure=True)
    alive = {"q1", "q2", "q3"}
    before: set[str] | None = None
    for present in listings:
        copies.begin_listing()
        ripe = copies.judge(present)
        expected = set() if before is None else {q for q in alive if q not in present | before}
        assert set(ripe) == expected
        copies.remove(ripe)
        alive -= expected
        before = present
    assert set(copies.known()) == alive


async def test_a_full_disk_of_the_shadow_is_told_as_such(
    shadow: ShadowStore, link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object, **__: object) -> None:
        raise StoreFull("no room")

    monkeypatch.setattr(shadow, "discard", full)
    with pytest.raises(PeerError) as caught:
        await link.request("shadow-discard", {"shadow_ids": [ids.new()]}, timeout=5)
    assert caught.value.code == "store-full"


async def test_what_shadows_have_is_the_primarys_to_judge(
    link: FakeLink, shadow: ShadowStore, queue: Queue, tmp_path: Path
) -> None:
    """A former primary's queue files go when an administrator deletes them; the copies stay."""
    own = ShadowStore(tmp_path / "own")
    await own.open()
    acts = False
    discarder = Discarder(
        [LocalHolder(own, "a"), PeerHolder(link)],  # type: ignore[arg-type]
        queue,
        acts=lambda: acts,
    )
    shadow_id = await held(shadow, "q1")
    discarder.add("b", "q1", shadow_id)
    for _ in range(3):
        await discarder.discard()
    assert await left(shadow) == ["q1"]
    acts = True
    for _ in range(3):
        await discarder.discard()
    assert await left(shadow) == []
    await own.close()


def test_a_copy_that_was_in_doubt_is_sure_once_it_was_made() -> None:
    copies = Copies()
    copies.add("q1", "s1", sure=False)
    assert copies.sure() == {}
    copies.add("q1", "s1", sure=True)
    assert copies.sure() == {"q1": "s1"}


async def test_the_copy_of_a_retry_outlives_the_file_of_the_try_that_failed(
    shadow: ShadowStore, link: FakeLink, queue: Queue, discarder: Discarder
) -> None:
    shadow_id = await held(shadow, "q1")
    discarder.add("b", "q1", shadow_id)
    discarder.refused("q1")
    await discarder.discard()
    queue.files = {"q2"}
    writer = shadow.begin(shadow_id, origin="a", queue_id="q2", envelope=ENVELOPE, epoch=1)
    await writer.commit()
    discarder.add("b", "q2", shadow_id)
    for _ in range(3):
        await discarder.discard()
    assert "shadow-discard" not in link.ops
    assert discarder.covered("b") == {"q2": shadow_id}
    assert await discarder.reconcile("b") == Reconciled(1, [])
    queue.files = set()
    for _ in range(2):
        await discarder.discard()
    assert discarder.counts()["b"] == 0


async def test_a_retry_that_comes_while_its_copy_is_discarded_is_not_sure_of_it(
    shadow: ShadowStore, link: FakeLink, queue: Queue, discarder: Discarder
) -> None:
    shadow_id = await held(shadow, "q1")
    discarder.add("b", "q1", shadow_id)
    await discarder.discard()
    link.fail = lambda op: discarder.add("b", "q2", shadow_id)
    await discarder.discard()
    assert link.ops == ["shadow-discard"]
    assert discarder.covered("b") == {}
    assert discarder._doubt


async def test_what_the_comparison_now_and_then_misses_is_told(
    shadow: ShadowStore,
    queue: Queue,
    discarder: Discarder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "RECONCILE_INTERVAL", 0.01)
    queue.files = {"q1"}
    discarder.add("b", "q1", ids.new())
    task = asyncio.create_task(discarder.run())
    async with asyncio.timeout(5):
        while "b has lost 1 shadow messages: q1" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
