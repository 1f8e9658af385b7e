"""JSON lines over an exchange: there may be 100,000, and only one has to fit into memory."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

from umbra.peer.connection import PeerError

MAX_LINE = 64 * 1024
BATCH = 32 * 1024

_to_json = json.JSONEncoder(separators=(",", ":")).encode


class Sink(Protocol):
    """The part of ``Exchange`` that sends."""

    async def send(self, data: bytes) -> None:
        """Send data."""


class Source(Protocol):
    """The part of ``Exchange`` that receives."""

    async def receive(self) -> bytes | None:
        """Return the next data, None at the end."""


def line_of(row: Any) -> bytes:
    """Return one row as it goes over the link."""
    return _to_json(row).encode() + b"\n"


async def send_rows(sink: Sink, rows: AsyncIterator[list[Any]]) -> None:
    """Send rows as JSON lines."""
    batch = bytearray()
    async for row in rows:
        batch += line_of(row)
        if len(batch) >= BATCH:
            await sink.send(bytes(batch))
            batch.clear()
    await sink.send(bytes(batch))


async def received_rows(source: Source) -> AsyncIterator[Any]:
    """Give rows as they come. PeerError ``protocol`` for what is not JSON lines."""
    rest = b""
    while (data := await source.receive()) is not None:
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > MAX_LINE:
            raise PeerError("protocol", f"a line is over {MAX_LINE} bytes")
        for line in filter(None, lines):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                raise PeerError("protocol", "a line is not JSON") from None
    if rest:
        raise PeerError("protocol", "the last line is cut off")
