"""The mirror itself, with a carrier that is a model of the peer's mailboxes."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbra.mailbox import mirror as module
from umbra.mailbox.doveadm import DoveadmError, Outcome, SyncResult
from umbra.mailbox.ledger import Ledger
from umbra.mailbox.mirror import (
    CatchUpFailed,
    Mirror,
    PeerMirror,
    Phase,
    Verdict,
    next_phase,
)
from umbra.peer.exchange import PeerError
from umbra.transport.ports import NotPrimary


class World:
    """Cluster, Dovecot and carrier: mailboxes are counters of changes here and there."""

    def __init__(self) -> None:
        self.local: Counter[str] = Counter()
        self.remote: Counter[str] = Counter()
        self.primary = True
        self.mode = "alone"
        self.commit_delay = 0.0
        self.lost: bool | None = None
        self.commit_error: Exception | None = None
        self.delay: Callable[[str], float] = lambda user: 0.0
        self.outcome: Callable[[str], Outcome] = lambda user: Outcome.SYNCED
        self.known: set[str] = {f"u{number}" for number in range(5)}
        self.running: set[str] = set()
        self.most = 0
        self.syncs: list[tuple[str, str]] = []
        self.kinds: list[tuple[str, bool]] = []
        self.single: list[tuple[str, str]] = []
        self.places: dict[tuple[str, int], str] = {}  # where a user's change was, by its number
        self.alone: set[tuple[str, int]] = set()  # what syncs of single mailboxes have brought
        self.begun = False  # of a sync that fails, whether the peer may have taken a part of it
        self.whole = False  # no sync of a single mailbox can be made
        self.cuts = 0
        self.moved = 0.0

    # cluster

    def is_primary(self) -> bool:
        return self.primary

    async def mirror_failed(self, peer: str, reason: str, *, lost: bool = True) -> None:
        self.lost = lost
        await asyncio.sleep(self.commit_delay)
        if self.commit_error is not None:
            raise self.commit_error
        self.mode = "alone"

    async def protect(self) -> None:
        await asyncio.sleep(self.commit_delay)
        self.mode = "protected"

    def begin_work(self) -> AbstractContextManager[None]:
        return nullcontext()

    # Dovecot

    async def users(self) -> list[str]:
        return sorted(self.known)

    async def exists(self, user: str) -> bool:
        return user in self.known

    # carrier

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        return await self._sync(user, state, merge, None)

    async def _sync(self, user: str, state: str, merge: bool, mailbox: str | None) -> SyncResult:
        self.kinds.append((user, merge))
        assert user not in self.running, "two syncs of one user"
        self.running.add(user)
        self.most = max(self.most, len(self.running))
        self.syncs.append((user, state))
        seen = self.local[user]
        try:
            await asyncio.sleep(self.delay(user))
        finally:
            self.running.discard(user)
        outcome = self.outcome(user)
        if outcome is Outcome.SYNCED and mailbox is None:
            self.remote[user] = max(self.remote[user], seen)
        elif outcome is Outcome.SYNCED:
            self.alone |= {
                (user, number)
                for number in range(1, seen + 1)
                if self.places.get((user, number)) == mailbox
            }
        return SyncResult(outcome, "state", outcome.value, begun=self.begun)

    def has(self, user: str, number: int) -> bool:
        """Return whether the peer has this change."""
        return self.remote[user] >= number or (user, number) in self.alone

    async def sync_mailbox(self, user: str, state: str, mailbox: str) -> SyncResult | None:
        assert state
        self.single.append((user, mailbox))
        return None if self.whole else await self._sync(user, state, False, mailbox)

    def progress(self, user: str) -> float:
        return self.moved

    def cut(self, user: str = "") -> None:
        self.cuts += 1


@asynccontextmanager
async def mirror(
    world: World, path: Path, *, workers: int = 2, patience: float = 5.0, protected: bool = True
) -> AsyncIterator[PeerMirror]:
    ledger = Ledger(path, path)
    await ledger.open()
    peer = PeerMirror(
        "mail-b", world, ledger, world, world, world, workers=workers, timeout=patience
    )
    task = asyncio.create_task(peer.run())
    await asyncio.sleep(0)
    try:
        if protected:
            await peer.catch_up(world.protect, everyone=True, binding="one")
        yield peer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await ledger.close()


async def change(world: World, peer: PeerMirror, user: str, mailbox: str = "") -> Verdict:
    """Commit a change and check what the answer promises."""
    world.local[user] += 1
    mine = world.local[user]
    world.places[user, mine] = mailbox
    verdict = await peer.changed(user, mailbox)
    if verdict is Verdict.MIRRORED:
        assert world.has(user, mine), "acknowledged as mirrored, and it is not there"
    else:
        assert user in peer._ledger.changed("mail-b") or world.has(user, mine)
    return verdict


async def test_mirrored_before_ok(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        world.delay = lambda user: 0.01
        assert await change(world, peer, "u1") is Verdict.MIRRORED
        assert peer.lag() == (0, 0.0)


async def test_messages_of_one_mailbox_are_synced_alone(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        assert await change(world, peer, "u1", "INBOX") is Verdict.MIRRORED
        assert world.single == [("u1", "INBOX")]
        # Together with others, and where it cannot be done, all are synced.
        world.syncs.clear()
        places = ("INBOX", "INBOX", "Sent")
        await asyncio.gather(*(change(world, peer, "u1", place) for place in places))
        assert world.single == [("u1", "INBOX")] * 2
        assert len(world.syncs) == 2
        world.whole = True
        world.syncs.clear()
        assert await change(world, peer, "u1", "INBOX") is Verdict.MIRRORED
        assert len(world.syncs) == 1
        # What failed is done again with all of them.
        world.whole = False
        world.single.clear()
        outcomes = iter([Outcome.CHANGED, Outcome.SYNCED])
        world.outcome = lambda user: next(outcomes)
        assert await change(world, peer, "u1", "INBOX") is Verdict.MIRRORED
        assert world.single == [("u1", "INBOX")]


@pytest.mark.parametrize("waited", [True, False])
async def test_who_would_lose_something_by_a_sync_does_not_count(
    tmp_path: Path, waited: bool
) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        outcomes = iter([Outcome.UNSAFE])
        world.outcome = lambda user: next(outcomes, Outcome.SYNCED)
        if waited:
            assert await change(world, peer, "u1") is Verdict.RECORDED
        else:
            peer.recheck(["u1"])
            await until(lambda: peer.phase is Phase.RECORDING)
            await until(lambda: world.mode == "alone")
        assert world.mode == "alone"
        assert world.lost is False, "nothing is wrong with the peer"
        assert peer.behind == 1
        world.syncs.clear()
        await peer.catch_up(world.protect, everyone=False, binding="one")
        assert world.syncs == [("u1", "")], "from scratch"
        assert world.mode == "protected"


async def test_a_sync_that_was_unsafe_is_made_from_scratch_within_the_catch_up(
    tmp_path: Path,
) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        await peer.lose("the line is down")
        assert await change(world, peer, "u1") is Verdict.RECORDED
        outcomes = iter([Outcome.UNSAFE])
        world.outcome = lambda user: next(outcomes, Outcome.SYNCED)
        world.syncs.clear()
        await peer.catch_up(world.protect, everyone=False, binding="one")
        assert [state == "" for _, state in world.syncs] == [False, True]
        assert world.mode == "protected"


async def test_a_copy_that_must_be_made_anew_is_not_relied_on_meanwhile(tmp_path: Path) -> None:
    """Else it would be unsafe again as soon as somebody waits for others, and so on for ever."""
    world = World()
    async with mirror(world, tmp_path) as peer:
        anew: set[str] = {"u1"}

        def outcome(user: str) -> Outcome:
            if user in anew and (peer.phase.waits or world.syncs[-1][1]):
                return Outcome.UNSAFE
            anew.discard(user)
            return Outcome.SYNCED

        world.outcome = outcome
        await peer.lose("the line is down")
        assert await change(world, peer, "u0") is Verdict.RECORDED
        world.delay = lambda user: 0.1 if user == "u0" else 0.0
        catch_up = asyncio.create_task(peer.catch_up(world.protect, everyone=False, binding="one"))
        await until(lambda: "u0" in world.running)
        world.syncs.clear()
        assert await change(world, peer, "u1") is Verdict.RECORDED
        await asyncio.wait_for(catch_up, 5)
        assert world.syncs == [("u1", "state"), ("u1", "")]
        assert world.mode == "protected"
        assert await change(world, peer, "u1") is Verdict.MIRRORED


@pytest.mark.parametrize("begun", [True, False])
async def test_what_a_sync_that_broke_off_may_have_taken_is_not_relied_on(
    tmp_path: Path, begun: bool
) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        outcomes = iter([Outcome.FAILED])
        world.outcome = lambda user: next(outcomes, Outcome.SYNCED)
        world.begun = begun
        verdict = await change(world, peer, "u1")
        assert verdict is (Verdict.RECORDED if begun else Verdict.MIRRORED)
        assert world.mode == ("alone" if begun else "protected")
        assert world.lost is not True, "nothing is wrong with the peer"
        if begun:
            await peer.catch_up(world.protect, everyone=False, binding="one")
            assert world.mode == "protected"


async def test_a_sync_does_not_outlive_the_role(tmp_path: Path) -> None:
    """It has several steps, and a third node would take the next one for the new primary's."""
    world = World()
    steps: list[str] = []

    class Two(World):
        async def sync(
            self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
        ) -> SyncResult:
            result = await world.sync(user, state, merge=merge, apart=apart)
            steps.append(user)
            return result

    async with mirror(world, tmp_path) as peer:
        peer._carrier, peer._single = Two(), None
        world.delay = lambda user: 0.05
        waiting = asyncio.create_task(change(world, peer, "u1"))
        await until(lambda: "u1" in world.running)
        peer.stop()
        with pytest.raises(NotPrimary):
            await waiting
        await asyncio.sleep(0.1)
        assert steps == []
        assert peer.running == 0
        assert peer.behind == 1
        await peer.catch_up(world.protect, everyone=False, binding="two")
        assert "u1" in steps


