"""A group with a witness: the driver, the group and the handover, with a fake world around them."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
from tests.unit.cluster.quorum_field import TIMING, D, Field, Node, Play, clock

from umbra.api.report import Check
from umbra.cluster import protocol as p
from umbra.cluster import said, words
from umbra.cluster.machine import NotNow
from umbra.cluster.quorum import GUARDED, OPENING_FAILS
from umbra.cluster.static import StateError
from umbra.cluster.switchover import Refused
from umbra.config import Profile, Stonith, StonithUse
from umbra.peer import frames
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.frames import FrameType
from umbra.peer.identity import PeerIdentity
from umbra.transport.ports import NotPrimary
from umbra.transport.remaining import Left, Remaining
from umbra.transport.store import StoreError


def test_a_new_group_opens_and_becomes_protected(group: Play) -> None:
    async def scenario(field: Field) -> None:
        record = field.register.record
        assert (record.holder, record.mode) == ("a", p.Mode.PROTECTED)
        assert {member.node for member in record.protected} == {"b"}
        assert field.a.group.may_acknowledge(1, {"b"})
        assert not field.a.group.may_acknowledge(1, ())
        assert not field.b.group.may_acknowledge(1, {"a"})
        assert field.b.group.accepting() is not None

    group(scenario)


def test_a_lost_primary_is_replaced_and_returns_as_a_shadow(group: Play) -> None:
    async def scenario(field: Field) -> None:
        field.a.host.queue_ids = {"Q1": "deferred", "Q2": "maildrop"}
        await field.a.power_cut()
        took = await field.until(lambda: field.b.serves, 2 * D)
        assert D - TIMING.beat <= took <= D + 0.7
        assert field.b.parts.taken == [("a", None)]
        assert field.b.broken_off
        assert field.register.record.mode is p.Mode.ALONE
        change = field.b.group.state.durable.last_change
        assert change is not None
        assert (change.old, change.new, change.planned) == ("a", "b", False)
        assert change.outage_s is not None
        assert change.outage_s <= took + TIMING.beat
        field.a.start()
        await field.protected(field.b)
        assert field.a.host.held == ["Q1"]
        assert not field.a.host.postfix
        assert field.a.group.driver.state.durable.acted == 0  # merged with the new primary's
        await field.b.power_cut()
        await field.until(lambda: field.a.serves, p.LONGEST + D)
        assert field.a.group.epoch == 3

    group(scenario)


def test_a_catch_up_that_ends_while_the_voters_are_away_waits_for_them(group: Play) -> None:
    async def scenario(field: Field) -> None:
        async def catch_up(peer: str, protect: Callable[[], Awaitable[None]]) -> None:
            await asyncio.sleep(3)
            field.register.frozen.set()
            try:
                await protect()
            except NotNow as error:  # as the mirror does
                await field.a.group.mirror_failed(peer, str(error))
                raise

        field.a.group.catch_up = catch_up
        field.separate("a", "b")
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, 2 * D)
        field.cut.clear()
        await field.until(field.register.frozen.is_set, 20)
        began = clock()
        while clock() - began < 60:
            await asyncio.sleep(0.05)
            assert field.a.serves
            assert field.a.host.open
        field.register.frozen.clear()
        await field.until(lambda: field.register.record.mode is p.Mode.PROTECTED, 5)

    group(scenario)


def test_postfix_is_started_before_the_role_is_taken(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.a.power_cut()
        await field.until(lambda: field.b.host.postfix, D)
        assert field.register.record.holder == "a"
        assert not field.b.host.open
        await field.until(lambda: field.b.serves, 2 * D)
        assert field.b.host.warm == 1

    group(scenario)


def test_postfix_is_stopped_when_the_primary_is_heard_again(group: Play) -> None:
    async def scenario(field: Field) -> None:
        # Frozen for a moment less than D: it cannot write down that it goes on alone.
        field.register.frozen.set()
        field.separate("a", "b")
        await field.until(lambda: field.b.host.postfix, D)
        field.cut.clear()
        field.register.frozen.clear()
        await field.until(lambda: not field.b.host.postfix, 3 * D)
        assert field.a.serves
        assert field.register.record.epoch == 1
        await asyncio.sleep(3 * D)
        assert not field.b.host.postfix

    group(scenario)


def test_postfix_stays_stopped_on_a_shadow_that_is_left_behind_or_may_not_take_over(
    group: Play,
) -> None:
    async def scenario(field: Field) -> None:
        field.separate("a", "b")
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        await asyncio.sleep(2 * D)
        assert not field.b.host.postfix
        field.cut.clear()
        await field.protected(field.a)
        await words.pause(field.b.group.driver, True)
        await field.a.power_cut()
        await asyncio.sleep(2 * D)
        assert not field.b.host.postfix

    group(scenario)


def test_a_pause_that_ends_while_the_primary_s_agent_restarts_costs_it_no_role(
    group: Play,
) -> None:
    async def scenario(field: Field) -> None:
        await words.pause(field.a.group.driver, True)
        await field.a.crash()
        await asyncio.sleep(2 * D)
        field.a.start()
        field.a.host.works.clear()  # its first proof of work takes a moment
        await words.pause(field.b.group.driver, False)
        await asyncio.sleep(D / 2)
        field.a.host.works.set()
        await field.protected(field.a)
        assert field.register.record.epoch == 1

    group(scenario)


def test_who_is_lost_under_a_pause_is_replaced_after_it(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await words.pause(field.b.group.driver, True)
        await field.a.power_cut()
        await asyncio.sleep(2 * D)
        assert not field.b.serves
        await words.pause(field.b.group.driver, False)
        took = await field.until(lambda: field.b.serves, 2 * D)
        assert D <= took <= D + 0.7

    group(scenario)


@pytest.mark.parametrize("says", [True, False], ids=["new agent", "older agent"])
def test_a_shorter_profile_at_the_shadow_waits_for_the_primary_s(group: Play, says: bool) -> None:
    async def scenario(field: Field) -> None:
        b = field.b
        await b.crash()
        shorter = replace(b.config.coordinator, profile=Profile.LAN_FAST)
        b.config = replace(b.config, coordinator=shorter)
        b.start()
        renew = b.handlers["renew"]

        async def renewed(peer: Any, args: Mapping[str, Any], exchange: Any) -> dict[str, Any]:
            assert args["silence"] == D
            return await renew(peer, args if says else {"epoch": args["epoch"]}, exchange)

        b.handlers["renew"] = renewed
        await field.protected(field.a)
        await asyncio.sleep(p.LONGEST)
        field.separate("a", "b")
        field.register.cut.add("a")
        # The watch of the field sees that the two never overlap.
        silence = D if says else p.LONGEST
        took = await field.until(lambda: b.serves, 2 * silence)
        assert took >= silence - TIMING.beat

    group(scenario)


@pytest.mark.parametrize("silence", [0, -1.0, "2.5", None, float("inf"), float("nan")])
def test_a_renewal_with_a_d_that_makes_no_sense_is_refused(group: Play, silence: Any) -> None:
    async def scenario(field: Field) -> None:
        renew = field.b.handlers["renew"]
        args = {"epoch": 1, "silence": silence}
        with pytest.raises(PeerError, match="the silence of a renewal"):
            await renew(PeerIdentity("a", ""), args, cast(Exchange, None))

    group(scenario)


def test_the_ports_are_never_open_for_longer_than_the_right(group: Play) -> None:
    async def scenario(field: Field) -> None:
        assert field.a.host.until <= field.a.group.driver.right_until()
        field.separate("a", "b")
        field.register.cut.add("a")
        await field.until(lambda: field.b.serves, 2 * D)
        # The watch of the field sees that the two never overlap.
        await field.until(lambda: field.a.phase is p.Phase.FENCED, 1)
        with pytest.raises(NotPrimary):
            await field.a.group.mirror_failed("b", "no answer")
        field.cut.clear()
        field.register.cut.clear()
        await field.protected(field.b)

    group(scenario)


def test_a_lost_shadow_makes_the_group_alone_within_a_second_and_a_half(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.b.power_cut()
        took = await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        assert took <= TIMING.miss + TIMING.beat + 0.1
        assert field.a.serves
        await field.until(lambda: field.a.group.synchronous() == [], 0.1)
        assert field.a.group.reasons()
        field.b.start()
        await field.protected(field.a)
        assert field.longest_gap < 0.1

    group(scenario)


def test_a_message_that_the_shadow_refuses_waits_for_the_word_alone(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.a.group.shadow_failed("b", "its disk is full")
        assert field.register.record.mode is p.Mode.ALONE
        assert field.a.group.may_acknowledge(1, ())
        await field.protected(field.a)

    group(scenario)


def test_a_mirror_that_falls_behind_keeps_the_messages_going_to_the_shadow(group: Play) -> None:
    async def scenario(field: Field) -> None:
        seen: set[tuple[str, ...]] = set()

        async def look() -> None:
            while True:
                seen.add(tuple(field.a.group.synchronous()))
                await asyncio.sleep(0.001)

        looking = asyncio.create_task(look())
        await field.a.group.mirror_failed("b", "suspended", lost=False)
        assert field.register.record.mode is p.Mode.ALONE
        await field.protected(field.a)
        looking.cancel()
        assert seen == {("b",)}

    group(scenario)


async def never_delivers(field: Field, node: Node, seconds: float) -> None:
    """Postfix does not run, or it would deliver what another node has taken over."""
    began = clock()
    while clock() - began < seconds:
        assert not node.host.postfix
        await asyncio.sleep(0.01)


def test_who_is_cut_off_while_it_opens_starts_no_postfix_any_more(group: Play) -> None:
    async def scenario(field: Field) -> None:
        a, b = field.a, field.b
        await a.power_cut()
        await b.power_cut()
        a.start()
        b.start()
        await field.until(lambda: a.phase is p.Phase.PRIMARY, 10)
        field.separate("a", "b")
        field.register.cut.add("a")
        await field.until(lambda: b.serves, 5 * D)
        await never_delivers(field, a, 10)

    group(scenario)


def test_who_waits_for_the_voters_starts_no_postfix(group: Play) -> None:
    async def scenario(field: Field) -> None:
        a, b = field.a, field.b
        field.register.frozen.set()
        await b.crash()
        await field.until(lambda: not a.host.open, D)
        b.start()
        await asyncio.sleep(5)
        await never_delivers(field, a, 10)
        field.separate("a", "b")
        field.register.cut.add("a")
        field.register.frozen.clear()
        await field.until(lambda: b.serves, 5 * D)
        await never_delivers(field, a, 10)

    group(scenario)


def test_who_cannot_work_leaves_nobody_behind_whatever_it_says_of_the_other(group: Play) -> None:
    """A disk that fails here looks like a shadow that takes nothing: it has to take over then."""

    async def scenario(field: Field) -> None:
        a, b = field.a, field.b
        a.host.works.clear()
        with pytest.raises(NotPrimary):
            await a.group.mirror_failed("b", "the sync broke off: Input/output error")
        await field.until(lambda: b.serves, 2 * D)

    group(scenario)


@pytest.mark.parametrize("works", [True, False])
def test_who_goes_alone_is_not_protected_by_what_was_given_up(group: Play, works: bool) -> None:
    """A sync breaks off while it is being written down that the peer has everything."""

    async def scenario(field: Field) -> None:
        a = field.a
        tried = asyncio.Event()

        async def catch_up(peer: str, protect: Callable[[], Awaitable[None]]) -> None:
            if tried.is_set():
                await asyncio.Future()
            tried.set()
            if not works:
                a.host.works.clear()
                driver = a.group.driver
                while p.proven(driver.config, driver.state, clock()):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            task = asyncio.ensure_future(protect())
            await asyncio.sleep(0 if works else 0.2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await a.group.mirror_failed(peer, "a sync broke off", lost=False)
            a.host.works.set()
            a.group.work.at_once()
            await asyncio.Future()

        a.group.catch_up = catch_up
        field.separate("a", "b")
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, 2 * D)
        field.cut.clear()
        await field.until(tried.is_set, 20)
        began = clock()
        while clock() - began < 10:
            await asyncio.sleep(0.01)
            assert field.register.record.mode is p.Mode.ALONE

    group(scenario)


def test_the_last_node_can_be_promoted_though_its_store_is_a_new_one(group: Play) -> None:
    async def scenario(field: Field) -> None:
        a, b = field.a, field.b
        await b.power_cut()
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        await a.power_cut()
        a.path.unlink()
        a.host.mail = ""
        await asyncio.sleep(1)
        a.start()
        await field.until(lambda: a.phase is p.Phase.HELD, 5)
        answer = await a.handover.failover(accept_loss=True)
        assert (answer["from"], answer["to"], answer["stonith"]) == ("a", "a", "")
        await field.until(lambda: a.serves, 5)
        with pytest.raises(Refused, match="holds the role already"):
            await a.handover.failover(accept_loss=True)

    group(scenario)


def test_a_coordinator_that_is_away_for_a_minute_changes_nothing(group: Play) -> None:
    async def scenario(field: Field) -> None:
        revision = field.register.revision
        field.register.frozen.set()
        await asyncio.sleep(60)
        assert field.a.serves
        assert field.longest_gap < 0.1
        failed = {check.name for check in field.a.group.checks() if not check.passed}
        assert failed == {"voters", "coordinator"}
        field.register.frozen.clear()
        await asyncio.sleep(5)
        assert field.register.revision == revision

    group(scenario)


def test_without_coordinator_and_shadow_nothing_is_acknowledged_alone(group: Play) -> None:
    async def scenario(field: Field) -> None:
        field.register.frozen.set()
        await field.b.power_cut()
        await field.until(lambda: not field.a.host.open, D)
        assert not field.a.group.may_acknowledge(1, ())
        await asyncio.sleep(20)
        assert not field.a.host.open
        assert not field.a.host.postfix  # what waits to go out is held
        field.register.frozen.clear()
        await field.until(lambda: field.a.serves, 10)
        assert field.register.record.mode is p.Mode.ALONE

    group(scenario)


def test_nodes_that_are_cut_from_each_other_leave_the_primary_alone(group: Play) -> None:
    async def scenario(field: Field) -> None:
        field.separate("a", "b")
        await asyncio.sleep(5 * D)
        assert field.a.serves
        assert (field.register.record.holder, field.register.record.epoch) == ("a", 1)
        assert field.longest_gap < 0.1
        field.cut.clear()
        await field.protected(field.a)

    group(scenario)


def test_one_way_loss_has_one_winner(group: Play) -> None:
    async def scenario(field: Field) -> None:
        for way in (("a", "b"), ("b", "a")):
            field.cut = {way}
            await asyncio.sleep(4 * D)
            assert field.a.serves
            field.cut = set()
            await field.protected(field.a)

    group(scenario)


def test_a_swap_without_an_answer_is_found_out(group: Play) -> None:
    async def scenario(field: Field) -> None:
        field.register.mute = True
        await field.b.power_cut()
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        field.register.mute = False
        await field.until(lambda: field.a.serves and not field.a.group.synchronous(), 1)
        assert field.longest_gap < 0.5
        # And in a takeover.
        field.b.start()
        await field.protected(field.a)
        field.register.mute = True
        await field.a.power_cut()
        await field.until(lambda: field.b.serves, p.LONGEST + D)

    group(scenario)


def test_a_slow_coordinator_is_waited_for(group: Play) -> None:
    async def scenario(field: Field) -> None:
        field.register.delay = 0.3
        await asyncio.sleep(20)
        assert field.a.serves
        await field.a.power_cut()
        await field.until(lambda: field.b.serves, 2 * D)

    group(scenario)


def test_an_agent_that_restarts_in_time_moves_nothing(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.a.crash()
        await asyncio.sleep(1.0)
        assert field.a.host.open  # the lease of the one before
        field.a.start()
        await field.protected(field.a)
        assert field.register.record.epoch == 1
        assert field.a.host.postfix

    group(scenario)


def test_both_lose_power_and_the_shadow_returns_first(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.a.power_cut()
        await field.b.power_cut()
        field.b.start()
        await field.until(lambda: field.b.serves, 3 * D)
        field.a.start()
        await field.protected(field.b)

    group(scenario)


def test_a_shadow_that_returns_after_the_primary_was_alone_never_takes_over(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.b.power_cut()
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        await field.a.power_cut()
        field.b.start()
        await asyncio.sleep(5 * D)
        assert not field.b.serves
        field.a.start()
        await field.protected(field.a)

    group(scenario)


def test_both_lose_power_and_the_primary_returns(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.b.power_cut()
        await field.a.power_cut()
        field.a.start()
        await asyncio.sleep(3 * D)
        # b may have acted; the coordinator says that it has not, and will not.
        assert field.a.serves
        assert field.register.record.mode is p.Mode.ALONE
        field.b.start()
        await field.protected(field.a)

    group(scenario)


def test_a_stalled_disk_ends_the_right_and_the_shadow_takes_over(group: Play) -> None:
    async def scenario(field: Field) -> None:
        field.a.host.works.clear()
        assert not field.b.parts.replacing
        took = await field.until(lambda: field.b.serves, 3 * D)
        assert took <= TIMING.work + D + 1
        assert field.b.parts.replacing
        field.a.host.works.set()
        await field.protected(field.b)

    group(scenario)


@pytest.mark.parametrize("queue", [{}, {"Q1": "deferred"}])
def test_a_switchover_moves_the_primary(group: Play, queue: dict[str, str]) -> None:
    async def scenario(field: Field) -> None:
        field.a.host.queue_ids = dict(queue)
        result = await field.a.handover.run("b", dry_run=False, timeout_s=10)
        assert (result["changed"], result["to"], result["epoch"]) == (True, "b", 2)
        assert result["outage_s"] < 1.0
        assert field.b.serves
        assert field.b.parts.resumed == ["a"]
        assert field.b.parts.taken == [("a", {key: Left(("x@example.org",)) for key in queue})]
        # Until the new primary has brought it to this node again, the file here is the second copy.
        assert field.a.host.queue_ids == dict.fromkeys(queue, "hold")
        await field.protected(field.b, 3)
        await field.until(lambda: not field.a.host.queue_ids, 3)
        gave = field.a.group.state.durable
        assert (gave.merged, gave.merged_under, gave.acted) == (True, 2, 0)
        change = field.b.group.state.durable.last_change
        assert change is not None
        assert change.planned
        back = await field.b.handover.run("a", dry_run=False, timeout_s=10)
        assert back["epoch"] == 3
        await field.protected(field.a, 3)
        assert field.longest_gap < 1.0
        # Whoever makes the key does not know whom it follows.
        assert (field.a.parts.replacing, field.b.parts.replacing) == (1, 0)

    group(scenario)


def test_a_switchover_hands_over_what_postfix_could_not_read(group: Play) -> None:
    async def scenario(field: Field) -> None:
        field.a.host.queue_ids = {"Q1": "deferred", "Q2": "corrupt"}
        await field.a.handover.run("b", dry_run=False, timeout_s=10)
        assert field.b.parts.taken == [("a", {"Q1": Left(("x@example.org",)), "Q2": Left(None)})]

    group(scenario)


def test_what_is_on_hold_is_handed_over_as_such_and_never_released(group: Play) -> None:
    """An operator or a policy has held it: no change of primary delivers it."""

    async def scenario(field: Field) -> None:
        field.a.host.queue_ids = {"Q1": "hold", "Q2": "deferred"}
        field.b.parts.left = 1
        await field.a.handover.run("b", dry_run=False, timeout_s=10)
        to = ("x@example.org",)
        assert field.b.parts.taken == [("a", {"Q1": Left(to, held=True), "Q2": Left(to)})]
        await field.protected(field.b, 3)
        await field.b.power_cut()
        await field.until(lambda: field.a.serves, 2 * D)
        await asyncio.sleep(3)
        assert field.a.host.queue_ids["Q1"] == "hold"

    group(scenario)


def test_an_opening_that_fails_is_tried_again_with_what_was_handed_over(group: Play) -> None:
    """The new primary renews its right meanwhile, so nobody else would come."""

    async def scenario(field: Field) -> None:
        field.a.host.queue_ids = {"Q1": "deferred"}
        resume, fails = field.b.parts.resume, 1

        async def resumes(peer: str, epoch: int) -> None:
            nonlocal fails
            if fails:
                fails -= 1
                raise sqlite3.OperationalError("disk I/O error")
            await resume(peer, epoch)

        field.b.parts.resume = resumes  # type: ignore[method-assign]
        await field.a.handover.run("b", dry_run=False, timeout_s=10)
        await field.until(lambda: field.b.serves, D)
        assert field.b.parts.taken == [("a", {"Q1": Left(("x@example.org",))})]

    group(scenario)


def refuses_to_start(node: Node) -> None:
    """From the handover on: it has started well behind closed ports."""
    real = node.handlers["handover"]

    async def then_refuses(
        peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        node.host.refuses = "Postfix does not start"
        return await real(peer, args, exchange)

    node.handlers["handover"] = then_refuses


def cannot_take_over(node: Node) -> None:
    async def fails(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    node.parts.take_over = fails  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize("hindrance", [refuses_to_start, cannot_take_over])
def test_who_cannot_open_gives_the_role_back(
    group: Play, hindrance: Callable[[Node], None]
) -> None:
    async def scenario(field: Field) -> None:
        field.a.host.queue_ids = {"Q1": "deferred"}
        await field.until(lambda: field.b.parts.given_back == 1, D)
        hindrance(field.b)
        moving = asyncio.create_task(field.a.handover.run("b", dry_run=False, timeout_s=10))
        await field.until(lambda: bool(field.b.group.opening.error), D)
        assert any("b does not open: " in reason for reason in field.b.group.reasons())
        with pytest.raises(Refused, match=r"b does not open: .*; a is primary again"):
            await moving
        assert field.a.serves
        assert field.longest_gap < 15
        # What it had claimed is the other's again, and nobody sends it a second time later.
        await field.protected(field.a)
        assert field.b.parts.given_back > 1
        assert not field.b.parts.taken
        await field.until(lambda: not field.b.group.reasons(), D)

    group(scenario)


def test_who_cannot_open_and_has_no_successor_tries_on_and_says_so(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await words.pause(field.a.group.driver, True)
        refuses_to_start(field.b)
        with pytest.raises(Refused, match=r"b does not open: .*; it has the role all the same"):
            await field.a.handover.run("b", dry_run=False, timeout_s=10)
        assert field.register.record.holder == "b"
        assert "b does not open: Postfix does not start" in field.b.group.reasons()
        field.b.host.refuses = ""
        await field.protected(field.b)

    group(scenario)


@pytest.mark.parametrize(
    ("fails", "works"), [(0, 20), (3, 1), (1, 20)], ids=["long", "failing", "both"]
)
def test_an_opening_that_takes_its_time_is_none_that_fails(
    group: Play, fails: float, works: float
) -> None:
    async def scenario(field: Field) -> None:
        take_over, began = field.b.parts.take_over, 0.0

        async def slow(origin: str, remaining: Remaining | None) -> None:
            nonlocal began
            began = began or clock()
            if clock() - began < fails:
                raise StoreError("locked")
            await asyncio.sleep(works)
            await take_over(origin, remaining)

        field.b.parts.take_over = slow  # type: ignore[method-assign]
        await field.a.handover.run("b", dry_run=False, timeout_s=10)
        await field.until(lambda: field.b.serves, fails + works + 1)
        assert field.register.record.epoch == 2
        await field.protected(field.b)

    group(scenario)


def test_an_agent_that_starts_and_cannot_open_leaves_the_role_to_its_shadow(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.a.crash()
        field.a.host.refuses = "Postfix does not start"
        field.a.start()
        took = await field.until(lambda: field.b.serves, 30)
        assert took < OPENING_FAILS + TIMING.work + 2 * D + 1
        assert field.register.record.epoch == 2

    group(scenario)


def test_an_opening_that_needs_a_second_try_leaves_nobody_behind_and_is_noted(
    group: Play,
) -> None:
    async def scenario(field: Field) -> None:
        refuses_to_start(field.b)
        moving = asyncio.create_task(field.a.handover.run("b", dry_run=False, timeout_s=10))
        await field.until(lambda: bool(field.b.group.opening.error), D)
        field.b.host.refuses = ""
        await moving
        assert field.b.serves
        assert {member.node for member in field.register.record.protected} == {"a"}
        change = field.b.group.state.durable.last_change
        assert change is not None
        assert (change.old, change.new, change.planned) == ("a", "b", True)

    group(scenario)


def test_who_loses_the_key_before_it_has_claimed_anything_claims_nothing(group: Play) -> None:
    async def scenario(field: Field) -> None:
        quiet = asyncio.Event()

        async def waits() -> None:
            await quiet.wait()

        field.b.parts.quiet = waits  # type: ignore[method-assign]
        moving = asyncio.create_task(field.a.handover.run("b", dry_run=False, timeout_s=10))
        await field.until(lambda: field.b.phase is p.Phase.PRIMARY, D)
        field.separate("a", "b")
        field.register.cut.add("b")
        await field.until(lambda: field.a.serves, 4 * D)
        field.cut.clear()
        field.register.cut.clear()
        await field.until(lambda: field.b.group.epoch == 3, D)
        quiet.set()
        await field.protected(field.a)
        assert not field.b.parts.taken
        await asyncio.gather(moving, return_exceptions=True)

    group(scenario)


@pytest.mark.parametrize("came_back", [False, True])
def test_what_was_handed_over_is_not_lost_with_the_new_primary(
    group: Play, came_back: bool
) -> None:
    async def scenario(field: Field) -> None:
        # No copy of Q2 is elsewhere, so a person has put it on hold.
        field.a.host.queue_ids = {"Q1": "deferred", "Q2": "hold"}
        field.b.parts.left = 1  # it carries Q1 on
        await field.a.handover.run("b", dry_run=False, timeout_s=10)
        await field.protected(field.b, 3)
        await asyncio.sleep(1.5)
        assert field.a.host.queue_ids == {"Q1": "hold", "Q2": "hold"}
        if came_back:
            field.a.parts.came_back = {"s1"}
        await field.b.power_cut()
        await field.until(lambda: field.a.serves, 2 * D)
        wanted = {"Q2": "hold"} if came_back else {"Q1": "deferred", "Q2": "hold"}
        await field.until(lambda: field.a.host.queue_ids == wanted, 3)

    group(scenario)


def test_what_was_handed_over_is_not_sent_again_after_a_switch_back(group: Play) -> None:
    async def scenario(field: Field) -> None:
        field.a.host.queue_ids = {"Q1": "deferred"}
        field.b.parts.left = 1
        await field.a.handover.run("b", dry_run=False, timeout_s=10)
        await field.protected(field.b, 3)
        assert field.a.host.queue_ids == {"Q1": "hold"}
        field.b.parts.left = 0
        await field.b.handover.run("a", dry_run=False, timeout_s=10)
        assert field.a.serves
        await asyncio.sleep(1.5)
        assert not field.a.host.queue_ids

    group(scenario)


def test_what_the_new_primary_could_not_carry_on_is_kept_and_released_after_a_switch_back(
    group: Play,
) -> None:
    async def scenario(field: Field) -> None:
        field.a.host.queue_ids = {"Q1": "deferred", "Q2": "deferred"}
        field.b.parts.parked = ["s1"]  # the id of Q1
        field.a.parts.covered = lambda peer: {"Q1": "s1", "Q2": "s2"}  # type: ignore[method-assign]
        await field.a.handover.run("b", dry_run=False, timeout_s=10)
        await field.protected(field.b, 3)
        await field.until(lambda: field.a.host.queue_ids == {"Q1": "hold"}, 3)
        await asyncio.sleep(1.5)
        assert field.a.host.queue_ids == {"Q1": "hold"}
        await field.b.handover.run("a", dry_run=False, timeout_s=10)
        await field.until(lambda: field.a.host.queue_ids == {"Q1": "deferred"}, 3)

    group(scenario)


def test_who_was_promoted_by_force_has_not_carried_on_what_was_handed_over_to_another(
    group: Play,
) -> None:
    async def scenario(field: Field) -> None:
        b, c = field.b, field.nodes["c"]
        await whole(field)
        await c.power_cut()
        await field.until(lambda: len(field.register.record.protected) == 1, D)
        field.a.host.queue_ids = {"Q1": "deferred"}
        b.parts.left = 1
        await field.a.handover.run("b", dry_run=False, timeout_s=10)
        field.separate("a", "b")
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        await b.power_cut()
        c.start()
        await field.until(lambda: c.phase is p.Phase.SYNCING, 2 * D)
        await c.handover.failover(accept_loss=True)
        await field.until(lambda: c.group.state.protected, 30)
        assert c.parts.left == 0
        await asyncio.sleep(5)
        assert field.a.host.queue_ids == {"Q1": "hold"}
        await c.handover.run("a", dry_run=False, timeout_s=10)
        await asyncio.sleep(5)
        assert field.a.serves
        assert field.a.host.queue_ids == {"Q1": "hold"}

    group(scenario, names="abc")


@pytest.mark.parametrize("place", ["incoming", "deferred"])
def test_a_switchover_to_who_lacks_something_of_the_queue_is_refused(
    group: Play, place: str
) -> None:
    async def scenario(field: Field) -> None:
        field.a.host.queue_ids = {"Q1": "deferred", "Q2": place, "Q3": "maildrop"}
        for dry_run in (True, False):
            with pytest.raises(Refused, match=r"b has no copy of 1 messages of the queue \(Q2\)"):
                await field.a.handover.run("b", dry_run=dry_run, timeout_s=0.05)
        assert field.a.serves
        assert field.longest_gap < 0.2, "nobody has noticed anything"
        # A node that is ailing goes all the same.
        field.a.host.free = {"/var/vmail": 2**20}
        await field.until(lambda: field.b.serves, 60)
        assert "Q2" in field.a.host.held

    group(scenario, names="abc")


def test_of_a_pair_what_has_no_copy_waits_on_hold(group: Play) -> None:
    """A notice of Postfix's own, which nobody can deliver, must not hold up a switchover."""

    async def scenario(field: Field) -> None:
        field.a.host.queue_ids = {"Q2": "deferred"}
        asked = await field.a.handover.run("b", dry_run=True, timeout_s=10)
        assert (asked["uncovered"], asked["uncovered_count"]) == (["Q2"], 1)
        await field.a.handover.run("b", dry_run=False, timeout_s=10)
        assert field.b.serves
        assert "Q2" in field.a.host.held

    group(scenario)


