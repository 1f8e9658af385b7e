"""A primary that works, but worse than a shadow would, gives its role away, or says why not.

The nodes are those of ``quorum_field``: all but network, disk and host is the agent's own.
"""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.unit.cluster.quorum_field import TIMING, D, Field, Host, Node, Play, clock

from umbra.api.report import Check
from umbra.cluster import handover, words
from umbra.cluster import protocol as p
from umbra.cluster.ailing import Rules
from umbra.cluster.fitness import PAUSE
from umbra.cluster.state import Phase
from umbra.cluster.switchover import HANDOVER_TIMEOUT, OUTSTANDING_PAUSE, Refused
from umbra.config import HandoverPolicy, HandoverRules
from umbra.node.helper import HelperError
from umbra.peer.exchange import PeerError
from umbra.transport.remaining import Remaining
from umbra.transport.store import StoreError

SOON = Rules(0, 0, 0).settle + 2 * PAUSE + 2
"""Until an ailment counts, has been looked at, and the role is another's."""

PROBES = HandoverRules(client_probes=("192.0.2.1",))


async def crash_postfix(field: Field, host: Host) -> None:
    host.kill_postfix()
    await field.until(lambda: host.postfix, 3, "Postfix started again")


def fill(node: Node) -> None:
    node.host.free = {"/var/vmail": 2**20}


def fit(node: Node) -> Check:
    return next(c for c in node.group.checks() if c.name == "fit to be primary")


async def stays(field: Field, seconds: float = 30.0) -> None:
    """The primary is the same, under the same epoch, and serves throughout."""
    epoch = field.register.record.epoch
    await asyncio.sleep(seconds)
    assert field.a.serves
    assert field.register.record.epoch == epoch
    assert field.longest_gap < 0.2


