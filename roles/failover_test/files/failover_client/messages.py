"""The messages that are sent: generated ones of every awkward kind, and real ones."""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .canonical import ID_HEADER

SAMPLE_LIMIT = (
    5_000_000  # bytes; a sample directory is somebody else's, so bound what one file may weigh
)
SAMPLE_SHARE = 4  # every fourth message is a real one, as long as there are any

_ADDRESSES = re.compile(rb"\A(?:>?From [^\r\n]*\r?\n)+")


@dataclass(frozen=True)
class Message:
    """One message to send; ``kind`` names the generator or the sample file."""

    id: str
    kind: str
    raw: bytes


def with_id(identity: str, rest: bytes) -> bytes:
    """Put the id header first, where no broken header of the message can swallow it."""
    return f"{ID_HEADER}: {identity}\r\n".encode() + rest


def _header(identity: str, extra: str = "") -> bytes:
    return (
        f"From: Failover Test <failover-test@example.net>\r\nTo: undisclosed-recipients:;\r\n"
        f"Subject: failover test {identity}\r\nDate: Thu, 01 Jan 2026 00:00:00 +0000\r\n"
        f"Message-ID: <{identity}@failover-test.invalid>\r\n{extra}\r\n"
    ).encode()


def _plain(identity: str, chance: random.Random) -> bytes:
    words = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel")
    lines = [" ".join(chance.choices(words, k=10)) for _ in range(chance.randint(1, 60))]
    return _header(identity) + "\r\n".join(lines).encode() + b"\r\n"


def _dots(identity: str, _chance: random.Random) -> bytes:
    return _header(identity) + b".\r\n..\r\n...\r\n.leading\r\n\r\n.\r\nmiddle . dot\r\n."


def _eight_bit(identity: str, chance: random.Random) -> bytes:
    latin = bytes(chance.choices(range(0xA0, 0x100), k=400))
    utf8 = "Grüße, 郵便, почта, ταχυδρομείο, 📬".encode()
    header = _header(identity, "MIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n"
                     "Content-Transfer-Encoding: 8bit\r\n")  # fmt: skip
    return header + utf8 + b"\r\n" + latin + b"\r\n"


def _long_lines(identity: str, chance: random.Random) -> bytes:
    long = bytes(
        chance.choices(b"abcdefghijklmnopqrstuvwxyz0123456789 ", k=chance.randint(1000, 9000))
    )
    return _header(identity) + long + b"\r\n" + b"x" * 998 + b"\r\n" + b"y" * 999 + b"\r\n"


def _stray_ends(identity: str, _chance: random.Random) -> bytes:
    return (
        _header(identity)
        + b"bare\rCR\r\nbare\nLF\r\n\rCR first\r\nCR last\r\r\n\n\nLF LF\r\nno end"
    )


def _empty_body(identity: str, _chance: random.Random) -> bytes:
    return _header(identity)


def _header_only(identity: str, _chance: random.Random) -> bytes:
    return f"Subject: {identity}\r\n".encode()


def _attachment(identity: str, chance: random.Random) -> bytes:
    return _header(identity, _MULTIPART) + (
        b"preamble\r\n--=_edge\r\nContent-Type: text/plain\r\n\r\nSee there.\r\n--=_edge\r\n"
        b"Content-Type: application/octet-stream\r\nContent-Transfer-Encoding: base64\r\n\r\n"
        + _base64(chance.randbytes(chance.randint(1_000, 60_000)))
        + b"--=_edge--\r\nepilogue\r\n"
    )


def _broken_mime(identity: str, chance: random.Random) -> bytes:
    return _header(identity, _MULTIPART) + (
        b'--=_edge\r\nContent-Type: multipart/mixed; boundary="=_edge"\r\n'
        b"Content-Transfer-Encoding: base64\r\n"
        b"Broken header line without a colon\r\n\r\n!!! not base64 \xff\xfe\x80 !!!\r\n--=_edg\r\n"
        + chance.randbytes(50).replace(b"\r", b"").replace(b"\n", b"").replace(b"\0", b"")
        + b"\r\n"
    )


_MULTIPART = 'MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary="=_edge"\r\n'

GENERATORS: dict[str, Callable[[str, random.Random], bytes]] = {
    "plain": _plain,
    "dot lines": _dots,
    "8-bit": _eight_bit,
    "long lines": _long_lines,
    "bare CR and LF": _stray_ends,
    "empty body": _empty_body,
    "header only": _header_only,
    "attachment": _attachment,
    "broken MIME": _broken_mime,
}


def big(identity: str, size: int) -> Message:
    """Return a message of about ``size`` bytes: one attachment of pseudo-random bytes."""
    data = random.Random(identity).randbytes(size * 57 // 78)
    raw = _header(identity, _MULTIPART) + (
        b"--=_edge\r\nContent-Type: application/octet-stream\r\n"
        b"Content-Transfer-Encoding: base64\r\n\r\n" + _base64(data) + b"--=_edge--\r\n"
    )
    return Message(identity, "big", with_id(identity, raw))


def _base64(data: bytes) -> bytes:
    return base64.encodebytes(data).replace(b"\n", b"\r\n")


def load_samples(directory: Path | None) -> list[tuple[str, bytes]]:
    """Read every sample file as ``(name, content)``, less an mbox envelope line.

    NUL bytes are not allowed in mail and survive no mail system; a file with one is left out.
    """
    if directory is None or not directory.is_dir():
        return []
    samples = []
    for path in sorted(directory.rglob("*")):
        if path.is_file() and 0 < path.stat().st_size <= SAMPLE_LIMIT:
            content = _ADDRESSES.sub(b"", path.read_bytes())
            if b"\0" not in content and content:
                samples.append((str(path.relative_to(directory)), as_crlf(content)))
    return samples


def as_crlf(content: bytes) -> bytes:
    """Give a Unix text file SMTP's line ends; one that has CRLF already is left as it is."""
    return content if b"\r\n" in content else content.replace(b"\n", b"\r\n")


def stream(run: str, worker: int, samples: list[tuple[str, bytes]]) -> Iterator[Message]:
    """Yield one worker's messages without end, each with an id of its own."""
    kinds = list(GENERATORS)
    number = 0
    sample = worker  # workers start apart, so that few messages show the whole directory
    while True:
        identity = f"{run}-s{worker}-{number:06d}"
        chance = random.Random(identity)
        if samples and number % SAMPLE_SHARE == 0:
            name, content = samples[sample % len(samples)]
            sample += 4
            yield Message(identity, f"sample {name}", with_id(identity, content))
        else:
            kind = kinds[(number + worker) % len(kinds)]
            yield Message(identity, kind, with_id(identity, GENERATORS[kind](identity, chance)))
        number += 1
