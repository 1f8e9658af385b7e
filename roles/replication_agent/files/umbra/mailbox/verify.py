"""Verification: whether the copies on the nodes are the same, and if not, where.

One user after another, a few at a time, and nothing is locked: what changes while it is compared is
compared again. A difference counts when it is seen twice, ``PAUSE`` seconds apart, while the
user's mailboxes here stood still, so that a change on its way to the peer is none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

from umbra.mailbox import metrics
from umbra.mailbox.compare import (
    Difference,
    Found,
    Unlike,
    missing,
    of_descriptions,
    of_mailbox,
    to_look_into,
)
from umbra.mailbox.describe import Description, Message
from umbra.mailbox.doveadm import DoveadmError
from umbra.mailbox.mirror import CatchUpFailed, Preparation
from umbra.peer.exchange import PeerError

log = logging.getLogger(__name__)

WORKERS = 2
ROUNDS = 5
PAUSE = 1.0
REPAIRS = 2
RETRY = 60.0


class Side(Protocol):
    """One node's mailboxes."""

    async def describe(self, user: str, *, bodies: bool) -> Description:
        """Describe ``user``."""

    def messages(self, user: str, guid: str, *, bodies: bool) -> AsyncGenerator[Message, None]:
        """Yield the messages of one mailbox."""


class Here(Side, Protocol):
    """The mailboxes of the node that compares."""

    async def mark(self, user: str) -> str:
        """Return what changes with every change of ``user``."""


class Mender(Protocol):
    """The mirror to one peer."""

    async def resync(self, user: str, prepare: Preparation) -> None:
        """Make the peer's copy of ``user`` what it is here, after ``prepare``; CatchUpFailed."""


class Settler(Protocol):
    """Makes mailboxes that differ ready for a sync with one peer."""

    async def settle(self, user: str, found: Found, *, ours: bool) -> None:
        """Let the sync look into them, and with ``ours`` have this node's flags count."""


