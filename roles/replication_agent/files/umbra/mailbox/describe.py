"""What one user has on this node, in few words: the basis of comparing two nodes.

Read from the own Dovecot through its doveadm-server; nothing is changed, not even a flag.
A description holds one digest for each mailbox, so it stays small; the messages of one mailbox are
streamed, only where the digests of two nodes differ. The peer's comes by the operation
``describe``, which either node may ask of the other:

* ``{user, bodies}``: the description, as JSON lines ``[kind, key, value...]``;
* ``{user, bodies, mailbox}``: one line for each message of the mailbox with this GUID.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from umbra.mailbox.carrier import Exchange, Link, valid_user
from umbra.mailbox.doveadm import Doveadm, DoveadmError, unescape
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity
from umbra.peer.rows import line_of, received_rows, send_rows

# What is told of each message, as Dovecot's `fetch` names it.
FIELDS = ("uid", "guid", "flags", "size.virtual", "date.received.unixtime")
# `mailbox status` prints these, after the name, in this order whatever order is asked for.
STATUS = ("messages", "uidnext", "uidvalidity", "guid")
MARK = ("uidnext", "uidvalidity", "highestmodseq", "guid")
# Descriptions that a node makes for others at the same time, and how long one may take (seconds).
MAX_RUNNING = 4
TIMEOUT = 3600.0
# For how long it is believed that Dovecot has no ACLs (seconds).
NO_RIGHTS_SECONDS = 600.0
GUID_LENGTH = 32
# What stands for a script that cannot be read, on either node.
UNREADABLE = "unreadable"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Message:
    """One message: the words of Dovecot's ``fetch``, and the digest of its body or ""."""

    uid: int
    guid: str
    flags: str
    size: str
    received: str
    body: str = ""


@dataclass(frozen=True)
class Mailbox:
    """One mailbox; a name that holds only others has no GUID."""

    guid: str = ""
    uidvalidity: str = ""
    uidnext: str = ""
    messages: str = ""
    digest: str = ""


@dataclass
class Description:
    """What a user has on one node."""

    exists: bool = True
    mailboxes: dict[str, Mailbox] = field(default_factory=dict)
    subscriptions: set[str] = field(default_factory=set)
    scripts: dict[str, str] = field(default_factory=dict)  # name: digest
    active: str = ""
    rights: dict[str, str] = field(default_factory=dict)  # mailbox: ACL; empty without the plugin


