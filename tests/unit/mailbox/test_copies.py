"""Second copies: what is removed before a merge, and what never is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.mailbox.exchange import Side, serve

from umbra.mailbox import copies
from umbra.mailbox.copies import BATCH, CopiesCarrier, CopiesHandler, Copy, Dovecot
from umbra.mailbox.doveadm import Doveadm, DoveadmError, Outcome, Reply, SyncResult
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity
from umbra.transport import ids

USER = "a@example.org"
BOX = "f093ba029cd0026b7e490000d09efc50"
PEER = PeerIdentity("mail-a", "s")


def guid(number: int) -> str:
    return f"{number:032x}"


class Node:
    """A user's messages on one node: GUID to id, "" for one that never passed the milter."""

    def __init__(self, **messages: str) -> None:
        self.messages = {guid(int(name[1:])): shadow_id for name, shadow_id in messages.items()}
        self.error = ""
        self.known = True

    async def exists(self, user: str) -> bool:
        return self.known

    async def guids(self, user: str) -> set[str]:
        if self.error:
            raise DoveadmError(self.error)
        return set(self.messages)

    async def unmirrored(self, user: str, known: set[str]) -> AsyncIterator[Copy]:
        for uid, (item, shadow_id) in enumerate(self.messages.items(), 1):
            if item not in known and shadow_id:
                yield Copy("INBOX", BOX, uid, item, shadow_id)

    async def present(self, user: str, wanted: Iterable[str]) -> set[str]:
        return set(wanted) & set(self.messages.values())

    async def remove(self, user: str, copy: Copy) -> None:
        if self.error:
            raise DoveadmError(self.error)
        assert self.messages.pop(copy.guid) == copy.shadow_id


