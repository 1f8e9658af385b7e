"""The shell around the decisions: first the disk, then what it allows."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.cluster.support import CONFIG

from umbra.cluster import machine, static
from umbra.cluster.group import Group
from umbra.cluster.machine import NotNow
from umbra.cluster.state import Change, Durable, Mode, Phase, Role
from umbra.cluster.static import StateFile
from umbra.cluster.switchover import Refused, Switchover
from umbra.config import Fence, Peer
from umbra.node.client import NodeHelper
from umbra.node.helper import HelperError
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity
from umbra.transport.ports import NotPrimary

AT = "2026-01-01T00:00:00.000Z"


class Disk(StateFile):
    """A state file that can be made to fail."""

    broken = False

    def save(self, durable: Durable) -> None:
        if self.broken:
            raise OSError("the disk refuses")
        super().save(durable)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """That of a primary which has served."""
    disk = Disk(tmp_path / "state.json", "mail", "a")
    disk.save(replace(static.first("primary", AT), epoch=1))
    return disk


def make(disk: Disk, host: NodeHelper | None = None) -> Group:
    return Group(CONFIG, disk, host or NodeHelper(Path("/nonexistent")))


def status(**values: Any) -> dict[str, Any]:
    return {"epoch": 1, "role": "shadow", "state": "shadow", "storage_id": "b1", **values}


async def protected(disk: Disk, host: NodeHelper | None = None) -> Group:
    group = make(disk, host)
    await group.heard_from("b", status(), answered=True)
    await group.apply(machine.CatchingUp("b"))
    await group.apply(machine.CaughtUp("b"))
    return group


async def test_a_new_primary_opens_when_a_shadow_answers(disk: Disk) -> None:
    group = make(disk)
    opened: list[str] = []
    group.on_opening = lambda: opened.append("yes")
    assert group.accepting() is not None
    await group.heard_from("b", status(), answered=True)
    assert group.accepting() is None
    assert opened == ["yes"]


async def test_alone_is_on_disk_before_anybody_is_told(disk: Disk) -> None:
    group = await protected(disk)
    await group.mirror_failed("b", "no answer")
    stored = disk.load()
    assert stored is not None
    assert stored.mode is Mode.ALONE
    assert group.reasons() == ["b: no answer"]


async def test_who_gives_up_while_protected_is_written_finds_it_written(disk: Disk) -> None:
    """Otherwise memory says alone, the disk protected, and nobody would write the former again."""
    group = await protected(disk)
    await group.mirror_failed("b", "no answer")
    await group.heard_from("b", status(), answered=True)
    await group.apply(machine.CatchingUp("b"))
    save, slow = disk.save, threading.Event()

    def saving(durable: Durable) -> None:
        slow.wait(5)
        save(durable)

    disk.save = saving  # type: ignore[method-assign]
    task = asyncio.create_task(group._protect("b"))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.sleep(0.05)
    slow.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert group.state.durable.mode is Mode.PROTECTED
    await group.mirror_failed("b", "no answer")
    stored = disk.load()
    assert stored is not None
    assert stored.mode is Mode.ALONE


async def test_a_disk_that_refuses_allows_nothing_new(disk: Disk) -> None:
    group = await protected(disk)
    disk.broken = True
    with pytest.raises(OSError, match="refuses"):
        await group.mirror_failed("b", "no answer")
    assert group.state.durable.mode is Mode.PROTECTED  # so a change still has to wait for b


async def test_what_is_forbidden_stops_even_if_the_disk_refuses(disk: Disk) -> None:
    group = await protected(disk)
    disk.broken = True
    higher = status(epoch=9, role="primary", state="primary")
    with pytest.raises(OSError, match="refuses"):
        await group.heard_from("b", higher, answered=False)
    assert not group.is_primary()


async def test_the_parts_are_told_of_a_lost_peer_and_of_a_lost_role(disk: Disk) -> None:
    group = await protected(disk)
    told: list[Any] = []
    group.on_lost = lambda peer, reason: told.append((peer, reason))
    group.on_demotion = lambda: told.append("demoted")
    await group.apply(machine.PeerLost("b", "gone"))
    assert told == [("b", "gone")]
    await group.heard_from("b", status(epoch=5, role="primary", state="primary"), answered=True)
    assert told[1:] == ["demoted"]
    with pytest.raises(NotPrimary):
        await group.mirror_failed("b", "late")


async def test_with_a_second_shadow_a_lost_one_is_no_degradation(disk: Disk) -> None:
    """And one that only follows is not given up for what it lacks: messages go on to it."""
    third = Peer("c", "gamma", "127.0.0.3")
    group = Group(replace(CONFIG, peers=(*CONFIG.peers, third)), disk, NodeHelper(Path("/none")))
    for name in ("b", "c"):
        await group.heard_from(name, status(storage_id=f"{name}1"), answered=True)
        await group.apply(machine.CatchingUp(name))
    await group.apply(machine.CaughtUp("b"))
    assert group.state.protected
    await group.mirror_failed("c", "it follows", lost=False)
    await group.mirror_failed("c", "the agent has just started")
    assert list(group.synchronous()) == ["b", "c"]
    assert not await group.complete_within("c", 0.01)
    await group.mirror_failed("b", "no answer")
    assert not group.state.protected
    await group.apply(machine.CaughtUp("c"))
    assert await group.complete_within("c", 0.01)


async def test_a_promotion_is_no_opening(disk: Disk) -> None:
    """A handover's list of what is delivered must be noted before anything is resubmitted."""
    disk.save(Durable("a1", 1, Role.SHADOW, Mode.PROTECTED, AT))
    group = make(disk)
    opened: list[str] = []
    group.on_opening = lambda: opened.append("yes")
    await group.apply(machine.Promote(2, Change("b", "a", AT, planned=True), protected=True))
    assert group.is_primary()
    assert opened == []


