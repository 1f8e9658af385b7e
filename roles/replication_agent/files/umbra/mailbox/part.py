"""The mirror as one part of the agent: makes its pieces and joins them to the cluster."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from umbra.api.report import Check
from umbra.cluster.group import Group, now
from umbra.cluster.machine import NotNow
from umbra.cluster.state import Phase as GroupPhase
from umbra.config import Config, MirrorMode
from umbra.mailbox import copies, flags, notes
from umbra.mailbox.carrier import DsyncCarrier, DsyncHandler
from umbra.mailbox.describe import DescribeHandler, Dovecot, Peer
from umbra.mailbox.disk import MailDisk
from umbra.mailbox.doveadm import Doveadm, DoveadmError
from umbra.mailbox.events import ScriptEvents
from umbra.mailbox.gone import GoneCarrier, GoneHandler
from umbra.mailbox.inherited import InheritedStates, StateHandler
from umbra.mailbox.ledger import Ledger
from umbra.mailbox.merged import Record, RecordingCarrier
from umbra.mailbox.mirror import (
    CatchUpFailed,
    Mirror,
    PeerMirror,
    Phase,
    Verdict,
    entitled,
)
from umbra.mailbox.notify import NotifyServer
from umbra.mailbox.parents import ParentsCarrier
from umbra.mailbox.scripts import ScriptCarrier, ScriptsHandler
from umbra.mailbox.seeding import Pacer, Seed, Seeds
from umbra.mailbox.selection import chosen
from umbra.mailbox.suspension import Suspensions
from umbra.mailbox.uid_gap import Dovecot as UidDovecot
from umbra.mailbox.uid_gap import UidGap
from umbra.mailbox.verify import Rounds, Verifier
from umbra.node.client import NodeHelper
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.identity import PeerIdentity
from umbra.peer.server import Handler
from umbra.transport.once import plain
from umbra.transport.ports import NotPrimary

log = logging.getLogger(__name__)

NOTIFY_ADDRESS, NOTIFY_PORT = "127.0.0.1", 8688
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MISSED_INTERVAL = 2.0
# How much later than the permit the names are read that were left under it (seconds).
FORBID_PAUSE = 0.05
# How often it is looked whether what was noted is copied, and what a merge has brought (seconds).
COPIED_LOOK = 0.01
PASSED_ON_LOOK = 0.1
MERGED_TIMEOUT = 5.0
# By how much the kernel may be late to close the ports (seconds).
LATE_PORTS = 0.5
EVENTS_INTERVAL = 0.5
EVENTS_RETRY = 60.0
# For how long a switchover waits, with the ports closed, until the next primary has all (seconds);
# with a coordinator it ends before that if D does. And how often it is looked.
CONFIRM_TIMEOUT = 5.0
CONFIRM_LOOK = 0.02
RELAX_INTERVAL = 1.0
SEED_INTERVAL = 1.0

# Why a shadow is not waited for, where no operator has said why.
FOLLOWS = "enough other shadows have each change"

Lag = tuple[int, float]


class Paths(Protocol):
    """The paths that this part uses."""

    @property
    def state(self) -> Path: ...  # noqa: D102
    @property
    def run(self) -> Path: ...  # noqa: D102
    @property
    def dsync(self) -> Path: ...  # noqa: D102
    @property
    def token(self) -> Path: ...  # noqa: D102
    @property
    def missed(self) -> Path: ...  # noqa: D102
    @property
    def events(self) -> Path: ...  # noqa: D102


class _Face:
    """The group as ``mirror.Group``."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def is_primary(self) -> bool:
        return self._group.is_primary()

    async def mirror_failed(self, peer: str, reason: str, *, lost: bool = True) -> None:
        await self._group.mirror_failed(peer, reason, lost=lost)

    def begin_work(self) -> AbstractContextManager[None]:
        return self._group.changes.begin()


