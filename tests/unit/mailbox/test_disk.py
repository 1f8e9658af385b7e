"""One wait for the disk serves all who ask, and none who asks too late."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from umbra.mailbox import disk as module
from umbra.mailbox.disk import MailDisk


class Disk:
    """Counts; each sync takes until ``go`` is given once."""

    def __init__(self) -> None:
        self.begun = 0
        self.errors: list[OSError] = []
        self.go = asyncio.Semaphore(0)

    async def sync(self) -> None:
        self.begun += 1
        await self.go.acquire()
        if self.errors:
            raise self.errors.pop()


async def test_who_comes_while_one_runs_waits_for_the_next() -> None:
    disk = Disk()
    mail = MailDisk(disk.sync)
    first = asyncio.create_task(mail.settle())
    await asyncio.sleep(0.01)
    others = [asyncio.create_task(mail.settle()) for _ in range(5)]
    await asyncio.sleep(0.01)
    assert disk.begun == 1
    disk.go.release()
    await asyncio.wait_for(first, 1)
    await asyncio.sleep(0.01)
    assert disk.begun == 2
    assert not any(task.done() for task in others)
    disk.go.release()
    await asyncio.wait_for(asyncio.gather(*others), 1)
    assert disk.begun == 2


async def test_a_disk_that_refuses_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RETRY", 0.01)
    disk = Disk()
    disk.errors = [OSError(28, "No space left on device")]
    mail = MailDisk(disk.sync)
    disk.go.release()
    disk.go.release()
    await asyncio.wait_for(mail.settle(), 1)
    assert disk.begun == 2
    assert "No space left on device" in caplog.text


async def test_who_goes_away_takes_nobody_along() -> None:
    disk = Disk()
    mail = MailDisk(disk.sync)
    gone, stays = (asyncio.create_task(mail.settle()) for _ in range(2))
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.sleep(0.01)
    disk.go.release()
    await asyncio.wait_for(stays, 1)


async def test_close_ends_what_waits() -> None:
    disk = Disk()
    mail = MailDisk(disk.sync)
    waiting = asyncio.create_task(mail.settle())
    await asyncio.sleep(0.01)
    await asyncio.wait_for(mail.close(), 1)
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_room_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mail = MailDisk(Disk().sync, tmp_path)
    assert await mail.full() == ""
    monkeypatch.setattr(module, "ROOM", 1 << 62)
    assert await mail.full() == "", "what was seen a moment ago"
    assert "MiB left" in mail.full_now()
    assert "MiB left" in await mail.full()
    monkeypatch.setattr(module, "FRESH", 0.0)
    monkeypatch.setattr(module, "ROOM", 0)
    assert await mail.full() == ""
    assert "No such file" in await MailDisk(Disk().sync, tmp_path / "none").full()


async def test_a_disk_that_hangs_hangs_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the loop nor more than one of the threads."""
    begun: list[Path] = []
    go = threading.Event()

    def hang(path: Path) -> int:
        begun.append(path)
        go.wait(5)
        return 1 << 40

    monkeypatch.setattr(module, "room", hang)
    mail = MailDisk(Disk().sync)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await mail.full()
    waiting = [asyncio.create_task(mail.full()) for _ in range(3)]
    await asyncio.sleep(0.02)
    go.set()
    assert await asyncio.gather(*waiting) == [""] * 3
    assert len(begun) == 1