def test_a_long_answer_names_the_first_and_counts_all(group: Play) -> None:
    """It may have to fit a frame of the link: any node takes the order."""

    async def scenario(field: Field) -> None:
        field.a.host.queue_ids = {f"4{number:015}": "deferred" for number in range(9000)}
        asked = await field.a.handover.run("b", dry_run=True, timeout_s=10)
        assert asked["uncovered_count"] == 9000
        assert frames.encode_json(FrameType.RESPONSE, asked)

    group(scenario)


def test_who_has_no_room_does_not_catch_up_while_the_group_is_protected_without(
    group: Play,
) -> None:
    async def scenario(field: Field) -> None:
        c = field.nodes["c"]
        await whole(field)
        c.load = "disk"
        await asyncio.sleep(2)
        await field.a.group.shadow_failed("c", "its disk is full")
        await asyncio.sleep(20)
        assert field.a.group.synchronous() == ["b"]
        # Without b it is better than nobody.
        await field.b.power_cut()
        await field.until(lambda: field.a.group.synchronous() == ["c"], 2 * D)
        await field.protected(field.a)
        c.load = ""
        field.b.start()
        await whole(field)

    group(scenario, names="abc")


def test_a_switchover_waits_for_what_is_being_taken_over(group: Play) -> None:
    async def scenario(field: Field) -> None:
        field.a.parts.left = 3
        with pytest.raises(Refused, match="3 messages of the former primary"):
            await field.a.handover.run("b", dry_run=False, timeout_s=0.5)
        assert field.a.serves
        moving = asyncio.create_task(field.a.handover.run("b", dry_run=False, timeout_s=10))
        await asyncio.sleep(0.5)
        assert field.a.serves
        field.a.parts.left = 0
        await moving
        assert field.b.serves

    group(scenario)


