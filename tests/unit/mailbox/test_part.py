"""The mirror as a part: what a switchover waits for when the ports are closed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.unit.transport.support import FakeLink
from tests.unit.transport.test_part import RAW

from umbra import config
from umbra.cluster.group import Group, Work
from umbra.cluster.machine import NotNow
from umbra.cluster.state import Phase as GroupPhase
from umbra.mailbox import part
from umbra.mailbox.doveadm import Outcome, SyncResult
from umbra.mailbox.mirror import Phase
from umbra.mailbox.part import Mailboxes
from umbra.node.client import NodeHelper
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.identity import PeerIdentity

USER = "a@example.org"
LINE = b'{"fields":{"user":"%s"}}\n' % USER.encode()


@dataclass
class Paths:
    state: Path
    run: Path
    dsync: Path
    token: Path
    missed: Path
    events: Path


class PlayedGroup:
    """A primary that is about to hand over to ``b``; ``c``, if there is one, is away."""

    def __init__(self, names: str) -> None:
        self.links = {name: FakeLink(name, {}) for name in names}
        self.changes = Work()
        self.state = SimpleNamespace(phase=GroupPhase.DRAINING)
        self.primary = True
        self.degraded = False
        self.was_merged = False

    def is_primary(self) -> bool:
        return self.primary

    async def mirror_failed(self, peer: str, reason: str, *, lost: bool = True) -> None:
        self.degraded = True

    async def merged(self) -> None:
        self.was_merged = True


class Carrier:
    """Takes ``seconds`` for a sync."""

    def __init__(self) -> None:
        self.seconds = 0.2
        self.synced: list[str] = []
        self.outcomes: Iterator[Outcome] = iter(())

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        await asyncio.sleep(self.seconds)
        self.synced.append(user)
        outcome = next(self.outcomes, Outcome.SYNCED)
        return SyncResult(outcome, "state", outcome.value)

    def progress(self, user: str) -> float:
        return 0.0

    def cut(self, user: str = "") -> None: ...


@dataclass
class World:
    group: PlayedGroup
    carrier: Carrier
    mailboxes: Mailboxes
    events: Path

    @property
    def peer(self) -> Any:
        return self.mailboxes._peers["b"]


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not done():  # noqa: ASYNC110
            await asyncio.sleep(0)


@asynccontextmanager
async def protected(tmp_path: Path, names: str = "b", **settings: Any) -> AsyncIterator[World]:
    paths = Paths(
        *(tmp_path / name for name in ("state", "run", "dsync", "token", "missed", "events"))
    )
    for directory in (paths.state / "mirror", paths.run, paths.missed):
        directory.mkdir(parents=True)
    paths.token.write_text("token\n")
    group, carrier = PlayedGroup(names), Carrier()
    helper = cast(NodeHelper, SimpleNamespace(sync_mail=None))
    parsed = config.parse({**RAW, "mailbox": settings})
    mailboxes = Mailboxes(parsed, cast(Group, group), helper, paths)
    world = World(group, carrier, mailboxes, paths.events)
    world.peer._carrier = carrier
    await mailboxes._ledger.open()
    running = asyncio.create_task(world.peer.run())
    try:
        await asyncio.sleep(0)
        await world.peer.resume("one", lambda user: asyncio.sleep(0, ""))
        yield world
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await mailboxes._ledger.close()


async def test_a_script_that_was_just_changed_is_at_the_next_primary(tmp_path: Path) -> None:
    async with protected(tmp_path) as world:
        world.events.write_bytes(LINE)
        await world.mailboxes.confirm("b")
        assert world.carrier.synced == [USER]
        assert (world.peer.behind, world.peer.running) == (0, 0)
        assert world.peer.phase is Phase.PROTECTED
        await world.mailboxes.confirm("b")
        assert world.carrier.synced == [USER], "nothing to wait for"


async def test_what_a_node_that_may_not_act_reads_is_left_for_when_it_may(tmp_path: Path) -> None:
    async with protected(tmp_path) as world:
        world.group.primary = False
        world.events.write_bytes(LINE)
        assert not await world.mailboxes._take_scripts()
        assert world.peer.behind == 0
        world.group.primary = True
        assert await world.mailboxes._take_scripts()
        assert world.peer.behind == 1


async def test_events_that_may_not_be_taken_are_no_reason_to_hand_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "CONFIRM_TIMEOUT", 0.1)
    async with protected(tmp_path) as world:
        world.group.primary = False
        world.events.write_bytes(LINE)
        with pytest.raises(NotNow):
            await world.mailboxes.confirm("b")


async def test_who_reads_and_goes_away_loses_no_event(tmp_path: Path) -> None:
    async with protected(tmp_path) as world:
        world.events.write_bytes(LINE)
        asking = asyncio.create_task(world.mailboxes.confirm("b"))
        await until(lambda: world.mailboxes._events._offset > 0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await world.mailboxes.confirm("b")
        assert world.carrier.synced == [USER]


@pytest.mark.parametrize("ends", ["time-out", "D"])
async def test_a_copy_that_takes_too_long_refuses_the_switchover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    async with protected(tmp_path) as world:
        world.events.write_bytes(LINE)
        if ends == "D":
            world.group.state.phase = GroupPhase.PRIMARY
        else:
            monkeypatch.setattr(part, "CONFIRM_TIMEOUT", 0.05)
        with pytest.raises(NotNow, match="mailboxes were still being copied to b; try again"):
            await world.mailboxes.confirm("b")
        assert world.carrier.synced == []


async def test_no_switchover_while_a_user_is_put_aside(tmp_path: Path) -> None:
    async with protected(tmp_path) as world:
        world.carrier.seconds = 0.0
        world.carrier.outcomes = iter([Outcome.FAILED] * 5)  # as many put a user aside
        world.peer.recheck([USER])
        await until(lambda: world.group.degraded)
        with pytest.raises(NotNow, match=f"b was lost on the way: {USER} cannot be mirrored to b"):
            await world.mailboxes.confirm("b")


async def test_a_change_that_was_not_told_refuses_the_switchover(tmp_path: Path) -> None:
    async with protected(tmp_path) as world:
        (tmp_path / "missed" / "a%40example.org").touch()
        with pytest.raises(NotNow, match=r"b was lost on the way: changes of a@example.org"):
            await world.mailboxes.confirm("b")
        assert world.group.degraded


async def test_what_was_merged_was_told(tmp_path: Path) -> None:
    """Else its next time as primary would begin with a change that was not told."""
    async with protected(tmp_path) as world:
        world.group.primary = False
        note = tmp_path / "missed" / "a%40example.org"
        note.touch()
        handler = world.mailboxes.handlers()["merged"]
        await handler(PeerIdentity("b", "x"), {}, cast(Exchange, None))
        assert world.group.was_merged
        assert not note.exists()
        world.group.primary = True
        await world.mailboxes.confirm("b")
        assert not world.group.degraded


async def test_a_shadow_that_is_away_is_no_reason_against_another_one(tmp_path: Path) -> None:
    async with protected(tmp_path, "bc", mirror_mode="async") as world:
        assert world.mailboxes._equal_expected(USER, "b")
        assert not world.mailboxes._equal_expected(USER, "c")
        assert world.mailboxes.only_asynchronous("b")
        assert not world.mailboxes.only_asynchronous("c")


async def test_notes_that_cannot_be_read_end_nothing_and_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(part, "MISSED_INTERVAL", 0.001)
    missed = tmp_path / "missed"
    async with protected(tmp_path) as world:
        missed.rmdir()
        following = asyncio.create_task(world.mailboxes._follow_notes())
        await asyncio.sleep(0.1)
        assert caplog.text.count("are not known: [Errno 2]") == 1
        [check] = [item for item in world.mailboxes.checks() if item.name == "noted changes"]
        assert not check.passed
        assert "No such file" in check.message
        missed.mkdir()
        (missed / "a%40example.org").touch()
        await until(lambda: world.group.degraded or following.done())
        assert not following.done()
        [check] = [item for item in world.mailboxes.checks() if item.name == "noted changes"]
        assert check.passed
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_a_note_that_stays_makes_the_group_degraded_with_each_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not with each look: else it would never be protected again."""
    async with protected(tmp_path) as world:
        world.mailboxes._notes._stuck = {"a%40example.org": (USER, 0)}
        note = tmp_path / "missed" / "a%40example.org"
        note.touch()
        monkeypatch.setattr(os, "unlink", refuse)
        assert await world.mailboxes._take_notes(permitted=False) == 0
        assert not world.group.degraded
        note.write_text(".")
        assert await world.mailboxes._take_notes(permitted=False) == 1
        assert world.group.degraded
        [check] = [item for item in world.mailboxes.checks() if item.name == "noted changes"]
        assert (check.passed, check.value) == (False, 1)
        assert USER in check.message


def refuse(path: str) -> None:
    raise OSError(30, "Read-only file system")


async def test_a_node_is_merged_when_the_shadows_have_what_it_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it could be made a copy of one of them that lacks it, and nobody would have it."""
    monkeypatch.setattr(part, "PASSED_ON_LOOK", 0.01)
    async with protected(tmp_path, "bc") as world:
        other = world.mailboxes._peers["c"]
        other.phase = Phase.PROTECTED
        world.mailboxes._spread("b", USER)
        for lost in (False, True):
            telling = asyncio.create_task(world.mailboxes._passed_on("b"))
            await asyncio.sleep(0.05)
            assert not telling.done()
            if lost:
                await world.peer.lose("gone")
                with pytest.raises(PeerError, match="before the others had"):
                    await telling
            else:
                assert other._queue.start() == USER
                other._queue.done(USER)
                await asyncio.wait_for(telling, 1)
                world.mailboxes._spread("b", USER)