class Verifier:
    """Compares this node's mailboxes with each peer's."""

    def __init__(
        self,
        here: Here,
        peers: Mapping[str, Side],
        menders: Mapping[str, Mender],
        settlers: Mapping[str, Settler],
    ) -> None:
        self._here = here
        self._peers = peers
        self._menders = menders
        self._settlers = settlers
        self.different: dict[str, dict[str, int]] = {name: {} for name in peers}
        """By peer, the users who differed when they were last compared, and in how many places."""

    async def run(
        self,
        users: Iterable[str],
        *,
        bodies: bool,
        repair: bool,
        wanted: Callable[[str, str], bool] = lambda user, peer: True,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Compare ``users`` with all peers; yield a result for each user and peer as it is known.

        :param wanted: (user, peer): whether to compare them.

        A result has ``user``, ``peer``, ``outcome`` (``equal``, ``different``, ``repaired``,
        ``changing``, ``failed``), ``count``, ``differences`` (the first of them) and ``reason``.
        """
        todo = [(user, peer) for user in users for peer in self._peers if wanted(user, peer)]
        pairs = iter(todo)
        results: asyncio.Queue[dict[str, Any]] = asyncio.Queue(WORKERS)

        async def work() -> None:
            for user, peer in pairs:
                await results.put(await self._verify(user, peer, bodies=bodies, repair=repair))

        tasks = [asyncio.create_task(work(), name="verify") for _ in range(WORKERS)]
        try:
            for _ in todo:
                yield await results.get()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _verify(self, user: str, peer: str, *, bodies: bool, repair: bool) -> dict[str, Any]:
        found, reason = Found(), ""
        try:
            outcome, found = await self._settled(user, peer, bodies=bodies)
            for _ in range(REPAIRS if repair else 0):
                if outcome != "different":
                    break
                settle = self._settlers[peer].settle
                await self._menders[peer].resync(user, partial(settle, user, found, ours=False))
                again, left = await self._settled(user, peer, bodies=bodies)
                if again == "equal":
                    outcome = "repaired"
                else:
                    outcome, found = again, left
        except (DoveadmError, PeerError, CatchUpFailed) as error:
            outcome = "different" if found.count else "failed"
            reason = f"it was not repaired: {error}" if found.count else str(error)
        except Exception as error:
            # One user's must not end the others', and whoever counts the results must get this one.
            log.exception("verification of %s failed", user)
            outcome, reason = "failed", repr(error)
        metrics.VERIFIED.labels(peer, outcome).inc()
        if outcome in ("equal", "repaired"):
            self.different[peer].pop(user, None)
        elif outcome == "different":
            self.different[peer][user] = found.count
        metrics.DIFFERENT.labels(peer).set(len(self.different[peer]))
        return {
            "user": user,
            "peer": peer,
            "outcome": outcome,
            "count": found.count,
            "differences": [asdict(difference) for difference in found.shown],
            "reason": reason,
        }

    async def _settled(self, user: str, peer: str, *, bodies: bool) -> tuple[str, Found]:
        """Compare until both are equal, or a difference stays while nothing changes here."""
        mark, seen = "", False
        for turn in range(ROUNDS):
            if turn:
                await asyncio.sleep(PAUSE)
            if not seen:
                mark = await self._here.mark(user)
            found = await self.compare(user, peer, bodies=bodies)
            if not found.count:
                return "equal", found
            now = await self._here.mark(user)
            if seen and now == mark:
                return "different", found
            seen, mark = now == mark, now
        return "changing", found

    async def compare(
        self,
        user: str,
        peer: str,
        *,
        bodies: bool = False,
        counts: Callable[[Difference], bool] = lambda difference: True,
    ) -> Found:
        """Compare once, and keep what ``counts``. DoveadmError or PeerError if one cannot be read.

        The user must be known on one node at least.
        """
        there = self._peers[peer]
        try:
            async with asyncio.TaskGroup() as tasks:
                one = tasks.create_task(self._here.describe(user, bodies=bodies))
                two = tasks.create_task(there.describe(user, bodies=bodies))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        mine, theirs = one.result(), two.result()
        if not mine.exists and not theirs.exists:
            raise DoveadmError("the user is unknown")
        found = Found()
        found.missing = missing(mine, theirs)
        found.brought = {name: theirs.mailboxes[name] for name in missing(theirs, mine)}
        for difference in filter(counts, of_descriptions(mine, theirs)):
            found.add(difference)
        for name, my_box, their_box in to_look_into(mine, theirs):
            unlike = found.unlike[name] = Unlike(
                my_box.guid, their_box.guid, brings=my_box.uidvalidity != their_box.uidvalidity
            )
            left = self._here.messages(user, my_box.guid, bodies=bodies)
            right = there.messages(user, their_box.guid, bodies=bodies)
            async for difference in of_mailbox(name, unlike, left, right):
                if counts(difference):
                    found.add(difference)
        return found


class Rounds:
    """Compares all users one by one, over and over, so slowly that nobody notices.

    :param users: returns all users.
    :param ready: (user, peer): whether the copies are expected to be equal now.
    :param period: how long one round takes (seconds); 0 for never.
    """

    def __init__(
        self,
        verifier: Verifier,
        users: Callable[[], Awaitable[list[str]]],
        ready: Callable[[str, str], bool],
        period: float,
    ) -> None:
        self._verifier = verifier
        self._users = users
        self._ready = ready
        self._period = period

    async def run(self) -> None:
        """Run until cancelled."""
        while self._period:
            try:
                users = sorted(await self._users())
            except DoveadmError as error:
                log.warning("the slow verification waits: %s", error)
                users = []
            if not users:
                await asyncio.sleep(min(self._period, RETRY))
            for user in users:
                await asyncio.sleep(self._period / len(users))
                async with aclosing(
                    self._verifier.run([user], bodies=False, repair=False, wanted=self._ready)
                ) as results:
                    async for result in results:
                        if result["outcome"] == "different":
                            log.warning(
                                "%s differs on %s in %d places: umbractl verify %s",
                                user, result["peer"], result["count"], user,
                            )  # fmt: skip
