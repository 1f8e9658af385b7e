"""The protocol with a witness: single decisions, single faults, and random ones."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim import scenarios
from tests.sim.faults import episode

from umbra.cluster import protocol as p
from umbra.cluster.etcd import LATE

TIMING = p.PROFILES["default"]
A = p.Config("a", "one", {"b": "two"}, TIMING, initial=True)
B = p.Config("b", "two", {"a": "one"}, TIMING)
RECORD = p.Record("a", "a.0", 1, p.Mode.PROTECTED, frozenset({p.Member("b", "b.0")}))


def take(
    config: p.Config, state: p.State, *events: p.Event, now: float, wall: float = 0.0
) -> tuple[p.State, list[p.Effect]]:
    effects: list[p.Effect] = []
    for event in events:
        state, more = p.step(config, state, event, now, wall)
        effects += more
    return state, effects


def kinds(effects: list[p.Effect]) -> list[type]:
    return [type(effect) for effect in effects]


def primary(now: float = 100.0) -> p.State:
    """`a`, open and answered at ``now``."""
    state = p.boot("a", p.Durable("a.0", 1, 1), now - 10)
    state, _ = take(
        A,
        state,
        p.Worked(now),
        p.Seen(now, 6, RECORD),
        p.Seen(now, 7, RECORD),
        p.Answered("b", now, 1, "b.0"),
        now=now,
    )
    assert state.phase is p.Phase.PRIMARY
    return state


def shadow(now: float = 100.0, record: p.Record = RECORD) -> p.State:
    """`b`, asked by `a` at ``now``."""
    state = p.boot("b", p.Durable("b.0"), now - 10)
    events = p.Worked(now), p.Seen(now, 7, record), p.Asked("a", 1, TIMING.silence)
    state, _ = take(B, state, *events, now=now)
    return state


def test_a_new_group_is_made_by_one_node_once() -> None:
    state = p.boot("a", p.Durable("a.0"), 0.0)
    state, effects = take(A, state, p.Seen(1.0, 0, None), now=1.0)
    first = p.Record("a", "a.0", 1, p.Mode.ALONE)
    assert p.Swap(0, first) in effects
    state, effects = take(A, state, p.Seen(1.0, 3, first), now=1.1)
    assert state.phase is p.Phase.PROMOTING
    # Once more, in case it has asked for something before it started.
    state, effects = take(A, state, p.Seen(p.LONGEST, 3, first), now=p.LONGEST)
    assert p.Swap(3, first) in effects
    assert p.Open not in kinds(effects)
    state, effects = take(A, state, p.Seen(p.LONGEST, 4, first), now=p.LONGEST)
    assert p.Open in kinds(effects)
    assert state.durable == p.Durable("a.0", 1, 1)


def test_a_lost_key_waits_for_a_person() -> None:
    state = p.boot("a", p.Durable("a.0", 5, 5), 0.0)
    state, effects = take(A, state, p.Seen(1.0, 0, None), now=1.0)
    assert state.phase is p.Phase.HELD
    assert p.Swap not in kinds(effects)


def test_a_250_needs_the_shadow_the_epoch_and_the_time() -> None:
    state = primary(100.0)
    assert p.may_acknowledge(A, state, 100.1, 1, {"b"})
    assert not p.may_acknowledge(A, state, 100.1, 1, set())
    assert not p.may_acknowledge(A, state, 100.1, 0, {"b"})
    assert not p.may_acknowledge(A, state, 100.0 + TIMING.hold, 1, {"b"})


def test_the_right_ends_and_comes_back_with_an_answer() -> None:
    state = primary(100.0)
    state, effects = take(A, state, p.Tick(), now=100.0 + TIMING.hold)
    assert state.phase is p.Phase.FENCED
    assert p.Close in kinds(effects)
    late = 101.0 + TIMING.hold
    state, effects = take(
        A, state, p.Seen(late, 8, RECORD), p.Answered("b", late, 1, "b.0"), now=late
    )
    assert p.Open(1) in effects


def test_what_is_asked_for_and_unanswered_counts_as_done() -> None:
    state = primary(100.0)
    state, _ = take(A, state, p.Switch("b"), p.Drained(), now=100.1)
    assert state.phase is p.Phase.DEMOTING
    assert not p.may_act(A, state, 100.1)
    # Nobody answers; later the same node asks to have it as it was, and only then goes on.
    state, effects = take(A, state, p.Worked(103.0), p.Tick(), now=103.0)
    swap = next(effect for effect in effects if isinstance(effect, p.Swap))
    assert swap.revision == 7
    assert swap.record.holder == "a"
    assert not p.may_act(A, state, 103.0)


@pytest.mark.parametrize(
    ("epoch", "accepted"), [(0, False), (1, True), (2, True)], ids=["lower", "same", "higher"]
)
def test_a_shadow_refuses_a_lower_epoch_and_keeps_a_higher_one(epoch: int, accepted: bool) -> None:
    state, effects = take(B, shadow(), p.Asked("a", epoch, None), now=100.2)
    assert (p.Reply(None) in effects) is accepted
    if epoch > 1:
        assert effects[0] == p.Persist(p.Durable("b.0", epoch, silence=TIMING.silence))
        assert p.refusal(state, 1) is not None


def test_a_shadow_takes_over_after_d_with_a_fresh_read_and_answers_nobody_meanwhile() -> None:
    state = shadow(100.0)
    early = 100.0 + TIMING.silence - 0.01
    state, effects = take(B, state, p.Seen(early, 7, RECORD), now=early)
    assert p.Swap not in kinds(effects)
    late = 100.0 + TIMING.silence
    state, effects = take(B, state, p.Tick(), now=late)
    assert p.Swap not in kinds(effects), "the key was last read before the silence was over"
    state, effects = take(B, state, p.Seen(late, 7, RECORD), now=late + 0.01, wall=50.0)
    wish = p.Record("b", "b.0", 2, p.Mode.ALONE, automatic=(50.0,))
    assert p.Swap(7, wish) in effects
    assert state.phase is p.Phase.CANDIDATE
    assert p.refusal(state, 1) is not None
    state, effects = take(B, state, p.Seen(late + 0.01, 9, wish), now=late + 0.02)
    assert kinds(effects)[:3] == [p.Persist, p.Persist, p.Open]


@pytest.mark.parametrize(
    ("renewals", "waits_until"),
    [
        ({}, 100.0 + p.LONGEST),
        ({100.0: 1.5}, 100.0 + p.LONGEST),
        ({107.0: 1.5}, 107.0 + TIMING.silence),
        ({107.0: TIMING.silence}, 107.0 + TIMING.silence),
        ({107.0: 6.0}, 113.0),
        ({107.0: 6.0, 108.0: 1.5}, 113.0),
        ({107.0: 6.0, 112.0: 1.5}, 112.0 + TIMING.silence),
    ],
    ids=str,
)
def test_a_shadow_waits_for_its_own_d_and_the_primary_s(
    renewals: dict[float, float], waits_until: float
) -> None:
    state = p.boot("b", p.Durable("b.0", 1), 100.0)
    state, _ = take(B, state, p.Worked(100.0), p.Seen(100.0, 7, RECORD), now=100.0)
    for now, silence in renewals.items():
        state, _ = take(B, state, p.Asked("a", 1, silence), now=now)
    for now, phase in ((waits_until - 0.01, p.Phase.READY), (waits_until, p.Phase.CANDIDATE)):
        state, _ = take(B, state, p.Seen(now, 7, RECORD), now=now)
        assert state.phase is phase


@pytest.mark.parametrize(
    ("renewals", "remembered"),
    [
        ({}, p.LONGEST),
        ({101.0: 2.5}, p.LONGEST),  # one that was answered before the start may still count
        ({107.0: 2.5}, 2.5),
        ({107.0: 1.5, 108.0: 6.0}, 6.0),
        ({107.0: 6.0, 108.0: 1.5}, 6.0),
    ],
    ids=str,
)
def test_the_d_that_was_answered_outlives_the_process(
    renewals: dict[float, float], remembered: float
) -> None:
    state = p.boot("b", p.Durable("b.0", 1), 100.0)
    state, _ = take(B, state, p.Seen(100.0, 7, RECORD), now=100.0)
    for now, silence in renewals.items():
        before = state.durable
        state, effects = take(B, state, p.Asked("a", 1, silence), now=now)
        assert (p.Persist in kinds(effects)) == (state.durable != before)
    assert state.durable.silence == remembered
    assert p.boot("b", state.durable, 200.0).waits_until == 200.0 + remembered


def test_another_store_of_the_same_name_is_not_protected() -> None:
    state = p.boot("b", p.Durable("b.1"), 0.0)
    state, effects = take(B, state, p.Seen(90.0, 7, RECORD), now=90.0)
    state, effects = take(B, state, p.Seen(200.0, 7, RECORD), now=200.0)
    assert p.Swap not in kinds(effects)
    assert state.phase is p.Phase.SYNCING


@pytest.mark.parametrize(
    ("config", "record"),
    [
        (B, replace(RECORD, paused=True)),
        (replace(B, policy=p.Policy.BLOCKED), RECORD),
        (replace(B, policy=p.Policy.SAME_SITE_ONLY), RECORD),
        (B, replace(RECORD, automatic=(0.0, 100.0, 200.0))),
    ],
    ids=["paused", "blocked", "another site", "too many"],
)
def test_what_keeps_a_shadow_from_taking_over_is_said(config: p.Config, record: p.Record) -> None:
    state = shadow(100.0, record)
    state, effects = take(config, state, p.Seen(200.0, 7, record), now=200.0, wall=300.0)
    assert p.Swap not in kinds(effects)
    assert state.phase is p.Phase.HELD
    assert "a is silent, but" in state.cause


@pytest.mark.parametrize(("ahead", "counts"), [(0.0, True), (100.0, True), (p.HOUR, False)])
def test_a_change_in_the_future_does_not_count_for_ever(ahead: float, counts: bool) -> None:
    record = replace(RECORD, automatic=(5000.0 + ahead,) * B.max_changes)
    assert (p.restraint(B, record, 5000.0) is not None) is counts


def test_no_renewal_without_work() -> None:
    state = primary(100.0)
    _, effects = take(A, state, p.Tick(), now=100.0 + TIMING.work)
    assert p.Renew(1) in effects
    _, effects = take(A, state, p.Tick(), now=100.1 + TIMING.work)
    assert p.Renew not in kinds(effects)
    assert p.Swap not in kinds(effects), "it leaves nobody behind either"


def test_only_what_a_node_does_by_itself_is_held_back_and_counted() -> None:
    def asked(record: p.Record, *, automatic: bool, wall: float) -> p.Record:
        state = replace(primary(100.0), known=record)
        state, _ = p.step(A, state, p.Switch("b", automatic), 100.1, wall)
        state, effects = p.step(A, state, p.Drained(), 100.1, wall)
        first = next(effect.record for effect in effects if isinstance(effect, p.Swap))
        # Asked again, because nobody answered, it is the same record at whatever time of day.
        again = p.step(A, state, p.Tick(), 100.2 + TIMING.call, wall + 1)[1]
        assert [e.record for e in again if isinstance(e, p.Swap)] == [first]
        return first

    full = replace(RECORD, automatic=(1.0,) * A.max_changes)
    paused = replace(RECORD, paused=True)
    assert asked(RECORD, automatic=True, wall=50.0).automatic == (50.0,)
    assert asked(RECORD, automatic=False, wall=50.0).automatic == ()
    for record, why in ((full, "within an hour"), (paused, "paused")):
        with pytest.raises(p.NotNow, match=why):
            asked(record, automatic=True, wall=50.0)
        assert asked(record, automatic=False, wall=50.0).automatic == record.automatic
    later = asked(full, automatic=True, wall=p.HOUR + 50)
    assert later.automatic == (1.0,) * (A.max_changes - 1) + (p.HOUR + 50,)


def test_wishes_that_cannot_be_granted_change_nothing() -> None:
    with pytest.raises(p.NotNow, match="not protected"):
        take(A, primary(), p.Switch("c"), now=100.1)
    with pytest.raises(p.NotNow, match="not an open primary"):
        take(B, shadow(), p.Switch("a"), now=100.1)
    with pytest.raises(p.NotNow, match="holds the key"):
        take(A, primary(), p.Force(), now=100.1)
    with pytest.raises(p.NotNow, match="does not answer"):
        take(B, p.boot("b", p.Durable("b.0", 1), 0.0), p.Force(), now=1.0)


def test_a_forced_node_opens_only_when_the_other_must_have_stopped() -> None:
    alone = p.Record("a", "a.0", 1, p.Mode.ALONE)
    state, effects = take(B, shadow(100.0, alone), p.Force(), now=100.1)
    forced = p.Record("b", "b.0", 2, p.Mode.ALONE, forced=2)
    assert p.Swap(7, forced) in effects
    state, effects = take(B, state, p.Seen(100.1, 8, forced), now=100.2)
    assert state.phase is p.Phase.PROMOTING
    # It has heard D of that one, but may have been cut off from it since.
    later = 100.2 + p.LONGEST
    state, effects = take(B, state, p.Seen(later - 0.1, 8, forced), now=later - 0.1)
    assert state.phase is p.Phase.PROMOTING
    state, effects = take(B, state, p.Seen(later, 8, forced), now=later)
    assert p.Open(2) in effects


@pytest.mark.parametrize("name", sorted(p.PROFILES))
def test_the_profiles_are_sound_for_a_usual_round_trip(name: str) -> None:
    assert not p.PROFILES[name].findings({"lan-fast": 0.005, "default": 0.04, "wan": 0.1}[name])


@pytest.mark.parametrize("name", sorted(p.PROFILES))
def test_who_goes_alone_through_the_third_member_does_so_in_time(name: str) -> None:
    timing = p.PROFILES[name]
    asked = timing.miss + timing.beat / 4 + (LATE + LATE / 2) * timing.call
    assert asked + 2 * timing.round_trip < timing.hold
    assert LATE * timing.call >= 2 * timing.round_trip, "nobody is late who is as far as he may be"


@pytest.mark.parametrize(
    "change", [{"hold": 2.5}, {"miss": 2.4}, {"beat": 1.0}, {"call": 0.1}], ids=str
)
def test_a_combination_that_is_not_safe_is_refused(change: dict[str, float]) -> None:
    assert replace(TIMING, **change).findings(0.04)


@pytest.mark.parametrize(
    ("name", "fits", "not_any_more"),
    [("lan-fast", 75, 76), ("default", 100, 101), ("wan", 125, 126)],
)
def test_a_profile_has_a_longest_round_trip(name: str, fits: int, not_any_more: int) -> None:
    assert not p.profile_findings(name, fits / 1000)
    assert p.profile_findings(name, not_any_more / 1000)


@pytest.mark.parametrize(
    ("milliseconds", "advice"),
    [(80, "Set replication_agent_profile to default."), (110, "to wan."), (200, "to static")],
)
def test_a_profile_that_does_not_fit_is_answered_with_one_that_does(
    milliseconds: int, advice: str
) -> None:
    (sentence,) = p.profile_findings("lan-fast", milliseconds / 1000)
    assert sentence.startswith(f"Profile lan-fast: the round trip of {milliseconds} ms is over")
    assert advice in sentence


NAMES = st.text("abcxyz.-", min_size=1, max_size=8)


@given(
    holder=NAMES,
    epoch=st.integers(1, 10**6),
    protected=st.dictionaries(NAMES, NAMES, max_size=3),
    paused=st.booleans(),
    automatic=st.lists(st.floats(0, 1e10), max_size=3),
    forced=st.integers(0, 10**6),
)
def test_a_record_survives_its_json(
    holder: str,
    epoch: int,
    protected: dict[str, str],
    paused: bool,
    automatic: list[float],
    forced: int,
) -> None:
    members = frozenset(p.Member(*item) for item in protected.items())
    mode = p.Mode.PROTECTED if members else p.Mode.ALONE
    record = p.Record(holder, "s", epoch, mode, members, paused, tuple(automatic), forced)
    assert p.Record.from_json(record.to_json()) == record


def test_a_key_from_before_forced_promotions_were_noted_is_read() -> None:
    value = RECORD.to_json()
    del value["forced"]
    assert p.Record.from_json(value) == RECORD


def test_a_promotion_by_force_that_loses_nothing_is_not_noted() -> None:
    _, effects = take(B, shadow(100.0), p.Force(), now=100.1)
    (swap,) = [effect for effect in effects if isinstance(effect, p.Swap)]
    assert (swap.record.holder, swap.record.forced) == ("b", 0)


@pytest.mark.parametrize(
    ("change", "stands"),
    [
        ({"paused": True}, True),
        ({"protected": frozenset({p.Member("c", "c.0")}), "mode": p.Mode.PROTECTED}, False),
        ({"holder": "c", "storage": "c.0", "epoch": 2}, False),
    ],
    ids=["paused", "another has everything", "another is primary"],
)
def test_a_person_s_word_does_not_outlive_what_it_was_given_on(
    change: dict[str, Any], stands: bool
) -> None:
    alone = p.Record("a", "a.0", 1, p.Mode.ALONE)
    state, _ = take(B, shadow(100.0, alone), p.Force(), now=100.1)
    now = 101.0
    state, effects = take(B, state, p.Seen(now, 8, replace(alone, **change)), now=now)
    asked = [e.record.holder for e in effects if isinstance(e, p.Swap)]
    assert asked == (["b"] if stands else [])
    assert state.forced is stands


def test_a_person_s_word_to_one_who_had_everything_falls_when_it_is_left_behind() -> None:
    state, _ = take(B, shadow(100.0), p.Force(), now=100.1)
    assert state.forced
    alone = replace(RECORD, mode=p.Mode.ALONE, protected=frozenset())
    state, effects = take(B, state, p.Seen(101.0, 8, alone), now=101.0)
    assert not state.forced
    assert p.Swap not in kinds(effects)


@pytest.mark.parametrize("word", [p.Force(), p.Pause(True)], ids=["promotion", "pause"])
def test_a_person_s_word_that_is_not_written_down_is_withdrawn(word: p.Event) -> None:
    alone = p.Record("a", "a.0", 1, p.Mode.ALONE)
    state, effects = take(B, shadow(100.0, alone), word, now=100.1)
    (asked,) = [effect.record for effect in effects if isinstance(effect, p.Swap)]
    late = 100.1 + p.WRITE_DOWN
    state, effects = take(B, state, p.Tick(), now=late)
    # It may be committed still, until what is there is written once more.
    assert p.Swap(7, alone) in effects
    assert asked in p.possible(state)
    state, effects = take(B, state, p.Seen(late, 8, alone), now=late + TIMING.call)
    assert p.Swap not in kinds(effects)
    assert p.possible(state) == {alone}


def test_only_the_store_that_is_named_stands_in_the_way_of_a_person() -> None:
    named = replace(RECORD, protected=frozenset({p.Member("c", "c.0")}))
    for stores in ({}, {"c": "c.0"}, {"a": "a.1"}):
        with pytest.raises(p.NotNow, match="c has everything"):
            take(B, shadow(100.0, named), p.Force(stores), now=100.1)
    _, effects = take(B, shadow(100.0, named), p.Force({"c": "c.1"}), now=100.1)
    (swap,) = [effect for effect in effects if isinstance(effect, p.Swap)]
    assert (swap.record.holder, swap.record.forced) == ("b", 2)


def test_a_record_that_contradicts_itself_is_refused() -> None:
    value = {**RECORD.to_json(), "mode": "alone"}
    with pytest.raises(ValueError, match="protected"):
        p.Record.from_json(value)


@pytest.mark.parametrize(
    "scenario",
    [
        scenarios.shadow_lost,
        scenarios.switchover_to_the_dying,
        scenarios.limit,
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_single_faults(scenario: scenarios.Scenario) -> None:
    scenario()


def test_a_lost_host_costs_d_and_little_more() -> None:
    assert scenarios.host_lost() < 3.2


def test_a_switchover_costs_a_few_transactions() -> None:
    assert scenarios.switchover() < 1.0


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**40))
def test_random_faults_break_no_law_and_end_protected(seed: int) -> None:
    episode(seed)


def test_a_peer_that_takes_nothing_is_left_behind_after_a_proof_of_work_alone() -> None:
    def swaps(effects: list[p.Effect]) -> bool:
        return p.Swap in kinds(effects)

    state, effects = take(A, primary(), p.Lost("b"), now=100.1)
    assert not swaps(effects)
    state, effects = take(A, state, p.Worked(100.05), p.Lost("b"), now=100.2)
    assert not swaps(effects), "that proof began before"
    state, effects = take(A, state, p.Worked(100.15), now=100.3)
    assert swaps(effects), "the second word of the same loss asks for no further proof"


def test_a_loss_of_one_peer_asks_for_no_further_proof_of_that_of_another() -> None:
    config = replace(A, peers={"b": "two", "c": "three"})
    state, _ = take(config, primary(), p.Lost("b"), now=100.1)
    state, _ = take(config, state, p.Join("c", "c.0"), p.Lost("c"), now=100.6)
    _, effects = take(config, state, p.Worked(100.2), now=100.7)
    assert p.Swap in kinds(effects)
