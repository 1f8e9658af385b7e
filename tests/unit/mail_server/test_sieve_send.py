"""What Sieve sends: to Postfix, to sendmail, or later."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from roles.mail_server.files.umbra_boot import sieve_send

ARGUMENTS = ["-i", "-f", "ann@example.com", "--", "bob@example.net", "eve@example.net"]
CONTENT = b"Subject: x\n\n.dot\r\nend\n"


class Postfix:
    """Answers each command by its first word, and notes what was said."""

    def __init__(self) -> None:
        self.said: list[bytes] = []
        self.answers: dict[bytes, bytes] = {}
        self.hangs_up = b"never"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        with connection, connection.makefile("rwb") as lines:
            self._say(lines, b"CONNECT", b"220 x\r\n")
            for line in lines:
                self.said.append(line)
                word = line.split()[0] if line.split() else line
                if word == self.hangs_up:
                    return
                if word == b"ehlo":
                    self._say(lines, word, b"250-x\r\n250-SMTPUTF8\r\n250 8BITMIME\r\n")
                elif word == b"data":
                    self._say(lines, word, b"354 go\r\n")
                elif word not in (b"Subject:", b"\r\n", b"..dot", b"end"):
                    self._say(lines, word, b"250 ok\r\n")

    def _say(self, lines: object, word: bytes, answer: bytes) -> None:
        lines.write(self.answers.get(word, answer))  # type: ignore[attr-defined]
        lines.flush()  # type: ignore[attr-defined]

    def close(self) -> None:
        self._listener.close()
        self._thread.join(5)


@pytest.fixture
def postfix(monkeypatch: pytest.MonkeyPatch) -> Iterator[Postfix]:
    server = Postfix()
    monkeypatch.setattr(sieve_send, "PORT", server.port)
    yield server
    server.close()


@pytest.fixture
def sendmail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It notes its arguments and its input, and ends with 3."""
    program, noted = tmp_path / "sendmail", tmp_path / "noted"
    program.write_text(f'#!/bin/sh\necho "$@" > {noted}\ncat >> {noted}\nexit 3\n')
    program.chmod(0o755)
    monkeypatch.setattr(sieve_send, "SENDMAIL", str(program))
    return noted


def test_postfix_takes_it(postfix: Postfix, sendmail: Path) -> None:
    assert sieve_send.main(ARGUMENTS, io.BytesIO(CONTENT)) == 0
    assert postfix.said[1:-1] == [
        b"mail FROM:<ann@example.com> BODY=8BITMIME\r\n",
        b"rcpt TO:<bob@example.net>\r\n",
        b"rcpt TO:<eve@example.net>\r\n",
        b"data\r\n",
        b"Subject: x\r\n", b"\r\n", b"..dot\r\n", b"end\r\n", b".\r\n",
    ]  # fmt: skip
    assert not sendmail.exists()


def test_the_null_sender_and_an_address_in_utf_8(postfix: Postfix) -> None:
    arguments = ["-i", "-f", "<>", "--", "bób@example.net"]
    assert sieve_send.main(arguments, io.BytesIO(CONTENT)) == 0
    assert postfix.said[1:3] == [
        b"mail FROM:<> BODY=8BITMIME SMTPUTF8\r\n",
        "rcpt TO:<bób@example.net>\r\n".encode(),
    ]


@pytest.mark.parametrize("word", [b"CONNECT", b"mail", b"rcpt", b"data", b"."])
def test_what_postfix_does_not_want_is_left_to_sendmail(
    postfix: Postfix, sendmail: Path, word: bytes
) -> None:
    """For example while the agent restarts."""
    postfix.answers = {word: b"451 4.7.1 later\r\n"}
    assert sieve_send.main(ARGUMENTS, io.BytesIO(CONTENT)) == 3
    assert sendmail.read_bytes() == " ".join(ARGUMENTS).encode() + b"\n" + CONTENT


@pytest.mark.parametrize("word", [b"mail", b"."])
def test_a_postfix_that_goes_away_has_the_delivery_tried_again(
    postfix: Postfix, sendmail: Path, word: bytes
) -> None:
    postfix.hangs_up = word
    assert sieve_send.main(ARGUMENTS, io.BytesIO(CONTENT)) == os.EX_TEMPFAIL
    assert not sendmail.exists()


def test_a_postfix_that_is_away(sendmail: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sieve_send, "PORT", 9)
    assert sieve_send.main(ARGUMENTS, io.BytesIO(CONTENT)) == os.EX_TEMPFAIL
    assert not sendmail.exists()


def test_a_large_message_goes_in_pieces() -> None:
    lines = [b"." + bytes(range(48, 100)) * 20 + b"\n"] * 500
    pieces = list(sieve_send._pieces(io.BytesIO(b"".join(lines))))
    assert b"".join(pieces) == b"".join(b"." + line[:-1] + b"\r\n" for line in lines) + b".\r\n"
    assert len(pieces) > 5
    assert list(sieve_send._pieces(io.BytesIO(b"no end"))) == [b"no end\r\n.\r\n"]
