"""Mirror before OK: a change waits here until the peers have it, or are on record as lacking it.

Each peer has a phase:

* ``RECORDING``: the group does not wait for this peer. A change is noted on disk, then answered.
  Nothing is synced.
* ``CATCHING_UP``: the same, and the noted users are synced.
* ``JOINING``: new changes wait for their sync, while the last noted ones are synced. So the noted
  ones can only become fewer.
* ``PROTECTED``: entered when nothing is noted, and after that was written down by the cluster. All
  changes wait.

How far a peer gets may be limited by an operator, see ``PeerMirror.keep_to``.

From anywhere back to ``RECORDING``: as soon as one change has waited for ``timeout`` seconds, or
the peer is lost. First the cluster makes the group alone, durably; then the users of all changes
that wait are noted on disk; then these are answered, all at once. Nobody waits again until the
peer has caught up.

What happens if the agent dies: in ``RECORDING`` and ``CATCHING_UP`` nothing was answered that is
not on disk as noted. In ``JOINING`` and ``PROTECTED`` nothing was answered that the peer does not
have. What was not answered was not acknowledged; it is found when all users are compared after
the start.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from enum import Enum
from time import monotonic
from typing import Protocol

from umbra.mailbox import metrics
from umbra.mailbox.carrier import valid_user
from umbra.mailbox.doveadm import DoveadmError, Outcome, SyncResult
from umbra.mailbox.ledger import Ledger
from umbra.mailbox.mirror_queue import MirrorQueue
from umbra.peer.exchange import PeerError
from umbra.transport.ports import NotPrimary

log = logging.getLogger(__name__)

# A sync that failed for another reason than a lost peer is tried again after this long (seconds),
# doubled each time up to the second value.
RETRY_DELAY = (0.05, 1.0)
# A user for whom nobody waits is put aside as unmirrorable after so many failures,
ATTEMPTS = 5
# or after so many syncs in a row that were overtaken by further changes.
CHANGED_ATTEMPTS = 50
# So often (seconds) those who were put aside are tried again.
HELD_PAUSE = 10.0
# How often it is looked whether a sync that a person asked for is done (seconds).
RESYNC_LOOK = 0.05
# Each user's mailboxes are compared without a state once in this time (seconds), spread evenly.
DEEP_PERIOD = 24 * 3600.0
# and so often (seconds) it is looked whose turn has come, and who has had single mailboxes synced.
SWEEP_INTERVAL = 60.0
# A user who changes more while being copied, and whom nobody waits for, is not copied again for so
# long (seconds).
CHANGED_REST = 1.0
# dsync locks what it copies. So a sync for which nobody waits gives way when a change of the same
# user has waited so long for another peer (seconds), well before that one would be given up,
MAKE_WAY = 1.0
# is not tried again for so long (seconds), which bounds how often a user's changes are held up,
MADE_WAY_REST = 10.0
# and after so many times in a row is left to its end, even if the other peer is given up by it:
# else somebody who changes all the time would never get to this one. A large mailbox comes in parts
# before that, for dsync keeps what it has saved.
WAYS = 50
# How often it is looked whether this node may act (seconds).
RIGHT_LOOK = 0.05
# A change whose sync moves on waits for so many times the time-out in all, but for less than
# Dovecot's script waits for the answer (mail_server_notify_timeout, 30 s).
PATIENCE = 4
LONGEST = 29.0


class CatchUpFailed(Exception):
    """The peer could not catch up, or a user not be copied; the text says why."""


class Group(Protocol):
    """What the mirror asks of the cluster."""

    def is_primary(self) -> bool:
        """Return whether this node may acknowledge changes now."""

    async def mirror_failed(self, peer: str, reason: str, *, lost: bool = True) -> None:
        """Make the group alone durably; harmless if it is.

        An exception means that nothing may be acknowledged. ``lost``: the peer is to blame, so
        nothing else is sent to it either before it has caught up.
        """

    def begin_work(self) -> AbstractContextManager[None]:
        """Hold back a change of role for as long as the context lasts."""


class Users(Protocol):
    """What the mirror asks of the local Dovecot."""

    async def users(self) -> list[str]:
        """Return all users. DoveadmError if Dovecot does not answer."""

    async def exists(self, user: str) -> bool:
        """Return whether there is such a user. DoveadmError if Dovecot does not answer."""


class Carrier(Protocol):
    """Runs syncs to one peer."""

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        """Make ``user`` at the peer what it is here; with ``merge``, bring both together.

        :param apart: mailboxes that a merge leaves as they are on both nodes.
        """

    def progress(self, user: str) -> float:
        """Return when data of the running sync of ``user`` last moved, on the monotonic clock."""

    def cut(self, user: str = "") -> None:
        """Break all syncs that run; or that of ``user`` if it runs, which ends as GAVE_WAY."""


class Single(Protocol):
    """Runs syncs of single mailboxes to one peer."""

    async def sync_mailbox(self, user: str, state: str, mailbox: str) -> SyncResult | None:
        """Make one mailbox at the peer what it is here; None if all of the user's have to be."""


