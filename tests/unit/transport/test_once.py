"""Once to each recipient: when a mailbox is searched, and what a delivery is told."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from umbra.transport import ids, once
from umbra.transport.once import Once
from umbra.transport.once_server import OnceServer, Refused, parse

BOB = "bob@example.org"


class Mailbox:
    """What the mailboxes hold, and how often they were searched."""

    def __init__(self) -> None:
        self.held: set[tuple[str, str]] = set()
        self.searches = 0
        self.failures = 0
        self.living: set[int] = set()

    async def has(self, recipient: str, shadow_id: str) -> bool:
        self.searches += 1
        if self.failures:
            self.failures -= 1
            raise OSError("Dovecot does not answer")
        return (recipient, shadow_id) in self.held

    def once(self, **settings: float) -> Once:
        return Once(self.has, alive=lambda process: process in self.living, pause=0.01, **settings)


async def test_a_first_delivery_is_not_searched_for() -> None:
    mailbox, shadow_id = Mailbox(), ids.new()
    asked = mailbox.once()
    asked.accepted(shadow_id)
    assert not await asked.delivered(shadow_id, BOB, 1)
    assert not await asked.delivered(shadow_id, "ann@example.org", 1)
    assert mailbox.searches == 0


async def test_after_another_primarys_term_even_a_first_delivery_is_searched_for() -> None:
    """The queue file was on hold here, and the other one has delivered the message."""
    mailbox, shadow_id = Mailbox(), ids.new()
    asked = mailbox.once()
    asked.accepted(shadow_id)
    mailbox.held.add((BOB, shadow_id))
    asked.doubt()
    assert await asked.delivered(shadow_id, BOB, 1)


async def test_a_second_try_finds_what_the_first_has_stored() -> None:
    mailbox, shadow_id = Mailbox(), ids.new()
    asked = mailbox.once()
    asked.accepted(shadow_id)
    assert not await asked.delivered(shadow_id, "Bob@example.org", 1)
    mailbox.held.add((BOB, shadow_id))
    assert await asked.delivered(shadow_id, BOB, 2)


async def test_a_second_try_stores_what_the_first_has_not() -> None:
    mailbox, shadow_id = Mailbox(), ids.new()
    asked = mailbox.once()
    asked.accepted(shadow_id)
    assert not await asked.delivered(shadow_id, BOB, 1)
    assert not await asked.delivered(shadow_id, BOB, 2)
    assert mailbox.searches == 1


async def test_an_agent_that_starts_searches_for_what_it_does_not_know() -> None:
    """Each recipient of it: the agent that died may have let any of them be stored."""
    mailbox, shadow_id = Mailbox(), ids.new()
    asked = mailbox.once()
    mailbox.held.add((BOB, shadow_id))
    assert not await asked.delivered(shadow_id, "ann@example.org", 1)
    assert await asked.delivered(shadow_id, BOB, 1)
    assert mailbox.searches == 2


async def test_a_try_that_still_stores_is_waited_for() -> None:
    mailbox, shadow_id = Mailbox(), ids.new()
    mailbox.living = {1, 2}
    asked = mailbox.once()
    asked.accepted(shadow_id)
    assert not await asked.delivered(shadow_id, BOB, 1)
    second = asyncio.create_task(asked.delivered(shadow_id, BOB, 2))
    await asyncio.sleep(2.5 * once.LOOK)
    assert not second.done()
    mailbox.held.add((BOB, shadow_id))
    assert await second


@pytest.mark.parametrize("ended", ["died", "began another", "took too long"])
async def test_a_try_that_has_ended_is_not(ended: str) -> None:
    mailbox, shadow_id, other = Mailbox(), ids.new(), ids.new()
    mailbox.living = {1, 2}
    asked = mailbox.once(grace=0.0) if ended == "took too long" else mailbox.once()
    asked.accepted(shadow_id)
    asked.accepted(other)
    assert not await asked.delivered(shadow_id, BOB, 1)
    if ended == "died":
        mailbox.living.remove(1)
    elif ended == "began another":
        assert not await asked.delivered(other, BOB, 1)
    async with asyncio.timeout(once.LOOK / 2):
        assert not await asked.delivered(shadow_id, BOB, 2)


async def test_who_has_asked_is_known() -> None:
    asked, one, two = Mailbox().once(), ids.new(), ids.new()
    asked.accepted(one)
    await asked.delivered(one, "bob+lists@example.org", 1)
    await asked.delivered(two, BOB, 1)
    assert asked.asked(BOB, one)
    assert asked.asked(BOB, two)
    assert not asked.asked("ann@example.org", one)
    assert not asked.asked(BOB, ids.new())


async def test_it_waits_while_dovecot_cannot_tell() -> None:
    mailbox, shadow_id = Mailbox(), ids.new()
    mailbox.held.add((BOB, shadow_id))
    mailbox.failures = 2
    assert await mailbox.once().delivered(shadow_id, BOB, 1)
    assert mailbox.searches == 3


async def test_what_is_forgotten_is_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "MAX_MESSAGES", 2)
    mailbox = Mailbox()
    asked = mailbox.once()
    known = [ids.new() for _ in range(3)]
    for shadow_id in known:
        asked.accepted(shadow_id)
    for shadow_id in known:
        await asked.delivered(shadow_id, BOB, 1)
    # The first was forgotten, and looking for it made the second one so.
    assert mailbox.searches == 3


async def test_processes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "MAX_PROCESSES", 10)
    asked = Mailbox().once(grace=0.0)
    for process in range(100):
        await asked.delivered(ids.new(), BOB, process)
    assert len(asked._latest) <= 10


def request(shadow_id: str, recipient: str) -> bytes:
    """As Dovecot 2.4.1 sends it."""
    environment = f"env_USER={BOB}\nenv_HOME=/var/vmail/example.org/bob\nenv_SENDER=a@example.com\n"
    return f"VERSION\tscript\t4\t0\n{environment}-\n{shadow_id}\n{recipient}\n\n".encode()


def test_parse() -> None:
    shadow_id = ids.new()
    assert parse(request(shadow_id, BOB)) == (shadow_id, BOB)


@pytest.mark.parametrize(
    "bad",
    [
        b"\n\n",
        b"VERSION\tscript\t4\t0\n\n",
        b"HELO\n-\n%(id)s\nbob@example.org\n\n",
        b"VERSION\tscript\t4\t0\n-\n%(id)sx\nbob@example.org\n\n",
        b"VERSION\tscript\t4\t0\n-\n%(id)s\n-x\n\n",
        b"VERSION\tscript\t4\t0\n-\n%(id)s\n\n\n",
        b"VERSION\tscript\t4\t0\n-\n%(id)s\nbob@example.org\n",
    ],
)
def test_parse_refuses(bad: bytes) -> None:
    with pytest.raises(Refused):
        parse(bad.replace(b"%(id)s", ids.new().encode()))


class Application:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str, int]] = []
        self.there = False
        self.somebody_asked = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    async def delivered(self, shadow_id: str, recipient: str, process: int) -> bool:
        self.asked.append((shadow_id, recipient, process))
        self.somebody_asked.set()
        await self.go.wait()
        return self.there


@asynccontextmanager
async def listening(path: Path, application: Application) -> AsyncIterator[OnceServer]:
    server = OnceServer(path, application)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def ask(path: Path, data: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(data)
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_the_server_answers(tmp_path: Path) -> None:
    application, shadow_id = Application(), ids.new()
    async with listening(tmp_path / "once", application):
        assert await ask(tmp_path / "once", request(shadow_id, BOB)) == b"new+\n"
        application.there = True
        assert await ask(tmp_path / "once", request(shadow_id, BOB)) == b"there+\n"
    assert application.asked == [(shadow_id, BOB, os.getpid())] * 2


@pytest.mark.parametrize("bad", [b"nonsense\n\n", b"x" * 10_000, b"VERSION\tscript\t4\t0\n-\n\n"])
async def test_the_server_refuses_and_goes_on(tmp_path: Path, bad: bytes) -> None:
    application = Application()
    async with listening(tmp_path / "once", application):
        assert await ask(tmp_path / "once", bad) == b""
        assert await ask(tmp_path / "once", request(ids.new(), BOB)) == b"new+\n"


async def test_who_asks_while_there_is_no_agent_waits_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, application = tmp_path / "once", Application()
    stored: dict[str, socket.socket] = {}
    monkeypatch.setattr(
        "umbra.systemd.store_socket", lambda name, item: stored.update({name: item.dup()})
    )
    monkeypatch.setattr("umbra.systemd.stored_socket", lambda name: stored.get(name))
    async with listening(path, application):
        application.go.clear()
        cut_off = asyncio.create_task(ask(path, request(ids.new(), BOB)))
        await application.somebody_asked.wait()
    assert await cut_off == b""
    waiting = asyncio.create_task(ask(path, request(ids.new(), BOB)))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    application.go.set()
    async with listening(path, application):
        assert await waiting == b"new+\n"


async def test_a_socket_whose_path_is_gone_makes_room_for_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else systemd would keep the old one, which the agent after this would listen on in vain."""
    path, application = tmp_path / "once", Application()
    kept: list[socket.socket] = []

    def notify(message: str, sockets: Sequence[socket.socket] = ()) -> None:
        """As systemd with FileDescriptorStoreMax=1."""
        if message.startswith("FDSTOREREMOVE=1"):
            while kept:
                kept.pop().close()
        elif message.startswith("FDSTORE=1") and not kept:
            kept.extend(item.dup() for item in sockets)

    monkeypatch.setattr("umbra.systemd.notify", notify)
    monkeypatch.setattr("umbra.systemd.stored_socket", lambda name: kept[0].dup() if kept else None)
    for gone in (False, True, False):
        if gone:
            path.unlink()
        async with listening(path, application):
            assert await ask(path, request(ids.new(), BOB)) == b"new+\n"
    kept.pop().close()


async def test_a_stored_socket_of_another_place_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service manager keeps one of a name, and nobody asks there any more."""
    former, path, said = tmp_path / "former", tmp_path / "once", []
    monkeypatch.setattr("umbra.systemd.notify", lambda text, sockets=(): said.append(text))
    with socket.socket(socket.AF_UNIX) as kept:
        kept.bind(str(former))
        kept.listen()
        monkeypatch.setattr("umbra.systemd.stored_socket", lambda name: kept.dup())
        async with listening(path, Application()):
            assert await ask(path, request(ids.new(), BOB)) == b"new+\n"
    assert said == ["FDSTOREREMOVE=1\nFDNAME=once", "FDSTORE=1\nFDNAME=once\nFDPOLL=0"]
