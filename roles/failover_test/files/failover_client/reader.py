"""Reads what the mailboxes hold of a run: over IMAPS, or on a mail host past the network."""

from __future__ import annotations

import imaplib
import re
import shlex
import time
from collections.abc import Iterable, Iterator
from typing import Any

from .canonical import ID_HEADER, digest

BATCH = 50
_UID = re.compile(rb"\bUID (\d+)")
_FLAGS = re.compile(rb"\bFLAGS \(([^)]*)\)")
_ID = re.compile(rb"(?im)^" + ID_HEADER.encode() + rb":[ \t]*(\S+)")
_LISTED = re.compile(rb"\((?P<attributes>[^)]*)\) (?:\"[^\"]*\"|NIL) \"?(?P<name>[^\"]+?)\"?$")


class ReadError(Exception):
    """A mailbox could not be read: the account would be about nothing."""


def local(user: str) -> imaplib.IMAP4:
    """Open a user's mail on this mail host, past password and network; root only."""
    return imaplib.IMAP4_stream(f"exec doveadm exec imap -u {shlex.quote(user)}")


def mailboxes(session: imaplib.IMAP4, prefix: str) -> list[str]:
    """Return the INBOX and the run's own mailboxes."""
    _typ, data = _done(session.list('""', f"{prefix}*"))
    names = []
    for line in data:
        match = _LISTED.match(line) if isinstance(line, bytes) else None
        if match and b"\\noselect" not in match["attributes"].lower():
            names.append(match["name"].decode("ascii"))
    return ["INBOX", *sorted(names)]


def read_user(session: imaplib.IMAP4, run: str, prefix: str) -> dict[str, Any]:
    """Return ``{mailbox: {uidvalidity, messages: [{uid, id, flags, head, body, size}]}}``."""
    result: dict[str, Any] = {}
    for name in mailboxes(session, prefix):
        _done(session.select(name, readonly=True))
        validity = session.response("UIDVALIDITY")[1][-1]
        messages = [
            _message(flags, uid, raw)
            for batch in _batches(find(session, run))
            for uid, flags, raw in _fetch(session, batch)
        ]
        result[name] = {"uidvalidity": int(validity or 0), "messages": messages}
    return result


def find(session: imaplib.IMAP4, run: str) -> list[int]:
    """Return the UIDs of the run's messages in the selected mailbox."""
    _typ, data = _done(session.uid("SEARCH", "HEADER", ID_HEADER, run))
    return [int(uid) for uid in (data[-1] or b"").split()]


def await_ids(session: imaplib.IMAP4, run: str, wanted: set[str], deadline: float) -> set[str]:
    """Wait until every wanted message is in the INBOX or a monotonic time; return the missing."""
    found: set[str] = set()
    seen: set[int] = set()
    _done(session.select("INBOX", readonly=True))
    while True:
        fresh = [uid for uid in find(session, run) if uid not in seen]
        for batch in _batches(fresh):
            _typ, data = _done(
                session.uid("FETCH", _set(batch), f"(UID BODY.PEEK[HEADER.FIELDS ({ID_HEADER})])")
            )
            for item in data:
                match = _ID.search(item[1]) if isinstance(item, tuple) else None
                if match:
                    found.add(match.group(1).decode("ascii"))
        seen.update(fresh)
        if wanted <= found or time.monotonic() >= deadline:
            return wanted - found
        time.sleep(0.5)
        session.noop()


def clean_user(session: imaplib.IMAP4, run: str, prefix: str) -> int:
    """Delete the run's mailboxes and its messages in the INBOX; return how many things went."""
    gone = 0
    for name in mailboxes(session, prefix):
        if name == "INBOX":
            _done(session.select(name))
            for batch in _batches(find(session, run)):
                _done(session.uid("STORE", _set(batch), "+FLAGS.SILENT", r"(\Deleted)"))
                _done(session.uid("EXPUNGE", _set(batch)))
                gone += len(batch)
            _done(session.unselect())
        else:
            _done(session.delete(name))
            gone += 1
    return gone


def _fetch(session: imaplib.IMAP4, uids: list[int]) -> Iterator[tuple[int, bytes, bytes]]:
    _typ, data = _done(session.uid("FETCH", _set(uids), "(UID FLAGS BODY.PEEK[])"))
    got = 0
    for position, item in enumerate(data):
        if not isinstance(item, tuple):
            continue
        # Attributes may stand before the literal or after it.
        after = data[position + 1] if position + 1 < len(data) else b""
        around = item[0] + b" " + (after if isinstance(after, bytes) else b"")
        uid, flags = _UID.search(around), _FLAGS.search(around)
        if uid is None or flags is None:
            raise ReadError(f"cannot read the answer {around[:200]!r}")
        got += 1
        yield int(uid.group(1)), flags.group(1), item[1]
    if got != len(uids):
        raise ReadError(f"asked for {len(uids)} messages and got {got}")


def _message(flags: bytes, uid: int, raw: bytes) -> dict[str, Any]:
    match = _ID.search(raw)
    names = sorted(flag for flag in flags.decode("ascii").split() if flag.lower() != r"\recent")
    return {
        "uid": uid,
        "id": match.group(1).decode("ascii") if match else "",
        "flags": names,
        **digest(raw),
    }


def _batches(uids: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(uids), BATCH):
        yield uids[start : start + BATCH]


def _set(uids: Iterable[int]) -> str:
    return ",".join(map(str, uids))


def _done(answer: tuple[str, list[Any]]) -> tuple[str, list[Any]]:
    if answer[0] != "OK":
        raise ReadError(f"{answer[0]} {answer[1]!r}")
    return answer