Inherited = Callable[[str], Awaitable[str]]
"""Gives the state in which the primary before this one left a user's mailboxes here, or ""."""


Preparation = Callable[[], Awaitable[None]]
"""What has to be done before a sync. DoveadmError or PeerError if it cannot be."""


class Phase(Enum):
    """See the module."""

    RECORDING = "recording"
    CATCHING_UP = "catching-up"
    JOINING = "joining"
    PROTECTED = "protected"

    @property
    def rank(self) -> int:
        """How far it is on the way to protected."""
        return list(Phase).index(self)

    @property
    def waits(self) -> bool:
        """Whether a change waits for this peer."""
        return self in (Phase.JOINING, Phase.PROTECTED)


class Verdict(Enum):
    """Why a change may be acknowledged."""

    MIRRORED = "mirrored"
    RECORDED = "recorded"


def next_phase(phase: Phase, noted: int, few: int, first_round: bool) -> Phase:
    """The rule of the hand-over from "note it" to "wait for it".

    :param noted: users with changes that the peer lacks and that nobody waits for.
    :param few: how many of them may be left when waiting begins.
    :param first_round: whether users of the first round are left. Without the second condition
        steady traffic could put off the end for ever.
    """
    if phase is Phase.CATCHING_UP and (noted <= few or not first_round):
        phase = Phase.JOINING
    if phase is Phase.JOINING and noted == 0:
        phase = Phase.PROTECTED
    return phase


async def entitled(ask: Callable[[], Awaitable[Verdict]], until: Callable[[], float]) -> Verdict:
    """Ask until the change may be acknowledged; NotPrimary if it still may not at ``until``.

    It is committed, so whatever Dovecot is answered, the client is told OK, unless it cannot be
    reached any more. An agent that has just started does not know its right yet, while the ports
    are open for the one before it.

    :param until: tells when the ports are closed for sure, on the monotonic clock: later with each
        look at which the node had its right, while the change waits.
    """
    while True:
        try:
            return await ask()
        except NotPrimary:
            if monotonic() >= until():
                raise
        await asyncio.sleep(RIGHT_LOOK)


