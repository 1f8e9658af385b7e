"""A sync that is foretold, between the carrier, the shadow's handler and two that play dsync."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.unit.mailbox.test_carrier import USER, Disk, FakeDoveadm, pair, server
from tests.unit.mailbox.test_foretell import (
    HERE,
    NAMES,
    RENAMED,
    SINGLE,
    THERE,
    WORK,
    from_scratch,
    with_names,
)
from tests.unit.mailbox.test_states import SINGLE as SINGLE_STATE
from tests.unit.mailbox.test_states import WHOLE

from umbra.mailbox import carrier as module
from umbra.mailbox.carrier import DsyncCarrier, DsyncHandler
from umbra.mailbox.doveadm import Outcome, SyncResult
from umbra.mailbox.foretell import LOG, packet
from umbra.mailbox.states import joined


class World:
    """What both play next, and what each of them has seen."""

    def __init__(self) -> None:
        self.name = "store"
        self.there: bytes | None = None  # said instead
        self.before = b""  # said before
        self.patient = False  # dsync here closes only when it is told to
        self.close = asyncio.Event()
        self.answer = asyncio.Event()  # the shadow's dsync may answer
        self.answer.set()
        self.settle = asyncio.Event()  # the shadow's disk has it
        self.settle.set()
        self.got = b""  # by the shadow's dsync
        self.told = b""  # to dsync here
        self.outcome = Outcome.SYNCED
        self.breaks: int | None = None  # dsync here says so much, and closes
        self.single = b""  # dsync here says this instead
        self.doveadm = FakeDoveadm(self.here)

    async def here(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
        """Play dsync here, which after the names says all that it was recorded to say."""
        said = self.single or HERE[self.name]
        names = names_of(said)
        writer.write(said[:names])
        self.told = b""
        while not self.told.endswith((b"F\n", b"X\n")):
            if not (data := await reader.read(65536)):
                return Outcome.FAILED
            self.told += data
            if names and b"\n.\nD" in self.told:
                writer.write(said[names : self.breaks])
                names = 0
                if self.breaks is not None:
                    return Outcome.FAILED
        return self.outcome

    async def shadow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Play the shadow's: but for its names it answers when it has heard all."""
        self.got = b""
        hello = THERE[self.name].index(b"\nH")
        hello = THERE[self.name].index(b"\n", hello + 1) + 1
        said = THERE[self.name] if self.there is None else self.there
        writer.write(self.before + packet(0, said[:hello]))
        told = hello
        while len(self.got) < len(self.single or HERE[self.name]):
            settings, ended, state = self.got.partition(b"\n.\nH")[2].partition(b"\n")
            if told == hello and ended and (b"\ts\t" not in settings or b".\n" in state):
                # It tells its names when it has the state, if there is one.
                told = names_of(said)
                writer.write(packet(0, said[hello:told]))
            if not (data := await reader.read(65536)):
                return
            self.got += data
        await self.answer.wait()
        writer.write(packet(0, said[told:]))

    async def settled(self) -> None:
        await self.settle.wait()


def names_of(said: bytes) -> int:
    """Return where the names and what was deleted end."""
    return said.index(b"\n", said.index(b"\n.\nD") + 3) + 1


@asynccontextmanager
async def both(path: Path, world: World) -> AsyncIterator[DsyncCarrier]:
    async with server(path, world.shadow) as socket:
        handler = DsyncHandler(lambda: False, Disk(world.settled), socket)
        async with pair(path, world.doveadm, handler) as carrier:
            yield carrier


async def sync(carrier: DsyncCarrier, state: str = "state") -> SyncResult:
    return await asyncio.wait_for(carrier.sync(USER, state), 5)


async def learn(carrier: DsyncCarrier) -> None:
    """Let the carrier hear a whole sync: it knows then that both nodes have the same mailboxes."""
    assert (await sync(carrier, "")).outcome is Outcome.SYNCED


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SINGLE])
async def test_the_shadow_is_heard_after_all_is_said(tmp_path: Path, name: str) -> None:
    world = World()
    world.name = name
    async with both(tmp_path, world) as carrier:
        await learn(carrier)
        world.answer.clear()
        for _ in range(2):  # the connection of the first one carries the second
            task = asyncio.create_task(sync(carrier))
            await asyncio.sleep(0.2)
            assert world.got == HERE[name]
            assert world.told.endswith(b"F\n")
            assert not task.done(), "dsync here has ended; the shadow has not said a word"
            world.answer.set()
            assert (await task).outcome is Outcome.SYNCED
            world.answer.clear()
            world.got = world.told = b""


async def test_a_state_counts_when_the_peers_disk_has_it(tmp_path: Path) -> None:
    world = World()
    async with both(tmp_path, world) as carrier:
        await learn(carrier)
        world.settle.clear()
        task = asyncio.create_task(sync(carrier))
        await asyncio.sleep(0.2)
        assert not task.done()
        world.settle.set()
        assert (await task).outcome is Outcome.SYNCED


