"""The rules of the mirror queue, checked on random sequences of events."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from umbra.mailbox.mirror_queue import MirrorQueue

USERS = st.sampled_from([f"user{number}@example.org" for number in range(6)])
MAILBOXES = st.sampled_from(["", "INBOX", "INBOX", "Sent"])
WORKERS = 3


class Model(RuleBasedStateMachine):
    """Holds for each ticket which syncs started after it, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: MirrorQueue[int] = MirrorQueue(WORKERS)
        self.clock = 0
        self.open: dict[int, str] = {}  # ticket: user
        self.noted: dict[str, int] = {}  # user: when it was last noted
        self.running: dict[str, int] = {}  # user: when its sync started
        self.mailboxes: dict[int, str] = {}  # ticket: where its change is
        self.places: dict[str, str] = {}  # user: where its sync is
        self.whole: set[str] = set()  # whose next sync has to be of all mailboxes

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    @rule(user=USERS, mailbox=MAILBOXES)
    def wait(self, user: str, mailbox: str) -> None:
        ticket = self.tick()
        self.open[ticket] = user
        self.mailboxes[ticket] = mailbox
        self.queue.wait(user, ticket, mailbox)

    @rule(users=st.lists(USERS, max_size=3))
    def note(self, users: list[str]) -> None:
        now = self.tick()
        resting = set(self.queue.resting)
        self.queue.note(users)
        assert self.queue.resting == resting, "what is noted ends no rest"
        self.noted.update(dict.fromkeys(users, now))
        self.whole.update(users)

    @rule()
    def start(self) -> None:
        user = self.queue.start()
        if user is None:
            wanting = (set(self.open.values()) | set(self.noted)) - self.queue.held
            wanting -= self.queue.suspended | self.queue.resting
            assert len(self.running) == WORKERS or not wanting - set(self.running)
            return
        assert user not in self.running, "two syncs of one user"
        assert user not in self.queue.suspended
        self.running[user] = self.tick()
        assert len(self.running) <= WORKERS
        self.places[user] = self.queue.place(user)
        assert not (self.places[user] and user in self.whole)
        self.whole.discard(user)

    @precondition(lambda self: bool(self.running))
    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        user = data.draw(st.sampled_from(sorted(self.running)))
        started = self.running.pop(user)
        tickets, settled = self.queue.done(user)
        covered = [
            ticket for ticket, name in self.open.items() if name == user and ticket < started
        ]
        assert sorted(tickets) == covered, "only what was there at the start, and all of it"
        if self.places[user]:
            assert {self.mailboxes[ticket] for ticket in covered} <= {self.places[user]}
            assert not settled
        for ticket in tickets:
            del self.open[ticket]
        if user in self.noted and self.noted[user] < started:
            assert settled
            del self.noted[user]
        else:
            assert not settled

    @precondition(lambda self: bool(self.running))
    @rule(data=st.data())
    def again(self, data: st.DataObject) -> None:
        user = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[user]
        self.queue.again(user)
        self.whole.add(user)

    @precondition(lambda self: bool(set(self.running) & set(self.noted) - set(self.open.values())))
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        candidates = set(self.running) & set(self.noted) - set(self.open.values())
        user = data.draw(st.sampled_from(sorted(candidates)))
        del self.running[user]
        self.queue.hold(user)
        self.whole.add(user)
        assert user in self.queue.held | self.queue.suspended

    @precondition(lambda self: bool(self.running))
    @rule(data=st.data())
    def rest(self, data: st.DataObject) -> None:
        user = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[user]
        self.queue.rest(user)
        self.whole.add(user)

    @rule()
    def wake(self) -> None:
        self.queue.wake()
        assert not self.queue.resting

    @rule(user=USERS)
    def wake_one(self, user: str) -> None:
        resting = set(self.queue.resting)
        self.queue.wake(user)
        assert self.queue.resting == resting - {user}

    @rule(users=st.sets(USERS, max_size=2))
    def suspend(self, users: set[str]) -> None:
        self.queue.suspend(users)

    @rule()
    def withdraw(self) -> None:
        now = self.tick()
        given = self.queue.withdraw()
        assert {t: user for user, tickets in given.items() for t in tickets} == self.open
        self.noted.update(dict.fromkeys(given, now))
        self.whole.update(given)
        self.open.clear()

    @invariant()
    def counts(self) -> None:
        assert self.queue.running == len(self.running)
        assert self.queue.noted == len(self.noted)
        assert self.queue.held <= set(self.noted) - self.queue.suspended
        left = set(self.noted) - self.queue.suspended - set(self.open.values()) - set(self.running)
        assert self.queue.resting <= left
        assert self.queue.wanting() == set(self.noted) - self.queue.suspended
        assert self.queue.paused == len(set(self.noted) & self.queue.suspended)

    def teardown(self) -> None:
        """Nothing is lost: when all syncs end well, everybody is released."""
        self.queue.suspend(set())
        self.queue.note(list(self.queue.held))
        self.queue.wake()
        released: list[int] = []
        for user in list(self.running):
            released += self.queue.done(user)[0]
        while (started := self.queue.start()) is not None:
            released += self.queue.done(started)[0]
        assert sorted(released) == sorted(self.open)
        assert self.queue.noted == 0


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMirrorQueue = Model.TestCase


