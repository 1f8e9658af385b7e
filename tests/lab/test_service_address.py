"""The helper and a real kernel: two hosts and a client on one bridge. Needs root; some seconds."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import TypeVar

import pytest

from umbra.node import connections, packets
from umbra.node.client import NodeHelper
from umbra.node.packets import Connection

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")

Value = TypeVar("Value")
ADDRESSES = ("192.0.2.20", "2001:db8:a::20")
PORT = 993
FENCE = "table inet umbra_fence { set open_ports { type inet_service; flags timeout; }; }"
PREFIX = f"umbra-sa{os.getpid()}-"
HOSTS = {"a": 10, "b": 11, "client": 140}


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def inside(host: str, work: Callable[[], Value]) -> Value:
    """Do something in a host's network namespace; a socket that it makes stays in there."""
    result: list[Value] = []

    def run() -> None:
        with open(f"/run/netns/{PREFIX}{host}") as namespace:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.setns(namespace.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
        result.append(work())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


class Host:
    """A mail host: its network, and the real helper in it."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.netns = PREFIX + name
        self.mac = json.loads(ip("-n", self.netns, "-j", "link", "show", "eth0"))[0]["address"]
        subprocess.run(
            ["ip", "netns", "exec", self.netns, "nft", "-f", "-"], input=FENCE.encode(), check=True
        )
        self.socket = directory / f"{name}.sock"
        self.helper = NodeHelper(self.socket, 5)
        self.opened: list[tuple[list[str], list[str]]] = []
        self.helper.on_opened = lambda new, wrong: self.opened.append((list(new), list(wrong)))
        self.process = self.start()
        self.server = inside(name, self._listen)

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "from umbra.node.helper import main; main()"]
        command += ["--socket", str(self.socket), "--group", "root"]
        command += [f"--address={address}" for address in ADDRESSES]
        self.socket.unlink(missing_ok=True)
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.netns, *command],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 20
        while not self.socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.05)
        return process

    @staticmethod
    def _listen() -> socket.socket:
        return socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)

    def open(self, hold: float) -> tuple[list[str], list[str]]:
        asyncio.run(self.helper.ports_open([PORT], hold))
        return self.opened[-1]

    def has(self) -> list[str]:
        return inside(self.name, _here)

    def clients(self) -> set[Connection]:
        ends = connections.endpoints(map(ip_address, ADDRESSES), [PORT])
        return {connections.decode(row) for row in inside(self.name, lambda: _rows(ends))}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.server.close()


def _here() -> list[str]:
    return [text for text in ADDRESSES if connections.is_here(ip_address(text))]


def _sources() -> list[str]:
    found = []
    for family, target in ((socket.AF_INET, "192.0.2.140"), (socket.AF_INET6, "2001:db8:a::140")):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            found.append(str(probe.getsockname()[0]))
    return found


def _rows(ends: frozenset[str]) -> list[connections.Row]:
    # This process's own /proc/net is that of its first thread.
    here = Path(f"/proc/self/task/{threading.get_native_id()}/net")
    found: list[connections.Row] = []
    for name in ("tcp", "tcp6"):
        with (here / name).open() as file:
            found += connections.parse(file, ends)
    return found


def neighbours() -> dict[str, str]:
    """Which MAC the client believes each service address to be at."""
    rows = json.loads(ip("-n", f"{PREFIX}client", "-j", "neigh", "show"))
    return {row["dst"]: row.get("lladdr", "") for row in rows if row["dst"] in ADDRESSES}


def within(seconds: float, condition: Callable[[], bool]) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds
        time.sleep(0.01)
    return time.monotonic() - began


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    running: list[Host] = []
    ip("netns", "add", f"{PREFIX}sw")
    try:
        switch = f"{PREFIX}sw"
        ip("-n", switch, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        ip("-n", switch, "link", "set", "br0", "up")
        for name, number in HOSTS.items():
            own = PREFIX + name
            ip("netns", "add", own)
            link = (
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                f"to-{name}",
                "netns",
                switch,
            )
            ip("-n", own, *link)
            ip("-n", switch, "link", "set", f"to-{name}", "master", "br0", "up")
            ip("-n", own, "link", "set", "lo", "up")
            ip("-n", own, "link", "set", "eth0", "up")
            ip("-n", own, "addr", "add", f"192.0.2.{number}/24", "dev", "eth0")
            ip("-n", own, "addr", "add", f"2001:db8:a::{number}/64", "dev", "eth0", "nodad")
        running += [Host(name, tmp_path) for name in ("a", "b")]
        yield running[0], running[1]
    finally:
        for host in running:
            host.stop()
        for name in ("sw", *HOSTS):
            subprocess.run(["ip", "netns", "delete", PREFIX + name], check=False)


def connect() -> list[socket.socket]:
    return inside(
        "client", lambda: [socket.create_connection((text, PORT), 5) for text in ADDRESSES]
    )


def is_reset(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_the_addresses_move_and_everybody_notices(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    assert a.open(10) == (list(ADDRESSES), [])
    assert (a.has(), b.has()) == (list(ADDRESSES), [])
    assert a.open(10) == ([], [])
    # What the host begins by itself comes from its own addresses.
    assert inside("a", _sources) == ["192.0.2.10", "2001:db8:a::10"]
    clients = connect()
    assert set(neighbours().values()) == {a.mac}
    known = a.clients()
    assert {str(connection.local) for connection in known} == set(ADDRESSES)
    assert len(known) == 2

    # A's power goes: nobody says goodbye. B takes over.
    ip("-n", f"{PREFIX}sw", "link", "set", "to-a", "down")
    assert b.open(10) == (list(ADDRESSES), [])
    within(1, lambda: set(neighbours().values()) == {b.mac})
    assert not any(map(is_reset, clients))
    asyncio.run(b.helper.tickle(list(known)))
    took = within(1, lambda: all(map(is_reset, clients)))
    print(f"clients noticed within {took:.3f} s")
    for client in [*clients, *connect()]:
        client.close()

    # A is back, with the addresses, and says so: B contradicts.
    ip("-n", f"{PREFIX}sw", "link", "set", "to-a", "up")
    mac = bytes.fromhex(a.mac.replace(":", ""))
    inside("a", lambda: _claim(mac))
    within(1, lambda: any("speaks for the service" in text for text in b.open(10)[1]))
    within(1, lambda: set(neighbours().values()) == {b.mac})

    # What A should not have goes at the first look.
    asyncio.run(a.helper.ports_close())
    assert (a.has(), b.has()) == ([], list(ADDRESSES))
    asyncio.run(b.helper.ports_close())
    assert b.has() == []


def _claim(mac: bytes) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", packets.ARP_TYPE))
        for frame in packets.arp_announcements(IPv4Address(ADDRESSES[0]), mac):
            raw.send(frame)


def test_the_kernel_removes_what_nobody_renews_and_nothing_else(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    a.open(1.2)
    a.process.kill()
    a.process.wait()
    assert a.has() == list(ADDRESSES)
    took = within(2, lambda: a.has() == [])
    assert took > 0.5
    # The next helper begins anew.
    a.process = a.start()
    assert a.open(1.2) == (list(ADDRESSES), [])

    # What is the host's own by mistake is said, and never removed.
    ip("-n", a.netns, "addr", "flush", "dev", "eth0")
    ip("-n", a.netns, "addr", "add", "192.0.2.20/24", "dev", "eth0")
    new, problems = a.open(10)
    assert new == []
    assert len(problems) == 2
    asyncio.run(a.helper.ports_close())
    assert a.has() == ["192.0.2.20"]
