"""A planned change of primary: nothing is lost, nothing needs repair afterwards.

On the primary, in this order (docs/operations.md shows what a failure at each step leaves behind):

1. prepare: all of the queue is on the candidate, which starts Postfix behind its closed ports.
2. drain: new mail gets 421; messages that have begun are finished.
3. close: ports closed for new and established connections, users disconnected, Postfix stopped.
4. flush: every mailbox change that is in flight reaches the candidate.
5. give up: the right to act is given up, on disk.
6. hand over: the candidate is told the new epoch, which recipients of which messages are not
   delivered yet, and which messages are on hold. It makes both durable,
   opens its ports and answers.
7. tidy: queue files are held, those that the new primary has taken over until another node has
   them too (``left_behind``), others for the administrator.

Until 5 a failure takes everything back. After 5 only the candidate's word counts: if it took over,
all is well; if it did not, the right is taken back
under a higher epoch, which the candidate must have seen first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from umbra.cluster import left_behind, machine
from umbra.cluster.group import PRIMARY_OPERATIONS, Group, now
from umbra.cluster.machine import NotNow
from umbra.cluster.state import Change, Phase, Role
from umbra.config import Config, StonithUse
from umbra.epoch import epoch_of
from umbra.node.client import NodeHelper
from umbra.node.helper import HelperError
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.identity import PeerIdentity
from umbra.peer.server import Handler
from umbra.transport.remaining import Left, Remaining, rows_of, take
from umbra.transport.store import StoreError

log = logging.getLogger(__name__)

PREPARE_TIMEOUT = 20.0
MESSAGES_TIMEOUT = 5.0
LAST_WORDS = 0.03
"""Seconds. A 250 that a closed port keeps back would have its sender come again."""
CHANGES_TIMEOUT = 10.0
HANDOVER_TIMEOUT = 10.0
OUTCOME_TIMEOUT = 15.0
OUTSTANDING_PAUSE = 0.2
PREPARED_FOR = 60.0
MAX_NAMED = 1000
"""Queue ids in an answer, which has a bound where it goes over the link."""
MOVING = ("incoming", "active", "deferred")
"""Queues whose messages were acknowledged, and are to be delivered."""


class Refused(Exception):
    """The switchover did not happen.

    One sentence for people. The primary is who it was, or nobody until the reason is gone.
    """


async def told(exchange: Exchange) -> Remaining:
    """Return what a handover says of the queue.

    KeyError, TypeError or ValueError if that makes no sense.
    """
    found: dict[str, Left] = {}
    async for row in exchange.receive_lines():
        take(found, row)
    return found


class Messages(left_behind.Messages, Protocol):
    """What a switchover needs of the transport."""

    def covered(self, peer: str) -> Mapping[str, str]:
        """Return which of this node's messages ``peer`` has a copy of: shadow ids by queue id."""
        ...

    async def uncovered(self, peer: str) -> Mapping[str, str]:
        """Return what of Postfix's queue is acknowledged and has no copy on ``peer``.

        With the queue that each file is in, by queue id. HelperError.
        """
        ...

    async def outstanding(self) -> int:
        """Return how many messages this node alone has, or has still to carry on. StoreError."""
        ...

    def unsettled(self, peer: str) -> bool:
        """Return whether ``peer`` may hold for former primaries what this node has carried on."""
        ...

    def gave_up(self) -> None:
        """Forget the copies at the shadows: they are the new primary's now."""
        ...

    async def take_over(self, origin: str, remaining: Remaining | None) -> None:
        """Make the messages that are held for ``origin`` this node's to resubmit, durably.

        :param remaining: what is left of its queue; None if that is not known.
        """
        ...

    def resubmit(self) -> None:
        """Begin, or go on, to resubmit what was taken over, in the background."""
        ...


class Mailboxes(Protocol):
    """What a switchover needs of the mirror."""

    def only_asynchronous(self, to: str) -> bool:
        """Whether nothing but the mode ``async`` keeps the mailboxes of ``to`` from being whole."""
        ...

    async def hurry(self, to: str, timeout: float) -> None:
        """Let changes wait for ``to`` from now on; return when all are there, or it is late.

        Nothing to do where they wait for it anyway. OSError if nobody can tell what it lacks.
        """
        ...

    async def confirm(self, to: str) -> None:
        """Return when ``to`` has all that was acknowledged, without this node's word too.

        NotNow if it does not get it; or the group is degraded then. OSError if nobody can tell.
        """
        ...

    def at_ease(self) -> None:
        """Take ``hurry`` back."""
        ...

    async def resume(self, peer: str, epoch: int) -> None:
        """Mirror changes to ``peer``, which has all that this node has, from now on."""
        ...

    def stop(self) -> None:
        """Take ``resume`` back."""
        ...

    async def quiet(self) -> None:
        """Return when nothing of a former primary's is written to mailboxes here any more.

        OSError if that goes on.
        """
        ...

    def replaces_a_lost_one(self) -> None:
        """Prepare for the return of a lost node, whose role is this one's for certain. At once."""
        ...