def test_a_switchover_whose_candidate_dies_is_taken_back(group: Play) -> None:
    async def scenario(field: Field) -> None:
        async def dies(*_: object) -> dict[str, object]:
            await field.b.power_cut()
            raise PeerError("unreachable", "it died")

        field.b.handlers["handover"] = dies
        with pytest.raises(Refused):
            await field.a.handover.run("b", dry_run=False, timeout_s=10)
        await field.until(lambda: field.a.serves, 2 * D)
        assert field.register.record.epoch == 1

    group(scenario)


def test_a_switchover_without_the_coordinator_ends_with_one_primary(group: Play) -> None:
    async def scenario(field: Field) -> None:
        real = field.b.handlers["handover"]

        async def then_freezes(
            peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
        ) -> dict[str, Any]:
            field.register.frozen.set()
            return await real(peer, args, exchange)

        field.b.handlers["handover"] = then_freezes
        with pytest.raises(Refused):
            await field.a.handover.run("b", dry_run=False, timeout_s=10)
        field.register.frozen.clear()
        await field.until(lambda: field.a.serves or field.b.serves, 4 * D)
        await asyncio.sleep(2 * D)
        await field.until(lambda: field.a.serves or field.b.serves, 4 * D)

    group(scenario)


def test_a_pause_stops_a_takeover_and_survives_restarts(group: Play) -> None:
    async def scenario(field: Field) -> None:
        assert await words.pause(field.b.group.driver, True)
        assert not await words.pause(field.b.group.driver, True)
        await field.a.power_cut()
        await asyncio.sleep(4 * D)
        assert field.b.phase is p.Phase.HELD
        assert "paused" in field.b.group.reasons()[0]
        await field.b.crash()
        field.b.start()
        await asyncio.sleep(2 * D)
        assert field.b.group.describe()["paused"]
        # Nobody reads these of another node; what somebody does, ``said`` has to let through.
        unread = {"profile", "paused", "holder", "protected_set"}
        assert field.b.group.describe().keys() - said._KINDS.keys() == unread
        assert await words.pause(field.b.group.driver, False)
        await field.until(lambda: field.b.serves, 2 * D)

    group(scenario)


