"""The names that Dovecot's script leaves, and the permit to leave them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from umbra.mailbox import notes
from umbra.mailbox.notes import Notes, rest


def uptime() -> float:
    return float(notes.UPTIME.read_text().split()[0])


def test_names_are_taken_once(tmp_path: Path) -> None:
    for name in ("a@example.org", "J%C3%BCrgen%20x@example.org"):
        (tmp_path / name).touch()
    names = Notes(tmp_path, tmp_path / "permit")
    assert sorted(names.take()) == ["Jürgen x@example.org", "a@example.org"]
    assert names.take() == []


def test_an_odd_name_is_told_and_what_the_script_did_not_write_left_out(tmp_path: Path) -> None:
    for name in (b"a@example.org", b"raw\xff@example.org", b"-u", b"tab%09@example.org"):
        (tmp_path / os.fsdecode(name)).touch()
    names = Notes(tmp_path, tmp_path / "permit")
    assert sorted(names.take()) == ["-u", "a@example.org", "tab\t@example.org"]
    assert names.take() == []


def test_a_permit_holds_for_a_while(tmp_path: Path) -> None:
    permit = tmp_path / "unasked"
    Notes(tmp_path, permit).permit()
    till = float(permit.read_text())
    assert uptime() < till <= uptime() + notes.PERMIT
    assert permit.stat().st_mode & 0o777 == 0o644, "Dovecot's processes cannot read it"
    assert list(tmp_path.iterdir()) == [permit]


def test_who_forbids_hears_how_long_the_permit_still_holds(tmp_path: Path) -> None:
    permit = tmp_path / "unasked"
    mine = Notes(tmp_path, permit)
    assert mine.forbid() == 0.0
    mine.permit()
    assert 0.5 < mine.forbid() <= notes.PERMIT
    assert not permit.exists()


@pytest.mark.parametrize(
    ("took", "seconds"),
    [
        (0.0, notes.SHORTEST),
        (0.01, notes.SHORTEST),
        (0.16, 1.44),
        (0.5, 1.5),
        (2.0, notes.SHORTEST),
    ],
)
def test_copying_leaves_the_machine_to_its_users(took: float, seconds: float) -> None:
    assert rest(took) == pytest.approx(seconds)


def test_what_cannot_be_removed_is_passed_by_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its user is known: each look may mean a change of his that is new."""
    for name in ("a@example.org", "stays@example.org", "z@example.org"):
        (tmp_path / name).touch()
    (tmp_path / "folder@example.org").mkdir()
    remove = os.unlink

    def unlink(path: str) -> None:
        if "stays" in path:
            raise PermissionError(1, "Operation not permitted")
        remove(path)

    monkeypatch.setattr(os, "unlink", unlink)
    names = Notes(tmp_path, tmp_path / "permit")
    assert sorted(names.take()) == ["a@example.org", "stays@example.org", "z@example.org"]
    for _ in range(3):
        assert names.take() == []
        assert names.stuck == ["stays@example.org"]
    assert caplog.text.count("Operation not permitted") == 1
    (tmp_path / "stays@example.org").write_text(".")  # Dovecot's script adds to it
    assert names.take() == ["stays@example.org"]
    assert names.take() == []
    assert caplog.text.count("'folder@example.org' in") == 2, "that it stays, and is no note"
    monkeypatch.undo()
    names.take()
    assert names.stuck == []


def test_a_directory_that_ends_to_be_readable_loses_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a@example.org", "b@example.org"):
        (tmp_path / name).touch()
    scan = os.scandir

    @contextmanager
    def failing(path: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
        def entries() -> Iterator[os.DirEntry[str]]:
            with scan(path) as found:
                yield next(found)
            raise OSError(5, "Input/output error")

        yield entries()

    monkeypatch.setattr(os, "scandir", failing)
    names = Notes(tmp_path, tmp_path / "permit")
    with pytest.raises(OSError, match="Input/output"):
        names.take()
    monkeypatch.undo()
    assert sorted(names.take()) == ["a@example.org", "b@example.org"]