async def test_another_answer_is_a_surprise_and_heard_next_time(tmp_path: Path) -> None:
    world = World()
    async with both(tmp_path, world) as carrier:
        for number in range(module.SURPRISES):
            await learn(carrier)
            world.there = THERE["store"].replace(b"\nF\n", b"\nF\t\t\n")
            result = await sync(carrier)
            assert (result.outcome, result.state) == (Outcome.SURPRISED, None), number
            assert "foretold" in result.reason
            world.there = None
        # Now for a while all is heard.
        for _ in range(3):
            await learn(carrier)
            world.answer.clear()
            task = asyncio.create_task(sync(carrier))
            await asyncio.sleep(0.1)
            assert b"\nF\n" not in world.told
            world.answer.set()
            assert (await task).outcome is Outcome.SYNCED


async def test_an_error_in_the_peers_log_is_a_surprise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    async with both(tmp_path, world) as carrier:
        await learn(carrier)
        world.before = packet(LOG, b"\3dsync: careful\n")
        with caplog.at_level(logging.WARNING):
            assert (await sync(carrier)).outcome is Outcome.SYNCED
        assert f"dsync of {USER} at mail-b: dsync: careful" in caplog.text
        world.before = packet(LOG, b"\4dsync: broken\n")
        assert (await sync(carrier)).outcome is Outcome.SURPRISED
        assert "broken" in caplog.text


async def test_a_user_who_is_not_there_is_a_surprise_first(tmp_path: Path) -> None:
    world = World()
    async with both(tmp_path, world) as carrier:
        await learn(carrier)
        world.there = b"\n-NOUSER\n"
        assert (await sync(carrier)).outcome is Outcome.SURPRISED


async def test_what_breaks_here_is_none(tmp_path: Path) -> None:
    """The outcome is that of dsync here, and the next sync hears the mailboxes again."""
    world = World()
    async with both(tmp_path, world) as carrier:
        await learn(carrier)
        world.got, world.breaks = b"", -3
        assert (await sync(carrier)).outcome is Outcome.FAILED
        assert world.got == b"", "nothing was for the shadow yet"
        world.breaks = None
        world.answer.clear()
        task = asyncio.create_task(sync(carrier))
        await asyncio.sleep(0.1)
        assert b"\nF\n" not in world.told
        world.answer.set()
        assert (await task).outcome is Outcome.SYNCED


@pytest.mark.parametrize("outcome", [Outcome.CHANGED, Outcome.FAILED])
async def test_dsync_here_has_the_word_on_itself(tmp_path: Path, outcome: Outcome) -> None:
    world = World()
    world.outcome = outcome
    async with both(tmp_path, world) as carrier:
        world.outcome = Outcome.SYNCED
        await learn(carrier)
        world.outcome = outcome
        assert (await sync(carrier)).outcome is outcome


async def test_a_shadow_that_says_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALL_SECONDS", 0.3)
    world = World()
    async with both(tmp_path, world) as carrier:
        await learn(carrier)
        world.answer.clear()
        assert (await sync(carrier)).outcome is Outcome.LOST
        world.answer.set()


async def test_cut_ends_one_that_waits(tmp_path: Path) -> None:
    world = World()
    async with both(tmp_path, world) as carrier:
        await learn(carrier)
        world.answer.clear()
        task = asyncio.create_task(sync(carrier))
        await asyncio.sleep(0.1)
        carrier.cut()
        assert (await task).outcome is Outcome.LOST
        world.answer.set()


async def test_after_a_surprise_the_shadows_end_is_waited_for(tmp_path: Path) -> None:
    """It has all that was sent, and would go on applying it while the next sync comes."""
    world = World()
    async with both(tmp_path, world) as carrier:
        await learn(carrier)
        world.settle.clear()
        world.before = packet(LOG, b"\4Error\n")
        task = asyncio.create_task(sync(carrier))
        await asyncio.sleep(0.2)
        assert not task.done()
        world.settle.set()
        assert (await task).outcome is Outcome.SURPRISED


async def test_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    async with both(tmp_path, world) as carrier:
        await learn(carrier)
        monkeypatch.setattr(module, "LINGER", 0.2)
        world.settle.clear()
        world.before = packet(LOG, b"\4Error\n")
        assert (await sync(carrier)).outcome is Outcome.SURPRISED


async def test_only_the_last_users_mailboxes_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TREES", 1)
    world = World()
    async with both(tmp_path, world) as carrier:
        carrier._trees["b@example.org"] = b"tree"
        await learn(carrier)
        assert set(carrier._trees) == {USER}


