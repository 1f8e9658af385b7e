"""Changes mailboxes as fast as it can, or at a pace, and tells how long each change took.

Run on a mail host by the benchmark; standard library only. The plan is JSON on standard input:

``imap``: port on 127.0.0.1; ``lmtp``: socket; ``users``, ``password``; ``clients``: how many, user
by user in turn; ``operations``: of ``append``, ``store``, ``move``, ``lmtp``; ``seconds``: of each;
``size``: bytes of a message. With ``count`` and ``pace`` every client makes that many changes, so
many seconds apart. ``mailbox``: change this one, which is there, and leave it there. ``tour``:
deliver once to every user, and nothing else.

Prints JSON ``{operation: {"seconds": S, "changes": [[begun, answered], ...]}}``: all on the
monotonic clock, the same on every host of a lab.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

LIMIT = 200.0
KEPT = 100  # messages in the mailbox that STORE and MOVE work on


class Imap:
    """One session."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._number = 0

    @classmethod
    async def login(cls, port: int, user: str, password: str) -> Imap:
        """Connect and log in."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        session = cls(reader, writer)
        if not (await reader.readline()).startswith(b"* OK"):
            raise SystemExit("no IMAP server greets")
        await session.do(f'LOGIN "{user}" "{password}"')
        return session

    async def do(
        self, command: str, literal: bytes = b"", *, may_fail: bool = False
    ) -> list[bytes]:
        """Run a command and return the untagged lines."""
        self._number += 1
        tag = b"a%d" % self._number
        end = b" {%d+}\r\n%b\r\n" % (len(literal), literal) if literal else b"\r\n"
        self._writer.write(b"%b %b%b" % (tag, command.encode(), end))
        lines = []
        while not (line := await self._reader.readline()).startswith(tag + b" "):
            if not line:
                raise SystemExit(f"the server hung up after {command}")
            lines.append(line)
        if not may_fail and not line.startswith(tag + b" OK"):
            raise SystemExit(f"{command}: {line!r}")
        return [*lines, line]


class Client:
    """One client: sessions, a mailbox of its own, and one change after the other."""

    def __init__(self, plan: dict[str, Any], number: int) -> None:
        self._plan = plan
        self._user = plan["users"][number % len(plan["users"])]
        self._own = "mailbox" not in plan
        self._mailbox = plan.get("mailbox", f"bench{number}")
        self._other = f"moved{number}"
        text = b"Subject: bench\r\nFrom: <bench@example.net>\r\n\r\n"
        self._message = text + (b"x" * 70 + b"\r\n") * ((plan["size"] - len(text)) // 72)
        self._tour: list[str] = plan["users"][number :: plan["clients"]] if plan.get("tour") else []
        self._imap: Imap

    async def prepare(self) -> None:
        """Make the mailboxes as they are to be, whatever an earlier run has left."""
        if self._tour:
            return
        self._imap = await Imap.login(self._plan["imap"], self._user, self._plan["password"])
        if not self._own:
            await self._imap.do(f"SELECT {self._mailbox}")
            return
        for name in (self._mailbox, self._other):
            await self._imap.do(f"DELETE {name}", may_fail=True)
            await self._imap.do(f"CREATE {name}")
        await self._imap.do(f"APPEND {self._mailbox}", self._message)
        await self._imap.do(f"SELECT {self._mailbox}")
        kept = 1
        while kept < KEPT:
            more = min(kept, KEPT - kept)
            await self._imap.do(f"COPY 1:{more} {self._mailbox}")
            kept += more

    def changes(self, operation: str) -> AsyncIterator[None]:
        """Each step is one change."""
        return {
            "append": self._append,
            "store": self._store,
            "move": self._move,
            "lmtp": self._lmtp,
        }[operation]()

    async def _append(self) -> AsyncIterator[None]:
        yield
        while True:
            await self._imap.do(f"APPEND {self._mailbox}", self._message)
            yield

    async def _store(self) -> AsyncIterator[None]:
        await self._imap.do("NOOP")
        yield
        for number in itertools.count():
            # Message by message, so that a watcher on the other side knows which change it sees.
            sign, message = "+-"[number // KEPT % 2], number % KEPT + 1
            await self._imap.do(f"STORE {message} {sign}FLAGS.SILENT (\\Flagged)")
            yield

    async def _move(self) -> AsyncIterator[None]:
        here, there, left = self._mailbox, self._other, await self._select(self._mailbox)
        yield
        while True:
            if not left:
                here, there = there, here
                left = await self._select(here)
            await self._imap.do(f"MOVE 1 {there}")
            left -= 1
            yield

    async def _select(self, mailbox: str) -> int:
        lines = b"".join(await self._imap.do(f"SELECT {mailbox}"))
        found = re.search(rb"\* (\d+) EXISTS", lines)
        assert found
        return int(found[1])

    async def _lmtp(self) -> AsyncIterator[None]:
        reader, writer = await asyncio.open_unix_connection(self._plan["lmtp"])

        async def say(data: bytes, code: bytes) -> None:
            if data:
                writer.write(data)
            while True:
                reply = await reader.readline()
                if not reply.startswith(code):
                    raise SystemExit(f"LMTP: {data[:40]!r} was answered {reply!r}")
                if reply[3:4] == b" ":
                    return

        await say(b"", b"220")
        await say(b"LHLO bench.example.net\r\n", b"250")
        yield
        for user in self._tour or itertools.repeat(self._user):
            await say(b"MAIL FROM:<bench@example.net>\r\n", b"250")
            await say(b"RCPT TO:<%b>\r\n" % user.encode(), b"250")
            await say(b"DATA\r\n", b"354")
            await say(self._message + b".\r\n", b"250")
            yield


async def main(plan: dict[str, Any]) -> dict[str, Any]:
    """All clients prepare, begin together, and stop when the time is up or all is done."""
    clients = [Client(plan, number) for number in range(plan["clients"])]
    # In turn: what they prepare is no load.
    for client in clients:
        await client.prepare()
    return {name: await _measure(plan, clients, name) for name in plan["operations"]}


async def _measure(plan: dict[str, Any], clients: list[Client], name: str) -> dict[str, Any]:
    changes: list[tuple[float, float]] = []
    steps = [client.changes(name) for client in clients]
    for step in steps:
        await anext(step)
    # What the preparation has set going shall be over.
    await asyncio.sleep(plan.get("rest", 0.2))
    started = time.monotonic()
    count, pace = plan.get("count", 0), plan.get("pace", 0.0)

    async def work(step: AsyncIterator[None]) -> None:
        for number in itertools.count():
            if count and number == count:
                return
            if pace:
                await asyncio.sleep(started + (number + 1) * pace - time.monotonic())
            begun = time.monotonic()
            if not count and begun - started >= plan["seconds"]:
                return
            if await anext(step, True):
                return  # this client has seen all its users
            changes.append((begun, time.monotonic()))

    await asyncio.gather(*map(work, steps))
    took = max(answered for _, answered in changes) - started
    return {"seconds": took, "changes": [[round(t, 6) for t in change] for change in changes]}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(asyncio.wait_for(main(json.load(sys.stdin)), LIMIT))))
