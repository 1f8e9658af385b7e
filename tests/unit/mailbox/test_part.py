"""The names that Dovecot's script leaves."""

from __future__ import annotations

from pathlib import Path

from umbra.mailbox.part import _take_names


def test_names_are_taken_once(tmp_path: Path) -> None:
    for name in ("a@example.org", "J%C3%BCrgen%20x@example.org"):
        (tmp_path / name).touch()
    assert sorted(_take_names(tmp_path)) == ["Jürgen x@example.org", "a@example.org"]
    assert _take_names(tmp_path) == []
