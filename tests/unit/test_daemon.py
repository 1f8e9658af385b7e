"""The agent as a whole: what its parts do together that none does alone."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from umbra import daemon
from umbra.daemon import sole


async def test_a_report_that_fails_is_told_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    faults: list[Exception | None] = [None, ValueError("odd"), ValueError("odd"), None]

    def alive(status: str) -> None:
        said.append(status)
        if len(said) == 1:
            raise OSError("systemd is busy")

    def report() -> Any:
        if (fault := faults.pop(0)) is not None:
            raise fault
        return SimpleNamespace(protected=False, reasons=("b is lost",))

    monkeypatch.setattr(daemon, "alive", alive)
    monkeypatch.setattr(daemon, "watchdog_interval", lambda: 0.001)
    composer = SimpleNamespace(report=report, node_status=lambda: {"state": "primary"})
    agent = cast(Any, SimpleNamespace(_composer=composer))
    agent._state = lambda: daemon.Agent._state(agent)
    caplog.set_level(logging.WARNING)
    watchdog = asyncio.create_task(daemon.Agent._watchdog(agent))
    async with asyncio.timeout(5):
        while len(said) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    watchdog.cancel()
    await asyncio.gather(watchdog, return_exceptions=True)
    assert said[0] == said[3] == "primary, degraded: b is lost"
    assert said[1] == said[2] == "no report can be made: ValueError('odd')"
    assert caplog.text.count("Traceback") == 1
    assert "systemd is busy" in caplog.text


def test_two_agents_never_share_a_node(tmp_path: Path) -> None:
    """One that a disk keeps from ending has the ports still, and systemd starts the next."""
    with sole(tmp_path), pytest.raises(OSError, match="another agent"), sole(tmp_path):
        pass
    with sole(tmp_path):
        pass
