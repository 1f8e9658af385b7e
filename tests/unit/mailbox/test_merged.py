"""The record of what a returning node brought."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from umbra.mailbox.compare import Difference, Found, Unlike
from umbra.mailbox.describe import Mailbox
from umbra.mailbox.doveadm import DoveadmError, Outcome, SyncResult
from umbra.mailbox.merged import Record, RecordingCarrier, of_the_peer
from umbra.peer.exchange import PeerError

AT = "2026-01-01T00:00:00.000Z"


class Peer:
    """Carrier and comparer: what differs, and what was done."""

    def __init__(self, *differences: Difference) -> None:
        self.differences = differences
        self.done: list[tuple[str, bool]] = []
        self.error: Exception | None = None
        self.unshared = True
        self.settled: list[bool] = []
        self.led = 0
        self.spread: list[str] = []
        self.unlike: dict[str, Unlike] = {}
        self.missing: list[str] = []
        self.brought: dict[str, Mailbox] = {}
        self.kept: list[Mapping[str, Mailbox]] = []
        self.apart: list[Sequence[str]] = []

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        self.done.append((user, merge))
        self.apart.append(apart)
        return SyncResult(Outcome.SYNCED, "state")

    def progress(self, user: str) -> float:
        return 7.0

    def cut(self, user: str = "") -> None:
        self.done.append(("cut", False))

    async def lead(self, user: str) -> None:
        self.led += 1

    async def settle(self, user: str, found: Found, *, ours: bool) -> None:
        assert not self.done, "before the merge"
        self.settled.append(ours)

    async def keep(self, user: str, mailboxes: Mapping[str, Mailbox]) -> None:
        assert not self.done, "before the merge"
        if mailboxes:
            self.kept.append(mailboxes)

    async def compare(self, user: str, peer: str, *, counts: Callable[[Difference], bool]) -> Found:
        if self.error is not None:
            raise self.error
        assert self.led, "before it is compared"
        found = Found()
        found.unlike, found.missing, found.brought = self.unlike, self.missing, self.brought
        for difference in filter(counts, self.differences):
            found.add(difference)
        return found


async def begin(record: Record) -> None:
    record.begin(4, AT)


def carrier(peer: Peer, path: Path) -> tuple[RecordingCarrier, Record]:
    record = Record(path, "mail-a")
    made = RecordingCarrier(
        peer, "mail-a", record, peer, begin, peer, lambda: peer.unshared, peer.spread.append
    )
    return made, record


async def test_what_the_peer_brings_is_on_disk_before_it_is_merged(tmp_path: Path) -> None:
    peer = Peer(
        Difference("INBOX", "message 17", "", "guid"),
        Difference("INBOX", "message 18", "guid", ""),
        Difference("INBOX", "flags of message 3", "\\Seen", ""),
        Difference("INBOX", "uidnext", "19", "18"),
        Difference("old", "mailbox", "", "3 messages"),
    )
    made, record = carrier(peer, tmp_path)
    assert (await made.sync("u1", "", merge=True)).outcome is Outcome.SYNCED
    read = record.read()
    assert read is not None
    assert (read["peer"], read["epoch"], read["since"], read["count"]) == ("mail-a", 4, AT, 1)
    (user,) = read["users"]
    assert user["count"] == 3
    assert [row["what"] for row in user["differences"]] == [
        "message 17", "flags of message 3", "mailbox",
    ]  # fmt: skip
    assert peer.done == [("u1", True)]
    assert peer.spread == ["u1"], "other peers lack it"


async def test_who_is_not_merged_is_no_news_for_other_peers(tmp_path: Path) -> None:
    peer = Peer()
    made, _ = carrier(peer, tmp_path)
    assert (await made.sync("u1", "", merge=True)).outcome is Outcome.EQUAL
    await made.sync("u1", "state")
    assert peer.spread == []


@pytest.mark.parametrize("unshared", [True, False])
async def test_flags_of_the_peer_count_only_if_somebody_may_know_of_them(
    tmp_path: Path, unshared: bool
) -> None:
    peer = Peer(Difference("INBOX", "flags of message 3", "", "kw", 3))
    peer.unshared = unshared
    made, _ = carrier(peer, tmp_path)
    await made.sync("u1", "state")
    assert peer.settled == []
    peer.done.clear()
    await made.sync("u1", "", merge=True)
    assert peer.settled == [not unshared]


@pytest.mark.parametrize("unshared", [True, False])
async def test_what_the_peer_only_lacks_is_left_out_of_a_merge(
    tmp_path: Path, unshared: bool
) -> None:
    """dsync renumbered a mailbox on both nodes, since the peer's files of it were lost (2.4.1)."""
    peer = Peer(Difference("old", "mailbox", "", "3 messages"))
    peer.unlike = {
        "INBOX": Unlike("g1", "g1"),
        "brought": Unlike("g2", "g2", brings=True),
        "two": Unlike("g3", "g4"),
        "all*": Unlike("g5", "g5"),
    }
    peer.missing = ["new", "what?", "\\Junk"]
    peer.unshared = unshared
    made, _ = carrier(peer, tmp_path)
    await made.sync("u1", "", merge=True)
    # Of a message that is gone somebody may know; a whole mailbox is not deleted for that.
    assert [list(names) for names in peer.apart] == [["new"] if unshared else ["new", "INBOX"]]


