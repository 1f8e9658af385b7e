"""The transport as one part of the agent: makes its pieces and joins them to the cluster."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Protocol

from umbra.api.report import Check
from umbra.cluster.group import Group
from umbra.config import Config, ShadowPolicy
from umbra.node.client import NodeHelper
from umbra.node.helper import HelperError
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.identity import PeerIdentity
from umbra.peer.link import PeerLink
from umbra.peer.server import Handler
from umbra.transport import coverage, selection, view
from umbra.transport.aliases import Aliases
from umbra.transport.backfill import BackFill
from umbra.transport.coverage import Names
from umbra.transport.discard import Discarder, Holder, LocalHolder, PeerHolder
from umbra.transport.milter_server import MilterServer
from umbra.transport.once import Once
from umbra.transport.once_server import NAME, OnceServer
from umbra.transport.ports import Refusal
from umbra.transport.remaining import Remaining
from umbra.transport.replay import Replayer
from umbra.transport.resubmit import Resubmission, Resubmitter
from umbra.transport.safety_net import SafetyNet
from umbra.transport.service import MAX_STORES, ShadowService
from umbra.transport.settle import Settlement
from umbra.transport.shadowing import Shadowing
from umbra.transport.store import Holding, Meta, ShadowStore, State, StoreError

log = logging.getLogger(__name__)

STATS_INTERVAL = 1.0
COVER_INTERVAL = 5.0
"""Seconds between two looks for what has no copy; what only one of them finds is on its way."""
BACK_FILL_PAUSE = 0.2
BACK_FILL_TIMEOUT = 3600.0
RIGHT_PAUSE = 0.2
HEADROOM = 32 * 1024 * 1024
"""Bytes of room under which new messages are refused at MAIL; those that have begun still fit."""
MAX_AGE = 4 * 3600.0
"""Seconds; an older shadow message means mail that the primary cannot get rid of."""
MAX_PARKED = 1000
"""Of more messages that were set aside only the first are named."""


LOAD = {
    "": "There is room for messages.",
    "disk": "The disk of the shadow store is almost full.",
    "queue": "The shadow queue has its full size (shadow_max_size).",
    "busy": "Too many messages are coming in at once.",
}
ALONE = (State.RESUBMITTING, State.UNSHADOWED)
"""Messages that no other node has, or that are not taken over yet."""
FULL_HERE = Refusal(452, "4.3.1", "No room for messages at this moment, try again later")
FULL_THERE = Refusal(452, "4.3.1", "The second server has no room for a copy, try again later")
BUSY_THERE = Refusal(451, "4.3.2", "The second server is busy, try again later")


class Paths(Protocol):
    """The paths that this part uses."""

    @property
    def state(self) -> Path: ...  # noqa: D102
    @property
    def delivery(self) -> Path: ...  # noqa: D102
    @property
    def milter(self) -> Path: ...  # noqa: D102


class Mailboxes(Protocol):
    """What the transport asks of the mailboxes; OSError if they cannot tell now."""

    async def delivered(self, recipient: str, shadow_id: str) -> bool:
        """Return whether a mailbox of ``recipient`` has the message."""
        ...

    async def present(self, recipient: str, shadow_id: str, message_id: str) -> bool | None:
        """Return whether it has it by either id; None if there is no such mailbox."""
        ...


class _Face:
    """The group as ``transport.ports.Group``."""

    def __init__(self, group: Group) -> None:
        self._group = group

    @property
    def epoch(self) -> int:
        return self._group.epoch

    def accepting(self) -> Refusal | None:
        return self._group.accepting()

    def shadows(self) -> Sequence[PeerLink]:
        return self._group.shadows()

    async def shadow_failed(self, peer: str, reason: str) -> None:
        await self._group.shadow_failed(peer, reason)

    def may_acknowledge(self, epoch: int, holders: Collection[str]) -> bool:
        return self._group.may_acknowledge(epoch, holders)

    def begin_work(self) -> AbstractContextManager[None]:
        return self._group.messages.begin()


class Messages:
    """Messages in transit, on either side."""

    def __init__(
        self,
        config: Config,
        group: Group,
        helper: NodeHelper,
        paths: Paths,
        mailboxes: Mailboxes,
    ) -> None:
        self._config = config
        self._sites = {peer.name: peer.site for peer in config.peers}
        self._group = group
        self._helper = helper
        settings = config.transport
        self._store = ShadowStore(paths.state / "shadow", keep=settings.safety_net_hold > 0)
        self._net = SafetyNet(
            self._store, hold=settings.safety_net_hold,
            max_size=settings.safety_net_max_size << 20, queued=self._queued,
        )  # fmt: skip
        self._names = Names(helper.shadow_ids)
        self._aliases = Aliases(helper.aliases)
        holders: list[Holder] = [
            LocalHolder(self._store, config.node),
            *map(PeerHolder, group.links.values()),
        ]
        self._discarder = Discarder(
            holders, helper.queue, names=self._names_of, needed=self._store.to_carry_on,
            acts=group.is_primary,
        )  # fmt: skip
        resubmissions: dict[str, Resubmission] = {}
        replays: set[str] = set()
        self._once = Once(mailboxes.delivered)
        self._once_server = OnceServer(paths.delivery / NAME, self._once)
        self._shadowing = Shadowing(
            config.node,
            _Face(group),
            self._store,
            self._discarder,
            resubmissions,
            replays,
            policy=settings.shadow_policy,
            timeout=settings.shadow_timeout,
            net=self._net,
            enough=self._enough,
            pressure=self._pressure,
            accepted=self._once.accepted,
        )
        self._milter = MilterServer(paths.milter, self._shadowing)
        self._service = ShadowService(
            self._store, lambda: group.epoch, lambda node: group.primary() == node, self._full
        )
        self._back_fill = BackFill(
            config.node, self._store, self._discarder, lambda: self._shadowing.storing_alone,
            group.shadows,
        )  # fmt: skip
        self._resubmitter = Resubmitter(
            config.node,
            self._store,
            self._discarder,
            resubmissions,
            queue_ids=self._queue_ids,
            committed_ids=self._committed_ids,
            delivered=mailboxes.delivered,
            targets=self._aliases.targets,
        )
        self._settlement = Settlement(
            self._store, settings.safety_net_hold, lambda: group.state.serving, self.resubmit
        )
        self._replayer = Replayer(
            config.node,
            self._store,
            queue_ids=self._queue_ids,
            present=mailboxes.present,
            leading_to=self._aliases.leading_to,
            replays=replays,
        )
        self._resubmitting = asyncio.Event()
        self._held = (0, 0)
        self._oldest: float | None = None
        self._own = 0
        self._uncovered: Mapping[str, Sequence[str]] = {}
        self._parked = 0
        self._first_parked: Sequence[Meta] = ()
        self._room = HEADROOM
        self._resubmit_at = 0.0
        self._unsettled: set[str] = set()
        self._settling = ""

    async def open(self) -> None:
        """Open the store."""
        await self._store.open()

    async def close(self) -> None:
        """Stop listening and close the store; what was not answered is not acknowledged."""
        await self._milter.stop()
        await self._once_server.stop()
        await self._net.close()
        await self._store.close()

    async def listen(self) -> None:
        """Let Postfix in, and Dovecot's deliveries ask."""
        await self._once_server.start()
        await self._milter.start()

    def handlers(self) -> dict[str, Handler]:
        """Return the operations of the peer link."""
        return {**self._service.handlers(), "shadow-outstanding": self._handle_outstanding}

    async def run(self) -> None:
        """Discard, resubmit, keep, purge and count, until cancelled."""
        if self._group.is_primary():  # it was alone and has opened at once
            self._resubmitting.set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._store.watch())  # its end is the agent's: it starts anew
            tasks.create_task(self._discarder.run())
            tasks.create_task(self._resubmit_when_told())
            tasks.create_task(self._settle())
            tasks.create_task(self._net.run())
            tasks.create_task(self._count())
            tasks.create_task(self._cover())

    async def _count(self) -> None:
        while True:
            with suppress(StoreError):
                self._room = await self._store.room()
                rows = await self._store.stats()
                held = [row for row in rows if row.state is State.HELD]
                self._held = sum(row.count for row in held), sum(row.bytes for row in held)
                self._oldest = min((row.oldest for row in held), default=None)
                self._own = _count(rows, *ALONE, State.PARKED)
                self._parked = _count(rows, State.PARKED)
                self._first_parked = await self._set_aside() if self._parked else ()
            await asyncio.sleep(STATS_INTERVAL)

    def held(self) -> tuple[int, int]:
        """Return (messages, bytes) that are held for other nodes; at most a second old."""
        return self._held

    def alone(self) -> int:
        """Return how many messages are here only, or not taken over yet; at most a second old."""
        return self._own

    # -- enough copies, too much load

    def _enough(self, holders: Collection[str]) -> bool:
        settings = self._config.transport
        return selection.enough(
            holders, self._sites, self._config.site,
            settings.shadow_preference, settings.shadow_copies,
        )  # fmt: skip

    def _full(self) -> bool:
        limit = self._config.transport.shadow_max_size << 20
        return 0 < limit <= self._held[1]

    def load(self) -> str:
        """Return why this node should get no more messages to hold: a word of LOAD, or ""."""
        if self._room < HEADROOM:
            return "disk"
        if self._full():
            return "queue"
        return "busy" if self._service.running >= MAX_STORES else ""

    def _pressure(self) -> Refusal | None:
        """Return why no message is taken at MAIL because of somebody's load.

        What a shadow says is as old as its last heartbeat. Under ``accept`` a full shadow is no
        reason: then the message is taken here. Nor is any load while the other shadows are enough:
        one that cannot take a message in the end is gone on without.
        """
        shadows = self._group.shadows()
        if not shadows and self._room < HEADROOM:
            return FULL_HERE
        defer = self._config.transport.shadow_policy is ShadowPolicy.DEFER
        words = {
            link.name: self._group.statuses.get(link.name, {}).get("load", "") for link in shadows
        }
        refusing = {
            name: word for name, word in words.items() if word == "busy" or (word and defer)
        }
        if not refusing or self._enough(words.keys() - refusing.keys()):
            return None
        return BUSY_THERE if "busy" in refusing.values() else FULL_THERE

    def checks(self) -> Sequence[Check]:
        """Return the findings of this part."""
        age = None if self._oldest is None else round(max(0.0, time.time() - self._oldest), 1)
        load = self.load()
        return [
            Check("load", not load, load, "", LOAD[load]),
            *self._copies_check(),
            Check(
                "shadow queue age", age is None or age <= MAX_AGE, age, MAX_AGE,
                "No shadow message is held here."
                if age is None
                else f"The oldest shadow message held here is {age:.0f} s old.",
            ),
            Check(
                "own messages", True, self._own, None,
                f"{self._own} messages are kept here until a shadow has them.",
            ),
            self._cover_check(),
            Check("parked messages", not self._parked, self._parked, 0, self._said_of_parked()),
        ]  # fmt: skip

    def _cover_check(self) -> Check:
        found = [
            f"{name} has no copy of {len(keys)} acknowledged messages of the queue:"
            f" {', '.join(keys[:5])}"
            for name, keys in self._uncovered.items()
        ]
        count = max(map(len, self._uncovered.values()), default=0)
        text = "; ".join(found) or "Each acknowledged message of the queue has its copies"
        return Check("queue copies", not found, count, 0, f"{text}.")

    def _said_of_parked(self) -> str:
        if not self._first_parked:
            return "No message was set aside."
        row = view.parked(self._first_parked, self._resubmitter.reasons)[0]
        return (
            f"{self._parked} messages cannot be carried on and are kept here, see umbractl queue;"
            f" for example {row['shadow_id']} of {row['origin']}: {row['reason']}."
        )

    async def _set_aside(self) -> Sequence[Meta]:
        """Return the first of the messages that were set aside."""
        found: list[Meta] = []
        async for meta in self._store.in_order(State.PARKED):
            found.append(meta)
            if len(found) == MAX_PARKED:
                break
        return found

    def _copies_check(self) -> Sequence[Check]:
        holders = [link.name for link in self._group.shadows()]
        if not holders:  # alone, or no primary: the reasons of the degradation say it
            return ()
        wanted = self._config.transport.shadow_copies
        found = len(
            selection.counting(
                holders, self._sites, self._config.site, self._config.transport.shadow_preference
            )
        )
        return [
            Check(
                "shadow copies", found >= wanted, found, wanted,
                f"{found} shadows that count have each message; {wanted} are wanted.",
            )
        ]  # fmt: skip

    async def queue(self) -> dict[str, Any]:
        """Return what is in transit here, as ``GET /queue`` tells it. StoreError if unreadable."""
        return view.queue(
            self._config.node, await self._store.stats(), self._discarder.counts(), time.time(),
            view.parked(await self._set_aside(), self._resubmitter.reasons),
        )  # fmt: skip

    async def drop(self, shadow_id: str) -> bool:
        """Delete a message that was set aside, on an operator's word. StoreError.

        Return whether there was such a one.
        """
        meta = await self._store.find(shadow_id)
        gone = meta and await self._store.discard(
            [shadow_id], origin=meta.origin, state=State.PARKED, delivered=False
        )
        if gone:
            log.warning("%s was dropped by an operator", shadow_id)
        return bool(gone)

    async def catch_up(self, peer: str) -> None:
        """Copy to ``peer`` what only this node has; return when nothing is left.

        PeerError or StoreError if it cannot be done now.
        """
        found = await self._discarder.reconcile(peer)
        if found.missing:
            log.warning("%s has lost %d shadow messages", peer, len(found.missing))
        try:
            async with asyncio.timeout(BACK_FILL_TIMEOUT):
                while True:
                    if (await self._back_fill.run(self._group.links[peer])).complete:
                        break
                    await asyncio.sleep(BACK_FILL_PAUSE)
        except TimeoutError:
            raise PeerError("timeout", f"the back-fill of {peer} did not end") from None
        # It was empty, or another shadow was there when it was not. New messages go to it already.
        await self._copy_queue(peer)

    async def _copy_queue(self, peer: str) -> None:
        await self._net.flush()
        left = await self.uncovered(peer)
        # Not what is on hold: after a failover that is what the former primary had, and the other
        # node has carried it on. A copy would be resubmitted at the next change of primary, to
        # recipients elsewhere a second time. A message that somebody put on hold for another reason
        # keeps the copy it has, and gets none here if it has none.
        there = self._discarder.known(peer)
        wanted = {key for key, place in left.items() if place != "hold" or key in there}
        names = await self._names.of_all(wanted)
        await self._back_fill.run_queue(self._group.links[peer], wanted, names)

    async def prove_caught_up(self, peer: str) -> None:
        """Copy what is left, if anything, at once. PeerError if that is not the end of it."""
        if not (await self._back_fill.run(self._group.links[peer])).complete:
            raise PeerError("catch-up", f"there are still messages that {peer} lacks")
        # What was acknowledged before it joined, and not committed yet when the queue was listed.
        await self._copy_queue(peer)

    # -- promotion

    async def take_over(self, origin: str, remaining: Remaining | None) -> None:
        """Make ``origin``'s messages this node's to resubmit; see ``cluster.switchover``."""
        self._discarder.forget()
        self._once.doubt()
        self._unsettled.clear()
        self._settlement.forget()
        if remaining is None:
            pause = self._config.transport.resubmit_after
            self._resubmit_at = asyncio.get_running_loop().time() + pause
        await self._resubmitter.claim(origin, remaining)

    async def uncovered(self, peer: str) -> Mapping[str, str]:
        """Return what of Postfix's queue is acknowledged and has no copy on ``peer``.

        With the queue that each file is in, by queue id. HelperError.
        """
        return coverage.uncovered(await self._helper.queue(), self._discarder.covered(peer))

    async def _cover(self) -> None:
        """Look for what has no copy where it should have one, and make it if that can be done."""
        seen: Mapping[str, Set[str]] = {}
        tried: Set[str] = set()
        while True:
            await asyncio.sleep(COVER_INTERVAL)
            found: dict[str, Set[str]] = {}
            # One that is not whole has its catch-up, and the group is degraded.
            links = self._group.shadows() if self._group.is_primary() else ()
            try:
                for link in links:
                    if self._group.is_whole(link.name):
                        found[link.name] = await self._bare(link.name)
                lasting = {name: keys & seen.get(name, set()) for name, keys in found.items()}
                self._uncovered = {name: sorted(keys) for name, keys in lasting.items() if keys}
                for name, keys in lasting.items():
                    if keys - tried:
                        await self._copy_queue(name)
                tried = {key for keys in lasting.values() for key in keys}
            except (HelperError, PeerError, StoreError) as error:
                log.info("what has no copy is looked for again: %s", error)
            seen = found

    async def _bare(self, peer: str) -> Set[str]:
        """Return what lacks a copy on ``peer``, but for what a former primary has on hold."""
        left = await self.uncovered(peer)
        there = self._discarder.known(peer)
        # That bears an id, unlike what another milter has quarantined before ours was asked.
        names = await self._names.of({key for key, place in left.items() if place == "hold"})
        return {
            key
            for key, place in left.items()
            if place != "hold" or key in there or names.get(key) == ""
        }

    def covered(self, peer: str) -> Mapping[str, str]:
        """Return which of this node's messages ``peer`` has a copy of: shadow ids by queue id."""
        return self._discarder.covered(peer)

    async def outstanding(self) -> int:
        """Return how many messages this node alone has, or has still to carry on. StoreError.

        What was set aside stays here, whoever is primary, until this node is again, or an operator
        drops it.
        """
        return _count(await self._store.stats(), *ALONE)

    async def _handle_outstanding(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """``shadow-outstanding``: how many of a former primary's ``messages`` are left to it still.

        Those that this node has not claimed yet count too. ``parked`` are the ids of those that it
        cannot carry on; more than can be named count as left.
        """
        try:
            rows = await self._store.stats()
            parked = [meta.shadow_id for meta in await self._set_aside()]
        except StoreError as error:
            raise PeerError("store-failed", str(error)) from None
        unclaimed = _count(rows, State.HELD)
        unnamed = max(0, _count(rows, State.PARKED) - len(parked))
        return {"messages": _count(rows, *ALONE) + unclaimed + unnamed, "parked": parked}

    def unsettled(self, peer: str) -> bool:
        """Return whether ``peer`` may hold for former primaries what this node has carried on."""
        return peer in self._unsettled or peer == self._settling

    async def passed_on(self, shadow_ids: Mapping[str, str], since: int) -> set[str]:
        """Return the queue ids of what came here as a copy; see ``cluster.left_behind``."""
        found = [(key, await self._store.find(value)) for key, value in shadow_ids.items()]
        return {key for key, meta in found if meta is not None and meta.epoch >= since}

    async def give_back(self) -> None:
        """Hold what was taken over and not carried on yet for whose it was: a shadow again.

        HelperError if that has to be tried again.
        """
        try:
            count = await self._store.give_back()
        except StoreError as error:
            raise HelperError(str(error)) from None
        if count:
            log.warning("%d messages that were being taken over wait for a primary", count)

    def gave_up(self) -> None:
        """Forget the copies elsewhere: they are the new primary's."""
        self._discarder.forget()

    def being_delivered(self, user: str, shadow_id: str) -> bool:
        """Return whether a delivery to ``user`` has asked for the message; see ``Once.asked``."""
        return self._once.asked(user, shadow_id)

    def resubmit(self) -> None:
        """Begin to resubmit what was taken over, also what was set aside before."""
        self._resubmitting.set()

    async def _resubmit_when_told(self) -> None:
        while True:
            await self._resubmitting.wait()
            self._resubmitting.clear()
            # An agent that starts anew in between does not wait.
            await asyncio.sleep(self._resubmit_at - asyncio.get_running_loop().time())
            # With a quorum, the right can lapse at this instant and come back without an opening,
            # and then nobody tells this again.
            while not self._group.is_primary() and self._group.state.serving:  # noqa: ASYNC110
                await asyncio.sleep(RIGHT_PAUSE)
            if not self._group.is_primary():
                continue
            self._aliases.forget()
            try:
                # What a crash between promotion and claim has left, and of nodes that have left.
                held = [row for row in await self._store.stats() if row.state is State.HELD]
                for origin in {row.origin for row in held} - {self._config.node}:
                    await self._resubmitter.claim(origin, None)
                await self._store.unpark()
            except StoreError as error:
                log.error("messages of the former primary cannot be claimed: %s", error)
            report = await self._resubmitter.run()
            self._unsettled = set(self._group.links)
            if report.resubmitted or report.duplicates or report.finished_before:
                log.info(
                    "resubmitted %d messages, dropped %d duplicates, %d were finished before",
                    report.resubmitted, report.duplicates, report.finished_before,
                )  # fmt: skip

    async def _settle(self) -> None:
        """Go through what the shadows hold for former primaries; see ``transport.settle``.

        An agent that dies before does so after its start: it looks what is to be resubmitted.
        """
        while True:
            await asyncio.sleep(STATS_INTERVAL)
            for name, link in self._group.links.items():
                # Also one that has no room, and so does not catch up before this.
                if name not in self._unsettled or not self._group.answers(name):
                    continue
                self._unsettled.discard(name)
                self._settling = name
                try:
                    # Until all is carried on, the copies there are what would be promoted with.
                    rows = await self._store.stats()
                    if _count(rows, State.HELD, *ALONE) or not self._group.is_primary():
                        self._unsettled.add(name)
                        break
                    await self._settlement.run(link, self._group.whole_since())
                except (PeerError, StoreError) as error:
                    log.info("%s keeps the copies of former primaries: %s", name, error)
                    self._unsettled.add(name)
                finally:
                    self._settling = ""

    async def replay(
        self, recipient: str, since: float, until: float, *, dry_run: bool
    ) -> dict[str, Any]:
        """Replay delivered messages to a mailbox; see ``transport.replay``.

        UnknownMailbox, SmtpError, StoreError or OSError if it cannot be done now.
        """
        self._aliases.forget()
        await self._net.flush()
        result = await self._replayer.run(recipient, since, until, dry_run=dry_run)
        return result.to_json()

    # -- the queue

    async def _queued(self) -> Set[str]:
        """Return queue ids and shadow ids of what is in the queue still."""
        return await self._queue_ids() | set(self._discarder.known().values())

    async def _names_of(self, queue_ids: Set[str]) -> Mapping[str, str]:
        """Return the shadow ids that queue files bear; what is still being written bears none."""
        written = queue_ids & await self._helper.committed() if queue_ids else queue_ids
        return dict.fromkeys(queue_ids - written, "") | await self._names.of(written)

    async def _queue_ids(self) -> set[str]:
        return set(await self._helper.queue())

    async def _committed_ids(self) -> set[str]:
        return await self._helper.committed()


def _count(rows: Iterable[Holding], *states: State) -> int:
    return sum(row.count for row in rows if row.state in states)
