"""What is foretold of a sync: real dialogues of Dovecot 2.4.1, each thing in them changed.

``dialogues`` has both halves of stateful one-way syncs, recorded between two Dovecots that heard
each other: what dsync says after doveadm's handshake (``.here``), and what the shadow's doveadm-
server sends on its data channel (``.there``).
"""

from __future__ import annotations

import logging
import re
import tracemalloc
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbra.mailbox import foretell
from umbra.mailbox.foretell import (
    END,
    HOLD,
    LOG,
    NOTHING,
    Channels,
    Fields,
    Foretelling,
    Guard,
    Lines,
    Mode,
    Surprise,
    Unsafe,
    Whole,
    encode,
    fields,
    packet,
)

DIALOGUES = Path(__file__).parent / "dialogues"
NAMES = sorted(path.stem for path in DIALOGUES.glob("*.here"))
HERE = {name: (DIALOGUES / f"{name}.here").read_bytes() for name in NAMES}
THERE = {name: (DIALOGUES / f"{name}.there").read_bytes() for name in NAMES}
# Of one mailbox, and the sync of all of them that was before it.
SINGLE = {"single": "nested"}


@cache
def known(name: str) -> tuple[bytes, bytes]:
    """Return the hello and the tree, as a sync that was heard teaches them."""
    name = SINGLE.get(name, name)
    plain = Foretelling(b"", b"", quiet)
    assert plain.greet() == b""
    assert plain.feed_local(HERE[name]) == (b"", HERE[name])
    sent = packet(0, THERE[name])
    assert plain.feed_remote(sent) == sent
    plain.end_remote()
    assert plain.mode is Mode.PLAIN
    return plain.hello, plain.tree


def quiet(level: int, text: str) -> None:
    """Hear nothing of the shadow's log."""


def begin(name: str) -> Foretelling:
    """Return a sync that is about to be foretold."""
    return Foretelling(*known(name), quiet, single=name in SINGLE)


def unpacked(data: bytes) -> bytes:
    """Return what is on the data channel."""
    channels = Channels()
    pieces = list(channels.feed(data))
    assert channels.whole
    assert {channel for channel, _ in pieces} <= {0}
    return b"".join(piece for _, piece in pieces)


def heard(told: Foretelling, there: bytes) -> None:
    """Let the shadow say this and end."""
    told.feed_remote(packet(0, there))
    told.end_remote()


def run(here: bytes, there: bytes, told: Foretelling) -> bytes:
    """Play a whole sync; return what dsync here was told."""
    answer = unpacked(told.greet() + told.feed_local(here).back)
    assert told.feed_remote(packet(0, there)) == b""
    told.end_remote()
    return answer


def lines(data: bytes) -> list[bytes]:
    """Return the shadow's lines; none of them has a content."""
    return data.split(b"\n")[:-1]


def joined(rows: list[bytes]) -> bytes:
    return b"".join(row + b"\n" for row in rows)


def of_dialogue(data: bytes) -> int:
    """Return how many of the shadow's lines are its hello."""
    return lines(data).index(END) + 2


