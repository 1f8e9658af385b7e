"""What is compared of a message, and nothing less: the one place that says so.

SMTP carries lines that end in CRLF. Postfix 3.10 takes a bare LF as a line end
(``smtpd_forbid_bare_newline = normalize``) and replaces a CR that ends no line by a space
(``cleanup_replace_stray_cr_lf = yes``). So line ends are compared as one LF, and a stray CR as a
space. All other bytes are compared as they are.
"""

from __future__ import annotations

import hashlib
import re
from typing import TypedDict

ID_HEADER = "X-Failover-Test-Id"

# Header fields that a mail system adds on the way, or that Postfix drops as a matter of form
# (message_drop_headers: a Bcc or Return-Path of the sender's is never delivered).
TRACE_FIELDS = frozenset(
    {
        "received",
        "return-path",
        "delivered-to",
        "x-original-to",
        "x-umbra-id",
        "x-sieve",
        "authentication-results",
        "received-spf",
        "bcc",
        "resent-bcc",
        "content-length",
    }
)

_LINE_END = re.compile(rb"\r?\n")
_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:")


class Digest(TypedDict):
    """What is recorded of a content: SHA-256 of header and body, and their canonical size."""

    head: str
    body: str
    size: int


def wire(raw: bytes) -> bytes:
    """Return the message as SMTP sends it: the last line is ended, the rest is as given."""
    return raw if raw.endswith(b"\r\n") or not raw else raw + b"\r\n"


def split(content: bytes) -> tuple[list[bytes], bytes]:
    """Split canonical content into header fields (folded lines included) and body.

    The header ends at the first line that is no field, as Postfix sees it; an empty line there
    belongs to neither.
    """
    fields: list[bytes] = []
    position = 0
    while position < len(content):
        end = content.find(b"\n", position)
        line = content[position : end + 1] if end >= 0 else content[position:]
        if line[:1] in (b" ", b"\t") and fields:
            fields[-1] += line
        elif _FIELD.match(line):
            fields.append(line)
        else:
            return fields, content[position + 1 :] if line == b"\n" else content[position:]
        position += len(line)
    return fields, b""


def digest(raw: bytes) -> Digest:
    """Return the digests of what is compared of a message."""
    content = _LINE_END.sub(b"\n", wire(raw)).replace(b"\r", b" ")
    fields, body = split(content)
    head = b"".join(field for field in fields if _name(field) not in TRACE_FIELDS)
    return {
        "head": hashlib.sha256(head).hexdigest(),
        "body": hashlib.sha256(body).hexdigest(),
        "size": len(head) + len(body),
    }


def _name(field: bytes) -> str:
    match = _FIELD.match(field)
    return match.group(1).decode("ascii").lower() if match else ""
