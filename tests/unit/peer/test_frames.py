"""The frame codec: what it writes it reads, and it refuses everything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbra.peer import frames
from umbra.peer.frames import FrameError, FrameType


@given(st.sampled_from(FrameType), st.binary(max_size=2000))
def test_round_trip(kind: FrameType, payload: bytes) -> None:
    frame = frames.encode(kind, payload)
    assert frames.decode_header(frame[: frames.HEADER.size]) == (kind, len(payload))
    assert frame[frames.HEADER.size :] == payload


@given(st.integers(0, 3 * frames.MAX_PAYLOAD + 1))
def test_data_of_any_length_is_split_and_whole(length: int) -> None:
    data = bytes(range(256)) * (length // 256 + 1)
    data = data[:length]
    stream, got = frames.encode_data(data), b""
    while stream:
        kind, size = frames.decode_header(stream[: frames.HEADER.size])
        assert kind is FrameType.DATA
        got += stream[frames.HEADER.size : frames.HEADER.size + size]
        stream = stream[frames.HEADER.size + size :]
    assert got == data


@given(st.binary(min_size=5, max_size=5))
def test_any_header_is_decoded_or_refused(header: bytes) -> None:
    try:
        kind, length = frames.decode_header(header)
    except FrameError:
        return
    assert 0 <= length <= frames.MAX_PAYLOAD
    assert kind in FrameType


def test_a_payload_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match="is over"):
        frames.encode(FrameType.DATA, bytes(frames.MAX_PAYLOAD + 1))


@pytest.mark.parametrize("payload", [b"", b"[]", b"nul", b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameError):
        frames.decode_json(payload)
