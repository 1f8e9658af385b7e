"""One ICMP echo, without privileges: whether a host on the clients' side answers."""

from __future__ import annotations

import asyncio
import os
import socket
from ipaddress import ip_address

_ECHO = {
    4: (8, socket.IPPROTO_ICMP, socket.AF_INET),
    6: (128, socket.IPPROTO_ICMPV6, socket.AF_INET6),
}


async def answers(address: str, timeout: float) -> bool | None:
    """Return whether ``address`` answers within ``timeout`` seconds.

    None if this process may not ask (``net.ipv4.ping_group_range``).
    """
    kind, protocol, family = _ECHO[ip_address(address).version]
    try:
        # The kernel writes identifier and checksum, and hands over the answers to this socket only.
        sender = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, protocol)
    except OSError:
        return None
    with sender:
        loop = asyncio.get_running_loop()
        try:
            sender.connect((address, 0))
            async with asyncio.timeout(timeout):
                packet = bytes((kind, 0, 0, 0, 0, 0, 0, 1)) + os.urandom(8)
                await loop.sock_sendall(sender, packet)
                return (await loop.sock_recv(sender, 256))[-8:] == packet[-8:]
        except (OSError, TimeoutError):
            return False


async def any_answers(addresses: tuple[str, ...], timeout: float) -> bool | None:
    """Return whether any of them answers; None if there is none, or if nobody may ask."""
    found = await asyncio.gather(*(answers(address, timeout) for address in addresses))
    if any(found):
        return True
    return False if False in found else None
