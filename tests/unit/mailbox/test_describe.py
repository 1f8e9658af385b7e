"""Descriptions: read from recorded answers of Dovecot 2.4.1, carried over a link, compared."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbra.mailbox.compare import (
    Difference,
    Found,
    Unlike,
    missing,
    of_descriptions,
    of_mailbox,
    of_messages,
    to_look_into,
)
from umbra.mailbox.describe import (
    UNREADABLE,
    DescribeHandler,
    Description,
    Dovecot,
    Mailbox,
    Message,
    Peer,
    fingerprint,
)
from umbra.mailbox.doveadm import Doveadm, DoveadmError, Reply
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity

USER = "a@example.org"
INBOX = "f093ba029cd0026b7e490000d09efc50"
SUB = "303123039cd0026b7e490000d09efc50"


class FakeDoveadm(Doveadm):
    """Answers as Dovecot 2.4.1 did, field for field."""

    def __init__(self, flags: bytes = rb"\Recent \Seen $Forwarded kw", acl: bool = True) -> None:
        self.flags, self.acl = flags, acl
        self.asked: list[tuple[str, ...]] = []

    async def exists(self, user: str) -> bool:
        return user == USER

    async def run(
        self, user: str, *command: str, limit: float = 30, data: bytes | None = None
    ) -> Reply:
        self.asked.append(command)
        name, rest = command[0], command[3:]
        if name == "acl get" and not self.acl:
            return Reply([], "UNKNOWN")
        answers: dict[tuple[str, ...], list[str]] = {
            ("mailbox list",): ["Work", "Work/Sub", "INBOX"],
            ("mailbox list", "-s"): ["Work/Sub"],
            ("mailbox status", "messages uidnext uidvalidity guid", "*"): [
                *("Work/Sub", "0", "1", "17953", SUB),
                *("INBOX", "2", "4", "17954", INBOX),
            ],
            ("mailbox status", "uidnext uidvalidity highestmodseq guid", "*"): ["x"],
            ("sieve list",): ["one", "", "two", "ACTIVE"],
            ("sieve get", "--", "one"): ["keep;\n"],
            ("sieve get", "--", "two"): ["discard;\n"],
            ("acl get", "--", "Work"): [],
            ("acl get", "--", "Work/Sub"): ["owner", "lookup read"],
            ("acl get", "--", "INBOX"): ["user=b", "read", "owner", "lookup read"],
        }
        return Reply(answers[(name, *rest)], "")

    async def pieces(self, user: str, *command: str) -> AsyncIterator[tuple[bytes, bool]]:
        self.asked.append(command)
        assert command[:3] == ("fetch", "-u", USER)
        assert command[4] == "mailbox-guid"
        if command[5] == SUB:
            return
        yield b"1", True
        yield b"g1", True
        yield self.flags[:5], False
        yield self.flags[5:], True
        yield b"33", True
        yield b"1795168800", True
        if command[3].endswith("text"):
            yield b"Subject: a\x01n", False
            yield b"b", True
        for field in (b"3", b"g3", b"", b"30", b"1795168801"):
            yield field, True
        if command[3].endswith("text"):
            yield b"", True


def dovecot(flags: bytes = rb"\Recent \Seen $Forwarded kw", acl: bool = True) -> Dovecot:
    return Dovecot(FakeDoveadm(flags, acl))


async def test_describe() -> None:
    found = await dovecot().describe(USER, bodies=False)
    assert list(found.mailboxes) == ["Work", "Work/Sub", "INBOX"]
    assert found.mailboxes["Work"] == Mailbox()
    inbox = found.mailboxes["INBOX"]
    assert (inbox.guid, inbox.uidvalidity, inbox.uidnext, inbox.messages) == (
        INBOX, "17954", "4", "2",
    )  # fmt: skip
    assert found.subscriptions == {"Work/Sub"}
    assert set(found.scripts) == {"one", "two"}
    assert found.active == "two"
    assert set(found.rights) == {"Work/Sub", "INBOX"}
    assert not (await dovecot().describe("b@example.org", bodies=False)).exists


async def test_a_script_that_is_not_utf_8_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pigeonhole takes any byte in a comment; nothing else of the user could be compared."""
    here = dovecot()
    script = here.script

    async def read(user: str, name: str) -> str:
        if name == "one":
            raise DoveadmError("doveadm sieve get: 'utf-8' codec can't decode byte 0xfc")
        return await script(user, name)

    monkeypatch.setattr(here, "script", read)
    found = await here.describe(USER, bodies=False)
    assert found.scripts["one"] == UNREADABLE
    assert found.scripts["two"] == fingerprint("discard;\n")


