"""Frames of the peer link: a pure codec, no I/O.

A frame is a 4-byte big-endian payload length, one type byte and the payload. The length is bounded,
so a hostile or
broken peer cannot make us wait for more than ``MAX_PAYLOAD`` bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

VERSION = 1
HEADER = struct.Struct(">IB")
MAX_PAYLOAD = 64 * 1024

_to_json = json.JSONEncoder(separators=(",", ":")).encode


class FrameType(IntEnum):
    """What a frame means; see docs/architecture.md, "The peer link"."""

    HELLO = 1
    REQUEST = 2
    DATA = 3
    END = 4
    RESPONSE = 5
    ERROR = 6


_KINDS = {int(kind): kind for kind in FrameType}


class FrameError(ValueError):
    """The bytes are no frame of this protocol; the connection must be closed."""


def encode(kind: FrameType, payload: bytes = b"") -> bytes:
    """Return one frame. A payload over ``MAX_PAYLOAD`` is the caller's mistake: ValueError."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a payload of {len(payload)} bytes is over {MAX_PAYLOAD}")
    return HEADER.pack(len(payload), kind) + payload


def encode_data(data: bytes) -> bytes:
    """Return ``data`` of any length as the DATA frames that carry it."""
    if len(data) <= MAX_PAYLOAD:
        return encode(FrameType.DATA, data)
    view = memoryview(data)
    parts: list[bytes | memoryview] = []
    for start in range(0, len(data), MAX_PAYLOAD):
        piece = view[start : start + MAX_PAYLOAD]
        parts += (HEADER.pack(len(piece), FrameType.DATA), piece)
    return b"".join(parts)


def encode_json(kind: FrameType, value: Mapping[str, Any]) -> bytes:
    """Return a frame with a JSON object."""
    return encode(kind, _to_json(value).encode())


class Decoder:
    """Cuts a stream of bytes into frames, one when it is asked for.

    So what is held for a peer that sends many frames are the bytes that it sent, no more.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0

    def __len__(self) -> int:
        """How many bytes are held."""
        return len(self._buffer) - self._at

    def feed(self, data: bytes) -> None:
        """Take what has come."""
        self._buffer += data

    def head(self) -> tuple[FrameType, int] | None:
        """Return type and payload length of the frame that comes next, None if unknown yet.

        FrameError for what is no frame.
        """
        if len(self) < HEADER.size:
            return None
        length, number = HEADER.unpack_from(self._buffer, self._at)
        kind = _KINDS.get(number)
        if length > MAX_PAYLOAD or kind is None:
            raise FrameError(f"no frame: type {number}, {length} bytes")
        return kind, length

    @property
    def ready(self) -> bool:
        """True if :meth:`next` has something to say: a whole frame, or an error."""
        try:
            head = self.head()
        except FrameError:
            return True
        return head is not None and len(self) >= HEADER.size + head[1]

    def next(self) -> tuple[FrameType, bytes] | None:
        """Return the next frame, None if it is not all there. FrameError as in :meth:`head`."""
        head = self.head()
        if head is None or len(self) < HEADER.size + head[1]:
            return None
        start = self._at + HEADER.size
        self._at = end = start + head[1]
        with memoryview(self._buffer) as view:
            payload = bytes(view[start:end])
        if end == len(self._buffer):
            self._buffer.clear()
            self._at = 0
        elif end > MAX_PAYLOAD:  # now and then, or many small frames would each move all the rest
            del self._buffer[:end]
            self._at = 0
        return head[0], payload


def decode_json(payload: bytes) -> dict[str, Any]:
    """Return the JSON object in ``payload``, or raise FrameError."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FrameError("not a JSON object")
    return value
