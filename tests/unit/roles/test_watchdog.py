"""A watchdog that a run has written down and did not live to arm is armed by the next one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.roles.stage import Stage


@pytest.mark.parametrize(("seconds", "calls"), [(0, 1), (30, 0), (31, 1)])
def test_the_watchdog(tmp_path: Path, seconds: int, calls: int) -> None:
    stage = Stage(tmp_path, "replication_agent")
    (tmp_path / "etc/systemd/system").mkdir(parents=True)
    stage.program("bin/busctl", f"echo t {seconds}000000")
    stage.program("bin/systemctl", "")
    variables = {"replication_agent_watchdog": 30}
    code, text = stage.play(["a"], ["stonith"], variables)
    assert code == 0, text
    assert len(stage.calls("daemon-reload")) == 1  # the file is new
    code, text = stage.play(["a"], ["stonith"], variables)
    assert code == 0, text
    assert len(stage.calls("daemon-reload")) == calls
