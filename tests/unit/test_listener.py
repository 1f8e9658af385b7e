"""Ports that stay this agent's, and connections that nobody uses."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from umbra import listener, systemd

# Tries to take the port that systemd keeps, as the user `nobody` does who wants Dovecot's token.
TAKE = """
import os, socket, sys
if sys.argv[2] == "other":
    os.setuid(65534)
taken = socket.socket()
taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
taken.bind(("127.0.0.1", int(sys.argv[1])))
taken.listen()
"""


class Manager:
    """Plays systemd: what it keeps, it gives to the next process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: dict[str, socket.socket] = {}
        monkeypatch.setattr(systemd, "store_socket", self.store)
        monkeypatch.setattr(systemd, "stored_socket", self.stored)
        monkeypatch.setattr(systemd, "forget_socket", lambda name: self.kept.pop(name).close())

    def store(self, name: str, item: socket.socket) -> None:
        self.kept[name] = item.dup()

    def stored(self, name: str) -> socket.socket | None:
        return self.kept[name].dup() if name in self.kept else None


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    manager = Manager(monkeypatch)
    yield manager
    for kept in manager.kept.values():
        kept.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def taken(port: int, who: str) -> bool:
    command = [sys.executable, "-c", TAKE, str(port), who]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_port_is_nobody_elses_while_the_agent_is_away(manager: Manager) -> None:
    port = free_port()
    for _ in range(2):  # and after it has come back
        assert taken(port, "other") is not bool(manager.kept)
        with listener.bound("notify", "127.0.0.1", port) as listening:
            listening.listen()
            with socket.create_connection(("127.0.0.1", port)), listening.accept()[0]:
                assert not taken(port, "other")
        assert not taken(port, "other")
        assert taken(port, "own")  # the next agent
        with pytest.raises(ConnectionRefusedError):  # nobody is kept waiting
            socket.create_connection(("127.0.0.1", port))
    assert len(manager.kept) == 1


def test_another_port_takes_the_kept_ones_place(manager: Manager) -> None:
    first, second = free_port(), free_port()
    listener.bound("api", "127.0.0.1", first).close()
    listener.bound("api", "127.0.0.1", second).close()
    assert manager.kept["api"].getsockname() == ("127.0.0.1", second)
    listener.bound("api", "::1", second).close()
    assert manager.kept["api"].getsockname()[:2] == ("::1", second)


def test_a_port_that_is_taken_is_said(manager: Manager) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(OSError, match="in use"),
    ):
        listener.bound("api", "127.0.0.1", other.getsockname()[1])
    assert manager.kept == {}


async def test_connections_are_few_and_each_has_a_request_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "PATIENCE", 0.3)

    async def answer(request: web.BaseRequest) -> web.Response:
        entrance.heard(request)
        if request.path == "/slow":
            await asyncio.sleep(0.6)
        return web.Response(text="yes")

    path = str(tmp_path / "socket")
    server = web.Server(answer, access_log=None)
    entrance = listener.Entrance(server, 3)
    listening = await asyncio.get_running_loop().create_unix_server(entrance, path)
    clients = [await asyncio.open_unix_connection(path) for _ in range(3)]
    clients[0][1].write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    clients[1][1].write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
    clients[2][1].write(b"GET / HTTP/1.1\r\nHost:")
    await asyncio.sleep(0.1)
    reader, writer = await asyncio.open_unix_connection(path)
    assert await reader.read() == b""  # one too many
    writer.close()
    async with asyncio.timeout(5):
        assert await clients[2][0].read() == b""
    clients[0][1].write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(5):
        for reader, _ in clients[1::-1]:
            assert (await reader.readuntil(b"yes")).startswith(b"HTTP/1.1 200")
    for _, writer in clients:
        writer.close()
    listening.close()
    await server.shutdown(0.1)