@pytest.mark.parametrize("unshared", [True, False])
async def test_what_only_the_peer_has_is_not_deleted_there(tmp_path: Path, unshared: bool) -> None:
    """dsync may have deleted it here, to copy it anew, before the peer was lost."""
    peer = Peer(Difference("old", "mailbox", "", "3 messages"))
    peer.brought = {"old": Mailbox("g", "17", "4", "3")}
    peer.unshared = unshared
    made, _ = carrier(peer, tmp_path)
    await made.sync("u1", "", merge=True)
    assert peer.kept == ([peer.brought] if unshared else [])


@pytest.mark.parametrize(
    ("differences", "outcome"),
    [
        ([], Outcome.EQUAL),
        ([Difference("INBOX", "message 18", "guid", "")], Outcome.EQUAL),
        ([Difference("INBOX", "guid", "g", "h")], Outcome.SYNCED),
        ([Difference("INBOX", "uidvalidity", "1", "2")], Outcome.SYNCED),
    ],
    ids=["equal", "the peer only lacks something", "two mailboxes", "two mailboxes of one GUID"],
)
async def test_who_brings_nothing_is_not_merged_and_nothing_is_noted(
    tmp_path: Path, differences: list[Difference], outcome: Outcome
) -> None:
    peer = Peer(*differences)
    made, record = carrier(peer, tmp_path)
    await made.sync("u1", "state")
    assert record.read() is None
    peer.done.clear()
    assert (await made.sync("u1", "", merge=True)).outcome is outcome
    assert peer.done == ([("u1", True)] if outcome is Outcome.SYNCED else [])
    read = record.read()
    assert read is not None
    assert read["users"] == []


async def test_what_cannot_be_written_down_is_not_merged(tmp_path: Path) -> None:
    peer = Peer()
    made, _ = carrier(peer, tmp_path / "file" / "under")
    (tmp_path / "file").touch()
    assert (await made.sync("u1", "", merge=True)).outcome is Outcome.FAILED
    made, _ = carrier(peer, tmp_path)
    for error, outcome in (
        (DoveadmError("x"), Outcome.FAILED),
        (PeerError("unreachable", "x"), Outcome.LOST),
        (PeerError("dovecot", "x"), Outcome.FAILED),
    ):
        peer.error = error
        assert (await made.sync("u1", "", merge=True)).outcome is outcome
    assert peer.done == []


def test_a_later_merge_replaces_the_record_and_a_restart_does_not(tmp_path: Path) -> None:
    record = Record(tmp_path, "mail-a")
    record.begin(4, AT)
    found = Found()
    found.add(Difference("INBOX", "message 1", "", "guid"))
    record.add("u1", found)
    with (tmp_path / "merged-mail-a.jsonl").open("a") as file:
        file.write('{"user": "cut off by a power c')
    record.begin(4, AT)
    record.add("u2", found)
    read = record.read()
    assert read is not None
    assert [row["user"] for row in read["users"]] == ["u1", "u2"]
    record.begin(6, AT)
    read = record.read()
    assert read is not None
    assert (read["epoch"], read["users"]) == (6, [])


def test_what_counts() -> None:
    assert of_the_peer(Difference("", "active script", "", "s"))
    assert not of_the_peer(Difference("x", "mailbox", "3 messages", ""))


async def test_the_rest_is_passed_on(tmp_path: Path) -> None:
    peer = Peer()
    made, _ = carrier(peer, tmp_path)
    assert made.progress("u1") == 7.0
    made.cut()
    assert peer.done == [("cut", False)]
