# Copyright: umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Judges an inventory: from groups and variables to a list of sentences, without any I/O."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ansible_collections.umbra.mail.plugins.plugin_utils._addresses import (
    AddressPlanError,
    canonical,
    endpoint_of,
    is_address,
    is_in,
    overlaps,
    parse_subnet,
    plan_addresses,
)

NODES, WITNESS, OUTSIDE = "umbra_nodes", "umbra_witness", "umbra_outside"
GROUPS = (NODES, WITNESS, OUTSIDE)
ROLES = ("primary", "shadow")
COORDINATOR = "replication_agent_coordinator"
PROFILE = "replication_agent_profile"
SERVICE = "replication_agent_service_addresses"
PROBES = "replication_agent_client_probes"
REPLICATED = "mail_server_replicated"

# Read by more than one role, so no single role's argument specs have them.
SHARED_VARIABLES = frozenset({"umbra_group", "umbra_site", "umbra_role", "umbra_sites"})

Variables = Mapping[str, Any]


@dataclass(frozen=True)
class Inventory:
    """The hosts that the collection looks at, and their variables."""

    groups: Mapping[str, list[str]]
    hostvars: Mapping[str, Variables]

    def members(self, group: str) -> list[str]:
        """Return the hosts of a group in inventory order; none for an absent group."""
        return list(self.groups.get(group) or [])

    @property
    def nodes(self) -> list[str]:
        """Return the mail hosts."""
        return self.members(NODES)

    @property
    def overlay(self) -> list[str]:
        """Return the hosts that have an address in the overlay, each once."""
        return list(dict.fromkeys(self.nodes + self.members(WITNESS)))

    @property
    def hosts(self) -> list[str]:
        """Return every host of the collection's groups, each once."""
        return list(dict.fromkeys(self.overlay + self.members(OUTSIDE)))

    @property
    def sites(self) -> dict[str, list[Any]]:
        """Return the optional map of site names to their local subnets.

        What has another shape is judged with the sites, and counts as no subnet.
        """
        sites: dict[str, list[Any]] = {}
        for host in self.overlay:
            found = self.value(host, "umbra_sites")
            if isinstance(found, Mapping):
                for site, texts in found.items():
                    sites[site] = texts if isinstance(texts, list) else []
        return sites

    def value(self, host: str, name: str) -> Any:
        """Return a host's variable, or None."""
        return self.hostvars[host].get(name)


