"""Which processes belong to a lab, seen while they move."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab.umbra_lab import cgroups

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="cgroups are made by root")


@pytest.fixture
def group() -> Iterator[str]:
    name = f"umbra-lab-test-{os.getpid()}"
    cgroups.make(name)
    yield name
    cgroups.kill(name)
    assert not (cgroups.root() / name).exists()


def test_a_process_that_moves_below_is_never_missed(group: str) -> None:
    """A host that booted was taken for one without a process: systemd moves to new cgroups."""
    process = subprocess.Popen(["sleep", "60"])
    done = threading.Event()

    def move() -> None:
        last: Path | None = None
        for turn in range(2000):
            place = cgroups.make(f"{group}/{turn % 2}")
            (place / "cgroup.procs").write_text(str(process.pid))
            if last is not None:
                last.rmdir()
            last = place
        done.set()

    try:
        (cgroups.make(group) / "cgroup.procs").write_text(str(process.pid))
        thread = threading.Thread(target=move)
        thread.start()
        looks = [cgroups.is_populated(group)]
        while not done.is_set():
            looks.append(cgroups.is_populated(group))
        thread.join()
    finally:
        cgroups.kill(group)
        process.wait(5)
    assert all(looks)
    assert len(looks) > 100
    assert not cgroups.is_populated(group), "nor is what is gone"
