"""Which user is synced next, and which changes a sync covers. Pure; one instance for each peer.

Rules:

* A change joins the user's next sync, never the running one, which may have read past it.
* A user has at most one running sync; at most ``workers`` run at once; users take turns in the
  order in which they asked, so that a busy or huge mailbox never holds up the others.
* Users of whom a change is waited for do not stand behind those of whom changes are only noted,
  which may be thousands: the two take turns.
* A suspended user has no turn; only notes come for such a one. Nor has one who rests, until a
  change is waited for or the rest is over.
* A change is *waited for* (someone gets no OK before a sync covers it) or *noted* (it was answered;
  the flag is on disk). Both ask
  for a sync. Changes of one user that come together share one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Ticket = TypeVar("Ticket")


@dataclass(slots=True)
class _User(Generic[Ticket]):
    places: set[str] = field(default_factory=set)  # where the next sync is due; "": all mailboxes
    place: str = ""  # where the running one is
    waiting: list[Ticket] = field(default_factory=list)  # for the next sync
    covered: list[Ticket] = field(default_factory=list)  # by the running one
    noted: bool = False
    noted_covered: bool = False
    running: bool = False
    number: int = 0  # of the sync that was started last

    @property
    def wants(self) -> bool:
        return bool(self.waiting) or self.noted


class MirrorQueue(Generic[Ticket]):
    """The syncs that one peer needs. A ticket stands for one change that is waited for."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._users: dict[str, _User[Ticket]] = {}
        # In their order; a dict, since a user may leave from the middle.
        self._awaited: dict[str, None] = {}
        self._noted: dict[str, None] = {}
        self._noted_next = False
        self._started = 0
        self.running = 0
        self.noted = 0
        self.held: set[str] = set()
        self.resting: set[str] = set()
        self.suspended: set[str] = set()

    def wait(self, user: str, ticket: Ticket, mailbox: str = "") -> None:
        """A change that is waited for; it is of messages in ``mailbox``, or not known."""
        entry = self._of(user)
        entry.waiting.append(ticket)
        entry.places.add(mailbox)
        self._enqueue(user)

    def note(self, users: Iterable[str]) -> None:
        """Changes that nobody waits for."""
        for user in users:
            entry = self._of(user)
            entry.places.add("")
            if not entry.noted:
                entry.noted = True
                self.noted += not entry.noted_covered
            if user not in self.resting:
                self._enqueue(user)

    def start(self) -> str | None:
        """Return the user whose sync starts now, or None if there is none or no room."""
        noted = bool(self._noted) and (self._noted_next or not self._awaited)
        order = self._noted if noted else self._awaited
        if self.running >= self._workers or not order:
            return None
        self._noted_next = not noted
        user = next(iter(order))
        del order[user]
        entry = self._users[user]
        entry.running = True
        self._started += 1
        entry.number = self._started
        entry.covered, entry.waiting = entry.waiting, []
        entry.noted_covered, entry.noted = entry.noted, False
        entry.place = entry.places.pop() if len(entry.places) == 1 else ""
        entry.places.clear()
        self.running += 1
        return user

    def place(self, user: str) -> str:
        """Return the only mailbox that the running sync has to cover, "" for all."""
        return self._users[user].place

    def done(self, user: str) -> tuple[list[Ticket], bool]:
        """The running sync ended well.

        Returns the tickets that it covers, and whether a note is settled.
        """
        entry = self._end(user)
        tickets, entry.covered = entry.covered, []
        settled = entry.noted_covered and not entry.noted
        entry.noted_covered = False
        self.noted -= settled
        self._requeue(user, entry)
        return tickets, settled

    def number(self, user: str) -> int:
        """Return what tells the running sync of ``user`` from all others, 0 for none."""
        entry = self._users.get(user)
        return entry.number if entry is not None and entry.running else 0

    def hold(self, user: str) -> None:
        """The running sync covers nothing and cannot.

        The user stays noted, with no turn before it is noted again.
        """
        assert not self.awaited(user)
        self.again(user)
        self._dequeue(user)
        if user not in self.suspended:
            self.held.add(user)

    def again(self, user: str) -> None:
        """The running sync covers nothing; what it would have covered joins the next one."""
        entry = self._end(user)
        entry.waiting = entry.covered + entry.waiting
        entry.covered = []
        entry.noted |= entry.noted_covered
        entry.noted_covered = False
        entry.places.add("")
        self._requeue(user, entry)

    def rest(self, user: str) -> None:
        """Do as ``again``, but with no turn before the user is waited for or woken."""
        self.again(user)
        if not self.awaited(user) and user not in self.suspended:
            self._dequeue(user)
            self.resting.add(user)

    def wake(self, user: str = "") -> None:
        """Give those who rest their turns, or ``user`` alone."""
        for one in list(self.resting):
            if user in ("", one):
                self._enqueue(one)

    def withdraw(self) -> dict[str, list[Ticket]]:
        """Nobody waits any more: return all tickets by user, and note the users instead.

        Running syncs go on.
        """
        given = {}
        for user, entry in self._users.items():
            if tickets := entry.covered + entry.waiting:
                given[user] = tickets
                entry.covered, entry.waiting = [], []
        self.note(given)
        return given

    def awaited(self, user: str) -> bool:
        """Return whether somebody waits for the running sync of ``user`` or the one after it."""
        entry = self._users.get(user)
        return entry is not None and bool(entry.covered or entry.waiting)

    def suspend(self, users: set[str]) -> None:
        """Only ``users`` get no turn from now on, whatever is noted of them."""
        before, self.suspended = self.suspended, set(users)
        self.held -= users
        self.resting -= users
        for user in users - before:
            self._dequeue(user)
        for user in before - users:
            if user in self._users:
                self._enqueue(user)

    def wanting(self) -> set[str]:
        """Return the users who are noted and not suspended."""
        return {user for user in self._users if self.lacks(user)} - self.suspended

    @property
    def busy(self) -> bool:
        """Whether a sync runs, or a user has a turn."""
        return bool(self.running or self._awaited or self._noted)

    @property
    def paused(self) -> int:
        """How many users are noted and suspended."""
        return sum(self.lacks(user) for user in self.suspended)

    def lacks(self, user: str) -> bool:
        """Return whether ``user`` is noted, or a sync that shall settle the note runs."""
        entry = self._users.get(user)
        return entry is not None and (entry.noted or entry.noted_covered)

    def _of(self, user: str) -> _User[Ticket]:
        entry = self._users.get(user)
        if entry is None:
            entry = self._users[user] = _User()
        return entry

    def _enqueue(self, user: str) -> None:
        entry = self._users[user]
        if entry.running or user in self.suspended:
            return
        self.held.discard(user)
        self.resting.discard(user)
        order, other = self._awaited, self._noted
        if not entry.waiting:
            order, other = other, order
        other.pop(user, None)
        order[user] = None

    def _dequeue(self, user: str) -> None:
        self._awaited.pop(user, None)
        self._noted.pop(user, None)

    def _end(self, user: str) -> _User[Ticket]:
        entry = self._users[user]
        assert entry.running
        entry.running = False
        self.running -= 1
        return entry

    def _requeue(self, user: str, entry: _User[Ticket]) -> None:
        if entry.wants:
            self._enqueue(user)
        else:
            del self._users[user]
