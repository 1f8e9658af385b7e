"""What a handover tells comes through as it is, however many recipients a message has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbra.transport.envelope import EnvelopeError
from umbra.transport.remaining import Left, rows_of, take

NAMES = st.lists(
    st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=300),
    max_size=300,
).map(tuple)
LEFT = st.builds(Left, st.none() | NAMES, st.booleans())


def taken(rows: list[dict[str, Any]]) -> Mapping[str, Left]:
    found: dict[str, Left] = {}
    for row in rows:
        take(found, json.loads(json.dumps(row)))
    return found


@given(st.dictionaries(st.text(max_size=5), LEFT, max_size=5))
def test_rows_say_what_is_left(remaining: dict[str, Left]) -> None:
    assert taken(list(rows_of(remaining))) == remaining


def test_no_row_is_longer_than_a_line_of_the_link() -> None:
    names = tuple(f"\N{SNOWMAN}{number}@example.org" for number in range(50_000))
    remaining = {"4long": Left(names, held=True), "4short": Left(("bob@example.com",))}
    rows = list(rows_of(remaining))
    assert max(len(json.dumps(row)) for row in rows) < 64 * 1024
    assert taken(rows) == remaining
    # An agent that knows one row a message must not take the last one for all of it.
    assert sum("recipients" in row for row in rows) == 2


@pytest.mark.parametrize("row", [{}, {"queue_id": "4a"}, {"queue_id": "4a", "more": ["x"]}])
def test_what_makes_no_sense_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(KeyError):
        take({}, row)


@pytest.mark.parametrize("name", ["", "a\r\nRCPT TO:<b@example.com>", "a\x7f", "\ud800@x", None, 5])
@pytest.mark.parametrize("more", [True, False])
def test_a_recipient_that_no_envelope_takes_is_refused(name: object, more: bool) -> None:
    """It would be stored, and the message could not be read again."""
    found = {"4a": Left(("bob@example.com",))}
    row = {"queue_id": "4a", "more" if more else "recipients": ["ann@example.com", name]}
    with pytest.raises(EnvelopeError):
        take(found, row)
    assert found == {"4a": Left(("bob@example.com",))}


def test_an_address_keeps_each_byte() -> None:
    found: dict[str, Left] = {}
    take(found, {"queue_id": "4a", "recipients": ["b\udcfcro@example.org"]})
    assert found["4a"].recipients == ("b\udcfcro@example.org",)
