"""The mailboxes' benchmark: figures and goals on samples whose figures are known; its parsers."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest
from tests.bench.figures import Missing
from tests.bench.mailbox import figures, run, scene
from tests.bench.mailbox.figures import (
    ALONE,
    ASYNC,
    MANY,
    OLD,
    OPERATIONS,
    PLAIN,
    SEED,
    SYNC,
    Burst,
    Copy,
    Lag,
    Many,
    Samples,
    Size,
)
from tests.bench.mailbox.settle import settled
from tests.bench.place import ROOT, SceneError


def burst(
    variant: str, operation: str, number: int, per_second: int, ms: float, clients: int = MANY
) -> Burst:
    return Burst(variant, operation, clients, clients, number, 1.0, [ms] * per_second)


def everything(factor: float) -> Samples:
    """Samples in which every figure is its bound, made worse by the factor."""
    found = Samples()
    for number in (1, 2, 3):
        # The machine grows slower from round to round: ratios must not see it.
        drift = 1 / number
        for operation in OPERATIONS:
            for clients in (1, 4, MANY):
                alone = round(1200 * drift)
                found.bursts += [
                    burst(ALONE, operation, number, alone, 1, clients),
                    burst(ASYNC, operation, number, round(alone * 0.9 / factor), 1, clients),
                    burst(SYNC, operation, number, round(310 / factor), 11 * factor, clients),
                ]
            found.lags += [
                Lag(OLD, operation, number, [60.0, 70.0], [62.0, 72.0], 0),
                Lag(SYNC, operation, number, [0.0, 5 * factor, 6 * factor], [9.0], 0),
                Lag(ASYNC, operation, number, [9 * factor], [10.0], 1),
            ]
            found.sizes += [
                Size(operation, messages, number, [8.0 if messages == 100 else 11.0 * factor] * 3)
                for messages in (100, 10_000, 100_000)
            ]
        found.copies += [Copy(SEED, number, 100, 5 * factor), Copy(PLAIN, number, 100, 4.5)]
    found.many = [
        Many(1_000, {"mail-a": 999}, {"mail-a": 99}, 1, 1, 1),
        Many(10_000, {"mail-a": 140 * factor, "mail-b": 9}, {"mail-a": 0.9 * factor}, 100, 9, 3),
    ]
    return found


def test_every_goal_of_the_specification_is_decided_and_can_hold() -> None:
    goals = figures.goals(everything(1))
    assert all(goal.holds for goal in goals), [goal for goal in goals if not goal.holds]
    assert len({goal.name for goal in goals}) == len(goals) == 4 + 4 + 4 + 4 + 2 + 2 + 1


def test_every_goal_can_fail() -> None:
    held = [goal.name for goal in figures.goals(everything(4)) if goal.holds]
    assert held == []


def test_what_was_not_measured_is_no_goal() -> None:
    assert figures.goals(Samples()) == []
    only = Samples(bursts=[burst(SYNC, "append", 1, 400, 5)])
    assert [goal.name for goal in figures.goals(only)] == [
        f"sync append, {MANY} clients of {MANY} users"
    ]


def test_ratios_compare_within_a_round() -> None:
    samples = everything(1).bursts
    assert figures.ratios(samples, "move", 4) == pytest.approx([0.9] * 3, abs=0.01)
    with pytest.raises(Missing):
        figures.ratios([burst(ALONE, "move", 1, 9, 1), burst(ASYNC, "move", 2, 9, 1)], "move", MANY)


def test_a_burst_of_few_users_is_another_cell() -> None:
    few = Burst(SYNC, "append", MANY, 4, 1, 1.0, [1.0])
    assert figures.goals(Samples(bursts=[few])) == []


def test_the_summary_is_json_and_people_can_read_it() -> None:
    samples = everything(1)
    summary = json.loads(json.dumps(figures.summary(samples)))
    assert json.loads(json.dumps(asdict(samples)))["copies"][0]["way"] == SEED
    text = "\n".join(run._table(summary))
    assert "append" in text
    assert "doveadm backup" in text
    assert "1 unseen" not in text  # three rounds, one each
    assert "3 unseen" in text


CONFIG = """first = 1
service doveadm {
  unix_listener x {
    mode = 0600
  }
}
service doveadm-other {
  a = b
}
metric umbra_imap {
  fields {
    user = yes
  }
}
sieve_execute_socket_dir = ../umbra-delivery
last = 2
"""


def test_a_block_is_taken_out_whole_and_no_other() -> None:
    left = scene.without(CONFIG, ["service doveadm"])
    assert left == "first = 1\nservice doveadm-other {\n  a = b\n}\nlast = 2\n"
    with pytest.raises(SceneError, match="0 blocks 'mail_plugins'"):
        scene.without(CONFIG, ["mail_plugins"])


def test_the_roles_own_template_has_what_is_taken_out() -> None:
    template = (ROOT / "roles/mail_server/templates/dovecot.conf.j2").read_text()
    left = scene.without(re.sub(r"^\{%.*\n", "", template, flags=re.M), scene.ADDED)
    assert "umbra" not in re.sub("#.*", "", left).replace("__mail_server", "")


def test_when_the_mirror_is_settled() -> None:
    here = {"node": "mail-a", "primary": "mail-a"}
    lag = {**here, "nodes": [{"lag_changes": 0}, {"lag_changes": 0}], "protected": False}
    behind = {**here, "nodes": [{"lag_changes": 2}], "protected": False}
    only = ["mailboxes are mirrored asynchronously: the last changes may be only on mail-a"]
    assert settled({**lag, "protected": True, "reasons": []}, "sync")
    assert not settled({**lag, "protected": True, "reasons": [], "primary": "mail-b"}, "sync")
    assert not settled({**lag, "reasons": []}, "sync")
    assert settled({**lag, "reasons": only}, "async")
    assert not settled({**lag, "reasons": [*only, "mail-b is lost"]}, "async")
    assert not settled({**behind, "reasons": only}, "async")


def test_users_have_names_of_their_own() -> None:
    assert run.names("u", 2) == ["u00000@bench.example.org", "u00001@bench.example.org"]
