"""The health checks, each on both sides of its threshold."""

import datetime
from typing import Any

import pytest
from ansible_collections.umbra.mail.plugins.module_utils import _checks as checks

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def node(name: str, role: str = "shadow", **other: Any) -> dict[str, Any]:
    return {"node": name, "role": role, "reachable": True, "lag_s": 0.0, **other}


def status(*nodes: dict[str, Any], **other: Any) -> dict[str, Any]:
    return {"node": "mail-a", "protected": True, "reasons": [], "nodes": list(nodes), **other}


PAIR = status(node("mail-a", "primary"), node("mail-b"), inventory_role="primary")


def test_agent_answers() -> None:
    assert checks.agent_answers(None, "mail-a")["passed"]
    failed = checks.agent_answers("the agent does not run on mail-a", "mail-a")
    assert (failed["passed"], failed["message"]) == (False, "the agent does not run on mail-a")


@pytest.mark.parametrize(
    ("roles", "passed", "message"),
    [
        (("primary", "shadow"), True, "mail-0 is the only primary."),
        (("shadow", "shadow"), False, "No node is primary"),
        (("primary", "primary"), False, "mail-0, mail-1 all say"),
    ],
)
def test_one_primary(roles: tuple[str, ...], passed: bool, message: str) -> None:
    found = checks.one_primary(status(*(node(f"mail-{i}", r) for i, r in enumerate(roles))))
    assert found["passed"] is passed
    assert found["message"].startswith(message)


def test_primary_that_is_gone_does_not_count() -> None:
    gone = node("mail-b", "primary", reachable=False)
    assert checks.one_primary(status(node("mail-a", "primary"), gone))["passed"]
    assert not checks.one_primary(status(node("mail-a"), gone))["passed"]


def test_protected() -> None:
    assert checks.protected(PAIR)["passed"]
    failed = checks.protected(status(protected=False, reasons=["mail-b is down", "lag"]))
    assert (failed["passed"], failed["message"]) == (False, "Degraded: mail-b is down; lag.")
    assert not checks.protected({})["passed"]


def test_peers_reachable() -> None:
    assert checks.peers_reachable(PAIR)["passed"]
    failed = checks.peers_reachable(status(node("mail-a"), node("mail-b", reachable=False)))
    assert (failed["passed"], failed["value"]) == (False, 1)
    assert "mail-b" in failed["message"]


def test_own_reachability_does_not_matter() -> None:
    assert checks.peers_reachable(status(node("mail-a", reachable=False)))["passed"]


@pytest.mark.parametrize(("lag", "passed"), [(0.0, True), (5.0, True), (5.1, False), (None, True)])
def test_lag(lag: float | None, passed: bool) -> None:
    found = checks.lag(status(node("mail-a"), node("mail-b", lag_s=lag)), 5.0)
    assert found["passed"] is passed


def test_lag_of_no_node() -> None:
    assert checks.lag(status(), 5.0)["passed"]


@pytest.mark.parametrize(("age", "passed"), [(None, True), (10.0, True), (61.0, False)])
def test_shadow_queue_age_is_held_against_the_threshold_that_was_asked_for(
    age: float | None, passed: bool
) -> None:
    told = {"name": "shadow queue age", "passed": True, "value": age, "message": "Old."}
    [found] = checks.shadow_queue_age(status(checks=[told]), 60.0)
    assert (found["passed"], found["threshold"]) == (passed, 60.0)


def test_an_agent_that_tells_no_age_is_not_judged_by_it() -> None:
    assert checks.shadow_queue_age(status(), 60.0) == []


@pytest.mark.parametrize(
    ("active", "role", "passed"),
    [
        (True, "primary", True),
        (False, "primary", False),
        (True, "shadow", False),
        (False, "shadow", True),
        (True, None, False),
        (False, "fenced", True),
    ],
)
def test_postfix(active: bool, role: str | None, passed: bool) -> None:
    assert checks.postfix_on_primary_only(active, role)["passed"] is passed


@pytest.mark.parametrize(
    ("role", "ports", "passed"),
    [
        ("primary", {25: True, 993: True, 110: False}, True),
        ("primary", {25: False, 993: True}, False),
        ("primary", {993: True}, True),
        ("primary", {993: False}, False),
        ("shadow", {25: False, 993: False}, True),
        ("shadow", {25: False, 993: True}, False),
        (None, {25: True}, False),
    ],
)
def test_service_ports(role: str | None, ports: dict[int, bool], passed: bool) -> None:
    found = checks.service_ports("mail-b", role, ports)
    assert found["passed"] is passed
    assert found["name"] == "service ports mail-b"


