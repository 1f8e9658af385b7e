"""The ledger: durable when it says so, nothing forgotten by a kill."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from umbra.mailbox.dropped import Dropped
from umbra.mailbox.ledger import Ledger

PACKAGE = Path(__file__).parents[3] / "roles/replication_agent/files"

WRITER = """
import asyncio, sys
from pathlib import Path
from umbra.mailbox.ledger import Ledger

async def main():
    ledger = Ledger(Path(sys.argv[1]), Path(sys.argv[1]))
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
    ledger = Ledger(path, path)
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


async def test_a_file_with_damage_in_the_middle_is_set_aside(tmp_path: Path) -> None:
    """It would be met by some sync later, and again by each agent that starts after that."""
    ledger = await opened(tmp_path)
    for number in range(2000):
        ledger.keep("mail-b", f"u{number}@example.org", "state" * 20)
    await ledger.close()
    path = tmp_path / "ledger.sqlite"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8192] = b"\xff" * 8192
    path.write_bytes(content)
    ledger = await opened(tmp_path)
    assert await ledger.state("mail-b", "u1000@example.org") == ""
    await ledger.close()
    assert (tmp_path / "ledger.sqlite.damaged").exists()


async def test_a_failed_commit_brings_no_state_back(tmp_path: Path) -> None:
    ledger = await opened(tmp_path)
    await ledger.bind("mail-b", "one")
    ledger.keep("mail-b", "a@example.org", "old")
    await ledger.flag("mail-b", ["other@example.org"])
    commit, begun, go_on = ledger._commit, threading.Event(), threading.Event()

    def failing(*args: object) -> None:
        begun.set()
        go_on.wait(10)
        ledger._commit = commit  # type: ignore[method-assign]
        raise sqlite3.OperationalError("disk full")

    ledger._commit = failing  # type: ignore[method-assign,assignment]
    ledger.keep("mail-b", "a@example.org", None)
    ledger.keep("mail-b", "b@example.org", "of one")
    flagged = asyncio.create_task(ledger.flag("mail-b", ["a@example.org"]))
    await asyncio.to_thread(begun.wait, 10)
    dropped = asyncio.create_task(ledger.state("mail-b", "a@example.org"))
    bound = asyncio.create_task(ledger.bind("mail-b", "two"))
    await asyncio.sleep(0.05)
    go_on.set()
    assert await dropped == ""
    assert not await bound
    await flagged
    await ledger.close()
    ledger = await opened(tmp_path)
    assert await ledger.state("mail-b", "b@example.org") == ""
    await ledger.close()


@pytest.mark.parametrize("lines", [3, 25, 400])  # the first two are of a flag that is removed
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


DROPPER = """
import asyncio, sys
from pathlib import Path
from umbra.mailbox.ledger import Ledger

async def main():
    ledger = Ledger(Path(sys.argv[1]), Path(sys.argv[2]))
    await ledger.open()
    for user in ("a@example.org", "b@example.org", "c@example.org"):
        ledger.keep("mail-b", user, "s1")
    await ledger.flag("mail-b", ["a@example.org"])  # the states are on disk with it
    ledger.keep("mail-b", "a@example.org", None)
    ledger.keep("mail-b", "b@example.org", None)
    ledger.keep("mail-b", "b@example.org", "s2")  # a sync that ended well
    print("dropped", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def drop_and_die(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DROPPER, str(path / "disk"), str(path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        text=True,
    ) as dropper:
        assert dropper.stdout is not None
        assert dropper.stdout.readline() == "dropped\n"
        dropper.send_signal(signal.SIGKILL)


async def states(path: Path) -> list[str]:
    ledger = Ledger(path / "disk", path)
    await ledger.open()
    found = [await ledger.state("mail-b", f"{name}@example.org") for name in "abc"]
    await ledger.close()
    return found


def test_a_dropped_state_does_not_come_back_with_kill_9(tmp_path: Path) -> None:
    """Nor one that followed it and was not written yet: that is the older one on disk."""
    drop_and_die(tmp_path)
    assert asyncio.run(states(tmp_path)) == ["", "", "s1"]
    assert asyncio.run(states(tmp_path)) == ["", "", "s1"]


def test_a_record_that_cannot_be_read_drops_all(tmp_path: Path) -> None:
    drop_and_die(tmp_path)
    with (tmp_path / "dropped.0").open("ab") as record:
        record.write(b'["mail-b", "c@exam')
    assert asyncio.run(states(tmp_path)) == ["", "", ""]


async def test_what_was_dropped_is_noted_until_it_is_written(tmp_path: Path) -> None:
    """Also while the disk fails, and what comes in the middle of a commit waits for the next."""
    ledger = await opened(tmp_path)
    commit, fails = ledger._commit, 2

    def failing(*args: object) -> None:
        nonlocal fails
        ledger._dropped.note(("mail-b", f"during{fails}"))
        if fails:
            fails -= 1
            raise sqlite3.OperationalError("disk I/O error")
        commit(*args)  # type: ignore[arg-type]

    def noted() -> set[str]:
        other = Dropped(tmp_path)
        found = other.open()
        other.close()
        assert found is not None
        return {user for _, user in found}

    ledger._commit = failing  # type: ignore[method-assign,assignment]
    ledger.keep("mail-b", "a", None)
    assert noted() == {"a"}
    for number in range(2):
        with pytest.raises(sqlite3.OperationalError):
            await ledger._write()
        ledger.keep("mail-b", f"after{number}", None)
    assert noted() == {"a", "during2", "after0", "during1", "after1"}
    await ledger._write()
    assert "a" not in noted()
    assert noted() >= {"during0"}
    await ledger._write()
    await ledger._write()
    assert noted() == {"during0"}
    await ledger.close()
