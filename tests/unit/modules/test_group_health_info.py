"""The module group_health_info with a host and an agent that are played."""

from typing import Any

import pytest
from ansible_collections.umbra.mail.plugins.module_utils._agent import AgentUnavailable
from ansible_collections.umbra.mail.plugins.modules import group_health_info as module

PARAMS: dict[str, Any] = {
    "lag_threshold": 5.0,
    "shadow_age_threshold": 60.0,
    "disk_paths": ["/var/vmail"],
    "disk_free_percent": 10.0,
    "certificates": ["/etc/umbra/tls/node.crt"],
    "certificate_days": 14.0,
    "clock_threshold": 2.0,
    "service_addresses": {"mail-a": "192.0.2.10", "mail-b": "198.51.100.10"},
    "api_addresses": {"mail-a": "10.86.0.1", "mail-b": "10.86.0.2", "witness": "10.86.0.3"},
    "service_ports": [25, 993],
    "api_port": 8687,
}


class Host:
    """A healthy primary whose peer is a closed shadow."""

    name = "mail-a"

    def __init__(self, **other: Any) -> None:
        self.values: dict[str, Any] = {
            "postfix": True,
            "free": 50.0,
            "days": 90.0,
            "ports": {25: False, 993: False},
            "clock": 0.0,
            "settings": {
                "smtp/inet/command": "smtpd",
                "smtpd_milters": "{ unix:umbra/milter.sock, default_action=tempfail }",
                "non_smtpd_milters": "{ unix:umbra/milter.sock, default_action=tempfail }",
                "internal_mail_filter_classes": "bounce",
            },
            **other,
        }
        self.probed: list[str] = []

    def postfix_active(self) -> bool:
        return bool(self.values["postfix"])

    def postfix_settings(self) -> dict[str, str] | None:
        settings: dict[str, str] | None = self.values["settings"]
        return settings

    def free_percent(self, path: str) -> float | None:
        free: float | None = self.values["free"]
        return free

    def certificate_days(self, path: str) -> float | None:
        days: float | None = self.values["days"]
        return days

    def ports_open(self, address: str, ports: list[int]) -> dict[int, bool]:
        self.probed.append(address)
        return dict(self.values["ports"])

    def clock_difference_s(self, address: str, port: int) -> float | None:
        self.probed.append(f"{address}:{port}")
        difference: float | None = self.values["clock"]
        return difference


class Agent:
    def __init__(self, **other: Any) -> None:
        self.answer: dict[str, Any] = {
            "node": "mail-a",
            "protected": True,
            "reasons": [],
            "inventory_role": "primary",
            "nodes": [
                {"node": "mail-a", "role": "primary", "reachable": True, "lag_s": 0.0},
                {"node": "mail-b", "role": "shadow", "reachable": True, "lag_s": 0.0},
            ],
            "checks": [
                {"name": "fence", "passed": True, "value": 1, "threshold": 1, "message": ""},
                {"name": "shadow queue age", "passed": True, "value": 59.0, "message": ""},
            ],
            **other,
        }

    def health(self) -> dict[str, Any]:
        return {}

    def status(self) -> dict[str, Any]:
        return self.answer


class DeadAgent(Agent):
    def health(self) -> dict[str, Any]:
        raise AgentUnavailable("the agent does not run on mail-a; start umbra-agent.service")


def examine(agent: Agent, host: Host, **params: Any) -> dict[str, Any]:
    result: dict[str, Any] = module.examine(agent, host, {**PARAMS, **params})
    return result


def test_healthy() -> None:
    host = Host()
    result = examine(Agent(), host)
    assert result["failed_checks"] == []
    assert result["healthy"] is True
    assert [item["name"] for item in result["checks"]] == [
        "agent answers",
        "one primary",
        "protected",
        "peers reachable",
        "lag",
        "postfix on primary only",
        "inventory role",
        "service ports mail-b",
        "clock mail-b",
        "entrance smtp",
        "entrance sendmail",
        "entrance bounces",
        "shadow queue age",
        "disk space /var/vmail",
        "certificate /etc/umbra/tls/node.crt",
        "fence",
    ]
    assert host.probed == ["198.51.100.10", "10.86.0.2:8687"], "never itself, never a stranger"


@pytest.mark.parametrize(
    ("host", "failed"),
    [
        ({"postfix": False}, "postfix on primary only"),
        ({"free": 1.0}, "disk space /var/vmail"),
        ({"days": 1.0}, "certificate /etc/umbra/tls/node.crt"),
        ({"ports": {25: True, 993: False}}, "service ports mail-b"),
        ({"clock": 3.0}, "clock mail-b"),
        ({"clock": None}, "clock mail-b"),
        ({"settings": None}, "entrances"),
    ],
)
def test_each_host_check_fails_alone(host: dict[str, Any], failed: str) -> None:
    result = examine(Agent(), Host(**host))
    assert (result["healthy"], result["failed_checks"]) == (False, [failed])


def test_dead_agent_is_one_failed_check_and_the_host_is_still_examined() -> None:
    result = examine(DeadAgent(), Host(free=1.0))
    assert result["failed_checks"] == ["agent answers", "disk space /var/vmail"]
    assert result["status"] == {}


def test_unreachable_peer_is_reported_once_and_not_probed() -> None:
    nodes = [
        {"node": "mail-a", "role": "primary", "reachable": True},
        {"node": "mail-b", "role": "shadow", "reachable": False},
    ]
    host = Host()
    assert examine(Agent(nodes=nodes), host)["failed_checks"] == ["peers reachable"]
    assert host.probed == []


def test_the_age_that_the_agent_tells_is_held_against_our_threshold() -> None:
    result = examine(Agent(), Host(), shadow_age_threshold=58.0)
    assert result["failed_checks"] == ["shadow queue age"]
    assert [item["name"] for item in result["checks"]].count("shadow queue age") == 1


def test_failed_check_of_the_agent_counts() -> None:
    failing = [{"name": "x", "passed": False, "value": 0, "threshold": 1, "message": "x is off"}]
    assert examine(Agent(checks=failing), Host())["failed_checks"] == ["x"]


def test_address_left_empty_means_the_name() -> None:
    host = Host()
    examine(Agent(), host, service_addresses={"mail-b": ""}, api_addresses={})
    assert host.probed == ["mail-b"]