@pytest.mark.parametrize(
    ("op", "epoch", "code"),
    [("shadow-store", 1, "refused"), ("dsync", 0, "stale-epoch"), ("handover", 1, "refused")],
)
async def test_a_primary_takes_nothing_from_its_equals_or_the_superseded(
    disk: Disk, op: str, epoch: int, code: str
) -> None:
    group = await protected(disk)
    with pytest.raises(PeerError) as caught:
        await group.check_epoch("b", op, epoch)
    assert caught.value.code == code
    await group.check_epoch("b", "status", 0)


async def test_an_operation_of_a_newer_epoch_ends_the_own_right_first(disk: Disk) -> None:
    group = await protected(disk)
    await group.check_epoch("b", "shadow-store", 2)
    assert group.state.phase is Phase.SHADOW
    stored = disk.load()
    assert stored is not None
    assert stored.epoch == 2


async def test_a_status_that_makes_no_sense_is_refused(disk: Disk) -> None:
    group = make(disk)
    for nonsense in ({}, status(role="king"), status(epoch="many")):
        with pytest.raises(PeerError, match="makes no sense"):
            await group.heard_from("b", nonsense, answered=True)


async def test_a_refused_wish_changes_nothing(disk: Disk) -> None:
    group = make(disk)
    with pytest.raises(NotNow):
        await group.apply(machine.Drain())
    assert group.state.phase is Phase.STARTING


async def test_the_reason_names_the_peer_that_is_still_away_after_a_restart(disk: Disk) -> None:
    disk.save(Durable("a1", 1, Role.PRIMARY, Mode.ALONE, AT))
    group = make(disk)
    await group.apply(machine.PeerLost("b", "b does not answer at 127.0.0.2"))
    assert any("b does not answer" in reason for reason in group.reasons())


class Host(NodeHelper):
    """A host whose Postfix can be killed."""

    def __init__(self) -> None:
        super().__init__(Path("/nonexistent"))
        self.running = False
        self.starts = 0
        self.crashed = False
        self.opened = asyncio.Event()

    async def ports_open(self, ports: Sequence[int], hold: float) -> None:
        self.opened.set()

    async def postfix_start(self) -> None:
        self.running = True
        self.starts += 1

    async def postfix_running(self) -> bool:
        return self.running

    async def postfix_failed(self) -> bool:
        return self.crashed