class Pair:
    """The primary and a node that comes back; a merge gives both what either has."""

    def __init__(self, here: Node, there: Node) -> None:
        self.here, self.there = here, there
        self.closed = ""
        self.requests: list[str] = []
        self.handler = CopiesHandler(lambda: self.closed, cast(Dovecot, there))
        self.delivered: set[str] = set()
        self.carrier = CopiesCarrier(
            self, self, cast(Dovecot, here), lambda user, shadow_id: shadow_id in self.delivered
        )

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        if merge:
            both = {**self.here.messages, **self.there.messages}
            self.here.messages, self.there.messages = dict(both), dict(both)
        return SyncResult(Outcome.SYNCED, "state")

    def progress(self, user: str) -> float:
        return 0.0

    def cut(self, user: str = "") -> None:
        pass

    async def request(self, op: str, args: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        assert op == "remove-copies"
        self.requests.append(op)
        return await self.handler.remove(PEER, args, cast(Any, None))

    @asynccontextmanager
    async def exchange(
        self, op: str, args: Mapping[str, Any], *, timeout: float
    ) -> AsyncIterator[Side]:
        assert op == "unmirrored"
        self.requests.append(op)
        yield serve(self.handler.unmirrored, PEER, args)


async def merged(pair: Pair) -> SyncResult:
    return await pair.carrier.sync(USER, "", merge=True)


async def test_a_message_that_was_resubmitted_is_there_once() -> None:
    one, two, three = ids.new(), ids.new(), ids.new()
    # 1 was mirrored; 2 was resubmitted and is there under another GUID; 3 only the old node has.
    here = Node(m1=one, m12=two)
    there = Node(m1=one, m2=two, m3=three)
    assert (await merged(Pair(here, there))).outcome is Outcome.SYNCED
    assert here.messages == there.messages == {guid(1): one, guid(12): two, guid(3): three}


async def test_guids_of_imported_mail_are_of_any_length() -> None:
    imported = [
        f"{number:010d}.M5P{number}.mail.example.org,S=1234,W=1260" for number in range(2000)
    ]
    pair = Pair(Node(m1=ids.new()), Node(m2=ids.new()))
    pair.here.messages |= dict.fromkeys(imported, "")
    pair.there.messages |= dict.fromkeys(imported, "")
    assert (await merged(pair)).outcome is Outcome.SYNCED
    assert len(pair.there.messages) == 2002


async def test_a_message_that_is_being_stored_counts_as_there() -> None:
    one = ids.new()
    pair = Pair(Node(), Node(m1=one))
    pair.delivered.add(one)
    await merged(pair)
    assert not pair.there.messages


async def test_nobody_looks_into_mailboxes_that_are_merged() -> None:
    one = ids.new()
    pair = Pair(Node(), Node(m1=one))
    merging, go = asyncio.Event(), asyncio.Event()
    sync = pair.sync

    async def slow(
        user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        merging.set()
        await go.wait()
        return await sync(user, state, merge=merge)

    pair.sync = slow  # type: ignore[method-assign]
    merge = asyncio.create_task(merged(pair))
    await merging.wait()
    looked = asyncio.create_task(pair.carrier.settled(USER))
    await pair.carrier.settled("b@example.org")
    await asyncio.sleep(0.01)
    assert not looked.done()
    go.set()
    await looked
    assert pair.here.messages == {guid(1): one}
    await merge
    await pair.carrier.settled(USER)


async def test_messages_without_an_id_are_left_alone() -> None:
    here, there = Node(m1="", m2=""), Node(m1="", m3="")
    await merged(Pair(here, there))
    assert set(here.messages) == {guid(1), guid(2), guid(3)}


async def test_a_copy_that_both_nodes_have_stays() -> None:
    """A user has copied a message: the same id under two GUIDs, which is as it should be."""
    one = ids.new()
    here, there = Node(m1=one, m2=one), Node(m1=one, m2=one)
    await merged(Pair(here, there))
    assert set(here.messages) == {guid(1), guid(2)}


async def test_only_a_merge_asks() -> None:
    one = ids.new()
    pair = Pair(Node(m1=one), Node(m2=one))
    await pair.carrier.sync(USER, "state")
    await pair.carrier.sync(USER, "")
    assert not pair.requests
    assert pair.there.messages == {guid(2): one}


async def test_a_user_that_is_gone_here_is_not_merged() -> None:
    pair = Pair(Node(), Node(m1=ids.new()))
    pair.here.known = False
    assert (await merged(pair)).outcome is Outcome.NO_USER
    assert not pair.requests


@given(
    st.dictionaries(st.integers(1, 40), st.integers(1, 20), max_size=30),
    st.dictionaries(st.integers(1, 40), st.integers(1, 20), max_size=30),
)
def test_nothing_is_lost_and_nothing_new_is_there_twice(
    here: dict[int, int], there: dict[int, int]
) -> None:
    """Whatever both had: GUIDs are the same message's only if the ids are."""
    known = [ids.new() for _ in range(21)]
    there = {number: here.get(number, content) for number, content in there.items()}
    pair = Pair(Node(), Node())
    pair.here.messages = {guid(number): known[content] for number, content in here.items()}
    pair.there.messages = {guid(number): known[content] for number, content in there.items()}
    before = set(pair.here.messages.values()) | set(pair.there.messages.values())
    first = dict(pair.here.messages)
    asyncio.run(merged(pair))
    assert pair.here.messages == pair.there.messages
    assert set(pair.here.messages.values()) == before
    assert first.items() <= pair.here.messages.items()
    news = [item for key, item in pair.here.messages.items() if key not in first]
    assert not set(news) & set(first.values())


async def test_many_copies_go_in_parts() -> None:
    known = [ids.new() for _ in range(2 * BATCH + 1)]
    here = Node(**{f"m{number}": shadow_id for number, shadow_id in enumerate(known)})
    there = Node(**{f"m{1000 + number}": shadow_id for number, shadow_id in enumerate(known)})
    pair = Pair(here, there)
    await merged(pair)
    assert set(here.messages) == {guid(number) for number in range(len(known))}
    assert pair.requests == ["unmirrored", *3 * ["remove-copies"]]


async def test_failures_stop_the_merge() -> None:
    """A merge that went on would leave both copies, for good."""
    one = ids.new()
    pair = Pair(Node(m1=one), Node(m2=one))
    pair.there.error = "Dovecot does not answer"
    assert (await merged(pair)).outcome is Outcome.FAILED
    pair.there.error, pair.closed = "", "primary"
    assert (await merged(pair)).outcome is Outcome.LOST
    pair.closed, pair.here.error = "", "Dovecot does not answer"
    assert (await merged(pair)).outcome is Outcome.FAILED
    assert pair.here.messages == {guid(1): one}
    assert pair.there.messages == {guid(2): one}


ROW = ["INBOX", BOX, 1, guid(1), "0" * 32]


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"user": "-x", "copies": []},
        {"user": USER},
        {"user": USER, "copies": [ROW] * (BATCH + 1)},
        {"user": USER, "copies": ["x"]},
        *(
            {"user": USER, "copies": [[*ROW[:place], bad, *ROW[place + 1 :]]]}
            for place, bad in ((0, 1), (1, "x"), (2, "1"), (2, 0), (3, "all"), (4, ""), (4, "*"))
        ),
    ],
)
async def test_what_removal_refuses(args: dict[str, Any]) -> None:
    node = Node(m1="0" * 32)
    handler = CopiesHandler(lambda: "", cast(Dovecot, node))
    with pytest.raises(PeerError):
        await handler.remove(PEER, args, cast(Any, None))
    assert node.messages


