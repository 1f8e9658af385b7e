"""The model of a mail account, and how a node's view is held against it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from tests.model.account import Account, Box, Message, Script, between
from tests.model.machine import Tally
from tests.model.report import goals, rows
from tests.model.wire import Broken, Imap, Refused, literal, quoted


def account() -> Account:
    box = Box(uidvalidity=7, uidnext=3, messages={1: Message("m1", {"\\Seen"}), 2: Message("m2")})
    return Account({"INBOX": box, "a": Box(8), "a/b": Box(9)}, {"a"})


def view(**boxes: Any) -> dict[str, Any]:
    def row(uid: int, mark: str, *flags: str) -> list[Any]:
        return [uid, f"guid{uid}", list(flags), "date", 10, mark, "digest"]

    mailboxes = {
        "INBOX": {"uidvalidity": 7, "uidnext": 3, "guid": "g",
                  "messages": [row(1, "m1", "\\Seen"), row(2, "m2")]},
        "a": {"uidvalidity": 8, "uidnext": 1, "guid": "h", "messages": []},
        "a/b": {"uidvalidity": 9, "uidnext": 1, "guid": "i", "messages": []},
        **boxes,
    }  # fmt: skip
    return {"mailboxes": mailboxes, "subscriptions": ["a"], "scripts": {}, "active": "",
            "rights": {}, "notes": {}}  # fmt: skip


def test_what_is_as_it_must_be() -> None:
    assert account().differences(view()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["mailboxes"]["INBOX"]["messages"].pop(), "message 2 is missing"),
        (lambda v: v["mailboxes"]["INBOX"]["messages"][1].__setitem__(0, 5), "message 5 is there"),
        (lambda v: v["mailboxes"]["INBOX"]["messages"][0][2].clear(), "has [] for"),
        (lambda v: v["mailboxes"]["INBOX"].update(uidvalidity=1), "uidvalidity 1 for 7"),
        (lambda v: v["mailboxes"]["INBOX"].update(uidnext=9), "uidnext 9 for 3"),
        (lambda v: v["mailboxes"]["INBOX"]["messages"].reverse(), "not in the order"),
        (lambda v: v["mailboxes"].pop("a"), "mailbox a is missing"),
        (lambda v: v["mailboxes"].update(z=v["mailboxes"]["a"]), "mailbox z is there"),
        (lambda v: v.update(subscriptions=[]), "subscription of a is missing"),
        (lambda v: v.update(scripts={"s": "x"}), "script s: x for None"),
        (lambda v: v.update(active="s"), "active script 's' for ''"),
        (lambda v: v.update(rights={"a": {"anyone": "lr"}}), "a: rights"),
        (lambda v: v.update(notes={"a": {"/private/comment": "x"}}), "a: metadata"),
    ],
)
def test_each_difference_is_named(change: Any, words: str) -> None:
    seen = view()
    change(seen)
    assert any(words in found for found in account().differences(seen))
    assert between(view(), seen)


def test_changes() -> None:
    before = account()
    after = before.after(lambda a: a.copy("INBOX", [2, 1], "a"))
    assert [message.mark for message in after.boxes["a"].messages.values()] == ["m1", "m2"]
    assert before.boxes["a"].messages == {}
    after.flag("a", [1], "", {"\\Flagged"})
    assert after.boxes["INBOX"].messages[1].flags == {"\\Seen"}
    after.remove("INBOX", [2])
    assert after.boxes["INBOX"].uidnext == 3
    after.rename("a", "z")
    assert sorted(after.boxes) == ["INBOX", "z", "z/b"]


def test_of_scripts_a_power_cut_may_leave_what_was_before() -> None:
    first, second, last = account(), account(), account()
    second.scripts, second.active = {"s": Script("d", "keep")}, "s"
    last.scripts, last.active = {"s": Script("e", "keep")}, "s"
    last.take_scripts(view() | {"scripts": {"s": "d"}, "active": "s"}, [second, first])
    assert last.differences(view() | {"scripts": {"s": "d"}, "active": "s"}) == []
    last.take_scripts(view() | {"scripts": {"s": "x"}, "active": ""}, [second, first])
    assert last.differences(view() | {"scripts": {"s": "d"}, "active": "s"}) == []


def test_deliveries_go_where_the_script_says_and_their_uids_are_learned() -> None:
    mine = account()
    mine.scripts = {"s": Script("d", "file", "a"), "gone": Script("d", "file", "nowhere")}
    mine.deliver(Message("m3"))
    mine.active = "s"
    mine.deliver(Message("m4"))
    mine.active = "gone"
    mine.deliver(Message("m5"))
    assert any("delivery m4" in text for text in mine.differences(view()))
    seen = view()
    inbox, other = seen["mailboxes"]["INBOX"], seen["mailboxes"]["a"]
    inbox["messages"] += [[3, "g3", [], "d", 1, "m5", "x"], [4, "g4", [], "d", 1, "m3", "x"]]
    inbox["uidnext"] = 5
    other["messages"] = [[1, "g5", [], "d", 1, "m4", "x"]]
    other["uidnext"] = 2
    seen |= {"scripts": {"s": "d", "gone": "d"}, "active": "gone"}
    mine.learn(seen)
    assert mine.differences(seen) == []
    inbox["messages"][-1][6] = "altered"
    assert mine.differences(seen)


def test_a_run_that_lost_something_or_ran_too_little_has_failed() -> None:
    def holds(*arguments: Any) -> bool:
        return all(goal["holds"] for goal in goals(*arguments))

    assert holds(2000, [], 0, None)
    assert holds(10, [], 0, 1, 10)
    assert not holds(1999, [], 0, None)
    assert not holds(2000, [{"what": "x"}], 0, None)
    assert not holds(2000, [], 1, None)
    assert not holds(2000, [], 0, 0)
    (row,) = rows({"APPEND": Tally(3, 1, 0, 2, [0.0, 0.5])})
    assert (row["before_ok"], row["late_max_s"]) == (1, 0.5)


class Server:
    """What a server said, and what it was told."""

    def __init__(self, said: bytes) -> None:
        self.said = io.BytesIO(b"* OK ready (at last\r\n" + said)
        self.told = io.BytesIO()
        self.imap = Imap(self.said, self.told)


def test_answers_are_parsed() -> None:
    server = Server(
        b'* LIST (\\HasChildren) "/" "a \\"b\\""\r\n'
        b"* 3 FETCH (UID 4 BODY[HEADER.FIELDS (X)] {5}\r\na\r\n)b FLAGS (\\Seen $L))\r\n"
        b"m1 OK [APPENDUID 7 3:4] Done (really.\r\n"
        b"m2 NO [NONEXISTENT] no\r\n"
        b"m3 OK"
    )
    answer = server.imap.run(b"X", quoted(b'a"b'), literal(b"c\r\n"))
    assert server.told.getvalue() == b'm1 X "a\\"b" {3+}\r\nc\r\n\r\n'
    assert answer.of(b"LIST") == [[b"LIST", [b"\\HasChildren"], b"/", b'a "b"']]
    assert answer.of(b"FETCH") == [
        [b"3", b"FETCH", [b"UID", b"4", b"BODY[HEADER.FIELDS (X)]", b"a\r\n)b", b"FLAGS",
                          [b"\\Seen", b"$L"]]]
    ]  # fmt: skip
    assert answer.code("APPENDUID") == ["7", "3:4"]
    with pytest.raises(Refused, match="NONEXISTENT"):
        server.imap.run(b"X")
    with pytest.raises(Broken):
        server.imap.run(b"X")
