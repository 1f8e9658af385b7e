"""A message that is expunged while it is copied is never the last that Dovecot hears of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbra.mailbox.expunged import MAX_LINE, Expunged

# As Dovecot 2.4.1 sends it, less the kinds of items that do not matter here.
GREETING = (
    b"VERSION\tdsync\t3\t5\n"
    b"Hhostname\tsync_type\tbackup_send\tbackup_recv\n"
    b"Bmailbox_guid\tuid_validity\n"
    b"Atype\tkey\tvalue\tstream\n"
    b"Mguid\tuid\tpop3_uidl\tpop3_order\treceived_date\tsaved_date\tstream\n"
    b".\n"
)
ONE_WAY, MERGE = b"Hmail-a\tf\t\n", b"Hmail-a\tf\n"
BOX = b"Bguid\t17\n.\n.\n"
END = b".\nSguid\n"
# With a dot that dsync has doubled, and an end that looks like one.
CONTENT = b"Subject: x\r\n\r\n..\r\nMguid\n.\n\r.\r\n..\r\n.x\r\n.\r\n"


def mail(uid: int, *, content: bool = True) -> bytes:
    line = b"Mguid%d\t%d\t\x02\t\x02\t1700000000\t1700000000" % (uid, uid)
    return line + (b"\t\n" + CONTENT if content else b"\n")


def gone(uid: int) -> bytes:
    return mail(uid, content=False)


def stream(*items: bytes, settings: bytes = ONE_WAY) -> bytes:
    return GREETING + settings + BOX + b"".join(items) + END + b".\nF\n"


def through(data: bytes, *cuts: int) -> tuple[bytes, int]:
    expunged, out, at = Expunged(), b"", 0
    for cut in (*sorted(cuts), len(data)):
        out += expunged.feed(data[at:cut])
        at = max(at, cut)
    return out, expunged.left_out


def test_a_message_that_is_gone_and_comes_last_is_left_out() -> None:
    """Else sdbox removes the files of all that were saved with it, and keeps the index (2.4.1)."""
    out, left = through(stream(mail(1), gone(2), mail(3), gone(4), gone(5)))
    assert out == stream(mail(1), gone(2), mail(3))
    assert left == 2


@pytest.mark.parametrize(
    "items",
    [[], [mail(1)], [gone(1), mail(2)], [mail(1), gone(2), gone(3), mail(4)], [gone(1)]],
    ids=["none", "one", "first", "between", "alone"],
)
def test_all_else_goes_on_as_it_came(items: list[bytes]) -> None:
    assert through(stream(*items)) == (stream(*items), 0)


def test_a_merge_may_have_moved_messages_before() -> None:
    out, left = through(stream(gone(1), settings=MERGE))
    assert (out, left) == (stream(settings=MERGE), 1)


def test_each_mailbox_by_itself() -> None:
    one = BOX + mail(1) + gone(2) + END
    two = BOX + gone(3) + END
    out, left = through(GREETING + ONE_WAY + one + two)
    assert out == GREETING + ONE_WAY + BOX + mail(1) + END + two
    assert left == 1


def test_the_content_of_an_attribute_is_none_of_lines() -> None:
    attribute = b"Ap\tkey\t\x02\t\nMguid\t1\r\n.\r\n"
    data = GREETING + ONE_WAY + b"Bguid\t17\n" + attribute + b".\n.\n" + mail(1) + END
    assert through(data) == (data, 0)


@given(
    st.lists(st.tuples(st.booleans(), st.binary(max_size=40)), max_size=6),
    st.lists(st.integers(0, 2000), max_size=12),
)
def test_however_the_stream_is_cut(mails: list[tuple[bool, bytes]], cuts: list[int]) -> None:
    def sent(uid: int, content: bytes) -> bytes:
        # As dsync does: a dot after an LF is doubled.
        body = content.replace(b"\n.", b"\n..")
        return b"Mg\t%d\t\x02\t\x02\t1\t1\t\n" % uid + body + b"\r\n.\r\n"

    items = [sent(n, body) if there else gone(n) for n, (there, body) in enumerate(mails)]
    last = max((n for n, (there, _) in enumerate(mails) if there), default=-1)
    kept = items[: last + 1] if last >= 0 else items
    data = stream(*items)
    assert through(data, *(cut for cut in cuts if cut < len(data))) == (
        stream(*kept),
        len(items) - len(kept),
    )


def test_memory_is_bounded() -> None:
    expunged = Expunged()
    expunged.feed(GREETING + ONE_WAY + BOX + b"Mg\t1\t\x02\t\x02\t1\t1\t\n")
    piece = b"x" * 65536
    assert sum(len(expunged.feed(piece)) for _ in range(64)) > 63 * 65536
    expunged.feed(b"\r\n.\r\n")
    with pytest.raises(ValueError, match="a line of dsync"):
        expunged.feed(b"x" * (MAX_LINE + 1))