class Mailboxes:
    """Mailbox changes, on either side."""

    def __init__(self, config: Config, group: Group, helper: NodeHelper, paths: Paths) -> None:
        self._group = group
        self._disk = MailDisk(helper.sync_mail)
        self._node = config.node
        self._mode = config.mailbox.mirror_mode
        self._copies = config.mailbox.mirror_copies
        self._hurrying = False
        # When this node was last seen to be primary; the agent before this one may have been.
        self._entitled_at = monotonic()
        self._suspensions = Suspensions(paths.state / "mirror")
        self._suspending = asyncio.Lock()
        # Not permitted before this process knows that it may: the agent before it may have been.
        self._notes = notes.Notes(paths.missed, paths.run / "unasked")
        self._unread_notes = ""
        self._notes.forbid()
        self._events = ScriptEvents(paths.events)
        self._reading = asyncio.Lock()
        self._dsync = paths.dsync
        self._doveadm = Doveadm()
        self._ledger = Ledger(paths.state / "mirror", paths.run)
        self._seeds = Seeds(paths.state / "mirror")
        self._pacers = {name: Pacer(functools.partial(self._rate, name)) for name in group.links}
        self._carriers = {
            name: DsyncCarrier(
                self._dsync,
                link,
                self._doveadm,
                self._pacers[name],
                functools.partial(self._relied_on, name),
            )
            for name, link in group.links.items()
        }
        face = _Face(group)
        dovecot = Dovecot(self._doveadm)
        messages = copies.Dovecot(self._doveadm)
        flagged = flags.Dovecot(self._doveadm)
        self.being_delivered: Callable[[str, str], bool] = lambda user, shadow_id: False
        self._parents = {
            name: ParentsCarrier(
                GoneCarrier(
                    self._carriers[name],
                    link,
                    dovecot,
                    functools.partial(self._relied_on, name),
                )
            )
            for name, link in group.links.items()
        }
        self._scripts = {
            name: ScriptCarrier(self._parents[name], link, dovecot)
            for name, link in group.links.items()
        }
        self._peers: dict[str, PeerMirror] = {}
        self._mergers: dict[str, copies.CopiesCarrier] = {}
        settlers = {name: flags.Settler(link, flagged) for name, link in group.links.items()}
        sides = {name: Peer(link) for name, link in group.links.items()}
        self._verifier = Verifier(dovecot, sides, self._peers, settlers)
        self._merged = {name: Record(paths.state / "mirror", name) for name in group.links}
        for name, carrier in self._scripts.items():
            settled = flags.FlagsCarrier(carrier, settlers[name], dovecot, sides[name])
            recording = RecordingCarrier(
                settled, name, self._merged[name], self._verifier, self._begin_merge,
                settlers[name], functools.partial(self._unshared, name),
                functools.partial(self._spread, name),
            )  # fmt: skip
            # Second copies go first, so that they are not told as merged.
            whole = self._mergers[name] = copies.CopiesCarrier(
                recording, group.links[name], messages,
                lambda user, key: self.being_delivered(user, key),
            )  # fmt: skip
            self._peers[name] = PeerMirror(
                name, face, self._ledger, self._doveadm, whole, self._carriers[name],
                workers=config.mailbox.workers, timeout=config.mailbox.mirror_timeout,
            )  # fmt: skip
        self._rounds = Rounds(
            self._verifier, self._doveadm.users, self._equal_expected, config.mailbox.verify_period
        )
        self._mirror = Mirror(
            face,
            self._doveadm,
            self._peers,
            copies=self._copies,
        )
        token = paths.token.read_text(encoding="ascii").strip()
        self._notify = NotifyServer(
            NOTIFY_ADDRESS, NOTIFY_PORT, token, self._changed, self._restructured
        )
        self._gap = UidGap(UidDovecot(self._doveadm))
        self._dsync_handler = DsyncHandler(group.is_primary, self._disk, seen=self._gap.note)
        self._scripts_handler = ScriptsHandler(group.is_primary, dovecot)
        self._gone_handler = GoneHandler(self._no_copy, dovecot)
        self._describe_handler = DescribeHandler(dovecot)
        self._copies_handler = copies.CopiesHandler(self._closed_to_removal, messages)
        self._flags_handler = flags.FlagsHandler(group.is_primary, flagged)
        self._losing: set[asyncio.Task[None]] = set()
        group.on_lost = self._lost
        group.on_demotion = self.stop
        group.limits = self._limits
        self._compared: set[str] = set()

    async def open(self) -> None:
        """Open the ledger and the sockets of dsync."""
        await self._ledger.open()
        # Before the first change comes: a suspension that is not known yet would be protection.
        self._suspensions.load()
        self._seeds.load()
        await self._keep_to_limit("the agent has just started")
        for carrier in self._carriers.values():
            await carrier.start()

    async def close(self) -> None:
        """Stop listening; who still waits gets no OK."""
        await self._notify.stop()
        for carrier in self._carriers.values():
            await carrier.stop()
        await asyncio.gather(*self._losing, return_exceptions=True)
        await self._gap.close()
        await self._disk.close()
        await self._ledger.close()

    async def listen(self) -> None:
        """Let Dovecot's notifications in."""
        await self._notify.start()

    def _restructured(self, user: str) -> None:
        for carrier in self._parents.values():
            carrier.restructured(user)

    def handlers(self) -> dict[str, Handler]:
        """Return the operations of the peer link."""
        return {
            "dsync": self._dsync_handler,
            "scripts": self._scripts_handler,
            "script": self._scripts_handler.put,
            "mailboxes": self._gone_handler,
            "merged": self._handle_merged,
            "describe": self._describe_handler,
            "unmirrored": self._copies_handler.unmirrored,
            "remove-copies": self._copies_handler.remove,
            "counters": self._flags_handler.counters,
            "take-flags": self._flags_handler.take,
            "sync-state": StateHandler(self._ledger, self._carriers),
        }

    def _spread(self, merged_with: str, user: str) -> None:
        for name, peer in self._peers.items():
            if name != merged_with:
                peer.recheck([user])

    async def _passed_on(self, merged_with: str) -> None:
        """Return when the shadows have what that node brought. PeerError if it is lost before.

        Told that it is merged, it may be made a copy of the next primary, whatever that lacks.
        """
        others = [peer for name, peer in self._peers.items() if name != merged_with]
        while any(peer.phase.waits and peer.lacking for peer in others):
            if self._peers[merged_with].phase is Phase.RECORDING:
                raise PeerError("unreachable", "it was lost before the others had what it brought")
            await asyncio.sleep(PASSED_ON_LOOK)

    def _relied_on(self, peer: str) -> bool:
        return self._peers[peer].phase.waits

    def _unshared(self, peer: str) -> bool:
        return bool(self._group.statuses.get(peer, {}).get("unshared", True))

    def _closed_to_removal(self) -> str:
        if self._group.is_primary():
            return "this node is primary; it takes no changes from others"
        if self._group.state.durable.merged:
            return "this node's mailboxes have been merged; it has nothing of its own"
        return ""

    def _no_copy(self) -> str:
        if self._group.is_primary():
            return "this node is primary; it takes no changes from others"
        if not self._group.state.durable.merged:
            return "this node may have mail of its own, which has not been merged"
        return ""

    async def _changed(self, user: str, mailbox: str) -> Verdict:
        def closed() -> float:
            return self._entitled_at + RELAX_INTERVAL + self._group.lease + LATE_PORTS

        return await entitled(functools.partial(self._mirrored, user, mailbox), closed)

    async def _mirrored(self, user: str, mailbox: str) -> Verdict:
        epoch = self._group.epoch
        settled = asyncio.create_task(self._disk.settle())
        try:
            verdict = await self._mirror.changed(user, mailbox)
            await settled
        finally:
            settled.cancel()
        # The right may have ended while the change waited. Who lacks it has it noted.
        if not self._group.may_acknowledge(epoch, self._peers):
            raise NotPrimary
        self._entitled_at = monotonic()
        return verdict

    async def _handle_merged(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        # Whose change was not told while this node was primary has been merged like all others; as
        # primary again it would leave its peer behind for it. Dying here, all is merged again.
        try:
            await asyncio.to_thread(self._notes.take)
        except OSError as error:
            log.warning("names of merged users stay for later: %s", error)
        await self._group.merged()
        return {}

    async def run(self) -> None:
        """Mirror until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._mirror.run())
            tasks.create_task(self._follow_notes())
            if self._mode is MirrorMode.ASYNC:
                tasks.create_task(self._permit())
            tasks.create_task(self._relax())
            tasks.create_task(self._follow_scripts())
            tasks.create_task(self._rounds.run())

    async def _follow_notes(self) -> None:
        """Sync the users whose changes Dovecot noted by itself; see ``notes``."""
        pause = MISSED_INTERVAL
        while True:
            await asyncio.sleep(pause)
            pause = MISSED_INTERVAL
            if not self._group.is_primary():
                continue
            async with self._suspending:
                permitted = self._unasked
                try:
                    found = await asyncio.to_thread(self._notes.take)
                except OSError as error:
                    if str(error) != self._unread_notes:
                        log.error("users whose changes were noted are not known: %s", error)
                    self._unread_notes = str(error)
                    continue
                self._unread_notes = ""
                names = await self._noted(found, permitted=permitted)
            if permitted:
                pause = notes.rest(await self._copied() if names else 0.0)

    async def _copied(self) -> float:
        """Wait while syncs run, but not for ever; return for how long (seconds)."""
        began = monotonic()
        while (took := monotonic() - began) < notes.LONGEST:
            if not any(peer.busy for peer in self._peers.values()):
                break
            await asyncio.sleep(COPIED_LOOK)
        return took

    async def _take_notes(self, *, permitted: bool) -> int:
        """Note whose change the agent was not asked for, and return how many they are. OSError.

        :param permitted: that was its own wish, so nothing is wrong with it.
        """
        return await self._noted(await asyncio.to_thread(self._notes.take), permitted=permitted)

    async def _noted(self, names: Sequence[str], *, permitted: bool) -> int:
        # If the agent dies here, the one that starts compares all users.
        for peer in self._peers.values() if names else ():
            if permitted:
                peer.follow(names)
            else:
                await peer.missed(names)
        return len(names)

    async def confirm(self, to: str) -> None:
        """Return when ``to`` has all that clients were told OK. The ports are closed.

        Whose change could not be told makes the group degraded. Changes of scripts were answered
        without asking, so they are no work in flight and waited for here. NotNow if ``to`` does not
        get all of it.
        """
        async with self._suspending:
            await self._take_notes(permitted=False)
        peer = self._peers[to]
        until = monotonic() + CONFIRM_TIMEOUT
        while not (await self._take_scripts() and peer.equal):
            # Not draining any more: the coordinator's time for a switchover is over.
            late = monotonic() > until or self._group.state.phase is not GroupPhase.DRAINING
            if late or not peer.phase.waits:
                raise NotNow(f"{peer.unequal()}; try again")
            await asyncio.sleep(CONFIRM_LOOK)

    @property
    def _unasked(self) -> bool:
        """Whether no change waits for anybody, by the operator's wish."""
        return self._mode is MirrorMode.ASYNC and not self._hurrying and not self._suspensions.group

    async def _permit(self) -> None:
        """Let Dovecot acknowledge changes without asking for as long as none waits for a peer."""
        while True:
            await asyncio.sleep(notes.RENEWAL)
            async with self._suspending:
                try:
                    # Before it and after it: the right may end while the peers are looked at.
                    if self._may_permit() and await self._excused() and self._may_permit():
                        self._notes.permit()
                    else:
                        self._notes.forbid()
                except OSError as error:
                    log.warning("Dovecot has to ask for each change: %s", error)

    def _may_permit(self) -> bool:
        return self._unasked and self._group.is_primary()

    async def _excused(self) -> bool:
        try:
            return all([await peer.excused() for peer in self._peers.values()])
        except Exception as error:  # whatever the cluster raises: nothing may be acknowledged
            log.info("Dovecot has to ask for each change: %s", error or type(error).__name__)
            return False

    async def _forbid(self) -> None:
        """Have each change asked for, and note those that were not."""
        await asyncio.sleep(self._notes.forbid() + FORBID_PAUSE)
        await self._take_notes(permitted=True)

    async def _follow_scripts(self) -> None:
        """Mirror changes of Sieve scripts soon after they were made."""
        while True:
            await asyncio.sleep(EVENTS_INTERVAL)
            try:
                await self._take_scripts()
            except OSError as error:
                log.warning("changes of Sieve scripts cannot be read: %s", error)
                await asyncio.sleep(EVENTS_RETRY)

    async def _take_scripts(self) -> bool:
        """Have the users synced whose scripts changed; False if this node may not act now.

        Then the events are left for when it may again. OSError if they cannot be read.
        """
        # To its end even if the caller goes away: what was read would not be read again.
        return await asyncio.shield(asyncio.create_task(self._scripts_taken()))

    async def _scripts_taken(self) -> bool:
        async with self._reading:
            if not self._group.is_primary():
                await asyncio.to_thread(self._events.keep)
                return False
            users = await asyncio.to_thread(self._events.take)
            # Also if the right has just ended: the notes outlast it.
            for name, peer in self._peers.items() if users else ():
                for user in users:
                    self._scripts[name].changed(user)
                peer.recheck(users)
            return True

    # -- what the operator wants of the mirror

    def _limit(self, peer: str) -> Phase:
        """Return how far the mirror to ``peer`` may go on the way to protected."""
        if self._suspensions.group:
            return Phase.RECORDING
        if self._mode is MirrorMode.ASYNC and not self._hurrying:
            return Phase.CATCHING_UP
        if peer not in self._waited_for() and not self._hurrying:
            return Phase.CATCHING_UP
        return self._furthest

    @property
    def _furthest(self) -> Phase:
        return Phase.JOINING if self._suspensions.users else Phase.PROTECTED

    def _waited_for(self) -> set[str]:
        phases, group = {name: peer.phase for name, peer in self._peers.items()}, self._group
        return chosen(phases, group.synchronous(), self._copies, group.rank, self._furthest)

    def _limits(self) -> Sequence[str]:
        found = [
            f"{peer} is being seeded since {seed.since}" for peer, seed in self._seeds.rows.items()
        ]
        found += self._suspensions.sentences(self._node)
        if self._mode is MirrorMode.ASYNC and not self._suspensions.group and not self._hurrying:
            found.append(
                "mailboxes are mirrored asynchronously:"
                f" the last changes may be only on {self._node}"
            )
        return found

    async def _keep_to_limit(self, reason: str) -> None:
        # All limits first: each is of how far the others were before any of them moved.
        limits = {name: self._limit(name) for name in self._peers}
        for name, peer in self._peers.items():
            await peer.keep_to(limits[name], self._suspensions.users, reason or FOLLOWS)

    async def _relax(self) -> None:
        """After a switchover nothing is missing and changes wait: back to what is wanted.

        Both nodes may die in between: the one that starts is alone until it has caught up.
        """
        while True:
            if self._group.is_primary():
                self._entitled_at = monotonic()
            await asyncio.sleep(RELAX_INTERVAL)
            if self._group.state.phase is not GroupPhase.PRIMARY:
                continue
            async with self._suspending:
                await self._keep_to_limit("; ".join(self._limits()))

    async def suspend(self, user: str, reason: str) -> None:
        """Copy no changes of ``user`` ("" for all users) any more; returns when that is durable.

        OSError if it is not.
        """
        async with self._suspending:
            unasked = self._unasked
            await asyncio.to_thread(self._suspensions.suspend, user, reason, now())
            if unasked and not self._unasked:
                await self._forbid()
            await self._keep_to_limit("; ".join(self._limits()))
        log.warning("the mirror of %s is suspended: %s", user or "all mailboxes", reason)

    async def unsuspend(self, user: str) -> bool:
        """Take ``suspend`` back and catch up; False if nothing was suspended."""
        async with self._suspending:
            if not await asyncio.to_thread(self._suspensions.resume, user):
                return False
            await self._keep_to_limit("; ".join(self._limits()))
        log.warning("the mirror of %s is resumed", user or "all mailboxes")
        return True

    @property
    def suspended(self) -> bool:
        """Whether the mirror of all mailboxes is suspended."""
        return self._suspensions.group

    def only_asynchronous(self, to: str) -> bool:
        """Whether nothing but the mode ``async`` keeps the mailboxes of ``to`` from being whole."""
        return (
            self._mode is MirrorMode.ASYNC
            and not self._suspensions.rows
            and to not in self._seeds.rows
            and self._peers[to].steady
        )

    async def hurry(self, to: str, timeout: float) -> None:
        """Let changes wait for ``to``; return when it has all, or after ``timeout`` seconds."""
        waited_for = self._mode is MirrorMode.SYNC and to in self._waited_for()
        if waited_for or to not in self._peers:  # what nobody can hurry the switchover refuses
            return
        async with self._suspending:
            unasked, self._hurrying = self._unasked, True
            if unasked:
                await self._forbid()
            await self._keep_to_limit("")
        await self._group.complete_within(to, timeout)

    def at_ease(self) -> None:
        """Take ``hurry`` back; ``_relax`` notices."""
        self._hurrying = False

    # -- seeding

    def _rate(self, peer: str) -> float:
        """Return how fast may be sent to ``peer``; changes that somebody waits for are not held."""
        seed = self._seeds.rows.get(peer)
        waits = self._peers[peer].phase is not Phase.CATCHING_UP
        return 0.0 if seed is None or waits else seed.rate

    async def seed(self, peer: str, rate: float) -> AsyncGenerator[dict[str, Any], None]:
        """Build the copy of ``peer`` anew, or go on with that, and yield the progress each second.

        Ends when all users are copied, or this node is not primary any more. Who stops listening
        stops nothing.

        :param rate: bytes a second at most, 0 for no limit.
        """
        mirror, pacer = self._peers[peer], self._pacers[peer]
        known = self._seeds.rows.get(peer)
        # First on disk: if the agent dies after this, the next one compares all users anyway, and
        # the worst is that it trusts the states, which dropping them first would not change.
        await asyncio.to_thread(self._seeds.put, peer, Seed(known.since if known else now(), rate))
        if known is None:
            log.warning("%s is seeded, at %s bytes/s", peer, rate or "any number of")
            self._compared.clear()
            await self._ledger.bind(peer, "")
            # A catch-up that runs already must begin again, so it is made to fail.
            lost = mirror.phase is not Phase.PROTECTED
            await mirror.lose(f"{peer} is being seeded", cut=True, lost=lost)
        sent, started = pacer.sent, monotonic()
        while peer in self._seeds.rows and self._group.is_primary():
            await asyncio.sleep(SEED_INTERVAL)
            progress = mirror.progress()
            left = progress["total"] - progress["done"]
            yield {
                "phase": mirror.phase.value,
                "users": int(progress["done"]),
                "total": int(progress["total"]),
                "bytes": pacer.sent - sent,
                "bytes_per_s": round((pacer.sent - sent) / (monotonic() - started)),
                "remaining_s": round(left / progress["rate"]) if progress["rate"] else None,
                "reasons": self._group.reasons(),
            }

    # -- the role

    def _lost(self, peer: str, reason: str) -> None:
        if self._group.is_primary():
            losing = self._peers[peer].lose(reason, cut=True)
            task = asyncio.create_task(losing, name=f"mirror loses {peer}")
            self._losing.add(task)
            task.add_done_callback(self._losing.discard)

    def _binding(self, peer: str, epoch: int, *, turned: bool = False) -> str:
        """Return what the sync states hold for: both stores, both boots, one term of office.

        :param turned: the states that ``peer`` keeps for this node.
        """
        own = self._group.state.durable
        theirs = self._group.statuses.get(peer, {})
        boot = BOOT_ID.read_text(encoding="ascii").strip()
        ours, others = (own.storage_id, boot), (theirs.get("storage_id"), theirs.get("boot_id"))
        first, second = (others, ours) if turned else (ours, others)
        return " ".join(str(part) for part in (*first, epoch, *second))

    async def catch_up(self, peer: str, protect: Callable[[], Awaitable[None]]) -> None:
        """Give ``peer`` all changes that it lacks, then have ``protect`` write it down.

        PeerError if it cannot be done now.
        """
        binding = self._binding(peer, self._group.epoch)
        merge = not self._group.is_copy(peer)

        async def copied() -> None:
            if merge:
                await self._passed_on(peer)
                # Dying before it is told: the mailboxes are merged again, which changes nothing.
                await self._group.links[peer].request("merged", {}, timeout=MERGED_TIMEOUT)
            self._compared.add(binding)
            if peer in self._seeds.rows:
                await asyncio.to_thread(self._seeds.put, peer, None)
                log.warning("the seeding of %s is complete", peer)

        while True:
            while self._limit(peer) is Phase.RECORDING:
                await asyncio.sleep(RELAX_INTERVAL)
                if peer not in self._group.synchronous():
                    raise PeerError(
                        "unreachable", f"{peer} was lost while its mirror was suspended"
                    )
            try:
                await self._peers[peer].catch_up(
                    protect,
                    everyone=binding not in self._compared,
                    binding=binding,
                    merge=merge and binding not in self._compared,
                    copied=copied,
                )
                return
            except CatchUpFailed as error:
                if (
                    self._limit(peer) is not Phase.RECORDING
                    or peer not in self._group.synchronous()
                ):
                    raise PeerError("catch-up", str(error)) from None

    async def resume(self, peer: str, epoch: int) -> None:
        """Wait for ``peer`` from now on: it hands over to us, so it has what we have.

        :param epoch: the one under which this node is about to be primary.
        """
        binding = self._binding(peer, epoch)
        theirs = self._binding(peer, epoch - 1, turned=True)
        inherited = InheritedStates(self._group.links[peer], theirs, self._carriers[peer])
        await self._peers[peer].resume(binding, inherited)
        self._compared.add(binding)
        if peer in self._seeds.rows:  # begun when this node was primary before
            await asyncio.to_thread(self._seeds.put, peer, None)

    async def _begin_merge(self, record: Record) -> None:
        await asyncio.to_thread(record.begin, self._group.epoch, now())

    def _equal_expected(self, user: str, peer: str) -> bool:
        return (
            self._group.is_primary()
            and user not in self._suspensions.users
            and self._peers[peer].steady
        )

    def stop(self) -> None:
        """End all waiting: this node is not primary."""
        self._notes.forbid()
        self._gap.stop()
        self._mirror.stop()

    async def quiet(self) -> None:
        """Return when nothing that another primary sent is written to mailboxes here any more.

        OSError if that goes on: then this node must not open.
        """
        await self._dsync_handler.quiet()

    def replaces_a_lost_one(self) -> None:
        """Prepare for the return of a lost node, whose role is this one's now; see ``uid_gap``."""
        self._gap.begin()

    # -- for others

    async def verify(
        self, users: Sequence[str], *, bodies: bool, repair: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Compare ``users`` (none: all) with every peer; see ``Verifier.run``.

        The first item is ``{"total": N}``. DoveadmError if nobody can tell who there is.
        """
        users = users or await self._doveadm.users()
        yield {"total": len(users) * len(self._peers)}
        async with aclosing(self._verifier.run(users, bodies=bodies, repair=repair)) as results:
            async for result in results:
                yield result

    async def merged(self) -> list[dict[str, Any]]:
        """Return what was merged with each peer that came back; OSError if it cannot be read."""
        records = await asyncio.gather(
            *(asyncio.to_thread(record.read) for record in self._merged.values())
        )
        return [record for record in records if record is not None]

    async def delivered(self, recipient: str, shadow_id: str) -> bool:
        """Return whether a mailbox of ``recipient`` has the message; OSError if nobody can tell."""
        return bool(
            await self._ask(recipient, lambda user: self._doveadm.has_delivery(user, shadow_id))
        )

    async def present(self, recipient: str, shadow_id: str, message_id: str) -> bool | None:
        """Return whether a mailbox of ``recipient`` has the message, by either id.

        One that was sent again bears its first id as well. None if there is no such mailbox;
        OSError if nobody can tell.
        """
        return await self._ask(
            recipient, lambda user: self._doveadm.has_message(user, shadow_id, message_id)
        )

    async def _ask(
        self, recipient: str, has: Callable[[str], Awaitable[bool | None]]
    ) -> bool | None:
        try:
            for user in dict.fromkeys((recipient, plain(recipient))):
                for merger in self._mergers.values():
                    await merger.settled(user)
                found = await has(user)
                if found is not None:
                    if not found:
                        await self._gap.before(user)  # it is about to be stored
                    return found
        except DoveadmError as error:
            raise OSError(str(error)) from None
        return None

    async def knows(self, user: str) -> bool:
        """Return whether there is such a user; OSError if nobody can tell."""
        try:
            return await self._doveadm.exists(user)
        except DoveadmError as error:
            raise OSError(str(error)) from None

    def lag(self) -> Mapping[str, Lag]:
        """Return how far each peer is behind, in changes and seconds."""
        return {name: peer.lag() for name, peer in self._peers.items()}

    def checks(self) -> Sequence[Check]:
        """Return the findings of this part."""
        found = {user: why for peer in self._peers.values() for user, why in peer.findings.items()}
        some = "; ".join(f"{user}: {why}" for user, why in list(found.items())[:5])
        return [
            Check(
                "mirrorable users", not found, len(found), 0,
                f"{len(found)} users cannot be mirrored{': ' + some if some else ''}.",
            ),
            *self._differing(),
            self._notes_check(),
        ]  # fmt: skip

    def _notes_check(self) -> Check:
        stuck = self._notes.stuck
        text = "Users whose changes did not reach the agent are known"
        if self._unread_notes:
            text = (
                f"Users whose changes did not reach the agent are not known: {self._unread_notes}"
            )
        elif stuck:
            text = f"The notes of {len(stuck)} users cannot be removed: {', '.join(stuck[:5])}"
        passed = not stuck and not self._unread_notes
        return Check("noted changes", passed, len(stuck), 0, f"{text}.")

    def _differing(self) -> Sequence[Check]:
        if not self._group.is_primary():
            return ()
        by_peer = self._verifier.different.items()
        users = sorted({user for _, found in by_peer for user in found})
        return [
            Check(
                "equal copies", not users, len(users), 0,
                f"{len(users)} users differed when they were last compared"
                + (f": {', '.join(users[:5])}; umbractl verify --repair mends it." if users
                   else "."),
            )
        ]  # fmt: skip
