"""Envelopes: nothing is lost on the way, and nothing unchecked gets in."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.transport.support import ENVELOPE

from umbra.transport import envelope as module
from umbra.transport.envelope import Envelope, EnvelopeError, Recipient
from umbra.transport.remaining import Left
from umbra.transport.resubmit import narrow

printable = st.binary(max_size=60).map(
    lambda raw: bytes(byte for byte in raw if byte >= 0x21 and byte != 0x7F)
)
text = printable.map(lambda raw: raw.decode("utf-8", "surrogateescape"))
shown = printable.map(module.clean)
words = text.filter(bool)
arguments = st.lists(words, max_size=4).map(tuple)
recipients = st.lists(st.builds(Recipient, words, arguments), min_size=1, max_size=5).map(tuple)


@settings(deadline=None)
@given(
    st.builds(
        Envelope, text, recipients, arguments, shown, shown, shown, shown, shown, st.floats(0, 1e10)
    )
)
def test_round_trip(envelope: Envelope) -> None:
    written = envelope.to_json()
    written.encode("ascii")
    assert Envelope.from_json(written) == envelope


def test_bytes_survive() -> None:
    raw = b"<b\xfcro@example.org>"
    envelope = Envelope(module.address(raw), (Recipient("a@example.org"),))
    assert (
        Envelope.from_json(envelope.to_json()).sender.encode("utf-8", "surrogateescape")
        == raw[1:-1]
    )


@pytest.mark.parametrize(
    "change",
    [
        {"sender": None},
        {"sender": "a\r\nRCPT TO:<b@example.com>"},
        {"sender": "x" * 3000},
        {"sender_args": ["SIZE=1 BODY=7BIT"]},
        {"sender_args": ["A\0"]},
        {"sender_args": "BODY=7BIT"},
        {"sender_args": ["A"] * 100},
        {"recipients": []},
        {"recipients": "a@example.org"},
        {"recipients": [[]]},
        {"recipients": [[""]]},
        {"recipients": [["a@example.org", ""]]},
        {"recipients": [[1]]},
        {"recipients": [["a\n"]]},
        {"recipients": [["a"]] * (module.MAX_RECIPIENTS + 1)},
        {"received": "now"},
        {"received": True},
        {"received": float("nan")},
        {"received": -1},
        {"helo": 5},
        {"message_id": "a\x00b"},
        {"sender": "\ud800"},
        {"recipients": [["\udc7f@example.org"]]},
        {"recipients": [["a@example.org", "ORCPT=\udd00"]]},
        {"sender_args": ["ENVID=\ud800"]},
    ],
)
def test_untrusted_input_is_refused_in_words(change: dict[str, Any]) -> None:
    value = ENVELOPE.to_object() | change
    with pytest.raises(EnvelopeError, match=r"[a-z]"):
        Envelope.from_object(value)


@pytest.mark.parametrize("data", ["", "[]", "{", "null", "[" * 100_000, b"\xff"])
def test_what_is_no_object_is_refused(data: str | bytes) -> None:
    with pytest.raises(EnvelopeError):
        Envelope.from_json(data)


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists))
def test_no_json_breaks_the_decoder_otherwise(value: Any) -> None:
    for key in ENVELOPE.to_object():
        document = json.loads(json.dumps(ENVELOPE.to_object() | {key: value}))
        with contextlib.suppress(EnvelopeError):
            Envelope.from_object(document)


def two() -> Envelope:
    return Envelope(
        "", (Recipient("Ann@Example.com", ("NOTIFY=NEVER",)), Recipient("sales@example.com"))
    )


def test_narrow_keeps_who_is_left() -> None:
    left = narrow(two(), Left(("ann@example.com",)))
    assert left.recipients == (Recipient("Ann@Example.com", ("NOTIFY=NEVER",)),)


def test_narrow_puts_what_an_alias_became_in_its_place() -> None:
    left = narrow(two(), Left(("bob@example.com", "sales@example.com")))
    assert left.recipients == (
        Recipient("sales@example.com"),
        Recipient("bob@example.com", ("NOTIFY=NEVER",)),
    )


def test_no_informational_text_steers_a_terminal() -> None:
    """Of an older agent neither: what it has taken is not refused for that."""
    assert module.clean(b"<1\xc2\x9b2J@x>") == "<1?2J@x>"
    value = ENVELOPE.to_object() | {"message_id": "<1\x9b2J@x>", "helo": "\x85\ud800\udfff"}
    envelope = Envelope.from_object(value)
    assert (envelope.message_id, envelope.helo) == ("<1?2J@x>", "???")
    envelope.helo.encode("utf-8", "surrogateescape")
    # An address stays what it is: mail goes there.
    assert Envelope.from_object(value | {"sender": "a\x9b@x"}).sender == "a\x9b@x"