async def test_order_of_keywords_and_recent_are_no_difference() -> None:
    one = await dovecot().describe(USER, bodies=True)
    two = await dovecot(rb"kw $Forwarded \Seen").describe(USER, bodies=True)
    other = await dovecot(rb"kw \Seen").describe(USER, bodies=True)
    assert one == two
    assert one.mailboxes["INBOX"].digest != other.mailboxes["INBOX"].digest


async def test_messages_with_and_without_bodies() -> None:
    plain = [row async for row in dovecot().messages(USER, INBOX, bodies=False)]
    assert plain[0] == Message(1, "g1", r"$Forwarded \Seen kw", "33", "1795168800")
    assert plain[1] == Message(3, "g3", "", "30", "1795168801")
    whole = [row async for row in dovecot().messages(USER, INBOX, bodies=True)]
    assert all(len(row.body) == 64 for row in whole)
    assert whole[0].body != whole[1].body


async def test_missing_acl_plugin_is_asked_for_once() -> None:
    fake = FakeDoveadm(acl=False)
    here = Dovecot(fake)
    for _ in range(3):
        assert not (await here.describe(USER, bodies=False)).rights
    assert sum(command[0] == "acl get" for command in fake.asked) == 1


class Recording(FakeDoveadm):
    """Has done whatever is asked."""

    async def run(
        self, user: str, *command: str, limit: float = 30, data: bytes | None = None
    ) -> Reply:
        self.asked.append(command)
        return Reply(["keep;"], "")


async def test_a_name_is_never_an_option() -> None:
    fake = Recording()
    here = Dovecot(fake)
    await here.script(USER, "-x")
    await here.put_script(USER, "-x", "keep;")
    await here.activate_script(USER, "-x")
    await here.remove_script(USER, "-x")
    await here.remove_mailbox(USER, "-x")
    assert [command[0] for command in fake.asked] == [
        "sieve get", "sieve put", "sieve activate", "sieve delete", "mailbox delete",
    ]  # fmt: skip
    assert all(command[-2:] == ("--", "-x") for command in fake.asked)


class FakeExchange:
    """The server's side collects; the client's side reads it in pieces of ``size`` bytes."""

    def __init__(self, size: int) -> None:
        self.size, self.data = size, b""

    async def send(self, data: bytes) -> None:
        self.data += data

    async def end(self) -> None:
        pass

    async def receive(self) -> bytes | None:
        data, self.data = self.data[: self.size], self.data[self.size :]
        return data or None

    async def result(self) -> dict[str, Any]:
        return {}


class FakeLink:
    name = "mail-b"

    def __init__(self, size: int, here: Dovecot) -> None:
        self.size, self.handler = size, DescribeHandler(here)

    @asynccontextmanager
    async def exchange(
        self, op: str, args: Mapping[str, Any], *, timeout: float
    ) -> AsyncIterator[FakeExchange]:
        assert op == "describe"
        exchange = FakeExchange(self.size)
        await self.handler(PeerIdentity("mail-a", "x"), args, exchange)
        yield exchange


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("bodies", [False, True])
async def test_the_peer_says_what_its_dovecot_says(size: int, bodies: bool) -> None:
    here = dovecot()
    peer = Peer(FakeLink(size, here))
    assert await peer.describe(USER, bodies=bodies) == await here.describe(USER, bodies=bodies)
    assert not (await peer.describe("b@example.org", bodies=bodies)).exists
    assert [row async for row in peer.messages(USER, INBOX, bodies=bodies)] == [
        row async for row in here.messages(USER, INBOX, bodies=bodies)
    ]


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"user": ""},
        {"user": "-A"},
        {"user": ["x"]},
        {"user": USER, "mailbox": "INBOX"},
        {"user": USER, "mailbox": "*" * 32},
    ],
)
async def test_what_the_handler_refuses(args: dict[str, Any]) -> None:
    with pytest.raises(PeerError, match="no such"):
        await DescribeHandler(dovecot())(PeerIdentity("mail-a", "x"), args, FakeExchange(1))


async def test_a_peer_that_sends_nonsense() -> None:
    for data in (b"[]\n", b"nonsense\n", b'["mailbox", "x"]\n', b'["user", "x"', b"x" * 70_000):
        link = FakeLink(10_000, dovecot())

        @asynccontextmanager
        async def exchange(
            op: str, args: Mapping[str, Any], *, timeout: float, data: bytes = data
        ) -> AsyncIterator[FakeExchange]:
            fake = FakeExchange(100_000)
            fake.data = data
            yield fake

        link.exchange = exchange  # type: ignore[method-assign]
        with pytest.raises(PeerError):
            await Peer(link).describe(USER, bodies=False)
        with pytest.raises((PeerError, DoveadmError)):
            async for _ in Peer(link).messages(USER, INBOX, bodies=False):
                pass


