"""Whose flags count when two nodes' mailboxes are brought together, and how dsync is told."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, cast

import pytest
from tests.unit.mailbox.exchange import Side, serve

from umbra.mailbox import flags as module
from umbra.mailbox.carrier import Exchange
from umbra.mailbox.compare import Found, Unlike
from umbra.mailbox.describe import Message
from umbra.mailbox.doveadm import Doveadm, DoveadmError, Outcome, Reply, SyncResult
from umbra.mailbox.flags import Counters, Dovecot, FlagsCarrier, FlagsHandler, Settler
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity

USER = "a@example.org"
BOX = "f093ba029cd0026b7e490000d09efc50"
PEER = PeerIdentity("mail-b", "s")
EXCHANGE = cast(Exchange, None)


class Node:
    """One mailbox: flags and MODSEQ of each message, and the mailbox's highest MODSEQ."""

    def __init__(self, highest: int, **messages: str) -> None:
        self.highest = highest
        self.kept = {int(name[1:]): (flags, highest) for name, flags in messages.items()}
        self.on_read: Callable[[], None] = lambda: None
        self.cost = 1

    def change(self, uid: int, flags: str) -> None:
        self.highest += self.cost
        self.kept[uid] = flags, self.highest

    async def counters(self, user: str) -> dict[str, Counters]:
        counters = Counters("INBOX", self.highest, 9, len(self.kept))
        return {BOX: counters} if self.kept else {}  # a user is known who has messages

    async def lift(self, user: str, name: str, modseq: int) -> None:
        assert name == "INBOX"
        self.highest = max(self.highest, modseq)

    async def flags(self, user: str, mailbox: str, uids: Sequence[int]) -> dict[int, str]:
        assert mailbox == BOX
        found = {uid: self.kept[uid][0] for uid in uids if uid in self.kept}
        self.on_read()
        return found

    async def messages(
        self, user: str, guid: str, *, bodies: bool
    ) -> AsyncGenerator[Message, None]:
        assert guid == BOX
        for uid, (flags, _) in sorted(self.kept.items()):
            yield Message(uid, f"{uid}", flags, "1", "2")

    async def set_flags(self, user: str, mailbox: str, uids: Sequence[int], flags: str) -> None:
        for uid in uids:
            self.change(uid, flags)


