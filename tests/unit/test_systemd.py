"""systemd's notification protocol, against a socket that plays the service manager."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from umbra import systemd


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield channel


def test_nothing_happens_outside_of_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("LISTEN_PID", raising=False)
    systemd.notify("READY=1")
    assert systemd.stored_socket("once") is None


def test_a_message(manager: socket.socket) -> None:
    systemd.notify("READY=1")
    assert manager.recv(100) == b"READY=1"


def test_a_sign_of_life_is_one_short_line(manager: socket.socket) -> None:
    """systemd drops a longer message as a whole, and kills who gives no sign of life."""
    systemd.alive("primary, degraded: \ud800 x\nMAINPID=1\n" + "\N{SNOWMAN}" * 5000)
    message = manager.recv(100_000)
    assert message.startswith(b"WATCHDOG=1\nSTATUS=primary, degraded: ? x MAINPID=1 ")
    assert message.count(b"\n") == 1
    assert len(message) < 4096


def test_a_socket_goes_to_the_next_process(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "listener")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        systemd.store_socket("once", listener)
    message, fds, _, _ = socket.recv_fds(manager, 100, 2)
    assert message == b"FDSTORE=1\nFDNAME=once\nFDPOLL=0"
    assert len(fds) == 1
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)  # it listens, though its maker has closed it
        monkeypatch.setattr(systemd, "FIRST_FD", fds[0] - 1)
        monkeypatch.setenv("LISTEN_FDNAMES", "other:once")
        monkeypatch.setenv("LISTEN_PID", "1")
        assert systemd.stored_socket("once") is None  # meant for another process
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        assert systemd.stored_socket("twice") is None
        stored = systemd.stored_socket("once")
        assert stored is not None
        with stored, stored.accept()[0] as served:
            served.sendall(b"x")
            assert client.recv(1) == b"x"
