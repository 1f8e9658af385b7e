"""Mailboxes that differ on two nodes: made ready for the sync that is to mend them.

dsync settles a conflict of flags by the message's MODSEQ, which each node counts by itself: a
change that a lost primary had made last and answered nobody undid one that its successor had
acknowledged. And it passes over a mailbox whose counters (highest MODSEQ, UIDNEXT, number of
messages) are the same on both nodes, whatever is in it (2.4.1; both found by the failover
benchmark). So

* before mailboxes are compared, those where the peer's highest MODSEQ is over that of this node get
  a higher one here;
* of what the comparison has found, each mailbox gets a highest MODSEQ here that is over the peer's,
* and where the peer's flags are not to count, it takes this node's.

One-way, from scratch, dsync replays the history of keywords, and one that was removed long ago came
back at the other node. So after such a sync the flags are compared in the mailboxes whose counters
differed before it or were changed by it, and the peer takes this node's.

The MODSEQ first, then the flags are read: a change that is made here meanwhile is either among them
or has the higher MODSEQ. Dying anywhere: the next merge compares again.

* ``counters {user}``: back come JSON lines, GUID, highest MODSEQ, UIDNEXT and number of messages of
  each mailbox.
* ``take-flags {user, mailbox, rows}``: sets the flags of messages, rows ``[uid, flags]``, in the
  mailbox of this GUID; answers with its highest MODSEQ afterwards. A primary refuses it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

from umbra.mailbox.carrier import Exchange, valid_user
from umbra.mailbox.compare import Found, Unlike, of_mailbox
from umbra.mailbox.describe import Mailbox, Message, is_guid, lasting
from umbra.mailbox.doveadm import Doveadm, DoveadmError, Outcome, SyncResult
from umbra.mailbox.mirror import Carrier
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity
from umbra.peer.rows import received_rows, send_rows

log = logging.getLogger(__name__)

TIMEOUT = 60.0
BATCH = 50
"""Messages in one request, which must fit a frame."""
LONGEST = 1000
"""Characters of one message's flags."""
AHEAD = 1000
"""By so much the highest MODSEQ here is put over the peer's, which grows as it takes flags."""
ROUNDS = 3


