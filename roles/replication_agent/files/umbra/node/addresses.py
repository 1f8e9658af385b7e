"""The service addresses on this host: had, announced and given up. Part of ``umbra-helper``.

The kernel is the dead man's switch: an address has the lifetime of the lease of the ports, and each
renewal of the lease renews it. What happens when something dies:

* The agent: nobody renews, and the kernel removes the addresses when the lease ends.
* The helper: the same, if the next one is not there before; it renews, and announces anew.
* Both, or all processes frozen: the same. Thawed: the agent's right is over, so it closes, which
  removes what is left; an announcement that was due is not made, because its lease has ended.
* A process stopped between this check and its packet: the owner hears the announcement, and repeats
  its own.
* The whole machine, and it goes on later: its kernel counts on from where it stood. Who asks for
  the address just then may hear both, and comes to closed ports for the rest of a lifetime at most.
* A boot: no file has the addresses, so there are none.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from umbra.node import packets
from umbra.node.netlink import Address, Entry, Netlink

log = logging.getLogger("umbra.helper")

AGAIN = (0.2, 1.0, 3.0)
"""When an announcement is made again, in seconds: any of them may be lost."""
LATE = 0.25
"""By how much an address may outlive the lease, in seconds; the kernel is as late once more."""
CONFLICT_PAUSE = 1.0
CONFLICT_SHOWN = 60.0
ALL_NODES = "ff02::1"
_ICMP6_FILTER = 1
_GET_FLAGS, _GET_MAC = 0x8913, 0x8927
_RUNNING = 0x40


@dataclass
class Plan:
    """What has to be done so that this host has the addresses."""

    hold: list[Entry] = field(default_factory=list)
    new: list[Entry] = field(default_factory=list)
    stray: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def plan(entries: Sequence[Entry], addresses: Iterable[Address], loopback: int = 1) -> Plan:
    """Say on which interface each address belongs: the one that is in its subnet.

    :param loopback: index of the interface that is in no subnet.
    """
    found = Plan()
    ours = frozenset(addresses)
    for address in sorted(ours, key=lambda item: (item.version, item)):
        indexes = {
            entry.index
            for entry in entries
            if not entry.whole
            and entry.address not in ours
            and entry.index != loopback
            and entry.address.version == address.version
            and address in entry.subnet
        }
        if len(indexes) != 1:
            which = "more than one interface" if indexes else "no interface"
            found.problems.append(
                f"{which} of this host has an address of its own in the subnet of the service"
                f" address {address}"
            )
            continue
        entry = Entry(indexes.pop(), address, address.max_prefixlen)
        found.hold.append(entry)
        if entry not in entries:
            found.new.append(entry)
    found.stray = [e for e in ours_of(entries, ours) if e not in found.hold]
    return found


def ours_of(entries: Sequence[Entry], ours: Collection[Address]) -> list[Entry]:
    """Return the service addresses among a host's, whoever has put them there.

    Not the only address that an interface has in its subnet: whoever has made that the service
    address by mistake is told so, and does not lose the host.
    """
    return [
        entry
        for entry in entries
        if entry.address in ours
        and (
            entry.whole
            or any(
                other.index == entry.index
                and other.address not in ours
                and not other.whole
                and other.address in entry.subnet
                for other in entries
            )
        )
    ]


@dataclass
class _Conflict:
    """Another host that speaks for an address."""

    mac: bytes
    at: float


class ServiceAddresses:
    """The service addresses of this host.

    All of it is done at once, without a pause in between, so no two requests get mixed up.

    :param addresses: all that this host may ever have; with none, nothing is done at all.
    """

    def __init__(
        self,
        addresses: Collection[Address],
        netlink: Callable[[], Netlink] = Netlink,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._addresses = frozenset(addresses)
        self._netlink = netlink() if addresses else None
        self._clock = clock
        self._until = 0.0
        self._held: dict[Address, Entry] = {}
        self._speakers: dict[int, Speaker] = {}
        self._timers: list[asyncio.TimerHandle] = []
        self._conflicts: dict[Address, _Conflict] = {}
        self._silent: dict[Address, str] = {}

    def __contains__(self, address: Address) -> bool:
        return address in self._addresses

    def __iter__(self) -> Iterator[Address]:
        return iter(self._addresses)

    def hold(self, seconds: float) -> tuple[list[str], list[str]]:
        """Have the addresses for so many seconds more, and announce those that are new here.

        The kernel counts in whole seconds, so what is left of a lease is not always worth a
        renewal. What cannot be had is told, not raised: a host that serves is better than one that
        does not, and the group's status shows it.

        :return: the addresses that were not here before, and what is wrong, one sentence each.
        """
        if self._netlink is None:
            return [], []
        now, lifetime = self._clock(), int(seconds + LATE)
        lapsed, longer = now >= self._until, now + lifetime > self._until
        if lifetime < 1:
            return [], self._heard()
        try:
            todo = plan(self._netlink.entries(), self._addresses)
        except OSError as error:
            return [], [f"the addresses of this host cannot be read: {error}"]
        problems = todo.problems
        for entry in todo.stray:
            problems += self._tried(self._netlink.delete, entry)
        held: dict[Address, Entry] = {}
        for entry in todo.hold:
            failed = []
            if longer or entry in todo.new:
                failed = self._tried(self._netlink.hold, entry, lifetime)
            problems += failed
            if not failed:
                held[entry.address] = entry
        self._until = max(self._until, now + lifetime)
        self._held = held
        new = [entry for entry in todo.new if entry.address in held]
        if new:
            log.warning("has the service address %s now", ", ".join(str(e.address) for e in new))
        if new or lapsed:  # nobody has kept others from it since then
            self._speak()
        problems += [
            f"the interface of the service address {entry.address} has no carrier"
            for entry in held.values()
            if not _carrier(entry.index)
        ]
        problems += self._heard()
        return [str(entry.address) for entry in new], problems

    def release(self) -> None:
        """Have none of the addresses. OSError if the kernel keeps one; its lifetime goes on."""
        self._until = 0.0
        for timer in self._timers:
            timer.cancel()
        for speaker in self._speakers.values():
            speaker.close()
        self._speakers.clear()
        self._conflicts.clear()
        self._silent.clear()
        self._held = {}
        if self._netlink is None:
            return
        failures: list[str] = []
        for entry in ours_of(self._netlink.entries(), self._addresses):
            failed = self._tried(self._netlink.delete, entry)
            failures += failed
            if not failed:
                log.warning("has the service address %s no longer", entry.address)
        if failures:
            raise OSError("; ".join(failures))

    def tickle(self, connections: Iterable[packets.Connection]) -> None:
        """Make clients notice that the other end of these connections is gone.

        OSError if the kernel does not send, or an address is not here.
        """
        if self._clock() >= self._until:
            raise OSError("this host has no service address now")
        for family in (socket.AF_INET, socket.AF_INET6):
            version = 4 if family == socket.AF_INET else 6
            chosen = [c for c in connections if c.local.version == version]
            if not chosen:
                continue
            # IPPROTO_RAW: the packets come with their IP header, and nothing is received.
            with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
                for connection in chosen:
                    # A client that cannot be reached any more must not keep it from the others.
                    with contextlib.suppress(OSError):
                        raw.sendto(packets.tickle(connection), (str(connection.remote), 0))

    @staticmethod
    def _tried(effect: Callable[..., None], entry: Entry, *values: int) -> list[str]:
        try:
            effect(entry, *values)
        except OSError as error:
            return [f"{effect.__name__} the service address {entry.address}: {error.strerror}"]
        return []

    # -- telling the subnet

    def _speak(self) -> None:
        """Announce now, and a few times more."""
        loop = asyncio.get_running_loop()
        for timer in self._timers:
            timer.cancel()
        self._timers = [loop.call_later(pause, self._repeat) for pause in AGAIN]
        self._repeat()

    def _repeat(self) -> None:
        for address in self._held:
            self._announce(address)

    def _announce(self, address: Address) -> None:
        if self._clock() >= self._until:
            return  # it may be another's by now
        index = self._held[address].index
        try:
            if index not in self._speakers:
                self._speakers[index] = Speaker(index, self._claimed)
            self._speakers[index].announce(address)
        except OSError as error:
            self._silent[address] = str(error)
        else:
            self._silent.pop(address, None)

    def _claimed(self, address: Address, mac: bytes) -> None:
        """Note that another host speaks for an address of ours, and say again where it is."""
        if address not in self._held or self._clock() >= self._until:
            return
        last = self._conflicts.get(address)
        if last is None or self._clock() >= last.at + CONFLICT_PAUSE:
            self._conflicts[address] = _Conflict(mac, self._clock())
            log.error("%s speaks for the service address %s, too", mac.hex(":"), address)
            self._announce(address)

    def _heard(self) -> list[str]:
        """Return what is wrong with what the subnet was told, one sentence each."""
        since = self._clock() - CONFLICT_SHOWN
        return [
            *(
                f"the service address {address} is not announced: {why}"
                for address, why in self._silent.items()
            ),
            *(
                f"another host, {conflict.mac.hex(':')}, speaks for the service address {address}"
                for address, conflict in self._conflicts.items()
                if conflict.at > since
            ),
        ]


def _link(index: int, request: int, length: int) -> bytes:
    """Ask about an interface (netdevice(7)); OSError if it is gone.

    Not /sys: what is mounted there may be of another network namespace than this process.
    """
    name = socket.if_indextoname(index).encode()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as any_socket:
        answer = fcntl.ioctl(any_socket, request, struct.pack("16s24x", name))
    return answer[16 : 16 + length]


def _carrier(index: int) -> bool:
    """Whether an interface is up and has a link to anybody."""
    try:
        flags: int = struct.unpack("=H", _link(index, _GET_FLAGS, 2))[0]
    except OSError:
        return False  # it is gone
    return bool(flags & _RUNNING)


class Speaker:
    """Announces addresses on one interface, and hears who else does.

    :param claimed: called with an address and a MAC when another host speaks for an address.
    """

    def __init__(self, index: int, claimed: Callable[[Address, bytes], None]) -> None:
        self._index = index
        self._claimed = claimed
        self._name = socket.if_indextoname(index)
        self._arp: socket.socket | None = None
        self._icmp: socket.socket | None = None
        self._mac = b""

    def announce(self, address: Address) -> None:
        """Tell the subnet that the address is here. OSError if it cannot be sent."""
        self._mac = _link(self._index, _GET_MAC, 8)[2:]
        if isinstance(address, IPv4Address):
            if self._arp is None:
                self._arp = self._listening(self._arp_socket(), self._hear_arp)
            for frame in packets.arp_announcements(address, self._mac):
                self._arp.send(frame)
            return
        if self._icmp is None:
            self._icmp = self._listening(self._icmp_socket(), self._hear_icmp)
        source = address.packed + struct.pack("=I", self._index)
        ancillary = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, source)]
        message = packets.neighbour_advertisement(address, self._mac)
        self._icmp.sendmsg([message], ancillary, 0, (ALL_NODES, 0, 0, self._index))

    def close(self) -> None:
        """Be silent and deaf."""
        for channel in (self._arp, self._icmp):
            if channel is not None:
                asyncio.get_running_loop().remove_reader(channel)
                channel.close()
        self._arp = self._icmp = None

    @staticmethod
    def _listening(channel: socket.socket, hear: Callable[[], None]) -> socket.socket:
        channel.setblocking(False)
        asyncio.get_running_loop().add_reader(channel, hear)
        return channel

    def _arp_socket(self) -> socket.socket:
        channel = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        channel.bind((self._name, packets.ARP_TYPE))
        return channel

    def _icmp_socket(self) -> socket.socket:
        channel = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        passing = [0xFFFFFFFF] * 8  # a bit that is set keeps a type out
        passing[packets.NEIGHBOUR_ADVERTISEMENT // 32] &= ~(
            1 << packets.NEIGHBOUR_ADVERTISEMENT % 32
        )
        channel.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, struct.pack("=8I", *passing))
        # A receiver takes it only from its own link, which this proves (RFC 4861).
        channel.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        channel.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._name.encode() + b"\0")
        return channel

    def _hear_arp(self) -> None:
        assert self._arp is not None
        with contextlib.suppress(OSError):  # nothing there, or the interface is down
            self._note(packets.arp_sender(self._arp.recv(128)))

    def _hear_icmp(self) -> None:
        assert self._icmp is not None
        with contextlib.suppress(OSError):
            self._note(packets.advertised(self._icmp.recv(512)))

    def _note(self, said: tuple[IPv4Address | IPv6Address, bytes] | None) -> None:
        if said is not None and said[1] != self._mac:
            self._claimed(*said)
