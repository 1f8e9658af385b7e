"""The decisions: rules one by one, then two nodes under random faults that never both serve."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from umbra.cluster import machine
from umbra.cluster.machine import NotNow, step
from umbra.cluster.state import Change, Durable, Mode, Phase, Role, State
from umbra.cluster.static import first

AT = "2026-01-01T00:00:00.000Z"


def node(name: str, role: Role, mode: Mode = Mode.PROTECTED, epoch: int = 1) -> State:
    return State(name, Durable(f"store-{name}", epoch, role, mode, AT), Phase.SHADOW)


def seen(state: State, *, answered: bool = True) -> machine.PeerSeen:
    durable = state.durable
    return machine.PeerSeen(
        state.node, durable.epoch, durable.role, state.phase, durable.storage_id, answered,
        durable.handing_to,
    )  # fmt: skip


def protected_pair() -> tuple[State, State]:
    a = step(node("a", Role.PRIMARY), machine.Started())
    b = step(node("b", Role.SHADOW), machine.Started())
    a = step(a, seen(b))
    a = step(step(a, machine.CatchingUp("b")), machine.CaughtUp("b"))
    return a, b


def test_a_primary_that_starts_is_closed_until_a_shadow_answers() -> None:
    a = step(node("a", Role.PRIMARY), machine.Started())
    b = step(node("b", Role.SHADOW), machine.Started())
    assert not a.serving
    assert not step(a, seen(b, answered=False)).serving
    a = step(a, seen(b))
    assert a.serving
    assert a.durable.mode is Mode.ALONE


def test_a_primary_that_was_installed_anew_does_not_open_over_a_copy() -> None:
    """It has no mail: what it would make the other node is empty."""
    _, b = protected_pair()
    anew = step(State("a", first("primary", AT), Phase.SHADOW), machine.Started())
    anew = step(anew, seen(b))
    assert not anew.serving
    assert (anew.durable.role, anew.durable.epoch) == (Role.SHADOW, 1)
    assert not anew.durable.merged


def test_the_first_primary_of_a_group_opens_under_the_first_epoch() -> None:
    a = step(State("a", first("primary", AT), Phase.SHADOW), machine.Started())
    b = step(State("b", first("shadow", AT), Phase.SHADOW), machine.Started())
    a = step(a, seen(b))
    assert a.serving
    assert a.durable.epoch == 1
    assert step(b, seen(a)).durable.epoch == 1


def test_a_primary_that_was_alone_opens_without_its_peer() -> None:
    assert step(node("a", Role.PRIMARY, Mode.ALONE), machine.Started()).serving


def test_unmirrored_changes_make_the_primary_alone_and_keep_the_shadow() -> None:
    a, _ = protected_pair()
    a = step(a, machine.Unmirrored("b", "suspended"))
    assert a.serving
    assert not a.protected
    assert a.alone_reason == "suspended"
    assert a.peers["b"].synchronous, "messages go to it as before"
    assert step(a, machine.Unmirrored("b", "again")) == a
    with pytest.raises(NotNow):
        step(a, machine.Drain())


def protected_three(copies: int = 1) -> State:
    a = replace(step(node("a", Role.PRIMARY), machine.Started()), copies=copies)
    for name in ("b", "c"):
        a = step(a, seen(step(node(name, Role.SHADOW), machine.Started())))
        a = step(a, machine.CatchingUp(name))
    return step(a, machine.CaughtUp("b"))


def test_enough_of_several_shadows_must_have_everything() -> None:
    a = protected_three()
    assert a.protected, "b has everything, c follows"
    a = step(a, machine.Unmirrored("c", "it follows"))
    assert a.protected
    a = step(a, machine.PeerLost("c", "no answer"))
    assert a.protected
    a = step(a, machine.PeerLost("b", "no answer"))
    assert not a.protected


def test_a_shadow_that_only_follows_protects_nothing() -> None:
    """It has every message, but not every mailbox change."""
    a = step(protected_three(), machine.PeerLost("b", "no answer"))
    assert a.peers["c"].synchronous
    assert not a.protected
    a = step(a, machine.CaughtUp("c"))
    assert a.protected, "it takes the place of the lost one"


def test_two_copies_want_two_shadows() -> None:
    a = protected_three(copies=2)
    assert not a.protected
    a = step(a, machine.CaughtUp("c"))
    assert a.protected
    assert not step(a, machine.Unmirrored("c", "slow")).protected


def test_after_a_handover_the_new_primary_has_one_copy() -> None:
    change = Change("a", "b", AT, planned=True)
    b = replace(step(node("b", Role.SHADOW), machine.Started()), copies=1)
    assert step(b, machine.Promote(2, change, protected=True)).protected
    b = replace(b, copies=2)
    promoted = step(b, machine.Promote(2, change, protected=True))
    assert promoted.serving
    assert not promoted.protected, "the third node has not been compared yet"


def test_a_lost_shadow_makes_the_primary_alone_and_says_why() -> None:
    a, _ = protected_pair()
    assert a.protected
    a = step(a, machine.PeerLost("b", "no answer"))
    assert a.serving
    assert not a.protected
    assert a.alone_reason == "b: no answer"


def test_protected_again_only_after_catching_up() -> None:
    a, b = protected_pair()
    a = step(step(a, machine.PeerLost("b", "no answer")), seen(b))
    assert not a.protected
    with pytest.raises(NotNow):
        step(a, machine.CaughtUp("b"))
    a = step(step(a, machine.CatchingUp("b")), machine.CaughtUp("b"))
    assert a.protected


def test_another_store_under_the_same_name_is_not_trusted() -> None:
    a, b = protected_pair()
    a = step(a, seen(replace(b, durable=replace(b.durable, storage_id="wiped"))))
    assert not a.protected
    assert "another store" in a.alone_reason


def test_a_higher_epoch_ends_every_right() -> None:
    a, b = protected_pair()
    higher = replace(b, durable=replace(b.durable, epoch=9, role=Role.PRIMARY), phase=Phase.PRIMARY)
    a = step(a, seen(higher))
    assert (a.phase, a.durable.role, a.durable.epoch) == (Phase.SHADOW, Role.SHADOW, 9)


def test_two_primaries_of_one_epoch_both_close() -> None:
    a, b = protected_pair()
    clone = replace(b, durable=replace(b.durable, role=Role.PRIMARY), phase=Phase.PRIMARY)
    a = step(a, seen(clone))
    assert a.phase is Phase.HELD
    assert not a.serving


def test_no_switchover_while_degraded() -> None:
    a, _ = protected_pair()
    with pytest.raises(NotNow, match="no answer"):
        step(step(a, machine.PeerLost("b", "no answer")), machine.Drain())


@pytest.mark.parametrize(
    "event",
    [machine.PeerLost("b", "no answer"), machine.Unmirrored("b", "suspended")],
    ids=["lost", "unmirrored"],
)
def test_the_right_is_not_given_to_who_was_lost_during_the_drain(event: machine.Event) -> None:
    a, _ = protected_pair()
    a = step(step(a, machine.Drain()), event)
    with pytest.raises(NotNow, match="b was lost on the way"):
        step(a, machine.GiveUp("b", AT))
    a = step(a, machine.DrainAborted())
    assert (a.phase, a.durable.mode) == (Phase.PRIMARY, Mode.ALONE)


def test_a_shadow_refuses_an_epoch_that_it_has_seen() -> None:
    _, b = protected_pair()
    change = Change("a", "b", AT, planned=True)
    with pytest.raises(NotNow, match="epoch 1"):
        step(b, machine.Promote(1, change, protected=True))


def test_the_right_comes_back_only_after_the_other_has_seen_a_higher_epoch() -> None:
    a, b = protected_pair()
    a = step(step(a, machine.Drain()), machine.GiveUp("b", AT))
    assert not a.serving
    a = step(a, seen(b))
    assert not a.serving
    a = step(a, machine.Reclaim())
    a = step(a, seen(b))
    assert not a.serving
    b = step(b, seen(a, answered=False))
    with pytest.raises(NotNow):
        step(b, machine.Promote(2, Change("a", "b", AT, planned=True), protected=True))
    a = step(a, seen(b))
    assert a.serving


def test_a_third_node_does_not_carry_the_question_for_the_outcome_as_an_answer() -> None:
    """A raised epoch is for the node that was offered the role; from another it would end it."""
    a = step(step(protected_three(), machine.Drain()), machine.GiveUp("b", AT))
    b, c = (step(node(name, Role.SHADOW), machine.Started()) for name in "bc")
    change = Change("a", "b", AT, planned=True)
    b = step(b, machine.Promote(a.durable.offered, change, protected=True))
    a = step(a, machine.Reclaim())
    assert a.durable.epoch > b.durable.epoch
    c = step(c, seen(a, answered=False))
    b = step(b, seen(c))
    assert b.serving
    b = step(b, seen(a, answered=False))
    assert b.serving
    a = step(a, seen(b))
    assert a.durable.role is Role.SHADOW
    assert a.durable.merged


def test_only_a_lost_right_leaves_mailboxes_to_be_merged() -> None:
    a, b = protected_pair()
    assert not a.durable.merged
    change = Change("a", "b", AT, planned=True)
    handed = step(step(a, machine.Drain()), machine.GiveUp("b", AT))
    assert step(handed, machine.TakenOver(change)).durable.merged
    forced = step(b, machine.Promote(3, replace(change, planned=False), protected=False))
    lost = step(step(a, machine.Merged()), seen(forced))
    assert lost.durable.role is Role.SHADOW
    assert not lost.durable.merged
    assert step(lost, machine.Merged()).durable.merged


@pytest.mark.parametrize(
    ("mode", "others", "unshared"),
    [(Mode.PROTECTED, 1, False), (Mode.ALONE, 1, True), (Mode.PROTECTED, 2, True)],
)
def test_what_a_lost_primary_acknowledged_its_successor_has_unless_it_was_alone(
    mode: Mode, others: int, unshared: bool
) -> None:
    a, b = protected_pair()
    a = replace(a, durable=replace(a.durable, mode=mode), others=others)
    higher = replace(b, durable=replace(b.durable, epoch=9, role=Role.PRIMARY), phase=Phase.PRIMARY)
    lost = step(a, seen(higher))
    assert (lost.durable.merged, lost.durable.unshared) == (False, unshared)


def test_force_is_over_every_offer() -> None:
    a, _ = protected_pair()
    a = step(step(a, machine.Drain()), machine.GiveUp("b", AT))
    forced = step(a, machine.OpenByForce(AT))
    assert forced.serving
    assert forced.durable.epoch > a.durable.offered


class TwoNodes(RuleBasedStateMachine):
    """Two nodes, their disks, and one handover request that may be delayed, repeated or lost."""

    @initialize()
    def pair(self) -> None:
        a, b = protected_pair()
        self.nodes = {"a": a, "b": b}
        self.offers: list[tuple[str, str, int]] = []

    def change(self, name: str, event: machine.Event) -> bool:
        try:
            self.nodes[name] = step(self.nodes[name], event)
        except NotNow:
            return False
        return True

    names = st.sampled_from(["a", "b"])

    @rule(name=names, answered=st.booleans())
    def heartbeat(self, name: str, answered: bool) -> None:
        """``name`` asks; the answer may be lost."""
        other = "b" if name == "a" else "a"
        self.change(other, seen(self.nodes[name], answered=False))
        if answered:
            self.change(name, seen(self.nodes[other]))

    @rule(name=names)
    def lost(self, name: str) -> None:
        self.change(name, machine.PeerLost("b" if name == "a" else "a", "lost"))

    @rule(name=names)
    def caught_up(self, name: str) -> None:
        other = "b" if name == "a" else "a"
        if self.change(name, machine.CatchingUp(other)):
            self.change(name, machine.CaughtUp(other))

    @rule(name=names)
    def offer(self, name: str) -> None:
        other = "b" if name == "a" else "a"
        if self.change(name, machine.Drain()):
            self.change(name, machine.GiveUp(other, AT))
            self.offers.append((name, other, self.nodes[name].durable.offered))

    @precondition(lambda self: self.offers)
    @rule(data=st.data(), answered=st.booleans())
    def offer_arrives(self, data: st.DataObject, answered: bool) -> None:
        old, new, epoch = data.draw(st.sampled_from(self.offers))
        change = Change(old, new, AT, planned=True)
        taken = self.change(new, machine.Promote(epoch, change, protected=True))
        durable = self.nodes[old].durable
        if taken and answered and (durable.handing_to, durable.offered) == (new, epoch):
            self.change(old, machine.TakenOver(change))

    @rule(name=names)
    def reclaim(self, name: str) -> None:
        self.change(name, machine.Reclaim())

    @rule(name=names)
    def restart(self, name: str) -> None:
        durable = self.nodes[name].durable
        self.nodes[name] = step(State(name, durable, Phase.SHADOW), machine.Started())

    @invariant()
    def at_most_one_serves(self) -> None:
        if hasattr(self, "nodes"):
            assert sum(state.serving for state in self.nodes.values()) <= 1, self.nodes

    @invariant()
    def nobody_waits_for_a_person(self) -> None:
        if hasattr(self, "nodes"):
            assert all(state.phase is not Phase.HELD for state in self.nodes.values())

    def teardown(self) -> None:
        """When all faults are over there is a protected primary again."""
        if not hasattr(self, "nodes"):
            return
        for _ in range(6):
            for name in ("a", "b"):
                self.change(name, machine.Reclaim())
                self.heartbeat(name, True)
                self.caught_up(name)
        assert sum(state.protected for state in self.nodes.values()) == 1, self.nodes


TestTwoNodes = TwoNodes.TestCase
TestTwoNodes.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
