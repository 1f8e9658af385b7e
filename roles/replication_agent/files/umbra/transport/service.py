"""The shadow's side: stores, lists and discards shadow messages for its peers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.identity import PeerIdentity
from umbra.peer.server import Handler
from umbra.transport import metrics, wire
from umbra.transport.envelope import Envelope, EnvelopeError
from umbra.transport.fetch import LOST
from umbra.transport.ids import valid
from umbra.transport.store import ContentError, Gone, ShadowStore, State, StoreError, StoreFull
from umbra.transport.tracking import DISCARDED, track

RECEIVE_TIMEOUT = 300.0
"""Seconds without a piece of a message; longer than a primary waits for one."""

MAX_DISCARD = 2000

MAX_STORES = 200
"""Messages that come in at once; with more, this node calls itself overloaded."""


@contextmanager
def _told() -> Iterator[None]:
    """Tell the peer what the store cannot do."""
    try:
        yield
    except StoreFull as error:
        raise PeerError("store-full", str(error)) from None
    except ContentError as error:
        raise PeerError(LOST, str(error)) from None
    except StoreError as error:
        raise PeerError("store-failed", str(error)) from None


class ShadowService:
    """Handlers for the peer server.

    :param epoch: returns the highest epoch this node knows.
    :param leads: whether a node is the primary, as far as this one has heard.
    :param full: whether the shadow queue has its full size.
    """

    def __init__(
        self,
        store: ShadowStore,
        epoch: Callable[[], int],
        leads: Callable[[str], bool],
        full: Callable[[], bool] = bool,
    ) -> None:
        self._store = store
        self._epoch = epoch
        self._leads = leads
        self._full = full
        self.running = 0
        """How many messages are coming in now."""

    def handlers(self) -> dict[str, Handler]:
        """Return the operations by name."""
        return {
            "shadow-store": self.store,
            "shadow-list": self.list,
            "shadow-discard": self.discard,
            "shadow-hold": self.hold,
            "shadow-fetch": self.fetch,
            "shadow-left": self.left,
            "shadow-settled": self.settled,
        }

    async def store(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """``shadow-store``: answered when the message is durable here.

        A connection that ends before END leaves nothing. One that ends after it leaves a message
        that the primary did not acknowledge; its queue file is gone, so it is discarded later.
        """
        epoch = self._epoch()
        if self._full():
            raise PeerError("store-full", "the shadow queue has its full size")
        self.running += 1
        try:
            with _told():
                async with asyncio.timeout(RECEIVE_TIMEOUT) as limit:
                    shadow_id = await self._receive(peer.node, epoch, args, exchange, limit)
        except EnvelopeError as error:
            raise PeerError("protocol", str(error)) from None
        finally:
            self.running -= 1
        if self._epoch() != epoch:
            # This node was promoted while the disk worked: the resubmission may have missed the
            # message, so it must not be acknowledged under the old epoch.
            with _told():
                await self._store.discard([shadow_id], origin=peer.node, delivered=False)
            raise PeerError("stale-epoch", f"epoch {epoch} ended while the message was stored")
        return {}

    async def _receive(
        self,
        node: str,
        epoch: int,
        args: Mapping[str, Any],
        exchange: Exchange,
        limit: asyncio.Timeout,
    ) -> str:
        shadow_id, queue_id = wire.names(args)
        rest = b""
        if size := wire.envelope_size(args):
            while len(rest) < size and (data := await exchange.receive()) is not None:
                rest += data
            envelope, rest = Envelope.from_json(rest[:size]), rest[size:]
        else:
            envelope = Envelope.from_object(args.get("envelope"))
        writer = self._store.begin(
            shadow_id, origin=node, queue_id=queue_id, envelope=envelope, epoch=epoch
        )
        try:
            if rest:
                await writer.write(rest)
            while (data := await exchange.receive()) is not None:
                await writer.write(data)
                limit.reschedule(asyncio.get_running_loop().time() + RECEIVE_TIMEOUT)
            await writer.commit()
        finally:
            writer.abort()
        return shadow_id

    async def list(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """``shadow-list``: what is held for the asking node, as JSON lines."""
        count = 0
        with _told():
            async for copies in self._store.copies(peer.node):
                count += len(copies)
                await exchange.send(wire.listing(copies))
        await exchange.end()
        return {"count": count}

    async def discard(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """``shadow-discard``: messages held for the asking node have done their duty.

        With ``delivered`` false they were never accepted, and are not kept for the safety net.
        Ids that are not here do no harm.
        """
        shadow_ids = _ids(args.get("shadow_ids"))
        delivered = args.get("delivered", True) is not False
        with _told():
            gone = await self._store.discard(shadow_ids, origin=peer.node, delivered=delivered)
        _tell(gone, peer.node)
        return {"discarded": len(gone)}

    async def hold(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """``shadow-hold``: messages of the asking node are on hold in its queue, or are no more.

        Answered with those that are here.
        """
        shadow_ids, held = _ids(args.get("shadow_ids")), args.get("held")
        if not isinstance(held, bool):
            raise PeerError("protocol", "held must be true or false")
        with _told():
            return {"known": await self._store.hold(shadow_ids, held, origin=peer.node)}

    async def fetch(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """``shadow-fetch``: a message that the primary lacks, and that this node has.

        As DATA: a line with the arguments of ``shadow-store`` and ``origin``, a long envelope, the
        content. ``content-lost`` if it is not here or cannot be read.
        """
        shadow_id = args.get("shadow_id")
        if not isinstance(shadow_id, str) or not valid(shadow_id):
            raise PeerError("protocol", "shadow_id has not the form of one")
        self._check(peer.node)
        with _told():
            meta = await self._store.find(shadow_id)
            if meta is None:
                raise PeerError(LOST, f"{shadow_id} is not here")
            names, envelope = wire.arguments(shadow_id, meta.queue_id, meta.envelope)
            line = json.dumps({**names, "origin": meta.origin}, separators=(",", ":"))
            await exchange.send(line.encode("ascii") + b"\n" + envelope)
            async for piece in self._store.content(meta):
                await exchange.send(piece)
        await exchange.end()
        return {}

    async def left(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """``shadow-left``: what is held for others than the primary, as JSON lines."""
        self._check(peer.node)
        with _told():
            # Until then what it had taken over is in no list, and would never be asked for again.
            if any(row.state is State.RESUBMITTING for row in await self._store.stats()):
                raise PeerError("refused", "what was taken over here is not given back yet")
            async for page in self._store.left(peer.node):
                await exchange.send_lines(
                    [{"shadow_id": shadow_id, "epoch": epoch} for shadow_id, epoch in page]
                )
        await exchange.end()
        return {}

    async def settled(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """``shadow-settled``: the primary has carried these on, which former ones had left.

        So the copies here have done their duty. An agent from before they were named asks for all;
        it does not know which it has, so they stay.
        """
        shadow_ids = _ids(args.get("shadow_ids", []))
        self._check(peer.node)
        with _told():
            gone = await self._store.settle(peer.node, shadow_ids)
        _tell(gone, "a former primary")
        return {"discarded": len(gone)}

    def _check(self, node: str) -> None:
        if not self._leads(node):
            raise PeerError("refused", f"{node} is not primary, as far as is known here")


def _ids(value: object) -> list[str]:
    if not isinstance(value, list) or len(value) > MAX_DISCARD or not all(map(valid, value)):
        raise PeerError("protocol", f"shadow_ids must be a list of at most {MAX_DISCARD} ids")
    return value


def _tell(gone: Iterable[Gone], origin: str) -> None:
    for meta in gone:
        metrics.DISCARDED.inc()
        track(DISCARDED, meta.queue_id, meta.message_id, meta.shadow_id, f"origin={origin}")
