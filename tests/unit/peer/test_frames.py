"""The frame codec: what it writes it reads, and it refuses everything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbra.peer import frames
from umbra.peer.frames import FrameError, FrameType


def decoded(*pieces: bytes) -> list[tuple[FrameType, bytes]]:
    decoder = frames.Decoder()
    got = []
    for piece in pieces:
        decoder.feed(piece)
        while decoder.ready:
            frame = decoder.next()
            assert frame is not None
            got.append(frame)
    return got


@given(
    st.lists(st.tuples(st.sampled_from(FrameType), st.binary(max_size=2000)), max_size=5),
    st.integers(1, 3000),
)
def test_round_trip_in_pieces_of_any_size(items: list[tuple[FrameType, bytes]], size: int) -> None:
    stream = b"".join(frames.encode(kind, payload) for kind, payload in items)
    assert decoded(*(stream[at : at + size] for at in range(0, len(stream), size))) == items


@given(st.integers(0, 3 * frames.MAX_PAYLOAD + 1))
def test_data_of_any_length_is_split_and_whole(length: int) -> None:
    data = bytes(range(256)) * (length // 256 + 1)
    data = data[:length]
    got = decoded(frames.encode_data(data))
    assert all(kind is FrameType.DATA for kind, _ in got)
    assert b"".join(payload for _, payload in got) == data


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_any_bytes_are_decoded_or_refused(pieces: list[bytes]) -> None:
    decoder = frames.Decoder()
    consumed = b""
    for piece in pieces:
        decoder.feed(piece)
        while decoder.ready:
            try:
                frame = decoder.next()
            except FrameError:
                with pytest.raises(FrameError):
                    decoder.next()  # and for ever
                return
            assert frame is not None
            consumed += frames.encode(*frame)
    # What was no error was taken as it came, and no byte is lost or made up.
    assert len(consumed) + len(decoder) == sum(map(len, pieces))
    assert b"".join(pieces).startswith(consumed)
    assert decoder.next() is None


@pytest.mark.parametrize(
    "header", [b"\0\1\0\1\3", b"\xff\xff\xff\xff\3", b"\0\0\0\0\0", b"\0\0\0\0\7"]
)
def test_a_header_that_cannot_be_is_refused_before_its_payload_comes(header: bytes) -> None:
    decoder = frames.Decoder()
    decoder.feed(header[:4])
    assert not decoder.ready
    decoder.feed(header[4:])
    assert decoder.ready
    with pytest.raises(FrameError):
        decoder.next()


def test_what_was_taken_is_not_kept() -> None:
    decoder = frames.Decoder()
    decoder.feed(frames.encode_data(bytes(1_000_000)) + b"\0")
    while decoder.next():
        pass
    assert len(decoder) == 1
    assert len(decoder._buffer) <= 2 * frames.MAX_PAYLOAD


def test_a_payload_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match="is over"):
        frames.encode(FrameType.DATA, bytes(frames.MAX_PAYLOAD + 1))


@pytest.mark.parametrize("payload", [b"", b"[]", b"nul", b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameError):
        frames.decode_json(payload)