class PeerMirror:
    """The mirror to one peer.

    :param timeout: how long a change waits while its sync does not move on (seconds) before the
        group is made alone.
    """

    def __init__(
        self,
        peer: str,
        group: Group,
        ledger: Ledger,
        users: Users,
        carrier: Carrier,
        single: Single | None = None,
        *,
        workers: int,
        timeout: float,
    ) -> None:
        self.peer = peer
        self.phase = Phase.RECORDING
        self.limit = Phase.PROTECTED
        self.findings: dict[str, str] = {}
        self.done = 0
        self.total = 0
        self._group = group
        self._ledger = ledger
        self._users = users
        self._carrier = carrier
        self._single = single
        self._parted: set[str] = set()  # whose last sync was of a single mailbox
        self._few = 4 * workers
        self._timeout = timeout
        self._queue: MirrorQueue[int] = MirrorQueue(workers)
        self._tickets: dict[int, asyncio.Future[Verdict]] = {}
        self._arrived: dict[int, float] = {}
        self._number = 0
        self._noted_at: dict[str, float] = {}
        self._attempts: dict[str, int] = {}
        self._ways: dict[str, int] = {}  # how often in a row the sync of a user gave way
        self._rests: dict[str, asyncio.TimerHandle] = {}
        self._unmerged: set[str] = set()
        self._inherited: Inherited | None = None
        self._without: set[str] = set()  # who has no use for an inherited state any more
        self._deep: set[str] = set()  # whose next sync is to be from scratch
        self._scratch: set[str] = set()  # whose sync is from scratch, or the next one will be
        self._unsafe: set[str] = set()  # whose copy cannot be relied on before the next sync
        self._before: dict[str, Preparation] = {}
        self._first_round: set[str] = set()
        self._progress = asyncio.Event()
        self._reason = "the agent has just started"
        self._lost = True
        self._commit = (
            asyncio.Lock()
        )  # the order of "alone" and "protected" on disk is that of the decisions
        self._alone: asyncio.Task[None] | None = None  # done without error: "alone" is on disk
        self._protecting: asyncio.Future[None] | None = None  # the last one
        self._works: set[asyncio.Task[None]] = set()
        self._tasks: asyncio.TaskGroup | None = None
        self._syncs: set[asyncio.Task[None]] = set()
        self._started = 0.0
        metrics.watch(self)

    async def run(self) -> None:
        """Run syncs until cancelled."""
        self._note(self._ledger.changed(self.peer))
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._pump()
                await asyncio.get_running_loop().create_future()
        finally:
            self._tasks = None
            await asyncio.gather(*self._works, return_exceptions=True)

    # changes

    async def changed(self, user: str, mailbox: str = "") -> Verdict:
        """A change of ``user`` was committed: return when it may be acknowledged.

        Whatever ``Group.mirror_failed`` raises comes through: then it may not.

        :param mailbox: where messages have changed and nothing else, "" if that is not known.
        """
        if not self.phase.waits or user in self._queue.suspended:
            # Noted before the first await, so that the hand-over cannot miss it.
            self.follow([user])
            await self._be_alone()
            # Asynchronous on purpose: an agent that dies compares all users when it starts.
            if self.limit is not Phase.CATCHING_UP:
                await self._ledger.flag(self.peer, [user])
            return Verdict.RECORDED
        self._number += 1
        number = self._number
        self._tickets[number] = future = asyncio.get_running_loop().create_future()
        self._arrived[number] = monotonic()
        self._queue.wait(user, number, mailbox)
        self._pump()
        arrived = self._arrived[number]
        while not future.done():
            # A large message may take its time as long as it moves.
            moved = max(arrived, self._carrier.progress(user))
            until = min(moved + self._timeout, arrived + min(PATIENCE * self._timeout, LONGEST))
            if (left := until - monotonic()) <= 0:
                await self.lose(f"a change of {user} did not get to {self.peer} in time")
                break
            # Not wait_for: if the caller goes away, the change must still be mirrored.
            await asyncio.wait({future}, timeout=left)
        # Whoever goes away here takes no answer from the others, who are given theirs in a row.
        return await asyncio.shield(future)

    async def keep_to(self, limit: Phase, suspended: set[str], reason: str) -> None:
        """Go no further than ``limit`` on the way to protected, from now on.

        ``RECORDING`` (suspended): nothing is copied. ``CATCHING_UP`` (asynchronous, or enough
        other shadows have each change): all is copied and nobody waits. ``JOINING``: all but the
        ``suspended`` users wait. Returns when the group is alone on disk, if that is what it means;
        whoever waited is answered.
        """
        former, self.limit = self.limit, limit
        news = suspended - self._queue.suspended
        self._queue.suspend(suspended)
        self._first_round -= suspended
        if limit not in (former, Phase.CATCHING_UP):
            self._queue.wake()
        if self.phase.rank > limit.rank or (news and self.phase.waits):
            await self.lose(reason, lost=False)
        self._progress.set()
        self._pump()

    def held_up(self, user: str) -> bool:
        """Return whether a change of ``user`` waits for this peer and its sync does not move."""
        still = monotonic() - self._carrier.progress(user) >= MAKE_WAY / 2
        return still and self._queue.awaited(user)

    def make_way(self, user: str) -> None:
        """A change of ``user`` waits for another peer: break off a sync that nobody waits for.

        Not while there is a merge to be made. It would be made again, but it writes on both nodes,
        where half of one is seen by clients; and it is short, being of what differs only.
        """
        left = user in self._unmerged or self._ways.get(user, 0) >= WAYS
        if not (self.phase.waits or left):
            self._carrier.cut(user)

    async def lose(self, reason: str, *, cut: bool = False, lost: bool = True) -> None:
        """The peer is lost or too slow: stop waiting for it.

        Returns when all who waited are answered.

        :param cut: also break the syncs that run, because they would hang.
        :param lost: False if nothing is wrong with the peer.
        """
        self._lost = lost
        if self.phase is not Phase.RECORDING:
            log.warning("mirror to %s: %s", self.peer, reason)
        users, tickets = self._stop_waiting(reason, cut=cut)
        await asyncio.shield(self._background(self._release(users, tickets, lost)))

    def stop(self) -> None:
        """End of this node's time as primary: whoever waits gets NotPrimary."""
        self._lost = True
        _, tickets = self._stop_waiting("this node is not primary", cut=True)
        # A sync has several steps, and a third node takes the next one for the new primary's.
        for task in self._syncs:
            task.cancel()
        self._alone = None
        for future in tickets:
            future.set_exception(NotPrimary())

    def _stop_waiting(
        self, reason: str, *, cut: bool
    ) -> tuple[list[str], list[asyncio.Future[Verdict]]]:
        if self.phase.waits:
            self._alone = None
        if self.phase is not Phase.RECORDING:
            self._reason = reason
        self.phase = Phase.RECORDING
        self._progress.set()
        if self._protecting is not None:
            self._protecting.cancel()
        if cut:
            self._carrier.cut()
        given = self._queue.withdraw()
        self._note(given)
        numbers = [number for of_user in given.values() for number in of_user]
        for number in numbers:
            del self._arrived[number]
        return list(given), [self._tickets.pop(number) for number in numbers]

    async def _release(
        self, users: list[str], tickets: list[asyncio.Future[Verdict]], lost: bool
    ) -> None:
        try:
            await self._be_alone(lost=lost)
            await self._ledger.flag(self.peer, users)
        except Exception as error:
            for future in tickets:
                future.set_exception(error)
        else:
            for future in tickets:
                future.set_result(Verdict.RECORDED)

    async def _be_alone(self, *, lost: bool = False) -> None:
        """Return when the group is alone on disk; tried again by each change until it works.

        :param lost: the peer is to blame. That a change does not wait for it is no reason.
        """
        if self._alone is None or (
            self._alone.done() and (self._alone.cancelled() or self._alone.exception())
        ):
            self._alone = self._background(self._commit_alone(lost))
        await asyncio.shield(self._alone)

    def _background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run ``work`` to its end even if the change that began it goes away."""
        task = asyncio.create_task(work)
        self._works.add(task)
        task.add_done_callback(self._works.discard)
        return task

    async def _commit_alone(self, lost: bool) -> None:
        async with self._commit:
            await self._group.mirror_failed(self.peer, self._reason, lost=lost)

    def _note(self, users: Iterable[str]) -> None:
        users = list(users)
        self._queue.note(users)
        now = monotonic()
        for user in users:
            self._noted_at.setdefault(user, now)

    # syncs

    def _pump(self) -> None:
        if self._tasks is None or self.phase is Phase.RECORDING:
            return
        while (user := self._queue.start()) is not None:
            name = f"sync {user} to {self.peer}"
            task = self._tasks.create_task(self._sync(user), name=name)
            self._syncs.add(task)
            number = self._queue.number(user)
            task.add_done_callback(functools.partial(self._ended, user, number))

    def _ended(self, user: str, number: int, task: asyncio.Task[None]) -> None:
        self._syncs.discard(task)
        if task.cancelled() and self._queue.number(user) == number:
            self._queue.again(user)

    async def _sync(self, user: str) -> None:
        started = monotonic()
        result = await self._one_sync(user)
        took = monotonic() - started
        metrics.SYNC_SECONDS.labels(self.peer).observe(took)
        metrics.SYNCS.labels(self.peer, result.outcome.value).inc()
        if result.outcome is not Outcome.GAVE_WAY:
            self._ways.pop(user, None)
        match result.outcome:
            case Outcome.SYNCED:
                self._settle(user, started)
            case Outcome.GAVE_WAY:
                # Nothing failed. What the peer has a part of comes from scratch the next time, and
                # until then the user is noted, so nobody relies on the copy.
                self._ways[user] = self._ways.get(user, 0) + 1
                log.info("sync of %s to %s: %s", user, self.peer, result.reason)
                self._rest(user, MADE_WAY_REST)
            case Outcome.CHANGED if self._unhurried(user):
                self._rest(user, CHANGED_REST)
            case Outcome.CHANGED if self._attempts.get(
                user, 0
            ) < CHANGED_ATTEMPTS or self._queue.awaited(user):
                self._attempts[user] = self._attempts.get(user, 0) + 1
                self._queue.again(user)
            case Outcome.LOST:
                self._queue.again(user)
                await self.lose(result.reason)
            case Outcome.UNSAFE:
                # From scratch, and nobody may rely on the copy meanwhile.
                self._unsafe.add(user)
                self._queue.again(user)
                if self.phase.waits:
                    await self.lose(result.reason, lost=False)
            case _:
                await self._failed(user, result)
        self._progress.set()
        self._pump()

    def _unhurried(self, user: str) -> bool:
        """Tell whether nobody waits for the copy of ``user``, now or soon."""
        hurried = user in self._first_round or self._queue.awaited(user)
        return self.limit is Phase.CATCHING_UP and not hurried

    def _rest(self, user: str, seconds: float) -> None:
        self._queue.rest(user)
        if (former := self._rests.pop(user, None)) is not None:
            former.cancel()
        self._rests[user] = asyncio.get_running_loop().call_later(seconds, self._rested, user)

    def _rested(self, user: str) -> None:
        del self._rests[user]
        self._queue.wake(user)
        self._pump()

    async def _odd(self, user: str) -> SyncResult:
        """Return what becomes of a name that nodes do not take from each other."""
        try:
            known = user in await self._users.users()
        except DoveadmError as error:
            return SyncResult.of(error)
        if known:
            return SyncResult(Outcome.FAILED, reason=f"{user!r} is no name for a user")
        self._unmerged.discard(user)
        return SyncResult(Outcome.SYNCED)  # there is nothing to mirror

    async def _one_sync(self, user: str) -> SyncResult:
        if not valid_user(user):
            return await self._odd(user)
        if user in self._unmerged:
            # Twice: of two INBOXes made independently the first sync only makes one mailbox.
            for _ in range(2):
                result = await self._carrier.sync(user, "", merge=True)
                if result.outcome is Outcome.EQUAL:
                    break
                if result.outcome is not Outcome.SYNCED:
                    return result
            self._unmerged.discard(user)
        if (prepare := self._before.get(user)) is not None:
            try:
                await prepare()
            except (DoveadmError, PeerError) as error:
                return SyncResult.of(error)
            self._before.pop(user, None)
        deep = user in self._deep
        self._deep.discard(user)
        state = "" if deep else await self._ledger.state(self.peer, user)
        if not (state or deep) and self._inherited is not None and user not in self._without:
            state = await self._inherited(user)
        # A sync that breaks off may have been applied in part, which the state does not tell: flags
        # of messages that it has saved would never be sent again.
        self._ledger.keep(self.peer, user, None)
        self._without.add(user)
        if not state:
            self._scratch.add(user)
        result = await self._single_sync(user, state) or await self._carrier.sync(user, state)
        # From scratch again until that has gone through: only then are flags and scripts compared.
        if result.outcome is Outcome.SYNCED or (result.outcome is Outcome.CHANGED and state):
            self._ledger.keep(self.peer, user, result.state)
            self._scratch.discard(user)
        else:
            self._scratch.add(user)
        return result

    async def _single_sync(self, user: str, state: str) -> SyncResult | None:
        mailbox = self._queue.place(user)
        self._parted.discard(user)
        if self._single is None or not (state and mailbox):
            return None
        result = await self._single.sync_mailbox(user, state, mailbox)
        if result is not None:
            self._parted.add(user)
        return result

    def _settle(self, user: str, started: float) -> None:
        self._attempts.pop(user, None)
        self.findings.pop(user, None)
        self._unsafe.discard(user)
        tickets, settled = self._queue.done(user)
        self._first_round.discard(user)
        self.done = self.total - len(self._first_round)
        metrics.COALESCED.labels(self.peer).inc(max(0, len(tickets) - 1))
        for number in tickets:
            metrics.WAIT_SECONDS.labels(self.peer).observe(monotonic() - self._arrived.pop(number))
            self._tickets.pop(number).set_result(Verdict.MIRRORED)
        if settled:
            self._ledger.unflag(self.peer, user)
            self._noted_at.pop(user, None)
        elif user in self._noted_at:
            self._noted_at[user] = max(started, self._noted_at[user])

    async def _failed(self, user: str, result: SyncResult) -> None:
        attempt = self._attempts[user] = self._attempts.get(user, 0) + 1
        log.warning(
            "sync of %s to %s failed (attempt %d): %s", user, self.peer, attempt, result.reason
        )
        if result.begun and self.phase.waits:
            # dsync removes a mailbox that differs and fails, for the next one to copy it: what was
            # acknowledged long ago may be missing there.
            self._unsafe.add(user)
            await self.lose(f"a sync of {user} broke off: {result.reason}", lost=False)
        if result.outcome is Outcome.NO_USER:
            try:
                if not await self._users.exists(user):
                    # Gone here too: there is nothing left to mirror.
                    self._ledger.keep(self.peer, user, None)
                    self._scratch.discard(user)
                    self._unmerged.discard(user)
                    self._settle(user, monotonic())
                    return
            except DoveadmError as error:
                log.warning("%s", error)
            result = SyncResult(
                Outcome.NO_USER, reason=f"{self.peer} does not know the user {user}"
            )
        elif attempt < ATTEMPTS or self._queue.awaited(user):
            # Whoever waits is answered by the time-out at the latest.
            await asyncio.sleep(min(RETRY_DELAY[0] * 2 ** min(attempt - 1, 9), RETRY_DELAY[1]))
            self._queue.again(user)
            return
        self.findings[user] = result.reason
        self._attempts.pop(user, None)
        if self._queue.awaited(user):
            self._queue.again(user)
            await self.lose(result.reason)
            return
        self._queue.hold(user)
        if self.phase is Phase.PROTECTED:
            reason = f"{user} cannot be mirrored to {self.peer}: {result.reason}"
            await self.lose(reason, lost=False)

    # the way back to protected

    async def catch_up(
        self,
        protect: Callable[[], Awaitable[None]],
        *,
        everyone: bool,
        binding: str,
        merge: bool = False,
        copied: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Sync what the peer lacks, then have ``protect`` write down that the group is protected.

        :param protect: durable when it returns. It is called when nothing is noted and every new
            change waits.
        :param everyone: compare all users, because it is not known what changed (the agent has just
            started, the role is new).
        :param binding: what the states hold for, see the ledger.
        :param merge: the peer may have mail that this node lacks (it was a primary that was lost,
            or is new in the group): bring both together before it is made a copy of this node.
        :param copied: called once when all users of the first round are done, suspended ones too.
        While users cannot be mirrored (``findings``), it goes on without an end: all others are
        copied, and these tried again.

        :raises CatchUpFailed: the peer was lost meanwhile. Asking again later is up to the caller.
        """
        if self.phase is not Phase.RECORDING:
            raise CatchUpFailed(f"{self.peer} is {self.phase.value} already")
        self.findings.clear()
        self._attempts.clear()
        self._inherited = None
        bound = await self._ledger.bind(self.peer, binding)
        try:
            if everyone or merge or not bound:
                users = await self._users.users()
                self._unmerged = set(users) if merge else set()
                self._note(users)
        except DoveadmError as error:
            raise CatchUpFailed(str(error)) from None
        self._note(list(self._queue.held))
        self._first_round = self._queue.wanting()
        self.done, self.total = 0, len(self._first_round)
        scratch = everyone or merge or not bound
        self._started = monotonic()
        self.phase = Phase.CATCHING_UP
        self._lost = False
        retry_at = 0.0
        log.info("catch-up of %s: %d users", self.peer, self.total)
        self._pump()
        while True:
            self._progress.clear()
            complete = not self._first_round and not self._unmerged & self._queue.suspended
            if copied is not None and complete:
                await self._say(copied)
                copied = None
            # Who is compared from scratch may take hours: nobody shall wait behind that.
            few = 0 if scratch or self._scratch & self._first_round else self._few
            phase = next_phase(self.phase, self.lacking, few, bool(self._first_round))
            # Users who cannot be mirrored keep the others from being waited for, not from being
            # copied, and mail from nothing.
            # Who is copied anew has that refused as soon as changes wait for the peer.
            unsafe = self._queue.held or self._unsafe - self._queue.suspended
            limit = Phase.CATCHING_UP if unsafe else Phase.PROTECTED
            phase = min(phase, limit, self.limit, key=lambda one: one.rank)
            if phase is Phase.PROTECTED:
                await self._protect(protect)
                return
            if self.phase.waits and not phase.waits:
                await self.lose("; ".join(list(self.findings.values())[:3]), lost=False)
            if not self._lost:
                self.phase = phase
                self._pump()
            if not self._queue.held or monotonic() >= retry_at:
                retry_at = monotonic() + HELD_PAUSE
                self.retry_held()
            with suppress(TimeoutError):
                async with asyncio.timeout(HELD_PAUSE if self._queue.held else None):
                    await self._progress.wait()
            if self.phase is Phase.RECORDING:
                if self._lost or self.limit is Phase.RECORDING:
                    raise CatchUpFailed(self._reason)
                # Only the limit came down: go on as far as it is now.
                self.phase = Phase.CATCHING_UP
                self._pump()

    async def _say(self, copied: Callable[[], Awaitable[None]]) -> None:
        try:
            await copied()
        except BaseException as error:
            await self.lose(f"{self.peer} was lost: {error or type(error).__name__}")
            raise

    async def _while_joining(self, protect: Callable[[], Awaitable[None]]) -> None:
        """Run ``protect``; given up when the peer is lost, since changes wait for "alone" then."""
        self._protecting = asyncio.ensure_future(protect())
        try:
            await asyncio.wait([self._protecting])
        finally:
            self._protecting.cancel()
            await asyncio.gather(self._protecting, return_exceptions=True)
        if self.phase is Phase.JOINING:
            self._protecting.result()

    async def _protect(self, protect: Callable[[], Awaitable[None]]) -> None:
        self.phase = Phase.JOINING
        try:
            async with self._commit:
                self._alone = None
                await self._while_joining(protect)
        except BaseException as error:
            # Whether it was written is unknown: say "alone" again, which is safe.
            await self.lose(
                f"the group could not be made protected: {error or type(error).__name__}"
            )
            raise
        if self.phase is not Phase.JOINING:
            # Lost while it was written: the lock makes "alone" the later of the two.
            await self._be_alone(lost=self._lost)
            raise CatchUpFailed(self._reason)
        self.phase = Phase.PROTECTED
        log.info(
            "%s has all changes; %d users in %.1f s",
            self.peer,
            self.done,
            monotonic() - self._started,
        )

    async def resume(self, binding: str, inherited: Inherited) -> None:
        """Wait for this peer from now on, without catch-up.

        Only for a switchover: both nodes are known to hold the same, and the cluster has written
        down that the group is protected.

        :param inherited: spares the first sync of a user the comparison of all mailboxes.
        """
        await self._ledger.bind(self.peer, binding)
        self._inherited = inherited
        self._without.clear()
        self._unmerged.clear()
        self._unsafe.clear()
        self._alone = None
        self.phase = Phase.PROTECTED
        self.retry_held()  # what a former term has left

    async def missed(self, users: Iterable[str]) -> None:
        """Changes of ``users`` were acknowledged without us: that is not protected, so say so."""
        users = list(users)
        self._note(users)
        if self.phase.waits:
            await self.lose(f"changes of {', '.join(users[:3])} did not reach the agent")
        else:
            self._pump()
        await self._ledger.flag(self.peer, users)

    async def excused(self) -> bool:
        """Return whether no change waits for this peer, and the group is on record as alone.

        Whatever ``Group.mirror_failed`` raises comes through.
        """
        if not self.phase.waits:
            await self._be_alone()
        return not self.phase.waits

    def follow(self, users: Iterable[str]) -> None:
        """Note that this peer lacks changes of ``users``, and sync them; nobody waits for it."""
        self._note(users)
        self._pump()

    def recheck(self, users: Iterable[str], *, deep: bool = False) -> None:
        """Sync ``users`` when there is room, though no change is known.

        ``deep`` compares without a state, also who is being synced by one now.
        """
        users = list(users)
        if deep:
            self._deep.update(users)
        self._queue.note(users)
        self._pump()

    def rejoin(self) -> None:
        """Sync all mailboxes of those whose last sync was of a single one.

        A session that was killed may have told nobody of its last change in another.
        """
        self.recheck(self._parted)

    async def resync(self, user: str, prepare: Preparation) -> None:
        """Compare ``user`` without a state, mend the peer's copy, and return when that is done.

        :param prepare: done before it, while nothing else of the user is copied.
        :raises CatchUpFailed: nothing is copied to this peer now, or the user cannot be mirrored.
        """
        self.findings.pop(user, None)
        if self.phase is not Phase.RECORDING:
            self._before[user] = prepare
            self.recheck([user], deep=True)
        try:
            await self._resynced(user)
        finally:
            self._before.pop(user, None)

    async def _resynced(self, user: str) -> None:
        while True:
            # A copy that has to be made anew first is, as soon as nobody relies on it.
            anew = user in self._unsafe and not self._lost and self.limit is not Phase.RECORDING
            if self.phase is Phase.RECORDING and not anew:
                raise CatchUpFailed(f"nothing is copied to {self.peer} now: {self._reason}")
            if user in self.findings:
                raise CatchUpFailed(self.findings[user])
            if user in self._queue.suspended:
                raise CatchUpFailed(f"the mirror of {user} is suspended")
            if not self._queue.lacks(user):
                return
            await asyncio.sleep(RESYNC_LOOK)

    # for people

    def lag(self) -> tuple[int, float]:
        """Return how many changes (users.

        While nobody waits) the peer lacks, and for how long at most (seconds).
        """
        since = [*list(self._arrived.values())[:1], *self._noted_at.values()]
        behind = len(self._arrived) + len(self._noted_at)
        return behind, monotonic() - min(since) if since else 0.0

    @property
    def waiting(self) -> int:
        """How many changes wait for this peer now."""
        return len(self._tickets)

    @property
    def behind(self) -> int:
        """How many users have changes that the peer lacks and nobody waits for."""
        return self._queue.noted

    @property
    def lacking(self) -> int:
        """How many of them are not suspended."""
        return self._queue.noted - self._queue.paused

    @property
    def equal(self) -> bool:
        """Whether the peer has all that this node knows of; rechecks count as well."""
        busy = self.waiting or self.behind or self.running
        return self.phase is Phase.PROTECTED and not busy

    def unequal(self) -> str:
        """Return why the peer is not ``equal``: one sentence for people, without its full stop."""
        if not self.phase.waits:
            return f"{self.peer} was lost on the way: {self._reason}"
        return f"mailboxes were still being copied to {self.peer}"

    @property
    def suspended(self) -> int:
        """How many users are suspended."""
        return len(self._queue.suspended)

    @property
    def steady(self) -> bool:
        """Whether all is copied that is to be, as far as this node knows."""
        return self.phase is not Phase.RECORDING and self.phase is self.limit

    def retry_held(self) -> None:
        """Try again what could not be mirrored."""
        self.follow(list(self._queue.held))

    @property
    def busy(self) -> bool:
        """Whether syncs run, or are about to."""
        return self.phase is not Phase.RECORDING and self._queue.busy

    @property
    def running(self) -> int:
        """How many syncs run."""
        return self._queue.running

    def progress(self) -> dict[str, float]:
        """Return the catch-up's progress: users done and in all, and users per second."""
        elapsed = monotonic() - self._started
        return {
            "done": self.done,
            "total": self.total,
            "rate": self.done / elapsed if elapsed > 0 else 0.0,
        }


