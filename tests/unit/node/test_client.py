"""The order in which the helper is asked about the ports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from umbra.node.client import BATCH, NodeHelper
from umbra.node.helper import MAX_REQUEST


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
