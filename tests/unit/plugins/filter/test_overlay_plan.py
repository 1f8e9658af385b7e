"""The overlay's address plan, through the filter that roles use."""

from __future__ import annotations

from typing import Any

import netaddr
import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.umbra.mail.plugins.filter.overlay_moves import (
    FilterModule as MovesModule,
)
from ansible_collections.umbra.mail.plugins.filter.overlay_plan import FilterModule
from hypothesis import given
from hypothesis import strategies as st

plan = FilterModule().filters()["overlay_plan"]
moves = MovesModule().filters()["overlay_moves"]


def hostvars(*numbers: Any) -> dict[str, dict[str, Any]]:
    """Hosts h1, h2, ... with the given vpn_number; None leaves it out."""
    return {
        f"h{place}": {} if number is None else {"vpn_number": number}
        for place, number in enumerate(numbers, start=1)
    }


def addresses(subnet: str, *numbers: Any) -> list[str]:
    variables = hostvars(*numbers)
    return [entry["address"] for entry in plan(list(variables), subnet, variables).values()]


def refusal(subnet: Any, *numbers: Any) -> str:
    variables = hostvars(*numbers)
    with pytest.raises(AnsibleFilterError) as caught:
        plan(list(variables), subnet, variables)
    return str(caught.value)


def test_a_host_without_a_number_has_its_place() -> None:
    assert addresses("10.86.0.0/24", None, None, None) == ["10.86.0.1", "10.86.0.2", "10.86.0.3"]


def test_numbers_count_from_the_start_of_the_subnet() -> None:
    assert addresses("10.86.0.64/26", 1, 62) == ["10.86.0.65", "10.86.0.126"]


def test_an_ini_inventory_gives_numbers_as_text() -> None:
    assert addresses("10.86.0.0/24", "7") == ["10.86.0.7"]


def test_a_large_number_crosses_octets() -> None:
    assert addresses("10.86.0.0/16", 256, 65534) == ["10.86.1.0", "10.86.255.254"]


def test_ipv6() -> None:
    assert addresses("fd00:86::/64", None, 0xFFFF) == ["fd00:86::1", "fd00:86::ffff"]


def test_ipv6_has_no_broadcast_address() -> None:
    assert addresses("fd00:86::/126", 3) == ["fd00:86::3"]
    assert addresses("fd00:86::/127", None) == ["fd00:86::1"]


def test_low_ipv6_subnet_is_not_taken_for_ipv4() -> None:
    assert addresses("::/96", 5) == ["::5"]


def test_interface_and_endpoint() -> None:
    variables = {
        "mail-a": {"ansible_host": "192.0.2.10"},
        "mail-b": {"ansible_host": "198.51.100.10", "vpn_endpoint": "vpn.example.net"},
        "mail-c": {"ansible_host": "2001:db8::10", "vpn_port": 51821},
        "mail-d.example.org": {},
    }
    entries = plan(list(variables), "10.86.0.0/24", variables)
    assert entries["mail-a"] == {
        "address": "10.86.0.1",
        "interface": "10.86.0.1/24",
        "endpoint": "192.0.2.10:51820",
    }
    assert entries["mail-b"]["endpoint"] == "vpn.example.net:51820"
    assert entries["mail-c"]["endpoint"] == "[2001:db8::10]:51821"
    assert entries["mail-d.example.org"]["endpoint"] == "mail-d.example.org:51820"


def test_an_endpoint_that_is_none() -> None:
    with pytest.raises(AnsibleFilterError, match="a: vpn_port is 0"):
        plan(["a"], "10.86.0.0/24", {"a": {"vpn_port": 0}})


@pytest.mark.parametrize(
    "subnet", ["10.86.0.0/30", "10.86.0.0/31", "10.86.0.0/32", "fd00:86::/127"]
)
def test_an_overlay_that_is_too_small(subnet: str) -> None:
    text = refusal(subnet, None, None, None)
    assert f"The overlay {subnet} has room for" in text
    assert "the inventory has 3; give vpn_overlay_subnet a shorter prefix" in text


def test_the_same_number_twice() -> None:
    text = refusal("10.86.0.0/24", 5, 5)
    assert "h2: its vpn_number is 5, as is that of h1; give each host" in text


