"""Suspensions outlive the agent, and a damaged file is not taken for none."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbra.document import DocumentError
from umbra.mailbox.suspension import Suspensions


def test_they_are_on_disk(tmp_path: Path) -> None:
    one = Suspensions(tmp_path)
    one.load()
    assert not one.group
    assert not one.users
    one.suspend("", "line is repaired", "2026-01-01")
    one.suspend("a@example.org", "moves", "2026-01-02")
    one.suspend("a@example.org", "moves still", "2026-01-03")
    two = Suspensions(tmp_path)
    two.load()
    assert two.group
    assert two.users == {"a@example.org"}
    group, user = two.sentences("mail-a")
    assert group == (
        "the mirror of all mailboxes is suspended since 2026-01-01 (line is repaired):"
        " their changes are only on mail-a until it is resumed"
    )
    assert "a@example.org is suspended since 2026-01-02 (moves still)" in user
    assert two.resume("")
    assert not two.resume("")
    one.load()
    assert not one.group
    assert one.users == {"a@example.org"}


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"reason": "x"}}', "{"])
def test_a_damaged_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "suspended.json").write_text(text)
    with pytest.raises(DocumentError, match=r"suspended\.json"):
        Suspensions(tmp_path).load()
