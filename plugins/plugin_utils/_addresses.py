# Copyright: umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Plans the addresses of the overlay: one subnet, one number for each host, no other state.

Pure functions on netaddr. They run on the controller only, so the hosts need no netaddr.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

try:
    import netaddr

    NETADDR_IMPORT_ERROR: ImportError | None = None
except ImportError as error:  # reported by the filters, with the fix
    NETADDR_IMPORT_ERROR = error

NETADDR_MISSING = (
    "umbra.mail needs the Python library netaddr on the controller; install it beside ansible-core."
)
DEFAULT_PORT = 51820
# The last label has a letter: what looks like an address and is none is no name either.
HOST_NAME = re.compile(r"(?:[A-Za-z0-9_-]+\.)*(?=[0-9-]*[A-Za-z_])[A-Za-z0-9_-]+\.?")


class AddressPlanError(ValueError):
    """The plan cannot be made; ``problems`` has one sentence for each reason."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(" ".join(problems))
        self.problems = problems


def parse_subnet(text: Any) -> netaddr.IPNetwork:
    """Read a subnet such as ``10.86.0.0/24``; raise AddressPlanError when it is none."""
    try:
        subnet = netaddr.IPNetwork(str(text))
    except (netaddr.AddrFormatError, ValueError):
        raise AddressPlanError(
            [f"{text!s} is not a subnet; write one like 10.86.0.0/24 or fd00:86::/64."]
        ) from None
    if "/" not in str(text):
        raise AddressPlanError([f"{text!s} has no prefix length; write for example {text!s}/24."])
    if subnet.ip != subnet.network:
        raise AddressPlanError([f"{text!s} is a host in a subnet; write the subnet {subnet.cidr}."])
    return subnet


def canonical(address: Any) -> str:
    """Return one spelling for each address or host name, so that equal ones compare equal."""
    try:
        return str(netaddr.IPAddress(str(address)))
    except (netaddr.AddrFormatError, ValueError):
        return str(address).rstrip(".").lower()


def is_address(value: Any) -> bool:
    """Tell an address from a host name."""
    try:
        netaddr.IPAddress(str(value))
    except (netaddr.AddrFormatError, ValueError):
        return False
    return True


def is_in(address: str, subnet: Any) -> bool:
    """Say whether an address lies in a subnet; a subnet that is none has no address."""
    try:
        return netaddr.IPAddress(address) in netaddr.IPNetwork(str(subnet))
    except (netaddr.AddrFormatError, ValueError):
        return False


def overlaps(left: netaddr.IPNetwork, right: netaddr.IPNetwork) -> bool:
    """Say whether two subnets share an address."""
    return left in right or right in left


def _number(host: str, value: Any) -> int:
    """Read vpn_number, which an INI inventory gives as a string."""
    if not isinstance(value, bool) and str(value).isdecimal() and int(value) > 0:
        return int(value)
    raise AddressPlanError(
        [f"{host}: vpn_number is {value!s}; give it a whole number from 1 upwards."]
    )


def plan_addresses(subnet_text: Any, numbers: Mapping[str, Any]) -> dict[str, str]:
    """Give each host the address that its number has in the subnet.

    ``numbers`` has the hosts in inventory order; None stands for the place in that order, from 1.
    Raise AddressPlanError with all problems at once.
    """
    subnet = parse_subnet(subnet_text)
    # IPv4 gives its last address to broadcast; the first is the network's in both families.
    last = subnet.size - (2 if subnet.version == 4 else 1)
    problems: list[str] = []
    if last < len(numbers):
        raise AddressPlanError(
            [
                f"The overlay {subnet} has room for {max(last, 0)} hosts, the inventory has"
                f" {len(numbers)}; give vpn_overlay_subnet a shorter prefix."
            ]
        )
    plan: dict[str, str] = {}
    owners: dict[int, str] = {}
    for place, (host, value) in enumerate(numbers.items(), start=1):
        try:
            number = place if value is None else _number(host, value)
        except AddressPlanError as error:
            problems += error.problems
            continue
        source = "its place in the inventory" if value is None else "its vpn_number"
        if number in owners:
            problems.append(
                f"{host}: {source} is {number}, as is that of {owners[number]};"
                " give each host of the overlay its own vpn_number."
            )
        elif number > last:
            broadcast = subnet.version == 4 and number == last + 1
            problems.append(
                f"{host}: {source} is {number}, which is"
                f" {'the broadcast address' if broadcast else 'outside'} of the overlay {subnet};"
                f" give it a vpn_number from 1 to {last}."
            )
        else:
            owners[number] = host
            plan[host] = str(netaddr.IPAddress(subnet.first + number, subnet.version))
    if problems:
        raise AddressPlanError(problems)
    return plan


def endpoint_of(host: str, variables: Mapping[str, Any]) -> tuple[str, int]:
    """Return where a host's tunnel is reached from outside: its address or name, and UDP port.

    Raise AddressPlanError when it is none of these.
    """
    address = str(variables.get("vpn_endpoint") or variables.get("ansible_host") or host)
    port = str(variables.get("vpn_port", DEFAULT_PORT))
    problems: list[str] = []
    if not (is_address(address) or HOST_NAME.fullmatch(address)):
        problems.append(
            f"{host}: its tunnel cannot be reached at {address}; set vpn_endpoint to an IP address"
            " or a host name, without brackets and without a port, which is vpn_port."
        )
    if not (port.isdecimal() and 1 <= int(port) <= 65535):
        problems.append(f"{host}: vpn_port is {port}; give it a number from 1 to 65535.")
    if problems:
        raise AddressPlanError(problems)
    return address, int(port)


def plan_overlay(
    hosts: Iterable[str], subnet_text: Any, hostvars: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, str]]:
    """Return what each host needs to be part of the overlay.

    ``address`` is its own, ``interface`` the same with the subnet's prefix length and
    ``endpoint`` where its peers reach it, as ``address:port``. Raise AddressPlanError.
    """
    names = list(hosts)
    numbers = {host: hostvars[host].get("vpn_number") for host in names}
    prefix = parse_subnet(subnet_text).prefixlen
    plan: dict[str, dict[str, str]] = {}
    for host, address in plan_addresses(subnet_text, numbers).items():
        outside, port = endpoint_of(host, hostvars[host])
        if ":" in outside:
            outside = f"[{outside}]"
        plan[host] = {
            "address": address,
            "interface": f"{address}/{prefix}",
            "endpoint": f"{outside}:{port}",
        }
    return plan


def overlay_moves(
    plan: Mapping[str, Mapping[str, str]], subnet_text: Any, host: str, conf: str, peers: str
) -> list[str]:
    """Return one sentence for each host that would get another address than it has.

    ``conf`` and ``peers`` are what an earlier run wrote on ``host``: its interface, and its peers
    by name. Both are empty on a host that has no tunnel yet. Hosts that left the plan do not count.
    """
    subnet = parse_subnet(subnet_text)
    known = [(host, address) for address in re.findall(r"(?m)^Address = ([^/\s]+)", conf)]
    known += re.findall(r"(?m)^# (\S+)\nPublicKey = .*\nAllowedIPs = ([^/\s]+)", peers)
    moves: list[str] = []
    for name, old in known:
        new = plan[name]["address"] if name in plan else old
        if canonical(old) == canonical(new):
            continue
        fix = (
            f"set vpn_number: {netaddr.IPAddress(old).value - subnet.first} for {name}"
            if is_in(old, subnet)
            else f"{old} is not in vpn_overlay_subnet {subnet}, so set back that one"
        )
        moves.append(f"{name} has {old} in the tunnel and would get {new}; {fix}.")
    return moves
