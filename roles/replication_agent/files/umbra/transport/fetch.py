"""The primary's side of ``shadow-fetch``: reads a message that a shadow has and this node lacks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from umbra.peer.connection import object_of
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.link import PeerLink
from umbra.transport import wire
from umbra.transport.envelope import Envelope, EnvelopeError

TIMEOUT = 240.0
"""Seconds for a message that does not move on."""
LOST = "content-lost"
"""The PeerError's code of a message that the shadow has not, or cannot read."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A message that is coming; ``queue_id`` is the one at ``origin``.

    ``content`` ends with a PeerError if it is not whole.
    """

    origin: str
    queue_id: str
    envelope: Envelope
    content: AsyncIterator[bytes]


@asynccontextmanager
async def fetch(peer: PeerLink, shadow_id: str) -> AsyncIterator[Fetched]:
    """Have ``peer`` send a message; its content is to be read within the block.

    PeerError; ``LOST`` if it is not to be had there.
    """
    async with peer.exchange("shadow-fetch", {"shadow_id": shadow_id}, timeout=TIMEOUT) as exchange:
        await exchange.end()
        data = b""
        while b"\n" not in data:
            data += await _more(exchange)
            if len(data) > 4 * wire.INLINE_LIMIT:
                raise PeerError("protocol", "a message without a beginning")
        line, _, data = data.partition(b"\n")
        args = object_of(line)
        try:
            _, queue_id = wire.names(args)
            if size := wire.envelope_size(args):
                while len(data) < size:
                    data += await _more(exchange)
                envelope, data = Envelope.from_json(data[:size]), data[size:]
            else:
                envelope = Envelope.from_object(args.get("envelope"))
        except EnvelopeError as error:
            raise PeerError("protocol", str(error)) from None
        yield Fetched(str(args.get("origin")), queue_id, envelope, _content(exchange, data))


async def _more(exchange: Exchange) -> bytes:
    data = await exchange.receive()
    if data is None:
        await exchange.result()  # a refusal says why
        raise PeerError("protocol", "a message ended before its content")
    return data


async def _content(exchange: Exchange, data: bytes) -> AsyncIterator[bytes]:
    if data:
        yield data
    while (piece := await exchange.receive()) is not None:
        yield piece
        exchange.renew(TIMEOUT)
    await exchange.result()
