"""The order in which the helper is asked about the ports, and the connection that is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from umbra.node.client import BATCH, NodeHelper
from umbra.node.helper import MAX_REQUEST, HelperError


class Helper:
    """Answers, and notes what was asked; an opening waits for ``go``."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.ids: list[str] = []
        self.go = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = json.loads(await reader.readline())
        do = request["do"]
        self.ids += request.get("ids", [])
        self.asked.append(do)
        if do == "ports-open":
            await self.go.wait()
        writer.write(json.dumps({"ok": True, "new": [do], "problems": []}).encode() + b"\n")
        self.asked.append(f"{do} done")
        writer.close()


@asynccontextmanager
async def helper(path: Path) -> AsyncIterator[tuple[Helper, NodeHelper]]:
    fake = Helper()
    async with await asyncio.start_unix_server(fake.answer, path / "socket", limit=MAX_REQUEST):
        yield fake, NodeHelper(path / "socket")


async def test_a_closing_waits_for_the_opening_before_it(tmp_path: Path) -> None:
    async with helper(tmp_path) as (fake, client), asyncio.TaskGroup() as tasks:
        tasks.create_task(client.ports_open([25], 1.0))
        await asyncio.sleep(0.05)
        tasks.create_task(client.ports_close())
        await asyncio.sleep(0.05)
        assert fake.asked == ["ports-open"]
        fake.go.set()
    assert fake.asked == ["ports-open", "ports-open done", "ports-close", "ports-close done"]


async def test_an_opening_from_before_a_closing_is_void(tmp_path: Path) -> None:
    opened: list[list[str]] = []
    async with helper(tmp_path) as (fake, client), asyncio.TaskGroup() as tasks:
        client.on_opened = lambda new, problems: opened.append(list(new))
        for ask in (client.ports_open([25], 1.0), client.ports_open([25], 2.0)):
            tasks.create_task(ask)
            await asyncio.sleep(0.01)
        tasks.create_task(client.ports_close())
        await asyncio.sleep(0.01)
        tasks.create_task(client.ports_open([25], 3.0))
        fake.go.set()
    # The second waited for the first and was overtaken; the last was asked for afterwards.
    assert [do for do in fake.asked if "done" not in do] == [
        "ports-open", "ports-close", "ports-open",
    ]  # fmt: skip
    assert opened == [["ports-open"], ["ports-open"]]


async def test_any_number_of_queue_files_can_be_named(tmp_path: Path) -> None:
    """A request has a bound; a queue that is over it must not stay as it is."""
    ids = [f"4jb5S{number:010}" for number in range(2 * BATCH + 1)]
    async with helper(tmp_path) as (fake, client):
        await client.queue_hold(ids)
        assert fake.ids == ids
        assert fake.asked.count("queue-hold") == 3
        await client.queue_delete([])
        assert "queue-delete" not in fake.asked


class Disk:
    """A helper that answers each sync with its number, when it may."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._writers: list[asyncio.StreamWriter] = []
        self._come = asyncio.Queue[int]()
        self.asked = self.connections = 0
        self.may = asyncio.Event()
        self.may.set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        while await reader.readline():
            self.asked += 1
            number = self.asked
            self._come.put_nowait(number)
            await self.may.wait()
            answer = {"ok": False, "error": f"number {number}"}
            writer.write(json.dumps(answer).encode() + b"\n")
        writer.close()

    async def start(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self.answer, self._socket)

    async def has(self, number: int) -> None:
        """Return when so many requests have come."""
        while await self._come.get() != number:
            pass

    def end(self) -> None:
        """End as a helper that is killed."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


@asynccontextmanager
async def disk(path: Path, timeout: float = 5.0) -> AsyncIterator[tuple[Disk, NodeHelper]]:
    fake = Disk(path / "socket")
    client = NodeHelper(path / "socket", timeout)
    async with await fake.start():
        try:
            yield fake, client
        finally:
            client.close()
            fake.end()


async def sync(client: NodeHelper) -> str:
    with pytest.raises(HelperError) as caught:
        await client.sync_mail()
    return str(caught.value)


async def test_the_connection_of_syncs_is_kept(tmp_path: Path) -> None:
    async with disk(tmp_path) as (fake, client):
        for number in range(1, 4):
            assert await sync(client) == f"number {number}"
        assert fake.connections == 1
        client.close()
        assert await sync(client) == "number 4"
        assert fake.connections == 2


async def test_syncs_at_once_do_not_share_it(tmp_path: Path) -> None:
    async with disk(tmp_path) as (fake, client):
        fake.may.clear()
        tasks = [asyncio.create_task(sync(client)) for _ in range(3)]
        await fake.has(3)
        fake.may.set()
        assert sorted(await asyncio.gather(*tasks)) == ["number 1", "number 2", "number 3"]
        assert await sync(client) == "number 4"
        assert fake.connections == 3


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_late_answer_is_not_that_to_the_next_request(
    tmp_path: Path, cancelled: bool
) -> None:
    """It would say of a change that it is on the disk before it is."""
    async with disk(tmp_path, timeout=5.0 if cancelled else 0.2) as (fake, client):
        assert await sync(client) == "number 1"
        fake.may.clear()
        late = asyncio.create_task(client.sync_mail())
        await asyncio.sleep(0.1)
        if cancelled:
            late.cancel()
        await asyncio.wait({late})
        assert fake.asked == 2
        fake.may.set()
        assert await sync(client) == "number 3"
        assert await sync(client) == "number 4"
        assert fake.connections == 2


async def test_a_helper_that_was_restarted_is_asked_again(tmp_path: Path) -> None:
    async with disk(tmp_path) as (fake, client):
        assert await sync(client) == "number 1"
        fake.end()
        await asyncio.sleep(0.05)
        assert await sync(client) == "number 2"
        fake.may.clear()
        waiting = asyncio.create_task(sync(client))
        await fake.has(3)
        fake.end()  # before it has answered
        await fake.has(4)
        fake.may.set()
        assert await waiting == "number 4"
        assert fake.connections == 3


async def test_a_helper_that_ends_with_each_request_is_not_asked_for_ever(tmp_path: Path) -> None:
    async with disk(tmp_path) as (fake, client):
        fake.may.clear()
        waiting = asyncio.create_task(sync(client))
        await fake.has(1)
        fake.end()
        assert await waiting == "umbra-helper ended during sync-mail"
    assert "is umbra-helper.service running" in await sync(client)
