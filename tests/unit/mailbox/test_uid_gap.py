"""The gap in the UIDs: whose mailboxes get one, in which order, and that nothing of it stays."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbra.mailbox import uid_gap as module
from umbra.mailbox.doveadm import Doveadm, DoveadmError, Reply
from umbra.mailbox.uid_gap import (
    GAP,
    LAST,
    MAILBOXES,
    RECENT,
    USERS,
    Dovecot,
    Recent,
    UidGap,
    raised,
)

USER = "a@example.org"


class World:
    """A Dovecot whose users have an INBOX and a Sent each, and a clock that stands."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lifted: list[tuple[str, str, int]] = []
        self.error: Mapping[str, Exception] = {}
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.busy = self.most = 0
        self.gap = UidGap(cast(Dovecot, self), lambda: self.now)

    async def uidnext(self, user: str) -> dict[str, int]:
        self.busy += 1
        self.most = max(self.most, self.busy)
        try:
            await asyncio.sleep(0)
            await self.go_on.wait()
        finally:
            self.busy -= 1
        if user in self.error:
            raise self.error[user]
        return {"Sent": 7, "INBOX": 3}

    async def lift(self, user: str, name: str, uidnext: int) -> None:
        self.lifted.append((user, name, uidnext))

    async def settled(self) -> None:
        for _ in range(100):
            await asyncio.sleep(0)

    def users(self) -> list[str]:
        return [user for user, name, _ in self.lifted if name == "INBOX"]


@pytest.fixture
async def world() -> World:
    return World()


def test_the_inbox_comes_first_then_what_has_given_the_most_uids() -> None:
    assert list(raised({"A": 5, "INBOX": 1, "B": 9, "C": 5})) == [
        ("INBOX", 1 + GAP), ("B", 9 + GAP), ("A", 5 + GAP), ("C", 5 + GAP),
    ]  # fmt: skip


@given(st.dictionaries(st.text(), st.integers(1, 2**32 - 1), max_size=2 * MAILBOXES))
def test_uids_ascend_and_never_run_out(uidnext: Mapping[str, int]) -> None:
    found = list(raised(uidnext))
    assert len(found) <= MAILBOXES
    assert all(uidnext[name] + GAP == number <= LAST for name, number in found)


def test_who_was_synced_last_comes_first_and_is_forgotten_then() -> None:
    recent = Recent()
    for at, user in enumerate(("old", "a", "b", "a")):
        recent.note(user, at * RECENT / 2)
    assert recent.take(RECENT * 1.5) == ["a", "b"]
    assert recent.take(RECENT * 1.5) == []


def test_only_so_many_users_are_remembered() -> None:
    recent = Recent()
    for number in range(USERS + 5):
        recent.note(str(number), 0)
    assert recent.take(0) == [str(number) for number in range(USERS + 4, 4, -1)]


async def test_gaps_are_left_for_the_last_users_one_after_the_other(world: World) -> None:
    for number in range(9):
        world.gap.note(f"{number}@example.org")
    world.gap.begin()
    await world.settled()
    assert world.users() == [f"{number}@example.org" for number in range(8, -1, -1)]
    assert [row for row in world.lifted if row[0] == "4@example.org"] == [
        ("4@example.org", "INBOX", 3 + GAP), ("4@example.org", "Sent", 7 + GAP),
    ]  # fmt: skip
    assert world.most == 1
    await world.gap.close()


async def test_nothing_is_done_by_a_shadow(world: World) -> None:
    world.gap.note(USER)
    await world.gap.before(USER)
    await world.settled()
    assert world.lifted == []


async def test_a_message_waits_for_the_gap_of_its_recipient_once(world: World) -> None:
    world.gap.begin()
    await world.gap.before(USER)
    assert world.users() == [USER]
    await world.gap.before(USER)
    assert world.users() == [USER]
    world.now += module.RESUBMITTED_FOR
    await world.gap.before("late@example.org")
    assert world.users() == [USER]


async def test_a_message_does_not_wait_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    world.go_on.clear()
    world.gap.begin()
    await asyncio.wait_for(world.gap.before(USER), 5)
    assert world.lifted == []
    world.go_on.set()
    await world.settled()
    assert world.users() == [USER]


async def test_an_error_of_one_user_is_only_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.error = {"b@example.org": DoveadmError("no"), "c@example.org": ValueError("what")}
    for user in ("a", "b", "c"):
        world.gap.note(f"{user}@example.org")
    with caplog.at_level(logging.INFO):
        world.gap.begin()
        await world.settled()
    assert world.users() == [USER]
    assert "2 of 3 users have none" in caplog.records[-1].message
    assert caplog.records[-1].levelno == logging.WARNING


async def test_a_dovecot_that_hangs_is_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LONGEST", 0.01)
    world.go_on.clear()
    for number in range(9):
        world.gap.note(str(number))
    world.gap.begin()
    await asyncio.sleep(0.05)
    assert world.busy == 1
    assert "8 of 9 users have none" in caplog.records[-1].message
    await world.gap.close()


async def test_it_ends_with_the_role_and_begins_with_the_next_one(world: World) -> None:
    world.go_on.clear()
    world.gap.note(USER)
    world.gap.begin()
    await world.settled()
    waits = asyncio.create_task(world.gap.before(USER))
    await world.settled()
    world.gap.stop()
    await asyncio.wait_for(waits, 5)
    world.go_on.set()
    await world.settled()
    assert (world.busy, world.lifted) == (0, [])
    assert not [task for task in asyncio.all_tasks() if "gap" in task.get_name()]
    await world.gap.before(USER)
    assert world.lifted == []
    world.gap.note("b@example.org")
    world.gap.begin()
    await world.settled()
    assert world.users() == ["b@example.org"]


class FakeDoveadm:
    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.asked: list[str] = []

    async def run(self, user: str, *command: str, limit: float) -> Reply:
        self.asked = [user, *command]
        return self.reply


async def test_what_is_asked_of_dovecot() -> None:
    fake = FakeDoveadm(Reply(["INBOX", "146", "-odd", "1"], ""))
    dovecot = Dovecot(cast(Doveadm, fake))
    assert await dovecot.uidnext(USER) == {"INBOX": 146, "-odd": 1}
    assert fake.asked == [USER, "mailbox status", "-u", USER, "uidnext", "*"]
    await dovecot.lift(USER, "-odd", 1001)
    lifts = [USER, "mailbox update", "-u", USER, "--min-next-uid", "1001", "--", "-odd"]
    assert fake.asked == lifts


@pytest.mark.parametrize(("code", "found"), [("NOUSER", {}), ("TEMPFAIL", None)])
async def test_what_dovecot_may_answer(code: str, found: dict[str, int] | None) -> None:
    dovecot = Dovecot(cast(Doveadm, FakeDoveadm(Reply([], code))))
    if found is not None:
        assert await dovecot.uidnext(USER) == found
    else:
        with pytest.raises(DoveadmError, match="TEMPFAIL"):
            await dovecot.uidnext(USER)
    with pytest.raises(DoveadmError, match=code):
        await dovecot.lift(USER, "INBOX", 5)
