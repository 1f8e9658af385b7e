"""The node's place in its group.

Holds the state, makes it durable, and keeps the host in step with it.

Every change of state goes through ``apply``, one at a time. What a change allows (an
acknowledgement, an open port) happens after it is on disk;
what it forbids stops before. If the disk refuses, nothing new is allowed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Protocol

from umbra.api.report import Check
from umbra.cluster import machine
from umbra.cluster.fitness import Fitness
from umbra.cluster.machine import Event, NotNow
from umbra.cluster.said import checked
from umbra.cluster.state import Mode, Phase, Role, State
from umbra.cluster.static import StateError, StateFile, first
from umbra.cluster.work import warm_up
from umbra.config import Config
from umbra.node.client import NodeHelper
from umbra.node.helper import HelperError
from umbra.peer.exchange import PeerError
from umbra.peer.link import PeerLink
from umbra.transport.ports import NotPrimary, Refusal

log = logging.getLogger(__name__)

RETRY_PAUSE = 1.0
# Only a primary asks for these; a node that is primary itself refuses them.
PRIMARY_OPERATIONS = frozenset(
    {
        "shadow-store",
        "shadow-list",
        "shadow-discard",
        "shadow-hold",
        "dsync",
        "scripts",
        "script",
        "mailboxes",
        "take-flags",
        "sync-state",
        "merged",
        "clients",
        "handover-prepare",
        "handover",
    }
)


class BreakOff(Protocol):
    """Ends what peers have asked for of these operations, under an epoch ``below`` that one."""

    def __call__(self, operations: Collection[str], below: float = math.inf) -> None: ...  # noqa: D102


Protect = Callable[[], Awaitable[None]]
CatchUp = Callable[[str, Protect], Awaitable[None]]


def now() -> str:
    """Return the time as in reports: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Work:
    """Counts work in flight of one kind, so that a switchover can wait for its end."""

    def __init__(self) -> None:
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Count the block as work in flight."""
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()

    async def idle(self, timeout: float) -> bool:
        """Wait until nothing is in flight.

        False if something still is after ``timeout`` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


async def _nothing(*_: object) -> None:
    pass


async def _error_of(effect: Awaitable[None]) -> HelperError | None:
    """Return what was wrong with an effect, None if it happened."""
    try:
        await effect
    except HelperError as error:
        return error
    return None


def primary_of(
    statuses: Mapping[str, Mapping[str, Any]], reachable: Callable[[str], bool]
) -> str | None:
    """Return who is primary by what the nodes say of themselves: the highest epoch counts. Pure."""
    claims = [
        (status["epoch"], name)
        for name, status in statuses.items()
        if status.get("role") == Role.PRIMARY and reachable(name)
    ]
    return max(claims)[1] if claims else None