class Stubborn(Host):
    """A host some of whose effects fail."""

    def __init__(self, *wrong: str) -> None:
        super().__init__()
        self.wrong = wrong
        self.done: list[str] = []

    def _do(self, name: str) -> None:
        if name in self.wrong:
            raise HelperError(f"{name} failed")
        self.done.append(name)

    async def ports_close(self) -> None:
        self._do("close")

    async def postfix_stop(self) -> None:
        self._do("stop")
        self.running = False

    async def kick(self, ports: Sequence[int]) -> None:
        self._do("kick")

    async def queue(self) -> dict[str, str]:
        return {}


@pytest.mark.parametrize(
    ("wrong", "done", "prepared"),
    [
        ((), ["close", "stop"], False),
        ((), ["close"], True),
        (("close",), ["stop", "kick"], False),
        (("close",), ["stop", "kick"], True),  # it was started behind closed ports only
        (("stop",), ["close"], False),
        (("close", "stop"), ["kick"], False),
    ],
)
async def test_what_cannot_be_closed_is_stopped_all_the_same(
    disk: Disk, wrong: tuple[str, ...], done: list[str], prepared: bool
) -> None:
    host = Stubborn(*wrong)
    disk.save(replace(static.first("shadow", AT), epoch=1))
    group = Group(CONFIG, disk, host)
    if prepared:
        group.warm_up = nothing
        await group.prepare(60.0)
    host.running = True
    tending = asyncio.create_task(group.tend())
    await asyncio.sleep(0.05)
    tending.cancel()
    await asyncio.gather(tending, return_exceptions=True)
    assert host.done == done
    check = next(check for check in group.checks() if check.name == "ports and Postfix")
    assert check.passed is not bool(wrong)
    if wrong:
        assert check.message == f"{wrong[0]} failed."


async def nothing() -> None:
    pass


async def test_a_primary_starts_a_postfix_that_was_killed_and_no_other(disk: Disk) -> None:
    host = Host()
    group = Group(replace(CONFIG, fence=Fence(hold=0.03)), disk, host)
    await group.heard_from("b", status(), answered=True)
    tending = asyncio.create_task(group.tend())
    try:
        for starts in (1, 2):
            for _ in range(5):
                host.opened.clear()
                await asyncio.wait_for(host.opened.wait(), 5)
            assert (host.running, host.starts) == (True, starts)
            host.running = False
    finally:
        tending.cancel()
        await asyncio.gather(tending, return_exceptions=True)


class SlowPorts(Stubborn):
    """A host that takes its time to open its ports."""

    def __init__(self) -> None:
        super().__init__()
        self.opens = asyncio.Event()

    async def ports_open(self, ports: Sequence[int], hold: float) -> None:
        await super().ports_open(ports, hold)
        await self.opens.wait()
        self._do("open")


async def test_a_drain_that_begins_while_the_ports_are_opened_does_not_close_them(
    disk: Disk,
) -> None:
    """Who is being answered has to hear it; the switchover closes them when nobody is."""
    host = SlowPorts()
    group = await protected(disk, host)
    tending = asyncio.create_task(group.tend())
    await asyncio.wait_for(host.opened.wait(), 5)
    await group.apply(machine.Drain())
    host.opens.set()
    await asyncio.sleep(0.05)
    tending.cancel()
    await asyncio.gather(tending, return_exceptions=True)
    assert group.state.phase is Phase.DRAINING
    assert host.done == ["open"]


async def test_a_node_that_asks_for_the_outcome_takes_no_role_by_an_operation(disk: Disk) -> None:
    disk.save(Durable("a1", 1, Role.SHADOW, Mode.PROTECTED, AT))
    group = make(disk)
    await group.apply(machine.Promote(2, Change("b", "a", AT, planned=True), protected=True))
    said = status(epoch=1, state="handing-over", handing_to="a")
    await group.heard_from("b", said, answered=False)
    with pytest.raises(PeerError):
        await group.check_epoch("b", "shadow-discard", 3)
    assert group.is_primary()
    assert group.epoch == 4