def test_a_number_that_is_anothers_place() -> None:
    text = refusal("10.86.0.0/24", 2, None)
    assert "h2: its place in the inventory is 2, as is that of h1" in text


def test_the_networks_own_address() -> None:
    assert "h1: vpn_number is 0; give it a whole number from 1" in refusal("10.86.0.0/24", 0)


def test_the_broadcast_address() -> None:
    text = refusal("10.86.0.0/24", 255)
    assert "which is the broadcast address of the overlay 10.86.0.0/24" in text
    assert "give it a vpn_number from 1 to 254" in text


def test_a_number_outside() -> None:
    assert "h1: its vpn_number is 256, which is outside of" in refusal("10.86.0.0/24", 256)
    assert "from 1 to 3" in refusal("fd00:86::/126", 4)


@pytest.mark.parametrize("number", [True, -1, 1.5, "two", "", [1]])
def test_a_number_that_is_none(number: Any) -> None:
    assert "h1: vpn_number is" in refusal("10.86.0.0/24", number)


def test_all_problems_at_once() -> None:
    text = refusal("10.86.0.0/24", 0, 300, 7, 7)
    assert all(host in text for host in ("h1:", "h2:", "h4:"))


@pytest.mark.parametrize(
    ("subnet", "fix"),
    [
        ("10.86.0.5/24", "write the subnet 10.86.0.0/24"),
        ("10.86.0.0", "write for example 10.86.0.0/24"),
        ("10.86.0.0/33", "is not a subnet"),
        ("overlay", "is not a subnet"),
        (None, "is not a subnet"),
    ],
)
def test_a_subnet_that_is_none(subnet: Any, fix: str) -> None:
    assert fix in refusal(subnet, None)


@given(
    prefix=st.integers(8, 30),
    base=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_addresses_are_distinct_hosts_of_the_subnet(
    prefix: int, base: int, data: st.DataObject
) -> None:
    subnet = netaddr.IPNetwork(f"{netaddr.IPAddress(base)}/{prefix}").cidr
    numbers = data.draw(
        st.lists(st.integers(1, subnet.size - 2), unique=True, min_size=1, max_size=5)
    )
    if len(numbers) > subnet.size - 2:
        return
    planned = [netaddr.IPAddress(text) for text in addresses(str(subnet), *numbers)]
    assert [address.value - subnet.first for address in planned] == numbers
    assert all(address in subnet for address in planned)
    assert subnet.network not in planned
    assert subnet.broadcast not in planned


def moved(subnet: str, conf: str, peers: str, *numbers: Any) -> list[str]:
    variables = hostvars(*numbers)
    found: list[str] = moves(plan(list(variables), subnet, variables), subnet, "h1", conf, peers)
    return found


CONF = "[Interface]\nAddress = fd00:86::1/64\n"
PEERS = """
[Peer]
# h2
PublicKey = k=
AllowedIPs = fd00:86::2
Endpoint = 192.0.2.2:51820

[Peer]
# gone
PublicKey = k=
AllowedIPs = fd00:86::3
"""


def test_who_stays_and_who_left_does_not_move() -> None:
    assert moved("fd00:86::/64", CONF, PEERS, None, None) == []
    assert moved("fd00:86::/48", CONF, PEERS, None, None) == []
    assert moved("fd00:86::/64", "", "", 2, 1) == []


def test_who_moves_is_told_the_number_that_it_has() -> None:
    assert moved("fd00:86::/64", CONF, PEERS, 17, None) == [
        "h1 has fd00:86::1 in the tunnel and would get fd00:86::11; set vpn_number: 1 for h1."
    ]
    assert moved("fd00:86::/64", CONF, PEERS, None, 3) == [
        "h2 has fd00:86::2 in the tunnel and would get fd00:86::3; set vpn_number: 2 for h2."
    ]


def test_another_subnet_moves_everybody() -> None:
    first, second = moved("fd00:87::/64", CONF, PEERS, None, None)
    assert first.endswith(
        "fd00:86::1 is not in vpn_overlay_subnet fd00:87::/64, so set back that one."
    )
    assert second.startswith("h2 has fd00:86::2")
