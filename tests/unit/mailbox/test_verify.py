"""What verification tells of users: equal, different, changing meanwhile, or unreadable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

import pytest

from umbra.mailbox import verify as module
from umbra.mailbox.compare import Found, Unlike
from umbra.mailbox.describe import Description, Mailbox, Message
from umbra.mailbox.doveadm import DoveadmError
from umbra.mailbox.mirror import CatchUpFailed, Preparation
from umbra.mailbox.verify import Rounds, Verifier
from umbra.peer.exchange import PeerError


class Node:
    """Mailboxes as {user: flags of the one message}."""

    def __init__(self, **flags: str) -> None:
        self.flags = flags
        self.marks = 0
        self.on_describe: Callable[[str], None] = lambda user: None

    async def describe(self, user: str, *, bodies: bool) -> Description:
        self.on_describe(user)
        if user not in self.flags:
            return Description(exists=False)
        return Description(mailboxes={"INBOX": Mailbox("g", "1", "2", "1", self.flags[user])})

    async def messages(
        self, user: str, guid: str, *, bodies: bool
    ) -> AsyncGenerator[Message, None]:
        yield Message(1, "guid", self.flags[user], "1", "2")

    async def mark(self, user: str) -> str:
        self.marks += 1
        return f"{self.flags.get(user)}"


class Mirror:
    """The mirror to ``there``."""

    def __init__(self, here: Node, there: Node, works: bool = True) -> None:
        self.here, self.there, self.works, self.asked = here, there, works, 0
        self.settled = False

    async def resync(self, user: str, prepare: Preparation) -> None:
        self.asked += 1
        if not self.works:
            raise CatchUpFailed("nothing is copied to mail-b now")
        await prepare()
        assert self.settled, "dsync may pass over what differs"
        self.there.flags[user] = self.here.flags[user]

    async def settle(self, user: str, found: Found, *, ours: bool) -> None:
        assert found.unlike == {"INBOX": Unlike("g", "g", [1])}
        assert not ours, "the copy from scratch sees to flags"
        self.settled = True


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)


async def verify(
    here: Node, there: Node, users: Iterable[str], *, repair: bool = False, works: bool = True
) -> dict[str, dict[str, Any]]:
    mirror = Mirror(here, there, works)
    verifier = Verifier(here, {"mail-b": there}, {"mail-b": mirror}, {"mail-b": mirror})
    rows = [row async for row in verifier.run(users, bodies=False, repair=repair)]
    assert all(row["peer"] == "mail-b" for row in rows)
    return {row["user"]: row for row in rows}


async def test_equal_and_different() -> None:
    rows = await verify(Node(a="x", b="y"), Node(a="x", b="z"), ["a", "b"])
    assert rows["a"]["outcome"] == "equal"
    assert rows["b"]["outcome"] == "different"
    assert rows["b"]["differences"] == [
        {"mailbox": "INBOX", "what": "flags of message 1", "here": "y", "there": "z", "uid": 1}
    ]


async def test_a_change_on_its_way_is_no_difference() -> None:
    here, there = Node(a="new"), Node(a="old")
    turns = 0

    def arrives(user: str) -> None:
        nonlocal turns
        turns += 1
        if turns == 2:
            there.flags["a"] = "new"

    there.on_describe = arrives
    assert (await verify(here, there, ["a"]))["a"]["outcome"] == "equal"


async def test_one_that_never_stands_still() -> None:
    here, there = Node(a="0"), Node(a="x")

    def changes(user: str) -> None:
        here.flags["a"] = str(int(here.flags["a"]) + 1)

    here.on_describe = changes
    row = (await verify(here, there, ["a"]))["a"]
    assert row["outcome"] == "changing"
    assert int(here.flags["a"]) == module.ROUNDS


async def test_repair() -> None:
    here, there = Node(a="x", b="y"), Node(a="x", b="z")
    rows = await verify(here, there, ["a", "b"], repair=True)
    assert rows["a"]["outcome"] == "equal"
    assert rows["b"]["outcome"] == "repaired"
    assert rows["b"]["count"] == 1
    assert there.flags == here.flags


async def test_repair_that_cannot_be() -> None:
    rows = await verify(Node(b="y"), Node(b="z"), ["b"], repair=True, works=False)
    assert rows["b"]["outcome"] == "different"
    assert rows["b"]["count"] == 1
    assert "nothing is copied" in rows["b"]["reason"]


async def test_unknown_users() -> None:
    rows = await verify(Node(a="x"), Node(), ["a", "nobody"])
    assert rows["a"]["outcome"] == "different"
    assert rows["a"]["differences"][0]["what"] == "user"
    assert rows["nobody"]["outcome"] == "failed"


@pytest.mark.parametrize(
    "error", [DoveadmError("x"), PeerError("unreachable", "x"), RuntimeError("x")]
)
async def test_one_that_fails_does_not_stop_the_others(error: Exception) -> None:
    here, there = Node(a="x", b="y", c="z"), Node(a="x", b="y", c="z")

    def fails(user: str) -> None:
        if user == "b":
            raise error

    there.on_describe = fails
    rows = await verify(here, there, ["a", "b", "c"])
    assert [rows[user]["outcome"] for user in "abc"] == ["equal", "failed", "equal"]
    assert "x" in rows["b"]["reason"]


async def test_who_stops_listening_ends_it() -> None:
    here = Node(**{f"u{number}": "x" for number in range(50)})
    verifier = Verifier(here, {"mail-b": here}, {}, {})
    rows = verifier.run(here.flags, bodies=False, repair=False)
    await anext(rows)
    await rows.aclose()
    assert here.marks < 10


async def test_who_differs_is_known_until_he_is_equal() -> None:
    here, there = Node(a="x", b="y"), Node(a="x", b="z")
    mirror = Mirror(here, there)
    verifier = Verifier(here, {"mail-b": there}, {"mail-b": mirror}, {"mail-b": mirror})
    _ = [row async for row in verifier.run(["a", "b"], bodies=False, repair=False)]
    assert verifier.different == {"mail-b": {"b": 1}}
    _ = [row async for row in verifier.run(["b"], bodies=False, repair=True)]
    assert verifier.different == {"mail-b": {}}


async def test_rounds_compare_everybody_slowly() -> None:
    here, there = Node(a="x", b="y", c="z"), Node(a="x", b="!", c="!")
    verifier = Verifier(here, {"mail-b": there}, {"mail-b": Mirror(here, there)}, {})

    async def users() -> list[str]:
        return list(here.flags)

    rounds = Rounds(verifier, users, lambda user, peer: (user, peer) != ("c", "mail-b"), 0.3)
    task = asyncio.create_task(rounds.run())
    await asyncio.sleep(0.05)
    assert verifier.different == {"mail-b": {}}, "they are spread over the period"
    async with asyncio.timeout(5):
        while verifier.different != {"mail-b": {"b": 1}}:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    assert verifier.different == {"mail-b": {"b": 1}}, "c is not expected to be equal"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_who_is_away_keeps_nobody_from_being_compared() -> None:
    here, there = Node(a="x"), Node(a="!")
    away = Node()
    away.on_describe = lambda user: pytest.fail("it is away")
    verifier = Verifier(here, {"mail-b": there, "mail-c": away}, {}, {})
    rows = verifier.run(
        ["a"], bodies=False, repair=False, wanted=lambda user, peer: peer != "mail-c"
    )
    assert [(row["peer"], row["outcome"]) async for row in rows] == [("mail-b", "different")]


async def test_no_rounds_unless_wanted() -> None:
    async def users() -> list[str]:
        raise AssertionError

    await Rounds(Verifier(Node(), {}, {}, {}), users, lambda user, peer: True, 0).run()
