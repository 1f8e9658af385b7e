"""The address plan: sites, hosts, and the files that name them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from .shell import LabError

DOMAIN = "example.org"


@dataclass(frozen=True)
class Site:
    """A subnet of each IP version behind one router, which has the first address of each."""

    name: str
    v4: IPv4Network
    v6: IPv6Network

    @property
    def router_v4(self) -> IPv4Address:
        """The router's IPv4 address."""
        return self.v4[1]

    @property
    def router_v6(self) -> IPv6Address:
        """The router's IPv6 address."""
        return self.v6[1]


@dataclass(frozen=True)
class Member:
    """Something with an address in a site: a host, or the controller's namespace.

    `release` is the Debian release that a host runs, `lan` its number in the LAN, if it is there.
    """

    name: str
    site: Site
    v4: IPv4Address
    v6: IPv6Address
    release: str = "trixie"
    lan: int | None = None

    @property
    def fqdn(self) -> str:
        """The full name, under a domain reserved for documentation (RFC 2606)."""
        return f"{self.name}.{DOMAIN}"


def _site(name: str, v4: str, v6: str) -> Site:
    return Site(name, IPv4Network(v4), IPv6Network(v6))


ALPHA = _site("alpha", "192.0.2.0/24", "2001:db8:a::/64")
BETA = _site("beta", "198.51.100.0/24", "2001:db8:b::/64")
GAMMA = _site("gamma", "203.0.113.0/26", "2001:db8:c::/64")
OUTSIDE = _site("outside", "203.0.113.128/25", "2001:db8:d::/64")
SITES = (ALPHA, BETA, GAMMA, OUTSIDE)
# One subnet of the mail hosts and the client, on a second interface of each and without a router:
# what moves within a subnet moves here.
LAN = _site("lan", "203.0.113.64/26", "2001:db8:e::/64")


def _member(name: str, site: Site, v4: str, v6: str, lan: int | None = None) -> Member:
    return Member(name, site, IPv4Address(v4), IPv6Address(v6), lan=lan)


HOSTS = (
    _member("mail-a", ALPHA, "192.0.2.10", "2001:db8:a::10", lan=6),
    _member("mail-b", BETA, "198.51.100.10", "2001:db8:b::10", lan=7),
    _member("witness", GAMMA, "203.0.113.10", "2001:db8:c::10"),
    _member("client", OUTSIDE, "203.0.113.140", "2001:db8:d::140", lan=8),
)
# Hosts that are made only when `up --hosts` names them: a third mail host, and what this
# collection's are compared with.
EXTRA_HOSTS = (
    _member("mail-c", GAMMA, "203.0.113.11", "2001:db8:c::11", lan=9),
    replace(_member("old-a", ALPHA, "192.0.2.12", "2001:db8:a::12"), release="bookworm"),
    replace(_member("old-b", BETA, "198.51.100.12", "2001:db8:b::12"), release="bookworm"),
)
ALL_HOSTS = HOSTS + EXTRA_HOSTS
CONTROL = _member("control", OUTSIDE, "203.0.113.130", "2001:db8:d::130")

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,19}")


def check_lab_name(name: str) -> str:
    """Return the name, or refuse one that cannot be part of file and namespace names."""
    if not _NAME.fullmatch(name):
        raise LabError(f"A lab's name has 1 to 20 small letters, digits and hyphens, not {name!r}.")
    return name


def host(name: str) -> Member:
    """The host of that name."""
    for member in ALL_HOSTS:
        if name == member.name:
            return member
    raise LabError(f"There is no host {name!r}: it must be one of {names(ALL_HOSTS)}.")


def site_of(name: str) -> Site:
    """The site of that name, or the site of the host of that name."""
    for site in SITES:
        if name == site.name:
            return site
    for member in ALL_HOSTS:
        if name == member.name:
            return member.site
    raise LabError(
        f"There is no site or host {name!r}: it must be one of {names(SITES)}, {names(ALL_HOSTS)}."
    )


def names(things: Iterable[Site | Member]) -> str:
    """The things' names with commas between them."""
    return ", ".join(thing.name for thing in things)


def hosts_file(own: str | None = None) -> str:
    """The text of /etc/hosts; `own` is one more name for the loopback address."""
    lines = [
        f"127.0.0.1 localhost{' ' + own if own else ''}",
        "::1 localhost ip6-localhost ip6-loopback",
    ]
    for member in ALL_HOSTS:
        lines += [f"{address} {member.fqdn} {member.name}" for address in (member.v4, member.v6)]
    return "\n".join(lines) + "\n"


def destination_site(address: bytes) -> Site | None:
    """The site that a packed IPv4 or IPv6 address belongs to."""
    if len(address) == 4:
        v4 = IPv4Address(address)
        return next((site for site in SITES if v4 in site.v4), None)
    v6 = IPv6Address(address)
    return next((site for site in SITES if v6 in site.v6), None)
