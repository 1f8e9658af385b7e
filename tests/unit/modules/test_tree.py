"""The module tree: a directory of program files is replaced as a whole."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from ansible_collections.umbra.mail.plugins.modules import tree

OLD: tree.Files = {"a.py": (b"old", 0o644), "gone/b.py": (b"b", 0o644)}
NEW: tree.Files = {"a.py": (b"new", 0o644), "sub/c.py": (b"c", 0o644)}


def test_files_are_there_and_stale_ones_are_gone(tmp_path: Path) -> None:
    dest = str(tmp_path / "umbra")
    tree.publish(dest, OLD)
    tree.publish(dest, NEW)
    assert tree.found(dest) == NEW
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == [".umbra", "umbra"]


def test_a_crash_leaves_the_old_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dest = str(tmp_path / "umbra")
    tree.publish(dest, OLD)

    def crash() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(tree.os, "sync", crash)
        with pytest.raises(KeyboardInterrupt):
            tree.publish(dest, NEW)
    assert tree.found(dest) == OLD
    tree.publish(dest, NEW)
    assert tree.found(dest) == NEW
    assert len(list(tmp_path.iterdir())) == 2


def test_the_bytecode_cache_and_a_missing_directory_count_for_nothing(tmp_path: Path) -> None:
    assert tree.found(str(tmp_path / "none")) == {}
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").touch()
    assert tree.found(str(tmp_path)) == {}


def test_modes_are_the_modules_own(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_bytes(b"new")
    (tmp_path / "src" / "a.py").chmod(0o600)
    with tarfile.open(tmp_path / "tree.tar", "w") as tar:
        tar.add(tmp_path / "src", arcname="")
    assert tree.wanted(str(tmp_path / "tree.tar")) == {"a.py": (b"new", 0o644)}


def test_the_diff_names_each_file_that_differs() -> None:
    rows = tree.difference("/usr/lib/umbra/umbra", OLD, NEW)
    assert [(row["before_header"], row["after_header"]) for row in rows] == [
        ("/usr/lib/umbra/umbra/a.py (mode 0644)", "/usr/lib/umbra/umbra/a.py (mode 0644)"),
        ("/usr/lib/umbra/umbra/gone/b.py (mode 0644)", "/dev/null"),
        ("/dev/null", "/usr/lib/umbra/umbra/sub/c.py (mode 0644)"),
    ]
    assert tree.changed_names(OLD, NEW) == ["a.py"]
