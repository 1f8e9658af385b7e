"""Seedings outlive the agent; the pace is kept, and given up at once when it shall be."""

from __future__ import annotations

import asyncio
from pathlib import Path
from time import monotonic

import pytest

from umbra.document import DocumentError
from umbra.mailbox.seeding import Pacer, Seed, Seeds, rate_of


def test_they_are_on_disk(tmp_path: Path) -> None:
    one = Seeds(tmp_path)
    one.load()
    assert not one.rows
    one.put("mail-b", None)
    assert not (tmp_path / "seeding.json").exists()
    one.put("mail-b", Seed("2026-01-01", 5e6))
    one.put("mail-b", Seed("2026-01-01", 0.0))
    two = Seeds(tmp_path)
    two.load()
    assert two.rows == {"mail-b": Seed("2026-01-01", 0.0)}
    two.put("mail-b", None)
    one.load()
    assert not one.rows


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"rate": 1}}', "{"])
def test_a_damaged_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "seeding.json").write_text(text)
    with pytest.raises(DocumentError, match=r"seeding\.json"):
        Seeds(tmp_path).load()


async def test_the_rate_holds_for_all_streams_together() -> None:
    pacer = Pacer(lambda: 1e6)
    started = monotonic()

    async def stream() -> None:
        for _ in range(5):
            await pacer.spend(20_000)

    await asyncio.gather(*(stream() for _ in range(4)))
    assert pacer.sent == 400_000
    assert 0.37 <= monotonic() - started < 0.8


async def test_without_a_rate_nobody_waits() -> None:
    pacer = Pacer(lambda: 0.0)
    async with asyncio.timeout(0.2):
        for _ in range(100):
            await pacer.spend(10**9)


async def test_who_waits_goes_on_when_the_rate_is_lifted() -> None:
    rate = 1.0
    pacer = Pacer(lambda: rate)
    await pacer.spend(1000)
    task = asyncio.create_task(pacer.spend(1))
    await asyncio.sleep(0.01)
    assert not task.done()
    rate = 0.0
    async with asyncio.timeout(1):
        await task


def test_a_rate_is_refused_in_the_unit_that_was_typed() -> None:
    assert (rate_of(0), rate_of(100_000), rate_of(5e6)) == (0.0, 100_000.0, 5e6)
    for little in (50_000.0, -1, float("nan")):
        with pytest.raises(ValueError, match=r"at least 0\.1 MB/s$"):
            rate_of(little)
    for wrong in (True, "5", None):
        with pytest.raises(ValueError, match="must be a number"):
            rate_of(wrong)
