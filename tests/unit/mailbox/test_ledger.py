"""The ledger: durable when it says so, nothing forgotten by a kill."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from umbra.mailbox.ledger import Ledger

PACKAGE = Path(__file__).parents[3] / "roles/replication_agent/files"

WRITER = """
import asyncio, sys
from pathlib import Path
from umbra.mailbox.ledger import Ledger

async def main():
    ledger = Ledger(Path(sys.argv[1]))
    await ledger.open()
    async def one(number):
        user = f"user{number}@example.org"
        await ledger.flag("mail-b", [user])
        print("+", user, flush=True)
        if number % 3 == 0:
            ledger.keep("mail-b", user, "state")
            ledger.unflag("mail-b", user)
            print("-", user, flush=True)
    number = 0
    while True:
        await asyncio.gather(*(one(number + i) for i in range(10)))
        number += 10

asyncio.run(main())
"""


async def opened(path: Path) -> Ledger:
    ledger = Ledger(path)
    await ledger.open()
    return ledger


async def test_flags_survive_and_go(tmp_path: Path) -> None:
    ledger = await opened(tmp_path)
    await ledger.flag("mail-b", ["a@example.org", "b@example.org"])
    await ledger.flag("mail-c", ["a@example.org"])
    ledger.unflag("mail-b", "a@example.org")
    await ledger.close()
    ledger = await opened(tmp_path)
    assert ledger.changed("mail-b") == ["b@example.org"]
    assert ledger.changed("mail-c") == ["a@example.org"]
    await ledger.close()


async def test_flag_after_unflag_is_on_disk(tmp_path: Path) -> None:
    ledger = await opened(tmp_path)
    for _ in range(20):
        await ledger.flag("mail-b", ["a@example.org"])
        ledger.unflag("mail-b", "a@example.org")
    first = asyncio.create_task(ledger.flag("mail-b", ["a@example.org"]))
    await asyncio.sleep(0)
    ledger.unflag("mail-b", "a@example.org")
    await ledger.flag("mail-b", ["a@example.org"])
    rows = (
        sqlite3.connect(tmp_path / "ledger.sqlite").execute("SELECT user FROM changed").fetchall()
    )
    assert rows == [("a@example.org",)]
    await first
    await ledger.close()


async def test_one_transaction_for_all_that_wait(tmp_path: Path) -> None:
    ledger = await opened(tmp_path)
    commits = 0
    commit = ledger._commit

    def counting(*args: object) -> None:
        nonlocal commits
        commits += 1
        commit(*args)  # type: ignore[arg-type]

    ledger._commit = counting  # type: ignore[method-assign,assignment]
    await asyncio.gather(*(ledger.flag("mail-b", [f"u{n}@example.org"]) for n in range(500)))
    assert commits <= 3
    assert len(ledger.changed("mail-b")) == 500
    before = commits
    await asyncio.gather(*(ledger.flag("mail-b", [f"u{n}@example.org"]) for n in range(500)))
    assert commits == before, "a user who is flagged costs nothing"
    await ledger.close()


async def test_states_hold_for_one_binding(tmp_path: Path) -> None:
    ledger = await opened(tmp_path)
    assert ledger.binding("mail-b") == ""
    assert not await ledger.bind("mail-b", "one")
    assert ledger.binding("mail-b") == "one"
    ledger.keep("mail-b", "a@example.org", "s1")
    ledger.keep("mail-c", "a@example.org", "s2")
    await ledger.close()
    ledger = await opened(tmp_path)
    assert await ledger.bind("mail-b", "one")
    assert await ledger.state("mail-b", "a@example.org") == "s1"
    ledger.keep("mail-b", "b@example.org", "s3")
    assert not await ledger.bind("mail-b", "two")
    assert await ledger.state("mail-b", "a@example.org") == ""
    assert await ledger.state("mail-b", "b@example.org") == ""
    await ledger.close()
    ledger = await opened(tmp_path)
    assert await ledger.bind("mail-b", "two")
    assert await ledger.state("mail-b", "b@example.org") == ""
    assert await ledger.state("mail-c", "a@example.org") == "s2"
    ledger.keep("mail-c", "a@example.org", None)
    assert await ledger.state("mail-c", "a@example.org") == ""
    await ledger.close()


async def test_failing_disk_delays_the_answer(tmp_path: Path) -> None:
    ledger = await opened(tmp_path)
    commit, fail = ledger._commit, True

    def failing(*args: object) -> None:
        if fail:
            raise sqlite3.OperationalError("disk I/O error")
        commit(*args)  # type: ignore[arg-type]

    ledger._commit = failing  # type: ignore[method-assign,assignment]
    task = asyncio.create_task(ledger.flag("mail-b", ["a@example.org"]))
    await asyncio.sleep(0.2)
    assert not task.done()
    fail = False
    await asyncio.wait_for(task, 5)
    await ledger.close()
    assert (await opened(tmp_path)).changed("mail-b") == ["a@example.org"]


async def test_damaged_file_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database at all" * 1000)
    ledger = await opened(tmp_path)
    assert ledger.changed("mail-b") == []
    await ledger.flag("mail-b", ["a@example.org"])
    await ledger.close()
    assert (tmp_path / "ledger.sqlite.damaged").exists()


@pytest.mark.parametrize("lines", [1, 25, 400])
def test_killed(tmp_path: Path, lines: int) -> None:
    """After SIGKILL every flag that was reported durable is there, unless removal was asked for."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline().split() for _ in range(lines)]
        writer.send_signal(signal.SIGKILL)
        said += [line.split() for line in writer.stdout if line.endswith("\n")]
    assert all(len(item) == 2 for item in said)
    flagged = {user for sign, user in said if sign == "+"} - {
        user for sign, user in said if sign == "-"
    }
    # The last one may have been removed though its line was not printed any more.
    removable = {f"user{number}@example.org" for number in range(0, 100000, 3)}
    assert flagged

    async def check() -> None:
        ledger = await opened(tmp_path)
        assert flagged - removable <= set(ledger.changed("mail-b"))
        await ledger.close()

    asyncio.run(check())
