"""IMAP as bytes: a command in, its answer as parsed lists out. No state, no interpretation.

imaplib has neither MULTIAPPEND nor CATENATE, and gives answers in pieces that hide literals. Used
by the test's clients and, as text, by ``on_node.py`` on the mail hosts: standard library only.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

# An atom may hold brackets with anything in them: BODY[HEADER.FIELDS (X)].
TOKEN = re.compile(rb'[()]|"(?:[^"\\]|\\.)*"|(?:[^\s()"\[]|\[[^\]]*\]?)+')
LITERAL = re.compile(rb"\{(\d+)\}\r\n$")


class Broken(Exception):
    """The connection ended: nobody knows what became of the command."""


class Refused(Exception):
    """The server said NO or BAD."""


@dataclass
class Answer:
    """What a server said to one command."""

    text: str
    lines: list[list[Any]] = field(default_factory=list)

    def of(self, kind: bytes) -> list[list[Any]]:
        """Untagged answers of one kind: ``* LIST ...`` and ``* 3 FETCH ...``."""
        return [line for line in self.lines if kind in line[:2]]

    def code(self, name: str) -> list[str]:
        """The words of a response code in any line, such as ``APPENDUID``; empty if none came."""
        texts = [
            self.text,
            *(
                b" ".join(word for word in line if isinstance(word, bytes)).decode()
                for line in self.lines
                if line[:1] == [b"OK"]
            ),
        ]
        for text in texts:
            if found := re.search(rf"\[{name} ([^\]]*)\]", text):
                return found[1].split()
        return []


class Imap:
    """One connection: two streams, which may be one."""

    def __init__(self, read: BinaryIO, write: BinaryIO) -> None:
        self._read = read
        self._write = write
        self._number = 0
        self._response()

    def run(self, *parts: bytes) -> Answer:
        """Send one command, its parts as they are (literals: ``literal()``), return the answer."""
        self._number += 1
        tag = b"m%d" % self._number
        try:
            self._write.write(tag + b" " + b" ".join(parts) + b"\r\n")
            self._write.flush()
            lines = []
            while (line := self._response())[:1] != [tag]:
                if line[:2] == [b"*", b"BYE"]:
                    raise Broken(str(line))
                lines.append(line[1:])
        except (OSError, ValueError) as error:
            raise Broken(str(error)) from None
        text = b" ".join(word for word in line[1:] if isinstance(word, bytes)).decode()
        if not text.startswith("OK"):
            raise Refused(text)
        return Answer(text, lines)

    def close(self) -> None:
        """Close the streams; what cannot be sent any more is dropped."""
        for stream in (self._write, self._read):
            with suppress(OSError, ValueError):
                stream.close()

    def _response(self) -> list[Any]:
        """Read one answer line with its literals, as nested lists."""
        stack: list[list[Any]] = [[]]
        while True:
            line = self._read.readline()
            if not line.endswith(b"\n"):
                raise Broken("the server closed the connection")
            literal = LITERAL.search(line)
            words = line[: literal.start()] if literal else line
            # The text of OK, NO, BAD and BYE is for people: parentheses and quotes mean nothing.
            spoken = not stack[1:] and re.match(rb"\S+ (OK|NO|BAD|BYE|PREAUTH)\b", line)
            for word in words.split() if spoken else TOKEN.findall(words):
                if word == b"(" and not spoken:
                    stack.append([])
                elif word == b")" and not spoken:
                    inner = stack.pop()
                    stack[-1].append(inner)
                elif word.startswith(b'"') and not spoken:
                    stack[-1].append(re.sub(rb"\\(.)", rb"\1", word[1:-1]))
                else:
                    stack[-1].append(word)
            if literal is None:
                return stack[0]
            size = int(literal[1])
            data = self._read.read(size)
            if len(data) < size:
                raise Broken("the server closed the connection")
            stack[-1].append(data)


def quoted(text: bytes) -> bytes:
    """A quoted string."""
    return b'"' + re.sub(rb'(["\\])', rb"\\\1", text) + b'"'


def literal(data: bytes) -> bytes:
    """A literal that does not wait to be asked for (LITERAL+)."""
    return b"{%d+}\r\n" % len(data) + data
