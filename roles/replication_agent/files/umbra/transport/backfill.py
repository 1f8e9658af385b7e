"""Copies to a shadow that is back what was accepted while the group was alone, or without it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from types import MappingProxyType

from umbra.peer.exchange import PeerError
from umbra.peer.link import PeerLink
from umbra.transport import metrics, wire
from umbra.transport.discard import Discarder
from umbra.transport.envelope import Envelope
from umbra.transport.fetch import LOST, fetch
from umbra.transport.store import ContentError, Meta, ShadowStore, State
from umbra.transport.tracking import BACK_FILLED, track

log = logging.getLogger(__name__)

TIMEOUT = 240.0
"""Seconds for a message that does not move on: the line may be slow and the message large."""


@dataclass(frozen=True, slots=True)
class BackFilled:
    """What one run has done.

    ``complete``: when it ended, nothing was left that only this node had.
    """

    copied: int
    complete: bool


class BackFill:
    """Sends the ``unshadowed`` messages of this node to a shadow.

    The group has to name the shadow in ``shadows()`` before :meth:`run` begins: from then on new
    messages go to it directly, so the rest shrinks to nothing. What leaves the queue meanwhile is
    dropped by the discarder.

    :param storing_alone: returns how many messages are on their way into the own store.
    :param shadows: returns the shadows that are there; they may have what this node does not.
    """

    def __init__(
        self,
        node: str,
        store: ShadowStore,
        discarder: Discarder,
        storing_alone: Callable[[], int],
        shadows: Callable[[], Sequence[PeerLink]] = tuple,
    ) -> None:
        self._node = node
        self._store = store
        self._discarder = discarder
        self._storing_alone = storing_alone
        self._shadows = shadows

    async def run(self, peer: PeerLink) -> BackFilled:
        """Copy all there is.

        PeerError or StoreError ends it; what was copied stays copied, and another run goes on.
        A message whose content cannot be read is left out: no run could ever copy it, and it must
        not keep the others from being protected. It stays ``unshadowed``, and is counted and shown
        as what only this node has, until it has left the queue.
        """
        copied = 0
        # Asked before the look: what was on its way or being resubmitted then is seen in the store
        # now or by the next run.
        on_its_way = self._storing_alone() > 0 or any(
            holding.state is State.RESUBMITTING for holding in await self._store.stats()
        )
        async for meta in self._store.in_order(State.UNSHADOWED, self._node):
            if not await self._copied(peer, meta):
                continue
            copied += 1
            # Another shadow that lacks it too gets it from the net, or from this one.
            await self._store.discard([meta.shadow_id], origin=self._node, state=State.UNSHADOWED)
        return BackFilled(copied, complete=not on_its_way)

    async def run_queue(
        self, peer: PeerLink, left: Set[str], names: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Copy these queue files, which ``peer`` lacks: it was not there to take them.

        The safety net has their content, or else a shadow. PeerError or StoreError ends it, as
        before: what another shadow may be promoted with, this one must not lack.

        :param names: the shadow ids that they bear, if they are others than the store knows them by
            (``postsuper -r``).
        """
        if not left:
            return
        async for meta in self._store.kept(left):
            await self._copied(peer, meta)
        for queue_id in sorted(left - self._discarder.covered(peer.name).keys()):
            if (name := names.get(queue_id)) and (found := await self._store.find(name)):
                await self._copied(peer, replace(found, queue_id=queue_id))
        for other in self._shadows():
            await self._relay(other, peer, left)
        if left := left - self._discarder.covered(peer.name).keys():
            log.warning(
                "%s has no copy of %d messages of the queue, and nothing here can make one: %s",
                peer.name, len(left), ", ".join(sorted(left)[:20]),
            )  # fmt: skip

    async def _copied(self, peer: PeerLink, meta: Meta) -> bool:
        """Copy it; return False, and have it in the log, if its content cannot be read."""
        try:
            await self._copy(peer, meta)
        except ContentError as error:
            # Gone meanwhile, because it was delivered: then there is nothing to tell.
            if await self._store.find(meta.shadow_id) is not None:
                log.error(
                    "%s gets no copy of the message %s of the queue: %s",
                    peer.name, meta.queue_id, error,
                )  # fmt: skip
            return False
        return True

    async def _relay(self, other: PeerLink, peer: PeerLink, queue_ids: Set[str]) -> None:
        """Copy to ``peer`` what ``other`` alone has of these queue files.

        ``peer`` itself may have it by the name of a former file, which this mends.
        """
        same = other.name == peer.name
        there = (self._discarder.known if same else self._discarder.covered)(other.name)
        lacking = queue_ids & there.keys() - self._discarder.covered(peer.name).keys()
        for queue_id in sorted(lacking):
            try:
                async with fetch(other, there[queue_id]) as message:
                    await self._send(
                        peer, there[queue_id], queue_id, message.envelope, message.content
                    )
            except PeerError as error:
                if error.code != LOST:
                    raise
                log.error("%s has no copy of the message %s: %s", other.name, queue_id, error)

    async def _copy(self, peer: PeerLink, meta: Meta) -> None:
        content = self._store.content(meta)
        await self._send(peer, meta.shadow_id, meta.queue_id, meta.envelope, content)

    async def _send(
        self,
        peer: PeerLink,
        shadow_id: str,
        queue_id: str,
        envelope: Envelope,
        content: AsyncIterator[bytes],
    ) -> None:
        # What the envelope says of a hold is of its source's time; the discarder tells of now.
        args, head = wire.arguments(shadow_id, queue_id, replace(envelope, held=False))
        self._discarder.add(peer.name, queue_id, shadow_id, sure=False)  # what fails may be there
        async with peer.exchange("shadow-store", args, timeout=TIMEOUT) as exchange:
            if head:
                await exchange.send(head)
            async for piece in content:
                await exchange.send(piece)
                exchange.renew(TIMEOUT)
            await exchange.result()
        # Before the own copy goes: dying here leaves both, and the same id is stored again at the
        # next run.
        self._discarder.add(peer.name, queue_id, shadow_id)
        metrics.BACK_FILLED.inc()
        track(BACK_FILLED, queue_id, envelope.message_id, shadow_id, f"at={peer.name}")
