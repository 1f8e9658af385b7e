"""What was merged: the record of how a returning node's mailboxes differed from the primary's.

A node that was primary and lost that without handing it over may hold changes that nobody else has.
It is brought together with the primary, both ways, before it is made a copy; nothing is deleted
that only one side had. What differed is written down before it is merged, user by user, because
afterwards nobody could tell; what the node only lacked is no news. It is on the disk of the node
that is primary, ``merged-PEER.jsonl``, one line for each user who differed, the first line for the
merge itself. A later merge with the same node replaces it.

Dying between the record and the merge: the user is compared again, and may stand there twice.

A mailbox of which the peer only lacks something is left out of a merge, unless the peer may have
told somebody that a message is gone. For two-way dsync would renumber the messages that the peer
has lost, on both nodes, and where the peer's copy was deleted to be made anew it deletes the
primary's, how old the deletion may be (2.4.1). What such a mailbox lacks comes with the sync one
way that follows. A whole mailbox is not deleted by any merge: neither what the peer lacks nor, if
it may have told somebody of a change, what only the peer has. One that a user has deleted on one
side is there again then.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from umbra.mailbox.compare import Difference, Found
from umbra.mailbox.describe import Mailbox
from umbra.mailbox.doveadm import DoveadmError, Outcome, SyncResult, nameable
from umbra.mailbox.mirror import Carrier
from umbra.peer.exchange import PeerError

log = logging.getLogger(__name__)

# Users who are listed one by one; of the rest the journal has a line.
LISTED = 1000


# Mailboxes that one command can leave out.
APART = 1000


# They follow from others that are told.
SUMMARIES = frozenset({"guid", "uidvalidity", "uidnext", "messages"})


# Two mailboxes of one name, which a merge makes one, though none of them has a message.
TWO = frozenset({"guid", "uidvalidity"})


class Comparer(Protocol):
    """Tells what a user's mailboxes here and at a peer differ in."""

    async def compare(self, user: str, peer: str, *, counts: Callable[[Difference], bool]) -> Found:
        """Compare once. DoveadmError or PeerError if one side cannot be read."""


def of_the_peer(difference: Difference) -> bool:
    """Whether it is something that the peer brings. What it only lacks it gets, as any shadow."""
    if difference.what in SUMMARIES:
        return False
    return bool(difference.there) or difference.of_flags


class Settler(Protocol):
    """Prepares a merge."""

    async def lead(self, user: str) -> None:
        """Let what changes here from now on be newer than all that the peer has."""

    async def keep(self, user: str, mailboxes: Mapping[str, Mailbox]) -> None:
        """Have the merge delete none of these at the peer."""

    async def settle(self, user: str, found: Found, *, ours: bool) -> None:
        """Let the merge look into what differs, and with ``ours`` have this node's flags count."""


class Record:
    """The record of the last merge with one peer.

    :param directory: ``/var/lib/umbra/mirror``.
    """

    def __init__(self, directory: Path, peer: str) -> None:
        self._path = directory / f"merged-{peer}.jsonl"
        self._peer = peer

    def begin(self, epoch: int, at: str) -> None:
        """Begin a record, unless that of this term of office is there. OSError."""
        head = self.read()
        if head is not None and head["epoch"] == epoch:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path.unlink(missing_ok=True)
        self._append({"peer": self._peer, "epoch": epoch, "since": at})

    def add(self, user: str, found: Found) -> None:
        """Note one user who differs; on disk when it returns. OSError."""
        differences = [asdict(difference) for difference in found.shown]
        self._append({"user": user, "count": found.count, "differences": differences})

    def _append(self, row: dict[str, Any]) -> None:
        with self._path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a power cut left half a line
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> dict[str, Any] | None:
        """Return ``peer``, ``epoch``, ``since`` and ``users``; None if nothing was ever merged.

        A line that a power cut left half is passed over. OSError if it cannot be read.
        """
        rows = []
        try:
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    continue
        except FileNotFoundError:
            return None
        if not rows or "epoch" not in rows[0]:
            return None
        users = [row for row in rows[1:] if "user" in row]
        return {**rows[0], "count": len(users), "users": users[:LISTED]}


class RecordingCarrier:
    """A carrier that writes down how a user differs before it merges, and merges only who does.

    :param begin: called with each merge of a user, before it.
    :param settler: prepares the merge of what differs.
    :param unshared: whether the peer may have told somebody of a change that this node lacks. If
        not, the flags of its messages do not count.
    :param merged: called after it: what the peer brought, other peers lack.
    """

    def __init__(
        self,
        carrier: Carrier,
        peer: str,
        record: Record,
        comparer: Comparer,
        begin: Callable[[Record], Awaitable[None]],
        settler: Settler,
        unshared: Callable[[], bool],
        merged: Callable[[str], None],
    ) -> None:
        self._carrier = carrier
        self._peer = peer
        self._record = record
        self._comparer = comparer
        self._begin = begin
        self._settler = settler
        self._unshared = unshared
        self._merged = merged

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        """See ``Carrier.sync``. A merge that cannot be written down is not made."""
        if merge:
            two = False

            def counts(difference: Difference) -> bool:
                nonlocal two
                two |= difference.what in TWO
                return of_the_peer(difference)

            try:
                await self._begin(self._record)
                await self._settler.lead(user)
                found = await self._comparer.compare(user, self._peer, counts=counts)
                if not found.count and not two:
                    return SyncResult(Outcome.EQUAL)
                if found.count:
                    await asyncio.to_thread(self._record.add, user, found)
                    log.warning(
                        "merge with %s: %s differs in %d places: %s", self._peer, user,
                        found.count, "; ".join(f"{d.mailbox} {d.what}" for d in found.shown[:5]),
                    )  # fmt: skip
                ours = not self._unshared()
                await self._settler.settle(user, found, ours=ours)
                if not ours:
                    await self._settler.keep(user, found.brought)
                lacking = found.lacking() if ours else found.missing
                apart = [*filter(nameable, lacking)][:APART]
            except (DoveadmError, PeerError, OSError) as error:
                return SyncResult.of(error)
        try:
            return await self._carrier.sync(user, state, merge=merge, apart=apart)
        finally:
            if merge:  # also one that failed half-way
                self._merged(user)

    def progress(self, user: str) -> float:
        """See ``Carrier.progress``."""
        return self._carrier.progress(user)

    def cut(self, user: str = "") -> None:
        """See ``Carrier.cut``."""
        self._carrier.cut(user)