def test_the_second_crash_of_postfix_moves_the_primary(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await crash_postfix(field, field.a.host)
        await stays(field)
        assert fit(field.a).passed
        await crash_postfix(field, field.a.host)
        await field.until(lambda: field.b.serves, SOON)
        await field.protected(field.b)
        # A switchover, not a failover: b was told what is left, and a has all that b has.
        assert [origin for origin, _ in field.b.parts.taken] == ["a"]
        change = field.b.group.state.durable.last_change
        assert change is not None
        assert (change.old, change.new, change.planned) == ("a", "b", True)
        assert field.longest_gap < 1.0
        assert len(field.register.record.automatic) == 1
        assert fit(field.a).message == "Postfix has crashed 2 times within 600 s."

    group(scenario)


def test_dovecot_s_restarts_by_systemd_count_and_a_person_s_do_not(group: Play) -> None:
    async def scenario(field: Field) -> None:
        host = field.a.host
        for restarts in (1, 0, 0):  # it crashes, a person restarts it, nothing happens
            host.restarts = restarts
            await stays(field, 2 * PAUSE)
        host.restarts = 1
        await field.until(lambda: field.b.serves, SOON)

    group(scenario)


def test_what_systemd_has_counted_before_the_agent_started_is_no_reason(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.b.crash()
        field.b.host.restarts = 5
        field.b.start()
        await field.protected(field.a)
        await field.a.power_cut()
        await field.until(lambda: field.b.serves, p.LONGEST + D)
        field.a.start()
        await field.protected(field.b)
        await asyncio.sleep(30)
        assert field.b.serves

    group(scenario)


def test_a_postfix_that_a_person_restarts_has_not_crashed(group: Play) -> None:
    async def scenario(field: Field) -> None:
        for _ in range(4):
            field.a.host.postfix = False
            await field.until(lambda: field.a.host.postfix, 3)
            await asyncio.sleep(2)  # it greets again
        await stays(field)

    group(scenario)


def test_under_alarm_only_the_operator_is_told(
    group: Play, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(field: Field) -> None:
        fill(field.a)
        await stays(field, 120)
        check = fit(field.a)
        assert (check.passed, check.message) == (False, "the disk of /var/vmail is full.")
        assert fit(field.b).passed

    group(scenario, rules=HandoverRules(HandoverPolicy.ALARM))
    stay = [r.message for r in caplog.records if "stays primary" in r.message]
    assert stay == [
        "a stays primary (replication_agent_handover_policy is alarm), although"
        " the disk of /var/vmail is full"
    ]


def test_a_full_disk_moves_the_primary_and_there_is_no_way_back_while_it_is_full(
    group: Play,
) -> None:
    async def scenario(field: Field) -> None:
        fill(field.a)
        await field.until(lambda: field.b.serves, SOON)
        await field.protected(field.b)
        fill(field.b)
        await asyncio.sleep(120)
        assert field.b.serves
        assert field.register.record.epoch == 2
        field.a.host.free = {"/var/vmail": 2**30}
        await field.until(lambda: field.a.serves, SOON)

    group(scenario)


def test_disks_that_are_full_on_both_nodes_move_nothing(group: Play) -> None:
    async def scenario(field: Field) -> None:
        fill(field.a)
        fill(field.b)
        await stays(field, 120)
        assert not fit(field.a).passed
        assert not fit(field.b).passed

    group(scenario)


def test_clients_that_do_not_reach_the_primary_find_another(group: Play) -> None:
    async def scenario(field: Field) -> None:
        field.a.host.clients_reach = False
        await asyncio.sleep(3)
        field.a.host.clients_reach = True
        await stays(field)
        field.a.host.clients_reach = False
        await field.until(lambda: field.b.serves, SOON)

    group(scenario, rules=PROBES)


@pytest.mark.parametrize("later", [0.0, 1.5, 3.0])
def test_a_clients_network_that_is_down_for_both_moves_nothing(group: Play, later: float) -> None:
    """Also if the shadow notices it last: what has just begun there counts at once."""

    async def scenario(field: Field) -> None:
        field.a.host.clients_reach = False
        await asyncio.sleep(later)
        field.b.host.clients_reach = False
        await stays(field, 120)
        field.a.host.clients_reach = field.b.host.clients_reach = True
        await asyncio.sleep(2 * PAUSE)
        assert fit(field.a).passed

    group(scenario, rules=PROBES)


def test_who_cannot_ask_knows_nothing_and_says_so(group: Play) -> None:
    async def scenario(field: Field) -> None:
        async def reach(addresses: object) -> bool:
            raise HelperError("ping: socket: Operation not permitted")

        field.a.host.reach = reach  # type: ignore[method-assign]
        await stays(field)
        assert fit(field.a).message == "ping: socket: Operation not permitted."
        assert not fit(field.a).passed

    group(scenario, rules=PROBES)


def test_nothing_is_done_while_no_shadow_is_protected(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.b.power_cut()
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        fill(field.a)
        await asyncio.sleep(60)
        assert field.a.serves
        field.b.start()
        await field.until(lambda: field.b.serves, 60)
        assert field.register.record.epoch == 2

    group(scenario)


def test_while_paused_nothing_is_done_and_after_that_it_is(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await words.pause(field.a.group.driver, True)
        fill(field.a)
        await stays(field, 30)
        assert not field.b.host.postfix  # it was not even asked to prepare
        with pytest.raises(p.NotNow, match="paused"):  # also if it were asked for all the same
            await field.a.group.driver.take(p.Switch("b", automatic=True))
        await words.pause(field.a.group.driver, False)
        await field.until(lambda: field.b.serves, SOON)

    group(scenario)


def test_the_limit_of_automatic_changes_counts_handovers_and_failovers_alike(group: Play) -> None:
    async def scenario(field: Field) -> None:
        fill(field.a)
        await field.until(lambda: field.b.serves, SOON)
        await field.protected(field.b)
        field.a.host.free = {"/var/vmail": 2**30}
        fill(field.b)
        await asyncio.sleep(60)
        assert field.b.serves
        # A person is not held to it.
        await field.b.handover.run("a", dry_run=False, timeout_s=10)
        await field.protected(field.a)
        assert len(field.register.record.automatic) == 1

    group(scenario, limit=1)


def test_a_refused_handover_leaves_the_primary_and_is_tried_again_after_the_pause(
    group: Play,
) -> None:
    async def scenario(field: Field) -> None:
        asked: list[float] = []
        real = field.b.handlers["handover-prepare"]

        async def refuses(*_: object) -> dict[str, object]:
            asked.append(clock())
            raise PeerError("failed", "postfix check: fatal: no")

        field.b.handlers["handover-prepare"] = refuses
        fill(field.a)
        await field.until(lambda: len(asked) == 2, 2 * handover.VOLUNTEER_PAUSE)
        assert asked[1] - asked[0] >= handover.VOLUNTEER_PAUSE
        await stays(field, 10)
        field.b.handlers["handover-prepare"] = real
        await field.until(lambda: field.b.serves, handover.VOLUNTEER_PAUSE + SOON)

    group(scenario)


def test_a_handover_that_fails_half_way_is_taken_back(group: Play) -> None:
    async def scenario(field: Field) -> None:
        real = field.b.handlers["handover"]

        async def breaks(*_: object) -> dict[str, object]:
            raise PeerError("failed", "its disk refuses")

        field.b.handlers["handover"] = breaks
        fill(field.a)
        await field.until(lambda: not field.a.host.open, SOON)
        # The drain ends D after it began, at the next tick.
        await field.until(lambda: field.a.serves, D + TIMING.beat)
        assert field.a.host.postfix
        assert field.register.record.epoch == 1
        field.b.handlers["handover"] = real
        await field.until(lambda: field.b.serves, handover.VOLUNTEER_PAUSE + SOON)

    group(scenario)


def test_a_person_s_switchover_goes_before(group: Play) -> None:
    async def scenario(field: Field) -> None:
        real = field.b.handlers["handover-prepare"]

        async def slow(peer: object, args: object, exchange: object) -> dict[str, object]:
            await asyncio.sleep(15)
            return await real(peer, args, exchange)  # type: ignore[arg-type]

        field.b.handlers["handover-prepare"] = slow
        moving = asyncio.create_task(field.a.handover.run("b", dry_run=False, timeout_s=20))
        await asyncio.sleep(0.1)
        fill(field.a)
        result = await moving
        assert result["to"] == "b"
        await field.protected(field.b)
        assert not field.register.record.automatic  # it was the person's

    group(scenario)


def test_a_person_is_refused_while_the_role_is_given_away(group: Play) -> None:
    async def scenario(field: Field) -> None:
        fill(field.a)
        await field.until(lambda: field.a.group.switching, SOON)
        with pytest.raises(Refused, match="running already"):
            await field.a.handover.run("b", dry_run=False, timeout_s=10)
        await field.until(lambda: field.b.serves, D)

    group(scenario)


def test_the_better_of_two_shadows_gets_the_role(group: Play) -> None:
    async def scenario(field: Field) -> None:
        await field.until(lambda: len(field.register.record.protected) == 2, 30)
        fill(field.b)
        fill(field.a)
        await field.until(lambda: field.nodes["c"].serves, SOON)

    group(scenario, names="abc")


@pytest.mark.parametrize("ailing", [True, False])
def test_a_shadow_that_is_away_keeps_no_role_where_two_copies_are_wanted(
    group: Play, ailing: bool
) -> None:
    async def scenario(field: Field) -> None:
        await field.nodes["c"].power_cut()
        await field.until(lambda: len(field.register.record.protected) == 1, D)
        assert not field.a.group.state.protected
        if ailing:
            fill(field.a)
            await field.until(lambda: field.b.serves, SOON)
        else:
            await field.a.handover.run("b", dry_run=True, timeout_s=10)
            await field.a.handover.run("b", dry_run=False, timeout_s=10)
        change = field.b.group.state.durable.last_change
        assert change is not None
        assert change.planned
        with pytest.raises(Refused, match="the group is degraded, so c may lack something"):
            await field.b.handover.run("c", dry_run=False, timeout_s=10)
        field.nodes["c"].start()
        await field.until(lambda: field.b.group.state.protected, 30)

    group(scenario, names="abc", copies=2)


def test_an_agent_that_ends_in_the_middle_leaves_no_task(group: Play) -> None:
    async def scenario(field: Field) -> None:
        fill(field.a)
        await field.until(lambda: field.a.group.switching, SOON)
        before = time.monotonic()
        await field.a.crash()
        assert time.monotonic() - before < 1
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert sum("fitness" in name for name in names) == 1  # that of b
        await field.until(lambda: field.b.serves, 3 * D)

    group(scenario)


def test_a_drain_leaves_the_ports_open_for_who_is_being_answered(group: Play) -> None:
    async def scenario(field: Field) -> None:
        with field.a.group.messages.begin():
            moving = asyncio.create_task(field.a.handover.run("b", dry_run=False, timeout_s=20))
            await asyncio.sleep(0.5)
            assert field.a.phase is p.Phase.DRAINING
            assert field.a.host.open
        await field.until(lambda: not field.a.host.open, 0.5)
        assert field.register.record.holder == "a"
        await moving
        assert field.b.serves

    group(scenario)


@pytest.mark.parametrize("seconds", [TIMING.hold + 0.3, 60], ids=["long", "too long"])
def test_who_is_answered_late_in_a_drain_hears_it(group: Play, seconds: float) -> None:
    """Its sender would repeat what was acknowledged."""

    async def scenario(field: Field) -> None:
        began = clock()
        with field.a.group.messages.begin():
            moving = asyncio.create_task(field.a.handover.run("b", dry_run=False, timeout_s=20))
            while clock() - began < min(seconds, D + 1):
                assert field.a.host.open
                await asyncio.sleep(0.05)
        if seconds < D:
            await moving
            assert field.b.serves
        else:
            with pytest.raises(Refused, match=r"a message was still coming in after 2\.5 s"):
                await moving
            assert field.a.serves

    group(scenario)


def test_a_change_that_does_not_end_costs_no_more_than_the_drain(group: Play) -> None:
    async def scenario(field: Field) -> None:
        with field.a.group.changes.begin():
            with pytest.raises(Refused, match="a mailbox change was still under way after 2"):
                await field.a.handover.run("b", dry_run=False, timeout_s=20)
            await field.until(lambda: field.a.serves, 0.5)
        assert field.longest_gap < D + 0.5

    group(scenario)


def test_a_candidate_that_is_slow_to_listen_costs_no_more_than_the_drain(group: Play) -> None:
    async def scenario(field: Field) -> None:
        async def slow(*_: object) -> dict[str, object]:
            await asyncio.sleep(HANDOVER_TIMEOUT - 1)
            return {}

        field.b.handlers["handover"] = slow
        with pytest.raises(Refused):
            await field.a.handover.run("b", dry_run=False, timeout_s=20)
        await field.until(lambda: field.a.serves, 0.5)
        assert field.longest_gap < D + 0.5
        assert field.register.record.epoch == 1

    group(scenario)


@pytest.mark.parametrize(
    ("copying", "outstanding", "preparing", "why"),
    [
        (8, 4, 0, "1 messages of the former primary are not carried on yet"),
        (8, 0, 4, "no answer"),
        (10, 0, 0, "the time was over before b could be prepared"),
    ],
    ids=["messages", "prepare", "mailboxes"],
)
def test_a_switchover_waits_for_all_together_no_longer_than_it_may(
    group: Play, copying: float, outstanding: float, preparing: float, why: str
) -> None:
    """What takes it longer than that leaves everything as it was."""

    async def scenario(field: Field) -> None:
        real = field.b.handlers["handover-prepare"]

        async def hurry(to: str, timeout: float) -> None:
            await asyncio.sleep(copying)

        async def left() -> int:
            return int(clock() - began < copying + outstanding)

        async def prepare(peer: object, args: object, exchange: object) -> dict[str, object]:
            await asyncio.sleep(preparing)
            return await real(peer, args, exchange)  # type: ignore[arg-type]

        field.a.parts.hurry = hurry  # type: ignore[method-assign]
        field.a.parts.outstanding = left  # type: ignore[method-assign]
        field.b.handlers["handover-prepare"] = prepare
        began = clock()
        with pytest.raises(Refused, match=why):
            await field.a.handover.run("b", dry_run=False, timeout_s=10)
        assert clock() - began < 10 + 2 * OUTSTANDING_PAUSE
        await stays(field, 5)
        assert field.register.record.epoch == 1

    group(scenario)


def test_a_handover_that_was_given_up_does_not_come_after_the_next_one(group: Play) -> None:
    """The candidate does not notice that nobody waits for its answer any more."""

    async def scenario(field: Field) -> None:
        real, finish = field.b.handlers["handover"], field.b.handover.left_behind.finish
        goes_on, ended = asyncio.Event(), asyncio.Event()

        async def slow(primary: str) -> None:
            await goes_on.wait()
            await finish(primary)

        async def unnoticed(peer: object, args: object, exchange: object) -> dict[str, object]:
            answer = asyncio.ensure_future(real(peer, args, exchange))  # type: ignore[arg-type]
            answer.add_done_callback(lambda _: ended.set())
            return await asyncio.shield(answer)

        async def quiet() -> None:
            goes_on.set()
            await ended.wait()

        field.b.handlers["handover"] = unnoticed
        field.b.handover.left_behind.finish = slow  # type: ignore[method-assign]
        field.a.host.queue_ids = {"Q1": "deferred"}
        with pytest.raises(Refused):
            await field.a.handover.run("b", dry_run=False, timeout_s=20)
        await field.until(lambda: field.a.serves, 0.5)
        field.b.handlers["handover"] = real
        field.b.handover.left_behind.finish = finish  # type: ignore[method-assign]
        field.b.parts.quiet = quiet  # type: ignore[method-assign]
        field.a.host.queue_ids = {"Q2": "deferred"}
        await field.a.handover.run("b", dry_run=False, timeout_s=20)
        [(origin, remaining)] = field.b.parts.taken
        assert (origin, set(remaining or ())) == ("a", {"Q2"})

    group(scenario)


def test_a_former_primary_starts_no_postfix_before_its_queue_is_on_hold(group: Play) -> None:
    async def scenario(field: Field) -> None:
        field.a.host.queue_ids = {"Q1": "deferred"}
        moving = asyncio.create_task(field.a.handover.run("b", dry_run=False, timeout_s=20))
        await field.until(lambda: field.a.phase is p.Phase.READY, D)
        field.separate("a", "b")
        field.register.cut.add("a")
        for _ in range(int(15 / 0.05)):
            assert not (field.a.host.postfix and field.a.host.queue_ids.get("Q1") == "deferred")
            await asyncio.sleep(0.05)
            if clock() % 5 < 0.05:  # it sees the coordinator again and again, b never
                field.register.cut.clear()
        await asyncio.gather(moving, return_exceptions=True)

    group(scenario)


def test_who_gets_its_role_back_before_the_other_has_opened_serves_and_says_so(
    group: Play,
) -> None:
    async def scenario(field: Field) -> None:
        async def never(*_: object, **__: object) -> dict[str, object]:
            await asyncio.sleep(1000)
            return {}

        field.b.handlers["handover-finish"] = never
        field.b.parts.take_over = never  # type: ignore[assignment,method-assign]
        moving = asyncio.create_task(field.a.handover.run("b", dry_run=False, timeout_s=20))
        await field.until(lambda: field.register.record.holder == "b", 5)
        await field.b.power_cut()
        await field.until(lambda: field.a.serves, 3 * D)
        for _ in range(80):
            assert field.a.host.open
            await asyncio.sleep(0.1)
        with pytest.raises(Refused, match="b was lost before it served; a is primary again"):
            await moving

    group(scenario)


@pytest.mark.parametrize("lost", [False, True], ids=["refuses", "lost"])
def test_who_has_its_role_back_and_is_opening_still_says_so_and_keeps_its_queue(
    group: Play, lost: bool
) -> None:
    async def scenario(field: Field) -> None:
        field.a.host.queue_ids = {"Q1": "deferred"}
        take_over = field.a.parts.take_over

        async def slow(origin: str, remaining: Remaining | None) -> None:
            await asyncio.sleep(20)
            await take_over(origin, remaining)

        async def fails(*_: object) -> None:
            raise StoreError("locked")

        async def never(*_: object) -> dict[str, object]:
            await asyncio.sleep(1000)
            return {}

        field.a.parts.take_over = slow  # type: ignore[method-assign]
        field.b.parts.take_over = fails  # type: ignore[assignment,method-assign]
        moving = asyncio.create_task(field.a.handover.run("b", dry_run=False, timeout_s=20))
        if lost:
            field.b.handlers["handover-finish"] = never
            await field.until(lambda: field.register.record.holder == "b", D)
            await field.b.power_cut()
        why = "b was lost before it served" if lost else "b does not open: locked"
        with pytest.raises(Refused, match=f"{why}; a is primary again"):
            await moving
        assert field.register.record.holder == "a"
        assert not field.a.serves
        await field.until(lambda: field.a.serves, 20)
        assert not field.a.host.held

    group(scenario)


@pytest.mark.parametrize("later", [0, 1], ids=["at once", "later"])
def test_who_is_lost_while_the_next_primary_opens_is_waited_for_by_nobody(
    group: Play, later: float
) -> None:
    async def scenario(field: Field) -> None:
        take_over, lost = field.b.parts.take_over, list[str]()

        async def slow(origin: str, remaining: Remaining | None) -> None:
            await asyncio.sleep(3)
            await take_over(origin, remaining)

        field.b.parts.take_over = slow  # type: ignore[method-assign]
        field.b.group.on_lost = lambda peer, reason: lost.append(peer)
        moving = asyncio.create_task(field.a.handover.run("b", dry_run=False, timeout_s=20))
        await field.until(lambda: field.register.record.holder == "b", D)
        await asyncio.sleep(later)
        await field.a.power_cut()
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)
        await field.until(lambda: field.b.serves, 5)
        assert field.register.record.mode is p.Mode.ALONE
        assert not field.b.group.synchronous()
        assert lost == ["a"]
        field.a.start()
        await field.protected(field.b)

    group(scenario)


def test_who_has_just_been_lost_is_not_waited_for_again_by_the_next_primary(group: Play) -> None:
    """Its last heartbeat may be younger than the key's word."""

    async def scenario(field: Field) -> None:
        take_over, opens = field.b.parts.take_over, asyncio.Event()

        async def slow(origin: str, remaining: Remaining | None) -> None:
            await opens.wait()
            await take_over(origin, remaining)

        field.b.parts.take_over = slow  # type: ignore[method-assign]
        await field.a.handover.run("b", dry_run=False, timeout_s=20)
        await field.until(lambda: field.b.group.state.peers["a"].phase is Phase.SHADOW, 5)
        field.cut.add(("a", "b"))
        await field.until(lambda: field.register.record.mode is p.Mode.ALONE, D)
        assert field.b.group.state.peers["a"].reachable
        opens.set()
        await field.until(lambda: field.b.serves, 0.5)
        for _ in range(30):
            assert not field.b.group.synchronous()
            assert field.b.group.reasons()[0] == "a: it did not answer in time"
            await asyncio.sleep(0.1)

    group(scenario)


def test_what_is_to_be_tried_again_is_not_deleted_by_the_former_primary(group: Play) -> None:
    """An operator's ``umbractl queue --retry`` while the primary drains."""

    async def scenario(field: Field) -> None:
        a, b = field.a, field.b
        a.host.queue_ids = {"Q1": "deferred"}
        b.parts.parked = ["s1"]
        await a.handover.run("b", dry_run=False, timeout_s=10)
        await field.protected(b)
        await asyncio.sleep(3)
        assert "Q1" in a.host.queue_ids
        stop = b.host.postfix_stop

        async def stopping() -> None:
            b.parts.parked, b.parts.left = [], 1
            await stop()

        b.host.postfix_stop = stopping  # type: ignore[method-assign]
        await b.handover.run("a", dry_run=False, timeout_s=10)
        await field.until(lambda: a.serves, 10)
        await asyncio.sleep(3)
        assert "Q1" in a.host.queue_ids

    group(scenario)


def test_a_switchover_waits_until_the_candidates_old_copies_are_gone_through(group: Play) -> None:
    """Else it would send what a lost primary had, and this one has sent, once more."""

    async def scenario(field: Field) -> None:
        field.a.parts.settling = {"b"}
        with pytest.raises(Refused, match="not gone through yet"):
            await field.a.handover.run("b", dry_run=False, timeout_s=2)
        assert field.a.serves
        field.a.parts.settling = set()
        await field.a.handover.run("b", dry_run=False, timeout_s=10)
        assert field.b.serves

    group(scenario)
