"""The milter codec and conversation, without I/O."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbra.transport import milter
from umbra.transport.milter import Conversation, Decoder, Flow, ProtocolError, Step, Transaction

OFFER = struct.pack(">III", 6, 0x1FF, 0x1FFFFF)
packets = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=200)), max_size=20)


def encode(command: int, data: bytes) -> bytes:
    return milter.packet(bytes([command]), data)


@settings(deadline=None)
@given(packets, st.integers(1, 50))
def test_decoder_gives_what_was_encoded_however_it_is_cut(
    items: list[tuple[int, bytes]], size: int
) -> None:
    stream = b"".join(encode(*item) for item in items)
    decoder, got = Decoder(), []
    for start in range(0, len(stream), size):
        got += decoder.feed(stream[start : start + size])
    assert got == items


@pytest.mark.parametrize("length", [0, milter.MAX_PACKET + 1, 0xFFFFFFFF])
def test_decoder_refuses_impossible_lengths(length: int) -> None:
    with pytest.raises(ProtocolError):
        Decoder().feed(struct.pack(">I", length) + b"B")


def test_decoder_holds_no_more_than_one_packet_of_the_largest_size() -> None:
    decoder = Decoder()
    assert decoder.feed(struct.pack(">I", milter.MAX_PACKET) + b"B" + bytes(1000)) == []
    assert len(decoder.feed(bytes(milter.MAX_PACKET - 1001))) == 1


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20).filter(lambda item: b"\0" not in item), min_size=1))
def test_strings(items: list[bytes]) -> None:
    assert milter.strings(b"".join(item + b"\0" for item in items)) == items


def test_strings_need_their_end() -> None:
    with pytest.raises(ProtocolError):
        milter.strings(b"a\0b")


def test_reply_doubles_percent_and_stays_ascii() -> None:
    assert milter.reply(451, "4.7.1", "50% full ü")[4:] == b"y451 4.7.1 50%% full ?\0"


def test_negotiation_asks_for_what_is_needed() -> None:
    answer = milter.negotiate(OFFER)
    version, actions, protocol = struct.unpack_from(">III", answer, 5)
    assert (version, actions) == (6, 0x121)
    # Answers are awaited at MAIL (bit 14) and at the end of the message only.
    assert protocol & 1 << 14 == 0
    assert protocol & 1 << 20
    assert answer[17:] == (b"\0\0\0\0{daemon_name}\0\0\0\0\2{auth_authen}\0\0\0\0\4i\0")


@pytest.mark.parametrize(
    "offer",
    [b"", OFFER[:11], struct.pack(">III", 2, 0x1FF, 0x7F), struct.pack(">III", 6, 0, 0x1FFFFF)],
)
def test_negotiation_refuses_an_mta_that_can_do_too_little(offer: bytes) -> None:
    with pytest.raises(ProtocolError):
        milter.negotiate(offer)


class Taker:
    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction
        self.content = b""
        self.names: list[bytes] = []
        self.aborted = False

    def header(self, name: bytes, lines: bytes) -> None:
        self.names.append(name)
        self.content += lines

    def body(self, data: bytes) -> None:
        self.content += data

    async def finish(self) -> bytes:
        raise AssertionError("the conversation does not finish messages")

    def abort(self) -> None:
        self.aborted = True


class App:
    def __init__(self) -> None:
        self.taken: list[Taker] = []
        self.refusal: bytes | None = None

    def mail(self, transaction: Transaction) -> bytes | None:
        return self.refusal

    def message(self, transaction: Transaction, flow: Flow) -> Taker:
        self.taken.append(Taker(transaction))
        return self.taken[-1]


class NoFlow:
    def pause(self) -> None: ...
    def resume(self) -> None: ...


def begun(app: App) -> Conversation:
    conversation = Conversation(app, NoFlow())
    conversation.receive(ord("O"), OFFER)
    conversation.receive(ord("D"), b"C{daemon_name}\0mx\0")
    conversation.receive(ord("C"), b"[2001:db8::7]\x006\x04\xd2IPv6:2001:db8::7\0")
    conversation.receive(ord("H"), b"helo.example\0")
    return conversation


def envelope(conversation: Conversation, queue_id: bytes = b"4abc") -> None:
    conversation.receive(ord("D"), b"M{auth_authen}\0ann\0")
    assert conversation.receive(ord("M"), b"<a@example.org>\0BODY=8BITMIME\0") == milter.CONTINUE
    conversation.receive(ord("R"), b"<b@example.com>\0NOTIFY=NEVER\0")
    conversation.receive(ord("R"), b"<c@example.com>\0")
    conversation.receive(ord("D"), b"Ti\0" + queue_id + b"\0")


def test_a_message_is_rebuilt_byte_for_byte() -> None:
    app = App()
    conversation = begun(app)
    envelope(conversation)
    for name, value in [
        (b"A", b" one"),
        (b"b", b"no space"),
        (b"C", b"\ttab\n folded\n\tonce more"),
        (b"D", b""),
    ]:
        assert conversation.receive(ord("L"), name + b"\0" + value + b"\0") is Step.NOTHING
    conversation.receive(ord("N"), b"")
    conversation.receive(ord("B"), b".dot\r\nbare \r CR \x00 NUL \xff\r\n")
    assert conversation.receive(ord("E"), b"rest") is Step.FINISH
    [taker] = app.taken
    assert taker.content == (
        b"A: one\r\nb:no space\r\nC:\ttab\r\n folded\r\n\tonce more\r\nD:\r\n"
        b"\r\n.dot\r\nbare \r CR \x00 NUL \xff\r\nrest"
    )
    transaction = taker.transaction
    assert transaction.sender == b"<a@example.org>"
    assert transaction.sender_args == [b"BODY=8BITMIME"]
    assert transaction.recipients == [[b"<b@example.com>", b"NOTIFY=NEVER"], [b"<c@example.com>"]]
    assert transaction.macro(b"i") == b"4abc"
    assert transaction.macro(b"auth_authen") == b"ann"
    assert transaction.macro(b"daemon_name") == b"mx"
    assert transaction.client.address == b"2001:db8::7"
    assert transaction.client.helo == b"helo.example"


def test_messages_of_one_connection_do_not_mix() -> None:
    app = App()
    conversation = begun(app)
    for queue_id in (b"4one", b"4two"):
        envelope(conversation, queue_id)
        conversation.receive(ord("B"), queue_id)
        assert conversation.receive(ord("E"), b"") is Step.FINISH
        conversation.finished()
    assert [taker.content for taker in app.taken] == [b"4one", b"4two"]
    assert [taker.transaction.macro(b"i") for taker in app.taken] == [b"4one", b"4two"]
    assert not any(taker.aborted for taker in app.taken)


def test_macros_of_an_aborted_message_are_forgotten() -> None:
    app = App()
    conversation = begun(app)
    envelope(conversation)
    conversation.receive(ord("B"), b"x")
    conversation.receive(ord("A"), b"")
    assert app.taken[0].aborted
    assert conversation.receive(ord("M"), b"<>\0") == milter.CONTINUE
    conversation.receive(ord("R"), b"<b@example.com>\0")
    conversation.receive(ord("B"), b"y")
    assert app.taken[1].transaction.macro(b"i") == b""
    assert app.taken[1].transaction.macro(b"auth_authen") == b""
    assert app.taken[1].transaction.macro(b"daemon_name") == b"mx"


def test_what_a_connection_keeps_is_bounded() -> None:
    conversation = begun(App())
    for number in range(100):
        conversation.receive(ord("D"), b"M{macro%d}\0%b\0" % (number, b"x" * 99))
    assert len(conversation._macros) == 0  # nobody asked for these
    conversation.receive(ord("M"), b"<a@example.org>\0")
    long = b"<" + b"b" * (milter.MAX_PACKET - 100) + b">\0"
    for _ in range(milter.MAX_ENVELOPE // len(long)):
        conversation.receive(ord("R"), long)
    with pytest.raises(ProtocolError, match="envelope"):
        conversation.receive(ord("R"), long)


def test_a_refused_sender_begins_no_transaction() -> None:
    app = App()
    conversation = begun(app)
    app.refusal = milter.reply(421, "4.3.2", "draining")
    assert conversation.receive(ord("M"), b"<a@example.org>\0") == app.refusal
    with pytest.raises(ProtocolError):
        conversation.receive(ord("R"), b"<b@example.com>\0")


def test_quit_and_quit_new_connection() -> None:
    app = App()
    conversation = begun(app)
    envelope(conversation)
    conversation.receive(ord("B"), b"x")
    assert conversation.receive(ord("K"), b"") is Step.NOTHING
    assert app.taken[0].aborted
    conversation.receive(ord("C"), b"localhost\0U")
    assert conversation.receive(ord("Q"), b"") is Step.CLOSE


@pytest.mark.parametrize(
    "steps",
    [
        [(b"M", b"<a@example.org>\0")],
        [(b"O", OFFER), (b"B", b"body without an envelope")],
        [(b"O", OFFER), (b"E", b"")],
        [(b"O", OFFER), (b"R", b"<a@example.org>\0")],
        [(b"O", OFFER), (b"M", b"")],
        [(b"O", OFFER), (b"M", b"<a@example.org>")],
        [(b"O", OFFER), (b"M", b"<>\0"), (b"E", b"")],
        [(b"O", OFFER), (b"M", b"<>\0"), (b"R", b"<b@c>\0"), (b"L", b"name only\0")],
        [(b"O", OFFER), (b"M", b"<>\0"), (b"R", b"<b@c>\0"), (b"B", b""), (b"M", b"<>\0")],
        [(b"O", OFFER), (b"D", b"Ci\0")],
        [(b"O", OFFER), (b"C", b"name without the rest")],
        [(b"O", OFFER), (b"?", b"")],
    ],
)  # fmt: skip
def test_what_has_no_place_is_a_protocol_error(steps: list[tuple[bytes, bytes]]) -> None:
    conversation = Conversation(App(), NoFlow())
    *good, (command, data) = steps
    for before, its_data in good:
        conversation.receive(before[0], its_data)
    with pytest.raises(ProtocolError):
        conversation.receive(command[0], data)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(b"ABCDEHKLMNOQRTUZ"), st.binary(max_size=40))))
def test_no_input_breaks_the_conversation_otherwise(items: list[tuple[int, bytes]]) -> None:
    conversation = begun(App())
    try:
        for command, data in items:
            if conversation.receive(command, data) is Step.FINISH:
                conversation.finished()
    except ProtocolError:
        conversation.abort()
