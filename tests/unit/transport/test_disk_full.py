"""A disk that is full in the middle of writes: on a real, small file system (root needed)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MOUNT = 'mount -t "$0" -o "$1" "$2" "$3" && exec "$4" -m tests.unit.transport.disk_full_writer "$3"'


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")
@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_nothing_that_was_acknowledged_is_lost(tmp_path: Path, kind: str) -> None:
    mount, image = tmp_path / "mount", tmp_path / "image"
    mount.mkdir()
    options = "size=72m"
    if kind == "ext4":
        options = "loop"
        with image.open("wb") as file:
            file.truncate(72 << 20)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
    # In a mount namespace of its own: whatever happens, nothing stays mounted.
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", MOUNT, kind, options, image, mount, sys.executable],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}/roles/replication_agent/files:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["at_full"] > 20
    assert found["refused"] > 100
    assert found["in_the_middle"] > 20
    assert found["unacknowledged"] == 0
    assert found["strays"] == 0
