"""The messages that are sent."""

import random
from itertools import islice
from pathlib import Path

import pytest
from roles.failover_test.files.failover_client import messages
from roles.failover_test.files.failover_client.canonical import split


@pytest.mark.parametrize("kind", messages.GENERATORS)
def test_every_kind_carries_its_id_first(kind: str) -> None:
    raw = messages.with_id("r-1", messages.GENERATORS[kind]("r-1", random.Random(1)))
    assert raw.startswith(b"X-Failover-Test-Id: r-1\r\n")
    fields, _body = split(raw.replace(b"\r\n", b"\n"))
    assert fields[0] == b"X-Failover-Test-Id: r-1\n"
    assert b"\0" not in raw


def test_kinds_are_what_they_say() -> None:
    made = {kind: make("r-1", random.Random(1)) for kind, make in messages.GENERATORS.items()}
    assert b"\r\n.\r\n" in made["dot lines"]
    assert max(made["8-bit"]) > 0x7F
    assert max(len(line) for line in made["long lines"].split(b"\r\n")) > 998
    assert b"\r" in made["bare CR and LF"].replace(b"\r\n", b"")
    assert b"\n" in made["bare CR and LF"].replace(b"\r\n", b"")
    assert made["empty body"].endswith(b"\r\n\r\n")
    assert b"\r\n\r\n" not in made["header only"]


def test_big_message_has_about_the_size() -> None:
    assert 0.98 < len(messages.big("r-big", 1_000_000).raw) / 1_000_000 < 1.02


def test_stream_is_the_same_each_time_and_ids_are_unique() -> None:
    first = list(islice(messages.stream("r", 0, []), 30))
    assert first == list(islice(messages.stream("r", 0, []), 30))
    other = list(islice(messages.stream("r", 1, []), 30))
    assert len({message.id for message in first + other}) == 60
    assert {message.kind for message in first} == set(messages.GENERATORS)


def test_four_workers_show_all_samples() -> None:
    samples = [(f"{number}", b"A: 1\r\n") for number in range(50)]
    shown = {
        message.kind
        for worker in range(4)
        for message in islice(messages.stream("r", worker, samples), 100)
        if message.kind.startswith("sample ")
    }
    assert len(shown) == 50


def test_samples(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "unix").write_bytes(b"A: 1\n\nx\n")
    (tmp_path / "mbox").write_bytes(b"From a@b Mon Jan  1\nA: 1\n\nFrom here\n")
    (tmp_path / "crlf").write_bytes(b"A: 1\r\n\r\nx\ny\r\n")
    (tmp_path / "nul").write_bytes(b"A: 1\n\n\0\n")
    (tmp_path / "empty").write_bytes(b"")
    assert messages.load_samples(tmp_path) == [
        ("crlf", b"A: 1\r\n\r\nx\ny\r\n"),
        ("mbox", b"A: 1\r\n\r\nFrom here\r\n"),
        ("sub/unix", b"A: 1\r\n\r\nx\r\n"),
    ]


def test_no_samples() -> None:
    assert messages.load_samples(None) == []
    assert messages.load_samples(Path("/nonexistent")) == []