async def test_what_nobody_has_told_in_other_mailboxes_follows_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_INTERVAL", 0.05)
    world = World()
    async with mirror(world, tmp_path) as peer:
        world.known = {"u0"}  # whose turn it is at a comparison
        sweep = asyncio.create_task(Mirror(world, world, {"mail-b": peer})._sweep())
        await asyncio.sleep(0.2)
        world.syncs.clear()
        for user in ("u1", "u2"):
            world.local[user] += 1  # by a session that was killed
            world.places[user, 1] = "Sent"
        assert await change(world, peer, "u1", "INBOX") is Verdict.MIRRORED
        assert not world.has("u1", 1)
        await asyncio.sleep(0.2)
        assert world.has("u1", 1)
        assert peer.equal
        assert [user for user, _ in world.syncs].count("u1") == 2, "once, not again and again"
        sweep.cancel()
        await asyncio.gather(sweep, return_exceptions=True)


async def test_without_a_state_all_mailboxes_are_synced(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        peer._ledger.keep("mail-b", "u2", None)
        assert await change(world, peer, "u2", "INBOX") is Verdict.MIRRORED
        assert world.single == []


@pytest.mark.parametrize(("refusals", "acknowledged"), [(0, True), (2, True), (99, False)])
async def test_a_change_waits_until_the_right_to_acknowledge_it_is_known(
    monkeypatch: pytest.MonkeyPatch, refusals: int, acknowledged: bool
) -> None:
    monkeypatch.setattr(module, "RIGHT_LOOK", 0.01)
    asked = 0

    async def ask() -> Verdict:
        nonlocal asked
        asked += 1
        if asked <= refusals:
            raise NotPrimary
        return Verdict.MIRRORED

    if acknowledged:
        until = monotonic() + 0.1
        assert await module.entitled(ask, lambda: until) is Verdict.MIRRORED
        assert asked == refusals + 1
    else:
        until = monotonic() + 0.1
        with pytest.raises(NotPrimary):
            await module.entitled(ask, lambda: until)
        assert asked > 5
        asked = 0
        with pytest.raises(NotPrimary):  # a shadow's ports have long been closed
            await module.entitled(ask, lambda: until - 9)
        assert asked == 1


async def test_a_change_that_has_waited_long_is_not_given_up_before_the_ports_are_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RIGHT_LOOK", 0.01)
    began = monotonic()
    right = [began]  # the node had it until the change was done with waiting

    async def ask() -> Verdict:
        if right == [began]:
            await asyncio.sleep(0.2)
            right.append(monotonic())
        raise NotPrimary

    with pytest.raises(NotPrimary):
        await module.entitled(ask, lambda: right[-1] + 0.1)
    assert monotonic() - began >= 0.3


async def test_changes_share_syncs(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        world.delay = lambda user: 0.02
        world.syncs.clear()
        verdicts = await asyncio.gather(*(change(world, peer, "u1") for _ in range(50)))
        assert set(verdicts) == {Verdict.MIRRORED}
        assert len(world.syncs) == 2, "the first starts at once, the others share the next"


async def test_after_a_switchover_a_users_first_sync_has_the_former_primarys_state(
    tmp_path: Path,
) -> None:
    world, asked = World(), []

    async def inherited(user: str) -> str:
        asked.append(user)
        return f"of {user}"

    async with mirror(world, tmp_path, protected=False) as peer:
        await peer.resume("two", inherited)
        for _ in range(2):
            assert await change(world, peer, "u1") is Verdict.MIRRORED
        assert world.syncs == [("u1", "of u1"), ("u1", "state")]
        world.outcome = lambda user: Outcome.SYNCED if len(world.syncs) > 3 else Outcome.FAILED
        assert await change(world, peer, "u2") is Verdict.MIRRORED
        # What did not work with it is done without; what is to be compared whole is.
        assert world.syncs[2:] == [("u2", "of u2"), ("u2", "")]
        await peer.resync("u3", nothing)
        assert world.syncs[4:] == [("u3", "")]
        assert asked == ["u1", "u2"]


async def test_after_a_surprise_all_is_compared(tmp_path: Path) -> None:
    """The peer may have taken a part of what the state does not tell."""
    world = World()
    async with mirror(world, tmp_path) as peer:
        assert await change(world, peer, "u1") is Verdict.MIRRORED
        world.syncs.clear()
        world.outcome = lambda user: Outcome.SURPRISED if len(world.syncs) == 1 else Outcome.SYNCED
        assert await change(world, peer, "u1") is Verdict.MIRRORED
        assert world.syncs == [("u1", "state"), ("u1", "")]


async def test_who_has_nothing_to_merge_is_mirrored_at_once(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path, workers=1, protected=False) as peer:
        world.outcome = lambda user: Outcome.EQUAL if world.kinds[-1][1] else Outcome.SYNCED
        await peer.catch_up(world.protect, everyone=True, binding="one", merge=True)
        assert [merge for user, merge in world.kinds if user == "u1"] == [True, False]


async def test_a_catch_up_trusts_no_state_of_another_node(tmp_path: Path) -> None:
    world = World()

    async def inherited(user: str) -> str:
        raise AssertionError(user)

    async with mirror(world, tmp_path, protected=False) as peer:
        await peer.resume("two", inherited)
        await peer.lose("a reason")
        await peer.catch_up(world.protect, everyone=True, binding="three")
        assert {state for _, state in world.syncs} == {""}


async def test_a_slow_user_holds_up_nobody(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path, workers=2) as peer:
        world.delay = lambda user: 0.5 if user == "u0" else 0.001
        slow = asyncio.create_task(change(world, peer, "u0"))
        await asyncio.sleep(0)
        await asyncio.wait_for(
            asyncio.gather(*(change(world, peer, f"u{n}") for n in (1, 2, 3, 4))), 0.4
        )
        assert not slow.done()
        await slow
        assert world.most == 2


async def test_a_slow_peer_makes_the_group_alone_once(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path, patience=0.1) as peer:
        world.delay = lambda user: 1.0
        loop = asyncio.get_running_loop()
        started = loop.time()
        waiting = [asyncio.create_task(change(world, peer, f"u{n}")) for n in range(5)]
        await asyncio.sleep(0.05)
        waiting += [asyncio.create_task(change(world, peer, f"u{n}")) for n in range(5)]
        assert {await task for task in waiting} == {Verdict.RECORDED}
        assert loop.time() - started < 0.5
        assert world.mode == "alone"
        started = loop.time()
        assert await change(world, peer, "u1") is Verdict.RECORDED
        assert loop.time() - started < 0.1, "nobody waits again"
        changes, seconds = peer.lag()
        assert changes >= 3
        assert seconds > 0


async def test_alone_is_on_disk_before_an_answer(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path, patience=0.05) as peer:
        world.delay = lambda user: 1.0
        world.commit_delay = 0.2
        first = asyncio.create_task(change(world, peer, "u1"))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(change(world, peer, "u2"))
        await asyncio.sleep(0.05)
        assert world.mode == "protected"
        assert not first.done()
        assert not second.done(), "the phase is RECORDING, but that is not on disk yet"
        await asyncio.gather(first, second)
        assert world.mode == "alone"


async def test_nothing_is_acknowledged_if_alone_cannot_be_written(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path, patience=0.05) as peer:
        world.delay = lambda user: 0.3
        world.commit_error = OSError("disk full")
        with pytest.raises(OSError, match="disk full"):
            await change(world, peer, "u1")
        with pytest.raises(OSError, match="disk full"):
            await change(world, peer, "u2")
        world.commit_error = None
        assert await change(world, peer, "u2") is Verdict.RECORDED


async def test_a_lost_peer_is_noticed_at_once(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path, patience=5) as peer:
        world.outcome = lambda user: Outcome.LOST
        assert await asyncio.wait_for(change(world, peer, "u1"), 1) is Verdict.RECORDED
        assert peer.phase is Phase.RECORDING


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.LOST, None])
async def test_a_sync_that_broke_off_is_followed_by_one_from_scratch(
    tmp_path: Path, outcome: Outcome | None
) -> None:
    """It may have been applied in part: dsync would not send the flags of what it has saved."""

    world = World()
    async with mirror(world, tmp_path) as peer:
        assert await change(world, peer, "u1") is Verdict.MIRRORED
        assert await change(world, peer, "u1") is Verdict.MIRRORED
        assert world.syncs[-1] == ("u1", "state")
        if outcome is None:  # this process dies with it
            world.delay = lambda user: 60.0
            running = asyncio.create_task(change(world, peer, "u1"))
            await asyncio.sleep(0.05)
            assert await peer._ledger.state(peer.peer, "u1") == ""
            running.cancel()
            return
        answers = iter([outcome])
        world.outcome = lambda user: next(answers, Outcome.SYNCED)
        await change(world, peer, "u1")
        if outcome is Outcome.LOST:
            await peer.catch_up(world.protect, everyone=False, binding="one")
        assert world.syncs[-2:] == [("u1", "state"), ("u1", "")]
        assert await change(world, peer, "u1") is Verdict.MIRRORED
        assert world.syncs[-1] == ("u1", "state")


