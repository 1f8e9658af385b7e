"""Which clients are connected to the service address, as the kernel lists it for any process."""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from ipaddress import IPv6Address, ip_address
from pathlib import Path

from umbra.node.netlink import Address
from umbra.node.packets import Connection

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
MAX_CLIENTS = 20_000
_ESTABLISHED = "01"
_DISCARD = 9

Row = tuple[str, str]
"""Local and remote end as the kernel writes them; ``decode`` reads them."""


def _text(address: Address, port: int) -> str:
    packed = address.packed
    # Words of 32 bits in the host's byte order.
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return f"{''.join(f'{word:08X}' for word in words)}:{port:04X}"


def endpoints(addresses: Iterable[Address], ports: Collection[int]) -> frozenset[str]:
    """Return how these addresses and ports are written in the kernel's tables.

    A client over IPv4 of a service that listens for both families stands in that of IPv6.
    """
    wanted: list[Address] = []
    for address in addresses:
        wanted.append(address)
        if address.version == 4:
            wanted.append(IPv6Address(f"::ffff:{address}"))
    return frozenset(_text(address, port) for address in wanted for port in ports)


def parse(lines: Iterable[str], wanted: Collection[str]) -> Iterator[Row]:
    """Give the established connections to these ends, of a table as in proc_net(5)."""
    for line in lines:
        fields = line.split(maxsplit=4)
        if len(fields) > 3 and fields[3] == _ESTABLISHED and fields[1] in wanted:
            yield fields[1], fields[2]


def decode(row: Row) -> Connection:
    """Return the connection that a row of a table is about."""
    return Connection(*_endpoint(row[0]), *_endpoint(row[1]))


def _endpoint(text: str) -> tuple[Address, int]:
    digits, _, port = text.partition(":")
    words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
    address = ip_address(struct.pack(f"={len(words)}I", *words))
    return getattr(address, "ipv4_mapped", None) or address, int(port, 16)


def read(wanted: Collection[str]) -> frozenset[Row]:
    """Return the connections to these ends, at most MAX_CLIENTS. OSError if they are not told."""
    found: list[Row] = []
    for table in TABLES:
        try:
            with table.open(encoding="ascii") as file:
                for row in parse(file, wanted):
                    if len(found) == MAX_CLIENTS:
                        return frozenset(found)
                    found.append(row)
        except FileNotFoundError:
            continue  # a host without IPv6
    return frozenset(found)


def is_here(address: Address) -> bool:
    """Whether this host has an address now: only then is it the source of what goes to it."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), _DISCARD))  # sends nothing
        except OSError:
            return False
        return bool(probe.getsockname()[0] == str(address))