class Pair:
    """This node and the peer; ``merge`` is dsync's rule for flags and for what it passes over."""

    def __init__(self, here: Node, there: Node) -> None:
        self.here, self.there = here, there
        self.requests: list[int] = []
        self.handler = FlagsHandler(lambda: False, cast(Dovecot, there))
        self.settler = Settler(self, cast(Dovecot, here))

    async def request(self, op: str, args: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        assert op == "take-flags"
        self.requests.append(len(args["rows"]))
        return await self.handler.take(PEER, args, EXCHANGE)

    @asynccontextmanager
    async def exchange(
        self, op: str, args: Mapping[str, Any], *, timeout: float
    ) -> AsyncIterator[Side]:
        assert op == "counters"
        yield serve(self.handler.counters, PEER, args)

    async def settle(self, *, ours: bool) -> None:
        found = Found()
        found.unlike["INBOX"] = Unlike(
            BOX,
            BOX,
            [
                uid
                for uid in self.here.kept.keys() & self.there.kept.keys()
                if self.here.kept[uid][0] != self.there.kept[uid][0]
            ],
        )
        await self.settler.settle(USER, found, ours=ours)

    def merge(self) -> dict[int, str]:
        if self.here.highest == self.there.highest:
            return {}
        both = {}
        for uid, mine in self.here.kept.items():
            theirs = self.there.kept.get(uid, mine)
            both[uid] = theirs if theirs[1] > mine[1] else mine
        self.here.kept, self.there.kept = dict(both), dict(both)
        return {uid: flags for uid, (flags, _) in both.items()}


async def test_what_the_lost_primary_told_nobody_undoes_nothing() -> None:
    pair = Pair(Node(20, m1="\\Seen", m2=""), Node(30, m1="\\Seen kw", m2="\\Flagged"))
    await pair.settle(ours=True)
    assert pair.merge() == {1: "\\Seen", 2: ""}


async def test_what_it_may_have_told_is_left_to_dsync() -> None:
    pair = Pair(Node(20, m1="\\Seen"), Node(30, m1="\\Seen kw"))
    await pair.settle(ours=False)
    assert pair.merge() == {1: "\\Seen kw"}


@pytest.mark.parametrize("ours", [True, False])
async def test_dsync_looks_into_what_has_the_same_counters(ours: bool) -> None:
    pair = Pair(Node(20, m1="\\Seen"), Node(20, m1="\\Seen kw"))
    assert pair.merge() == {}
    await pair.settle(ours=ours)
    assert pair.merge()


@pytest.mark.parametrize("turn", [0, 1])
async def test_a_change_made_here_meanwhile_is_kept(turn: int) -> None:
    pair = Pair(Node(20, m1="", m2=""), Node(3000, m1="kw", m2="kw"))
    turns = []

    def user_changes() -> None:
        turns.append(1)
        if len(turns) == turn + 1:
            pair.here.change(1, "\\Deleted")

    pair.here.on_read = user_changes
    pair.there.on_read = user_changes
    await pair.settle(ours=True)
    assert len(turns) == 2
    assert pair.merge() == {1: "\\Deleted", 2: ""}


@pytest.mark.parametrize(("there", "lead"), [(30, True), (20, False), (10, False)])
async def test_what_looks_equal_and_is_changed_here_next_is_newer(there: int, lead: bool) -> None:
    # The peer had set and removed the same keyword, which no comparison shows.
    pair = Pair(Node(20, m1=""), Node(there, m1=""))
    await pair.settler.lead(USER)
    assert (pair.here.highest > 20) is lead
    pair.here.change(1, "kw")
    assert pair.merge() == {1: "kw"}


async def test_a_user_whom_one_node_does_not_know_has_nothing_to_lead() -> None:
    for pair in (Pair(Node(20), Node(30, m1="")), Pair(Node(20, m1=""), Node(30))):
        await pair.settler.lead(USER)
        assert pair.here.highest == 20


async def test_the_peers_modseq_may_grow_as_it_takes_flags() -> None:
    pair = Pair(Node(20, m1=""), Node(30, m1="kw"))
    pair.there.cost = module.AHEAD
    await pair.settle(ours=True)
    assert pair.here.highest > pair.there.highest
    assert pair.requests == [0, 1, 1]


class Copier:
    """One-way from scratch, as dsync does it: old keywords come back at the peer."""

    def __init__(self, pair: Pair, **old: str) -> None:
        self.pair = pair
        self.old = {int(name[1:]): flags for name, flags in old.items()}
        self.done: list[tuple[str, bool]] = []
        self.outcome = Outcome.SYNCED

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        self.done.append((state, merge))
        for uid, flags in self.old.items():
            self.pair.there.change(uid, flags)
        return SyncResult(self.outcome, "state")

    def progress(self, user: str) -> float:
        return 7.0

    def cut(self, user: str = "") -> None: ...

    def carrier(self) -> FlagsCarrier:
        return FlagsCarrier(self, self.pair.settler, self.pair.here, self.pair.there)


def flags_of(node: Node) -> dict[int, str]:
    return {uid: flags for uid, (flags, _) in node.kept.items()}


async def test_after_a_copy_from_scratch_flags_are_this_nodes() -> None:
    pair = Pair(Node(20, m1="", m2="\\Seen", m3=""), Node(12, m1="", m2=""))
    copier = Copier(pair, m1="kw", m2="\\Seen kw")
    assert (await copier.carrier().sync(USER, "")).state == "state"
    assert flags_of(pair.there) == {1: "", 2: "\\Seen"}
    assert copier.done == [("", False)]
    assert copier.carrier().progress(USER) == 7.0


async def test_a_look_at_the_flags_counts_as_progress() -> None:
    """A change of that user waits as long as it moves, and may not cost the peer."""
    pair = Pair(Node(20, m1="", m2=""), Node(12, m1="", m2=""))
    carrier = Copier(pair, m1="kw").carrier()
    seen: list[float] = []
    pair.here.on_read = lambda: seen.append(carrier.progress(USER))
    began = monotonic()
    await carrier.sync(USER, "")
    assert seen
    assert min(seen) >= began
    assert carrier.progress(USER) == 7.0


async def test_nobody_looks_where_nothing_differed_or_was_changed() -> None:
    # Never so after a sync; a difference that cannot be shows that nobody has looked.
    pair = Pair(Node(12, m1=""), Node(12, m1="kw"))
    await Copier(pair).carrier().sync(USER, "")
    assert pair.requests == []


async def test_nobody_looks_where_little_was_copied() -> None:
    for old, state, merge, outcome in (
        ({"m1": "kw"}, "state", False, Outcome.SYNCED),
        ({"m1": "kw"}, "", True, Outcome.SYNCED),
        ({"m1": "kw"}, "", False, Outcome.CHANGED),
    ):
        pair = Pair(Node(20, m1=""), Node(12, m1="kw"))
        copier = Copier(pair, **old)
        copier.outcome = outcome
        assert (await copier.carrier().sync(USER, state, merge=merge)).outcome is outcome
        assert flags_of(pair.there) == {1: "kw"}
        assert pair.requests == []


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (DoveadmError("x"), Outcome.FAILED),
        (PeerError("dovecot", "x"), Outcome.FAILED),
        (PeerError("unreachable", "x"), Outcome.LOST),
    ],
)
async def test_a_copy_whose_flags_nobody_could_look_at_is_made_again(
    error: Exception, outcome: Outcome
) -> None:
    pair = Pair(Node(20, m1=""), Node(12, m1=""))

    def fails() -> None:
        raise error

    pair.here.on_read = fails
    assert (await Copier(pair, m1="kw").carrier().sync(USER, "")).outcome is outcome


