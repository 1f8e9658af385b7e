"""The entrance of notifications, over real HTTP."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest

from umbra.mailbox.mirror import Verdict
from umbra.mailbox.notify import NotifyServer
from umbra.transport.ports import NotPrimary

TOKEN = "correct-horse"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def entrance(
    changed: Callable[[str], Awaitable[Verdict]],
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


async def mirrored(user: str) -> Verdict:
    return Verdict.MIRRORED


async def test_answers() -> None:
    seen = []

    async def changed(user: str) -> Verdict:
        seen.append(user)
        return Verdict.RECORDED if user.startswith("r") else Verdict.MIRRORED

    async with entrance(changed) as post:
        body = b'{"user": "a@example.org", "events": ["MessageAppend"]}'
        assert await post(body) == (200, "mirrored")
        assert await post(b'{"user": "r@example.org"}') == (200, "recorded")
        assert seen == ["a@example.org", "r@example.org"]


async def test_waits_for_the_mirror() -> None:
    gate = asyncio.Event()

    async def changed(user: str) -> Verdict:
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
    async def changed(user: str) -> Verdict:
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