# What may differ, as each node has it for itself.
TOLERATED = {
    b"N": {"uid_next", "last_renamed_or_created", "last_subscription_change"},
    b"D": {"mailboxes", "dirs", "unsubscribes"},
    b"B": {"first_recent_uid", "cache_fields"},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_sync(name: str) -> None:
    told = begin(name)
    answer = run(HERE[name], THERE[name], told)
    assert told.mode is Mode.FORETOLD
    assert told.said
    assert told.confirmed
    assert not told.waits
    assert (told.hello, told.tree) == known(name)
    # It is what the shadow said, less what each node has for itself.
    assert [mine(row) for row in lines(answer)] == [
        mine(row) for row in reordered(lines(THERE[name])) if row != b"X"
    ]


def mine(row: bytes) -> bytes | tuple[bytes, Fields]:
    kind = row[:1]
    if kind not in TOLERATED or row in foretell.GREETING:
        return row
    own = TOLERATED[kind] | ({"highest_modseq"} if kind == b"B" else set())
    return kind, {name: value for name, value in fields(row).items() if name not in own}


def reordered(rows: list[bytes]) -> list[bytes]:
    """Requests come in the order of a hash table."""
    requests = [row for row in rows if row[:1] == b"R" and row not in foretell.GREETING]
    requests.sort(key=lambda row: int(fields(row)["uid"]))
    place = iter(requests)
    return [
        next(place) if row[:1] == b"R" and row not in foretell.GREETING else row for row in rows
    ]


@pytest.mark.parametrize("name", NAMES)
def test_all_goes_to_the_shadow_in_one_piece(name: str) -> None:
    told = begin(name)
    steps = [told.feed_local(HERE[name][at : at + 1]) for at in range(len(HERE[name]))]
    assert [step.on for step in steps[:-1]] == [b""] * (len(steps) - 1)
    assert steps[-1].on == HERE[name]


def changed(name: str) -> Iterator[tuple[str, bytes]]:
    """Yield what the shadow could say otherwise, one thing at a time, and which it was."""
    rows = lines(THERE[name])
    start = of_dialogue(THERE[name])
    for number, row in enumerate(rows):
        before, after = rows[:number], rows[number + 1 :]
        yield f"{number} left out", joined([*before, *after])
        if row != b"X":
            yield f"{number} twice", joined([*before, row, row, *after])
        yield f"{number} unknown", joined([*before, b"Q", *after])
        yield f"{number} in capitals", joined([*before, row.swapcase() + b"!", *after])
        kind = row[:1]
        if number < start or row in (END, b"X"):
            continue
        there = fields(row)
        for field in foretell._NAMES[kind]:
            if field in TOLERATED.get(kind, ()):
                continue
            for value in (b"", b"0", b"1", b"999999", b"00000000000000000000000000000000", None):
                other = {**there, field: value or b""}
                if value is None:
                    del other[field]
                if encode(kind, other)[:-1] == row:
                    continue
                if kind == b"B" and field == "highest_modseq" and value == b"999999":
                    continue  # it may have counted on
                what = f"{number} {kind.decode()} {field} {value!r}"
                yield what, joined([*before, encode(kind, other)[:-1], *after])


@pytest.mark.parametrize("name", NAMES)
def test_whatever_the_shadow_says_otherwise_is_a_surprise(name: str) -> None:
    """Each line, and each field of each line, that matters."""
    passed = []
    count = 0
    for what, there in changed(name):
        count += 1
        try:
            run(HERE[name], there, begin(name))
        except Surprise:
            continue
        passed.append(what)
    # Without its last word, that it has closed, all is said.
    assert passed == [f"{len(lines(THERE[name])) - 1} left out"]
    assert count > 100


def tolerated(name: str) -> Iterator[bytes]:
    rows = lines(THERE[name])
    for number, row in enumerate(rows[of_dialogue(THERE[name]) :], of_dialogue(THERE[name])):
        for field in TOLERATED.get(row[:1], ()):
            for value in (b"7", b""):
                other = encode(row[:1], {**fields(row), field: value})[:-1]
                yield joined([*rows[:number], other, *rows[number + 1 :]])


@pytest.mark.parametrize("name", NAMES)
def test_what_each_node_has_for_itself_is_none(name: str) -> None:
    for there in tolerated(name):
        run(HERE[name], there, begin(name))


@pytest.mark.parametrize("name", NAMES)
def test_whether_a_name_without_a_mailbox_holds_others(name: str) -> None:
    expected = name in {*SINGLE, *SINGLE.values()}
    hello, _ = known(name)
    for told in (begin(name), Foretelling(b"", b"", quiet), Foretelling(hello, b"", quiet)):
        assert told.bare, "not known yet"
        told.feed_local(HERE[name])
        assert told.bare == expected


@pytest.mark.parametrize("name", SINGLE)
def test_one_mailbox_is_synced_as_it_is_known_or_not_at_all(name: str) -> None:
    hello, tree = known(name)
    for nothing in ((b"", tree), (hello, b""), (b"", b"")):
        with pytest.raises(Whole):
            Foretelling(*nothing, quiet, single=True)
    here = HERE[name]
    (row,) = [row for row in here.split(b"\n") if row[:2] == b"NT" and b"\ty\t" in row]
    node = fields(row)

    def other(**changes: bytes) -> bytes:
        return encode(b"N", {**node, **changes})

    unlike = [
        b"",  # gone, which dsync takes for nothing to do
        other(name=b"Work"),  # another one has its name now
        other(mailbox_guid=b"0" * 32),
        other(uid_validity=b"7"),
        other(existence=b"d"),
        other(subscribed=b"y"),
        other() + other(name=b"Work"),
        other(existence=b"n"),
    ]
    for rows in unlike:
        told = begin(name)
        with pytest.raises(Whole):
            told.feed_local(here.replace(row + b"\n", rows))
    state = next(row for row in here.split(b"\n") if row.startswith(b"S" + node["mailbox_guid"]))
    for no_state in (here.replace(state + b"\n", b""), HERE[SINGLE[name]], b"nonsense\n"):
        with pytest.raises(Whole):
            begin(name).feed_local(no_state)
    # And the other way round: what is of one mailbox only is not foretold as one of all.
    told = Foretelling(hello, tree, quiet)
    told.feed_local(here)
    assert told.mode is Mode.PLAIN


def test_names_may_come_in_another_order() -> None:
    rows = lines(THERE["move"])
    start = of_dialogue(THERE["move"])
    assert rows[start][:1] == rows[start + 1][:1] == b"N"
    rows[start], rows[start + 1] = rows[start + 1], rows[start]
    run(HERE["move"], joined(rows), begin("move"))


@pytest.mark.parametrize("name", NAMES)
def test_a_shadow_that_breaks_off_is_a_surprise(name: str) -> None:
    whole = packet(0, THERE[name])
    last = len(whole) - len(b"X\n")
    for end in range(last):
        told = begin(name)
        told.feed_local(HERE[name])
        told.feed_remote(whole[:end])
        assert not told.confirmed
        assert told.waits
        with pytest.raises(Surprise):
            told.end_remote()


@pytest.mark.parametrize("name", ["append", "move"])
def test_a_shadow_that_is_ahead_of_what_it_was_asked_is_a_surprise(name: str) -> None:
    for end in range(len(HERE[name])):
        told = begin(name)
        told.feed_local(HERE[name][:end])
        with pytest.raises(Surprise):
            heard(told, THERE[name])


def test_a_shadow_that_says_more_is_a_surprise() -> None:
    for more in (b"X\n", b"N\n", b"\n", b".\n", b"X", b"."):
        with pytest.raises(Surprise):
            run(HERE["store"], THERE["store"] + more, begin("store"))


cuts = st.lists(st.integers(min_value=0, max_value=4000), max_size=40)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = [0, *sorted({place for place in at if place < len(data)}), len(data)]
    return [data[begin:end] for begin, end in pairwise(places)]


@given(name=st.sampled_from(NAMES), here=cuts, there=cuts, packets=cuts)
@settings(deadline=None, max_examples=200)
def test_however_it_is_cut(
    name: str, here: list[int], there: list[int], packets: list[int]
) -> None:
    whole = begin(name)
    answer = run(HERE[name], THERE[name], whole)
    told = begin(name)
    steps = [told.feed_local(piece) for piece in cut(HERE[name], here)]
    assert unpacked(told.greet() + b"".join(step.back for step in steps)) == answer
    assert b"".join(step.on for step in steps) == HERE[name]
    sent = b"".join(packet(0, piece) for piece in cut(THERE[name], packets))
    assert b"".join(map(told.feed_remote, cut(sent, there))) == b""
    told.end_remote()
    assert told.confirmed
    assert told.tree == whole.tree


def from_scratch(here: bytes) -> bytes:
    """Return the same as a sync without a state says it: no state, and another type."""
    row = next(row for row in lines(here) if row.startswith(b"Hmail-a"))
    begin = here.index(row)
    end = here.index(b"\n.\n", begin) + 3
    return here[:begin] + row.replace(b"\ts\t", b"\tf\t") + b"\n" + here[end:]


def with_names(here: bytes, *names: bytes, deleted: bytes = b"") -> bytes:
    """Return the same with these names instead."""
    begin, end = here.index(b"\nN", here.index(b"\nH" + b"mail-a")) + 1, here.index(b"\n.\nD/")
    after = here.index(b"\n", end + 3)
    kept = here[end:after] + (b"\t" + deleted if deleted else b"")
    return here[:begin] + b"\n".join(names) + kept + here[after:]


WORK, INBOX = (row for row in lines(THERE["store"]) if row[:6] in (b"NWork\t", b"NINBOX"))
OTHER = INBOX.replace(b"6865b50e", b"00000000")
INBOX_GUID = b"6865b50e4568096ba2210000aabe06d5"
RENAMED = (WORK, OTHER, INBOX.replace(b"INBOX", b"old"))
GUARDED: dict[str, tuple[Guard, tuple[bytes, ...], bytes, bool]] = {
    # guard, names here, what was deleted, safe
    "the same": (Guard.ALL, (WORK, INBOX), b"", True),
    "another order": (Guard.ALL, (INBOX, WORK), b"", True),
    "INBOX was renamed": (Guard.ALL, RENAMED, b"", False),
    "INBOX was renamed, with a state": (Guard.INBOX, RENAMED, b"", False),
    "INBOX was renamed, and nobody minds": (Guard.NOTHING, RENAMED, b"", True),
    "one is renamed": (Guard.ALL, (WORK.replace(b"Work", b"Play"), INBOX), b"", True),
    "one is new": (Guard.ALL, (WORK, INBOX, OTHER.replace(b"INBOX", b"new")), b"", True),
    "one was deleted": (Guard.ALL, (WORK,), INBOX_GUID + b" 1795778640", True),
    "one is in no list": (Guard.ALL, (WORK,), b"", False),
    "another was deleted": (Guard.ALL, (WORK,), b"00" * 16 + b" 1795778640", False),
    "one is in no list, and nobody minds": (Guard.INBOX, (WORK,), b"", True),
    "an empty one is in no list": (Guard.ALL, (INBOX,), b"", True),
    "one has another GUID": (Guard.ALL, (WORK, OTHER), b"", False),
    "another UIDVALIDITY": (Guard.ALL, (WORK, INBOX.replace(b"8630", b"8631")), b"", False),
    "a lower UIDNEXT": (Guard.ALL, (WORK, INBOX.replace(b"\t4", b"\t3")), b"", False),
    "another UIDVALIDITY of an empty one": (
        Guard.ALL,
        (WORK.replace(b"8629", b"8631"), INBOX),
        b"",
        True,
    ),
    "a higher UIDNEXT": (Guard.ALL, (WORK, INBOX.replace(b"\t4", b"\t5")), b"", True),
}


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("why", GUARDED)
@given(here=cuts, there=cuts)
@settings(deadline=None, max_examples=25)
def test_the_shadow_hears_of_names_only_if_they_are_safe(
    why: str, heard: bool, state: bool, here: list[int], there: list[int]
) -> None:
    guard, rows, deleted, safe = GUARDED[why]
    said = with_names(HERE["store"], *rows, deleted=deleted)
    said = said if state else from_scratch(said)
    hello, _ = known("store")
    told = Foretelling(hello if heard and state else b"", b"", quiet, guard=guard)
    names = said.index(rows[0])
    after = said.index(b"\n", said.index(b"\n.\nD/") + 3) + 1
    on = b"".join(told.feed_local(piece).on for piece in cut(said[:after], here))
    if guard is not Guard.NOTHING:
        assert on == said[:names], "with that it can tell its own names"
        assert not told.begun
    answer = b"".join(map(told.feed_remote, cut(packet(0, THERE["store"]), there)))
    with nullcontext() if safe else pytest.raises(Unsafe) as refused:
        for piece in cut(said[after:], here):
            on += told.feed_local(piece).on
    assert on == (said if safe else said[:names])
    assert told.begun is safe
    if refused is not None:
        gone = "no list" in why or "GUID" in why or "another was" in why
        assert refused.value.missing == ({INBOX_GUID} if gone else set())
    # dsync here hears all that the shadow says, once.
    assert unpacked(told.greet() + answer) == THERE["store"]


def test_names_that_will_not_be_understood_are_not_waited_for() -> None:
    told = Foretelling(b"", b"", quiet, guard=Guard.ALL)
    told.feed_remote(packet(0, b"\n+\nVERSION\tdsync\t9\t9\n"))
    assert told.feed_local(HERE["store"]).on == HERE["store"]
    assert told.begun
    newer = HERE["store"].replace(b"dsync\t3", b"dsync\t4")
    told = Foretelling(b"", b"", quiet, guard=Guard.ALL)
    assert told.feed_local(newer).on == newer
    assert told.begun


@pytest.mark.parametrize("expunged", [True, False])
def test_a_message_that_was_expunged_meanwhile_takes_nothing_from_the_copy(expunged: bool) -> None:
    """Its line comes without the content, and the shadow then has one message less."""
    here, there = HERE["append"], THERE["append"]
    row = [row for row in lines(there) if row.startswith(b"S")][-1]
    start, _, count = row.rpartition(b"\t")
    fewer = there.replace(row, start + b"\t%d" % (int(count) - 1))
    if expunged:
        at = [found.start() + 1 for found in re.finditer(rb"\nM[0-9a-f]{32}\t", here)][-1]
        line = here[at : here.index(b"\n", at)].rpartition(b"\t")[0]
        here = here[:at] + line + b"\n" + here[here.index(b"\n.\r\n", at) + 4 :]
    told = begin("append")
    told.feed_local(here)
    with pytest.raises(Surprise) as surprise:
        heard(told, fewer)
    assert surprise.value.harmful is not expunged


@pytest.mark.parametrize(
    ("text", "harmful"),
    [("Remote didn't send mail GUID=00 (UID=3)", False), ("Deleting mailbox failed", True)],
)
def test_an_error_in_the_log_may_be_of_such_a_message(text: str, harmful: bool) -> None:
    told = begin("append")
    told.feed_local(HERE["append"])
    with pytest.raises(Surprise) as surprise:
        told.feed_remote(packet(LOG, b"\x04brain S: " + text.encode() + b"\n"))
    assert surprise.value.harmful is harmful


def test_a_sync_that_is_foretold_waits_for_no_names() -> None:
    told = Foretelling(*known("nothing"), quiet, guard=Guard.ALL)
    assert told.feed_local(HERE["nothing"]).on == HERE["nothing"]
    assert told.begun


def test_at_every_byte() -> None:
    for name in ("append", "move"):
        answer = run(HERE[name], THERE[name], begin(name))
        sent = packet(0, THERE[name])
        for at in range(len(HERE[name])):
            told = begin(name)
            one, two = told.feed_local(HERE[name][:at]), told.feed_local(HERE[name][at:])
            assert unpacked(told.greet() + one.back + two.back) == answer
            assert one.on + two.on == HERE[name]
            told.feed_remote(sent[:at])
            told.feed_remote(sent[at:])
            told.end_remote()


def turns(name: str) -> list[tuple[int, bytes]]:
    """Return what the shadow says, and how many bytes of dsync here it has to have for that."""
    rows, at, said, content = lines(THERE[name]), 0, [], False
    asked = []  # the ends of what the shadow answers to, in the order of its answers
    phase = "HSN"  # what comes, up to which end
    for row in HERE[name].split(b"\n"):
        at += len(row) + 1
        if content:
            content = row != b".\r"
            continue
        kind = row[:1]
        if at < HERE[name].index(b"\n.\n") + 3:
            continue
        if kind == b"D":
            asked.append(at)
            phase = "B"
        elif kind == b"B":
            asked.append(at)
            phase = "AC"
        elif kind == b"M":
            content = True
        elif row == END and phase == "AC":
            phase = "C"
        elif row == END and phase in ("C", "M"):
            asked.append(at)
            phase = {"C": "M", "M": "B"}[phase]
        elif row == END and phase == "B":
            asked.append(at)
    start = of_dialogue(THERE[name])
    said.append((0, joined(rows[:start])))
    due = iter(asked)
    answer: list[bytes] = []
    for row in rows[start:-1]:
        answer.append(row)
        if row[:1] in (b"D", b"B", b"S", b"F") or (row == END and rows.index(END, start) != 0):
            if row == END and answer[0][:1] == b"N":
                continue
            said.append((next(due), joined(answer)))
            answer = []
    said.append((len(HERE[name]), joined(rows[-1:])))
    assert next(due, None) is None
    return said


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hold", [1, 500, HOLD])
def test_the_shadow_may_answer_as_early_as_it_can(
    name: str, hold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foretell, "HOLD", hold)
    told = begin(name)
    answers = turns(name)
    assert b"".join(answer for _, answer in answers) == THERE[name]
    has = 0
    for at in range(len(HERE[name]) + 1):
        while answers and has >= answers[0][0]:
            assert told.feed_remote(packet(0, answers.pop(0)[1])) == b""
        has += len(told.feed_local(HERE[name][at : at + 1]).on)
    assert answers == []
    told.end_remote()
    assert told.confirmed


@pytest.mark.parametrize("name", NAMES)
def test_but_no_earlier(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foretell, "HOLD", 1)
    answers = turns(name)
    for number in range(1, len(answers) - 1):
        told = begin(name)
        before = [answer for _, answer in answers[:number]]
        told.feed_local(HERE[name][: answers[number][0] - 1])
        told.feed_remote(packet(0, b"".join(before)))
        with pytest.raises(Surprise):
            heard(told, answers[number][1])


# -- contents


def appended(content: bytes) -> bytes:
    """Return what dsync here says when the first message has this content, stuffed already."""
    head, mark, rest = HERE["append"].partition(b"\nMb9")
    row, _, rest = rest.partition(b"\n")
    assert mark
    return head + mark + row + b"\n" + content + rest[rest.index(b"\r\n.\r\n") :]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b".\n",
        b".\r\nS\r\n",  # dsync does not stuff a dot at the very begin
        b"Subject: x\r\n\r\n..\r\n...\r\n..S\r\nF\n",
        b"S\t1\n.x",
        b"\0\1\2\xff" * 1000,
        b"no end" * 200_000,
        b"\r\r\n\n\r",
    ],
)
@pytest.mark.parametrize("size", [1 << 20, 7, 1])
def test_contents_are_passed_over(content: bytes, size: int) -> None:
    if size == 1:
        content = content[-2000:]
    here = appended(content)
    told = begin("append")
    sent = b"".join(told.feed_local(here[at : at + size]).on for at in range(0, len(here), size))
    assert sent == here
    told.feed_remote(packet(0, THERE["append"]))
    told.end_remote()


