"""What is compared of a message: what the transport changes is no difference, all else is."""

import pytest
from roles.failover_test.files.failover_client import canonical

TRACE = (
    b"Return-Path: <a@example.com>\r\nDelivered-To: b@example.org\r\n"
    b"Received: from x\r\n\tby y (z)\r\n for w; now\r\nX-Umbra-Id: 1-2-3\r\n"
)


def same(one: bytes, other: bytes) -> bool:
    return canonical.digest(one) == canonical.digest(other)


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        (b"A: 1\r\n\r\nx\r\n", TRACE + b"A: 1\r\n\r\nx\r\n"),
        (b"A: 1\r\n\r\nno end", b"A: 1\r\n\r\nno end\r\n"),
        (b"A: 1\r\n\r\nx\n", b"A: 1\r\n\r\nx\r\n\r\n"),  # a bare LF ends a line, CRLF.CRLF the mail
        (b"A: 1\r\n\r\nx\ry\r\n", b"A: 1\r\n\r\nx y\r\n"),
        (b"A: 1\r\n\r\nx\r\r\n", b"A: 1\r\n\r\nx \r\n"),
        (b"A: 1\r\n\r\nx\ny\r\n", b"A: 1\r\n\r\nx\r\ny\r\n"),
        (b"A: 1\r\nBcc: c@example.org\r\n\r\nx\r\n", b"A: 1\r\n\r\nx\r\n"),
        (b"A: 1\r\nreceived: old\r\n\r\nx\r\n", b"A: 1\r\n\r\nx\r\n"),
        # Postfix ends a broken header by an empty line.
        (b"A: 1\r\nbroken\r\nB: 2\r\n\r\nx\r\n", b"A: 1\r\n\r\nbroken\r\nB: 2\r\n\r\nx\r\n"),
        (b"A: 1\r\n", TRACE + b"A: 1\r\n\r\n"),
    ],
)
def test_what_the_transport_does_is_no_difference(sent: bytes, stored: bytes) -> None:
    assert same(sent, stored)


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        (b"A: 1\r\n\r\nx\r\n", b"A: 1\r\n\r\ny\r\n"),
        (b"A: 1\r\n\r\nx\r\n", b"A: 2\r\n\r\nx\r\n"),
        (b"A: 1\r\n\r\nx\r\n", b"A:  1\r\n\r\nx\r\n"),
        (b"A: 1\r\n\r\nx\r\n", b"a: 1\r\n\r\nx\r\n"),
        (b"A: 1\r\nB: 2\r\n\r\nx\r\n", b"B: 2\r\nA: 1\r\n\r\nx\r\n"),
        (b"A: 1\r\n\r\nx\r\n", b"A: 1\r\n\r\nx\r\n\r\n"),
        (b"A: 1\r\n\r\nx \r\n", b"A: 1\r\n\r\nx\r\n"),
        (b"A: 1\r\n\r\n.x\r\n", b"A: 1\r\n\r\nx\r\n"),
        (b"A: 1\r\n\r\n\xff\r\n", b"A: 1\r\n\r\n?\r\n"),
        (b"A: 1\r\n\r\nxxxx\r\n", b"A: 1\r\n\r\nxx\r\n xx\r\n"),
        (b"A: 1\r\n 2\r\n\r\nx\r\n", b"A: 1 2\r\n\r\nx\r\n"),
        (b"A: 1\r\n\r\nReceived: x\r\n", b"A: 1\r\n\r\n"),
    ],
)
def test_everything_else_is_one(sent: bytes, stored: bytes) -> None:
    assert not same(sent, stored)


def test_split_keeps_folded_lines_together() -> None:
    fields, body = canonical.split(b"A: 1\n 2\n\t3\nB: 4\n\nbody\n")
    assert fields == [b"A: 1\n 2\n\t3\n", b"B: 4\n"]
    assert body == b"body\n"


@pytest.mark.parametrize("content", [b"", b"\n", b" x\n", b"x", b":\n", b"A: 1"])
def test_split_loses_nothing_but_the_empty_line(content: bytes) -> None:
    fields, body = canonical.split(content)
    assert b"".join(fields) + body in (content, content.removeprefix(b"\n"))


def test_wire_ends_the_last_line() -> None:
    assert canonical.wire(b"x") == b"x\r\n"
    assert canonical.wire(b"x\r\n") == b"x\r\n"
    assert canonical.wire(b"x\n") == b"x\n\r\n"
    assert canonical.wire(b"") == b""