class Link(Protocol):
    """The part of ``PeerLink`` that is used here."""

    async def request(self, op: str, args: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        """Run an exchange without data."""

    def exchange(
        self, op: str, args: Mapping[str, Any], *, timeout: float
    ) -> AbstractAsyncContextManager[Any]:
        """Run an exchange."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What dsync goes by when it looks for mailboxes that have changed; and the name."""

    name: str = field(compare=False)
    modseq: int
    uidnext: int
    messages: int


class Dovecot:
    """Flags and counters of one user's mailboxes. DoveadmError if Dovecot does not answer."""

    def __init__(self, doveadm: Doveadm) -> None:
        self._doveadm = doveadm

    async def counters(self, user: str) -> dict[str, Counters]:
        """Return the counters of each mailbox, by its GUID; none if there is no such user."""
        if not await self._doveadm.exists(user):
            return {}
        wanted = "messages uidnext highestmodseq guid"
        fields = await self._doveadm.fields(user, "mailbox status", wanted, "*")
        rows = zip(*(fields[start::5] for start in range(5)), strict=True)
        return {
            guid: Counters(name, int(modseq), int(uidnext), int(messages))
            for name, messages, uidnext, modseq, guid in rows
        }

    async def lift(self, user: str, name: str, modseq: int) -> None:
        """Let all further changes of the mailbox have a MODSEQ over ``modseq``."""
        await self._doveadm.fields(
            user, "mailbox update", "--min-highest-modseq", str(modseq), "--", name
        )

    async def make(self, user: str, name: str, guid: str, uidvalidity: str) -> None:
        """Make an empty mailbox that is the same as another node's."""
        await self._doveadm.fields(user, "mailbox create", "--guid", guid, "--", name)
        await self._doveadm.fields(
            user, "mailbox update", "--uid-validity", uidvalidity, "--", name
        )

    async def flags(self, user: str, mailbox: str, uids: Sequence[int]) -> dict[int, str]:
        """Return the flags of those of the messages that there are."""
        where = ("mailbox-guid", mailbox, "uid", _joined(uids))
        fields = await self._doveadm.fields(user, "fetch", "uid flags", *where)
        rows = zip(fields[::2], fields[1::2], strict=True)
        return {int(uid): lasting(flags) for uid, flags in rows}

    async def set_flags(self, user: str, mailbox: str, uids: Sequence[int], flags: str) -> None:
        """Let messages have exactly these flags."""
        where = ("mailbox-guid", mailbox, "uid", _joined(uids))
        await self._doveadm.fields(user, "flags replace", "--", flags, *where)


class Settler:
    """Makes mailboxes that differ ready for a sync with one peer."""

    def __init__(self, link: Link, dovecot: Dovecot) -> None:
        self._link = link
        self._dovecot = dovecot

    async def lead(self, user: str) -> None:
        """Let what changes here from now on be newer than all that the peer has.

        DoveadmError or PeerError.
        """
        theirs = await self.theirs(user)
        for mailbox, mine in (await self.ours(user)).items():
            if mailbox in theirs and theirs[mailbox].modseq > mine.modseq:
                await self._dovecot.lift(user, mine.name, theirs[mailbox].modseq + AHEAD)

    async def keep(self, user: str, mailboxes: Mapping[str, Mailbox]) -> None:
        """Have a merge delete none of these at the peer. DoveadmError.

        It would if they have been here, however they went: dsync itself deletes what it is going to
        copy anew. What is here is not told as deleted.
        """
        for name, mailbox in mailboxes.items():
            await self._dovecot.make(user, name, mailbox.guid, mailbox.uidvalidity)

    async def ours(self, user: str) -> dict[str, Counters]:
        """Return the counters of this node's mailboxes, by their GUIDs. DoveadmError."""
        return await self._dovecot.counters(user)

    async def theirs(self, user: str) -> dict[str, Counters]:
        """Return the counters of the peer's mailboxes, by their GUIDs. PeerError."""
        async with self._link.exchange("counters", {"user": user}, timeout=TIMEOUT) as exchange:
            await exchange.end()
            rows = [row async for row in received_rows(exchange)]
            await exchange.result()
        found = {}
        for row in rows:
            match row:
                case [str(mailbox), int(modseq), int(uidnext), int(messages)]:
                    found[mailbox] = Counters("", modseq, uidnext, messages)
                case _:
                    raise PeerError("protocol", f"not a mailbox's counters: {row!r}"[:200])
        return found

    async def settle(self, user: str, found: Found, *, ours: bool) -> None:
        """See the module. DoveadmError or PeerError.

        :param ours: the peer's flags do not count: nobody was told of them, or it is a copy.
        """
        for name, unlike in found.unlike.items():
            uids = unlike.flags if ours else []
            args = {"user": user, "mailbox": unlike.there, "rows": []}
            theirs = await self._request(args)
            if not uids:
                await self._dovecot.lift(user, name, theirs + AHEAD)
            for start in range(0, len(uids), BATCH):
                batch = uids[start : start + BATCH]
                theirs = await self._give(user, name, unlike, batch, theirs)
            if uids:
                log.warning("the flags of %d messages in %s of %s are this node's on both nodes",
                            len(uids), name, user)  # fmt: skip

    async def _give(
        self, user: str, name: str, unlike: Unlike, uids: Sequence[int], theirs: int
    ) -> int:
        for _ in range(ROUNDS):
            mine = theirs + AHEAD
            await self._dovecot.lift(user, name, mine)
            flags = await self._dovecot.flags(user, unlike.here, uids)
            rows = [[uid, text] for uid, text in flags.items() if _fits(text)]
            theirs = await self._request({"user": user, "mailbox": unlike.there, "rows": rows})
            if theirs < mine:
                return theirs
        raise DoveadmError(f"the MODSEQ of {name} of {user} runs away at the peer: {theirs}")

    async def _request(self, args: Mapping[str, Any]) -> int:
        answer = await self._link.request("take-flags", args, timeout=TIMEOUT)
        modseq = answer.get("modseq")
        if not isinstance(modseq, int):
            raise PeerError("protocol", f"not a MODSEQ: {modseq!r}"[:200])
        return modseq


class Listing(Protocol):
    """The messages of one node."""

    def messages(self, user: str, guid: str, *, bodies: bool) -> AsyncGenerator[Message, None]:
        """Yield the messages of one mailbox."""


class FlagsCarrier:
    """A carrier after whose syncs from scratch the peer's flags are this node's."""

    def __init__(self, carrier: Carrier, settler: Settler, here: Listing, there: Listing) -> None:
        self._carrier = carrier
        self._settler = settler
        self._here = here
        self._there = there
        self._moved: dict[str, float] = {}

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        """See ``Carrier.sync``. If only the look at the flags failed, all is done again."""
        if state or merge:
            return await self._carrier.sync(user, state, merge=merge, apart=apart)
        self._moved[user] = monotonic()
        try:
            before = await self._settler.theirs(user)
            result = await self._carrier.sync(user, state)
            self._moved[user] = monotonic()
            if result.outcome is Outcome.SYNCED:
                found = await self._look(user, before)
                await self._settler.settle(user, found, ours=True)
        except (DoveadmError, PeerError) as error:
            return SyncResult.of(error)
        finally:
            del self._moved[user]
        return result

    async def _look(self, user: str, before: Mapping[str, Counters]) -> Found:
        """Compare the flags where the peer's counters were not ours, or have changed since."""
        found = Found()
        after = await self._settler.theirs(user)
        for mailbox, mine in (await self._settler.ours(user)).items():
            was, now = before.get(mailbox), after.get(mailbox)
            if now is None or was == now == mine:
                continue
            unlike = Unlike(mailbox, mailbox)
            left = self._moving(user, self._here.messages(user, mailbox, bodies=False))
            right = self._there.messages(user, mailbox, bodies=False)
            async for _ in of_mailbox(mine.name, unlike, left, right):
                pass  # only flags matter here
            if unlike.flags:
                found.unlike[mine.name] = unlike
        return found

    async def _moving(
        self, user: str, messages: AsyncGenerator[Message, None]
    ) -> AsyncGenerator[Message, None]:
        """Pass messages on, and note that the look at a large mailbox does move."""
        async with aclosing(messages):
            async for message in messages:
                self._moved[user] = monotonic()
                yield message

    def progress(self, user: str) -> float:
        """See ``Carrier.progress``."""
        return max(self._carrier.progress(user), self._moved.get(user, 0.0))

    def cut(self, user: str = "") -> None:
        """See ``Carrier.cut``."""
        self._carrier.cut(user)


class FlagsHandler:
    """The handlers of the peer's side."""

    def __init__(self, is_primary: Callable[[], bool], dovecot: Dovecot) -> None:
        self._is_primary = is_primary
        self._dovecot = dovecot

    async def take(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Set the flags that differ from what was sent."""
        if self._is_primary():
            raise PeerError("refused", "this node is primary; it takes no changes from others")
        user, mailbox = args.get("user"), args.get("mailbox")
        if not isinstance(user, str) or not valid_user(user) or not is_guid(mailbox):
            raise PeerError("refused", "no such user or mailbox")
        wanted = _read(args.get("rows"))
        try:
            if wanted:
                await self._take(user, str(mailbox), wanted)
            mine = (await self._dovecot.counters(user)).get(str(mailbox))
            return {"modseq": mine.modseq if mine else 0}
        except (DoveadmError, ValueError) as error:
            raise PeerError("dovecot", str(error)) from None

    async def counters(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Send the counters. Reads only."""
        user = args.get("user")
        if not isinstance(user, str) or not valid_user(user):
            raise PeerError("refused", "no such user")
        try:
            found = await self._dovecot.counters(user)
        except (DoveadmError, ValueError) as error:
            raise PeerError("dovecot", str(error)) from None
        await send_rows(exchange, _rows(found))
        await exchange.end()
        return {}

    async def _take(self, user: str, mailbox: str, wanted: Mapping[int, str]) -> None:
        mine = await self._dovecot.flags(user, mailbox, list(wanted))
        by_flags: dict[str, list[int]] = {}
        for uid, flags in wanted.items():
            if mine.get(uid, flags) != flags:
                by_flags.setdefault(flags, []).append(uid)
        for flags, uids in by_flags.items():
            await self._dovecot.set_flags(user, mailbox, uids, flags)


def _read(rows: Any) -> dict[int, str]:
    """Read what came over the link. PeerError ``protocol`` if it makes no sense."""
    wanted = {}
    if not isinstance(rows, list) or len(rows) > BATCH:
        raise PeerError("protocol", "not a list of flags")
    for row in rows:
        match row:
            case [int(uid), str(flags)] if uid > 0 and _fits(flags):
                wanted[uid] = lasting(flags)
            case _:
                raise PeerError("protocol", f"not a message's flags: {row!r}"[:200])
    return wanted


def _fits(flags: str) -> bool:
    """Whether a message's flags can be sent; those of others are left to dsync."""
    return len(flags) <= LONGEST and flags.isprintable()


async def _rows(found: Mapping[str, Counters]) -> AsyncIterator[list[Any]]:
    for mailbox, counters in found.items():
        yield [mailbox, counters.modseq, counters.uidnext, counters.messages]


def _joined(uids: Sequence[int]) -> str:
    return ",".join(map(str, uids))