class Dovecot:
    """Describes users of the local Dovecot.

    Every method raises DoveadmError if it does not answer. Names are the user's choice, so "--"
    stands before them: ``-A`` would be taken for an option.
    """

    def __init__(self, doveadm: Doveadm) -> None:
        self._doveadm = doveadm
        self._no_rights_until = 0.0

    async def describe(self, user: str, *, bodies: bool) -> Description:
        """Describe ``user``; with ``bodies`` the digests cover the messages' content too."""
        if not await self._doveadm.exists(user):
            return Description(exists=False)
        found = Description()
        names = await self._doveadm.fields(user, "mailbox list")
        found.mailboxes = {name: Mailbox() for name in names}
        for name, messages, uidnext, uidvalidity, guid in _rows(
            await self._doveadm.fields(user, "mailbox status", " ".join(STATUS), "*"),
            1 + len(STATUS),
        ):
            digest = hashlib.sha256()
            async for message in self.messages(user, guid, bodies=bodies):
                digest.update(line_of(_values(message)))
            found.mailboxes[name] = Mailbox(
                guid, uidvalidity, uidnext, messages, digest.hexdigest()
            )
        found.subscriptions = set(await self._doveadm.fields(user, "mailbox list", "-s"))
        scripts, found.active = await self.scripts(user)
        texts = await self.contents(user, scripts)
        found.scripts = {
            name: fingerprint(texts[name]) if name in texts else UNREADABLE for name in scripts
        }
        found.rights = await self._rights(user, names)
        return found

    async def messages(
        self, user: str, guid: str, *, bodies: bool
    ) -> AsyncGenerator[Message, None]:
        """Yield the messages of one mailbox in the order of their UIDs."""
        names = (*FIELDS, "text") if bodies else FIELDS
        values: list[str] = []
        start = b""
        body = hashlib.sha256()
        async for piece, ends in self._doveadm.pieces(
            user, "fetch", "-u", user, " ".join(names), "mailbox-guid", guid, "all"
        ):
            if len(values) < len(FIELDS):
                start += piece
            else:
                # Both nodes escape alike, so the digest is of the content as it is on the wire.
                body.update(piece)
            if not ends:
                continue
            if len(values) < len(FIELDS):
                values.append(unescape(start.decode(errors="replace")))
                start = b""
            else:
                values.append(body.hexdigest())
                body = hashlib.sha256()
            if len(values) == len(names):
                yield _message(values)
                values = []

    async def mark(self, user: str) -> str:
        """Return a text that changes with every change of the user's mailboxes and scripts."""
        if not await self._doveadm.exists(user):
            return ""
        parts = [
            await self._doveadm.fields(user, "mailbox list"),
            await self._doveadm.fields(user, "mailbox status", " ".join(MARK), "*"),
            await self._doveadm.fields(user, "mailbox list", "-s"),
            await self._doveadm.fields(user, "sieve list"),
        ]
        return fingerprint(*(json.dumps(part) for part in parts))

    async def mailboxes(self, user: str) -> dict[str, str]:
        """Return the GUIDs of the user's mailboxes, by name."""
        rows = _rows(await self._doveadm.fields(user, "mailbox status", "guid", "*"), 2)
        return {name: guid for name, guid in rows}  # noqa: C416

    async def remove_mailbox(self, user: str, name: str) -> None:
        """Remove a mailbox with its messages; none of this name is no error."""
        reply = await self._doveadm.run(user, "mailbox delete", "-u", user, "--", name)
        if reply.code not in ("", "NOTFOUND"):
            raise DoveadmError(f"doveadm mailbox delete of {user} ended with {reply.code}")

    async def scripts(self, user: str) -> tuple[list[str], str]:
        """Return the names of the user's Sieve scripts, and the active one's or ""."""
        rows = _rows(await self._doveadm.fields(user, "sieve list"), 2)
        active = [name for name, state in rows if state == "ACTIVE"]
        return [name for name, _ in rows], active[0] if active else ""

    async def script(self, user: str, name: str) -> str:
        """Return a Sieve script."""
        return "".join(await self._doveadm.fields(user, "sieve get", "--", name))

    async def contents(self, user: str, names: Sequence[str]) -> dict[str, str]:
        """Return Sieve scripts by name, without those that are not UTF-8."""
        found = {}
        for name in names:
            try:
                found[name] = await self.script(user, name)
            except DoveadmError as error:
                await self.scripts(user)  # is it this script, or Dovecot?
                log.warning("the script %r of %s is not compared: %s", name, user, error)
        return found

    async def put_script(self, user: str, name: str, content: str) -> None:
        """Make or replace a Sieve script."""
        await self._doveadm.fields(user, "sieve put", "--", name, data=content.encode())

    async def activate_script(self, user: str, name: str) -> None:
        """Make a Sieve script the active one; "" for none."""
        if name:
            await self._doveadm.fields(user, "sieve activate", "--", name)
        else:
            await self._doveadm.fields(user, "sieve deactivate")

    async def remove_script(self, user: str, name: str) -> None:
        """Remove a Sieve script, the active one too; none of this name is no error."""
        reply = await self._doveadm.run(user, "sieve delete", "-u", user, "-a", "--", name)
        if reply.code not in ("", "NOTFOUND"):
            raise DoveadmError(f"doveadm sieve delete of {user} ended with {reply.code}")

    async def _rights(self, user: str, mailboxes: list[str]) -> dict[str, str]:
        if monotonic() < self._no_rights_until:
            return {}
        found = {}
        for name in mailboxes:
            reply = await self._doveadm.run(user, "acl get", "-u", user, "--", name)
            if reply.code == "UNKNOWN":
                # The plugin is not loaded. Dovecot logs an error for each try, so they are few.
                self._no_rights_until = monotonic() + NO_RIGHTS_SECONDS
                return {}
            if not reply.code and reply.fields:
                found[name] = json.dumps(sorted(_rows(reply.fields, 2)))
        return found


