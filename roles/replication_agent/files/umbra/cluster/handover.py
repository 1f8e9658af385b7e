"""A planned change of primary in a group with a witness, and an operator's promotion.

On the primary: prepare, drain, close and flush as with the static coordinator; then the candidate
is told who has to get what is left of the queue, and the key is handed over. From that moment the
key alone decides: whoever holds it opens by itself. If it was never handed over, this node opens
again.

The candidate keeps what it was told in memory. If it dies before it has opened, it asks the
mailboxes instead, as after any failover.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from umbra.cluster import ailing, words
from umbra.cluster import protocol as p
from umbra.cluster.driver import OPEN_PHASES
from umbra.cluster.group import now
from umbra.cluster.machine import NotNow
from umbra.cluster.quorum import QuorumGroup
from umbra.cluster.state import Change
from umbra.cluster.switchover import (
    HANDOVER_TIMEOUT,
    Mailboxes,
    Messages,
    Refused,
    Steps,
    Switchover,
    told,
)
from umbra.config import Config, HandoverPolicy, StonithUse
from umbra.epoch import epoch_of
from umbra.node.client import NodeHelper
from umbra.node.helper import HelperError
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.identity import PeerIdentity
from umbra.peer.server import Handler
from umbra.transport.ports import NotPrimary
from umbra.transport.remaining import Remaining, rows_of

log = logging.getLogger(__name__)

VOLUNTEER_TIMEOUT = 20.0
# Giving the role away has failed: so many seconds until the next time.
VOLUNTEER_PAUSE = 60.0


@dataclass(frozen=True)
class _Given:
    """What the former primary has told before it handed over."""

    by: str
    epoch: int
    remaining: Remaining


class Handover(Switchover):
    """Both ends of a planned change, and an operator's word, by the key."""

    def __init__(
        self,
        config: Config,
        group: QuorumGroup,
        helper: NodeHelper,
        messages: Messages,
        mailboxes: Mailboxes,
    ) -> None:
        super().__init__(config, group, helper, messages, mailboxes)
        self._quorum = group
        self._given: _Given | None = None
        self._hindered = ("", "")
        self._not_before = 0.0
        group.on_ailing = self.volunteer
        group.on_promotion = self._promoted

    def handlers(self) -> dict[str, Handler]:
        """Return the operations of the peer link."""
        return {**super().handlers(), "handover-finish": self._handle_finish}

    # -- the primary's end

    async def volunteer(self, ailments: Sequence[str]) -> None:
        """Give the role away, since this node is ailing; if that cannot be, nothing has changed."""
        group = self._quorum
        # A person's switchover goes before.
        if not group.is_primary() or self._running.locked() or time.monotonic() < self._not_before:
            return
        to = ailing.successor(self._candidates(), self._config.site)
        hindrance = self._hinders(to)
        reason = "; ".join(ailments)
        if hindrance or to is None:
            if (hindrance, reason) != self._hindered:
                self._hindered = hindrance, reason
                log.warning(
                    "%s stays primary (%s), although %s", group.state.node, hindrance, reason
                )
            return
        log.warning("%s is to be primary: %s", to.node, reason)
        self._automatic = True
        try:
            await self.run(to.node, dry_run=False, timeout_s=VOLUNTEER_TIMEOUT)
        except Refused as error:
            self._put_off(to.node, str(error))
        except Exception as error:
            log.exception("the handover failed")
            self._put_off(to.node, repr(error))
        finally:
            self._automatic = False

    def _put_off(self, to: str, why: str) -> None:
        self._not_before = time.monotonic() + VOLUNTEER_PAUSE
        log.error("the role was not given to %s, tried again in %g s: %s", to, VOLUNTEER_PAUSE, why)

    def _hinders(self, to: ailing.Candidate | None) -> str:
        """Return why this ailing primary stays what it is, or nothing."""
        if self._config.handover.policy is HandoverPolicy.ALARM:
            return "replication_agent_handover_policy is alarm"
        restraint = self._quorum.restraint()
        if restraint is not None:
            return restraint
        return "" if to else "no shadow is protected, well and allowed to take over by itself"

    def _candidates(self) -> list[ailing.Candidate]:
        """Return the shadows, as they last said of themselves."""
        found = []
        for peer in self._config.peers:
            said = self._group.statuses.get(peer.name, {})
            view = self._group.state.peers.get(peer.name)
            try:
                policy, preference = p.Policy(said["policy"]), int(said["preference"])
            except (KeyError, TypeError, ValueError):
                continue
            found.append(
                ailing.Candidate(
                    peer.name, peer.site,
                    whole=view is not None and view.reachable and view.complete,
                    ailing=bool(said.get("ailments")), policy=policy, preference=preference,
                )
            )  # fmt: skip
        return found

    async def _change(self, to: str, steps: Steps) -> Change:
        group, quorum = self._group, self._quorum
        await words.switch(quorum.driver, to, automatic=self._automatic)
        began = time.monotonic()
        try:
            remaining = await self._emptied(to, steps)
            change = Change(group.state.node, to, now(), planned=True)
            if not (left := group.drain_left()):
                raise Refused(f"{group.state.node} did not come to an end in time; try again.")
            # An answer that comes later is of no use, and clients wait.
            async with group.links[to].exchange(
                "handover", {"epoch": group.epoch + 1}, timeout=min(HANDOVER_TIMEOUT, left)
            ) as exchange:
                await exchange.send_lines(list(rows_of(remaining)))
                await exchange.result()
            covered = self._messages.covered(to)
            await words.give_up(quorum.driver, to)
        except BaseException:
            await self._take_back()
            raise
        self._messages.gave_up()
        epoch, failure = group.epoch, ""
        try:
            link = group.links[to]
            answer = await link.request(
                "handover-finish", {"epoch": epoch}, timeout=HANDOVER_TIMEOUT
            )
            log.info("%s opened within %.3f s of its word", to, float(answer["seconds"]))
        except (PeerError, KeyError, TypeError, ValueError) as error:
            log.warning("%s has the key, but has not said that it is open: %s", to, error)
            if isinstance(error, PeerError) and error.code == "failed":
                # It gives no proof of work any more, so this node takes the role back.
                failure = error.text
                timing = quorum.driver.config.timing
                await quorum.driver.until(group.is_primary, timing.work + 2 * timing.silence)
        if self._has_role_back:  # under another epoch
            failure = failure or f"{to} was lost before it served"
            raise Refused(f"{failure}; {group.state.node} is primary again.")
        change = replace(change, outage_s=round(time.monotonic() - began, 4))
        await quorum.changed(change)
        steps.done("hand over")
        await self._tidy(covered, remaining, epoch)
        steps.done("tidy")
        if failure:
            raise Refused(f"{failure}; it has the role all the same, and tries again.")
        return change

    async def _take_back(self) -> None:
        """Open again, unless the key is another's: what is pending resolves itself."""
        group = self._group
        group.switching = False
        if group.is_primary():
            await self._helper.postfix_start()
        self._quorum.reopen()

    # -- the candidate's end

    async def handle_handover(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Handler of ``handover``: note who has to get what is left, for the epoch to come."""
        try:
            epoch = epoch_of(args["epoch"])
            remaining = await told(exchange)
        except (KeyError, TypeError, ValueError) as error:
            raise PeerError("protocol", f"a handover that makes no sense: {error!r}") from None
        # First: one that nobody waits for any more must not come to its end after the next one.
        self._given = _Given(peer.node, epoch, remaining)
        await self.left_behind.finish(peer.node)
        return {}

    async def _handle_finish(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Handler of ``handover-finish``: the key has changed; answer when this node is open."""
        began = time.monotonic()
        self._quorum.driver.note(p.Nudged())
        epoch, opening = args.get("epoch"), self._quorum.opening

        def done() -> bool:
            return self._group.is_primary() and self._group.epoch == epoch

        await self._quorum.driver.until(lambda: done() or opening.hopeless, HANDOVER_TIMEOUT)
        if opening.hopeless:
            raise PeerError("failed", opening.error)
        if not done():
            raise PeerError("timeout", f"{self._group.state.node} is not open yet")
        return {"seconds": time.monotonic() - began}

    async def _promoted(self, epoch: int, former: str | None) -> Collection[str]:
        """Take over what the former primary left, before this node serves."""
        await self._mailboxes.quiet()
        self._still(epoch)
        whole = await self._take_over(epoch, former)
        # Not before: what fails is tried again with it.
        self._given = None
        return whole

    async def _take_over(self, epoch: int, former: str | None) -> Collection[str]:
        given = self._given
        if (
            given is not None
            and self._quorum.planned
            and (given.by, given.epoch) == (former, epoch)
        ):
            await self._mailboxes.resume(given.by, epoch)
            self._still(epoch)
            await self._messages.take_over(given.by, given.remaining)
            return (given.by,)
        # If the right has ended already, nothing would end this: a shadow must have no gap.
        if not self._quorum.planned and self._quorum.driver.state.phase in OPEN_PHASES:
            self._mailboxes.replaces_a_lost_one()
        if former is not None and not self._quorum.planned and not self._quorum.by_word:
            await self._shoot_lost(former)
        for origin in self._group.links:
            self._still(epoch)
            await self._messages.take_over(origin, None)
        return ()

    def _still(self, epoch: int) -> None:
        """NotPrimary if the key is another's by now: what came under that is not to be claimed."""
        if not self._quorum.holds(epoch):
            raise NotPrimary("the key is another's by now")

    async def _shoot_lost(self, former: str) -> None:
        """Switch off whom this node has replaced by itself, if that is wished.

        The key and the deadlines have fenced it already, so a hook that fails stops nothing.
        """
        if self._config.stonith.use is not StonithUse.ALWAYS:
            return
        try:
            said = await self._helper.stonith(former)
            log.warning("%s has been switched off: %s", former, said)
        except HelperError as error:
            log.error(
                "%s was not switched off, its right has ended all the same: %s", former, error
            )

    # -- the operator's word

    async def failover(self, *, accept_loss: bool, stonith: bool = True) -> dict[str, Any]:
        """Promote this shadow although nobody can prove that nothing is lost."""
        group = self._group
        known = self._quorum.driver.state.known
        old = known.holder if known is not None else None
        if p.holds(self._quorum.driver.state):
            raise Refused(f"{old} holds the role already.")
        # The key may be that of a former store of this node, which nobody else can act for.
        own = old == group.state.node
        if old is not None and not own and group.answers(old):
            state = group.statuses.get(old, {}).get("state")
            if state in OPEN_PHASES:
                raise Refused(f"{old} answers and is {state}; use switchover, or cut it off first.")
        if not accept_loss:
            raise Refused("say --accept-loss if what only the lost primary has may be lost.")
        # Nobody is switched off for what would be refused then.
        reason = p.unforceable(self._quorum.driver.state, self._quorum.stores())
        if reason is not None:
            raise Refused(f"{reason}.")
        said = "" if old is None or own else await self._shoot(old, stonith)
        try:
            await words.force(self._quorum)
        except (NotNow, OSError) as error:
            raise Refused(f"{error}.") from None
        return {
            "changed": True, "from": old, "to": group.state.node, "epoch": group.epoch,
            "stonith": said,
        }  # fmt: skip

    def loss(self) -> dict[str, Any]:
        """Return what an operator's promotion of this node may lose, as far as it knows."""
        return words.loss(self._quorum)

    async def open_by_force(self) -> dict[str, Any]:
        """Make the key that the coordinator has lost, with this node as primary."""
        group = self._group
        for peer in group.links:
            if group.answers(peer) and group.statuses.get(peer, {}).get("state") in OPEN_PHASES:
                raise Refused(f"{peer} answers and is primary; say it there.")
        try:
            await words.make_key(self._quorum)
        except (NotNow, OSError) as error:
            raise Refused(f"{error}.") from None
        return {"changed": True, "epoch": self._group.epoch}