class Mirror:
    """The mirrors to all peers.

    :param copies: how many of them must have a change; see ``selection``.
    """

    def __init__(
        self,
        group: Group,
        users: Users,
        peers: Mapping[str, PeerMirror],
        *,
        copies: int = 1,
    ) -> None:
        self.peers = dict(peers)
        self._copies = copies
        self._group = group
        self._users = users

    async def run(self) -> None:
        """Run until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for peer in self.peers.values():
                tasks.create_task(peer.run(), name=f"mirror to {peer.peer}")
            tasks.create_task(self._sweep(), name="mirror sweep")

    async def changed(self, user: str, mailbox: str = "") -> Verdict:
        """A change of ``user`` was committed: return when it may be acknowledged.

        NotPrimary, or what the cluster raises, if it may not.

        :param mailbox: where messages have changed and nothing else, "" if that is not known.
        """
        if not self._group.is_primary():
            raise NotPrimary
        with self._group.begin_work():
            if len(self.peers) == 1:
                return await next(iter(self.peers.values())).changed(user, mailbox)
            refused = False
            try:
                async with asyncio.TaskGroup() as tasks:
                    verdicts = [
                        tasks.create_task(peer.changed(user, mailbox))
                        for peer in self.peers.values()
                    ]
                    while verdicts and (await asyncio.wait(verdicts, timeout=MAKE_WAY))[1]:
                        self._make_way(user)
            except* NotPrimary:
                refused = True
            if refused:
                raise NotPrimary  # as one peer says it: who asks looks for it
        mirrored = sum(task.result() is Verdict.MIRRORED for task in verdicts)
        return Verdict.MIRRORED if mirrored >= self._copies else Verdict.RECORDED

    def _make_way(self, user: str) -> None:
        if any(peer.held_up(user) for peer in self.peers.values()):
            for peer in self.peers.values():
                peer.make_way(user)

    def stop(self) -> None:
        """End of this node's time as primary: end all waiting and all syncs."""
        for peer in self.peers.values():
            peer.stop()

    async def _sweep(self) -> None:
        """Have all users take turns at a comparison without a state, once in ``DEEP_PERIOD``.

        And at a sync of all mailboxes, once in ``SWEEP_INTERVAL``, where single ones were synced.

        It brings what Dovecot notifies nobody of, such as ``doveadm sieve``, and mends what only
        the other side has, which a sync with a state never notices.
        """
        turns: list[str] = []
        while True:
            await asyncio.sleep(SWEEP_INTERVAL)
            peers = [peer for peer in self.peers.values() if peer.steady]
            if not peers or not self._group.is_primary():
                continue
            for peer in peers:
                peer.rejoin()
            try:
                everybody = await self._users.users()
            except DoveadmError as error:
                log.warning("sweep: %s", error)
                continue
            turns = turns or sorted(everybody)
            share = math.ceil(len(everybody) * SWEEP_INTERVAL / DEEP_PERIOD)
            now, turns = turns[:share], turns[share:]
            for peer in peers:
                if peer.limit is not Phase.PROTECTED:
                    peer.retry_held()  # else losing the peer and catching up again does it
                peer.recheck(now, deep=True)
