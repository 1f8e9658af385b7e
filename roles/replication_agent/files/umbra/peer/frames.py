"""Frames of the peer link: a pure codec, no I/O.

A frame is a 4-byte big-endian payload length, one type byte and the payload. The length is bounded,
so a hostile or
broken peer can make us hold at most one payload of ``MAX_PAYLOAD`` bytes.
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


class FrameType(IntEnum):
    """What a frame means; see docs/architecture.md, "The peer link"."""

    HELLO = 1
    REQUEST = 2
    DATA = 3
    END = 4
    RESPONSE = 5
    ERROR = 6


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
    return encode(kind, json.dumps(value, separators=(",", ":")).encode())


def decode_header(header: bytes) -> tuple[FrameType, int]:
    """Return type and payload length of a frame's header, or raise FrameError."""
    length, kind = HEADER.unpack(header)
    if length > MAX_PAYLOAD:
        raise FrameError(f"a frame of {length} bytes is over {MAX_PAYLOAD}")
    try:
        return FrameType(kind), length
    except ValueError:
        raise FrameError(f"unknown frame type {kind}") from None


def decode_json(payload: bytes) -> dict[str, Any]:
    """Return the JSON object in ``payload``, or raise FrameError."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FrameError("not a JSON object")
    return value
