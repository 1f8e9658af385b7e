"""The kernel's tables of connections: only established ones of the service's own ends."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from pathlib import Path

import pytest

from umbra.node import connections
from umbra.node.packets import Connection

V4, V6 = ip_address("192.0.2.20"), ip_address("2001:db8:a::20")
PORTS = (143, 993)
HEADING = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
# As a little-endian kernel writes them.
TCP = (
    HEADING
    + "   0: 140200C0:03E1 8C0200C0:C350 01 00000000:00000000 00:00000000 00000000     0\n"  # 993
    "   1: 140200C0:03E1 8C0200C0:C351 06 00000000:00000000 00:00000000 00000000     0\n"  # waits
    "   2: 0A0200C0:03E1 8C0200C0:C352 01 00000000:00000000 00:00000000 00000000     0\n"  # own
    "   3: 140200C0:0016 8C0200C0:C353 01 00000000:00000000 00:00000000 00000000     0\n"  # SSH
    "   4: 00000000:03E1 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n"
)
TCP6 = (
    HEADING
    + "   0: 0000000000000000FFFF0000140200C0:008F 0000000000000000FFFF00008C0200C0:C354 01 0 0\n"
    "   1: B80D01200A0000000000000020000000:008F B80D01200A0000000000000040010000:C355 01 0 0\n"
)


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tmp_path / "tcp", tmp_path / "tcp6"
    names[0].write_text(TCP)
    names[1].write_text(TCP6.replace("0A000000", "00000A00"))
    monkeypatch.setattr(connections, "TABLES", names)


def test_clients_of_the_service_are_found_in_both_tables() -> None:
    rows = connections.read(connections.endpoints([V4, V6], PORTS))
    assert {connections.decode(row) for row in rows} == {
        Connection(V4, 993, ip_address("192.0.2.140"), 0xC350),
        Connection(V4, 143, ip_address("192.0.2.140"), 0xC354),
        Connection(ip_address("2001:db8:a::20"), 143, ip_address("2001:db8:a::140"), 0xC355),
    }


def test_no_more_are_kept_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CLIENTS", 2)
    assert len(connections.read(connections.endpoints([V4, V6], PORTS))) == 2


def test_a_host_without_ipv6_has_one_table(tmp_path: Path) -> None:
    (tmp_path / "tcp6").unlink()
    assert len(connections.read(connections.endpoints([V4, V6], PORTS))) == 1


def test_the_real_kernel_lists_a_real_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "TABLES", (Path("/proc/net/tcp"), Path("/proc/net/tcp6")))
    here = ip_address("127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            wanted = connections.endpoints([here], [port])
            found = {connections.decode(row) for row in connections.read(wanted)}
            assert found == {Connection(here, port, here, client.getsockname()[1])}


def test_an_address_is_here_or_not() -> None:
    assert connections.is_here(ip_address("127.0.0.1"))
    assert not connections.is_here(ip_address("198.51.100.77"))
    assert not connections.is_here(ip_address("2001:db8::1"))
