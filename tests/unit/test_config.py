"""The agent's configuration: what is right is read, and all that is wrong is said at once."""

from __future__ import annotations

import copy
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from umbra import config, daemon
from umbra.cluster.protocol import Policy
from umbra.config import ConfigError, CoordinatorKind, MirrorMode, Profile, ShadowPolicy, StonithUse
from umbra.node.netlink import Entry

GOOD: dict[str, Any] = {
    "group": "mail",
    "node": "mail-a",
    "site": "alpha",
    "role": "primary",
    "link": {"address": "10.86.0.1", "port": 8686},
    "api": {"address": "10.86.0.1", "port": 8687},
    "peers": [{"name": "mail-b", "site": "beta", "address": "10.86.0.2"}],
    "transport": {"shadow_policy": "accept", "shadow_timeout": 3},
}


def test_a_right_configuration_is_read() -> None:
    read = config.parse(GOOD)
    assert read.transport.shadow_policy is ShadowPolicy.ACCEPT
    assert read.transport.shadow_timeout == 3
    assert read.peers[0].port == 8686
    assert read.mailbox.workers > 0
    assert read.mailbox.mirror_mode is MirrorMode.SYNC
    lazy = config.parse({**GOOD, "mailbox": {"mirror_mode": "async"}})
    assert lazy.mailbox.mirror_mode is MirrorMode.ASYNC


def test_the_coordinator_is_static_unless_it_is_said() -> None:
    assert config.parse(GOOD).coordinator.kind is CoordinatorKind.STATIC
    voters = [f"https://10.86.0.{number}:2379" for number in (1, 2, 3)]
    said = {"kind": "etcd", "profile": "wan", "policy": "blocked", "endpoints": voters}
    read = config.parse({**GOOD, "coordinator": said}).coordinator
    assert (read.kind, read.profile) == (CoordinatorKind.ETCD, Profile.WAN)
    assert (read.policy, read.preference) == (Policy.BLOCKED, 0)
    assert read.endpoints == tuple(voters)


def test_a_hook_that_switches_nodes_off_is_run_when_it_is_said() -> None:
    assert config.parse(GOOD).stonith.use is StonithUse.NEVER
    assert config.parse({**GOOD, "stonith": {"use": "always"}}).stonith.use is StonithUse.ALWAYS
    with pytest.raises(ConfigError, match="never or forced or always"):
        config.parse({**GOOD, "stonith": {"use": "sometimes"}})


def test_when_a_node_is_ailing_is_said_in_the_inventory() -> None:
    rules = config.parse(GOOD).handover
    assert (rules.policy, rules.crashes, rules.window, rules.free, rules.client_probes) == (
        "automatic", 2, 600.0, 32, (),
    )  # fmt: skip
    said = {"policy": "alarm", "crashes": 0, "free": 0, "client_probes": ["192.0.2.1"]}
    rules = config.parse({**GOOD, "handover": said}).handover
    assert (rules.policy, rules.crashes, rules.window) == ("alarm", 0, 600.0)
    assert rules.client_probes == ("192.0.2.1",)


def test_service_addresses_are_none_unless_they_are_said() -> None:
    assert config.parse(GOOD).service.addresses == ()
    said = ["192.0.2.20", "2001:db8:a::20"]
    assert config.parse({**GOOD, "service": {"addresses": said}}).service.addresses == tuple(said)


