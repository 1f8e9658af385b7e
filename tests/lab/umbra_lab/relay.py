"""The WAN: one process that carries IP packets between the site routers' tun devices.

Run as `python -m umbra_lab.relay LAB`. Not every kernel has netem, so delay, jitter, loss, rate
and cuts are made here. If it dies the WAN is down and nothing else; `lab up` starts it again as it
was.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

from . import links
from .paths import NETNS_ROOT, Lab
from .plan import SITES, Site, destination_site

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_OFFLOAD_CHECKSUM, _OFFLOAD_TCP4, _OFFLOAD_TCP6 = 0x01, 0x02, 0x04
_PR_SET_TIMERSLACK = 29
_VNET_HEADER = 10
_READ = 65536 + 128
# Packets read from one device before the others and the due ones get their turn.
_BATCH = 32
# Bound on memory under a huge delay; far above what 200 ms of traffic needs.
_QUEUED_BYTES = 256 << 20


class Relay:
    """The devices, the links between them, and the packets on their way."""

    def __init__(self, lab: Lab) -> None:
        """Attach to the routers' devices."""
        self._settings = lab.wan_settings
        self._devices = {site.name: _open_tun(lab, site) for site in SITES}
        self._links = {pair: links.Link(s) for pair, s in self._load().items()}
        self._site = {fd: name for name, fd in self._devices.items()}
        self._routes: dict[bytes, str | None] = {}
        self._queue: list[tuple[float, int, int, bytes]] = []
        self._queued = 0
        self._number = count()
        self._control = _listen(lab.wan_socket)
        self._offload()

    def _load(self) -> links.Table:
        return links.load(json.loads(self._settings.read_text()))

    def _offload(self) -> None:
        plain = all(link.settings.plain for link in self._links.values())
        flags = _OFFLOAD_CHECKSUM | (_OFFLOAD_TCP4 | _OFFLOAD_TCP6 if plain else 0)
        for fd in self._devices.values():
            fcntl.ioctl(fd, _TUNSETOFFLOAD, flags)

    def run(self) -> None:
        """Carry packets until killed."""
        control = self._control.fileno()
        readers = [*self._devices.values(), control]
        while True:
            self._deliver(time.monotonic())
            # select, not epoll: its time-out counts microseconds, epoll's milliseconds.
            wait = max(0.0, self._queue[0][0] - time.monotonic()) if self._queue else None
            for reader in select.select(readers, (), (), wait)[0]:
                if reader == control:
                    self._answer()
                else:
                    self._receive(reader)

    def _deliver(self, now: float) -> None:
        while self._queue and self._queue[0][0] <= now:
            _, _, fd, packet = heapq.heappop(self._queue)
            self._queued -= len(packet)
            # A full device drops the packet, as a real one would.
            with suppress(OSError):
                os.write(fd, packet)

    def _receive(self, fd: int) -> None:
        here = self._site[fd]
        for _ in range(_BATCH):
            try:
                packet = os.read(fd, _READ)
            except OSError:  # drained, or the device is down
                return
            there = self._route(packet)
            if there is None or there == here:
                continue
            now = time.monotonic()
            at = self._links[here, there].arrival(
                now, len(packet) - _VNET_HEADER, random.random(), random.random()
            )
            if at is None or self._queued > _QUEUED_BYTES:
                continue
            if at <= now and not self._queue:
                with suppress(OSError):
                    os.write(self._devices[there], packet)
            else:
                self._queued += len(packet)
                heapq.heappush(self._queue, (at, next(self._number), self._devices[there], packet))

    def _route(self, packet: bytes) -> str | None:
        version = packet[_VNET_HEADER] >> 4 if len(packet) > _VNET_HEADER else 0
        first, last = (16, 20) if version == 4 else (24, 40)
        address = packet[_VNET_HEADER + first : _VNET_HEADER + last]
        if len(address) != last - first:
            return None
        try:
            return self._routes[address]
        except KeyError:
            if len(self._routes) > 10_000:  # a scan must not eat memory
                self._routes.clear()
            site = destination_site(address)
            self._routes[address] = site.name if site else None
            return self._routes[address]

    def _answer(self) -> None:
        """Read the settings again and answer with the counters; a bad file changes nothing."""
        connection, _ = self._control.accept()
        with connection:
            connection.settimeout(0.1)
            try:
                for pair, settings in self._load().items():
                    if self._links[pair].settings != settings:
                        self._links[pair].configure(settings)
                self._offload()
                answer: dict[str, object] = {
                    f"{a}>{b}": {"forwarded": link.forwarded, "dropped": link.dropped}
                    for (a, b), link in self._links.items()
                }
            except (OSError, ValueError) as error:
                answer = {"error": str(error)}
            with suppress(OSError):
                connection.sendall(json.dumps(answer).encode())


def _open_tun(lab: Lab, site: Site) -> int:
    # Not os.setns, which Python 3.11 lacks. There is one thread, so all of the process moves.
    libc = ctypes.CDLL(None, use_errno=True)
    with (NETNS_ROOT / lab.netns(site)).open("rb") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"wan0", flags))
    return fd


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(8)
    return listener


def main() -> None:
    """Run the relay of the lab that the first argument names."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)  # nanoseconds: wake up on time
    Relay(Lab(sys.argv[1])).run()


if __name__ == "__main__":
    main()