class Group:
    """The node in its redundancy group.

    Its maker sets ``links``; ``catch_up``, which copies to a peer what it lacks and calls its
    second argument at a moment when nothing is missing there; ``on_lost`` (peer, reason) and
    ``on_demotion``, called when a peer is no longer waited for and when this node stops to serve;
    ``on_shadow``, called when this node has become a shadow and holds its queue;
    ``on_opening``, called when this node serves again after a start or a handover that came to
    nothing (a promotion has its own order of steps); ``before_disconnect``, called with the
    next primary's name when this one has closed for a planned change and its clients still are
    connected; ``break_off``, see ``BreakOff``; ``on_ailing``, called
    again and again while another node should be primary rather than this one, with the reasons;
    ``limits``, which says why the mirror may not become protected, by the operator's wish.
    """

    def __init__(self, config: Config, states: StateFile, helper: NodeHelper) -> None:
        self._config = config
        self._states = states
        self._helper = helper
        self.links: dict[str, PeerLink] = {}
        self.catch_up: CatchUp | None = None
        self.on_lost: Callable[[str, str], None] = lambda peer, reason: None
        self.on_demotion: Callable[[], None] = lambda: None
        self.fitness = Fitness(config.handover, helper)
        self.on_ailing: Callable[[Sequence[str]], Awaitable[None]] = _nothing
        self.limits: Callable[[], Sequence[str]] = lambda: ()
        self.on_opening: Callable[[], None] = lambda: None
        self.on_shadow: Callable[[], Awaitable[None]] = _nothing
        self.break_off: BreakOff = lambda operations, below=math.inf: None
        self.before_disconnect: Callable[[str], Awaitable[None]] = _nothing
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._moved = asyncio.Condition()
        self.messages = Work()
        self.changes = Work()
        self.warm_up: Callable[[], Awaitable[None]] = warm_up
        self._prepared_until = 0.0
        self.switching = False
        self._queue_held = False
        self._catching_up: dict[str, asyncio.Task[None]] = {}
        self.effect_error = ""
        self.statuses: dict[str, dict[str, Any]] = {}
        self.round_trips: dict[str, deque[float]] = {}
        self.heard: dict[str, float] = {}
        self._was_serving = False
        self._tend_pause = config.fence.hold / 3
        self.state = self._load()

    def _load(self) -> State:
        """Return the state that this node starts with."""
        durable = self._states.load()
        if durable is None:
            durable = first(self._config.role, now())
            self._states.save(durable)
        if durable.acted is not None:  # the group had the other coordinator before
            durable = replace(durable, acted=None)
        copies = self._config.mailbox.mirror_copies
        known = State(
            self._config.node, durable, Phase.SHADOW, copies=copies, others=len(self._config.peers)
        )
        state = machine.step(known, machine.Started())
        if state.durable != durable:
            self._states.save(state.durable)
        return state

    # -- what the other parts ask

    @property
    def epoch(self) -> int:
        """The epoch that every request of this node carries."""
        return self.state.durable.epoch

    def is_primary(self) -> bool:
        """Whether this node may acknowledge anything."""
        return self.state.serving

    def may_acknowledge(self, epoch: int, holders: Collection[str]) -> bool:
        """Return whether what was begun under ``epoch`` may be acknowledged now.

        :param holders: the peers that have it durably. Who is not among them has it noted as
            missing.
        """
        return self.state.serving and self.epoch == epoch

    def synchronous(self) -> Sequence[str]:
        """Return the peers that must have each message and change before it is acknowledged."""
        if not self.state.serving:
            return ()
        return [name for name, view in self.state.peers.items() if view.synchronous]

    def shadows(self) -> Sequence[PeerLink]:
        """Return the links to the synchronous peers."""
        return [self.links[name] for name in self.synchronous()]

    async def shadow_failed(self, peer: str, reason: str) -> None:
        """A shadow did not take a message.

        Make the group alone, durably. NotPrimary if this node may not act any more.
        """
        await self._failed(peer, f"a message was not taken: {reason}")

    async def mirror_failed(self, peer: str, reason: str, *, lost: bool = True) -> None:
        """A mailbox change is not on ``peer``.

        Count it no more among those that have everything, durably; with too few of these the group
        is alone. Harmless if it is not counted. NotPrimary if this node may not act any more.
        Unless the peer is ``lost``, messages go to it as before.
        """
        view = self.state.peers.get(peer)
        if not self.state.serving or (view is not None and view.complete):
            await self._failed(peer, reason, lost=lost)

    async def _failed(self, peer: str, reason: str, *, lost: bool = True) -> None:
        state = await self.apply(
            machine.PeerLost(peer, reason) if lost else machine.Unmirrored(peer, reason)
        )
        if not state.serving:
            raise NotPrimary(f"{state.node} is {state.phase}")

    def accepting(self) -> Refusal | None:
        """Return why no new message is taken now, or None."""
        match self.state.phase:
            case Phase.PRIMARY:
                return None
            case Phase.DRAINING:
                return Refusal(
                    421, "4.3.2", "This host hands its mail over to another one; try again"
                )
            case _:
                return Refusal(451, "4.3.2", "This host is not the primary of its group")

    def reasons(self) -> list[str]:
        """Return why the group is not protected, as far as this node knows; empty when it is."""
        state = self.state
        found = []
        if state.phase is Phase.HELD:
            found.append(state.held_reason)
        elif state.phase is Phase.STARTING:
            found.append(f"{state.node} was primary and waits to hear that no other has taken over")
        elif state.phase is Phase.HANDING_OVER:
            found.append(
                f"{state.node} offered its role to {state.durable.handing_to}"
                " and waits to hear what became of it"
            )
        elif state.serving and state.durable.mode is Mode.ALONE and (limits := self.limits()):
            found += limits
            found += [
                f"{name}: {view.reason}"
                for name, view in state.peers.items()
                if not view.synchronous and view.reason
            ]
        elif state.serving and state.durable.mode is Mode.ALONE:
            busy = [name for name, view in state.peers.items() if view.synchronous]
            found.append(
                f"{', '.join(busy)} is catching up ({state.alone_reason})"
                if busy
                else state.alone_reason
            )
            found += [
                f"{name}: {view.reason}"
                for name, view in state.peers.items()
                if not view.reachable and view.reason and view.reason not in state.alone_reason
            ]
        if self.effect_error:
            found.append(self.effect_error)
        return found

    def silence(self, peer: str) -> float | None:
        """Return for how many seconds ``peer`` has not answered, or None if it never has."""
        heard = self.heard.get(peer)
        return None if heard is None else round(time.monotonic() - heard, 3)

    @property
    def lease(self) -> float:
        """For how long the ports may stay open after this node's right has ended (seconds)."""
        return self._config.fence.hold

    def primary(self) -> str | None:
        """Return the other node that is primary, as far as this one has heard."""
        return primary_of(self.statuses, self.answers)

    def whole_since(self) -> int:
        """Return since which epoch each acknowledged message has come to this primary.

        Without a coordinator that is known of the primary before this one only, and only if it
        has handed over.
        """
        change = self.state.durable.last_change
        planned = change is not None and change.planned
        return self.epoch - 1 if planned else self.epoch

    def rank(self, peer: str) -> tuple[bool, int]:
        """Return how late ``peer`` comes when changes wait for fewer shadows than there are.

        Whether it may not take over from this primary by itself, and its preference; without a
        coordinator all are equal.
        """
        return False, 0

    def is_whole(self, peer: str) -> bool:
        """Whether ``peer`` has all that this primary has acknowledged, so that it may take over."""
        view = self.state.peers.get(peer)
        return self.state.protected and view is not None and view.synchronous and view.complete

    def is_copy(self, peer: str) -> bool:
        """Whether the mailboxes of ``peer`` hold nothing that this primary's lack, by its word."""
        return bool(self.statuses.get(peer, {}).get("merged"))

    def answers(self, peer: str) -> bool:
        """Whether ``peer`` answers now."""
        view = self.state.peers.get(peer)
        return view is not None and view.reachable

    # -- events

    async def apply(self, event: Event) -> State:
        """Decide on ``event``, make the outcome durable and return the new state.

        NotNow if it does not fit; OSError if the disk refused, and then nothing new is allowed.
        """
        async with self._lock:
            old = self.state
            new = machine.step(old, event)
            if new.durable.role is not old.durable.role:
                new = replace(new, durable=replace(new.durable, since=now()))
            if old.serving and not new.serving:
                self.state = new
            if isinstance(event, machine.Promote) and not event.protected:
                # What the lost primary has begun here would end as if it still were one.
                self.break_off(PRIMARY_OPERATIONS)
            if new.durable != old.durable:
                await self._states.write(new.durable)
            self.state = new
            if isinstance(event, machine.PeerSeen) and new.durable.epoch > old.durable.epoch:
                # What a superseded primary has begun here would go on beside its successor's. Who
                # hands over is refused by the epoch itself, or has been taken over from already.
                self.break_off(PRIMARY_OPERATIONS - {"handover"}, new.durable.epoch)
            if (old.phase, old.durable.mode) != (new.phase, new.durable.mode):
                log.warning(
                    "state: %s %s -> %s %s, epoch %d%s",
                    old.phase, old.durable.mode, new.phase, new.durable.mode, new.durable.epoch,
                    f" ({'; '.join(self.reasons())})" if self.reasons() else "",
                )  # fmt: skip
            if new != old:
                self._changed.set()
                async with self._moved:
                    self._moved.notify_all()
            if old.serving and not new.serving:
                self.on_demotion()
            if new.serving and not old.serving and not isinstance(event, machine.Promote):
                self.on_opening()
            for name, view in old.peers.items():
                if view.synchronous and not new.peers[name].synchronous:
                    self.on_lost(name, new.peers[name].reason or "this node is not primary")
            return new

    async def own_mail(self) -> None:
        """Return when the mailboxes' disk is the one that this node's state speaks of.

        StateError if it is not: a copy that is empty must neither serve nor count as one, and a
        primary would make the others what it is. HelperError if nobody can tell.
        """
        durable = self.state.durable
        found = await self._helper.mail_store(durable.storage_id, claim=not durable.marked)
        if found is None:
            return
        if found != durable.storage_id:
            raise StateError(
                "the mailboxes' disk is not the one of this node's state (it has"
                f" {'the mark of another' if found else 'no mark'}): mount the right one. If it is"
                " lost for good, move /var/lib/umbra away: this node begins anew then, as a shadow"
                " that the primary fills"
            )
        if not durable.marked:
            await self._marked()

    async def _marked(self) -> None:
        async with self._lock:
            durable = replace(self.state.durable, marked=True)
            await self._states.write(durable)
            self.state = replace(self.state, durable=durable)

    async def peer_silent(self, peer: str, reason: str) -> None:
        """Note that ``peer`` answers no heartbeat."""
        await self.apply(machine.PeerLost(peer, reason))

    async def merged(self) -> None:
        """Note that the primary has brought its mailboxes and this node's together, durably."""
        await self.apply(machine.Merged())

    def describe(self) -> dict[str, Any]:
        """Return what the status says of the coordinator and of this node's place in it."""
        return {"coordinator": "static"}

    def checks(self) -> Sequence[Check]:
        """Return the findings of the coordinator, and whether this host should be primary."""
        return self.fitness.check(), self._in_step()

    def _in_step(self) -> Check:
        """Whether ports and Postfix could be made as the state wants them."""
        wrong = self.effect_error
        text = f"{wrong}." if wrong else "Ports and Postfix are as this node's state wants them."
        return Check("ports and Postfix", not wrong, int(bool(wrong)), 0, text)

    async def run(self) -> None:
        """Do what the coordinator needs all the time; runs until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.tend())
            tasks.create_task(self.fitness.run(self.on_ailing), name="fitness")

    def drain_left(self) -> float:
        """Return for how many seconds a drain that has begun may go on."""
        return math.inf

    async def leaves(self, phase: Phase, seconds: float) -> bool:
        """Wait until this node is no longer in ``phase``; False if it still is after so long."""
        try:
            async with asyncio.timeout(seconds), self._moved:
                await self._moved.wait_for(lambda: self.state.phase is not phase)
        except TimeoutError:
            return False
        return True

    async def complete_within(self, peer: str, seconds: float) -> bool:
        """Wait until ``peer`` is whole; False if that takes longer."""
        try:
            async with asyncio.timeout(seconds), self._moved:
                await self._moved.wait_for(lambda: self.is_whole(peer))
        except TimeoutError:
            return False
        return True

    async def heard_from(self, peer: str, status: Mapping[str, Any], *, answered: bool) -> None:
        """Note what a peer says of itself. PeerError ``protocol`` if it makes no sense."""
        said = checked(peer, status)
        try:
            seen = machine.PeerSeen(
                peer,
                said["epoch"],
                Role(said["role"]),
                Phase(said["state"]),
                said["storage_id"],
                answered,
                said.get("handing_to"),
            )
        except ValueError as error:
            raise PeerError(
                "protocol", f"{peer} sent a status that makes no sense: {error}"
            ) from None
        self.statuses[peer] = said
        if answered:
            self.heard[peer] = time.monotonic()
        await self.apply(seen)

    async def check_epoch(self, peer: str, op: str, epoch: int) -> None:
        """Refuse an operation of a superseded node, and step down for one of a newer epoch."""
        if op == "status":
            return
        if epoch > self.epoch:
            view = self.state.peers.get(peer)
            storage = view.storage_id if view else ""
            # A node that has offered its role and raised its epoch only asks for the outcome.
            role, phase, to = Role.PRIMARY, Phase.PRIMARY, None
            if view is not None and view.phase is Phase.HANDING_OVER:
                role, phase = view.role, view.phase
                to = self.statuses[peer].get("handing_to")
            await self.apply(machine.PeerSeen(peer, epoch, role, phase, storage, False, to))
        if epoch < self.epoch:
            raise PeerError(
                "stale-epoch", f"epoch {epoch} of {peer} is over; here it is {self.epoch}"
            )
        if op in PRIMARY_OPERATIONS and self.state.durable.role is Role.PRIMARY:
            raise PeerError("refused", f"{self.state.node} is the primary")

    # -- keeping the host in step

    async def tend(self) -> None:
        """Keep ports, Postfix and the catch-up in step with the state; runs until cancelled."""
        while True:
            self._changed.clear()
            try:
                await self._enforce()
                self.effect_error = ""
            except HelperError as error:
                # The fence closes the ports by itself if this goes on.
                if str(error) != self.effect_error:
                    log.error("%s", error)
                self.effect_error = str(error)
            self._start_catching_up()
            if self.state.phase is Phase.HANDING_OVER and not self.switching:
                # An agent that died in the middle of a handover asks what became of it.
                with suppress(NotNow):  # the outcome came first
                    await self.apply(machine.Reclaim())
            try:
                async with asyncio.timeout(RETRY_PAUSE if self.effect_error else self._tend_pause):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _enforce(self) -> None:
        state = self.state
        if state.phase is Phase.PRIMARY:
            self._prepared_until = 0.0
            await self._keep_postfix()
            await self._helper.ports_open(self._config.fence.ports, self._config.fence.hold)
            if self.switching or not self.state.serving:  # changed while the helper worked
                await self._helper.ports_close()
            self._was_serving = True
            self._queue_held = False
        elif state.phase in (Phase.SHADOW, Phase.HELD, Phase.HANDING_OVER):
            await self._shut()
            if state.phase is Phase.SHADOW and not self._queue_held and not self.switching:
                await self._hold_queue()
                # Promoted meanwhile: what it has taken over stays its own.
                if self.state.phase is Phase.SHADOW:
                    await self.on_shadow()
                self._queue_held = self.state.phase is Phase.SHADOW
        # STARTING: a restart of the agent alone must not cut clients; the fence's hold bounds it.

    async def _keep_postfix(self) -> None:
        """Have Postfix run; systemd does not start it again when its master was killed."""
        running = self._was_serving and await self._helper.postfix_running()
        # One that an administrator stops, or restarts, has not failed.
        failed = self._was_serving and not running and await self._helper.postfix_failed()
        # Looked at once more: a drain that has begun meanwhile stops Postfix, and it must stay so.
        if not running and self.state.phase is Phase.PRIMARY:
            if self._was_serving:
                log.error("Postfix does not run on the primary; it is started again")
            if failed:
                self.fitness.crashed("Postfix")
            await self._helper.postfix_start()

    async def _shut(self) -> None:
        """Close the ports, disconnect users and stop Postfix; each, whatever fails.

        HelperError if one did. While the ports are not closed nobody keeps his connection.
        """
        wrong = [await _error_of(self._helper.ports_close())]
        closed = wrong == [None]
        if closed and self._prepared():
            return
        wrong.append(await _error_of(self._stop_postfix()))
        if self._was_serving or not closed:
            wrong.append(await _error_of(self._helper.kick(self._config.fence.ports)))
        for error in filter(None, wrong):
            raise error
        self._was_serving = False

    async def _stop_postfix(self) -> None:
        await self._helper.postfix_stop()  # also one that is only starting

    async def _hold_queue(self) -> None:
        """Hold what a former primary has in its queue.

        The new primary has it too, or a person must look at it.
        """
        moving = ("incoming", "arriving", "active", "deferred")
        queue = await self._helper.queue()
        found = sorted(queue_id for queue_id, place in queue.items() if place in moving)
        if found:
            await self._helper.queue_hold(found)
            log.warning(
                "%d messages of the queue are on hold: %s", len(found), ", ".join(found[:20])
            )

    async def prepare(self, seconds: float) -> None:
        """Start Postfix behind closed ports, for a change that is expected within ``seconds``."""
        until = asyncio.get_running_loop().time() + seconds
        self._prepared_until = max(self._prepared_until, until)
        await self._helper.postfix_start()
        await self.warm_up()

    def _prepared(self) -> bool:
        return self._prepared_until > asyncio.get_running_loop().time()

    def _start_catching_up(self) -> None:
        state = self.state
        for name, view in state.peers.items():
            ready = (
                view.reachable
                and view.role is Role.SHADOW
                and view.phase is Phase.SHADOW
                and view.epoch == self.epoch
                and not (state.protected and self._loaded(name))
            )
            wanted = state.phase is Phase.PRIMARY and self._lacks(name) and ready
            if wanted and name not in self._catching_up:
                task = asyncio.create_task(self._catch_up(name), name=f"catch-up of {name}")
                self._catching_up[name] = task
                task.add_done_callback(functools.partial(self._catch_up_ended, name))

    def _loaded(self, peer: str) -> bool:
        """Whether ``peer`` has said that it has no room for messages: it would fail again."""
        return self.statuses.get(peer, {}).get("load") in ("disk", "queue")

    def _lacks(self, peer: str) -> bool:
        """Return whether ``peer`` has not been proven to have everything."""
        return not self.state.peers[peer].complete

    def _catch_up_ended(self, name: str, _: asyncio.Task[None]) -> None:
        self._catching_up.pop(name, None)
        self._changed.set()

    async def _protect(self, peer: str) -> None:
        """Write down that ``peer`` has everything; durable when it returns.

        Who is cancelled meanwhile waits for the end: the disk must not say more than this node
        believes, or it would never write that it goes on alone.
        """
        writing = asyncio.create_task(self.apply(machine.CaughtUp(peer)))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait([writing])
            raise

    async def _join(self, peer: str) -> None:
        """From now on wait for ``peer`` while the rest is copied."""
        await self.apply(machine.CatchingUp(peer))

    async def _drop(self, peer: str, reason: str) -> None:
        """Go on without ``peer``, which could not catch up."""
        await self.apply(machine.PeerLost(peer, reason))

    async def _catch_up(self, peer: str) -> None:
        assert self.catch_up is not None
        try:
            await self._join(peer)
            await self.catch_up(peer, functools.partial(self._protect, peer))
        except NotNow as error:
            log.info("catch-up of %s stopped: %s", peer, error)
        except (PeerError, HelperError, OSError) as error:
            log.warning("catch-up of %s failed: %s", peer, error)
            await self._drop(peer, f"it could not catch up: {error}")
        except Exception as error:
            log.exception("catch-up of %s failed", peer)
            await self._drop(peer, f"it could not catch up: {error!r}")
        await asyncio.sleep(RETRY_PAUSE)

    async def stop(self) -> None:
        """Cancel what this object has started."""
        tasks = list(self._catching_up.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
