"""The shadow store: durable, idempotent, bounded, and intact when the disk is full."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import sqlite3
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.transport.support import ENVELOPE, content

from umbra.transport import ids, metrics
from umbra.transport import store as module
from umbra.transport.remaining import Left
from umbra.transport.resubmit import narrow
from umbra.transport.store import ContentError, Meta, ShadowStore, State, StoreError, StoreFull

LARGE = 700_000


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ShadowStore]:
    store = ShadowStore(tmp_path / "shadow")
    await store.open()
    yield store
    await store.close()


async def put(
    store: ShadowStore,
    data: bytes,
    *,
    shadow_id: str = "",
    origin: str = "a",
    queue_id: str = "4abc",
    state: State = State.HELD,
    **envelope: Any,
) -> str:
    shadow_id = shadow_id or ids.new()
    writer = store.begin(
        shadow_id,
        origin=origin,
        queue_id=queue_id,
        envelope=replace(ENVELOPE, **envelope),
        epoch=3,
        state=state,
    )
    for start in range(0, len(data), 65536):
        await writer.write(data[start : start + 65536])
    await writer.commit()
    return shadow_id


async def found(store: ShadowStore, shadow_id: str) -> Meta:
    meta = await store.find(shadow_id)
    assert meta is not None
    return meta


async def read(store: ShadowStore, shadow_id: str) -> bytes:
    return await content(store.content(await found(store, shadow_id)))


def spooled(store: ShadowStore) -> list[str]:
    return os.listdir(store._spool)


@pytest.mark.parametrize("size", [0, 1, 4096, module.ROW_LIMIT, module.ROW_LIMIT + 1, LARGE])
async def test_what_is_stored_can_be_read_after_a_restart(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    first = ShadowStore(tmp_path / "s")
    await first.open()
    shadow_id = await put(first, data)
    await first.close()
    second = ShadowStore(tmp_path / "s")
    await second.open()
    meta = await found(second, shadow_id)
    assert (meta.origin, meta.queue_id, meta.state, meta.epoch) == ("a", "4abc", State.HELD, 3)
    assert meta.envelope == ENVELOPE
    assert meta.size == size
    assert await read(second, shadow_id) == data
    assert len(spooled(second)) == (size > module.ROW_LIMIT)
    await second.close()


@pytest.mark.parametrize("size", [10, LARGE])
async def test_the_same_id_again_is_stored_once(store: ShadowStore, size: int) -> None:
    data = os.urandom(size)
    shadow_id = await put(store, data)
    await put(store, data, shadow_id=shadow_id)
    assert [holding.count for holding in await store.stats()] == [1]
    await put(store, data, shadow_id=shadow_id, origin="c", queue_id="4new")
    meta = await found(store, shadow_id)
    assert (meta.origin, meta.queue_id) == ("c", "4new")
    assert await read(store, shadow_id) == data
    assert len(spooled(store)) == (size > module.ROW_LIMIT)


async def test_two_stores_of_one_id_at_once_do_not_mix(store: ShadowStore) -> None:
    data = os.urandom(LARGE)
    shadow_id = ids.new()
    await asyncio.gather(*(put(store, data, shadow_id=shadow_id) for _ in range(5)))
    assert await read(store, shadow_id) == data
    assert len(spooled(store)) == 1


@pytest.mark.parametrize("size", [10, LARGE])
async def test_what_is_aborted_leaves_nothing(store: ShadowStore, size: int) -> None:
    writer = store.begin(ids.new(), origin="a", queue_id="q", envelope=ENVELOPE, epoch=1)
    await writer.write(bytes(size))
    writer.abort()
    writer.abort()
    await store.close()
    assert spooled(store) == []


async def test_a_task_cancelled_while_it_writes_leaves_nothing(store: ShadowStore) -> None:
    async def write_on() -> None:
        writer = store.begin(ids.new(), origin="a", queue_id="q", envelope=ENVELOPE, epoch=1)
        try:
            while True:
                await writer.write(bytes(300_000))
        finally:
            writer.abort()

    for _ in range(5):
        task = asyncio.create_task(write_on())
        await asyncio.sleep(0.02)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await store.close()
    assert spooled(store) == []


@pytest.mark.parametrize("shadow_id", ["", "../../etc/passwd", "A" * 32, "0" * 31, "0" * 33])
async def test_a_bad_id_never_becomes_a_file_name(store: ShadowStore, shadow_id: str) -> None:
    with pytest.raises(ValueError, match="shadow id"):
        store.begin(shadow_id, origin="a", queue_id="q", envelope=ENVELOPE, epoch=1)


async def test_discard_is_for_the_origin_and_state_that_is_named(store: ShadowStore) -> None:
    mine = await put(store, bytes(10), message_id="<one>")
    large = await put(store, bytes(LARGE))
    others = await put(store, bytes(10), origin="c")
    own = await put(store, bytes(10), state=State.UNSHADOWED)
    gone = await store.discard([mine, large, others, own, ids.new()], origin="a")
    assert {meta.shadow_id for meta in gone} == {mine, large}
    assert gone[0].message_id == "<one>"
    assert await store.find(mine) is None
    assert await store.find(others)
    assert await store.find(own)
    await store.close()
    assert spooled(store) == []


async def test_listing_and_order(store: ShadowStore) -> None:
    made = sorted(ids.new() for _ in range(1201))
    for chunk in range(0, 1201, 200):
        part = made[chunk : chunk + 200]
        await asyncio.gather(
            *(put(store, b"x", shadow_id=item, queue_id=f"q{made.index(item)}") for item in part)
        )
    await put(store, b"x", origin="c")
    pages = [page async for page in store.copies("a")]
    listed = [(copy.shadow_id, copy.queue_id) for page in pages for copy in page]
    assert sorted(listed) == [(item, f"q{index}") for index, item in enumerate(made)]
    assert max(map(len, pages)) <= module.PAGE
    ordered = [meta.shadow_id async for meta in store.in_order(State.HELD, "a")]
    assert ordered == made
    assert len([meta async for meta in store.in_order(State.HELD)]) == 1202


async def test_stats(store: ShadowStore) -> None:
    await put(store, bytes(10))
    await put(store, bytes(20))
    await put(store, bytes(5), state=State.UNSHADOWED)
    rows = {(row.origin, row.state): row for row in await store.stats()}
    assert (rows["a", State.HELD].count, rows["a", State.HELD].bytes) == (2, 30)
    assert rows["a", State.UNSHADOWED].bytes == 5
    assert rows["a", State.HELD].oldest <= rows["a", State.UNSHADOWED].oldest


async def test_the_life_of_a_resubmission(store: ShadowStore) -> None:
    kept = await put(store, b"1", queue_id="q1")
    finished = await put(store, bytes(LARGE), queue_id="q2")
    gone = await store.claim("a", {"q1": Left(("bob@example.com",))}, narrow)
    assert [meta.shadow_id for meta in gone] == [finished]
    assert spooled(store) == []
    assert (await found(store, kept)).state is State.RESUBMITTING
    # A discard of the former primary that comes too late finds nothing.
    assert await store.discard([kept], origin="a") == []
    assert await store.claim("a", None, narrow) == []
    await store.note_queue_id(kept, "4new")
    assert (await found(store, kept)).new_queue_id == "4new"
    await store.keep_unshadowed(await found(store, kept), "4new", origin="b")
    meta = await found(store, kept)
    assert (meta.state, meta.origin, meta.queue_id) == (State.UNSHADOWED, "b", "4new")


async def test_what_was_taken_over_and_not_carried_on_is_given_back(store: ShadowStore) -> None:
    waiting, carried_on = await put(store, b"1", queue_id="q1"), await put(store, b"2")
    await store.claim("a", None, narrow)
    await store.note_queue_id(waiting, "4new")
    await store.keep_unshadowed(await found(store, carried_on), "4two", origin="b")
    assert await store.give_back() == 1
    meta = await found(store, waiting)
    assert (meta.state, meta.origin, meta.queue_id, meta.new_queue_id) == (
        State.HELD, "a", "q1", "",
    )  # fmt: skip
    assert (await found(store, carried_on)).state is State.UNSHADOWED
    assert await store.give_back() == 0


async def test_what_is_to_be_done_for_another_copy_is_told_by_state_and_epoch(
    store: ShadowStore,
) -> None:
    names = {state: await put(store, b"x", state=state) for state in (State.HELD, State.UNSHADOWED)}
    [delivered] = [await put(store, b"x")]
    store._keep = True
    await store.discard([delivered], origin="a")
    epoch = (await found(store, delivered)).epoch
    known = {*names.values(), delivered}
    assert await store.carried_on(dict.fromkeys([*known, ids.new()], epoch)) == known
    # Another primary had it still, after it was finished here.
    assert await store.carried_on(dict.fromkeys(known, epoch + 1)) == known - {delivered}


async def test_copies_for_former_primaries_go_when_all_is_settled(store: ShadowStore) -> None:
    async def held(origin: str, epoch: int) -> str:
        shadow_id = ids.new()
        writer = store.begin(shadow_id, origin=origin, queue_id="q", envelope=ENVELOPE, epoch=epoch)
        await writer.write(b"x")
        await writer.commit()
        return shadow_id

    gone = {await held("a", 3), await held("c", 4)}
    # The primary's own, and one that it does not name.
    kept = [await held("b", 4), await held("a", 2)]
    assert {meta.shadow_id for meta in await store.settle("b", [*gone, *kept[:1]])} == gone
    assert [(await found(store, shadow_id)).state for shadow_id in kept] == [State.HELD] * 2


# -- group commit


async def test_many_that_wait_share_a_commit(store: ShadowStore) -> None:
    before = metrics.COMMITS._value.get()
    await asyncio.gather(*(put(store, bytes(4096)) for _ in range(400)))
    commits = metrics.COMMITS._value.get() - before
    assert [holding.count for holding in await store.stats()] == [400]
    assert commits <= 40


async def test_a_commit_is_synced(tmp_path: Path) -> None:
    # With these two SQLite syncs the WAL once for each commit.
    store = ShadowStore(tmp_path / "s")
    await store.open()
    seen: list[tuple[Any, ...]] = await store._write(
        lambda database: [
            database.execute(f"PRAGMA {name}").fetchone()
            for name in ("journal_mode", "synchronous")
        ]
    )
    assert seen == [("wal",), (2,)]
    await store.close()


async def test_the_loop_turns_while_the_disk_is_slow(store: ShadowStore) -> None:
    gate = threading.Event()
    waiting = asyncio.create_task(store._write(lambda database: gate.wait(5)))
    turns = 0
    storing = asyncio.create_task(put(store, b"x"))
    for _ in range(20):
        await asyncio.sleep(0.005)
        turns += 1
    assert turns == 20
    assert not storing.done()
    # Reading goes on beside it.
    assert await store.stats() == []
    gate.set()
    await waiting
    await storing


async def test_one_bad_job_does_not_take_the_others_down(store: ShadowStore) -> None:
    def fail(database: sqlite3.Connection) -> None:
        database.execute("INSERT INTO message (shadow_id) VALUES (NULL)")

    gate = threading.Event()
    holding = asyncio.create_task(store._write(lambda database: gate.wait(5)))
    await asyncio.sleep(0.02)
    jobs = [asyncio.create_task(put(store, b"x")) for _ in range(3)]
    bad = asyncio.create_task(store._write(fail))
    jobs += [asyncio.create_task(put(store, b"x")) for _ in range(3)]
    await asyncio.sleep(0.02)
    gate.set()
    await holding
    with pytest.raises(StoreError):
        await bad
    await asyncio.gather(*jobs)
    assert [holding.count for holding in await store.stats()] == [6]


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = ShadowStore(tmp_path / "s")
    with pytest.raises(StoreError):
        await store.stats()
    await store.open()
    await store.close()
    with pytest.raises(StoreError):
        await put(store, b"x")


# -- what a disk can do


async def test_a_full_disk_under_the_database(store: ShadowStore) -> None:
    kept = [await put(store, os.urandom(4096)) for _ in range(20)]
    pages = await store._write(lambda database: database.execute("PRAGMA page_count").fetchone()[0])
    await store._write(
        lambda database: database.execute(f"PRAGMA max_page_count = {pages + 10}").fetchone()
    )

    async def fill() -> None:
        for _ in range(100):
            kept.append(await put(store, os.urandom(4096)))

    with pytest.raises(StoreFull):
        await fill()
    held = [meta.shadow_id async for meta in store.in_order(State.HELD)]
    assert held == kept
    # Discards make room again.
    await store.discard(kept[:10], origin="a")
    kept = [*kept[10:], await put(store, b"fits")]
    assert await read(store, kept[-1]) == b"fits"
    assert await store._write(lambda db: db.execute("PRAGMA integrity_check").fetchone()[0]) == "ok"


@pytest.mark.parametrize("size", [10, LARGE])
async def test_new_messages_leave_room_for_deleting(store: ShadowStore, size: int) -> None:
    kept = [await put(store, bytes(10)) for _ in range(5)]
    disk = os.statvfs(store._directory)
    store._reserve = 2 * disk.f_blocks * disk.f_frsize
    with pytest.raises(StoreFull, match="MiB are free"):
        await put(store, bytes(size))
    assert len(await store.discard(kept, origin="a")) == 5
    store._reserve = 0
    await put(store, bytes(size))


async def test_a_full_disk_under_a_file(
    store: ShadowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def full(number: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    writer = store.begin(ids.new(), origin="a", queue_id="q", envelope=ENVELOPE, epoch=1)
    with pytest.raises(StoreFull):
        await writer.write(bytes(LARGE))
    with pytest.raises(StoreFull):
        await writer.commit()
    writer.abort()
    monkeypatch.setattr(os, "write", real)
    shadow_id = await put(store, bytes(LARGE))
    assert len(await read(store, shadow_id)) == LARGE
    assert len(spooled(store)) == 1


async def test_a_failed_sync_is_no_success(
    store: ShadowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(number: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoreError):
        await put(store, bytes(LARGE))
    monkeypatch.undo()
    assert await store.stats() == []


async def test_a_start_removes_files_without_a_message(tmp_path: Path) -> None:
    store = ShadowStore(tmp_path / "s")
    await store.open()
    kept = await put(store, bytes(LARGE))
    await store.close()
    (tmp_path / "s" / "spool" / f"{ids.new()}.0badcafe").write_bytes(b"half")
    store = ShadowStore(tmp_path / "s")
    await store.open()
    assert len(spooled(store)) == 1
    assert len(await read(store, kept)) == LARGE
    await store.close()


async def test_a_damaged_content_is_told_and_not_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ShadowStore(tmp_path / "s")
    await store.open()
    shadow_id = await put(store, bytes(LARGE))
    good = await put(store, b"good")
    await store.close()
    [name] = spooled(store)
    os.truncate(tmp_path / "s" / "spool" / name, 1000)
    store = ShadowStore(tmp_path / "s")
    await store.open()
    assert "damaged" in caplog.text
    with pytest.raises(StoreError, match="1000 bytes"):
        await read(store, shadow_id)
    assert await read(store, good) == b"good"
    await store.close()


async def filled(directory: Path) -> Path:
    """Make a store with fifty messages and close it; return its database."""
    store = ShadowStore(directory)
    await store.open()
    for _ in range(50):
        await put(store, os.urandom(4096))
    await store.close()
    return directory / "shadow.db"


async def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    path = await filled(tmp_path / "s")
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 20] = os.urandom(4096 * 17)
    path.write_bytes(data)
    with pytest.raises(StoreError):
        await ShadowStore(tmp_path / "s").open()


async def test_a_damaged_table_of_messages_is_refused(tmp_path: Path) -> None:
    path = await filled(tmp_path / "s")
    with contextlib.closing(sqlite3.connect(path)) as database:
        (root,) = database.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = 'message'"
        ).fetchone()
    data = bytearray(path.read_bytes())
    data[4096 * (root - 1) : 4096 * root] = os.urandom(4096)
    path.write_bytes(data)
    with pytest.raises(StoreError):
        await ShadowStore(tmp_path / "s").open()


async def test_opening_does_not_read_the_contents(tmp_path: Path) -> None:
    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    store = ShadowStore(tmp_path / "s")
    await store.open()
    for _ in range(160):
        await put(store, bytes(200_000))
    await store.close()
    assert (tmp_path / "s" / "shadow.db").stat().st_size > 30_000_000
    before = read_so_far()
    store = ShadowStore(tmp_path / "s")
    await store.open()
    assert read_so_far() - before < 3_000_000
    await store.close()


# -- memory


async def test_ten_large_streams_fit_in_little_memory(store: ShadowStore) -> None:
    piece = os.urandom(65536)

    async def stream() -> str:
        writer = store.begin(ids.new(), origin="a", queue_id="q", envelope=ENVELOPE, epoch=1)
        for _ in range(800):
            await writer.write(piece)
        await writer.commit()
        return writer._row[0]  # type: ignore[no-any-return]

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    await put(store, piece)
    before = peak()
    made = await asyncio.gather(*(stream() for _ in range(10)))
    size = 0
    async for part in store.content(await found(store, made[0])):
        size += len(part)
    assert size == 800 * 65536
    assert peak() - before < 24 * 1024  # KiB


@pytest.mark.parametrize("fault", ["connect", "settled"])
async def test_a_writer_that_ends_leaves_nobody_waiting_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    store = ShadowStore(tmp_path / "s")
    connect, asked = store._connect, threading.Event()

    def fails(*, write: bool) -> sqlite3.Connection:
        if store._reader is not None and write:
            asked.wait(5)
            raise sqlite3.OperationalError("unable to open database file")
        return connect(write=write)

    def breaks(gone: object) -> None:
        asked.wait(5)
        raise AttributeError("a fault of ours")

    if fault == "connect":
        monkeypatch.setattr(store, "_connect", fails)
    await store.open()
    watching = asyncio.create_task(store.watch())
    monkeypatch.setattr(store, "_unlink", breaks)
    waiting = [asyncio.create_task(store.discard([], origin="a")) for _ in range(3)]
    await asyncio.sleep(0.05)
    asked.set()
    async with asyncio.timeout(5):
        found = await asyncio.gather(*waiting, watching, return_exceptions=True)
    assert [type(error) for error in found] == [StoreError] * 4
    with pytest.raises(StoreError):
        await store.discard([], origin="a")
    await store.close()


BAD = {
    "no JSON": b"{" + ENVELOPE.to_json().encode()[2:],
    "no UTF-8": ENVELOPE.to_json().encode().replace(b"bob@", b"b\xefb@"),
    "no envelope": ENVELOPE.to_json().encode().replace(b"bob@", b"b\\u0001b@"),
    "no recipients": ENVELOPE.to_json().encode().replace(b'"NOTIFY', b'5,"NOTIFY'),
    "other recipients": b'{"recipients": ["bob@example.com", [], 5]}',
}


async def spoil(store: ShadowStore, shadow_id: str, envelope: bytes) -> None:
    await store._write(
        lambda database: (
            database.execute(
                "UPDATE message SET envelope = CAST(? AS TEXT) WHERE shadow_id = ?",
                (envelope, shadow_id),
            ).rowcount
        )
    )


@pytest.mark.parametrize("bad", list(BAD))
async def test_an_envelope_that_cannot_be_read_stops_no_other_message(
    tmp_path: Path, bad: str
) -> None:
    """And is hidden from nobody who could do something about it."""
    store = ShadowStore(tmp_path / "shadow", keep=True)
    await store.open()
    odd, good = [await put(store, b"x", queue_id=f"4{number}") for number in range(2)]
    await spoil(store, odd, BAD[bad])
    await store.hold([odd, good], True, origin="a")
    [page] = [page async for page in store.copies("a")]
    assert {(copy.shadow_id, copy.held) for copy in page} == {(odd, False), (good, True)}
    meta = await found(store, odd)
    assert (meta.queue_id, meta.message_id if bad == "no JSON" else "") == ("40", "")
    with pytest.raises(ContentError, match=f"the envelope of {odd} cannot be read"):
        _ = meta.envelope

    left = Left(("bob@example.com",))
    assert await store.claim("a", {"40": left, "41": left}, narrow) == []
    names = [meta.shadow_id async for meta in store.in_order(State.RESUBMITTING)]
    assert names == [odd, good]
    await store.park(odd)
    assert [meta.shadow_id async for meta in store.in_order(State.PARKED)] == [odd]
    await store.unpark()
    await store.keep_unshadowed(await found(store, odd), "4new", origin="b")
    assert (await found(store, odd)).queue_id == "4new"

    for name, origin, state in ((odd, "b", State.UNSHADOWED), (good, "a", State.RESUBMITTING)):
        assert len(await store.discard([name], origin=origin, state=state)) == 1
    everything = [item async for item in store.delivered(["bob@example.com"], "0", "g")]
    assert good in {item.shadow_id for item in everything}
    if bad in ("no JSON", "no recipients"):
        assert odd in {item.shadow_id for item in everything}
    assert "bob@example.com" in await store.recipients("0", "g")
    assert [item.shadow_id async for item in store.kept({"4new"})] == [odd]
    assert await store.purge(1e12, 0, 10) == 2
    await store.close()
