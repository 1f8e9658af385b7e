"""dsync's states: those that Dovecot 2.4.1 gave, and what is none."""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbra.mailbox.states import GUID, RECORD, VERSION, joined, records

# Of a user with three mailboxes, and of a sync of one of them after that.
WHOLE = (
    "AQAAANDLhgCbCQprRioAAKq+BtWbCQprAwAAAAUAAAAAAAAAAAAAAAAAAAADAAAAGJJGBZsJCmtGKgAAqr4G1ZwJ"
    "CmsEAAAABQAAAAAAAAAAAAAAAAAAAAQAAACAceA3mgkKa0YqAACqvgbVmgkKawAAAAABAAAAAAAAAAAAAAAAAAAA"
    "AAAAAEXH6qA="
)
SINGLE = "AQAAANDLhgCbCQprRioAAKq+BtWbCQprAwAAAAcAAAAAAAAAAAAAAAAAAAADAAAALj7Phg=="

STATES = st.dictionaries(
    st.binary(min_size=GUID, max_size=GUID),
    st.binary(min_size=RECORD - GUID, max_size=RECORD - GUID),
    max_size=8,
)


def state(told: dict[bytes, bytes], version: bytes = VERSION) -> str:
    """Return a state that tells this, as Dovecot writes it."""
    data = version + b"".join(guid + rest for guid, rest in told.items())
    return b64encode(data + zlib.crc32(data).to_bytes(4, "little")).decode()


def test_a_state_of_one_mailbox_replaces_what_was_told_of_it() -> None:
    before, after = records(WHOLE), records(SINGLE)
    assert len(before) == 3
    assert len(after) == 1
    ((guid, record),) = after.items()
    assert before[guid] != record
    assert records(joined(WHOLE, SINGLE)) == before | after


@given(STATES, STATES)
def test_the_newer_one_counts(old: dict[bytes, bytes], new: dict[bytes, bytes]) -> None:
    whole = old | new
    assert records(joined(state(old), state(new))) == {guid: guid + whole[guid] for guid in whole}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "AAAA",  # what Dovecot takes for an empty one of version 0
        "no base64",
        state({}, version=b"\x02\x00\x00\x00"),
        state({bytes(GUID): bytes(RECORD)}),
        b64encode(b64decode(state({}))[:-1] + b"?").decode(),
        WHOLE[:-4],
    ],
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="state"):
        records(text)
    with pytest.raises(ValueError, match="state"):
        joined(state({}), text)
