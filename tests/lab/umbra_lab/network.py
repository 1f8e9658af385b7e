"""Network namespaces, links and routes. Nothing is ever made in the machine's own namespace.

host eth0 -- br0 of its site's router -- wan0 (tun) -- relay process -- wan0 of another router

The LAN is a bridge of its own, br1 in the outside router's namespace, with no address there.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .paths import NETNS_ROOT, Lab
from .plan import CONTROL, LAN, OUTSIDE, SITES, Member, Site
from .shell import run

READY = "network-ready"


def namespaces(lab: Lab) -> list[str]:
    """The names of the lab's network namespaces that exist."""
    if not NETNS_ROOT.is_dir():
        return []
    return sorted(p.name for p in NETNS_ROOT.iterdir() if p.name.startswith(lab.netns_prefix))


def is_complete(lab: Lab) -> bool:
    """Whether `create` ended well and no namespace was lost since, as by a restart."""
    present = {name for name in namespaces(lab) if os.path.ismount(NETNS_ROOT / name)}
    return (lab.dir / READY).exists() and present.issuperset(
        lab.netns(thing) for thing in (*SITES, CONTROL)
    )


def create(lab: Lab) -> None:
    """Make the routers, the WAN's devices and the controller's namespace from nothing.

    The marker comes last: a half-made network is made anew.
    """
    remove(lab)
    for site in SITES:
        run(["ip", "netns", "add", lab.netns(site)])
        _router(lab, site)
    bridge = "link add br1 type bridge forward_delay 0 mcast_snooping 0"
    _ip(lab.netns(OUTSIDE), [bridge, "link set br1 addrgenmode none up"])
    attach(lab, CONTROL)
    (lab.dir / READY).touch()


def attach(lab: Lab, member: Member) -> None:
    """Give a member a new namespace, linked to its site's router.

    New for every boot: firewall rules, tunnels and routes of the last one must not live on in it.
    """
    unlink(lab, member)
    discard(lab.netns(member))
    site, own = member.site, lab.netns(member)
    run(["ip", "netns", "add", own])
    _ip(own, [f"link add eth0 type veth peer name to-{member.name} netns {lab.netns(site)}"])
    _ip(lab.netns(site), [f"link set to-{member.name} master br0 up"])
    _ip(
        own,
        [
            "link set lo up",
            "link set eth0 up",
            f"addr add {member.v4}/{site.v4.prefixlen} dev eth0",
            f"addr add {member.v6}/{site.v6.prefixlen} dev eth0 nodad",
            f"route add default via {site.router_v4}",
            f"route add ::/0 via {site.router_v6}",
        ],
    )
    if member.lan is not None:
        switch = lab.netns(OUTSIDE)
        _ip(own, [f"link add eth1 type veth peer name lan-{member.name} netns {switch}"])
        _ip(switch, [f"link set lan-{member.name} addrgenmode none master br1 up"])
        _ip(
            own,
            [
                "link set eth1 up",
                f"addr add {LAN.v4[member.lan]}/{LAN.v4.prefixlen} dev eth1",
                f"addr add {LAN.v6[member.lan]}/{LAN.v6.prefixlen} dev eth1 nodad",
            ],
        )


def unlink(lab: Lab, member: Member) -> None:
    """Remove the links of a member: from now on not one packet passes."""
    for site, link in ((member.site, f"to-{member.name}"), (OUTSIDE, f"lan-{member.name}")):
        if (NETNS_ROOT / lab.netns(site)).exists():
            # Fails if there is none.
            run(["ip", "-n", lab.netns(site), "link", "delete", link], check=False)


def discard(name: str) -> None:
    """Remove a namespace, and with it every interface in it; nothing happens if there is none."""
    if os.path.ismount(NETNS_ROOT / name):
        run(["ip", "netns", "delete", name])
    else:  # `ip netns add` was killed between its two steps
        (NETNS_ROOT / name).unlink(missing_ok=True)


def remove(lab: Lab) -> None:
    """Remove all of the lab's namespaces."""
    (lab.dir / READY).unlink(missing_ok=True)
    for name in namespaces(lab):
        discard(name)


def processes(lab: Lab) -> list[int]:
    """Processes in any of the lab's network namespaces, whoever started them."""
    inodes = set()
    for name in namespaces(lab):
        with suppress(OSError):
            inodes.add((NETNS_ROOT / name).stat().st_ino)
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if (entry / "ns/net").stat().st_ino in inodes:
                    found.append(int(entry.name))
    return found


def _ip(namespace: str, lines: list[str]) -> None:
    run(["ip", "-n", namespace, "-batch", "-"], input="\n".join(lines) + "\n")


def _sysctl(namespace: str, settings: dict[str, str]) -> None:
    run(
        ["ip", "netns", "exec", namespace, "sysctl", "-q", "-w"]
        + [f"{key}={value}" for key, value in settings.items()]
    )


def _router(lab: Lab, site: Site) -> None:
    # Routes to the other sites only: anything else is answered "unreachable" at once.
    others = [other for other in SITES if other is not site]
    _ip(
        lab.netns(site),
        [
            "link set lo up",
            "link add br0 type bridge forward_delay 0 mcast_snooping 0",
            f"addr add {site.router_v4}/{site.v4.prefixlen} dev br0",
            f"addr add {site.router_v6}/{site.v6.prefixlen} dev br0 nodad",
            "link set br0 up",
            # Persistent, so that routes outlive a restart of the relay.
            "tuntap add dev wan0 mode tun vnet_hdr",
            "link set wan0 mtu 1500 txqueuelen 2000 addrgenmode none up",
        ]
        + [f"route add {other.v4} dev wan0" for other in others]
        + [f"route add {other.v6} dev wan0" for other in others],
    )
    _sysctl(lab.netns(site), {"net.ipv4.ip_forward": "1", "net.ipv6.conf.all.forwarding": "1"})