async def test_changed_meanwhile_runs_again(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        answers = iter([Outcome.CHANGED] * 3 + [Outcome.SYNCED])
        world.outcome = lambda user: next(answers)
        assert await change(world, peer, "u1") is Verdict.MIRRORED
        assert next(answers, None) is None


async def test_a_caller_that_goes_away_leaves_its_change(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        world.delay = lambda user: 0.05
        task = asyncio.create_task(change(world, peer, "u1"))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0.1)
        assert world.remote["u1"] == 1
        assert peer.waiting == 0


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [(Outcome.NO_USER, "mail-b does not know the user u3"), (Outcome.FAILED, "failed")],
)
async def test_a_user_who_cannot_be_mirrored_is_a_finding_and_the_others_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, reason: str
) -> None:
    monkeypatch.setattr(module, "RETRY_DELAY", (0.001, 0.001))
    monkeypatch.setattr(module, "HELD_PAUSE", 0.2)
    world = World()
    world.outcome = lambda user: outcome if user == "u3" else Outcome.SYNCED
    async with mirror(world, tmp_path, protected=False) as peer:
        catch_up = asyncio.create_task(peer.catch_up(world.protect, everyone=True, binding="one"))
        await until(lambda: peer.findings == {"u3": reason})
        assert {user for user, _ in world.syncs} == world.known, "the others are in order"
        # Nobody waits, and what the others change is copied all the same.
        assert await change(world, peer, "u1") is Verdict.RECORDED
        await until(lambda: world.remote["u1"] == 1)
        assert (peer.phase, world.mode) == (Phase.CATCHING_UP, "alone")
        assert world.lost is not True, "the peer takes messages as before"
        world.outcome = lambda user: Outcome.SYNCED
        await asyncio.wait_for(catch_up, 5)
        assert world.mode == "protected"
        assert not peer.findings


