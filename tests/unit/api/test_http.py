"""The API on a real unix socket and a real port: what is where, and how refusals look."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest

from umbra.api.client import ApiError, call
from umbra.api.http import Api
from umbra.cluster.switchover import Refused

QUEUE: dict[str, Any] = {"node": "a", "messages": [], "copies": []}


class Bench:
    def __init__(self, path: Path, port: int) -> None:
        self.path = path
        self.port = port
        self.refuse = ""
        self.bodies: list[dict[str, Any]] = []

    async def queue(self) -> dict[str, Any]:
        if self.refuse:
            raise Refused(self.refuse)
        return QUEUE

    async def act(self, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        return {"changed": True}

    async def local(self, method: str, path: str, body: object = None) -> Any:
        return await asyncio.to_thread(call, method, path, body, at=self.path)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    bench = Bench(tmp_path / "api.sock", port)
    report = SimpleNamespace(protected=True, health=dict)
    api = Api(lambda: cast(Any, report), {"queue": bench.queue}, {"act": bench.act}, {})
    await api.start(bench.path, "127.0.0.1", port)
    yield bench
    await api.stop()


async def test_what_names_users_and_what_does_something_is_on_the_socket_only(
    bench: Bench,
) -> None:
    assert await bench.local("GET", "/queue") == QUEUE
    assert await bench.local("POST", "/act", {"x": 1}) == {"changed": True}
    async with aiohttp.ClientSession(f"http://127.0.0.1:{bench.port}") as session:
        async with session.get("/queue") as answer:
            assert answer.status == 404
        async with session.get("/health") as answer:
            assert answer.status == 200
        async with session.post("/act", json={"x": 2}) as answer:
            assert answer.status == 404
    assert bench.bodies == [{"x": 1}]


async def test_a_refusal_is_one_sentence(bench: Bench) -> None:
    bench.refuse = "the store is not open."
    with pytest.raises(ApiError, match="the store is not open"):
        await bench.local("GET", "/queue")
