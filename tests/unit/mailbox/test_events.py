"""Dovecot's file of events, as 2.4.1 writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbra.mailbox import events as module
from umbra.mailbox.events import ScriptEvents


def line(user: str) -> bytes:
    return b'{"fields":{"user":"%s"}}\n' % user.encode()


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_each_event_is_taken_once(tmp_path: Path) -> None:
    path = tmp_path / "sieve"
    events = ScriptEvents(path)
    assert events.take() == set()
    append(path, line("a@example.org") + line("b@example.org") + line("a@example.org"))
    assert events.take() == {"a@example.org", "b@example.org"}
    assert events.take() == set()
    append(path, line("c@example.org")[:10])
    assert events.take() == set(), "a line that is being written"
    append(path, line("c@example.org")[10:])
    assert events.take() == {"c@example.org"}


def test_one_that_starts_reads_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "sieve"
    append(path, line("a@example.org"))
    assert ScriptEvents(path).take() == {"a@example.org"}


def test_a_large_file_is_emptied_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE", 50)
    path = tmp_path / "sieve"
    events = ScriptEvents(path)
    append(path, line("a@example.org") * 5)
    assert events.take() == {"a@example.org"}
    assert path.stat().st_size == 0
    append(path, line("b@example.org"))
    assert events.take() == {"b@example.org"}


def test_a_file_that_somebody_else_emptied(tmp_path: Path) -> None:
    path = tmp_path / "sieve"
    events = ScriptEvents(path)
    append(path, line("a@example.org") * 2)
    events.take()
    path.write_bytes(line("b@example.org"))
    assert events.take() == {"b@example.org"}


def test_nonsense_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "sieve"
    append(path, b'x\n{}\n[]\n{"fields":{}}\n{"fields":{"user":"-A"}}\n' + line("a@example.org"))
    append(path, b"[" * 50_000 + b"\n")
    assert ScriptEvents(path).take() == {"a@example.org"}


def test_what_is_kept_is_taken_later_and_the_file_does_not_grow_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE", 50)
    path = tmp_path / "sieve"
    events = ScriptEvents(path)
    append(path, line("a@example.org"))
    events.keep()
    assert path.stat().st_size > 0, "it stays there, should the agent die"
    append(path, line("b@example.org"))
    events.keep()
    assert path.stat().st_size == 0
    append(path, line("c@example.org"))
    events.keep()
    assert events.take() == {"a@example.org", "b@example.org", "c@example.org"}
    assert events.take() == set()
