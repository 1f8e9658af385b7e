"""Each rule of the protocol, taken away, is caught by the simulation.

Where another layer would hide it, the scenario has that one switched off; with the rule the same
runs hold.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from tests.sim import scenarios
from tests.sim.world import Register, Violation

from umbra.cluster import protocol as p

BOOT = p.boot
SHORTEST = p.PROFILES["lan-fast"].silence

Patch = Callable[[pytest.MonkeyPatch], None]


def patches(name: str, value: Any) -> Patch:
    return lambda mp: mp.setattr(p, name, value)


class Mutation(NamedTuple):
    """A rule, how it is taken away, and the runs that must notice."""

    rule: str
    patch: Patch
    runs: Callable[[], None]


def _forgets(state: p.State, durable: p.Durable, effects: list[p.Effect]) -> p.State:
    if not state.durable.epoch:
        effects.append(p.Persist(durable))
    return replace(state, durable=durable)


def _from_arrival() -> Patch:
    real = p.step

    def step(
        config: p.Config, state: p.State, event: p.Event, now: float, wall: float
    ) -> tuple[p.State, list[p.Effect]]:
        if isinstance(event, p.Answered):
            event = replace(event, sent=now)
        return real(config, state, event, now, wall)

    return patches("step", step)


def _holds_for_longer() -> Patch:
    real = p.basis

    def basis(config: p.Config, state: p.State, record: p.Record) -> float:
        return real(config, state, record) + config.timing.silence - config.timing.hold + 0.1

    return patches("basis", basis)


def _without_the_silent(state: p.State) -> frozenset[str]:
    newest = max((answer.sent for answer in state.answers.values()), default=p.NEVER)
    silent = state.beat_at - newest > 1
    members = {m.node for record in p.possible(state) for m in record.protected}
    return frozenset() if silent else frozenset(members | state.joining.keys())


def _by_name(state: p.State, record: p.Record) -> bool:
    return state.node in {member.node for member in record.protected}


def _own_only(config: p.Config, state: p.State, now: float, silence: float) -> float:
    return max(state.waits_until, now + config.timing.silence)


def _since_the_last(config: p.Config, state: p.State, now: float, silence: float) -> float:
    return now + max(config.timing.silence, silence)


def _forgetful(node: str, durable: p.Durable, now: float) -> p.State:
    return replace(BOOT(node, durable, now), settled=True)


def _starts_afresh(node: str, durable: p.Durable, now: float) -> p.State:
    return replace(BOOT(node, durable, now), waits_until=now + SHORTEST)


def _known_only(state: p.State) -> frozenset[p.Record]:
    return frozenset({state.known} if state.known else ())


MUTATIONS = (
    Mutation(
        "1: a copy before 250", patches("required", lambda state: frozenset()), scenarios.cut_off
    ),
    Mutation(
        "2: lower epochs are refused",
        patches("refusal", lambda state, epoch: None),
        scenarios.comes_back,
    ),
    Mutation(
        "2: an epoch is on disk first",
        patches("_persist", _forgets),
        scenarios.epoch_survives,
    ),
    Mutation(
        "3: only the protected take over",
        patches("entitled", lambda state, record: True),
        scenarios.shadow_lost,
    ),
    Mutation("3: a store, not a name", patches("entitled", _by_name), scenarios.wiped_shadow),
    Mutation(
        "3: only after D",
        patches("silent_enough", lambda config, state, now: now - state.heard > 0.6),
        scenarios.bad_weather,
    ),
    Mutation(
        "3: the primary's D where it is longer",
        patches("patience", _own_only),
        scenarios.shorter_at_the_shadow,
    ),
    Mutation(
        "3: an earlier renewal's D too",
        patches("patience", _since_the_last),
        scenarios.shorter_at_the_primary,
    ),
    Mutation(
        "3: the D that was answered before a start",
        patches("boot", _starts_afresh),
        scenarios.shadow_starts_unheard,
    ),
    Mutation(
        "3: the longest of these",
        patches("_remembered", lambda state, now, silence: silence),
        scenarios.shorter_at_the_primary_and_a_start,
    ),
    Mutation(
        "3: the longest D after a person's word",
        patches("LONGEST", SHORTEST),
        scenarios.forced_with_a_shorter_one,
    ),
    Mutation(
        "3: nobody opens while another's right may run",
        patches("_gate", lambda state, record, mine, now: now),
        scenarios.forced_while_cut_off,
    ),
    Mutation(
        "4: alone by the key, sooner than D",
        patches("unanswered", lambda config, state, record, now: frozenset()),
        scenarios.link_cut,
    ),
    Mutation(
        "4: never silently alone",
        patches("required", _without_the_silent),
        scenarios.cut_off,
    ),
    Mutation(
        "5: answers need no quorum",
        patches("basis", lambda config, state, record: state.read_sent),
        scenarios.coordinator_frozen,
    ),
    Mutation(
        "5: unanswered, the key is needed",
        patches("basis", lambda config, state, record: float("inf")),
        scenarios.forced_while_cut_off,
    ),
    Mutation("6: from the sending", _from_arrival(), scenarios.late_answers),
    Mutation("6: shorter than D", _holds_for_longer(), scenarios.drifting),
    Mutation(
        "7: no renewal without work", patches("proven", lambda *_: True), scenarios.disk_stall
    ),
    Mutation(
        "8: committed transactions only",
        lambda mp: mp.setattr(Register, "committed_reads", False),
        scenarios.forced_while_cut_off,
    ),
    Mutation(
        "what is pending is possible",
        patches("possible", _known_only),
        scenarios.join_unanswered,
    ),
    Mutation(
        "what was pending before the start too",
        patches("boot", _forgetful),
        scenarios.join_forgotten,
    ),
    Mutation("a person's word has an end", patches("WRITE_DOWN", 1e9), scenarios.forced_in_vain),
    Mutation(
        "an end, whoever comes back", patches("WRITE_DOWN", 1e9), scenarios.forced_before_a_return
    ),
    Mutation(
        "a person's word waits for the longest D, however late",
        patches("by_itself", lambda was, record: True),
        scenarios.forced_late,
    ),
    Mutation(
        "a pause holds", patches("hindrance", lambda config, record, wall: None), scenarios.paused
    ),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.rule)
def test_a_rule_taken_away_is_noticed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation.patch(monkeypatch)
    with pytest.raises(Violation):
        mutation.runs()


@pytest.mark.parametrize(
    "runs", dict.fromkeys(m.runs for m in MUTATIONS), ids=lambda runs: runs.__name__
)
def test_the_same_runs_hold_with_the_rule(runs: Callable[[], None]) -> None:
    runs()