def test_differences_of_descriptions() -> None:
    here = Description(
        mailboxes={
            "INBOX": Mailbox("g", "1", "4", "3", "d"),
            "Work": Mailbox("w", "1", "1", "0", "e"),
        },
        subscriptions={"Work"},
        scripts={"one": "d1", "two": "d2"},
        active="one",
        rights={"INBOX": "r"},
    )  # fmt: skip
    there = Description(
        mailboxes={
            "INBOX": Mailbox("g", "2", "4", "3", "x"),
            "Old": Mailbox("o", "1", "1", "0", "e"),
        },
        subscriptions={"Old"},
        scripts={"one": "d1", "two": "xx"},
        active="two",
    )  # fmt: skip
    assert not list(of_descriptions(here, here))
    assert not to_look_into(here, here)
    found = [(item.mailbox, item.what) for item in of_descriptions(here, there)]
    assert found == [
        ("INBOX", "uidvalidity"),
        ("Old", "mailbox"),
        ("Work", "mailbox"),
        ("Old", "subscription"),
        ("Work", "subscription"),
        ("two", "script"),
        ("INBOX", "acl"),
        ("", "active script"),
    ]
    assert [name for name, _, _ in to_look_into(here, there)] == ["INBOX"]
    unknown = list(of_descriptions(here, Description(exists=False)))
    assert unknown == [Difference("", "user", "known", "")]


def test_mailboxes_that_the_other_node_has_under_no_name() -> None:
    here = Description(
        mailboxes={
            "INBOX": Mailbox("g1"),
            "new": Mailbox("g2"),
            "renamed": Mailbox("g3"),
            "made twice": Mailbox("g4"),
            "only a name": Mailbox(),
            "deleted": Mailbox("g6"),  # and what is below it stays
        }
    )
    there = Description(
        mailboxes={
            "INBOX": Mailbox("g1"),
            "old": Mailbox("g3"),
            "made twice": Mailbox("g5"),
            "deleted": Mailbox(),
        }
    )
    assert missing(here, there) == ["deleted", "new"]


@pytest.mark.parametrize(
    ("there", "brings"),
    [
        ([(1, "g1", "")], False),
        ([(1, "g1", "\\Seen")], False),
        ([(1, "g1", ""), (2, "g2", ""), (3, "g3", "")], True),
        ([(1, "g1", ""), (2, "other", "")], True),
    ],
    ids=["lacks one", "other flags", "has more", "another under one UID"],
)
async def test_whether_the_other_node_brings_messages(
    there: list[tuple[int, str, str]], brings: bool
) -> None:
    async def listed(rows: list[tuple[int, str, str]]) -> AsyncGenerator[Message, None]:
        for uid, guid, flags in rows:
            yield Message(uid, guid, flags, "1", "2")

    found = Found()
    unlike = found.unlike["INBOX"] = Unlike("g", "g")
    here = [(1, "g1", ""), (2, "g2", "")]
    async for _ in of_mailbox("INBOX", unlike, listed(here), listed(there)):
        pass
    assert unlike.brings is brings
    assert found.lacking() == ([] if brings else ["INBOX"])


ROWS = st.dictionaries(
    st.integers(1, 12),
    st.builds(Message, st.just(0), st.sampled_from("ab"), st.sampled_from(["", "f"]), st.just("1"),
              st.just("2")),
)  # fmt: skip


@settings(deadline=None)
@given(ROWS, ROWS)
def test_merge_finds_exactly_the_messages_that_differ(
    left: dict[int, Message], right: dict[int, Message]
) -> None:
    async def rows(values: dict[int, Message]) -> AsyncIterator[Message]:
        for uid, row in sorted(values.items()):
            yield Message(uid, row.guid, row.flags, row.size, row.received)

    async def differences() -> list[Difference]:
        return [item async for item in of_messages("INBOX", rows(left), rows(right))]

    found = asyncio.run(differences())
    uids = {int(item.what.rsplit(" ", 1)[1]) for item in found}
    assert uids == {uid for uid in left | right if left.get(uid) != right.get(uid)}
    for item in found:
        assert item.here != item.there


def test_found_counts_more_than_it_shows() -> None:
    found = Found()
    for number in range(100):
        found.add(Difference("INBOX", f"message {number}", "a", ""))
    assert found.count == 100
    assert len(found.shown) == 50