def test_a_pause_that_was_refused_does_not_come_later(group: Play) -> None:
    async def scenario(field: Field) -> None:
        field.register.frozen.set()
        with pytest.raises(NotNow, match="within 10 s, so this is withdrawn: no answer"):
            await words.pause(field.b.group.driver, True)
        # It may be written down still, so nobody is told that changes are on.
        with pytest.raises(NotNow, match="so this is withdrawn"):
            await words.pause(field.b.group.driver, False)
        field.register.frozen.clear()
        await asyncio.sleep(4 * D)
        assert not field.register.record.paused
        assert not await words.pause(field.b.group.driver, False)

    group(scenario)


def test_a_primary_alone_resumes_after_a_power_cut_while_automatic_failover_is_blocked(
    group: Play,
) -> None:
    async def scenario(field: Field) -> None:
        await field.a.power_cut()
        await asyncio.sleep(3 * D)
        assert not field.b.serves
        field.a.start()
        await field.protected(field.a)

    group(scenario, policy=p.Policy.BLOCKED)


def test_a_forced_failover_needs_a_person_and_says_what_is_lost(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.b.power_cut()
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        field.b.start()
        await field.a.power_cut()
        await asyncio.sleep(4 * D)
        assert field.b.phase is p.Phase.SYNCING
        assert not field.b.handover.loss()["certain"]
        with pytest.raises(Refused, match="accept-loss"):
            await field.b.handover.failover(accept_loss=False)
        result = await field.b.handover.failover(accept_loss=True)
        assert (result["to"], result["epoch"]) == ("b", 2)
        assert field.b.serves
        assert field.b.parts.replacing
        field.a.start()
        await field.protected(field.b)

    group(scenario)


def test_a_forced_failover_is_refused_while_the_primary_serves(group: Play) -> None:
    async def scenario(field: Field) -> None:
        with pytest.raises(Refused, match="answers and is primary"):
            await field.b.handover.failover(accept_loss=True)
        with pytest.raises(Refused, match="holds the role"):
            await field.a.handover.failover(accept_loss=True)

    group(scenario)


def with_hook(node: Node, use: StonithUse) -> None:
    node.handover._config = replace(node.config, stonith=Stonith(use))


def test_a_forced_failover_switches_the_other_off_first_or_is_refused(group: Play) -> None:
    async def scenario(field: Field) -> None:
        b = field.b
        with_hook(b, StonithUse.FORCED)
        await b.crash()
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        await field.a.power_cut()
        b.start()
        with_hook(b, StonithUse.FORCED)
        await field.until(lambda: b.phase is p.Phase.SYNCING, D)
        with pytest.raises(Refused, match="say --accept-loss"):
            await b.handover.failover(accept_loss=False)
        assert not b.host.shot
        b.host.hook_fails = True
        with pytest.raises(Refused, match=r"nothing was promoted: no route .*--without-stonith"):
            await b.handover.failover(accept_loss=True)
        assert b.host.shot == ["a"]
        assert b.phase is p.Phase.SYNCING
        result = await b.handover.failover(accept_loss=True, stonith=False)
        assert (result["epoch"], result["stonith"], b.host.shot) == (2, "", ["a"])
        field.a.start()
        await field.protected(b)
        # And the other way round, with a hook that works.
        with_hook(field.a, StonithUse.FORCED)
        await field.a.crash()
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        await b.power_cut()
        field.a.start()
        with_hook(field.a, StonithUse.FORCED)
        await field.until(lambda: field.a.phase is p.Phase.SYNCING, D)
        result = await field.a.handover.failover(accept_loss=True)
        assert result["stonith"] == "b is off"
        assert field.a.host.shot == ["b"]

    group(scenario)


def test_nobody_is_switched_off_for_a_failover_that_would_be_refused(group: Play) -> None:
    async def scenario(field: Field) -> None:
        with_hook(field.b, StonithUse.ALWAYS)
        field.register.frozen.set()
        await field.a.power_cut()
        await field.b.crash()
        field.b.start()
        with_hook(field.b, StonithUse.ALWAYS)
        await asyncio.sleep(D)
        with pytest.raises(Refused, match="the coordinator does not answer"):
            await field.b.handover.failover(accept_loss=True)
        assert not field.b.host.shot

    group(scenario)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("use", "shot"), [(StonithUse.ALWAYS, ["a"]), (StonithUse.FORCED, [])])
