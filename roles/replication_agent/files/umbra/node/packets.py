"""Packets that the service address needs, built and read byte for byte. Pure.

ARP announcements (RFC 5227), unsolicited neighbour advertisements (RFC 4861), and the TCP segment
that makes a client notice that the other end of its connection is gone.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from umbra.node.netlink import Address

BROADCAST = b"\xff" * 6
ARP_TYPE = 0x0806
NEIGHBOUR_ADVERTISEMENT = 136
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ETHERNET_IPV4 = (1, 0x0800, 6, 4)
_REQUEST, _REPLY = 1, 2
_OVERRIDE = 0x20000000
_TARGET_LINK_LAYER = 2
_TCP = 6
_ACK = 0x10


@dataclass(frozen=True)
class Connection:
    """A TCP connection between the service address and a client."""

    local: Address
    local_port: int
    remote: Address
    remote_port: int

    def to_json(self) -> list[object]:
        """Return it as it goes over a link."""
        return [str(self.local), self.local_port, str(self.remote), self.remote_port]

    @classmethod
    def from_json(cls, row: object) -> Connection:
        """Read what ``to_json`` made; ValueError if it is no connection that there can be."""
        if not isinstance(row, list) or len(row) != 4:
            raise ValueError("a connection has two addresses and two ports")
        local, remote = ip_address(row[0]), ip_address(row[2])
        ports = row[1], row[3]
        if not all(type(port) is int and 0 < port < 65536 for port in ports):
            raise ValueError(f"{ports} are not two ports")
        if local.version != remote.version or remote.is_multicast or remote.is_unspecified:
            raise ValueError(f"there is no connection between {local} and {remote}")
        return cls(local, row[1], remote, row[3])


def arp_announcements(address: IPv4Address, mac: bytes) -> list[bytes]:
    """Return frames that tell a subnet where an address is.

    A request and a reply: each is what some devices take and others do not.
    """
    frames = []
    for operation, target in ((_REQUEST, bytes(6)), (_REPLY, mac)):
        packed = address.packed
        arp = _ARP.pack(*_ETHERNET_IPV4, operation, mac, packed, target, packed)
        frames.append(BROADCAST + mac + struct.pack("!H", ARP_TYPE) + arp)
    return frames


def arp_sender(frame: bytes) -> tuple[IPv4Address, bytes] | None:
    """Return whose address and which MAC an ARP frame speaks for; None if it is none of IPv4."""
    if len(frame) < 14 + _ARP.size or frame[12:14] != struct.pack("!H", ARP_TYPE):
        return None
    *kind, _, mac, address, _, _ = _ARP.unpack_from(frame, 14)
    return (IPv4Address(address), mac) if tuple(kind) == _ETHERNET_IPV4 else None


def neighbour_advertisement(address: IPv6Address, mac: bytes) -> bytes:
    """Return the ICMPv6 message that tells a subnet where an address is.

    Unsolicited, to be believed over what was known. The kernel fills in the checksum.
    """
    option = struct.pack("!BB", _TARGET_LINK_LAYER, 1) + mac
    head = struct.pack("!BBHI", NEIGHBOUR_ADVERTISEMENT, 0, 0, _OVERRIDE)
    return head + address.packed + option


def advertised(message: bytes) -> tuple[IPv6Address, bytes] | None:
    """Return which address and which MAC a neighbour advertisement speaks for, or None."""
    if len(message) < 24 or message[0] != NEIGHBOUR_ADVERTISEMENT:
        return None
    options = message[24:]
    while len(options) >= 8:
        kind, length = options[0], options[1] * 8
        if kind == _TARGET_LINK_LAYER and length == 8:
            return IPv6Address(message[8:24]), options[2:8]
        if not length:
            break
        options = options[length:]
    return None


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def tickle(connection: Connection) -> bytes:
    """Return an IP packet with a bare ACK from the service address to a client.

    Its numbers are those of no connection. The client's system answers what it holds to be astray
    with the numbers that it expects, and this host, which has no such connection, answers that with
    a reset that fits.
    """
    source, target = connection.local.packed, connection.remote.packed
    ports = connection.local_port, connection.remote_port
    segment = struct.pack("!HHIIBBHHH", *ports, 0, 0, 5 << 4, _ACK, 1024, 0, 0)
    if connection.local.version == 4:
        pseudo = source + target + struct.pack("!BBH", 0, _TCP, len(segment))
        # The kernel fills in the identification and the header's checksum.
        head = struct.pack(
            "!BBHHHBBH4s4s", 0x45, 0, 20 + len(segment), 0, 0, 64, _TCP, 0, source, target
        )
    else:
        pseudo = source + target + struct.pack("!IHBB", len(segment), 0, 0, _TCP)
        head = struct.pack("!IHBB16s16s", 6 << 28, len(segment), _TCP, 64, source, target)
    total = checksum(pseudo + segment)
    return head + segment[:16] + struct.pack("!H", total) + segment[18:]