@pytest.mark.parametrize("name", SINGLE)
async def test_one_mailbox_after_all_of_them(tmp_path: Path, name: str) -> None:
    world = World()
    world.name = SINGLE[name]
    async with both(tmp_path, world) as carrier:
        assert await carrier.sync_mailbox(USER, WHOLE, "Team/a") is None, "nothing is known yet"
        await learn(carrier)
        world.name = name
        for _ in range(2):  # what is known of the others stays
            world.doveadm.state = SINGLE_STATE
            result = await asyncio.wait_for(carrier.sync_mailbox(USER, WHOLE, "Team/a"), 5)
            assert result == SyncResult(Outcome.SYNCED, joined(WHOLE, SINGLE_STATE), "talk")
            assert world.got == HERE[name]
            world.got = b""
        world.doveadm.state = "nonsense"
        result = await asyncio.wait_for(carrier.sync_mailbox(USER, WHOLE, "Team/a"), 5)
        assert result == SyncResult(Outcome.SYNCED, None, "talk"), "from scratch the next time"
        # Another sync of all is foretold after that.
        world.name = SINGLE[name]
        world.got = b""
        assert (await sync(carrier)).outcome is Outcome.SYNCED
        assert world.got == HERE[world.name]


@pytest.mark.parametrize("name", SINGLE)
async def test_a_mailbox_that_is_not_as_it_was_is_left_to_a_sync_of_all(
    tmp_path: Path, name: str
) -> None:
    world = World()
    world.name = SINGLE[name]
    async with both(tmp_path, world) as carrier:
        await learn(carrier)
        world.got = b""
        # What dsync here says is of all mailboxes, so none of it may get there.
        assert await asyncio.wait_for(carrier.sync_mailbox(USER, WHOLE, "Team/a"), 15) is None
        assert world.got == b""
        assert (await sync(carrier)).outcome is Outcome.SYNCED


@pytest.mark.parametrize("name", SINGLE)
async def test_a_surprise_in_one_mailbox_is_one(tmp_path: Path, name: str) -> None:
    world = World()
    world.name = SINGLE[name]
    async with both(tmp_path, world) as carrier:
        await learn(carrier)
        world.name = name
        world.there = THERE[name].replace(b"\nF\n", b"\nF\t\t\n")
        result = await asyncio.wait_for(carrier.sync_mailbox(USER, WHOLE, "Team/a"), 15)
        assert result is not None
        assert result.outcome is Outcome.SURPRISED
        assert await carrier.sync_mailbox(USER, WHOLE, "Team/a") is None


async def test_a_shadow_does_not_hear_of_a_rename_of_inbox(tmp_path: Path) -> None:
    """dsync would empty the shadow's INBOX, and the state would pass over what was in there."""
    world = World()
    world.single = with_names(HERE["store"], *RENAMED)
    world.doveadm.state = "state"
    async with both(tmp_path, world) as carrier:
        for state in ("state", ""):
            if not state:
                world.single = from_scratch(world.single)
            result = await sync(carrier, state)
            assert (result.outcome, result.state, result.begun) == (Outcome.UNSAFE, None, False)
            assert world.got == world.single[: world.single.index(b"NWork\t")]
        # Where nobody relies on the copy, from scratch is no matter.
        carrier._relied_on = lambda: False
        assert (await sync(carrier, "")).outcome is Outcome.SYNCED
        world.single = with_names(HERE["store"], *RENAMED)
        assert (await sync(carrier)).outcome is Outcome.UNSAFE


async def test_a_mailbox_that_is_in_no_list_is_looked_for_once_more(tmp_path: Path) -> None:
    """Whoever renames it while dsync lists mailboxes hides it from that list."""
    world = World()
    world.doveadm.state = "state"
    async with both(tmp_path, world) as carrier:
        for _ in range(2):
            world.single = with_names(HERE["store"], WORK)
            result = await sync(carrier)
            assert (result.outcome, result.state) == (Outcome.CHANGED, "state")
            world.single = b""
            assert (await sync(carrier)).outcome is Outcome.SYNCED
            carrier.teach(USER, b"")
        world.single = with_names(HERE["store"], WORK)
        assert (await sync(carrier)).outcome is Outcome.CHANGED
        assert (await sync(carrier)).outcome is Outcome.UNSAFE
        assert (await sync(carrier)).outcome is Outcome.CHANGED


async def test_whether_a_sync_that_failed_had_begun(tmp_path: Path) -> None:
    world = World()
    async with both(tmp_path, world) as carrier:
        world.breaks = 0
        result = await sync(carrier)
        assert (result.outcome, result.begun) == (Outcome.FAILED, False)
        world.breaks = -3
        result = await sync(carrier)
        assert (result.outcome, result.begun) == (Outcome.FAILED, True)


async def test_where_one_mailbox_has_nothing_to_say_all_are_synced(tmp_path: Path) -> None:
    """It may have been renamed between dsync's list and its look."""
    world = World()
    world.name = "nothing"
    async with both(tmp_path, world) as carrier:
        await learn(carrier)
        setting = b"mail-a.example.org\t\x02\t\x02\t"
        here = HERE["nothing"].replace(setting, setting[:-2] + b"Work\t")
        assert here != HERE["nothing"]
        world.single = here
        assert await asyncio.wait_for(carrier.sync_mailbox(USER, WHOLE, "Work"), 5) is None
        assert world.got == here