def test_a_takeover_switches_the_other_off_where_that_is_wished(
    group: Play, use: StonithUse, shot: list[str], fails: bool
) -> None:
    async def scenario(field: Field) -> None:
        with_hook(field.b, use)
        field.b.host.hook_fails = fails
        await field.a.power_cut()
        await field.until(lambda: field.b.serves, 2 * D)
        assert field.b.host.shot == shot
        field.a.start()
        await field.protected(field.b)
        # A planned change needs no hook.
        with_hook(field.a, StonithUse.ALWAYS)
        await field.b.handover.run("a", dry_run=False, timeout_s=30)
        await field.protected(field.a)
        assert not field.a.host.shot

    group(scenario)


def test_a_promotion_that_was_given_up_spares_nobody_later(group: Play) -> None:
    async def scenario(field: Field) -> None:
        a, b = field.a, field.b
        await b.crash()
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        await a.power_cut()
        b.start()
        with_hook(b, StonithUse.ALWAYS)
        await field.until(lambda: b.phase is p.Phase.SYNCING, D)
        register = field.register
        register.cut.add("b")
        with pytest.raises(Refused, match="within 10 s, so this is withdrawn"):
            await b.handover.failover(accept_loss=True, stonith=False)
        # Its word comes too late: the other one has been given a new epoch meanwhile.
        register.value = json.dumps(replace(register.record, epoch=2).to_json()).encode()
        register.revision += 1
        register.cut.discard("b")
        a.start()
        await field.protected(a, 2 * p.LONGEST)
        await a.power_cut()
        await field.until(lambda: b.serves, 2 * D)
        assert b.host.shot == ["a"]

    group(scenario)