def _listed(names: Iterable[str]) -> str:
    """Join names as a sentence does: a, b and c."""
    words = list(names)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _meant(word: Any, known: Iterable[str]) -> str:
    """Return a guess at a misspelled name, as the end of a clause."""
    close = difflib.get_close_matches(str(word), sorted(known), n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else "."


def _group_findings(inventory: Inventory) -> Iterator[str]:
    for group in sorted(inventory.groups):
        if group.startswith("umbra_") and group not in GROUPS:
            yield (
                f"Group {group} is unknown; rename it, the groups are {_listed(GROUPS)}"
                f"{_meant(group, GROUPS)}"
            )
    for host in inventory.hosts:
        homes = [group for group in GROUPS if host in inventory.members(group)]
        if len(homes) > 1:
            yield f"{host} is in {_listed(homes)}; leave it in one of them."
    nodes, witnesses = inventory.nodes, inventory.members(WITNESS)
    if len(nodes) < 2:
        yield (
            f"Group {NODES} has {len(nodes)} host{'' if len(nodes) == 1 else 's'};"
            " put at least two mail hosts into it."
        )
    voters = len(inventory.overlay)
    kinds = _coordinators(inventory, inventory.overlay)
    if (witnesses or "etcd" in kinds) and voters >= 3 and voters % 2 == 0:
        way_out = ", or leave that group empty" if witnesses else ""
        yield (
            f"{_listed(inventory.overlay)} are {voters} voters, which can tie;"
            f" add or remove one host in {WITNESS}{way_out}."
        )
    if len(kinds) > 1:
        yield f"{COORDINATOR} is {_listed(sorted(map(str, kinds)))}; make it the same on all hosts."
    elif "etcd" in kinds and voters < 3:
        yield (
            f"{COORDINATOR} is etcd, but {_listed(inventory.overlay)} are no three voters;"
            f" name a host in {WITNESS}, or set static."
        )


def _coordinators(inventory: Inventory, hosts: Iterable[str]) -> set[Any]:
    return {inventory.value(host, COORDINATOR) or "static" for host in hosts}


def _role_findings(inventory: Inventory) -> Iterator[str]:
    redundancy_groups: dict[str, list[str]] = {}
    for host in inventory.nodes:
        role = inventory.value(host, "umbra_role")
        if role is None:
            yield f"{host} has no umbra_role; set it to primary or shadow."
        elif role not in ROLES:
            yield f"{host}: umbra_role is {role!s}; set it to primary or shadow."
        replicated = inventory.value(host, REPLICATED)
        if replicated is not None and str(replicated).lower() in ("false", "no", "off", "0"):
            yield (
                f"{host}: {REPLICATED} is {replicated!s}, so no message and no mailbox change"
                f" would be copied; leave it out, or take the host out of {NODES}."
            )
        group = inventory.value(host, "umbra_group")
        if group is None:
            yield f"{host} has no umbra_group; set it to the name of its redundancy group."
        else:
            redundancy_groups.setdefault(str(group), []).append(host)
    for group, hosts in redundancy_groups.items():
        primaries = [host for host in hosts if inventory.value(host, "umbra_role") == "primary"]
        if len(hosts) == 1 and len(inventory.nodes) > 1:
            yield (
                f"{hosts[0]} is alone in redundancy group {group};"
                " give its partner the same umbra_group."
            )
        elif not primaries:
            yield (
                f"Redundancy group {group} has no primary;"
                f" set umbra_role: primary on one of {_listed(hosts)}."
            )
        elif len(primaries) > 1:
            yield (
                f"Redundancy group {group} has {len(primaries)} primaries, {_listed(primaries)};"
                " set umbra_role: shadow on all but one of them."
            )
        profiles: dict[str, list[str]] = {}
        for host in hosts:
            profiles.setdefault(str(inventory.value(host, PROFILE) or "default"), []).append(host)
        if len(profiles) > 1:
            values = _listed(f"{name} on {_listed(users)}" for name, users in profiles.items())
            yield f"{PROFILE} differs: {values}; set it once for redundancy group {group}."
        if len(hosts) > 2 and _coordinators(inventory, hosts) == {"static"}:
            # A primary that comes back would take the third node, which may know as little as
            # itself, for the rest of the group.
            yield (
                f"Redundancy group {group} has {len(hosts)} nodes, and {COORDINATOR} is static,"
                " which is for two; set it to etcd."
            )


def _name_findings(inventory: Inventory) -> Iterator[str]:
    # dsync orders its locks by host name: two nodes of one name would wait for each other.
    owners: dict[str, str] = {}
    for host in inventory.overlay:
        short = host if is_address(host) else host.split(".")[0].lower()
        if short in owners:
            yield (
                f"{host} and {owners[short]} have the same short name {short};"
                " rename one of the two hosts."
            )
        owners.setdefault(short, host)


def _duplicate(inventory: Inventory, host: str, other: str, what: str) -> str:
    """Say that two hosts have one address; plainer still when it is the primary's."""
    roles = {name: inventory.value(name, "umbra_role") for name in (host, other)}
    if set(roles.values()) == set(ROLES):
        shadow, primary = (host, other) if roles[host] == "shadow" else (other, host)
        return (
            f"{shadow} is a shadow with the address of its primary {primary}, {what};"
            " give each its own."
        )
    return f"{host} has the same address as {other}, {what}; give each its own."


def _host_address_findings(inventory: Inventory) -> Iterator[str]:
    reached: dict[tuple[str, str], str] = {}
    endpoints: dict[tuple[str, int], str] = {}
    for host in inventory.hosts:
        address = inventory.value(host, "ansible_host") or host
        key = (canonical(address), str(inventory.value(host, "ansible_port") or 22))
        if key in reached:
            yield _duplicate(inventory, host, reached[key], f"ansible_host {address}")
            continue
        reached[key] = host
        if host in inventory.overlay:
            try:
                outside, port = endpoint_of(host, inventory.hostvars[host])
            except AddressPlanError as error:
                yield from error.problems
                continue
            where = (canonical(outside), port)
            if where in endpoints:
                what = f"vpn_endpoint {outside} port {port}"
                yield _duplicate(inventory, host, endpoints[where], what)
            endpoints.setdefault(where, host)


def _site_findings(inventory: Inventory) -> Iterator[str]:
    """Judge umbra_site and, where it is given, the map umbra_sites of sites to local subnets."""
    yield from _site_shape_findings(inventory)
    sites = inventory.sites
    for host in inventory.overlay:
        site = inventory.value(host, "umbra_site")
        if site is None:
            yield f"{host} has no umbra_site; set it to the name of the site where it stands."
        elif sites and site not in sites:
            yield (
                f"{host}: umbra_site {site} is not in umbra_sites; the sites are"
                f" {_listed(sites)}{_meant(site, sites)}"
            )
    seen: list[tuple[str, Any]] = []
    for site, texts in sites.items():
        for text in texts:
            try:
                subnet = parse_subnet(text)
            except AddressPlanError as error:
                yield from (f"umbra_sites, {site}: {problem}" for problem in error.problems)
                continue
            for other, taken in seen:
                if other != site and overlaps(subnet, taken):
                    yield (
                        f"Sites {other} and {site} overlap: {taken} and {subnet};"
                        " correct umbra_sites."
                    )
            seen.append((site, subnet))


def _site_shape_findings(inventory: Inventory) -> Iterator[str]:
    said: list[Any] = []
    for host in inventory.overlay:
        found = inventory.value(host, "umbra_sites")
        # Most often all hosts have the same.
        if found in said:
            continue
        said.append(found)
        if not isinstance(found, Mapping):
            if found is not None:
                yield (
                    f"umbra_sites of {host} is {found!s}; write a map of sites to lists of subnets,"
                    " for example {alpha: [192.0.2.0/24]}."
                )
            continue
        for site, texts in found.items():
            if not isinstance(texts, list):
                what = "nothing" if texts is None else texts
                yield (
                    f"umbra_sites, {site}: {what!s} is no list; write a list of subnets, for"
                    " example [192.0.2.0/24]."
                )


def _overlay_findings(inventory: Inventory) -> Iterator[str]:
    owners: dict[str, list[str]] = {}
    for host in inventory.overlay:
        text = inventory.value(host, "vpn_overlay_subnet")
        if text is None:
            yield (
                f"{host} has no vpn_overlay_subnet; set it once for all hosts,"
                " for example to 10.86.0.0/24."
            )
        else:
            owners.setdefault(str(text), []).append(host)
    if len(owners) > 1:
        values = _listed(f"{text} on {_listed(hosts)}" for text, hosts in owners.items())
        yield f"vpn_overlay_subnet differs: {values}; set it once for all hosts."
    if len(owners) != 1:
        return
    text = min(owners)
    numbers = {host: inventory.value(host, "vpn_number") for host in inventory.overlay}
    try:
        subnet = parse_subnet(text)
        plan_addresses(text, numbers)
    except AddressPlanError as error:
        yield from error.problems
    else:
        yield from _overlay_overlaps(inventory, subnet)


def _overlay_overlaps(inventory: Inventory, subnet: Any) -> Iterator[str]:
    # A host whose outside address lies in the overlay would be sent its own tunnel's packets.
    for host in inventory.overlay:
        for name in ("ansible_host", "vpn_endpoint"):
            address = str(inventory.value(host, name) or "")
            if address and is_address(address) and canonical(address) in subnet:
                yield (
                    f"{host}: {name} {address} lies in the overlay {subnet};"
                    " choose another vpn_overlay_subnet."
                )
    for site, texts in inventory.sites.items():
        for text in texts:
            try:
                local = parse_subnet(text)
            except AddressPlanError:
                continue  # reported where sites are judged
            if overlaps(subnet, local):
                yield (
                    f"The overlay {subnet} overlaps {local} of site {site};"
                    " choose another vpn_overlay_subnet."
                )


def _owners(inventory: Inventory, hosts: Iterable[str]) -> dict[str, str]:
    """Return whose each outside address is."""
    return {
        canonical(inventory.value(host, name)): host
        for host in hosts
        for name in ("ansible_host", "vpn_endpoint")
        if inventory.value(host, name)
    }


def _service_findings(inventory: Inventory) -> Iterator[str]:
    """Judge the addresses that move with the primary."""
    own = _owners(inventory, inventory.hosts)
    users: dict[str, list[str]] = {}
    for host in inventory.nodes:
        value = inventory.value(host, SERVICE) or []
        if not isinstance(value, (list, tuple)):
            yield f"{host}: {SERVICE} is {value!s}; write a list of addresses."
            continue
        seen: set[str] = set()
        for item in value:
            text = canonical(item)
            if "/" in str(item) or not is_address(item):
                yield (
                    f"{host}: {SERVICE} has {item!s}; write an IP address without a prefix length,"
                    " for example 192.0.2.20."
                )
            elif text in seen:
                yield f"{host}: {SERVICE} has {text} twice; leave it there once."
            else:
                users.setdefault(text, []).append(host)
            seen.add(text)
    for text, hosts in users.items():
        if text in own:
            yield f"Service address {text} is that of {own[text]}; choose one that no host has."
        yield from _service_place_findings(inventory, text, hosts)
        groups = {str(inventory.value(host, "umbra_group")) for host in hosts}
        if len(groups) > 1:
            yield (
                f"Redundancy groups {_listed(sorted(groups))} have the same service address {text};"
                " give each its own."
            )
        elif len(hosts) == 1:
            yield (
                f"Only {hosts[0]} has the service address {text}, so it cannot move; set {SERVICE}"
                " for all nodes of its subnet."
            )


def _service_place_findings(inventory: Inventory, text: str, hosts: list[str]) -> Iterator[str]:
    overlays = {str(inventory.value(host, "vpn_overlay_subnet")) for host in hosts}
    for overlay in sorted(overlays):
        if is_in(text, overlay):
            yield (
                f"Service address {text} lies in the overlay {overlay}, where no client is;"
                " choose one of the subnet that clients reach."
            )
    for site, subnets in inventory.sites.items():
        strangers = [host for host in hosts if inventory.value(host, "umbra_site") != site]
        if strangers and any(is_in(text, subnet) for subnet in subnets):
            yield (
                f"Service address {text} lies at site {site}, which is not that of"
                f" {_listed(strangers)}; it moves within one subnet only."
            )


def _probe_findings(inventory: Inventory) -> Iterator[str]:
    """Judge whom a node asks to know whether its clients reach it: no node of the group itself."""
    ours = _owners(inventory, inventory.nodes)
    asking: dict[str, list[str]] = {}
    silent: dict[str, list[str]] = {}
    for host in inventory.nodes:
        group = str(inventory.value(host, "umbra_group"))
        (asking if inventory.value(host, PROBES) else silent).setdefault(group, []).append(host)
    for group in sorted(asking.keys() & silent.keys()):
        yield (
            f"{PROBES} is not set on {_listed(silent[group])}, so the primary could move there"
            f" although clients do not reach it; set it on each node of redundancy group {group}."
        )
    for host in inventory.nodes:
        value = inventory.value(host, PROBES) or []
        if not isinstance(value, (list, tuple)):
            yield f"{host}: {PROBES} is {value!s}; write a list of addresses."
            continue
        overlay = str(inventory.value(host, "vpn_overlay_subnet"))
        service = inventory.value(host, SERVICE)
        moving = {canonical(item) for item in service} if isinstance(service, list) else set()
        for item in value:
            text = canonical(item)
            if not is_address(item):
                yield (
                    f"{host}: {PROBES} has {item!s}; write an IP address, for example 192.0.2.1."
                )
            elif text in ours or text in moving or is_in(text, overlay):
                what = f"is that of {ours[text]}" if text in ours else "is the group's own"
                yield (
                    f"{host}: {PROBES} has {text}, which {what}; name a router or a server on the"
                    " clients' side."
                )


def option_names(spec: Mapping[str, Any]) -> set[str]:
    """Return the variables that a role's meta/argument_specs.yml defines."""
    entries = spec.get("argument_specs") or {}
    return {name for entry in entries.values() for name in entry.get("options") or {}}


def _variable_findings(
    inventory: Inventory, specs: Mapping[str, Mapping[str, Any]], allowed: Iterable[str]
) -> Iterator[str]:
    known = set(SHARED_VARIABLES).union(*map(option_names, specs.values()))
    prefixes = ("umbra_", *(f"{role}_" for role in specs))
    users: dict[str, list[str]] = {}
    for host in inventory.hosts:
        for name in inventory.hostvars[host]:
            if name.startswith(prefixes) and name not in known and name not in allowed:
                users.setdefault(name, []).append(host)
    for name, hosts in sorted(users.items()):
        where = "on every host" if hosts == inventory.hosts else f"on {_listed(hosts)}"
        yield (
            f"Variable {name} {where} is used by no role; rename it or list it in"
            f" inventory_check_allowed_variables{_meant(name, known)}"
        )


def inventory_findings(
    groups: Mapping[str, list[str]],
    hostvars: Mapping[str, Variables],
    specs: Mapping[str, Mapping[str, Any]],
    allowed: Iterable[str] = (),
) -> list[str]:
    """Return one sentence for each thing that is wrong; an empty list means a sound inventory.

    ``specs`` has each role's parsed meta/argument_specs.yml: a variable with the prefix of a role
    or ``umbra_`` that none of them defines, and that is not in ``allowed``, is a finding.
    """
    inventory = Inventory(groups, hostvars)
    return [
        *_group_findings(inventory),
        *_role_findings(inventory),
        *_name_findings(inventory),
        *_site_findings(inventory),
        *_host_address_findings(inventory),
        *_overlay_findings(inventory),
        *_service_findings(inventory),
        *_probe_findings(inventory),
        *_variable_findings(inventory, specs, set(allowed)),
    ]
