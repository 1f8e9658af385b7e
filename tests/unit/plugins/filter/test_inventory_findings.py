"""What inventory_check refuses, case by case; and the shipped inventories being clean."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.vars.manager import VariableManager
from ansible_collections.umbra.mail.plugins.filter.inventory_findings import FilterModule

ROOT = Path(__file__).parents[4]
findings = FilterModule().filters()["inventory_findings"]

ROLES = str(ROOT / "roles")
COMMON = {"umbra_group": "mail", "vpn_overlay_subnet": "10.86.0.0/24"}
GROUPS = {
    "umbra_nodes": ["mail-a", "mail-b"],
    "umbra_witness": ["witness"],
    "umbra_outside": ["client"],
}
HOSTVARS: dict[str, dict[str, Any]] = {
    "mail-a": {
        **COMMON,
        "umbra_site": "alpha",
        "umbra_role": "primary",
        "ansible_host": "192.0.2.10",
    },
    "mail-b": {
        **COMMON,
        "umbra_site": "beta",
        "umbra_role": "shadow",
        "ansible_host": "198.51.100.10",
    },
    "witness": {**COMMON, "umbra_site": "gamma", "ansible_host": "203.0.113.10"},
    "client": {"ansible_host": "203.0.113.140"},
}


class World:
    """A sound inventory to spoil in one place."""

    def __init__(self) -> None:
        self.groups = copy.deepcopy(GROUPS)
        self.hostvars = copy.deepcopy(HOSTVARS)
        self.allowed: list[str] = []

    def set(self, name: str, value: Any, *hosts: str) -> None:
        for host in hosts or self.hostvars:
            self.hostvars[host][name] = value

    def rename(self, old: str, new: str) -> None:
        self.hostvars[new] = self.hostvars.pop(old)
        for hosts in self.groups.values():
            hosts[:] = [new if host == old else host for host in hosts]

    def findings(self) -> list[str]:
        result = findings(self.groups, self.hostvars, ROLES, self.allowed)
        assert isinstance(result, list)
        return result

    def only(self) -> str:
        (sentence,) = self.findings()
        assert sentence.endswith((".", "?"))
        return sentence


@pytest.fixture
def world() -> World:
    return World()


def test_a_sound_inventory(world: World) -> None:
    assert world.findings() == []


def test_a_coordinator_needs_three_voters(world: World) -> None:
    world.set("replication_agent_coordinator", "etcd")
    assert world.findings() == []
    world.groups["umbra_witness"] = []
    assert world.only() == (
        "replication_agent_coordinator is etcd, but mail-a and mail-b are no three voters;"
        " name a host in umbra_witness, or set static."
    )


def test_a_coordinator_is_the_same_on_all_hosts(world: World) -> None:
    world.set("replication_agent_coordinator", "etcd", "mail-a", "witness")
    assert world.only().startswith("replication_agent_coordinator is etcd and static;")


def test_a_profile_is_the_same_on_all_nodes_of_a_group(world: World) -> None:
    world.set("replication_agent_profile", "wan")
    assert world.findings() == []
    world.set("replication_agent_profile", "lan-fast", "mail-b", "witness")
    assert world.only() == (
        "replication_agent_profile differs: wan on mail-a and lan-fast on mail-b;"
        " set it once for redundancy group mail."
    )
    del world.hostvars["mail-a"]["replication_agent_profile"]
    assert "differs: default on mail-a and lan-fast on mail-b;" in world.only()


@pytest.mark.parametrize("value", [False, "false", "no"])
def test_a_node_that_is_not_replicated(world: World, value: Any) -> None:
    world.set("mail_server_replicated", True, "mail-a", "mail-b")
    assert world.findings() == []
    world.set("mail_server_replicated", value, "mail-b")
    assert world.only().startswith(f"mail-b: mail_server_replicated is {value}, so no message")


def test_a_node_has_its_inventory_name(world: World) -> None:
    world.set("replication_agent_node", "other", "mail-b")
    assert world.only().startswith("Variable replication_agent_node on mail-b is used by no role")


SERVICE = "replication_agent_service_addresses"


@pytest.fixture
def one_site(world: World) -> World:
    """A pair in one subnet, with a service address of each family."""
    world.set("umbra_site", "alpha", "mail-b")
    world.set("ansible_host", "192.0.2.11", "mail-b")
    world.set("umbra_sites", {"alpha": ["192.0.2.0/24", "2001:db8:a::/64"]})
    world.set("umbra_sites", {"gamma": ["203.0.113.0/25"]}, "witness")
    world.set(SERVICE, ["192.0.2.20", "2001:db8:a::20"], "mail-a", "mail-b")
    return world


def test_service_addresses_of_a_site(one_site: World) -> None:
    assert one_site.findings() == []


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("192.0.2.20/24", "write an IP address without a prefix length, for example 192.0.2.20."),
        ("mail.example.org", "write an IP address without a prefix length"),
        ("192.0.2.300", "write an IP address without a prefix length"),
    ],
)
def test_a_service_address_is_an_address(one_site: World, item: str, words: str) -> None:
    one_site.set(SERVICE, [item], "mail-a", "mail-b")
    found = one_site.findings()
    assert len(found) == 2
    assert words in found[0]


def test_service_addresses_are_a_list(one_site: World) -> None:
    one_site.set(SERVICE, "192.0.2.20", "mail-a", "mail-b")
    assert one_site.findings()[0].endswith("is 192.0.2.20; write a list of addresses.")


@pytest.mark.parametrize(
    ("addresses", "words"),
    [
        (["2001:db8:a::20", "2001:db8:a:0::20"], "has 2001:db8:a::20 twice; leave it there once."),
        (["192.0.2.11"], "192.0.2.11 is that of mail-b; choose one that no host has."),
        (["203.0.113.140"], "203.0.113.140 is that of client; choose one that no host has."),
        (["10.86.0.20"], "lies in the overlay 10.86.0.0/24, where no client is;"),
        (["203.0.113.20"], "lies at site gamma, which is not that of mail-a and mail-b;"),
    ],
)
def test_a_service_address_that_cannot_be(
    one_site: World, addresses: list[str], words: str
) -> None:
    one_site.set(SERVICE, addresses, "mail-a", "mail-b")
    assert words in one_site.findings()[0]


def test_a_service_address_has_somewhere_to_go(one_site: World) -> None:
    one_site.set(SERVICE, [], "mail-b")
    assert [text.split(";")[0] for text in one_site.findings()] == [
        f"Only mail-a has the service address {address}, so it cannot move"
        for address in ("192.0.2.20", "2001:db8:a::20")
    ]


def test_two_groups_do_not_share_a_service_address(one_site: World) -> None:
    one_site.groups["umbra_nodes"] += ["mail-c", "mail-d"]
    for name, model, number in (("mail-c", "mail-a", 12), ("mail-d", "mail-b", 13)):
        host = {"umbra_group": "other", "ansible_host": f"192.0.2.{number}"}
        one_site.hostvars[name] = {**one_site.hostvars[model], **host, SERVICE: ["192.0.2.20"]}
    assert one_site.only() == (
        "Redundancy groups mail and other have the same service address 192.0.2.20;"
        " give each its own."
    )


PROBES = "replication_agent_client_probes"


def test_who_is_asked_whether_clients_are_reached(one_site: World) -> None:
    # A client host, like a router, is on the right side.
    one_site.set(PROBES, ["192.0.2.1", "2001:db8:a::1", "203.0.113.140"], "mail-a", "mail-b")
    assert one_site.findings() == []


@pytest.mark.parametrize(
    ("probes", "words"),
    [
        ("192.0.2.1", "is 192.0.2.1; write a list of addresses."),
        (["router"], "has router; write an IP address, for example 192.0.2.1."),
        (["192.0.2.0/24"], "has 192.0.2.0/24; write an IP address"),
        (["192.0.2.11"], "has 192.0.2.11, which is that of mail-b; name a router or a server"),
        (["10.86.0.1"], "has 10.86.0.1, which is the group's own; name a router or a server"),
        (["2001:db8:a:0::20"], "has 2001:db8:a::20, which is the group's own;"),
    ],
)
def test_a_probe_says_something_of_the_clients_side(
    one_site: World, probes: object, words: str
) -> None:
    one_site.set(PROBES, ["192.0.2.1"], "mail-b")
    one_site.set(PROBES, probes, "mail-a")
    assert words in one_site.only()


def test_each_node_of_a_group_asks_on_its_clients_side(one_site: World) -> None:
    one_site.set(PROBES, ["192.0.2.1"], "mail-a")
    assert one_site.only() == (
        "replication_agent_client_probes is not set on mail-b, so the primary could move there"
        " although clients do not reach it; set it on each node of redundancy group mail."
    )


def test_a_pair_without_witness_and_client(world: World) -> None:
    world.groups = {"umbra_nodes": ["mail-a", "mail-b"], "umbra_witness": []}
    assert world.findings() == []


def test_no_primary(world: World) -> None:
    world.set("umbra_role", "shadow", "mail-a")
    assert world.only() == (
        "Redundancy group mail has no primary; set umbra_role: primary on one of mail-a and mail-b."
    )


def test_two_primaries(world: World) -> None:
    world.set("umbra_role", "primary", "mail-b")
    assert world.only() == (
        "Redundancy group mail has 2 primaries, mail-a and mail-b;"
        " set umbra_role: shadow on all but one of them."
    )


def test_each_redundancy_group_has_its_own_primary(world: World) -> None:
    world.groups = {"umbra_nodes": ["mail-a", "mail-b", "mail-c", "mail-d"]}
    world.hostvars["mail-c"] = {
        **HOSTVARS["mail-a"],
        "umbra_group": "other",
        "ansible_host": "192.0.2.11",
    }
    world.hostvars["mail-d"] = {
        **HOSTVARS["mail-b"],
        "umbra_group": "other",
        "ansible_host": "192.0.2.12",
    }
    assert world.findings() == []
    world.set("umbra_role", "shadow", "mail-c")
    assert "Redundancy group other has no primary" in world.only()


def test_unknown_role(world: World) -> None:
    world.set("umbra_role", "secondary", "mail-b")
    assert world.only() == "mail-b: umbra_role is secondary; set it to primary or shadow."


@pytest.mark.parametrize("name", ["umbra_role", "umbra_group", "umbra_site", "vpn_overlay_subnet"])
def test_missing_variable(world: World, name: str) -> None:
    del world.hostvars["mail-b"][name]
    assert f"mail-b has no {name}" in world.findings()[0]


def test_a_node_alone_in_its_group(world: World) -> None:
    world.set("umbra_group", "mial", "mail-b")
    first, second = world.findings()
    assert "mail-a is alone in redundancy group mail; give its partner" in first
    assert "mail-b is alone in redundancy group mial; give its partner" in second


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_nodes(world: World, count: int) -> None:
    world.groups = {"umbra_nodes": ["mail-a"][:count]}
    assert f"Group umbra_nodes has {count} host" in world.only()


def test_no_groups_at_all() -> None:
    assert "Group umbra_nodes has 0 hosts" in findings({}, {}, ROLES)[0]


def test_even_number_of_voters(world: World) -> None:
    world.groups["umbra_witness"].append("witness2")
    world.hostvars["witness2"] = {**HOSTVARS["witness"], "ansible_host": "203.0.113.11"}
    assert world.only() == (
        "mail-a, mail-b, witness and witness2 are 4 voters, which can tie;"
        " add or remove one host in umbra_witness, or leave that group empty."
    )


def test_an_even_number_of_mail_hosts_that_vote(world: World) -> None:
    for number, name in enumerate(("mail-c", "mail-d"), 20):
        world.groups["umbra_nodes"].append(name)
        world.hostvars[name] = {**HOSTVARS["mail-b"], "ansible_host": f"203.0.113.{number}"}
    world.groups["umbra_witness"] = []
    assert world.only() == (
        "Redundancy group mail has 4 nodes, and replication_agent_coordinator is static, which is"
        " for two; set it to etcd."
    )
    world.set("replication_agent_coordinator", "etcd")
    assert world.only() == (
        "mail-a, mail-b, mail-c and mail-d are 4 voters, which can tie; add or remove one host in"
        " umbra_witness."
    )


def test_witness_that_is_also_a_node(world: World) -> None:
    world.groups["umbra_witness"] = ["mail-b"]
    assert world.findings()[0] == (
        "mail-b is in umbra_nodes and umbra_witness; leave it in one of them."
    )


def test_misspelled_group(world: World) -> None:
    world.groups["umbra_witnes"] = ["witness"]
    assert "Group umbra_witnes is unknown" in world.only()
    assert world.only().endswith("did you mean umbra_witness?")


def test_same_short_name(world: World) -> None:
    world.rename("mail-a", "mail.example.org")
    world.rename("mail-b", "MAIL.example.net")
    assert world.only() == (
        "MAIL.example.net and mail.example.org have the same short name mail;"
        " rename one of the two hosts."
    )


def test_addresses_as_host_names_have_no_short_name(world: World) -> None:
    for old, new in (("mail-a", "192.0.2.10"), ("mail-b", "192.0.2.11"), ("witness", "192.0.2.12")):
        world.rename(old, new)
        del world.hostvars[new]["ansible_host"]
    assert world.findings() == []


def test_shadow_with_the_primarys_address(world: World) -> None:
    world.set("ansible_host", "192.0.2.10", "mail-b")
    assert world.only() == (
        "mail-b is a shadow with the address of its primary mail-a,"
        " ansible_host 192.0.2.10; give each its own."
    )


def test_same_address_spelled_differently(world: World) -> None:
    world.set("ansible_host", "2001:db8::1", "mail-a")
    world.set("ansible_host", "2001:0DB8:0::1", "mail-b")
    assert "mail-b is a shadow with the address of its primary mail-a" in world.only()


def test_witness_with_a_nodes_address(world: World) -> None:
    world.set("ansible_host", "192.0.2.10", "witness")
    assert "witness has the same address as mail-a, ansible_host 192.0.2.10" in world.only()


def test_client_with_a_nodes_address(world: World) -> None:
    world.set("ansible_host", "192.0.2.10", "client")
    assert "client has the same address as mail-a" in world.only()


def test_one_forwarder_with_two_ports_is_two_addresses(world: World) -> None:
    world.set("ansible_host", "127.0.0.1", "mail-a", "mail-b")
    world.set("ansible_port", 2222, "mail-b")
    world.set("vpn_endpoint", "192.0.2.10", "mail-a")
    world.set("vpn_endpoint", "198.51.100.10", "mail-b")
    assert world.findings() == []


def test_same_endpoint(world: World) -> None:
    world.set("vpn_endpoint", "vpn.example.org", "mail-a", "mail-b")
    assert "vpn_endpoint vpn.example.org port 51820; give each its own." in world.only()
    world.set("vpn_port", 51821, "mail-b")
    assert world.findings() == []


@pytest.mark.parametrize("value", ["vpn", "vpn_1.example.org.", "2001:db8::10", "9.example"])
def test_an_endpoint(world: World, value: str) -> None:
    world.set("vpn_endpoint", value, "mail-b")
    world.set("vpn_port", "51821", "mail-b")
    assert world.findings() == []


@pytest.mark.parametrize(
    "value",
    [
        *("192.0.2.9:51820", "vpn.example.org:51820", "[2001:db8::10]", "[2001:db8::10]:51820"),
        *("192.0.2.300", "192.0.2.0/24", "vpn example", "vpn..example.org", ".", "vpn.example\n"),
    ],
)
def test_an_endpoint_that_is_none(world: World, value: str) -> None:
    world.set("vpn_endpoint", value, "mail-b")
    assert world.only().startswith(f"mail-b: its tunnel cannot be reached at {value}; set vpn_end")


@pytest.mark.parametrize("value", [0, 65536, -1, "", "ssh", None, 1.5])
def test_a_port_of_the_tunnel_that_is_none(world: World, value: Any) -> None:
    world.set("vpn_port", value, "mail-b")
    assert world.only() == f"mail-b: vpn_port is {value}; give it a number from 1 to 65535."


def test_same_vpn_number(world: World) -> None:
    world.set("vpn_number", 4, "mail-a", "mail-b")
    assert "mail-b: its vpn_number is 4, as is that of mail-a" in world.only()


def test_overlay_too_small(world: World) -> None:
    world.set("vpn_overlay_subnet", "10.86.0.0/30")
    assert "has room for 2 hosts, the inventory has 3" in world.only()


def test_overlay_differs(world: World) -> None:
    world.set("vpn_overlay_subnet", "10.87.0.0/24", "witness")
    assert world.only() == (
        "vpn_overlay_subnet differs: 10.86.0.0/24 on mail-a and mail-b and 10.87.0.0/24 on witness;"
        " set it once for all hosts."
    )


@pytest.mark.parametrize("name", ["ansible_host", "vpn_endpoint"])
def test_overlay_over_an_outside_address(world: World, name: str) -> None:
    world.set(name, "10.86.0.77", "mail-b")
    assert world.only() == (
        f"mail-b: {name} 10.86.0.77 lies in the overlay 10.86.0.0/24;"
        " choose another vpn_overlay_subnet."
    )


SITES = {"alpha": ["192.0.2.0/24"], "beta": ["198.51.100.0/24"], "gamma": ["203.0.113.0/25"]}


def test_known_sites(world: World) -> None:
    world.set("umbra_sites", SITES)
    assert world.findings() == []


def test_unknown_site(world: World) -> None:
    world.set("umbra_sites", SITES)
    world.set("umbra_site", "betta", "mail-b")
    assert world.only() == (
        "mail-b: umbra_site betta is not in umbra_sites;"
        " the sites are alpha, beta and gamma; did you mean beta?"
    )


def test_overlay_over_a_sites_subnet(world: World) -> None:
    world.set("umbra_sites", {**SITES, "gamma": ["10.86.0.0/16"]})
    assert world.only() == (
        "The overlay 10.86.0.0/24 overlaps 10.86.0.0/16 of site gamma;"
        " choose another vpn_overlay_subnet."
    )


def test_sites_that_overlap(world: World) -> None:
    world.set("umbra_sites", {**SITES, "gamma": ["192.0.2.128/25"]})
    assert "Sites alpha and gamma overlap: 192.0.2.0/24 and 192.0.2.128/25" in world.only()


def test_a_site_whose_subnet_is_none(world: World) -> None:
    world.set("umbra_sites", {**SITES, "gamma": ["203.0.113.10"]})
    assert world.only().startswith("umbra_sites, gamma: 203.0.113.10 has no prefix length")


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ("192.0.2.0/24", "umbra_sites of mail-a is 192.0.2.0/24; write a map of sites to lists of"),
        (["192.0.2.0/24"], "umbra_sites of mail-a is ['192.0.2.0/24']; write a map of sites to"),
        ({**SITES, "beta": "198.51.100.0/24"}, "umbra_sites, beta: 198.51.100.0/24 is no list; "),
        ({**SITES, "beta": None}, "umbra_sites, beta: nothing is no list; write a list of subnets"),
        ({**SITES, "beta": {"a": 1}}, "umbra_sites, beta: {'a': 1} is no list; write a list of"),
    ],
)
def test_sites_of_another_shape(world: World, sites: Any, words: str) -> None:
    world.set("umbra_sites", sites)
    assert world.only().startswith(words)


@pytest.mark.parametrize("sites", [None, {}, {**SITES, "beta": []}])
def test_sites_without_subnets(world: World, sites: Any) -> None:
    world.set("umbra_sites", sites)
    assert world.findings() == []


def test_ipv4_and_ipv6_do_not_overlap(world: World) -> None:
    world.set("umbra_sites", {**SITES, "gamma": ["::/0"]})
    assert world.findings() == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("umbra_rol", "umbra_role"),
        ("vpn_keepalives", "vpn_keepalive"),
        ("inventory_check_allowed", None),
    ],
)
def test_unknown_variable(world: World, name: str, meant: str | None) -> None:
    world.set(name, 1, "mail-b")
    text = world.only()
    assert f"Variable {name} on mail-b is used by no role; rename it or list it" in text
    assert meant is None or text.endswith(f"did you mean {meant}?")


def test_unknown_variable_everywhere_is_one_sentence(world: World) -> None:
    world.set("vpn_mtu_limit", 1400)
    assert "Variable vpn_mtu_limit on every host" in world.only()


def test_variables_of_ones_own(world: World) -> None:
    world.set("vpn_office", "x", "mail-a")
    world.set("office_vpn", "x", "mail-a")
    world.allowed = ["vpn_office"]
    assert world.findings() == []


def test_all_findings_at_once(world: World) -> None:
    world.set("umbra_role", "primary", "mail-b")
    world.set("vpn_number", 0, "witness")
    world.set("umbra_sit", "x", "client")
    assert len(world.findings()) == 3


def shipped(name: str) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    """Read one of inventories/ as Ansible does; values stay untemplated but for Ansible's own."""
    loader = DataLoader()
    inventory = InventoryManager(loader=loader, sources=[str(ROOT / "inventories" / name)])
    variables = VariableManager(loader=loader, inventory=inventory)
    return inventory.get_groups_dict(), {
        host.name: variables.get_vars(host=host, include_hostvars=False)
        for host in inventory.get_hosts()
    }


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "inventories").iterdir()))
def test_shipped_inventory_is_clean(name: str) -> None:
    groups, hostvars = shipped(name)
    assert len(groups["umbra_nodes"]) >= 2
    assert findings(groups, hostvars, ROLES) == []


def test_shipped_inventories_are_the_four() -> None:
    assert {"lab", "pair", "pair_with_witness", "multi_site"} <= {
        path.name for path in (ROOT / "inventories").iterdir()
    }