class Steps:
    """Measures the steps of a change, for its report."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.rows: list[dict[str, Any]] = []

    def done(self, name: str) -> None:
        """Note the end of a step."""
        at = time.monotonic()
        self.rows.append({"name": name, "seconds": round(at - self._last, 4)})
        log.info("switchover: %s took %.3f s", name, at - self._last)
        self._last = at


class Switchover:
    """Both ends of a planned change, and an operator's promotion of a shadow."""

    def __init__(
        self,
        config: Config,
        group: Group,
        helper: NodeHelper,
        messages: Messages,
        mailboxes: Mailboxes,
    ) -> None:
        self._config = config
        self._group = group
        self._helper = helper
        self._messages = messages
        self._mailboxes = mailboxes
        self._running = asyncio.Lock()
        self._automatic = False
        self.left_behind = left_behind.LeftBehind(group, helper, messages)

    def handlers(self) -> dict[str, Handler]:
        """Return the operations of the peer link."""
        return {"handover-prepare": self.handle_prepare, "handover": self.handle_handover}

    def check(self, to: str, *, dry_run: bool = False) -> bool:
        """Return whether there is anything to do on this primary to make ``to`` primary.

        Refused with the reason if it cannot be done.
        """
        state = self._group.state
        if to == state.node:
            return False
        if to not in self._group.links:
            known = ", ".join(sorted([state.node, *self._group.links]))
            raise Refused(f"{to} is no node of this group; it has {known}.")
        if state.phase is not Phase.PRIMARY:
            raise Refused(f"{state.node} is {state.phase}, not an open primary.")
        if self._group.is_whole(to):
            return True
        if not state.protected and not (dry_run and self._mailboxes.only_asynchronous(to)):
            raise Refused(
                f"the group is degraded, so {to} may lack something:"
                f" {'; '.join(self._group.reasons())}."
            )
        view = state.peers.get(to)
        if view is None or not (view.synchronous and dry_run):
            raise Refused(f"{to} is not protected: {view.reason if view else 'not heard of yet'}.")
        return True

    async def run(self, to: str, *, dry_run: bool, timeout_s: float) -> dict[str, Any]:
        """Make ``to`` primary in at most ``timeout_s`` seconds of waiting.

        This node is the primary. Refused with the reason if it does not happen.
        """
        if self._running.locked():
            raise Refused("a switchover is running already.")
        deadline = time.monotonic() + timeout_s
        async with self._running:
            try:
                if not dry_run:
                    await self._hurry(to, timeout_s)
                return await self._run(to, dry_run=dry_run, deadline=deadline)
            finally:
                self._mailboxes.at_ease()

    async def _hurry(self, to: str, timeout_s: float) -> None:
        try:
            await self._mailboxes.hurry(to, timeout_s)
        except OSError as error:
            raise Refused(f"{error}.") from None

    async def _run(self, to: str, *, dry_run: bool, deadline: float) -> dict[str, Any]:
        result = {
            "changed": self.check(to, dry_run=dry_run),
            "from": self._group.state.node,
            "to": to,
            "epoch": self._group.epoch,
        }
        if not result["changed"] or dry_run:
            lacking = await self._would_lack(to) if result["changed"] else []
            return {
                **result,
                "outage_s": 0.0,
                "steps": [],
                "uncovered": lacking[:MAX_NAMED],
                "uncovered_count": len(lacking),
            }
        steps = Steps()
        try:
            await self._prepare(to, steps, deadline)
            change = await self._change(to, steps)
        except (NotNow, PeerError, StoreError, HelperError, OSError) as error:
            raise Refused(f"{error}.") from None
        finally:
            self._group.switching = False
        return {
            **result,
            "epoch": self._group.epoch,
            "outage_s": change.outage_s,
            "steps": steps.rows,
        }

    async def _prepare(self, to: str, steps: Steps, deadline: float) -> None:
        # What is in this node's store only would be nobody's to deliver.
        while count := await self._messages.outstanding():
            if time.monotonic() > deadline:
                raise Refused(f"{count} messages of the former primary are not carried on yet.")
            await asyncio.sleep(OUTSTANDING_PAUSE)
        while not self._automatic and self._messages.unsettled(to):
            if time.monotonic() > deadline:
                raise Refused(f"what {to} holds for former primaries is not gone through yet.")
            await asyncio.sleep(OUTSTANDING_PAUSE)
        # A node that is ailing goes all the same: what has no copy waits on hold here.
        while not self._automatic and self._others and (lacking := await self._lacking(to)):
            if time.monotonic() > deadline:
                raise Refused(self._lacks(to, lacking))
            await asyncio.sleep(OUTSTANDING_PAUSE)
        if (left := deadline - time.monotonic()) <= 0:
            raise Refused(f"the time was over before {to} could be prepared; try again.")
        await self._group.links[to].request(
            "handover-prepare", {}, timeout=min(PREPARE_TIMEOUT, left)
        )
        steps.done("prepare")

    def _lacks(self, to: str, lacking: Sequence[str]) -> str:
        return (
            f"{to} has no copy of {len(lacking)} messages of the queue"
            f" ({', '.join(lacking[:5])}); try again when they are delivered, or leave them"
            f" on {self._group.state.node} with `postsuper -h`."
        )

    @property
    def _others(self) -> bool:
        """Whether a third node may have what the candidate lacks, so that the primary must not go.

        Of a pair nobody has it, and a notice of Postfix's own, which has no copy, must not hold up
        a switchover: it waits on hold.
        """
        return len(self._group.links) > 1

    async def _would_lack(self, to: str) -> list[str]:
        """Return what would wait on hold here; Refused if a switchover would be."""
        try:
            lacking = await self._lacking(to)
        except HelperError as error:
            raise Refused(f"{error}.") from None
        if lacking and self._others:
            raise Refused(self._lacks(to, lacking))
        return lacking

    async def _lacking(self, to: str) -> list[str]:
        """Return what of the queue, as far as Postfix is to deliver it, ``to`` has no copy of."""
        left = await self._messages.uncovered(to)
        return sorted(key for key, place in left.items() if place in MOVING)

    async def _change(self, to: str, steps: Steps) -> Change:
        group = self._group
        await group.apply(machine.Drain())
        began = time.monotonic()
        try:
            remaining = await self._emptied(to, steps)
            await group.apply(machine.GiveUp(to, now()))
        except BaseException:
            await self._take_back()
            raise
        covered = self._messages.covered(to)
        change = Change(group.state.node, to, now(), planned=True)
        try:
            outage = await self._hand_over(to, change, remaining, began)
        except PeerError as error:
            log.error("%s did not confirm the handover: %s", to, error)
            await self._outcome(to, error)
            outage = round(time.monotonic() - began, 4)
        change = replace(change, outage_s=outage)
        with contextlib.suppress(NotNow):  # its own word came first
            await group.apply(machine.TakenOver(change))
        self._messages.gave_up()
        steps.done("hand over")
        await self._tidy(covered, remaining, group.state.durable.epoch)
        steps.done("tidy")
        return change

    async def _emptied(self, to: str, steps: Steps) -> Remaining:
        """Bring what is in flight to its end; return what is left of the queue."""
        group = self._group
        seconds = min(MESSAGES_TIMEOUT, group.drain_left())
        if not await group.messages.idle(seconds):
            raise Refused(f"a message was still coming in after {seconds:.1f} s; try again.")
        # The milter has answered for all of them; Postfix says 250 when its disk has the file.
        await asyncio.sleep(LAST_WORDS)
        steps.done("drain")
        # Closed first: then nobody can come whom the other node does not know as a client, and no
        # client sees its connection end before there is a node to come back to. Until then they are
        # kept open: who is being answered has to hear it.
        group.switching = True
        await self._helper.ports_close()
        await group.before_disconnect(to)
        await asyncio.gather(
            self._helper.kick(self._config.fence.ports), self._helper.postfix_stop()
        )
        steps.done("close")
        seconds = min(CHANGES_TIMEOUT, group.drain_left())
        if not await group.changes.idle(seconds):
            raise Refused(f"a mailbox change was still under way after {seconds:.1f} s; try again.")
        await self._mailboxes.confirm(to)
        if not group.is_whole(to):
            raise Refused(f"{to} was lost on the way: {'; '.join(group.reasons())}.")
        remaining = await self._remaining()
        steps.done("flush")
        return remaining

    async def _remaining(self) -> Remaining:
        """Return who still has to get each message of the queue. Postfix does not run."""
        remaining = await self._helper.remaining()
        queue = await self._helper.queue()
        unknown = [
            queue_id
            for queue_id, place in queue.items()
            if place not in ("maildrop", "arriving", "corrupt") and queue_id not in remaining
        ]
        if unknown:
            # Not listed would mean delivered: better no switchover than that.
            raise Refused(f"Postfix does not tell the recipients of {', '.join(unknown[:5])}.")
        # Postfix cannot read these and never will; the copy is the message now.
        corrupt = [queue_id for queue_id, place in queue.items() if place == "corrupt"]
        listed = {
            queue_id: Left(tuple(names), held=queue.get(queue_id) == "hold")
            for queue_id, names in remaining.items()
        }
        return {**listed, **dict.fromkeys(corrupt, Left(None))}

    async def _take_back(self) -> None:
        """Before the right was given up.

        Open again. Clients saw a 421 or a reset, nothing worse.
        """
        self._group.switching = False  # or the group closes what is opened here
        await self._group.apply(machine.DrainAborted())
        if self._group.state.phase is Phase.PRIMARY:
            await self._helper.postfix_start()
            await self._helper.ports_open(self._config.fence.ports, self._config.fence.hold)

    async def _hand_over(
        self, to: str, change: Change, remaining: Remaining, began: float
    ) -> float:
        """Return for how long clients were without a primary, in seconds."""
        args = {
            "epoch": self._group.state.durable.offered,
            "change": change.to_json(),
            "elapsed_s": time.monotonic() - began,
        }
        link = self._group.links[to]
        async with link.exchange("handover", args, timeout=HANDOVER_TIMEOUT) as exchange:
            await exchange.send_lines(list(rows_of(remaining)))
            return float((await exchange.result())["outage_s"])

    async def _outcome(self, to: str, error: PeerError) -> None:
        """Wait until it is known who is primary.

        Refused if it is this node again, or nobody yet.
        """
        with contextlib.suppress(NotNow):  # its own word came first
            await self._group.apply(machine.Reclaim())
        await self._group.leaves(Phase.HANDING_OVER, OUTCOME_TIMEOUT)
        match self._group.state.phase:
            case Phase.PRIMARY:
                raise Refused(
                    f"{to} failed half-way ({error}); {self._group.state.node} is primary again."
                )
            case Phase.HANDING_OVER:
                raise Refused(
                    f"{to} does not answer ({error}), so it is not known whether it took over;"
                    f" {self._group.state.node} stays closed until it is heard, or until"
                    " `umbractl open --force`."
                )

    @property
    def _has_role_back(self) -> bool:
        """Whether this node acts again, or will when it has opened: the queue is its own."""
        return self._group.is_primary() or self._group.state.durable.role is Role.PRIMARY

    async def _tidy(self, covered: Mapping[str, str], remaining: Remaining, epoch: int) -> None:
        """Hold the queue: what the primary of ``epoch`` has taken over, and what it has no copy of.

        Dying before it is done leaves queue files here that the next promotion of this node would
        deliver again; so an agent that finds itself a shadow puts all of its queue on hold.
        """
        if self._has_role_back:
            return  # the new primary is lost already
        left = remaining.keys() - covered.keys()
        try:
            await self._helper.queue_hold(sorted(remaining))
        except HelperError as error:
            log.error("the queue could not be tidied after the handover: %s", error)
            return
        taken = {key: shadow_id for key, shadow_id in covered.items() if key in remaining}
        held = {key for key in taken if remaining[key].held}
        self.left_behind.put(taken, epoch, held)
        if left:
            log.warning("%d messages without a copy are on hold: %s", len(left), ", ".join(left))

    # -- the candidate's end

    async def handle_prepare(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Handler of ``handover-prepare``."""
        try:
            await self._group.prepare(PREPARED_FOR)
        except HelperError as error:
            raise PeerError("failed", str(error)) from None
        return {}

    async def handle_handover(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Handler of ``handover``: become primary, durably, and open."""
        began = time.monotonic()
        try:
            epoch, change = epoch_of(args["epoch"]), Change.from_json(args["change"])
            elapsed = float(args["elapsed_s"])
            remaining = await told(exchange)
        except (KeyError, TypeError, ValueError) as error:
            raise PeerError("protocol", f"a handover that makes no sense: {error!r}") from None
        if change.old != peer.node or change.new != self._group.state.node:
            raise PeerError(
                "refused", f"{peer.node} cannot hand over from {change.old} to {change.new}"
            )
        await self.left_behind.finish(peer.node)
        try:
            # The tending loop opens as soon as the right is this node's.
            await self._mailboxes.quiet()
            # The right first: only then can no other message of the old primary arrive here. Dying
            # before the claim leaves a primary that claims at its start, without knowing who of
            # several recipients had a message: it asks the mailboxes.
            await self._mailboxes.resume(peer.node, epoch)
            try:
                await self._group.apply(machine.Promote(epoch, change, protected=True))
            except BaseException:
                self._mailboxes.stop()
                raise
            await self._begin({peer.node: remaining})
            outage = round(elapsed + time.monotonic() - began, 4)
            await self._group.apply(machine.Opened(outage))
        except (NotNow, StoreError, OSError) as error:
            raise PeerError("failed", str(error)) from None
        return {"outage_s": outage}

    async def _begin(self, left: Mapping[str, Remaining | None]) -> None:
        """Take over what each former primary has left, and open. See ``Messages.take_over``."""
        try:
            for origin, remaining in left.items():
                await self._messages.take_over(origin, remaining)
            # The tending loop opens the ports as well; doing it here keeps its pause out of the
            # outage. First Postfix: the service address, which comes with the ports, leads to what
            # runs.
            await self._helper.postfix_start()
            await self._helper.ports_open(self._config.fence.ports, self._config.fence.hold)
        finally:
            # Also if this node opens later: what it has taken over is its to carry on.
            self._messages.resubmit()

    # -- the operator's word

    def loss(self) -> dict[str, Any]:
        """Return what a promotion of this node may lose, as far as it knows."""
        raise Refused("without a coordinator nobody knows what a promotion would lose.")

    async def _shoot(self, node: str, wanted: bool) -> str:
        """Have the hook switch ``node`` off, if there is one; return what it said.

        Refused if it fails: the node may act still.
        """
        if not wanted or self._config.stonith.use is StonithUse.NEVER:
            return ""
        log.warning("%s is switched off, for a forced failover", node)
        try:
            said = await self._helper.stonith(node)
        except HelperError as error:
            log.error("%s was not switched off: %s", node, error)
            raise Refused(
                f"the hook that switches {node} off failed, so nothing was promoted: {error}."
                f" If you know that {node} is off: --without-stonith."
            ) from None
        log.warning("%s has been switched off: %s", node, said)
        return said or f"{node} has been switched off."

    async def failover(self, *, accept_loss: bool, stonith: bool = True) -> dict[str, Any]:
        """Promote this shadow although its primary is gone.

        The static coordinator can never prove that nothing is lost, so a person must accept it.
        """
        group = self._group
        for name, view in group.state.peers.items():
            if view.reachable:
                raise Refused(
                    f"{name} answers and is {view.role}; use switchover, or cut it off first."
                )
        if not accept_loss:
            raise Refused(
                "without a witness nobody can prove that the lost primary acknowledged nothing"
                " alone; say --accept-loss if that is acceptable."
            )
        if group.state.durable.role is Role.PRIMARY:
            raise Refused(f"{group.state.node} is primary already; see umbractl open.")
        old = next(iter(group.links), group.state.node)
        said = await self._shoot(old, stonith)
        change = Change(old, group.state.node, now(), planned=False)
        try:
            group.break_off(PRIMARY_OPERATIONS)
            await self._mailboxes.quiet()
            # +2: over everything that the lost primary may have offered to another.
            await group.apply(machine.Promote(group.epoch + 2, change, protected=False))
            self._mailboxes.replaces_a_lost_one()
            await self._begin(dict.fromkeys(group.links))
        except (NotNow, StoreError, OSError) as error:
            raise Refused(f"{error}.") from None
        return {
            "changed": True, "from": old, "to": group.state.node, "epoch": group.epoch,
            "stonith": said,
        }  # fmt: skip

    async def open_by_force(self) -> dict[str, Any]:
        """Open this node, which waits, on an operator's word that no other acts."""
        try:
            await self._group.apply(machine.OpenByForce(now()))
        except (NotNow, OSError) as error:
            raise Refused(f"{error}.") from None
        return {"changed": True, "epoch": self._group.epoch}