async def test_many_messages_go_in_parts() -> None:
    names = [f"m{uid}" for uid in range(1, 2 * module.BATCH + 2)]
    pair = Pair(Node(20, **dict.fromkeys(names, "")), Node(30, **dict.fromkeys(names, "kw")))
    await pair.settle(ours=True)
    assert set(pair.merge().values()) == {""}
    assert pair.requests == [0, module.BATCH, module.BATCH, 1]


async def test_what_is_equal_already_or_gone_is_left_alone() -> None:
    there = Node(30, m1="kw")
    handler = FlagsHandler(lambda: False, cast(Dovecot, there))
    args = {"user": USER, "mailbox": BOX, "rows": [[1, "kw"], [2, "\\Seen"]]}
    assert await handler.take(PEER, args, EXCHANGE) == {"modseq": 30}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"user": "-x"}, "refused"),
        ({"user": None}, "refused"),
        ({"mailbox": "INBOX"}, "refused"),
        ({"rows": None}, "protocol"),
        ({"rows": [[1, "kw"]] * (module.BATCH + 1)}, "protocol"),
        ({"rows": [[0, "kw"]]}, "protocol"),
        ({"rows": [[1, "kw\n"]]}, "protocol"),
        ({"rows": [[1, "k" * (module.LONGEST + 1)]]}, "protocol"),
        ({"rows": ["1"]}, "protocol"),
    ],
)
async def test_what_makes_no_sense_is_refused(change: dict[str, Any], code: str) -> None:
    there = Node(30, m1="")
    handler = FlagsHandler(lambda: False, cast(Dovecot, there))
    args = {"user": USER, "mailbox": BOX, "rows": [[1, "kw"]], **change}
    with pytest.raises(PeerError) as error:
        await handler.take(PEER, args, EXCHANGE)
    assert error.value.code == code
    assert there.highest == 30


async def test_a_primary_takes_no_flags() -> None:
    handler = FlagsHandler(lambda: True, cast(Dovecot, Node(1)))
    with pytest.raises(PeerError, match="primary"):
        await handler.take(PEER, {"user": USER, "mailbox": BOX, "rows": []}, EXCHANGE)


class Answers(Doveadm):
    """Says what Dovecot 2.4.1 says, and notes what it was asked."""

    def __init__(self, *fields: str, code: str = "") -> None:
        self.reply = Reply(list(fields), code)
        self.asked: list[tuple[str, ...]] = []

    async def run(
        self, user: str, *command: str, limit: float = 0.0, data: bytes | None = None
    ) -> Reply:
        self.asked.append(command)
        return self.reply


async def test_the_commands() -> None:
    answers = Answers("INBOX", "2", "9", "17", BOX, "a/b", "0", "1", "3", BOX[::-1])
    dovecot = Dovecot(answers)
    found = await dovecot.counters(USER)
    assert found == {BOX: Counters("", 17, 9, 2), BOX[::-1]: Counters("", 3, 1, 0)}
    assert [counters.name for counters in found.values()] == ["INBOX", "a/b"]
    answers.reply = Reply(["1", "\\Seen \\Recent kw", "2", ""], "")
    assert await dovecot.flags(USER, BOX, [1, 2]) == {1: "\\Seen kw", 2: ""}
    answers.reply = Reply([], "")
    await dovecot.set_flags(USER, BOX, [1, 2], "-kw")
    assert answers.asked[-1] == (
        "flags replace", "-u", USER, "--", "-kw", "mailbox-guid", BOX, "uid", "1,2",
    )  # fmt: skip
    answers.reply = Reply([], "TEMPFAIL")
    with pytest.raises(DoveadmError, match="ended with TEMPFAIL"):
        await dovecot.lift(USER, "INBOX", 7)
