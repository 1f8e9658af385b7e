"""A gap in the UIDs of mailboxes, left when this node takes the place of one that was lost.

The lost primary may have given a UID to a message that never came here. If this node gives the same
one to another message, the node that comes back cannot be made a copy by a sync of what is new:
dsync puts no message below UIDNEXT, so it deletes and copies the whole mailbox anew; and where the
lost node's message survives, the merge renumbers both. So from the moment that the role is this
node's, in the background, it raises UIDNEXT over all that the lost node can have given. UIDs need
only ascend (RFC 9051, 2.3.1.1), and ``mailbox update`` changes neither MODSEQ nor UIDVALIDITY.

* Whose changes came last goes first: that is where something was on its way.
* A message that is resubmitted waits for its recipient's gap; the lost node may have stored it.
* Whatever is not done before the next message comes costs no more than the copying.

Never on a shadow: there the gap would be what it is to prevent. Dying half-way, or stopping, leaves
gaps that do no harm on a primary; nothing goes by them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from time import monotonic

from umbra.mailbox.doveadm import Doveadm, DoveadmError

log = logging.getLogger(__name__)

GAP = 1000
"""UIDs that are left out: more than a mailbox has on its way, but where a whole folder is copied
to it, and few enough that two million failovers would not use them up."""
LAST = 2**31 - 1
"""UIDNEXT is not raised over this: clients may count with a sign, and where there are no more UIDs
a process of Dovecot that stores a message ends with an assertion (2.4.1)."""
USERS = 1000
"""The last ones: some ten seconds' work (48 mailboxes of 11 users took 0.1 s, four at a time)."""
RECENT = 600.0
"""Seconds. What was on its way never came here; who changed something lately does so often."""
MAILBOXES = 100
"""Of one user."""
COMMAND = 5.0
"""Seconds for one command of Dovecot."""
PATIENCE = 2.0
"""Seconds that a message waits for the gap."""
LONGEST = 120.0
"""Seconds for all users."""
RESUBMITTED_FOR = 600.0
"""Seconds after the takeover in which a message waits; by then the lost node's are delivered."""


class Recent:
    """Whose mailboxes were synced to this node last. Pure; times are seconds of any one clock."""

    def __init__(self) -> None:
        self._users: OrderedDict[str, float] = OrderedDict()

    def note(self, user: str, now: float) -> None:
        """Note that a sync of ``user`` came."""
        self._users[user] = now
        self._users.move_to_end(user)
        if len(self._users) > USERS:
            self._users.popitem(last=False)

    def take(self, now: float) -> list[str]:
        """Return those of the last ``RECENT`` seconds, the last one first, and forget all."""
        found = [user for user, at in reversed(self._users.items()) if now - at <= RECENT]
        self._users.clear()
        return found


def raised(uidnext: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yield mailboxes, in the order of their urgency, with the UIDNEXT that each is to get. Pure.

    The INBOX comes first, then what has given the most UIDs: there the next ones are given.
    """
    order = sorted(uidnext, key=lambda name: (name != "INBOX", -uidnext[name], name))
    for name in order[:MAILBOXES]:
        if uidnext[name] + GAP <= LAST:
            yield name, uidnext[name] + GAP


class Dovecot:
    """UIDNEXT of one user's mailboxes. DoveadmError if Dovecot does not answer in time."""

    def __init__(self, doveadm: Doveadm) -> None:
        self._doveadm = doveadm

    async def uidnext(self, user: str) -> dict[str, int]:
        """Return the UIDNEXT of each mailbox, by its name; none if there is no such user."""
        command = ("mailbox status", "-u", user, "uidnext", "*")
        reply = await self._doveadm.run(user, *command, limit=COMMAND)
        if reply.code == "NOUSER":
            return {}
        if reply.code:
            raise DoveadmError(f"doveadm mailbox status of {user} ended with {reply.code}")
        rows = zip(reply.fields[::2], reply.fields[1::2], strict=True)
        return {name: int(number) for name, number in rows}

    async def lift(self, user: str, name: str, uidnext: int) -> None:
        """Let the next message of the mailbox have at least this UID; a higher one stays."""
        command = ("mailbox update", "-u", user, "--min-next-uid", str(uidnext), "--", name)
        reply = await self._doveadm.run(user, *command, limit=COMMAND)
        if reply.code:
            raise DoveadmError(f"doveadm mailbox update of {user} ended with {reply.code}")


class UidGap:
    """Leaves the gaps: all that runs ends with ``stop``. What fails is logged, no more."""

    def __init__(self, dovecot: Dovecot, clock: Callable[[], float] = monotonic) -> None:
        self._dovecot = dovecot
        self._clock = clock
        self._recent = Recent()
        self._until: float | None = None
        self._users: dict[str, asyncio.Task[None]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._mailboxes = 0
        self._failed = 0

    def note(self, user: str) -> None:
        """Note that the primary syncs ``user`` to this node."""
        self._recent.note(user, self._clock())

    def begin(self) -> None:
        """Leave gaps, in the background: the role of a lost node is this one's, for certain.

        To be called again does no harm.
        """
        users = self._recent.take(self._clock())
        if self._until is None:
            self._until = self._clock() + RESUBMITTED_FOR
            self._start(self._leave_all(users), "gaps in the UIDs")

    def stop(self) -> None:
        """End it: the node is primary no more."""
        self._until = None
        self._users.clear()
        for task in self._running:
            task.cancel()

    async def close(self) -> None:
        """Stop, and return when nothing runs any more."""
        self.stop()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def before(self, user: str) -> None:
        """Return when a message for ``user`` may be stored: with the gap, or after ``PATIENCE``."""
        if self._until is not None and self._clock() < self._until:
            await asyncio.wait({self._of(user)}, timeout=PATIENCE)

    def _start(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def _of(self, user: str) -> asyncio.Task[None]:
        """Return the task that leaves the gap of ``user``; it may have ended."""
        if user not in self._users:
            self._users[user] = self._start(self._leave(user), f"gap in the UIDs of {user}")
        return self._users[user]

    async def _leave_all(self, users: Sequence[str]) -> None:
        began, self._mailboxes, self._failed = self._clock(), 0, 0
        left = iter(users)
        try:
            async with asyncio.timeout(LONGEST):
                # One at a time: this node opens meanwhile, and needs the cores.
                for user in left:
                    # Not awaited itself: this one's end must not be that of a message that waits.
                    await asyncio.wait({self._of(user)})
        except TimeoutError:
            pass  # who is left is counted
        lacking = self._failed + sum(1 for _ in left)
        log.log(
            logging.WARNING if lacking else logging.INFO,
            "a gap was left in the UIDs of %d mailboxes in %.2f s; %d of %d users have none,"
            " or not in all", self._mailboxes, self._clock() - began, lacking, len(users),
        )  # fmt: skip

    async def _leave(self, user: str) -> None:
        try:
            for name, uidnext in raised(await self._dovecot.uidnext(user)):
                await self._dovecot.lift(user, name, uidnext)
                self._mailboxes += 1
        except (DoveadmError, ValueError) as error:
            self._failed += 1
            log.info("no gap in the UIDs of %s, or not of all mailboxes: %s", user, error)
