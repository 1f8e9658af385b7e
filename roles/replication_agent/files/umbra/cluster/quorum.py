"""The node's place in a group with a witness: what ``protocol`` decides, in the words of ``Group``.

The parts ask the same questions as of a group with the static coordinator. The answers come from
the protocol's state, which the driver keeps, and the host is kept in step with it:

* The ports are a lease that ends with the right to act: the kernel closes them then, whatever
  becomes of this process.
* A node that begins to act first takes over what the former primary left, and leaves every peer
  behind that it cannot prove to have everything; only then does it open.
* A peer is waited for from ``Join`` on, and counts as protected when the coordinator says so.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import statistics
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from umbra.api.report import Check
from umbra.cluster import protocol as p
from umbra.cluster.driver import OPEN_PHASES, Coordinator, Driver
from umbra.cluster.etcd import boottime
from umbra.cluster.group import PRIMARY_OPERATIONS, Group, now
from umbra.cluster.lease import Lease
from umbra.cluster.machine import Event, NotNow
from umbra.cluster.said import checked
from umbra.cluster.state import Change, Durable, Mode, PeerView, Phase, Role, State
from umbra.cluster.static import StateFile
from umbra.cluster.work import DOVECOT, POSTFIX, Server, Trouble, Work
from umbra.config import Config
from umbra.epoch import epoch_of
from umbra.node.client import NodeHelper
from umbra.node.helper import HelperError
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.identity import PeerIdentity
from umbra.peer.link import PeerLink
from umbra.peer.server import Handler
from umbra.transport.ports import NotPrimary, Refusal
from umbra.transport.store import StoreError

log = logging.getLogger(__name__)

RETRY_PAUSE = 0.5
# An opening that has failed for so long leaves the role to others.
OPENING_FAILS = 5.0
TEND_PAUSE, IDLE_PAUSE = 1.0, 3.0
VOTERS_PAUSE = 1.0
LEAST_SAMPLES = 10
# What a peer says it is when it can be brought into the protected set.
BEHIND = (p.Phase.SYNCING, p.Phase.READY, p.Phase.REJOINING)
# What only a primary asks for, of one that is not.
GUARDED = PRIMARY_OPERATIONS | {"unmirrored", "remove-copies"}
# Whoever is asked these says what it knows, whatever the epoch.
FREE_OPERATIONS = frozenset({"status", "renew", "nudge", "handover-finish"})

Promoted = Callable[[int, str | None], Awaitable[Collection[str]]]


class QuorumGroup(Group):
    """The node in a redundancy group with a witness.

    Beside what ``Group`` asks for, its maker sets ``control``, links to the peers of which nothing
    but renewals make use; and ``on_promotion``, called with the epoch and the former primary's name
    before this node serves under a new epoch; it takes over what that one left and returns the
    peers that have all that this node has.
    """

    def __init__(
        self,
        config: Config,
        states: StateFile,
        helper: NodeHelper,
        coordinator: Coordinator,
        *,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self._coordinator = coordinator
        self._clock = clock
        self.control: dict[str, PeerLink] = {}
        self.on_promotion: Promoted = _nobody
        self._disk = asyncio.Lock()
        self._waited: set[str] = set()
        self._kept: set[str] = set()
        self._why: dict[str, str] = {}
        self._former: str | None = None
        self._outage_from: float | None = None
        self._entitled_at: float | None = None
        self.planned = False
        self.by_word = False
        self._ready = 0
        self._ever_open = False
        self._handed_over = 0
        self._silent_voters: list[str] = []
        self._opening: asyncio.Task[None] | None = None
        self._whole: Collection[str] = ()
        self.opening = Trouble(OPENING_FAILS, clock)
        self._booted = clock()
        super().__init__(config, states, helper)
        self._tend_pause = TEND_PAUSE
        self._ports = Lease(
            self.driver,
            helper,
            config.fence.ports,
            lambda: self.is_primary() and self.state.serving,
            lambda: self.switching,
        )
        timing = self.driver.config.timing
        self.work = Work(
            self._prove,
            lambda began: self.driver.note(p.Worked(began)),
            self._servers,
            clock,
            interval=timing.work / 3,
            timeout=timing.work,
        )

    def _load(self) -> State:
        config = self._config
        durable = self._states.load()
        if durable is None:
            # The inventory's role counts this once: who is primary makes the key if there is none.
            durable = Durable(
                storage_id=secrets.token_hex(8), epoch=0, role=Role(config.role),
                mode=Mode.PROTECTED, since=now(), acted=0,
            )  # fmt: skip
            self._states.save(durable)
        elif durable.acted is None:
            log.warning("epochs begin anew: the group had the static coordinator before")
            durable = replace(durable, epoch=0, acted=0, merged_under=0, handing_to=None, offered=0)
            self._states.save(durable)
        self._durable = durable
        settings = config.coordinator
        self.driver = Driver(
            p.Config(
                node=config.node,
                site=config.site,
                peers={peer.name: peer.site for peer in config.peers},
                timing=p.PROFILES[settings.profile],
                policy=settings.policy,
                preference=settings.preference,
                initial=durable.role is Role.PRIMARY,
                max_changes=settings.limit,
            ),
            p.Durable(
                durable.storage_id,
                durable.epoch,
                durable.acted or 0,
                p.LONGEST if durable.silence is None else durable.silence,
            ),
            key=f"umbra/{config.group}/primary",
            coordinator=self._coordinator,
            save=self._save,
            renew=self._renew,
            nudge=self._nudge,
            changed=self._stepped,
            clock=self._clock,
        )
        # Under which epoch it has taken over what was left, and has opened.
        self._taken = self._opened = durable.acted or 0
        return self._projected({})

    # -- what the other parts ask

    @property
    def epoch(self) -> int:
        """The epoch that every request of this node carries."""
        return self.driver.state.durable.epoch

    @property
    def lease(self) -> float:
        """For how long the ports may stay open after this node's right has ended (seconds)."""
        return self.driver.config.timing.hold

    def holds(self, epoch: int) -> bool:
        """Whether the key is this node's under ``epoch``, as far as it knows."""
        state = self.driver.state
        return (
            p.holds(state)
            and state.known is not None
            and state.known.epoch == epoch == state.durable.epoch
        )

    def is_primary(self) -> bool:
        """Whether this node may acknowledge anything now."""
        return self._ready == self.epoch and self.driver.may_act()

    def may_acknowledge(self, epoch: int, holders: Collection[str]) -> bool:
        """Return whether what was begun under ``epoch`` may be acknowledged now.

        Who joins has what it lacks noted, and does not become protected before it has that.
        """
        stored_by = {*holders, *self.driver.state.joining}
        return self._ready == epoch and self.driver.may_acknowledge(epoch, stored_by)

    def synchronous(self) -> Sequence[str]:
        """Return the peers that must have each message and change before it is acknowledged."""
        if not self.state.serving:
            return ()
        return sorted(self._waited | p.required(self.driver.state))

    async def shadow_failed(self, peer: str, reason: str) -> None:
        """A shadow did not take a message: go on without it, by the coordinator's word."""
        await self._leave(peer, f"a message was not taken: {reason}")

    async def mirror_failed(self, peer: str, reason: str, *, lost: bool = True) -> None:
        """A mailbox change is only here: go on without the peer, by the coordinator's word."""
        await self._leave(peer, reason, keep=not lost)

    def accepting(self) -> Refusal | None:
        """Return why no new message is taken now, or None."""
        if self.state.phase is Phase.PRIMARY and not self.is_primary():
            return Refusal(451, "4.3.2", "This host may not act as primary at this moment")
        return super().accepting()

    def reasons(self) -> list[str]:
        """Return why the group is not protected, as far as this node knows; empty when it is."""
        state = self.driver.state
        found = []
        if self.state.serving:
            found = super().reasons()
        else:
            if state.phase in OPEN_PHASES:
                found.append(f"{state.node} takes over what is left and opens")
            elif state.phase not in BEHIND:
                found.append(f"{state.node} is {state.phase}: {state.cause}")
            found += filter(None, (self.effect_error, self.opening.error))
        if self.work.error and self.work.error not in found and self._servers():
            found.append(self.work.error)
        return found

    def describe(self) -> dict[str, Any]:
        """Return what the status says of the coordinator and of this node's place in it."""
        state, settings = self.driver.state, self._config.coordinator
        known = state.known
        return {
            "coordinator": "etcd",
            "state": state.phase
            if self.state.serving or state.phase not in OPEN_PHASES
            else p.Phase.PROMOTING,
            "cause": state.cause,
            "profile": settings.profile,
            "policy": settings.policy,
            "preference": settings.preference,
            "paused": known is not None and known.paused,
            "holder": known.holder if known else None,
            "protected_set": sorted(m.node for m in known.protected) if known else [],
            "shut": self._queue_held,
            "merged_under": self._durable.merged_under,
            "entitled_s": self.entitled_age(),
            "ailments": self.fitness.doubts(),
        }

    def stores(self) -> dict[str, str]:
        """Return the store of each peer that was heard of, by its name."""
        return {name: view.storage_id for name, view in self.state.peers.items() if view.storage_id}

    def entitled_age(self) -> float | None:
        """Return how long ago this node had everything, in seconds; None is not known."""
        at = self._entitled_at
        return None if at is None else round(self._clock() - at, 1)

    def checks(self) -> Sequence[Check]:
        """Return the findings of the coordinator."""
        driver = self.driver
        answered = driver.coordinator_answered
        age = None if answered is None else round(self._clock() - answered, 3)
        bound = driver.config.timing.silence
        text = "The coordinator has not answered yet"
        if age is not None:
            text = f"The coordinator answered {age:.1f} s ago"
        if driver.coordinator_error:
            text += f": {driver.coordinator_error}"
        silent = self._silent_voters
        return [
            self._round_trip(),
            *super().checks(),
            Check(
                "voters", not silent, len(silent), 0,
                f"Not healthy: {', '.join(silent)}." if silent else "All voters are healthy.",
            ),
            Check("coordinator", age is not None and age <= bound, age, bound, f"{text}."),
            self._automatic(),
            *self._takeover(),
        ]  # fmt: skip

    def restraint(self) -> str | None:
        """Return why nothing may be changed without a person, on any node, or None."""
        known = self.driver.state.known
        return p.restraint(self.driver.config, known, time.time()) if known else None

    def _automatic(self) -> Check:
        known, restraint = self.driver.state.known, self.restraint()
        value, text = "on", "Automatic failover is on."
        if known is not None and known.paused:
            value, text = "paused", "Automatic failover is paused; umbractl unpause ends that."
        elif restraint is not None:
            value, text = "off", f"Nothing is changed without a person now: {restraint}."
        return Check("automatic failover", restraint is None, value, "on", text)

    def _takeover(self) -> Sequence[Check]:
        """On the primary, whether one of those who have everything may take over by itself.

        Where nobody may, that is the inventory's word.
        """
        known = self.driver.state.known
        if known is None or self.restraint() or not known.protected or not self.state.serving:
            return ()
        whole = {member.node for member in known.protected}
        able = {peer for peer in self.driver.config.peers if not self.rank(peer)[0]}
        ready = sorted(whole & able)
        if ready:
            text = f"{', '.join(ready)} has everything and may take over by itself."
        elif able:
            text = (
                f"{', '.join(sorted(whole))} has everything and may not take over by itself;"
                f" {', '.join(sorted(able))} may, and lacks something."
            )
        else:
            text = "No shadow may take over by itself, by the inventory."
        return (Check("takeover", bool(ready) or not able, len(ready), 1, text),)

    def _round_trip(self) -> Check:
        """Whether the profile still fits the lines to the other nodes, by their heartbeats."""
        medians = {
            peer: statistics.median(times)
            for peer, times in self.round_trips.items()
            if len(times) >= LEAST_SAMPLES
        }
        bound = self.driver.config.timing.round_trip
        if not medians:
            return Check("round trip", True, None, bound, "No round trip has been measured yet.")
        peer, worst = max(medians.items(), key=lambda item: item[1])
        text = f"The round trip to {peer} is {1000 * worst:.1f} ms."
        findings = p.profile_findings(self._config.coordinator.profile, worst)
        return Check(
            "round trip", not findings, round(worst, 4), bound, " ".join([text, *findings])
        )

    # -- steps of the protocol

    async def apply(self, event: Event) -> State:
        """Refuse: what the static coordinator decides is the protocol's business here."""
        raise NotNow(f"{type(event).__name__} is for a group without a coordinator")

    def _stepped(self, old: p.State, new: p.State) -> None:
        """Keep the rest of the agent in step; called by the driver, between disk and network."""
        if _answers(old) and not _answers(new):
            # From now on no primary is answered, also not one whose request came before.
            self.break_off(GUARDED)
        if new.durable.epoch > old.durable.epoch:
            # What a superseded primary has begun here would go on beside its successor's.
            self.break_off(GUARDED, new.durable.epoch)
        if new.known is not None and _new_holder(old, new):
            self._former = old.known.holder if old.known else None
            self.planned = new.known.mode is p.Mode.HANDOVER
            self.by_word = old.known is not None and not p.by_itself(old.known, new.known)
            self._outage_from = None if self.planned else old.heard
        left = p.required(old) - p.required(new)
        opens = new.phase in OPEN_PHASES and old.phase not in OPEN_PHASES
        closes = old.phase in OPEN_PHASES and new.phase not in OPEN_PHASES
        if closes:
            self._ready, self._whole = 0, ()
            self._end_catch_up(self._catching_up)
            self._waited.clear()
            self._kept.clear()
        lost = sorted(left & self._waited - self._kept)
        self._waited -= set(lost)
        self.state = self._projected(self._without(lost))
        if (old.phase, old.cause) != (new.phase, new.cause) or old.known != new.known:
            self._tell(new)
            self.reopen()
        if opens and (self._opening is None or self._opening.done()):
            self._opening = asyncio.create_task(self._open(), name="opening")
        if closes:
            self.on_demotion()
        self._end_catch_up(lost)
        for name in lost:
            self.links[name].cut()
            self.on_lost(name, self._why[name])
        entitled = new.known is not None and p.entitled(new, new.known)
        if entitled:
            self._entitled_at = new.read_sent
        if new.known is not None and new.durable.acted and not p.holds(new) and entitled:
            # It gave its role away and has all that the new primary has.
            self._handed_over = new.known.epoch
            self.driver.note(p.Reconciled())

    def _without(self, lost: Iterable[str]) -> dict[str, PeerView]:
        """Return the peers as they are known, those ``lost`` unreachable, with the reason.

        Until their next heartbeat: whoever is dead must not be waited for again.
        """
        peers = dict(self.state.peers)
        for name in lost:
            reason = self._why.setdefault(name, "it did not answer in time")
            peers[name] = replace(peers.get(name, PeerView()), reachable=False, reason=reason)
        return peers

    def _end_catch_up(self, peers: Iterable[str]) -> None:
        """End the catch-up of those who are waited for no more: they have to begin again."""
        for name in peers:
            if task := self._catching_up.get(name):
                task.cancel()

    def _tell(self, state: p.State) -> None:
        known = state.known
        key = f"{known.holder} {known.mode}, epoch {known.epoch}" if known else "no key"
        log.warning("state: %s (%s); the key: %s", state.phase, state.cause, key)

    def _projected(self, peers: Mapping[str, PeerView]) -> State:
        """Return the protocol's state in the words that the other parts know."""
        state = self.driver.state
        known = state.known
        mine = self.holds(self.epoch)
        role = Role.PRIMARY if mine else Role.SHADOW
        members = {member.node for member in known.protected} if known else set()
        copies = self._config.mailbox.mirror_copies
        mode = Mode.PROTECTED if len(members) >= copies else Mode.ALONE
        waited = self._waited | p.required(state)
        return State(
            node=state.node,
            durable=replace(
                self._durable,
                epoch=state.durable.epoch,
                acted=state.durable.acted,
                role=role,
                mode=mode,
                merged=self._is_merged(),
                unshared=self._is_unshared(),
            ),
            phase=self._phase(),
            peers={
                name: replace(
                    view,
                    synchronous=mine and name in waited,
                    complete=mine and name in members and name in waited,
                )
                for name, view in peers.items()
            },
            alone_reason="; ".join(
                f"{name}: {why}" for name, why in self._why.items() if name not in waited
            )
            or "the copies are compared",
            held_reason=state.cause,
            copies=copies,
        )

    def _phase(self) -> Phase:
        """Return what the host has to look like."""
        state = self.driver.state
        match state.phase:
            case p.Phase.PRIMARY | p.Phase.DRAINING if self._ready != self.epoch:
                return Phase.STARTING
            case p.Phase.PRIMARY:
                return Phase.PRIMARY
            case p.Phase.DRAINING:
                return Phase.DRAINING
            case p.Phase.STARTING | p.Phase.FENCED if self._within_lease():
                # The agent has just started; the lease of the one before it may still run, and
                # cutting clients for that would be a pity.
                return Phase.STARTING
            case p.Phase.STARTING:
                return Phase.HELD
            case p.Phase.FENCED | p.Phase.PROMOTING | p.Phase.DEMOTING:
                return Phase.HELD
            case _ if state.known is None:
                return Phase.HELD
            case _:
                return Phase.SHADOW

    def _within_lease(self) -> bool:
        began = self._clock() < self._booted + self.driver.config.timing.hold
        return began and not self._ever_open and self.driver.state.durable.acted > 0

    def _is_merged(self) -> bool:
        state, known = self.driver.state, self.driver.state.known
        if known is None or p.holds(state):
            return self._durable.merged
        if state.durable.acted:
            return p.entitled(state, known)
        # Whom a person has promoted since then may lack what this node has.
        return self._durable.merged and self._durable.merged_under >= known.forced

    def rank(self, peer: str) -> tuple[bool, int]:
        """See ``Group``; who has not been heard of may take over, as far as this node knows."""
        said, config = self.statuses.get(peer, {}), self.driver.config
        try:
            policy, preference = p.Policy(said["policy"]), int(said["preference"])
        except (KeyError, TypeError, ValueError):
            return False, 0
        return not policy.allows(config.site, config.peers[peer]), preference

    def is_whole(self, peer: str) -> bool:
        """See ``Group``; by the key, however many copies are wanted beside it."""
        view = self.state.peers.get(peer)
        return self.state.serving and view is not None and view.synchronous and view.complete

    def is_copy(self, peer: str) -> bool:
        """See ``Group``; also by the key, which the peer may not have read yet."""
        known = self.driver.state.known
        under = self.statuses.get(peer, {}).get("merged_under", math.inf)  # an older agent
        return super().is_copy(peer) and known is not None and under >= known.forced

    def whole_since(self) -> int:
        """Return the epoch of the last promotion by force, since which the key has decided."""
        known = self.driver.state.known
        return known.forced if known is not None else self.epoch

    def _is_unshared(self) -> bool:
        """Whether this node may have acknowledged what its successors never had."""
        state = self.driver.state
        if not state.durable.acted or state.known is None:
            return True
        return state.durable.acted < state.known.forced

    def _show(self) -> None:
        self.state = self._projected(self.state.peers)

    # -- the disk

    async def _save(self, durable: p.Durable) -> None:
        state = self.driver.state
        mine = state.known is not None and p.holds(state) and state.known.epoch == durable.epoch
        role = Role.PRIMARY if mine else Role.SHADOW
        if durable.epoch == 0:
            role = self._durable.role
        async with self._disk:
            old = self._durable
            since = old.since if role is old.role else now()
            merged, under = old.merged, old.merged_under
            if self._handed_over and not durable.acted:
                merged, under = True, self._handed_over
            await self._write(
                replace(
                    old, epoch=durable.epoch, acted=durable.acted, silence=durable.silence,
                    role=role, since=since, merged=merged, merged_under=under,
                )
            )  # fmt: skip
            self._handed_over = 0

    async def _write(self, durable: Durable) -> None:
        await self._states.write(durable)
        self._durable = durable

    async def _marked(self) -> None:
        async with self._disk:
            await self._write(replace(self._durable, marked=True))
        self._show()

    async def merged(self) -> None:
        """Note that the primary has brought its mailboxes and this node's together, durably.

        Dying before that is on disk, they are merged again, which changes nothing.
        """
        epoch = self.epoch
        async with self._disk:
            await self._write(replace(self._durable, merged=True, merged_under=epoch))
        await self.driver.take(p.Reconciled())
        self._show()

    # -- peers

    async def heard_from(self, peer: str, status: Mapping[str, Any], *, answered: bool) -> None:
        """Note what a peer says of itself. PeerError ``protocol`` if it makes no sense."""
        if status.get("coordinator") != "etcd":
            raise PeerError(
                "protocol",
                f"{peer} has another coordinator; replication_agent_coordinator must be the same on"
                " all nodes of a group",
            )
        said = checked(peer, status)
        try:
            word, role = p.Phase(said["state"]), Role(said["role"])
        except ValueError as error:
            raise PeerError(
                "protocol", f"{peer} sent a status that makes no sense: {error}"
            ) from None
        epoch, storage = said["epoch"], said["storage_id"]
        # One that has not shut its services may still get mail that only it has.
        behind = word in BEHIND and said.get("shut") is True
        old = self.state.peers.get(peer, PeerView())
        view = PeerView(
            reachable=old.reachable or answered,
            epoch=epoch,
            role=role,
            phase=Phase.SHADOW if behind else Phase.HELD,
            storage_id=storage,
            reason="" if answered else old.reason,
        )
        self.statuses[peer] = said
        if answered:
            self.heard[peer] = time.monotonic()
        self.state = self._projected({**self.state.peers, peer: view})
        if (view.phase, view.epoch, view.reachable) != (old.phase, old.epoch, old.reachable):
            self._changed.set()
        known = self.driver.state.known
        if known is not None and epoch > known.epoch:
            self.driver.note(p.Nudged())

    async def peer_silent(self, peer: str, reason: str) -> None:
        """Note that ``peer`` answers no heartbeat; what follows of it, renewals decide."""
        old = self.state.peers.get(peer, PeerView())
        view = replace(old, reachable=False, reason=reason)
        self.state = self._projected({**self.state.peers, peer: view})

    async def check_epoch(self, peer: str, op: str, epoch: int) -> None:
        """Refuse an operation of a superseded node, and whatever a primary asks of another one."""
        if op in FREE_OPERATIONS:
            return
        if op in GUARDED:
            refused = await self.driver.asked(peer, epoch)
            if refused is not None:
                code = "stale-epoch" if epoch < self.epoch else "refused"
                raise PeerError(code, refused)
        elif epoch < self.epoch:
            raise PeerError(
                "stale-epoch", f"epoch {epoch} of {peer} is over; here it is {self.epoch}"
            )

    def handlers(self) -> dict[str, Handler]:
        """Return the protocol's own operations of the peer link."""
        return {"renew": self._handle_renew, "nudge": self._handle_nudge}

    async def _handle_renew(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        try:
            epoch = epoch_of(args.get("epoch"))
        except ValueError as error:
            raise PeerError("protocol", f"a renewal needs an epoch: {error}") from None
        silence = args.get("silence", p.LONGEST)  # an agent from before this was said
        if not isinstance(silence, (int, float)) or not 0 < silence < math.inf:
            raise PeerError("protocol", "the silence of a renewal is a number of seconds")
        refused = await self.driver.asked(peer.node, epoch, silence=silence)
        durable = self.driver.state.durable
        return {"refused": refused, "epoch": durable.epoch, "storage": durable.storage}

    async def _handle_nudge(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        self.driver.note(p.Nudged())
        return {}

    async def _renew(self, peer: str, epoch: int) -> Mapping[str, Any]:
        timing = self.driver.config.timing
        link = self.control[peer]
        try:
            body = {"epoch": epoch, "silence": timing.silence}
            return await link.request("renew", body, timeout=timing.miss)
        except PeerError:
            link.reset()
            raise

    async def _nudge(self, peer: str) -> None:
        await self.control[peer].request("nudge", {}, timeout=self.driver.config.timing.call)

    # -- who is waited for

    async def _leave(self, peer: str, reason: str, *, keep: bool = False) -> None:
        """Go on without ``peer``, by the coordinator's word.

        NotPrimary if nothing may be acknowledged without it.

        :param keep: messages still go to it.
        """
        driver = self.driver
        if not driver.may_act():
            raise NotPrimary(f"{self.state.node} is {driver.state.phase}")
        join = driver.state.joining.get(peer)
        if peer in driver.members() or (join is not None and (join.complete or not keep)):
            self._why[peer] = reason
            if keep and peer in self._waited:
                self._kept.add(peer)
            try:
                await self._lost(peer)
                gone = await driver.until(
                    lambda: peer not in driver.members() or not driver.may_act(), p.WRITE_DOWN
                )
            finally:
                self._kept.discard(peer)
            if not gone:
                raise NotPrimary("the coordinator does not answer, so nobody can be left behind")
            if keep and peer in self._waited and driver.may_act():
                await driver.take(p.Join(peer, self.state.peers[peer].storage_id))
        if not driver.may_act():
            raise NotPrimary(f"{self.state.node} is {driver.state.phase}")

    async def _lost(self, peer: str) -> None:
        await self.driver.take(p.Lost(peer))
        self.work.at_once()  # nobody is left behind by a node that cannot work itself

    def _lacks(self, peer: str) -> bool:
        known = self.driver.state.known
        return known is None or peer not in {member.node for member in known.protected}

    async def _join(self, peer: str) -> None:
        view = self.state.peers.get(peer)
        if not self.is_primary() or view is None or not view.reachable:
            raise NotNow(f"{peer} cannot be waited for: {view.reason if view else 'not heard of'}")
        self._waited.add(peer)
        await self.driver.take(p.Join(peer, view.storage_id))
        if peer not in self.driver.state.joining:
            self._waited.discard(peer)
            raise NotNow(f"{peer} cannot be waited for: {self.driver.state.phase}")
        self._show()

    async def _protect(self, peer: str) -> None:
        driver = self.driver
        join = driver.state.joining.get(peer)
        if join is None:
            raise NotNow(f"{peer} was lost while it caught up")
        await driver.take(p.Complete(peer, join.since))
        # However long: while the voters are away both nodes go on as they are.
        await driver.until(lambda: not self._lacks(peer) or peer not in driver.state.joining, None)
        if self._lacks(peer):
            raise NotNow(f"{peer} was lost before it was written down that it is protected")
        self._why.pop(peer, None)
        self._show()

    async def _drop(self, peer: str, reason: str) -> None:
        self._why[peer] = reason
        await self._lost(peer)
        self._waited.discard(peer)
        self._show()

    def drain_left(self) -> float:
        """See ``Group``; after that this node serves again."""
        return max(0.0, self.driver.state.switch_until - self._clock())

    async def leaves(self, phase: Phase, seconds: float) -> bool:
        """Wait until this node is no longer in ``phase``; False if it still is after so long."""
        return await self.driver.until(lambda: self.state.phase is not phase, seconds)

    async def complete_within(self, peer: str, seconds: float) -> bool:
        """Wait until ``peer`` is whole; False if that takes longer."""
        return await self.driver.until(lambda: self.is_whole(peer), seconds)

    def reopen(self) -> None:
        """Look at ports and Postfix at once."""
        self._changed.set()
        self._ports.look()

    # -- keeping the host in step

    async def run(self) -> None:
        """Run the protocol and keep the host in step; runs until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.driver.run(), name="protocol")
                tasks.create_task(self.tend())
                tasks.create_task(self._ports.run(), name="lease of the ports")
                tasks.create_task(self.work.run(), name="proof of work")
                tasks.create_task(self._watch_voters(), name="voters")
                tasks.create_task(self._watch_primary(), name="silence of the primary")
                tasks.create_task(self.fitness.run(self.on_ailing), name="fitness")
        finally:
            if self._opening is not None:
                self._opening.cancel()
                await asyncio.gather(self._opening, return_exceptions=True)

    def _servers(self) -> Sequence[Server]:
        """Return who has to greet. Postfix is stopped by ourselves while this node is closed."""
        if self.state.phase is Phase.PRIMARY and not self.switching:
            return (POSTFIX, DOVECOT)
        if p.holds(self.driver.state) or self._prepared():
            return (DOVECOT,)
        return ()

    async def _watch_voters(self) -> None:
        """Notice a voter that is down, which nothing else feels."""
        while True:
            silent = await self._coordinator.silent()
            for voter in sorted(set(silent) ^ set(self._silent_voters)):
                log.warning("voter %s is %s", voter, "away" if voter in silent else "back")
            self._silent_voters = silent
            await asyncio.sleep(VOTERS_PAUSE)

    async def _watch_primary(self) -> None:
        """Start Postfix behind closed ports before this node takes over, as before a handover.

        If the primary is heard again, ``_shut`` stops it soon.
        """
        timing = self.driver.config.timing
        while True:
            state = self.driver.state
            # One that has just handed over has not held its queue yet: nothing of it may go out.
            held = self._queue_held
            if held and p.expects_the_role(self.driver.config, state, self._clock(), time.time()):
                try:
                    await self.prepare(timing.silence)
                except HelperError as error:  # it is started once more by the opening
                    log.info("Postfix does not start before the role is this node's: %s", error)
                await asyncio.sleep(timing.silence / 2)
            await asyncio.sleep(timing.beat / 2)

    async def _prove(self) -> None:
        if reason := self._ports.error or (self.opening.hopeless and self.opening.error):
            raise HelperError(reason)
        await self._helper.prove()

    async def prepare(self, seconds: float) -> None:
        """Start Postfix behind closed ports, for a change that is expected within ``seconds``."""
        await super().prepare(seconds)
        self.work.at_once()

    async def _open(self) -> None:
        """Begin to act: take over, leave behind whom that needs, open.

        Try again until this node has opened, or the key is another's.
        """
        while self.holds(self.epoch) and self._ready != self.epoch:
            try:
                await self._open_under(self.epoch)
                continue
            except NotPrimary as error:
                log.warning("this node does not open yet: %s", error)
            except (StoreError, PeerError, OSError) as error:
                log.error("this node does not open yet: %s", error)
                self.opening.failed(f"{self.state.node} does not open: {error}")
            except Exception as error:
                log.exception("this node does not open yet")
                self.opening.failed(f"{self.state.node} does not open: {error!r}")
            await asyncio.sleep(RETRY_PAUSE)
        self.opening.over()
        if self._ready != self.epoch:
            # What it has taken over is another's to carry on, see ``on_shadow``.
            self._queue_held = False
            self._changed.set()

    async def _open_under(self, epoch: int) -> None:
        # Another one may act by now, and Postfix would deliver here. Who gives the role up because
        # it cannot open goes on trying: there may be nobody to take it.
        if not (self.driver.may_act() or self.opening.hopeless):
            raise NotPrimary("the right to act has ended meanwhile")
        self._queue_held = False
        started = asyncio.create_task(self._helper.postfix_start())
        try:
            if self._taken != epoch:
                self.switching = False  # whatever this node was giving away is over
                self._whole = await self.on_promotion(epoch, self._former)
                self._taken = epoch
        finally:
            await started
        if not self.holds(epoch):
            raise NotPrimary("the key is another's by now")
        if self.opening.error:
            self.opening.over()
            self.work.at_once()
        # Whom the key has dropped meanwhile nobody waits for.
        gone = set(self._whole) - self.driver.members()
        self._waited |= set(self._whole) - gone
        for peer in sorted(self.driver.members() - set(self._whole)):
            # It may lack what this node did while its agent was dead or its right had ended.
            await self._leave(peer, "the agent has just started and compares the copies")
        # A key that has just become protected needs the shadow's next answer, and clients wait.
        await self.driver.until(lambda: not self.holds(epoch) or self.driver.may_act(), RETRY_PAUSE)
        if not self.holds(epoch) or not self.driver.may_act():
            raise NotPrimary("the right to act has ended meanwhile")
        first, self._opened = self._opened != epoch, epoch
        self._ready, self._ever_open, self._was_serving, self._whole = epoch, True, True, ()
        self._prepared_until = 0.0
        self.state = self._projected(self._without(gone))
        self._changed.set()
        for peer in sorted(gone):
            self.on_lost(peer, self._why[peer])
        with suppress(HelperError):  # ``Lease.run`` tries again, and sees to it if that fails too
            await self._ports.renew()
        self.work.at_once()
        self.driver.note(p.Tick())
        self.on_opening()
        if first and self._former not in (None, self.state.node):
            outage = None
            if self._outage_from is not None:
                outage = round(self._clock() - self._outage_from, 4)
            await self.changed(
                Change(self._former, self.state.node, now(), planned=self.planned, outage_s=outage)
            )

    async def changed(self, change: Change) -> None:
        """Note the last change of primary, durably."""
        async with self._disk:
            await self._write(replace(self._durable, last_change=change))
        self._show()

    async def _enforce(self) -> None:
        phase = self.state.phase
        self._tend_pause = TEND_PAUSE if phase is Phase.PRIMARY else IDLE_PAUSE
        if phase is Phase.PRIMARY:
            if not self.switching:
                await self._keep_postfix()
            return
        await super()._enforce()


async def _nobody(epoch: int, former: str | None) -> Collection[str]:
    return ()


def _answers(state: p.State) -> bool:
    """Whether this node answers a primary: not one that holds the key, or has asked for it."""
    return not any(record.holder == state.node for record in p.possible(state))


def _new_holder(old: p.State, new: p.State) -> bool:
    """Whether this node has just become the holder, under another epoch than before."""
    was = old.known
    return (
        p.holds(new)
        and new.known is not None
        and (was is None or was.holder != new.node or was.epoch < new.known.epoch)
    )
