"""What this host's disks say."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from umbra.cluster.fitness import free_space


def test_each_file_system_is_looked_at_once_and_what_is_not_there_is_not_full(
    tmp_path: Path,
) -> None:
    (tmp_path / "queue").mkdir()
    found = free_space((tmp_path / "none", tmp_path, tmp_path / "queue"))
    assert list(found) == [str(tmp_path)]
    assert found[str(tmp_path)] > 0


@pytest.mark.parametrize(
    ("stats", "free"),
    [
        ({"f_bavail": 3, "f_favail": 5}, 3 * 4096),
        ({"f_bavail": 0, "f_favail": 5}, 0),
        ({"f_bavail": 3, "f_favail": 0}, 0),  # no inode is left
        ({"f_bavail": 3, "f_favail": 0, "f_files": 0}, 3 * 4096),  # it does not count them
        ({"f_bavail": 0, "f_favail": 0, "f_blocks": 0, "f_files": 0}, None),  # it has no limit
    ],
)
def test_what_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stats: dict[str, int], free: int | None
) -> None:
    said = SimpleNamespace(**{"f_frsize": 4096, "f_blocks": 10, "f_files": 10, **stats})
    monkeypatch.setattr(os, "statvfs", lambda path: said)
    assert free_space((tmp_path,)).get(str(tmp_path)) == free
