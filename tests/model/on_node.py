"""Runs on a mail host as root: answers requests, one JSON object a line, until its input ends.

It reads what a user has on this node's own disk: mail by an ``imap`` process of its own that needs
no password and no network and is kept for the next question, Sieve scripts as files. It also
delivers by LMTP, runs ``doveadm`` as an administrator does, and asks the agent for its status.
``wire.py`` stands before this text when it is sent to the host.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shlex
import smtplib
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

from tests.model.wire import Broken, Imap, Refused, quoted  # cut off when it is sent

LMTP = "/var/spool/postfix/private/dovecot-lmtp"
API = "/run/umbra/api.sock"
MARK = re.compile(rb"(?im)^X-Model: (\S+)")
STATUS = b"RETURN (STATUS (UIDNEXT UIDVALIDITY MESSAGES HIGHESTMODSEQ X-GUID))"

sessions: dict[str, tuple[Imap, set[str]]] = {}
homes: dict[str, str] = {}
bodies: dict[tuple[str, ...], list[Any]] = {}
# What was read of a mailbox when its status was this. Any change raises HIGHESTMODSEQ.
known: dict[tuple[str, str], tuple[Any, list[list[Any]]]] = {}


def session(user: str) -> tuple[Imap, set[str]]:
    """The user's imap process, and what it can do."""
    if user not in sessions:
        process = subprocess.Popen(
            f"exec doveadm exec imap -u {shlex.quote(user)}",
            shell=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        imap = Imap(cast(BinaryIO, process.stdout), cast(BinaryIO, process.stdin))
        words = imap.run(b"CAPABILITY").of(b"CAPABILITY")[0]
        sessions[user] = imap, {word.decode() for word in words}
        homes[user] = subprocess.check_output(
            ["doveadm", "user", "-f", "home", user], text=True
        ).strip()
    return sessions[user]


def view(user: str, fresh: bool) -> dict[str, Any]:
    """All that a user has here; a session that broke is made anew once."""
    if fresh:
        known.clear()
        bodies.clear()
    try:
        return look(user)
    except Broken:
        sessions.pop(user, None)
        return look(user)


def look(user: str) -> dict[str, Any]:
    """All that a user has here."""
    imap, able = session(user)
    mailboxes: dict[str, Any] = {}
    rights: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    for _, name, pairs in imap.run(b'LIST "" "*"', STATUS).of(b"STATUS"):
        status = dict(zip(pairs[::2], pairs[1::2], strict=True))
        guid = status[b"X-GUID"].decode()
        mailboxes[name.decode()] = {
            "guid": guid,
            "uidvalidity": int(status[b"UIDVALIDITY"]),
            "uidnext": int(status[b"UIDNEXT"]),
            "messages": unless_known(imap, user, guid, name, status),
        }
        if "ACL" in able:
            found = imap.run(b"GETACL", quoted(name)).of(b"ACL")[0][2:]
            words = [word.decode() for word in found]
            rights[name.decode()] = dict(
                zip(words[::2], map("".join, map(sorted, words[1::2])), strict=True)
            )
        if "METADATA" in able:
            found = imap.run(
                b"GETMETADATA (DEPTH infinity)", quoted(name), b"(/private /shared)"
            ).of(b"METADATA")
            for line in found:
                values = [value.decode() for value in line[2]]
                notes[name.decode()] = {
                    key: value
                    for key, value in zip(values[::2], values[1::2], strict=True)
                    if value != "NIL"
                }
    subscribed = imap.run(b'LSUB "" "*"').of(b"LSUB")
    scripts, active = sieve(homes[user])
    return {
        "mailboxes": mailboxes,
        "subscriptions": sorted(line[3].decode() for line in subscribed),
        "scripts": scripts,
        "active": active,
        "rights": rights,
        "notes": {name: values for name, values in notes.items() if values},
        "able": sorted(able & {"ACL", "METADATA", "MULTIAPPEND", "CATENATE", "REPLACE"}),
    }


def unless_known(
    imap: Imap, user: str, guid: str, name: bytes, status: dict[bytes, bytes]
) -> list[list[Any]]:
    """The messages of a mailbox, read only if it has changed.

    Flags that dsync has set may leave HIGHESTMODSEQ as it was, so the log of the index tells, too.
    """
    if status[b"MESSAGES"] == b"0":
        return []
    log = Path(homes[user], "mail/mailboxes", name.decode(), "dbox-Mails/dovecot.index.log")
    try:
        stamp = log.stat()
    except OSError:  # a name that is another one on disk
        return messages(imap, user, guid, name)
    now = status, stamp.st_mtime_ns, stamp.st_size
    if known.get((user, guid), (None,))[0] != now:
        known[user, guid] = now, messages(imap, user, guid, name)
    return known[user, guid][1]


def messages(imap: Imap, user: str, guid: str, name: bytes) -> list[list[Any]]:
    """Each message as [uid, guid, flags, date, size, mark, digest]."""
    imap.run(b"EXAMINE", quoted(name))
    found = []
    for line in imap.run(b"UID FETCH 1:* (UID X-GUID FLAGS INTERNALDATE RFC822.SIZE)").of(b"FETCH"):
        items = dict(zip(line[2][::2], line[2][1::2], strict=True))
        uid, own = int(items[b"UID"]), items[b"X-GUID"].decode()
        flags = sorted(flag.decode() for flag in items[b"FLAGS"] if flag != b"\\Recent")
        key = (user, guid, str(uid), own)
        if key not in bodies:
            answer = imap.run(b"UID FETCH %d (UID BODY.PEEK[])" % uid).of(b"FETCH")[0][2]
            body = dict(zip(answer[::2], answer[1::2], strict=True))[b"BODY[]"]
            mark = MARK.search(body)
            bodies[key] = [
                mark[1].decode() if mark else "", hashlib.sha256(body).hexdigest()[:16]
            ]  # fmt: skip
        size, date = int(items[b"RFC822.SIZE"]), items[b"INTERNALDATE"].decode()
        found.append([uid, own, flags, date, size, *bodies[key]])
    imap.run(b"UNSELECT")
    return found


def sieve(home: str) -> tuple[dict[str, str], str]:
    """The user's scripts by name, as digests, and the active one."""
    folder, link = Path(home, "sieve"), Path(home, ".dovecot.sieve")
    while True:
        try:
            scripts = {
                file.stem: hashlib.sha256(file.read_bytes()).hexdigest()[:16]
                for file in folder.glob("*.sieve")
            }
            return scripts, Path(os.readlink(link)).stem if link.is_symlink() else ""
        except FileNotFoundError:
            continue  # it went away between two looks: what is there now is asked for


def deliver(recipient: str, content: str) -> str:
    """Deliver one message by LMTP; what was said to its end, or "broken: ..."."""
    try:
        with smtplib.LMTP(LMTP, timeout=40) as lmtp:
            lmtp.ehlo()
            lmtp.mail("model@example.com")
            code, text = lmtp.rcpt(recipient)
            if code == 250:
                code, text = lmtp.data(content.encode())
            return f"{code} {text.decode()}"
    except (OSError, smtplib.SMTPException) as error:
        return f"broken: {error}"


def status() -> dict[str, Any]:
    """What the agent reports."""
    connection = http.client.HTTPConnection("localhost", timeout=3)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(3)
    connection.sock.connect(API)
    connection.request("GET", "/status")
    return dict(json.loads(connection.getresponse().read()))


def answer(request: dict[str, Any]) -> Any:
    """Do what is asked."""
    match request["do"]:
        case "view":
            return view(request["user"], request.get("fresh", False))
        case "lmtp":
            with ThreadPoolExecutor() as pool:
                return list(pool.map(deliver, request["to"], request["contents"]))
        case "doveadm":
            done = subprocess.run(
                ["doveadm", *request["words"]],
                capture_output=True,
                input=request.get("text", ""),
                text=True,
            )
            return [done.returncode, (done.stderr or done.stdout)[-300:]]
        case "status":
            return status()
        case unknown:
            raise ValueError(unknown)


def main() -> None:
    """Answer until the input ends; a request that fails is answered too."""
    for line in sys.stdin:
        try:
            said: dict[str, Any] = {"answer": answer(json.loads(line))}
        except (Broken, Refused, OSError, ValueError, subprocess.SubprocessError) as error:
            sessions.clear()
            said = {"error": repr(error)}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