class Messages:
    """The transport, as far as a handover asks for it."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    async def take_over(self, origin: str, remaining: object) -> None:
        self.steps.append(f"took over from {origin}")

    def resubmit(self) -> None:
        self.steps.append("resubmits")


class Mailboxes:
    """The mirror, as far as a handover asks for it."""

    replacing = False

    async def resume(self, peer: str, epoch: int) -> None: ...

    async def quiet(self) -> None:
        pass

    def replaces_a_lost_one(self) -> None:
        self.replacing = True


async def test_a_promotion_by_force_tells_the_mirror_a_planned_one_does_not(disk: Disk) -> None:
    disk.save(Durable("a1", 1, Role.SHADOW, Mode.PROTECTED, AT))
    group, mailboxes = make(disk), Mailboxes()
    group._helper.postfix_start = group._helper.ports_open = done  # type: ignore[assignment, method-assign]
    group.links = {"b": object()}  # type: ignore[dict-item]
    switchover = Switchover(CONFIG, group, group._helper, Messages(), mailboxes)  # type: ignore[arg-type]
    with pytest.raises(Refused):
        await switchover.failover(accept_loss=False)
    assert not mailboxes.replacing
    await switchover.failover(accept_loss=True)
    assert mailboxes.replacing
    disk.save(Durable("a1", 1, Role.SHADOW, Mode.PROTECTED, AT))
    planned = make(disk)
    mailboxes.replacing = False
    switchover = Switchover(CONFIG, planned, group._helper, Messages(), mailboxes)
    change = Change("b", "a", AT, planned=True)
    args = {"epoch": 2, "change": change.to_json(), "elapsed_s": 0.0}
    await switchover.handle_handover(PeerIdentity("b", "beta"), args, NoRows())
    assert planned.is_primary()
    assert not mailboxes.replacing


async def done(*_: object) -> None: ...


async def test_what_was_taken_over_is_carried_on_though_opening_fails_at_first(disk: Disk) -> None:
    disk.save(Durable("a1", 1, Role.SHADOW, Mode.PROTECTED, AT))
    group, messages = make(disk), Messages()
    helper = group._helper
    switchover = Switchover(CONFIG, group, helper, messages, Mailboxes())  # type: ignore[arg-type]

    async def fails() -> None:
        raise HelperError("Postfix does not start")

    helper.postfix_start = fails  # type: ignore[method-assign]
    change = Change("b", "a", AT, planned=True)
    args = {"epoch": 2, "change": change.to_json(), "elapsed_s": 0.0}
    with pytest.raises(PeerError, match="Postfix does not start"):
        await switchover.handle_handover(PeerIdentity("b", "beta"), args, NoRows())  # type: ignore[arg-type]
    assert group.is_primary()
    assert messages.steps == ["took over from b", "resubmits"]


class NoRows:
    """An exchange that brings nothing."""

    async def receive_lines(self) -> AsyncIterator[dict[str, Any]]:
        return
        yield {}


async def test_a_promotion_by_force_ends_what_the_lost_primary_has_begun_here(disk: Disk) -> None:
    disk.save(replace(static.first("shadow", AT), epoch=1))
    group = make(disk)
    broken: list[tuple[bool, Any]] = []
    group.break_off = lambda operations, below=math.inf: broken.append(
        ("dsync" in operations and below > 1, disk.load())
    )
    change = Change("b", "a", AT, planned=False)
    await group.apply(machine.Promote(2, change, protected=False))
    [(dsync, stored)] = broken
    assert dsync
    assert stored is not None
    assert stored.epoch == 1  # before this node is primary for anybody


async def test_who_learns_of_a_higher_epoch_ends_what_the_superseded_primary_has_begun(
    disk: Disk,
) -> None:
    """It may be a third node, which does not become primary itself."""
    disk.save(replace(static.first("shadow", AT), epoch=1))
    group = make(disk)
    broken: list[tuple[bool, float]] = []
    group.break_off = lambda operations, below=math.inf: broken.append(
        ("dsync" in operations, below)
    )
    await group.heard_from("b", status(role="primary", state="primary"), answered=True)
    assert not broken
    await group.check_epoch("b", "shadow-store", 3)
    assert (broken, group.epoch) == ([(True, 3)], 3)


class SlowDisk(Disk):
    """One that takes its time for the first state of all."""

    slow = True
    writing = 0

    def save(self, durable: Durable) -> None:
        self.writing += 1
        assert self.writing == 1, "two states are written at the same time"
        if self.slow:
            self.slow = False
            time.sleep(0.3)
        super().save(durable)
        self.writing -= 1


async def test_a_state_that_nobody_waits_for_any_more_is_not_written_beside_the_next(
    tmp_path: Path,
) -> None:
    """Nor after it: that would take back the epoch."""
    disk = SlowDisk(tmp_path / "state.json", "mail", "a")
    static.StateFile(tmp_path / "state.json", "mail", "a").save(
        replace(static.first("shadow", AT), epoch=1)
    )
    group = make(disk)
    merging = asyncio.create_task(group.merged())
    await asyncio.sleep(0.1)
    for _ in range(2):  # what the primary has asked for is broken off, and once more
        merging.cancel()
        await asyncio.sleep(0.01)
    await group.heard_from("b", status(epoch=7), answered=True)
    assert merging.cancelled()
    stored = disk.load()
    assert stored is not None
    assert stored.epoch == 7


class MailDisk(NodeHelper):
    """A helper whose host has a disk of mailboxes with a mark."""

    def __init__(self, mark: str | None) -> None:
        super().__init__(Path("/nonexistent"))
        self.mark = mark

    async def mail_store(self, storage: str, *, claim: bool) -> str | None:
        if claim and self.mark is not None:
            self.mark = storage
        return self.mark


@pytest.mark.parametrize("mark", ["", "fe1d"], ids=["replaced or not mounted", "another's"])
async def test_a_node_does_not_run_on_another_disk_than_that_of_its_state(
    disk: Disk, mark: str
) -> None:
    host = MailDisk(mark)
    await Group(CONFIG, disk, host).own_mail()  # the first time
    stored = disk.load()
    assert stored is not None
    assert (stored.marked, host.mark) == (True, stored.storage_id)
    await Group(CONFIG, disk, host).own_mail()
    host.mark = mark
    with pytest.raises(static.StateError, match="mount the right one"):
        await Group(CONFIG, disk, host).own_mail()
    assert host.mark == mark


async def test_an_older_helper_says_nothing_of_the_disk(disk: Disk) -> None:
    await Group(CONFIG, disk, MailDisk(None)).own_mail()
    stored = disk.load()
    assert stored is not None
    assert not stored.marked


async def test_a_promotion_does_not_forget_the_mark(disk: Disk) -> None:
    disk.save(replace(static.first("shadow", AT), epoch=1, marked=True))
    group = make(disk)
    await group.apply(machine.Promote(2, Change("b", "a", AT, planned=False), protected=False))
    stored = disk.load()
    assert stored is not None
    assert stored.marked


async def test_a_switchover_that_cannot_know_what_is_lacking_is_refused_in_words(
    disk: Disk,
) -> None:
    class Blind(Mailboxes):
        async def hurry(self, to: str, timeout: float) -> None:
            raise OSError(2, "No such file or directory", "/var/lib/umbra-missed")

        def at_ease(self) -> None: ...

    group = await protected(disk)
    switchover = Switchover(CONFIG, group, group._helper, Messages(), Blind())  # type: ignore[arg-type]
    with pytest.raises(Refused, match="umbra-missed"):
        await switchover.run("b", dry_run=False, timeout_s=1)
    assert group.is_primary()