@pytest.mark.parametrize(
    ("addresses", "words"),
    [
        ("192.0.2.20", "service.addresses must be a list"),
        ([20], "must be a text"),
        (["192.0.2.20/24"], "write an IP address without a prefix length"),
        (["2001:db8:a::20", "2001:db8:a:0::20"], "has 2001:db8:a::20 twice."),
        (["10.86.0.2"], "has 10.86.0.2, which is a node's own."),
        (["127.0.0.1"], "which no client can reach."),
        (["fe80::1"], "which no client can reach."),
        (["224.0.0.1"], "which no client can reach."),
    ],
)
def test_service_addresses_that_cannot_be(addresses: object, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config.parse({**GOOD, "service": {"addresses": addresses}})
    assert words in raised.value.findings[0]


def test_a_host_outside_the_subnet_is_told_before_it_gets_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "agent.yml"
    entries = [Entry(2, ip_address("198.51.100.10"), 24)]
    kernel = SimpleNamespace(entries=lambda: entries, close=lambda: None)
    monkeypatch.setattr(daemon, "Netlink", lambda: kernel)

    def check(document: dict[str, Any]) -> int:
        file.write_text(yaml.safe_dump(document))
        monkeypatch.setattr("sys.argv", ["umbra-agent", "--check-config", str(file)])
        return daemon.main()

    assert check(GOOD) == 0
    assert check({**GOOD, "service": {"addresses": ["192.0.2.20"]}}) == 1
    assert capsys.readouterr().err == (
        "No interface of this host has an address of its own in the subnet of the service address"
        " 192.0.2.20.\n"
    )
    assert check({**GOOD, "service": {"addresses": ["198.51.100.20"]}}) == 0


def test_the_safety_net_can_be_switched_off() -> None:
    read = config.parse({**GOOD, "transport": {"safety_net_hold": 0}})
    assert read.transport.safety_net_hold == 0


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("role",), "master", "role is 'master'; it must be primary or shadow."),
        (("peers",), None, "peers must be a list, not nothing."),
        (
            ("peers", 0, "address"),
            "mail-b",
            "peers[0].address is 'mail-b'; it must be an IP address.",
        ),
        (("peers", 0, "name"), "mail-a", "the node name mail-a is used twice."),
        (("peers", 0, "address"), "10.86.0.1", "the address 10.86.0.1 is used twice."),
        (("link",), {"address": "10.86.0.1"}, "link.port is missing."),
        (("link", "port"), 70000, "link.port is 70000; a port is from 1 to 65535."),
        (("transport", "shadow_policy"), "drop", "it must be defer or accept."),
        (("transport", "shadow_timeout"), 0, "transport.shadow_timeout must be over 0 seconds."),
        (
            ("transport", "shadow_timeout"),
            61,
            "shadow_timeout is 61 s; over 60 s Postfix would give",
        ),
        (("transport", "shadow_timeout"), True, "must be a number from 0, not True."),
        (("mailbox",), {"mirror_mode": "lazy"}, "it must be sync or async."),
        (("mailbox",), {"mirror_copies": 0}, "a change needs at least one copy."),
        (("mailbox",), {"mirror_copies": 2}, "only 1 of the group's nodes can be shadows"),
        (("transport", "timeout"), 1, "transport has the unknown setting timeout; known are"),
        (("transport", "shadow_copies"), 0, "a message needs at least one copy."),
        (("transport", "shadow_copies"), 2, "only 1 of the peers can count under prefer_remote"),
        (
            ("transport", "shadow_preference"),
            "local_only",
            "only 0 of the peers can count under local_only at site alpha",
        ),
        (("transport", "shadow_preference"), "near", "it must be prefer_remote or remote_only or"),
        (("handover",), {"policy": "never"}, "it must be automatic or alarm."),
        (("handover",), {"window": 0}, "handover.window must be over 0 seconds."),
        (("handover",), {"client_probes": ["router"]}, "'router'; it must be an IP address."),
        (("handover",), {"client_probes": ["10.86.0.2"]}, "says nothing of the clients' side"),
        (("handover",), {"client_probes": ["127.0.0.1"]}, "says nothing of the clients' side"),
        (("handover",), {"client_probes": ["192.0.2.1"] * 9}, "has over 8 addresses"),
        (("transport", "safety_net_hold"), -1, "must be a number from 0, not -1."),
        (("transport", "safety_net_max_size"), 1.5, "must be a whole number from 0, not 1.5."),
        (("heartbeat",), {"interval": 2, "timeout": 1}, "it must be over heartbeat.interval, 2 s."),
        (("fence",), {"hold": 1}, "a busy agent would close its own ports."),
        (("fence",), {"hold": 7200}, "fence.hold is 7200 s; it must be 3600 at most."),
        (("api", "port"), 8686, "the peer link and the API have the same port, 8686."),
        (("fence",), {"ports": [25, 0]}, "fence.ports is 0; a port is from 1 to 65535."),
        (
            ("peers",),
            [{"name": f"mail-{n}", "site": n, "address": f"10.86.0.1{n}"} for n in "23"],
            "coordinator.kind is static, which is for two mail hosts, and the group has 3; set etc",
        ),
        (("coordinator",), {"kind": "raft"}, "it must be static or etcd."),
        (("coordinator",), {"kind": "etcd"}, "names 0 voters; coordinator.kind etcd needs an odd"),
        (
            ("coordinator",),
            {"kind": "etcd", "endpoints": ["https://10.86.0.1:2379"] * 2},
            "name a host in umbra_witness, or set static.",
        ),
        (
            ("coordinator",),
            {"kind": "etcd", "endpoints": ["https://a", "http://b", "https://c"]},
            "coordinator.endpoints has 'http://b'; it must be https://ADDRESS:PORT.",
        ),
        (("coordinator",), {"kind": "etcd", "limit": 0}, "coordinator.limit is 0; coordinator.p"),
        (("coordinator",), {"profile": "fast"}, "it must be lan-fast or default or wan."),
        (("coordinator",), {"policy": "never"}, "automatic or same_site_only or blocked."),
    ],
)
def test_what_is_wrong_is_named(path: tuple[str | int, ...], value: object, words: str) -> None:
    raw = copy.deepcopy(GOOD)
    place: Any = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        config.parse(raw)
    assert any(words in finding for finding in caught.value.findings), caught.value.findings


def test_all_findings_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse({"role": "x", "colour": "red", "peers": [7]})
    assert len(caught.value.findings) >= 6


@pytest.mark.parametrize("text", ["", "- a list", "group: [", "\x00"])
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "agent.yml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        config.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        config.load(tmp_path / "agent.yml")