def test_a_superseded_primary_is_refused(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.a.power_cut()
        await field.until(lambda: field.b.serves, 2 * D)
        with pytest.raises(PeerError, match="epoch 1 is over") as caught:
            await field.b.group.check_epoch("a", "shadow-store", 1)
        assert caught.value.code == "stale-epoch"
        with pytest.raises(PeerError, match="holds the key"):
            await field.b.group.check_epoch("a", "shadow-store", 2)

    group(scenario)


def test_a_node_whose_disk_is_new_is_not_taken_for_the_one_before(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.b.power_cut()
        field.b.path.unlink()
        field.b.start()
        await field.protected(field.a)
        (member,) = field.register.record.protected
        assert member.storage == field.b.group.state.durable.storage_id

    group(scenario)


def test_a_disk_that_refuses_the_epoch_ends_the_agent(group: Play) -> None:
    async def scenario(field: Field) -> None:
        def refuse(*_: object) -> None:
            raise OSError("the disk refuses")

        field.b.group._states.save = refuse  # type: ignore[method-assign, assignment]
        await field.a.power_cut()
        task = field.b._task
        assert task is not None
        await asyncio.wait({task}, timeout=3 * D)
        assert task.done()
        assert isinstance(task.exception(), ExceptionGroup)
        assert not field.b.group.is_primary()
        assert not field.b.host.open
        field.b.up = False

    group(scenario)


def test_a_lost_key_is_made_again_by_a_person_only(group: Play) -> None:
    async def scenario(field: Field) -> None:
        for node in field.nodes.values():
            await node.crash()
        field.register.revision, field.register.value = 0, None
        for node in field.nodes.values():
            node.start()
        await asyncio.sleep(3 * D)
        assert field.a.phase is field.b.phase is p.Phase.HELD
        assert "no key" in field.a.group.reasons()[0]
        await field.a.handover.open_by_force()
        await field.protected(field.a)
        assert field.a.group.epoch == 2
        with pytest.raises(Refused):
            await field.a.handover.open_by_force()

    group(scenario)


def test_a_line_that_has_become_too_long_for_the_profile_is_told(group: Play) -> None:
    async def scenario(field: Field) -> None:
        def check() -> Check:
            return next(c for c in field.a.group.checks() if c.name == "round trip")

        await asyncio.sleep(30)
        assert check().passed
        assert check().value < 0.01
        field.delay = 0.12
        await asyncio.sleep(60)
        assert not check().passed
        assert "The round trip to b is 120" in check().message
        assert "Set replication_agent_profile to wan." in check().message

    group(scenario)


def restored(field: Field, old: bytes | None, revision: int) -> None:
    """The voters are restored from a snapshot: another cluster, an old key, old revisions."""
    field.register.cluster = "second"
    field.register.revision, field.register.value = revision, old


def test_a_group_that_runs_goes_on_over_restored_voters_until_a_person_speaks(group: Play) -> None:
    async def scenario(field: Field) -> None:
        snapshot = field.register.value
        await field.b.crash()
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        field.b.start()
        await field.protected(field.a)
        await words.pause(field.a.group.driver, True)
        epoch = field.a.group.epoch
        # The key in the snapshot has the same revision by chance.
        restored(field, snapshot, field.register.revision)
        await asyncio.sleep(3 * D)
        assert field.a.serves
        assert field.a.group.epoch == epoch
        (check,) = [c for c in field.a.group.checks() if c.name == "coordinator"]
        assert not check.passed
        assert "restored" in check.message
        with pytest.raises(Refused, match="say it there"):
            await field.b.handover.open_by_force()
        await field.a.handover.open_by_force()
        await field.protected(field.a)
        assert field.a.group.epoch == epoch + 1
        assert field.register.record.paused
        assert all(c.passed for c in field.a.group.checks() if c.name == "coordinator")
        assert field.a.group.state.durable.last_change is None, "the primary has not changed"

    group(scenario)


def test_a_snapshot_from_before_a_failover_gives_nobody_a_right(group: Play) -> None:
    async def scenario(field: Field) -> None:
        snapshot, revision = field.register.value, field.register.revision
        await field.a.power_cut()
        await field.until(lambda: field.b.serves, 2 * D)
        await field.b.crash()
        restored(field, snapshot, revision)
        field.a.up = True
        field.a.start()  # it has never heard of the second epoch
        field.b.start()
        await asyncio.sleep(4 * D)
        assert field.a.phase is field.b.phase is p.Phase.HELD
        assert "a with epoch 1" in field.b.group.reasons()[0]
        await field.b.handover.open_by_force()
        await field.protected(field.b)
        assert field.b.group.epoch == 3

    group(scenario)


def test_a_snapshot_cannot_protect_a_shadow_that_was_left_behind(group: Play) -> None:
    async def scenario(field: Field) -> None:
        snapshot, revision = field.register.value, field.register.revision
        await field.b.crash()
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        await field.a.power_cut()
        restored(field, snapshot, revision)
        field.b.start()
        await asyncio.sleep(4 * D)
        assert field.b.phase is p.Phase.HELD

    group(scenario)


def test_the_wrong_node_opened_over_a_snapshot_finds_out_and_the_other_gets_its_word(
    group: Play,
) -> None:
    async def scenario(field: Field) -> None:
        snapshot, revision = field.register.value, field.register.revision
        await field.a.power_cut()
        await field.until(lambda: field.b.serves, 2 * D)
        restored(field, snapshot, revision)
        field.separate("a", "b")
        field.a.up = True
        field.a.start()
        await field.until(lambda: field.a.phase is p.Phase.HELD, 2 * D)
        await field.a.handover.open_by_force()
        await field.until(lambda: field.register.record.epoch == 2, D)
        assert not field.b.serves, "alone, it needs the voters"
        field.cut.clear()
        await field.a.crash()  # so that b's word is the only one
        await field.b.handover.open_by_force()
        field.a.start()
        await field.protected(field.b)
        assert field.register.record.epoch == 3

    group(scenario)


async def set_coordinator(node: Node, **settings: Any) -> None:
    await node.crash()
    node.config = replace(node.config, coordinator=replace(node.config.coordinator, **settings))
    node.start()


async def whole(field: Field) -> None:
    """All three have everything; ``a`` is primary."""
    await field.protected(field.a)
    await field.until(lambda: len(field.register.record.protected) == 2, 30)


@pytest.mark.parametrize("first", ["b", "c"])
def test_of_several_shadows_the_preferred_one_takes_over(group: Play, first: str) -> None:
    async def scenario(field: Field) -> None:
        second = {"b": "c", "c": "b"}[first]
        await set_coordinator(field.nodes[second], preference=1)
        await whole(field)
        await field.a.power_cut()
        await field.until(lambda: field.nodes[first].serves, 2 * D)
        # The other one has everything too, and is there for the next time.
        await field.until(lambda: len(field.register.record.protected) == 1, 30)
        await field.nodes[first].power_cut()
        await field.until(lambda: field.nodes[second].serves, 2 * D + TIMING.stagger)

    group(scenario, names="abc")


def test_a_shadow_that_lacks_something_never_goes_before_one_that_has_all(group: Play) -> None:
    async def scenario(field: Field) -> None:
        c = field.nodes["c"]
        await set_coordinator(field.b, preference=2)
        await whole(field)
        field.separate("a", "c")
        await field.until(lambda: len(field.register.record.protected) == 1, D)
        await field.a.power_cut()
        await asyncio.sleep(D)
        with pytest.raises(Refused, match="b has everything that was acknowledged"):
            await c.handover.failover(accept_loss=True)
        await field.until(lambda: field.b.serves, 3 * D)

    group(scenario, names="abc")


@pytest.mark.parametrize("reads", [True, False], ids=["reads the key", "has not read it yet"])
def test_who_has_what_a_promotion_by_force_lacks_is_merged_and_not_made_a_copy(
    group: Play, reads: bool
) -> None:
    async def scenario(field: Field) -> None:
        b, c = field.b, field.nodes["c"]
        await whole(field)
        await b.power_cut()
        await field.until(lambda: len(field.register.record.protected) == 1, D)
        assert field.a.group.is_copy("c")
        field.separate("a", "c")  # for a moment, and then the primary is lost
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        await field.a.power_cut()
        field.cut.clear()
        b.start()
        await field.until(lambda: b.phase is c.phase is p.Phase.SYNCING, 2 * D)
        merges: list[bool] = []
        catch_up = b.group.catch_up
        assert catch_up is not None

        async def looks(peer: str, protect: Any) -> None:
            merges.append(not b.group.is_copy(peer))
            await catch_up(peer, protect)

        b.group.catch_up = looks
        if not reads:
            field.register.cut.add("c")
        await b.handover.failover(accept_loss=True)
        await field.until(lambda: bool(merges), p.LONGEST + D)
        assert merges == [True]
        assert c.group.state.durable.merged is not reads
        field.register.cut.clear()
        await field.until(lambda: c.phase is p.Phase.READY, 3 * D)
        assert c.group.state.durable.merged
        # Once: from then on it is a copy, also for the next primary and after a restart.
        await c.crash()
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        c.start()
        await field.until(lambda: c.phase is p.Phase.READY, 10)
        assert merges == [True, False]

    group(scenario, names="abc")


def test_a_name_whose_disk_died_stands_in_nobody_s_way(group: Play) -> None:
    async def scenario(field: Field) -> None:
        b, c = field.b, field.nodes["c"]
        await whole(field)
        await b.power_cut()
        await field.until(lambda: len(field.register.record.protected) == 1, D)
        await asyncio.gather(field.a.power_cut(), c.power_cut())
        b.start()
        await field.until(lambda: b.phase is p.Phase.SYNCING, D)
        with pytest.raises(Refused, match="c has everything that was acknowledged"):
            await b.handover.failover(accept_loss=True)
        c.path.unlink()
        c.start()
        await field.until(lambda: c.phase is p.Phase.SYNCING and b.group.answers("c"), D)
        assert {member.node for member in field.register.record.protected} == {"c"}
        assert c.handover.loss()["renewed"]
        assert not b.handover.loss()["renewed"]
        await b.handover.failover(accept_loss=True)
        assert b.serves

    group(scenario, names="abc")


def test_a_promotion_by_hand_is_given_up_when_another_node_has_everything_by_then(
    group: Play,
) -> None:
    async def scenario(field: Field) -> None:
        b = field.b
        await whole(field)
        field.separate("a", "b")
        field.separate("a", "c")
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        await asyncio.sleep(3 * D)
        field.register.cut.add("b")
        field.cut -= {("a", "c"), ("c", "a")}
        await field.until(lambda: field.register.record.mode is p.Mode.PROTECTED, 10)
        asking = asyncio.create_task(b.handover.failover(accept_loss=True))
        await asyncio.sleep(D)
        field.register.cut.clear()
        with pytest.raises(Refused, match="another node has written the key meanwhile: a waits"):
            await asking
        assert field.register.record.epoch == 1

    group(scenario, names="abc")


def test_who_promotes_is_told_what_other_shadows_had(group: Play) -> None:
    async def scenario(field: Field) -> None:
        b = field.b
        await whole(field)
        field.separate("a", "b")
        await asyncio.sleep(100)
        field.separate("a", "c")
        field.register.cut.add("c")
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        await field.a.power_cut()
        await asyncio.sleep(2 * D)
        loss = b.handover.loss()
        assert 100 <= loss["seconds"] <= 100 + 4 * D
        assert list(loss["others"]) == ["c"]
        assert loss["others"]["c"] <= 4 * D
        # Who cannot read the key does not know whether it has everything still.
        assert loss["others"]["c"] >= 2 * D
        del b.group.statuses["c"]["entitled_s"]  # an older agent
        assert b.handover.loss()["others"] == {}

    group(scenario, names="abc")


def test_a_merge_of_earlier_epochs_counts_nothing_where_epochs_begin_anew(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.b.crash()
        state = json.loads(field.b.path.read_text())
        field.b.path.write_text(json.dumps({**state, "acted": None, "merged_under": 50}))
        field.b.start()
        durable = field.b.group.state.durable
        assert (durable.epoch, durable.merged_under) == (0, 0)
        await field.protected(field.a)

    group(scenario)


def test_a_copy_of_an_older_agent_is_believed(group: Play) -> None:
    async def scenario(field: Field) -> None:
        del field.a.group.statuses["b"]["merged_under"]
        assert field.a.group.is_copy("b")
        field.a.group.statuses["b"]["merged"] = False
        assert not field.a.group.is_copy("b")

    group(scenario)


def test_a_protected_group_that_nobody_would_take_over_says_so(group: Play) -> None:
    async def scenario(field: Field) -> None:
        a, c = field.a.group, field.nodes["c"]

        def check() -> Check | None:
            return next((check for check in a.checks() if check.name == "takeover"), None)

        await set_coordinator(c, policy=p.Policy.BLOCKED, preference=3)
        await whole(field)
        await field.until(lambda: a.rank("c") == (True, 3), D)
        assert a.rank("b") == (False, 0)
        assert (found := check()) is not None
        assert found.passed
        assert not [c for c in field.b.group.checks() if c.name == "takeover"]
        await field.b.power_cut()
        await field.until(lambda: len(field.register.record.protected) == 1, D)
        assert (found := check()) is not None
        assert not found.passed
        assert "c has everything and may not take over by itself; b may" in found.message
        await words.pause(a.driver, True)
        assert check() is None
        await words.pause(a.driver, False)
        # Also when this agent has never heard of the one that is away.
        del a.statuses["b"]
        assert (found := check()) is not None
        assert not found.passed
        await c.power_cut()
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        assert check() is None

    group(scenario, names="abc")


def test_a_group_where_nobody_may_take_over_is_what_the_inventory_says(group: Play) -> None:
    async def scenario(field: Field) -> None:
        assert field.a.group.rank("b") == (True, 0)
        assert all(check.passed for check in field.a.group.checks())

    group(scenario, policy=p.Policy.SAME_SITE_ONLY)


def test_the_limit_of_automatic_changes_is_the_inventory_s(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.a.power_cut()
        await field.until(lambda: field.b.serves, 2 * D)
        field.a.start()
        await field.protected(field.b)
        await field.b.power_cut()
        await field.until(lambda: field.a.phase is p.Phase.HELD, 2 * D)
        assert "has changed 1 times within an hour" in field.a.group.driver.state.cause
        (check,) = [c for c in field.a.group.checks() if c.name == "automatic failover"]
        assert (check.passed, check.value) == (False, "off")
        assert "has changed 1 times within an hour" in check.message
        await asyncio.sleep(4 * D)
        assert not field.a.serves
        field.b.start()
        await field.protected(field.b)

    group(scenario, limit=1)


def test_who_is_waited_for_no_more_begins_its_catch_up_again(group: Play) -> None:
    """Else it is copied to for a long time, without the messages that come meanwhile."""

    async def scenario(field: Field) -> None:
        async def long(peer: str, protect: Any) -> None:
            await asyncio.sleep(60)

        async def silent(*_: Any) -> dict[str, Any]:
            await asyncio.sleep(60)
            return {}

        await whole(field)
        field.a.group.catch_up = long
        await field.nodes["c"].crash()
        await field.until(lambda: len(field.register.record.protected) == 1, D)
        field.nodes["c"].start()
        await field.until(lambda: "c" in field.a.group._catching_up, 3)
        first = field.a.group._catching_up["c"]
        renew, field.nodes["c"].handlers["renew"] = field.nodes["c"].handlers["renew"], silent
        await field.until(first.done, 3)
        assert field.a.group.synchronous() == ["b"]
        field.nodes["c"].handlers["renew"] = renew
        await field.until(lambda: field.a.group.synchronous() == ["b", "c"], 3)
        await field.a.handover.run("b", dry_run=False, timeout_s=10)
        await field.until(lambda: not field.a.group._catching_up, 1)

    group(scenario, names="abc")


def test_three_nodes_one_of_which_is_cut_off(group: Play) -> None:
    async def scenario(field: Field) -> None:
        c = field.nodes["c"]
        await c.power_cut()
        await field.until(lambda: len(field.register.record.protected) == 1, D)
        assert field.a.serves
        await field.a.power_cut()
        await field.until(lambda: field.b.serves, 2 * D)
        c.start()
        await field.until(lambda: len(field.register.record.protected) == 1, 20)
        field.a.start()
        await field.protected(field.b)

    group(scenario, names="abc")


def test_who_learns_of_a_new_primary_ends_what_the_former_one_has_begun(group: Play) -> None:
    async def scenario(field: Field) -> None:
        c = field.nodes["c"]
        await whole(field)
        assert c.broken_off == [(GUARDED, 1)]  # the first epoch of all
        await field.a.handover.run("b", dry_run=False, timeout_s=10)
        await field.until(lambda: c.group.epoch == 2, D)
        assert c.broken_off[1:] == [(GUARDED, 2)]

    group(scenario, names="abc")


def test_what_is_only_here_is_not_acknowledged_while_nobody_can_write_that_down(
    group: Play,
) -> None:
    async def scenario(field: Field) -> None:
        field.register.frozen.set()
        await asyncio.sleep(1)
        lost = asyncio.create_task(field.a.group.mirror_failed("b", "its disk stalls"))
        await field.until(lambda: not field.a.host.open, D)
        with pytest.raises(NotPrimary):
            await lost
        await asyncio.sleep(20)
        assert not field.a.host.open
        field.register.frozen.clear()
        await field.until(lambda: field.a.serves, D)
        assert field.register.record.mode is p.Mode.ALONE
        await field.protected(field.a)
        # With the voters there it costs no client anything.
        field.longest_gap = 0.0
        await field.a.group.mirror_failed("b", "slow", lost=False)
        await field.protected(field.a)
        assert field.longest_gap < 0.2

    group(scenario)


def test_a_shadow_without_the_coordinator_leaves_postfix_alone(group: Play) -> None:
    async def scenario(field: Field) -> None:
        field.separate("a", "b")
        field.register.cut.add("b")
        await asyncio.sleep(10 * D)
        assert not field.b.host.postfix
        assert field.b.host.warm <= 1

    group(scenario)


def test_the_mark_of_the_mailboxes_disk_outlasts_changes_of_the_state(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.a.group.own_mail()
        assert field.a.host.mail == field.a.group.state.durable.storage_id
        await field.a.handover.run("b", dry_run=False, timeout_s=10)
        await field.protected(field.b)
        await field.a.crash()
        field.a.start()
        assert field.a.group.state.durable.marked
        field.a.host.mail = ""
        with pytest.raises(StateError, match="no mark"):
            await field.a.group.own_mail()

    group(scenario)