def test_users_take_turns() -> None:
    queue: MirrorQueue[int] = MirrorQueue(1)
    queue.wait("busy", 1)
    assert queue.start() == "busy"
    queue.wait("busy", 2)
    queue.wait("other", 3)
    queue.wait("busy", 4)
    assert queue.start() is None
    assert queue.done("busy") == ([1], False)
    assert queue.start() == "other"
    queue.done("other")
    assert queue.start() == "busy"
    assert queue.done("busy") == ([2, 4], False)


def test_a_change_during_a_sync_waits_for_the_next() -> None:
    queue: MirrorQueue[int] = MirrorQueue(4)
    queue.wait("user", 1)
    queue.start()
    queue.wait("user", 2)
    assert queue.start() is None, "never two syncs of one user"
    assert queue.done("user")[0] == [1]
    assert queue.start() == "user"
    assert queue.done("user")[0] == [2]


def test_a_sync_is_of_one_mailbox_if_it_covers_nothing_else() -> None:
    queue: MirrorQueue[int] = MirrorQueue(4)

    def place(*mailboxes: str, noted: bool = False) -> str:
        for mailbox in mailboxes:
            queue.wait("user", 1, mailbox)
        if noted:
            queue.note(["user"])
        assert queue.start() == "user"
        return queue.place("user")

    assert place("INBOX", "INBOX") == "INBOX"
    queue.wait("user", 2, "Sent")
    assert queue.place("user") == "INBOX", "it is the next one's"
    queue.done("user")
    assert place() == "Sent"
    queue.done("user")
    for whole in (("INBOX", "Sent"), ("INBOX", ""), ("",)):
        assert place(*whole) == ""
        queue.done("user")
    assert place("INBOX", noted=True) == ""
    queue.done("user")
    # Whatever it was that went wrong: all the next time.
    assert place("INBOX") == "INBOX"
    queue.again("user")
    assert place("INBOX") == ""
    queue.done("user")
    assert place("INBOX") == "INBOX"
    assert queue.withdraw() == {"user": [1]}
    queue.done("user")
    assert place("INBOX") == ""


def turns_of(queue: MirrorQueue[int], most: int) -> list[str]:
    order: list[str] = []
    while len(order) < most and (user := queue.start()) is not None:
        order.append(user)
        queue.done(user)
    return order


def test_who_is_waited_for_does_not_stand_behind_a_thousand_notes() -> None:
    queue: MirrorQueue[int] = MirrorQueue(1)
    queue.note(f"noted{number}" for number in range(1000))
    assert turns_of(queue, 1) == ["noted0"]
    queue.wait("first", 1)
    queue.wait("second", 2)
    # Noted already, and waited for now.
    queue.wait("noted9", 3)
    assert turns_of(queue, 6) == ["first", "noted1", "second", "noted2", "noted9", "noted3"]
    # The other way round: steady changes do not keep the notes from their turns either.
    for number in range(1000):
        queue.wait(f"busy{number}", number)
    assert turns_of(queue, 4) == ["busy0", "noted4", "busy1", "noted5"]


def test_whose_changes_are_waited_for_no_more_stands_with_the_noted() -> None:
    queue: MirrorQueue[int] = MirrorQueue(1)
    queue.note(["noted"])
    queue.wait("given up", 1)
    queue.withdraw()
    queue.wait("awaited", 2)
    assert turns_of(queue, 9) == ["awaited", "noted", "given up"]