class FakeDoveadm(Doveadm):
    """Answers as Dovecot 2.4.1 did."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.code = ""

    async def run(
        self, user: str, *command: str, limit: float = 30, data: bytes | None = None
    ) -> Reply:
        self.asked.append(command)
        return Reply([], self.code)

    async def pieces(self, user: str, *command: str) -> AsyncIterator[tuple[bytes, bool]]:
        self.asked.append(command)
        match command[3:]:
            case ("guid", "all"):
                yield guid(1).encode(), True
                yield guid(2)[:7].encode(), False
                yield guid(2)[7:].encode(), True
            case ("mailbox mailbox-guid uid guid", "all"):
                for number in (1, 2, 3):
                    for text in ("Work/a b", BOX, str(number), guid(number)):
                        yield text.encode(), True
            case ("uid hdr.x-umbra-id", "mailbox-guid", _, "uid", "2,3"):
                yield b"2", True
                yield b"0" * 32 + b"\x01n" + b"1" * 32, True
                yield b"3", True
                yield b"", True
            case ("hdr.x-umbra-id", "HEADER", *_):
                yield b"0" * 32, True
            case _:
                raise AssertionError(command)


async def test_what_dovecot_is_asked() -> None:
    doveadm = FakeDoveadm()
    dovecot = copies.Dovecot(doveadm)
    assert await dovecot.guids(USER) == {guid(1), guid(2)}
    found = [copy async for copy in dovecot.unmirrored(USER, {guid(1)})]
    assert found == [Copy("Work/a b", BOX, 2, guid(2), "0" * 32)]
    assert await dovecot.present(USER, []) == set()
    assert await dovecot.present(USER, ["0" * 32, "1" * 32]) == {"0" * 32}
    assert doveadm.asked[-1][4:] == (
        *("HEADER", "X-Umbra-Id", "0" * 32), "OR", *("HEADER", "X-Umbra-Id", "1" * 32),
    )  # fmt: skip
    await dovecot.remove(USER, found[0])
    assert doveadm.asked[-1] == (
        "expunge", "-u", USER, "mailbox-guid", BOX, "uid", "2", "guid", guid(2),
        "HEADER", "X-Umbra-Id", "0" * 32,
    )  # fmt: skip
    doveadm.code = "TEMPFAIL"
    with pytest.raises(DoveadmError):
        await dovecot.remove(USER, found[0])