OURS = "inet:localhost:11332, { unix:umbra/milter.sock, default_action=tempfail }"
SHADOWED = {
    "smtp/inet/command": "smtpd",
    "submission/inet/command": "smtpd -o smtpd_sasl_auth_enable=yes",
    "127.0.0.1:24/inet/command": "smtpd -o smtpd_milters=$umbra_milter",
    "127.0.0.1:24/inet/smtpd_milters": "{ unix:umbra/milter.sock, protocol=6 }",  # postconf -Px
    "127.0.0.1:24/inet/receive_override_options": "no_header_body_checks",
    "smtp/unix/command": "smtp",
    "smtpd_milters": OURS,
    "non_smtpd_milters": OURS,
    "internal_mail_filter_classes": "bounce",
}
ENTRANCES = ["smtp", "submission", "127.0.0.1:24", "sendmail", "bounces"]


@pytest.mark.parametrize(
    ("changes", "open_ones"),
    [
        ({}, []),
        ({"smtpd_milters": ""}, ["smtp", "submission"]),
        ({"smtpd_milters": "inet:localhost:11332"}, ["smtp", "submission"]),
        ({"127.0.0.1:24/inet/smtpd_milters": ""}, ["127.0.0.1:24"]),
        ({"submission/inet/smtpd_milters": ""}, ["submission"]),
        ({"smtpd_milters": "", "smtp/inet/smtpd_milters": OURS}, ["submission"]),
        ({"smtp/inet/receive_override_options": "no_milters"}, ["smtp"]),
        ({"non_smtpd_milters": ""}, ["sendmail", "bounces"]),
        ({"internal_mail_filter_classes": ""}, ["bounces"]),
    ],
)
def test_entrances(changes: dict[str, str], open_ones: list[str]) -> None:
    found = checks.entrances({**SHADOWED, **changes})
    assert [item["name"] for item in found] == [f"entrance {name}" for name in ENTRANCES]
    failed = [item["name"] for item in found if not item["passed"]]
    assert failed == [f"entrance {name}" for name in open_ones]


def test_entrances_of_a_postfix_that_cannot_be_asked() -> None:
    assert [item["passed"] for item in checks.entrances(None)] == [False]


@pytest.mark.parametrize(
    ("free", "passed"), [(50.0, True), (10.0, True), (9.9, False), (None, False)]
)
def test_disk_space(free: float | None, passed: bool) -> None:
    found = checks.disk_space("/var/lib/umbra", free, 10.0)
    assert (found["passed"], found["name"]) == (passed, "disk space /var/lib/umbra")


def test_disk_space_of_the_root() -> None:
    assert checks.disk_space("/", 50.0, 10.0)["name"] == "disk space /"


@pytest.mark.parametrize(
    ("days", "passed", "word"),
    [(90.0, True, "valid"), (13.0, False, "valid"), (-2.0, False, "expired"), (None, False, "no")],
)
def test_certificate(days: float | None, passed: bool, word: str) -> None:
    found = checks.certificate_expiry("/etc/x.crt", days, 14.0)
    assert found["passed"] is passed
    assert word in found["message"]


@pytest.mark.parametrize(
    ("text", "days"),
    [("Jan  2 00:00:00 2026 GMT", 1.0), ("Dec 31 12:00:00 2025 GMT", -0.5)],
)
def test_days_left(text: str, days: float) -> None:
    assert checks.days_left(text, NOW) == days


def test_days_left_of_nonsense() -> None:
    for text in ("tomorrow", "Dez 30 00:00:00 2026 GMT", "Dec 30 2026"):
        with pytest.raises(ValueError, match="not"):
            checks.days_left(text, NOW)


@pytest.mark.parametrize(
    ("peer", "before", "after", "difference"),
    [
        (100.0, 100.2, 100.3, 0.0),
        (100.0, 99.9, 100.0, 0.0),
        (100.0, 103.5, 103.6, 2.5),
        (105.0, 100.0, 100.5, 4.5),
    ],
)
def test_clock_difference(peer: float, before: float, after: float, difference: float) -> None:
    assert checks.clock_difference(peer, before, after) == pytest.approx(difference)


@pytest.mark.parametrize(("difference", "passed"), [(0.0, True), (2.1, False), (None, False)])
def test_clock(difference: float | None, passed: bool) -> None:
    assert checks.clock("mail-b", difference, 2.0)["passed"] is passed


def test_inventory_role_is_a_note_only() -> None:
    assert checks.inventory_role(PAIR)["message"] == "The role is the one in the inventory."
    moved = checks.inventory_role({**PAIR, "inventory_role": "shadow"})
    assert moved["passed"]
    assert moved["message"].startswith("Note:")


def test_merge() -> None:
    own = [checks.check("lag", True, "mine")]
    agents = [checks.check("lag", False, "theirs"), checks.check("fence", True, "closed")]
    assert [item["message"] for item in checks.merge(own, agents)] == ["mine", "closed"]