async def test_whoever_waits_is_released_when_another_user_cannot_be_mirrored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_DELAY", (0.02, 0.02))
    world = World()
    async with mirror(world, tmp_path) as peer:
        await peer.lose("gone")
        world.outcome = lambda user: Outcome.FAILED if user == "u3" else Outcome.SYNCED
        world.delay = lambda user: 3.0 if user == "u1" else 0.0
        peer.follow(["u3"])
        catch_up = asyncio.create_task(peer.catch_up(world.protect, everyone=False, binding="one"))
        await until(lambda: peer.phase is Phase.JOINING)
        assert await asyncio.wait_for(change(world, peer, "u1"), 2) is Verdict.RECORDED
        assert peer.phase is Phase.CATCHING_UP
        assert world.lost is False
        catch_up.cancel()


async def test_a_user_that_is_gone_on_both_sides_is_no_finding(tmp_path: Path) -> None:
    world = World()
    world.outcome = lambda user: Outcome.NO_USER if user == "gone" else Outcome.SYNCED
    async with mirror(world, tmp_path, protected=False) as peer:
        await change(world, peer, "gone")
        await peer.catch_up(world.protect, everyone=True, binding="one")
        assert world.mode == "protected"
        assert peer._ledger.changed("mail-b") == []


async def test_a_user_who_goes_while_mailboxes_are_merged_keeps_nobody_waiting(
    tmp_path: Path,
) -> None:
    world = World()
    world.known.add("gone")

    def outcome(user: str) -> Outcome:
        if user != "gone":
            return Outcome.SYNCED
        world.known.discard("gone")
        return Outcome.NO_USER

    world.outcome = outcome
    async with mirror(world, tmp_path, protected=False) as peer:
        async with asyncio.timeout(5):
            await peer.catch_up(world.protect, everyone=True, binding="one", merge=True)
        assert world.mode == "protected"


async def test_a_name_that_nodes_do_not_take_is_a_finding_and_the_peer_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example one with a mark of its file's encoding before it."""
    monkeypatch.setattr(module, "RETRY_DELAY", (0.001, 0.001))
    monkeypatch.setattr(module, "HELD_PAUSE", 0.1)
    world = World()
    world.known.add("\ufeffu9")
    async with mirror(world, tmp_path, protected=False) as peer:
        catch_up = asyncio.create_task(peer.catch_up(world.protect, everyone=True, binding="one"))
        await until(lambda: list(peer.findings) == ["\ufeffu9"])
        assert "no name for a user" in peer.findings["\ufeffu9"]
        assert {user for user, _ in world.syncs} == world.known - {"\ufeffu9"}
        assert world.lost is None
        world.known.discard("\ufeffu9")
        await asyncio.wait_for(catch_up, 5)
        assert (world.mode, peer.findings) == ("protected", {})


async def test_a_change_that_is_late_does_not_wait_until_the_group_is_protected(
    tmp_path: Path,
) -> None:
    """That may take as long as the coordinator is away, or as the last message of the queue."""
    world = World()
    given_up = asyncio.Event()

    async def protect() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            given_up.set()

    async with mirror(world, tmp_path, protected=False, patience=0.2) as peer:
        catch_up = asyncio.create_task(peer.catch_up(protect, everyone=True, binding="one"))
        await until(lambda: peer.phase is Phase.JOINING)
        world.delay = lambda user: 30.0
        async with asyncio.timeout(5):
            assert await change(world, peer, "u1") is Verdict.RECORDED
            assert await change(world, peer, "u2") is Verdict.RECORDED
            with pytest.raises(CatchUpFailed):
                await catch_up
        assert given_up.is_set()
        assert world.mode == "alone"


async def test_flags_of_an_earlier_run_are_synced(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path, protected=False) as peer:
        assert await change(world, peer, "u2") is Verdict.RECORDED
    world.remote.clear()
    async with mirror(world, tmp_path, protected=False) as peer:
        await peer.catch_up(world.protect, everyone=False, binding="one")
        assert world.remote["u2"] == 1
        assert peer._ledger.changed("mail-b") == []


async def test_failing_protect_leaves_it_alone(tmp_path: Path) -> None:
    world = World()

    async def refuse() -> None:
        raise OSError("disk full")

    async with mirror(world, tmp_path, protected=False) as peer:
        with pytest.raises(OSError, match="disk full"):
            await peer.catch_up(refuse, everyone=True, binding="one")
        assert peer.phase is Phase.RECORDING
        assert world.mode == "alone"


async def test_lost_while_protected_is_written(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path, protected=False) as peer:
        world.commit_delay = 0.1
        task = asyncio.create_task(peer.catch_up(world.protect, everyone=True, binding="one"))
        await asyncio.sleep(0.05)
        assert peer.phase is Phase.JOINING
        await peer.lose("gone")
        with pytest.raises(CatchUpFailed):
            await task
        assert world.mode == "alone", "of the two decisions, the later one is on disk"


