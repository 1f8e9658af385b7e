"""Second copies of a message, before two nodes' mailboxes are brought together.

A primary that was lost may have stored a message that it had not mirrored yet. The new primary has
resubmitted it, so each node has it under a GUID of its own, and dsync would keep both. So before a
merge the primary asks the node that comes back which messages of a user only that one has; those
that are in the user's mailboxes here too, by their ``X-Umbra-Id``, are removed there. Flags that
only the removed copy had are lost: nobody was told that they were kept.

* ``unmirrored {user}``: DATA: the primary's GUIDs, a line each; back come JSON lines, one for each
  message with an id whose GUID is not among them.
* ``remove-copies {user, copies}``: removes them, each found by mailbox, GUID and id.

Both are refused by a primary and by a node whose mailboxes have been merged. Dying anywhere, all is
simply done again with the next merge: a copy is removed only while this node has the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import astuple, dataclass
from typing import Any, Protocol

from umbra.mailbox import metrics
from umbra.mailbox.carrier import Exchange, valid_user
from umbra.mailbox.describe import is_guid
from umbra.mailbox.doveadm import (
    Doveadm,
    DoveadmError,
    Outcome,
    SyncResult,
    given_id,
    unescape,
    with_id,
)
from umbra.mailbox.mirror import Carrier
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity
from umbra.peer.rows import MAX_LINE, received_rows, send_rows
from umbra.transport import ids

log = logging.getLogger(__name__)

TIMEOUT = 600.0
BATCH = 50
"""Ids in one search, and copies in one request, which must fit a frame."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A message on a node that comes back."""

    mailbox: str
    mailbox_guid: str
    uid: int
    guid: str
    shadow_id: str

    @classmethod
    def read(cls, row: Any) -> Copy:
        """Read what came over the link. PeerError ``protocol`` if it is none."""
        match row:
            case [str(mailbox), str(box), int(uid), str(guid), str(shadow_id)]:
                if is_guid(box) and is_guid(guid) and ids.valid(shadow_id) and uid > 0:
                    return cls(mailbox, box, uid, guid, shadow_id)
        raise PeerError("protocol", f"not a copy of a message: {row!r}"[:200])


