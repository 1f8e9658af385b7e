"""A host's IP addresses, read and changed over rtnetlink(7): no program is started for it.

The codec is pure. Every request of the socket is answered by the kernel at once; a second without
an answer is an error.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

Address = IPv4Address | IPv6Address

TIMEOUT = 1.0
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_CACHE = struct.Struct("=IIII")  # preferred and valid lifetime, two times that only the kernel sets
_ERROR, _DONE = 2, 3
_NEW_ADDRESS, _DELETE_ADDRESS, _GET_ADDRESS = 20, 21, 22
_REQUEST, _ACK, _REPLACE, _CREATE, _DUMP = 0x1, 0x4, 0x100, 0x400, 0x300
_IFA_ADDRESS, _IFA_LOCAL, _IFA_CACHEINFO, _IFA_FLAGS = 1, 2, 6, 8
_NO_DAD, _NO_PREFIX_ROUTE = 0x02, 0x200


@dataclass(frozen=True)
class Entry:
    """One address of one interface."""

    index: int
    address: Address
    prefix: int

    @property
    def whole(self) -> bool:
        """Whether it stands for itself, and tells of no subnet."""
        return self.prefix == self.address.max_prefixlen

    @property
    def subnet(self) -> IPv4Network | IPv6Network:
        """The subnet that the interface is in by this address."""
        return ip_network((self.address, self.prefix), strict=False)


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def _message(kind: int, flags: int, sequence: int, payload: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags, sequence, 0) + payload


def _about(entry: Entry, flags: int = 0) -> bytes:
    family = socket.AF_INET if entry.address.version == 4 else socket.AF_INET6
    packed = entry.address.packed
    return (
        _IFADDR.pack(family, entry.prefix, flags & 0xFF, 0, entry.index)
        + _attribute(_IFA_LOCAL, packed)
        + _attribute(_IFA_ADDRESS, packed)
    )


def encode_hold(entry: Entry, seconds: int, sequence: int) -> bytes:
    """Return the request that adds an address, or renews it, for so many seconds.

    It is usable at once (no duplicate address detection), and never chosen as the source of a
    connection that this host begins (its preferred lifetime is over).
    """
    flags = _NO_DAD | _NO_PREFIX_ROUTE
    payload = (
        _about(entry, flags)
        + _attribute(_IFA_FLAGS, struct.pack("=I", flags))
        + _attribute(_IFA_CACHEINFO, _CACHE.pack(0, seconds, 0, 0))
    )
    return _message(_NEW_ADDRESS, _REQUEST | _ACK | _CREATE | _REPLACE, sequence, payload)


def encode_delete(entry: Entry, sequence: int) -> bytes:
    """Return the request that removes an address."""
    return _message(_DELETE_ADDRESS, _REQUEST | _ACK, sequence, _about(entry))


def encode_list(sequence: int) -> bytes:
    """Return the request for all addresses of the host."""
    payload = _IFADDR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    return _message(_GET_ADDRESS, _REQUEST | _DUMP, sequence, payload)


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Give type, sequence and payload of each message in a datagram of the kernel's."""
    while len(data) >= _HEADER.size:
        length, kind, _, sequence, _ = _HEADER.unpack_from(data)
        if length < _HEADER.size:
            return
        yield kind, sequence, data[_HEADER.size : length]
        data = data[length + -length % 4 :]


def decode_entry(payload: bytes) -> Entry | None:
    """Return what a message of a listing tells; None if it is no IP address."""
    family, prefix, _, _, index = _IFADDR.unpack_from(payload)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    values: dict[int, bytes] = {}
    rest = payload[_IFADDR.size :]
    while len(rest) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        if length < _ATTRIBUTE.size:
            break
        values[kind] = rest[_ATTRIBUTE.size : length]
        rest = rest[length + -length % 4 :]
    packed = values.get(_IFA_LOCAL) or values.get(_IFA_ADDRESS)
    return None if packed is None else Entry(index, ip_address(packed), prefix)


class Netlink:
    """Reads and changes the host's addresses. OSError if the kernel refuses."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self._socket.settimeout(TIMEOUT)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        """Ask no more."""
        self._socket.close()

    def entries(self) -> list[Entry]:
        """Return all addresses of the host."""
        self._sequence += 1
        found = []
        for kind, payload in self._ask(encode_list(self._sequence)):
            if kind == _NEW_ADDRESS and (entry := decode_entry(payload)) is not None:
                found.append(entry)
        return found

    def hold(self, entry: Entry, seconds: int) -> None:
        """Add an address, or renew it: the kernel removes it after so many seconds."""
        self._sequence += 1
        for _ in self._ask(encode_hold(entry, seconds, self._sequence)):
            pass

    def delete(self, entry: Entry) -> None:
        """Remove an address; one that is gone already is no error."""
        self._sequence += 1
        try:
            for _ in self._ask(encode_delete(entry, self._sequence)):
                pass
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.ENODEV):
                raise

    def _ask(self, request: bytes) -> Iterator[tuple[int, bytes]]:
        self._socket.send(request)
        while True:
            for kind, sequence, payload in messages(self._socket.recv(1 << 18)):
                if sequence != self._sequence:
                    continue  # an answer that came too late for the request before
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    number = -struct.unpack_from("=i", payload)[0]
                    if number:
                        raise OSError(number, os.strerror(number))
                    return
                yield kind, payload