async def test_stop_ends_all_waiting(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        whole = Mirror(world, world, {"mail-b": peer})
        world.delay = lambda user: 1.0
        waiting = asyncio.create_task(whole.changed("u1"))
        await asyncio.sleep(0.01)
        world.primary = False
        whole.stop()
        with pytest.raises(NotPrimary):
            await waiting
        with pytest.raises(NotPrimary):
            await whole.changed("u1")
        assert world.cuts == 1


async def test_all_users_take_turns_at_a_sync_from_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_INTERVAL", 0.02)
    world = World()
    async with mirror(world, tmp_path) as peer:
        world.syncs.clear()
        whole = Mirror(world, world, {"mail-b": peer})
        task = asyncio.create_task(whole._sweep())
        await until(lambda: len(world.syncs) >= 5)
        task.cancel()
        assert world.syncs[:5] == [(f"u{number}", "") for number in range(5)]
        assert peer.lag() == (0, 0.0), "a sweep is not a lag"


async def test_who_is_to_be_compared_from_scratch_while_a_sync_runs_is(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        world.syncs.clear()
        world.delay = lambda user: 0.05
        task = asyncio.create_task(change(world, peer, "u1"))
        await asyncio.sleep(0.01)
        peer.recheck(["u1"], deep=True)
        await task
        await until(lambda: not peer.running)
        assert world.syncs == [("u1", "state"), ("u1", "")]


async def test_who_goes_away_takes_nobodys_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = Ledger.flag

    async def slow(ledger: Ledger, peer: str, users: Sequence[str]) -> None:
        await asyncio.sleep(0.3 if users else 0.0)
        await flag(ledger, peer, users)

    monkeypatch.setattr(Ledger, "flag", slow)
    world = World()
    async with mirror(world, tmp_path, workers=3, patience=0.05) as peer:
        world.delay = lambda user: 5.0
        changes = [asyncio.create_task(peer.changed(f"u{number}")) for number in range(3)]
        await asyncio.sleep(0.2)  # the peer is lost, and they wait for their names on disk
        changes[1].cancel()
        answers = await asyncio.wait_for(asyncio.gather(*changes[::2]), 2)
        assert answers == [Verdict.RECORDED] * 2
        assert changes[1].cancelled()


async def test_nobody_is_protected_by_a_copy_that_cannot_be_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync that fails may have taken something from the copy that was acknowledged long ago."""
    monkeypatch.setattr(module, "HELD_PAUSE", 0.2)
    world = World()
    async with mirror(world, tmp_path) as peer:
        await world.protect()
        world.outcome = lambda user: Outcome.FAILED if user == "u1" else Outcome.SYNCED
        peer.recheck(["u1"], deep=True)
        await until(lambda: peer.phase is not Phase.PROTECTED)
        assert (world.mode, world.lost) == ("alone", False)
        catch_up = asyncio.create_task(peer.catch_up(world.protect, everyone=False, binding="one"))
        await until(lambda: peer.phase is Phase.CATCHING_UP and bool(peer.findings))
        assert world.mode == "alone"
        world.outcome = lambda user: Outcome.SYNCED
        await asyncio.wait_for(catch_up, 5)
        assert world.mode == "protected"


async def test_nobody_waits_behind_the_comparison_of_a_user_whose_state_was_lost(
    tmp_path: Path,
) -> None:
    """Its sync takes longer than a change waits: each of its changes would cost the peer again."""
    world = World()
    async with mirror(world, tmp_path, patience=0.1) as peer:
        world.outcome = lambda user: Outcome.FAILED
        task = asyncio.create_task(change(world, peer, "u1"))
        assert await task is Verdict.RECORDED
        await until(lambda: not peer.running)
        world.outcome = lambda user: Outcome.SYNCED
        world.delay = lambda user: 0.5
        catch_up = asyncio.create_task(peer.catch_up(world.protect, everyone=False, binding="one"))
        await asyncio.sleep(0.05)
        began = monotonic()
        assert await change(world, peer, "u1") is Verdict.RECORDED
        assert monotonic() - began < 0.1
        await asyncio.sleep(0.6)
        world.delay = lambda user: 0.0
        await catch_up
        assert world.mode == "protected"


def test_next_phase() -> None:
    assert next_phase(Phase.CATCHING_UP, 100, 8, True) is Phase.CATCHING_UP
    assert next_phase(Phase.CATCHING_UP, 8, 8, True) is Phase.JOINING
    assert next_phase(Phase.CATCHING_UP, 100, 8, False) is Phase.JOINING
    assert next_phase(Phase.CATCHING_UP, 0, 8, True) is Phase.PROTECTED
    assert next_phase(Phase.JOINING, 1, 8, False) is Phase.JOINING
    assert next_phase(Phase.JOINING, 0, 8, False) is Phase.PROTECTED
    assert next_phase(Phase.RECORDING, 0, 8, False) is Phase.RECORDING


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_hand_over_leaves_no_gap(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random traffic and faults: while the disk says protected, nothing acknowledged is missing."""
    path = tmp_path_factory.mktemp("ledger")
    dice = random.Random(seed)
    world = World()
    acknowledged: Counter[str] = Counter()

    async def client(peer: PeerMirror, user: str) -> None:
        for _ in range(15):
            world.local[user] += 1
            mine = world.local[user]
            await peer.changed(user)
            acknowledged[user] = max(acknowledged[user], mine)
            assert world.mode != "protected" or world.remote[user] >= acknowledged[user]
            await asyncio.sleep(dice.choice([0, 0.001, 0.004]))

    async def protect() -> None:
        await asyncio.sleep(dice.choice([0, 0.002]))
        missing = {user for user in acknowledged if world.remote[user] < acknowledged[user]}
        assert not missing
        world.mode = "protected"

    async def cluster(peer: PeerMirror) -> None:
        while True:
            try:
                await peer.catch_up(protect, everyone=False, binding="one")
            except CatchUpFailed:
                await asyncio.sleep(0.002)
            while peer.phase is Phase.PROTECTED:  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    async def scenario() -> None:
        world.delay = lambda user: dice.choice([0, 0.001, 0.003])
        world.outcome = lambda user: dice.choices(
            [Outcome.SYNCED, Outcome.CHANGED, Outcome.LOST], [10, 2, 1]
        )[0]
        async with mirror(world, path, patience=0.02, protected=False) as peer:
            task = asyncio.create_task(cluster(peer))
            users = [dice.choice(sorted(world.known)) for _ in range(6)]
            await asyncio.wait_for(asyncio.gather(*(client(peer, user) for user in users)), 20)
            world.outcome = lambda user: Outcome.SYNCED
            async with asyncio.timeout(10):
                while peer.phase is not Phase.PROTECTED:  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert all(world.remote[user] >= count for user, count in acknowledged.items())
            assert peer.waiting == 0
            assert world.most <= 2

    asyncio.run(scenario())


async def test_a_change_that_missed_the_agent_degrades_until_it_is_synced(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        world.local["u1"] += 1
        await peer.missed(["u1"])
        assert world.mode == "alone"
        assert peer._ledger.changed("mail-b") == ["u1"]
        assert peer.lag()[0] == 1
        await peer.catch_up(world.protect, everyone=False, binding="one")
        assert world.mode == "protected"
        assert world.remote["u1"] == 1
        assert peer.lag() == (0, 0.0)


async def test_what_went_unasked_is_copied_and_excuses_no_longer_than_nobody_waits(
    tmp_path: Path,
) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        assert not await peer.excused(), "changes wait for it"
        await peer.keep_to(Phase.CATCHING_UP, set(), "asynchronous")
        assert await peer.excused()
        assert world.mode == "alone"
        task = asyncio.create_task(peer.catch_up(world.protect, everyone=False, binding="one"))
        await asyncio.sleep(0.01)
        world.local["u1"] += 1
        peer.follow(["u1"])
        assert peer.lag()[0] == 1
        async with asyncio.timeout(10):
            while world.remote["u1"] != 1 or peer.lag()[0]:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        assert world.mode == "alone"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_who_changes_all_the_time_is_not_copied_all_the_time_when_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHANGED_REST", 0.1)
    world = World()
    async with mirror(world, tmp_path) as peer:
        await peer.keep_to(Phase.CATCHING_UP, set(), "asynchronous")
        task = asyncio.create_task(peer.catch_up(world.protect, everyone=False, binding="one"))
        await asyncio.sleep(0.01)
        before = len(world.syncs)
        world.local["u1"] += 1
        world.outcome = lambda user: Outcome.CHANGED
        peer.follow(["u1"])
        await asyncio.sleep(0.25)
        assert 2 <= len(world.syncs) - before <= 3
        assert (peer.lag()[0], peer.busy, peer.findings) == (1, False, {})
        # Somebody hurries now, such as a switchover.
        world.outcome = lambda user: Outcome.SYNCED
        monkeypatch.setattr(module, "CHANGED_REST", 60)
        await peer.keep_to(Phase.PROTECTED, set(), "")
        await asyncio.wait_for(task, 5)
        assert (peer.phase, world.remote["u1"]) == (Phase.PROTECTED, 1)


async def test_mirroring_is_one_way(tmp_path: Path) -> None:
    """Two-way inside a notification undid a RENAME of the primary (Dovecot 2.4.1)."""
    world = World()
    async with mirror(world, tmp_path) as peer:
        await change(world, peer, "u1")
        assert world.kinds
        assert not any(merge for _, merge in world.kinds)


async def test_a_peer_that_may_have_mail_of_its_own_is_merged_first(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path, protected=False) as peer:
        await peer.catch_up(world.protect, everyone=True, binding="one", merge=True)
        for user in world.known:
            assert [merge for name, merge in world.kinds if name == user] == [True, True, False]
        world.kinds.clear()
        await change(world, peer, "u1")
        assert world.kinds == [("u1", False)]


async def test_a_merge_that_failed_is_made_before_the_peer_becomes_a_copy(tmp_path: Path) -> None:
    world = World()
    lost = {"u2"}
    world.outcome = lambda user: Outcome.LOST if user in lost else Outcome.SYNCED
    async with mirror(world, tmp_path, protected=False) as peer:
        with pytest.raises(CatchUpFailed):
            await peer.catch_up(world.protect, everyone=True, binding="one", merge=True)
        assert (("u2", False)) not in world.kinds
        lost.clear()
        world.kinds.clear()
        await peer.catch_up(world.protect, everyone=True, binding="one", merge=True)
        assert [merge for name, merge in world.kinds if name == "u2"] == [True, True, False]


async def test_a_large_message_may_take_longer_than_the_timeout_while_it_moves(
    tmp_path: Path,
) -> None:
    world = World()
    async with mirror(world, tmp_path, patience=0.2) as peer:
        world.delay = lambda user: 0.5
        task = asyncio.create_task(change(world, peer, "u1"))
        for _ in range(10):
            world.moved = time.monotonic()
            await asyncio.sleep(0.05)
        assert await task is Verdict.MIRRORED


async def test_moving_on_has_a_bound_too(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path, patience=0.1) as peer:
        world.delay = lambda user: 3.0
        task = asyncio.create_task(change(world, peer, "u1"))
        began = time.monotonic()
        while not task.done() and time.monotonic() - began < 2:
            world.moved = time.monotonic()
            await asyncio.sleep(0.02)
        assert await task is Verdict.RECORDED
        assert world.mode == "alone"


async def limited(
    peer: PeerMirror, limit: Phase, suspended: set[str] | None = None, reason: str = "wanted"
) -> None:
    await peer.keep_to(limit, suspended or set(), reason)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_the_first_change_of_a_term_blames_nobody_who_catches_up(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path, protected=False) as peer:
        assert await change(world, peer, "u1") is Verdict.RECORDED
        assert world.lost is False
        peer.stop()  # another term
        world.lost, world.delay = None, lambda user: 0.05
        catch_up = asyncio.create_task(peer.catch_up(world.protect, everyone=True, binding="one"))
        await until(lambda: peer.phase is Phase.CATCHING_UP)
        assert await change(world, peer, "u1") is Verdict.RECORDED
        assert world.lost is False
        await catch_up
        await peer.lose("it does not answer")
        assert world.lost is True


async def test_asynchronous_never_waits_and_copies_all(tmp_path: Path) -> None:
    world = World()
    copied = 0

    async def count() -> None:
        nonlocal copied
        copied += 1

    async with mirror(world, tmp_path, protected=False) as peer:
        await limited(peer, Phase.CATCHING_UP)
        catch_up = asyncio.create_task(
            peer.catch_up(world.protect, everyone=True, binding="one", copied=count)
        )
        await until(lambda: copied == 1)
        world.delay = lambda user: 0.05
        world.local["u1"] += 1
        assert await peer.changed("u1") is Verdict.RECORDED
        assert world.remote["u1"] == 0, "nobody waited"
        changes, seconds = peer.lag()
        assert changes == 1
        assert 0 <= seconds < 1
        await until(lambda: world.remote["u1"] == 1)
        await until(lambda: peer.lag() == (0, 0.0))
        assert world.mode == "alone"
        assert peer.steady
        # A switchover wants everything there: now changes wait.
        await limited(peer, Phase.PROTECTED)
        await catch_up
        assert world.mode == "protected"
        assert copied == 1
        assert await change(world, peer, "u2") is Verdict.MIRRORED
        await limited(peer, Phase.CATCHING_UP)
        assert (world.mode, world.lost) == ("alone", False)
        assert peer.phase is Phase.RECORDING


async def test_a_suspended_user_is_recorded_and_the_others_wait(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        await limited(peer, Phase.JOINING, {"u1"})
        assert (world.mode, world.lost) == ("alone", False)
        catch_up = asyncio.create_task(peer.catch_up(world.protect, everyone=False, binding="one"))
        await until(lambda: peer.phase is Phase.JOINING)
        world.syncs.clear()
        assert await change(world, peer, "u1") is Verdict.RECORDED
        assert await change(world, peer, "u2") is Verdict.MIRRORED
        peer.recheck(["u1"])
        await asyncio.sleep(0.05)
        assert {user for user, _ in world.syncs} == {"u2"}
        assert peer._ledger.changed("mail-b") == ["u1"]
        with pytest.raises(CatchUpFailed, match="suspended"):
            await peer.resync("u1", nothing)
        # One more, while the others wait: the catch-up goes on.
        await limited(peer, Phase.JOINING, {"u1", "u3"})
        await until(lambda: peer.phase is Phase.JOINING)
        assert await change(world, peer, "u3") is Verdict.RECORDED
        assert await change(world, peer, "u2") is Verdict.MIRRORED
        assert not catch_up.done()
        await limited(peer, Phase.PROTECTED)
        await catch_up
        assert world.mode == "protected"
        assert world.remote == world.local
        await until(lambda: peer._ledger.changed("mail-b") == [])


async def test_who_waits_when_his_mirror_is_suspended_is_answered(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        world.delay = lambda user: 0.3
        task = asyncio.create_task(change(world, peer, "u1"))
        await asyncio.sleep(0.05)
        await limited(peer, Phase.JOINING, {"u1"})
        assert await asyncio.wait_for(task, 0.1) is Verdict.RECORDED


async def test_a_suspended_group_copies_nothing(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        await limited(peer, Phase.RECORDING)
        assert (world.mode, world.lost) == ("alone", False)
        world.syncs.clear()
        assert await change(world, peer, "u1") is Verdict.RECORDED
        await asyncio.sleep(0.05)
        assert not world.syncs
        assert peer._ledger.changed("mail-b") == ["u1"]
        await limited(peer, Phase.PROTECTED)
        await peer.catch_up(world.protect, everyone=False, binding="one")
        assert world.remote == world.local


async def test_suspending_the_group_ends_a_catch_up(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path, protected=False) as peer:
        world.delay = lambda user: 0.5
        catch_up = asyncio.create_task(peer.catch_up(world.protect, everyone=True, binding="one"))
        await until(lambda: peer.phase is Phase.CATCHING_UP)
        await limited(peer, Phase.RECORDING)
        with pytest.raises(CatchUpFailed, match="wanted"):
            await catch_up


async def nothing() -> None: ...


async def test_a_repair_is_prepared_while_nothing_else_of_the_user_is_copied(
    tmp_path: Path,
) -> None:
    world = World()
    refused = 2

    async def prepare() -> None:
        nonlocal refused
        assert "u1" not in world.running
        count = len(world.syncs)
        changed = asyncio.create_task(change(world, peer, "u1"))
        await asyncio.sleep(0.02)
        assert len(world.syncs) == count
        changes.append(changed)
        refused -= 1
        if refused >= 0:
            raise DoveadmError("not now") if refused else PeerError("dovecot", "not now")

    changes: list[asyncio.Task[Verdict]] = []
    async with mirror(world, tmp_path) as peer:
        world.syncs.clear()
        await peer.resync("u1", prepare)
        assert len(changes) == 3
        assert {await changed for changed in changes} == {Verdict.MIRRORED}
        assert world.syncs[0] == ("u1", "")


@pytest.mark.parametrize("outcome", [Outcome.UNSAFE, Outcome.FAILED])
async def test_a_repair_for_which_the_copy_is_made_anew_waits_for_that(
    tmp_path: Path, outcome: Outcome
) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        outcomes = iter([outcome])
        world.outcome = lambda user: next(outcomes, Outcome.SYNCED)
        world.begun = True
        repair = asyncio.create_task(peer.resync("u1", nothing))
        await until(lambda: world.mode == "alone")
        await asyncio.sleep(2 * module.RESYNC_LOOK)
        assert not repair.done()
        await peer.catch_up(world.protect, everyone=False, binding="one")
        await asyncio.wait_for(repair, 5)
        await peer.lose("the line is down")
        with pytest.raises(CatchUpFailed, match="the line is down"):
            await peer.resync("u1", nothing)


async def test_resync_compares_without_a_state(tmp_path: Path) -> None:
    world = World()
    async with mirror(world, tmp_path) as peer:
        await change(world, peer, "u1")
        world.syncs.clear()
        await peer.resync("u1", nothing)
        assert ("u1", "") in world.syncs
        world.outcome = lambda user: Outcome.NO_USER
        with pytest.raises(CatchUpFailed, match="does not know"):
            await peer.resync("u1", nothing)
        with pytest.raises(CatchUpFailed, match=r"nothing is copied to mail-b now: .*u1"):
            await peer.resync("u2", nothing)


async def test_the_first_round_is_over_when_everybody_had_a_turn(tmp_path: Path) -> None:
    world = World()
    copied = asyncio.Event()

    async def say() -> None:
        copied.set()

    async with mirror(world, tmp_path, protected=False) as peer:
        world.delay = lambda user: 2.0 if user == "u0" else 0.001
        catch_up = asyncio.create_task(
            peer.catch_up(world.protect, everyone=True, binding="one", copied=say)
        )
        await until(lambda: peer.progress()["done"] == 4)
        for number in range(8):
            # The others have many turns meanwhile, which count for nothing.
            assert await change(world, peer, f"u{1 + number % 4}") is Verdict.RECORDED
        assert not copied.is_set()
        assert peer.phase is Phase.CATCHING_UP
        assert peer.progress()["done"] == 4
        assert peer.progress()["total"] == 5
        await catch_up
        assert copied.is_set()
        assert world.remote == world.local


@asynccontextmanager
async def two_mirrors(
    path: Path, copies: int, world: Callable[[], World] = World
) -> AsyncIterator[tuple[Mirror, dict[str, World], dict[str, PeerMirror]]]:
    worlds = {name: world() for name in ("mail-b", "mail-c")}
    ledger = Ledger(path, path)
    await ledger.open()
    peers = {
        name: PeerMirror(name, world, ledger, world, world, workers=2, timeout=0.5)
        for name, world in worlds.items()
    }
    first = worlds["mail-b"]
    both = Mirror(first, first, peers, copies=copies)
    task = asyncio.create_task(both.run())
    await asyncio.sleep(0)
    try:
        yield both, worlds, peers
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await ledger.close()


async def test_one_shadow_is_waited_for_and_the_other_follows(tmp_path: Path) -> None:
    async with two_mirrors(tmp_path, 1) as (both, worlds, peers):
        b, c = worlds["mail-b"], worlds["mail-c"]
        await limited(peers["mail-c"], Phase.CATCHING_UP)
        follows = asyncio.create_task(
            peers["mail-c"].catch_up(c.protect, everyone=True, binding="one")
        )
        await peers["mail-b"].catch_up(b.protect, everyone=True, binding="one")
        await until(lambda: peers["mail-c"].lag()[0] == 0)
        c.delay = lambda user: 0.2
        for world in (b, c):
            world.local["u1"] += 1
        started = time.monotonic()
        assert await both.changed("u1") is Verdict.MIRRORED
        assert time.monotonic() - started < 0.15, "nobody waits for the one that follows"
        assert b.remote["u1"] == 1
        assert c.remote["u1"] == 0
        assert peers["mail-c"].lag()[0] == 1
        await until(lambda: c.remote["u1"] == 1)
        await until(lambda: peers["mail-c"].lag()[0] == 0)
        await limited(peers["mail-c"], Phase.PROTECTED)
        await follows
        assert peers["mail-c"].phase is Phase.PROTECTED, "it can take the other's place"


async def test_without_a_peer_there_is_no_copy() -> None:
    world = World()
    assert await Mirror(world, world, {}).changed("u1") is Verdict.RECORDED


async def test_two_copies_are_waited_for(tmp_path: Path) -> None:
    async with two_mirrors(tmp_path, 2) as (both, worlds, peers):
        for name, peer in peers.items():
            await peer.catch_up(worlds[name].protect, everyone=True, binding="one")
        for world in worlds.values():
            world.local["u1"] += 1
        assert await both.changed("u1") is Verdict.MIRRORED
        assert all(world.remote["u1"] == 1 for world in worlds.values())
        await peers["mail-c"].lose("gone")
        assert await both.changed("u1") is Verdict.RECORDED


class Locked(World):
    """Its syncs lock the user's mailboxes on this node, as dsync does."""

    def __init__(self, locks: dict[str, asyncio.Lock]) -> None:
        super().__init__()
        self.locks = locks
        self.tasks: dict[str, asyncio.Task[SyncResult]] = {}

    async def _sync(self, user: str, state: str, merge: bool, mailbox: str | None) -> SyncResult:
        task = self.tasks[user] = asyncio.create_task(self._locked(user, state, merge, mailbox))
        try:
            await asyncio.wait({task})
        finally:
            del self.tasks[user]
            task.cancel()
        return SyncResult(Outcome.GAVE_WAY) if task.cancelled() else task.result()

    async def _locked(self, user: str, state: str, merge: bool, mailbox: str | None) -> SyncResult:
        async with self.locks.setdefault(user, asyncio.Lock()):
            return await super()._sync(user, state, merge, mailbox)

    def cut(self, user: str = "") -> None:
        if user in self.tasks:
            self.tasks[user].cancel()


@asynccontextmanager
async def one_follows(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, rest: float, ways: int = 50, merge: bool = False
) -> AsyncIterator[tuple[Callable[[], Awaitable[Verdict]], World, World, PeerMirror]]:
    """The first is waited for, the second follows, and its sync of u1 does not end."""
    monkeypatch.setattr(module, "MAKE_WAY", 0.05)
    monkeypatch.setattr(module, "MADE_WAY_REST", rest)
    monkeypatch.setattr(module, "WAYS", ways)
    locks: dict[str, asyncio.Lock] = {}
    async with two_mirrors(path, 1, lambda: Locked(locks)) as (both, worlds, peers):
        b, c = worlds.values()
        peer = peers["mail-c"]
        await limited(peer, Phase.CATCHING_UP)
        await peers["mail-b"].catch_up(b.protect, everyone=True, binding="one")
        c.delay = lambda user: 60 if user == "u1" else 0
        follows = asyncio.create_task(
            peer.catch_up(c.protect, everyone=True, binding="one", merge=merge)
        )
        await until(lambda: "u1" in c.running)

        async def change() -> Verdict:
            for world in (b, c):
                world.local["u1"] += 1
            return await asyncio.wait_for(both.changed("u1"), 5)

        try:
            yield change, b, c, peer
        finally:
            follows.cancel()
            await asyncio.gather(follows, return_exceptions=True)


async def test_a_sync_that_nobody_waits_for_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with one_follows(tmp_path, monkeypatch, rest=0.3) as (change, b, c, peer):
        await until(lambda: peer.behind == 1)
        before = len(c.syncs)
        assert await change() is Verdict.MIRRORED
        assert b.remote["u1"] == 1
        assert b.lost is None, "it was never given up"
        # It rests, whatever else changes, so that it does not stand in the way of the next ones.
        for _ in range(3):
            assert await change() is Verdict.MIRRORED
        assert len(c.syncs) == before
        assert (peer.phase, peer.behind) == (Phase.CATCHING_UP, 1)
        c.delay = lambda user: 0
        await until(lambda: c.remote["u1"] == 4)
        await until(lambda: peer.behind == 0)
        assert c.syncs[before:] == [("u1", "")], "from scratch"
        assert c.lost is False, "nothing is wrong with it"
        assert (peer.findings, peer._attempts, peer._ways) == ({}, {}, {})


async def test_steady_changes_do_not_keep_a_user_from_the_one_that_follows_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with one_follows(tmp_path, monkeypatch, rest=0.1, ways=2) as (change, _, c, _):
        for _ in range(2):
            await until(lambda: "u1" in c.running)
            assert await change() is Verdict.MIRRORED
        c.delay = lambda user: 0.8  # it rests now
        await until(lambda: "u1" in c.running)
        assert await change() is Verdict.RECORDED, "it is left to its end now"
        await until(lambda: c.remote["u1"] == 3)


async def test_a_merge_is_not_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with one_follows(tmp_path, monkeypatch, rest=0, merge=True) as (_, _, c, peer):
        peer.make_way("u1")
        await asyncio.sleep(0.05)
        assert "u1" in c.running


async def test_who_is_waited_for_gives_no_way(tmp_path: Path) -> None:
    world = Locked({})
    async with mirror(world, tmp_path) as peer:
        peer.make_way("u1")  # none runs
        world.delay = lambda user: 0.1
        task = asyncio.create_task(change(world, peer, "u1"))
        await until(lambda: "u1" in world.running)
        before = len(world.syncs)
        peer.make_way("u1")
        assert await task is Verdict.MIRRORED
        assert len(world.syncs) == before


async def test_a_repair_that_gives_way_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = 0

    async def prepare() -> None:
        nonlocal prepared
        prepared += 1

    async with one_follows(tmp_path, monkeypatch, rest=0.1) as (change, _, c, peer):
        peer.make_way("u1")
        repair = asyncio.create_task(peer.resync("u1", prepare))
        await until(lambda: prepared == 1 and "u1" in c.running)
        assert await change() is Verdict.MIRRORED
        assert not repair.done()
        c.delay = lambda user: 0
        await asyncio.wait_for(repair, 5)
        assert (c.remote["u1"], prepared) == (1, 1)


async def test_a_sync_from_scratch_that_something_changed_under_is_made_from_scratch_again(
    tmp_path: Path,
) -> None:
    """With a state, flags and scripts would not be compared any more."""
    world = World()
    world.known = {"u1"}
    answers = iter([Outcome.CHANGED])
    world.outcome = lambda user: next(answers, Outcome.SYNCED)
    async with mirror(world, tmp_path, protected=False) as peer:
        await peer.catch_up(world.protect, everyone=True, binding="one")
        assert world.syncs == [("u1", ""), ("u1", "")]
        answers = iter([Outcome.CHANGED])
        await asyncio.wait_for(peer.changed("u1"), 2)
        assert world.syncs[2:] == [("u1", "state"), ("u1", "state")]


async def test_two_peers_say_as_one_that_this_node_may_not_acknowledge(tmp_path: Path) -> None:
    async with two_mirrors(tmp_path, 2) as (both, worlds, peers):
        for name, peer in peers.items():
            await peer.catch_up(worlds[name].protect, everyone=True, binding="one")
            worlds[name].delay = lambda user: 5
        asked = asyncio.create_task(both.changed("u1"))
        await asyncio.sleep(0.05)
        both.stop()
        with pytest.raises(NotPrimary):
            await asked