def test_an_attribute_may_have_a_content() -> None:
    """A Sieve script is one of the INBOX."""
    rows = HERE["store"].split(b"\n")
    at = next(at for at, row in enumerate(rows) if row[:2] == b"B6")
    script = encode(b"A", {"type": b"p", "key": b"vendor/sieve", "stream": b""})
    rows[at + 1 : at + 1] = (script + b"keep;\r\n..\r\n.\r").split(b"\n")
    run(b"\n".join(rows), THERE["store"], begin("store"))


def test_a_large_message_streams_through_little_memory() -> None:
    told = begin("append")
    head, _, tail = appended(b"MIDDLE").partition(b"MIDDLE")
    piece = (b"x" * 70 + b"\r\n") * 900
    told.feed_local(head)
    tracemalloc.start()
    passed = sum(len(told.feed_local(piece).on) for _ in range(1000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert passed > 1000 * len(piece) - HOLD
    assert peak < 10 * len(piece)
    told.feed_local(tail)
    told.feed_remote(packet(0, THERE["append"]))
    told.end_remote()


def test_a_line_without_end_is_a_surprise() -> None:
    with pytest.raises(Surprise, match="a line is over"):
        list(Lines().feed(b"x" * (foretell.MAX_LINE + 1)))


# -- the log


def test_the_shadows_log_is_heard() -> None:
    said: list[tuple[int, str]] = []
    told = Foretelling(*known("store"), lambda level, text: said.append((level, text)))
    log = b"\2dsync-server(u): one\n\3two\n\1three\n\n"
    there = packet(0, THERE["store"][:50]) + packet(LOG, log[:9]) + packet(LOG, log[9:])
    assert told.feed_remote(there[:20]) + told.feed_remote(there[20:]) == b""
    told.feed_local(HERE["store"])
    told.feed_remote(packet(0, THERE["store"][50:]))
    told.end_remote()
    assert said == [
        (logging.INFO, "dsync-server(u): one"), (logging.WARNING, "two"), (logging.DEBUG, "three")
    ]  # fmt: skip


@pytest.mark.parametrize("level", [4, 5, 6, 7, 65])
@pytest.mark.parametrize("when", ["early", "late"])
def test_an_error_in_it_is_a_surprise(level: int, when: str) -> None:
    told = begin("store")
    error = packet(LOG, bytes([level]) + b"Error: no\n")
    if when == "late":
        told.feed_local(HERE["store"])
        told.feed_remote(packet(0, THERE["store"]))
    with pytest.raises(Surprise, match="Error: no"):
        told.feed_remote(error)


def test_half_a_line_of_it_is_a_surprise() -> None:
    told = begin("store")
    told.feed_local(HERE["store"])
    told.feed_remote(packet(0, THERE["store"]) + packet(LOG, b"\4Err"))
    with pytest.raises(Surprise, match="within a line"):
        told.end_remote()


def test_a_channel_that_is_not_known_is_a_surprise() -> None:
    with pytest.raises(Surprise, match="channel 7"):
        begin("store").feed_remote(packet(7, b"x"))


# -- what is not foretold


def other(dialogue: str, kind: bytes, **values: bytes | None) -> bytes:
    """Return what dsync here says with other fields in the first line of a kind."""
    rows = HERE[dialogue].split(b"\n")
    start = rows.index(END)
    number = next(at for at, row in enumerate(rows) if at > start and row[:1] == kind)
    record = fields(rows[number])
    for field, value in values.items():
        if value is None:
            record.pop(field, None)
        else:
            record[field] = value
    rows[number] = encode(kind, record)[:-1]
    return b"\n".join(rows)


PLAIN = {
    "another protocol": HERE["store"].replace(b"dsync\t3\t5", b"dsync\t3\t6", 1),
    "another field": HERE["store"].replace(b"Rguid\tuid\n", b"Rguid\tuid\tnew\n", 1),
    "from scratch": other("store", b"H", sync_type=b"f"),
    "two ways": other("store", b"H", backup_recv=None),
    "the other way": other("store", b"H", backup_recv=None, backup_send=b""),
    "one mailbox": other("store", b"H", sync_box=b"INBOX"),
    "without requests": other("store", b"H", send_mail_requests=None),
    "a new name": other("store", b"N", name=b"Other"),
    "a new mailbox": other("store", b"N", mailbox_guid=b"0" * 31 + b"1"),
    "a new UIDVALIDITY": other("store", b"N", uid_validity=b"1"),
    "subscribed": other("store", b"N", subscribed=b""),
    "deleted": other("store", b"N", existence=b"d"),
    "no mailbox": other("store", b"N", existence=b"n"),
    "a state of another UIDVALIDITY": other("store", b"S", last_uidvalidity=b"1"),
    "a state of another mailbox": other("store", b"S", mailbox_guid=b"0" * 31 + b"1"),
}


@pytest.mark.parametrize("why", PLAIN)
def test_the_rest_is_heard_where_it_cannot_be_foretold(why: str) -> None:
    """Only the hello was foretold; all else of the shadow's reaches dsync here as it is."""
    told = begin("store")
    step = told.feed_local(PLAIN[why])
    assert told.mode is Mode.PLAIN
    assert step == (b"", PLAIN[why])
    log = packet(LOG, b"\4Error\n")
    heard = told.greet() + told.feed_remote(packet(0, THERE["store"][:700]) + log)
    assert heard.endswith(log)
    heard = heard.removesuffix(log) + told.feed_remote(packet(0, THERE["store"][700:]))
    assert unpacked(heard) == THERE["store"]
    told.end_remote()


@pytest.mark.parametrize("tree", [b"", b"other"])
def test_nothing_is_foretold_of_mailboxes_that_were_not_seen_there(tree: bytes) -> None:
    hello, seen = known("store")
    told = Foretelling(hello, tree, quiet)
    assert told.feed_local(HERE["store"]) == (b"", HERE["store"])
    assert told.mode is Mode.PLAIN
    told.feed_remote(packet(0, THERE["store"]))
    told.end_remote()
    assert told.tree == seen, "now they were"


@pytest.mark.parametrize("existence", [b"y", b"n"])
def test_a_name_may_only_hold_others(existence: bytes) -> None:
    row = b"\n" + encode(b"N", {"name": b"folder", "existence": existence})
    here = HERE["store"].replace(b"\nNWork\t", row + b"NWork\t")
    there = THERE["store"].replace(b"\nNWork\t", row + b"NWork\t")
    plain = Foretelling(b"", b"", quiet)
    plain.feed_local(here)
    plain.feed_remote(packet(0, there))
    told = Foretelling(plain.hello, plain.tree, quiet)
    run(here, there, told)
    assert told.confirmed


def test_too_many_mailboxes_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foretell, "MAX_UNDECIDED", 1000)
    told = begin("store")
    assert told.feed_local(HERE["store"][:1001]) == (b"", HERE["store"][:1001])
    assert told.mode is Mode.PLAIN


def test_the_shadow_has_other_mailboxes() -> None:
    """Then nothing is foretold next time."""
    plain = Foretelling(b"", b"", quiet)
    plain.feed_local(HERE["store"])
    plain.feed_remote(packet(0, THERE["store"].replace(b"\nNWork\t", b"\nNPlay\t")))
    assert plain.tree == b""


@pytest.mark.parametrize("there", [b"\n-NOUSER\n", b"\n+\nVERSION\tdsync\t3\t6\n", b""])
def test_another_hello(there: bytes) -> None:
    """Heard, it is as it is and teaches nothing; foretold, it is a surprise."""
    plain = Foretelling(b"", b"", quiet)
    assert plain.feed_remote(packet(0, there)) == packet(0, there)
    plain.end_remote()
    assert plain.hello == b""
    told = begin("store")
    with pytest.raises(Surprise):
        heard(told, there)
    told = begin("store")
    told.feed_local(PLAIN["a new name"])
    with pytest.raises(Surprise):
        heard(told, there)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (b"B", {"mailbox_guid": b"0" * 31 + b"1"}),
        (b"B", {"uid_validity": b"1"}),
        (b"B", {"have_guids": None}),
        (b"B", {"have_save_guids": None}),
        (b"C", {"guid": None}),
        (b"C", {"guid": b""}),
    ],
)
def test_what_dsync_here_must_not_say(kind: bytes, values: dict[str, bytes | None]) -> None:
    told = begin("append")
    with pytest.raises(Surprise):
        told.feed_local(other("append", kind, **values))
    with pytest.raises(Surprise):
        begin("append").feed_local(HERE["append"] + b".\n")
    told = begin("append")
    assert told.feed_local(HERE["append"][:-3]).on == b""
    assert not told.said


def test_fields() -> None:
    assert fields(b"Rguid\t\x02") == {"guid": b"guid"}
    assert fields(b"F") == {}
    assert encode(b"F", {}) == b"F\n"
    record = {"name": b"a\x01tb", "existence": b"y", "subscribed": b""}
    assert encode(b"N", record) == b"Na\x01tb\ty\t" + NOTHING + (b"\t" + NOTHING) * 3 + b"\t\n"
    assert fields(encode(b"N", record)[:-1]) == record
    for bad in (b"", b"?", b"F\t\t\t\t"):
        with pytest.raises(Surprise):
            fields(bad)
