"""The entrance of notifications, over real HTTP."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from umbra.mailbox.mirror import Verdict
from umbra.mailbox.notify import KEEP_ALIVE, SHUTDOWN_TIMEOUT, NotifyServer
from umbra.transport.ports import NotPrimary

TOKEN = "correct-horse"
SCRIPT = Path(__file__).parents[3] / "roles/mail_server/templates/umbra-notify.lua.j2"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def entrance(
    changed: Callable[[str, str], Awaitable[Verdict]],
) -> AsyncIterator[Callable[..., Awaitable[tuple[int, str]]]]:
    port = free_port()
    server = NotifyServer("127.0.0.1", port, TOKEN, changed)
    await server.start()

    async def post(
        body: bytes, token: str = TOKEN, path: str = "/notify", method: str = "POST"
    ) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {token}"}
        url = f"http://127.0.0.1:{port}{path}"
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, url, data=body, headers=headers) as answer,
        ):
            return answer.status, await answer.text()

    try:
        yield post
    finally:
        await server.stop()


async def mirrored(user: str, mailbox: str) -> Verdict:
    return Verdict.MIRRORED


async def test_answers() -> None:
    seen = []

    async def changed(user: str, mailbox: str) -> Verdict:
        seen.append(user)
        return Verdict.RECORDED if user.startswith("r") else Verdict.MIRRORED

    async with entrance(changed) as post:
        body = b'{"user": "a@example.org", "events": ["MessageAppend"]}'
        assert await post(body) == (200, "mirrored")
        assert await post(b'{"user": "r@example.org"}') == (200, "recorded")
        assert seen == ["a@example.org", "r@example.org"]


@pytest.mark.parametrize(
    ("said", "mailbox"),
    [
        (b'"mailbox": "INBOX"', "INBOX"),
        (b'"mailbox": "Gr\xc3\xbc\xc3\x9fe/\\u0022a\\u0022", "events": []', 'Gr\xfc\xdfe/"a"'),
        # What is none, or dsync would take for another, stands for all mailboxes.
        (b'"mailbox": "INBOX", "events": ["MailboxRename"]', ""),
        (b'"mailbox": "50%"', ""),
        (b'"mailbox": "a*"', ""),
        (b'"mailbox": "\\\\Sent"', ""),
        (b'"mailbox": "\\ud800"', ""),
        (b'"mailbox": 7', ""),
        (b'"mailbox": null', ""),
        (b'"events": []', ""),
    ],
)
async def test_a_change_may_be_of_one_mailbox(said: bytes, mailbox: str) -> None:
    seen = []

    async def changed(user: str, mailbox: str) -> Verdict:
        seen.append(mailbox)
        return Verdict.MIRRORED

    async with entrance(changed) as post:
        assert (await post(b'{"user": "a@example.org", ' + said + b"}"))[0] == 200
    assert seen == [mailbox]


async def test_waits_for_the_mirror() -> None:
    gate = asyncio.Event()

    async def changed(user: str, mailbox: str) -> Verdict:
        await gate.wait()
        return Verdict.MIRRORED

    async with entrance(changed) as post:
        task = asyncio.ensure_future(post(b'{"user": "a@example.org"}'))
        await asyncio.sleep(0.1)
        assert not task.done()
        gate.set()
        assert (await task)[0] == 200


@pytest.mark.parametrize("error", [NotPrimary(), OSError("disk full"), RuntimeError("a bug")])
async def test_no_ok_when_it_cannot_be_acknowledged(error: Exception) -> None:
    async def changed(user: str, mailbox: str) -> Verdict:
        raise error

    async with entrance(changed) as post:
        assert (await post(b'{"user": "a@example.org"}'))[0] == 503


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"user": 7}',
        b'{"user": ""}',
        b'{"user": "-A"}',
        b'{"user": "a\\tb"}',
        b'{"user": "a@example.org"',
        b"\xff\xfe",
        b'{"user": "' + b"a" * 100_000 + b'"}',
    ],
)
async def test_bad_input_is_refused(body: bytes) -> None:
    async with entrance(mirrored) as post:
        assert (await post(body))[0] == 400


async def test_token_and_path() -> None:
    async with entrance(mirrored) as post:
        body = b'{"user": "a@example.org"}'
        assert (await post(body, token="wrong"))[0] == 401
        assert (await post(body, token=""))[0] == 401
        assert (await post(body, path="/other"))[0] == 404
        assert (await post(body, method="PUT"))[0] == 404


async def test_a_session_keeps_its_connection_and_does_not_hold_up_the_end() -> None:
    port = free_port()
    server = NotifyServer("127.0.0.1", port, TOKEN, mirrored)
    await server.start()
    body = b'{"user": "a@example.org"}'
    request = (
        f"POST /notify HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    sessions = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
    for _ in range(3):
        for reader, writer in sessions:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"close" not in head
            assert await reader.readexactly(len("mirrored")) == b"mirrored"
    await asyncio.wait_for(server.stop(), SHUTDOWN_TIMEOUT / 2)
    for reader, writer in sessions:
        assert await reader.read() == b""
        writer.close()


async def test_what_says_nothing_or_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umbra.listener.PATIENCE", 0.2)
    monkeypatch.setattr("umbra.mailbox.notify.READ_TIMEOUT", 0.2)
    port = free_port()
    server = NotifyServer("127.0.0.1", port, TOKEN, mirrored)
    await server.start()
    head = f"POST /notify HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
    async with asyncio.timeout(15):
        for said, answer in (
            (b"", b""), (head, b""), (head + b"Content-Length: 9\r\n\r\n{", b"HTTP/1.1 408 "),
        ):  # fmt: skip
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said)
            assert (await reader.read(len(answer) or 1)) == answer
            writer.close()
    await server.stop()


def test_dovecot_leaves_a_connection_before_the_agent_does() -> None:
    found = re.search(r'max_idle_time = "(\d+)mins"', SCRIPT.read_text())
    assert found
    assert int(found[1]) * 60 < KEEP_ALIVE