class Peer:
    """Describes users of a peer, over its link.

    Every method raises PeerError if it does not answer.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    async def describe(self, user: str, *, bodies: bool) -> Description:
        """See ``Dovecot.describe``."""
        found = Description(exists=False)
        args = {"user": user, "bodies": bodies}
        async with self._link.exchange("describe", args, timeout=TIMEOUT) as exchange:
            await exchange.end()
            async for row in received_rows(exchange):
                _read(found, row)
            await exchange.result()
        return found

    async def messages(
        self, user: str, guid: str, *, bodies: bool
    ) -> AsyncGenerator[Message, None]:
        """See ``Dovecot.messages``."""
        args = {"user": user, "bodies": bodies, "mailbox": guid}
        async with self._link.exchange("describe", args, timeout=TIMEOUT) as exchange:
            await exchange.end()
            async for row in received_rows(exchange):
                yield _message(row)
            await exchange.result()


class DescribeHandler:
    """The handler of the operation ``describe``. Reads only, so either node may ask."""

    def __init__(self, dovecot: Dovecot) -> None:
        self._dovecot = dovecot
        self._room = asyncio.Semaphore(MAX_RUNNING)

    async def __call__(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Send what was asked for. PeerError ``refused`` or ``dovecot`` if that cannot be."""
        user, mailbox = args.get("user"), args.get("mailbox")
        if not isinstance(user, str) or not valid_user(user):
            raise PeerError("refused", "no such user")
        if mailbox is not None and not is_guid(mailbox):
            raise PeerError("refused", "no such mailbox")
        bodies = args.get("bodies") is True
        try:
            async with self._room:
                if mailbox is None:
                    description = await self._dovecot.describe(user, bodies=bodies)
                    await send_rows(exchange, _written(description))
                else:
                    messages = self._dovecot.messages(user, mailbox, bodies=bodies)
                    await send_rows(exchange, (_values(message) async for message in messages))
        except DoveadmError as error:
            raise PeerError("dovecot", str(error)) from None
        await exchange.end()
        return {}


def _rows(fields: list[str], width: int) -> list[list[str]]:
    if len(fields) % width:
        raise DoveadmError(f"{len(fields)} fields where rows of {width} were expected")
    return [fields[start : start + width] for start in range(0, len(fields), width)]


def _message(values: Any) -> Message:
    try:
        uid, guid, flags, size, received, *body = values
        return Message(
            int(uid), str(guid), lasting(str(flags)), str(size), str(received), *map(str, body)
        )
    except (TypeError, ValueError):
        raise DoveadmError(f"not a message: {values!r}"[:200]) from None


def lasting(flags: str) -> str:
    r"""Return flags in an order that is the same on all nodes.

    That of keywords in Dovecot is that of their first use on a node. Without \Recent, which is not
    of the message but of who selects the mailbox next.
    """
    return " ".join(sorted(flag for flag in flags.split() if flag != "\\Recent"))


def _values(message: Message) -> list[Any]:
    return [
        message.uid, message.guid, message.flags, message.size, message.received, message.body
    ]  # fmt: skip


def fingerprint(*texts: str) -> str:
    """Return what is the same for the same texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def is_guid(value: object) -> bool:
    """Tell whether this has the form of a GUID of Dovecot."""
    return (
        isinstance(value, str)
        and len(value) == GUID_LENGTH
        and all(char in "0123456789abcdef" for char in value)
    )


async def _written(found: Description) -> AsyncIterator[list[Any]]:
    """Yield a description as rows; none of a user that does not exist."""
    if not found.exists:
        return
    yield ["user", found.active]
    for name, box in found.mailboxes.items():
        yield ["mailbox", name, box.guid, box.uidvalidity, box.uidnext, box.messages, box.digest]
    for name in found.subscriptions:
        yield ["subscription", name]
    for name, digest in found.scripts.items():
        yield ["script", name, digest]
    for name, rights in found.rights.items():
        yield ["rights", name, rights]


def _read(found: Description, row: Any) -> None:
    """Put one row into ``found``. PeerError ``protocol`` if it is none."""
    match row:
        case ["user", str(active)]:
            found.exists, found.active = True, active
        case ["mailbox", str(name), *values] if len(values) == len(STATUS) + 1:
            found.mailboxes[name] = Mailbox(*map(str, values))
        case ["subscription", str(name)]:
            found.subscriptions.add(name)
        case ["script", str(name), str(digest)]:
            found.scripts[name] = digest
        case ["rights", str(name), str(rights)]:
            found.rights[name] = rights
        case _:
            raise PeerError("protocol", f"not a row of a description: {row!r}"[:200])
