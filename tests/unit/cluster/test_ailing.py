"""Why a primary gives its role away by itself, and to whom."""

from __future__ import annotations

from dataclasses import replace

import pytest

from umbra.cluster.ailing import (
    Candidate,
    History,
    Observed,
    Rules,
    ailments,
    observe,
    successor,
)
from umbra.cluster.protocol import Policy

RULES = Rules(crashes=2, window=600, least_free=1000)
FINE = Observed((), {"/var/vmail": 5000}, clients=True)


def after(*looks: tuple[float, Observed], rules: Rules = RULES) -> list[str]:
    history = History()
    for at, seen in looks:
        history = observe(rules, history, seen, at)
    return ailments(rules, history, looks[-1][0])


def crash(*servers: str) -> Observed:
    return replace(FINE, crashed=servers)


def test_a_host_that_works_is_not_ailing() -> None:
    assert after((0, FINE), (100, FINE)) == []
    assert after((0, Observed()), (100, Observed())) == []


def test_the_second_crash_of_one_server_within_the_window_is_a_reason() -> None:
    assert after((0, crash("Postfix")), (599, crash("Postfix"))) == [
        "Postfix has crashed 2 times within 600 s"
    ]
    assert after((0, crash("Dovecot", "Dovecot")), (100, FINE))
    assert after((0, crash("Postfix"))) == []
    assert after((0, crash("Postfix")), (600, crash("Postfix"))) == []
    assert after((0, crash("Postfix")), (1, crash("Dovecot"))) == []
    assert after((0, crash("Postfix", "Postfix")), rules=replace(RULES, crashes=0)) == []


def test_it_is_forgotten_when_the_window_is_over() -> None:
    looks = ((0.0, crash("Postfix")), (1.0, crash("Postfix")))
    assert after(*looks, (599, FINE))
    assert not after(*looks, (601, FINE))


@pytest.mark.parametrize(
    ("ill", "reason"),
    [
        (replace(FINE, free={"/var/vmail": 999}), "the disk of /var/vmail is full"),
        (replace(FINE, clients=False), "nothing on the clients' side answers"),
    ],
)
def test_what_stands_for_five_seconds_is_a_reason(ill: Observed, reason: str) -> None:
    assert after((0, ill), (4.9, ill)) == []
    assert after((0, ill), (5, ill)) == [reason]
    assert after((0, ill), (3, FINE), (4, ill), (6, ill)) == []
    assert after((0, ill), (9, ill), (10, FINE)) == []


def test_without_a_settling_time_it_counts_at_once() -> None:
    """So a shadow that has only just seen the same is not the better primary."""
    rules = replace(RULES, settle=0)
    assert after((0, replace(FINE, clients=False)), rules=rules)
    assert not after((0, replace(FINE, clients=False)), (1, FINE), rules=rules)


def test_what_nobody_can_tell_is_no_reason() -> None:
    blind = replace(FINE, clients=None)
    assert after((0, blind), (100, blind)) == []


B = Candidate("b", "beta", whole=True, ailing=False, policy=Policy.AUTOMATIC, preference=0)


@pytest.mark.parametrize(
    ("candidates", "name"),
    [
        ([], None),
        ([B], "b"),
        ([replace(B, whole=False)], None),
        ([replace(B, ailing=True)], None),
        ([replace(B, policy=Policy.BLOCKED)], None),
        ([replace(B, policy=Policy.SAME_SITE_ONLY)], None),
        ([replace(B, policy=Policy.SAME_SITE_ONLY, site="alpha")], "b"),
        ([replace(B, preference=1), replace(B, node="c")], "c"),
        ([replace(B, node="c"), B], "b"),
        ([replace(B, ailing=True), replace(B, node="c", preference=5)], "c"),
    ],
)
def test_the_successor_is_whole_well_and_preferred(
    candidates: list[Candidate], name: str | None
) -> None:
    found = successor(candidates, "alpha")
    assert (found.node if found else None) == name