class Link(Protocol):
    """The part of ``PeerLink`` that is used here."""

    async def request(self, op: str, args: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        """Run an exchange without data."""

    def exchange(
        self, op: str, args: Mapping[str, Any], *, timeout: float
    ) -> AbstractAsyncContextManager[Any]:
        """Run an exchange."""


class Dovecot:
    """Reads and removes by id. Every method raises DoveadmError if Dovecot does not answer."""

    def __init__(self, doveadm: Doveadm) -> None:
        self._doveadm = doveadm

    async def exists(self, user: str) -> bool:
        """Return whether there is such a user."""
        return await self._doveadm.exists(user)

    async def guids(self, user: str) -> set[str]:
        """Return the GUIDs of all messages of ``user``."""
        return {guid async for (guid,) in self._rows(user, ("guid",), ("all",))}

    async def unmirrored(self, user: str, known: set[str]) -> AsyncIterator[Copy]:
        """Yield the messages with an id whose GUID is not ``known``."""
        names = ("mailbox", "mailbox-guid", "uid", "guid")
        others: dict[str, dict[str, tuple[str, str]]] = {}
        async for mailbox, box, uid, guid in self._rows(user, names, ("all",)):
            if guid not in known and is_guid(guid):  # one that was delivered here has such
                others.setdefault(box, {})[uid] = mailbox, guid
        # Only of these the header is read: it is not in Dovecot's index.
        for box, messages in others.items():
            uids = list(messages)
            for start in range(0, len(uids), BATCH):
                where = ("mailbox-guid", box, "uid", ",".join(uids[start : start + BATCH]))
                async for uid, text in self._rows(user, ("uid", "hdr.x-umbra-id"), where):
                    shadow_id = given_id(text)
                    if uid in messages and ids.valid(shadow_id):
                        mailbox, guid = messages[uid]
                        yield Copy(mailbox, box, int(uid), guid, shadow_id)

    async def present(self, user: str, wanted: Iterable[str]) -> set[str]:
        """Return those of the ids that a mailbox of ``user`` has."""
        left, found = list(dict.fromkeys(wanted)), set()
        while left:
            query: list[str] = []
            for shadow_id in left[:BATCH]:
                query += [*(["OR"] if query else []), *with_id(shadow_id)]
            async for (text,) in self._rows(user, ("hdr.x-umbra-id",), query):
                found.add(given_id(text))
            del left[:BATCH]
        return found

    async def remove(self, user: str, copy: Copy) -> None:
        """Remove one message for good; none that fits is no error."""
        query = ("mailbox-guid", copy.mailbox_guid, "uid", str(copy.uid), "guid", copy.guid)
        await self._doveadm.fields(user, "expunge", *query, *with_id(copy.shadow_id))

    async def _rows(
        self, user: str, names: Sequence[str], query: Sequence[str]
    ) -> AsyncIterator[list[str]]:
        row: list[str] = []
        rest = b""
        async for piece, ends in self._doveadm.pieces(
            user, "fetch", "-u", user, " ".join(names), *query
        ):
            rest += piece
            if ends:
                row.append(unescape(rest.decode(errors="replace")))
                rest = b""
            if len(row) == len(names):
                yield row
                row = []


class CopiesCarrier:
    """A carrier whose merges leave no message there twice.

    :param delivered: (user, shadow id): whether a delivery of the message to the user is under way
        here, or has been.
    """

    def __init__(
        self,
        carrier: Carrier,
        link: Link,
        dovecot: Dovecot,
        delivered: Callable[[str, str], bool] = lambda user, shadow_id: False,
    ) -> None:
        self._carrier = carrier
        self._link = link
        self._dovecot = dovecot
        self._delivered = delivered
        self._merging: dict[str, asyncio.Event] = {}

    async def settled(self, user: str) -> None:
        """Wait while the mailboxes of ``user`` are merged: what is in them is not known then."""
        while event := self._merging.get(user):
            await event.wait()

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        """See ``Carrier.sync``."""
        if not merge:
            return await self._carrier.sync(user, state)
        # From the comparison to the end of the merge no delivery looks into the mailboxes: it would
        # not find a copy that is on its way here, and store another.
        event = self._merging[user] = asyncio.Event()
        try:
            if not await self._dovecot.exists(user):
                return SyncResult(Outcome.NO_USER, reason="the user is unknown")
            await self._remove(user)
            return await self._carrier.sync(user, state, merge=True, apart=apart)
        except (DoveadmError, PeerError) as error:
            return SyncResult.of(error)
        finally:
            del self._merging[user]
            event.set()

    def progress(self, user: str) -> float:
        """See ``Carrier.progress``."""
        return self._carrier.progress(user)

    def cut(self, user: str = "") -> None:
        """See ``Carrier.cut``."""
        self._carrier.cut(user)

    async def _remove(self, user: str) -> None:
        guids = await self._dovecot.guids(user)
        async with self._link.exchange("unmirrored", {"user": user}, timeout=TIMEOUT) as exchange:
            await exchange.send("".join(f"{guid}\n" for guid in guids).encode())
            await exchange.end()
            theirs = [Copy.read(row) async for row in received_rows(exchange)]
            await exchange.result()
        here = await self._dovecot.present(user, (copy.shadow_id for copy in theirs))
        # What is not stored yet, but too late to be stopped from it.
        here |= {copy.shadow_id for copy in theirs if self._delivered(user, copy.shadow_id)}
        copies = [list(astuple(copy)) for copy in theirs if copy.shadow_id in here]
        for start in range(0, len(copies), BATCH):
            args = {"user": user, "copies": copies[start : start + BATCH]}
            await self._link.request("remove-copies", args, timeout=TIMEOUT)


class CopiesHandler:
    """The handlers of a node that comes back.

    :param closed: why nothing may be removed here, "" if it may.
    """

    def __init__(self, closed: Callable[[], str], dovecot: Dovecot) -> None:
        self._closed = closed
        self._dovecot = dovecot

    def _user(self, args: Mapping[str, Any]) -> str:
        if reason := self._closed():
            raise PeerError("refused", reason)
        user = args.get("user")
        if not isinstance(user, str) or not valid_user(user):
            raise PeerError("refused", "no such user")
        return user

    async def unmirrored(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Send what only this node has of a user."""
        user = self._user(args)
        known: set[str] = set()
        rest = b""
        while (data := await exchange.receive()) is not None:
            *lines, rest = (rest + data).split(b"\n")
            known.update(line.decode("ascii", "replace") for line in lines)
            # Mail that was imported keeps the GUID it had elsewhere, such as its file's name.
            if len(rest) > MAX_LINE:
                raise PeerError("protocol", "not a list of GUIDs")
        try:
            if await self._dovecot.exists(user):
                copies = self._dovecot.unmirrored(user, known)
                await send_rows(exchange, (list(astuple(copy)) async for copy in copies))
        except DoveadmError as error:
            raise PeerError("dovecot", str(error)) from None
        await exchange.end()
        return {}

    async def remove(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Remove copies of messages that the primary has."""
        user, rows = self._user(args), args.get("copies")
        if not isinstance(rows, list) or len(rows) > BATCH:
            raise PeerError("refused", "not a list of copies")
        copies = [Copy.read(row) for row in rows]
        try:
            for copy in copies:
                await self._dovecot.remove(user, copy)
                metrics.COPIES_REMOVED.inc()
                log.warning(
                    "removed a copy of a message that %s has: user=%r mailbox=%r uid=%d id=%s",
                    peer.node, user, copy.mailbox, copy.uid, copy.shadow_id,
                )  # fmt: skip
        except DoveadmError as error:
            raise PeerError("dovecot", str(error)) from None
        return {"removed": len(copies)}
