"""What the other shadows still hold for former primaries, after this node has taken over.

Such a copy is of a message that this node has carried on too, or was told to discard; or of one
that it never had: it was promoted by force, or its own copy had failed. Only a look at each message
tells. So the primary, once nothing is left that it has to carry on itself, asks each shadow for the
ids, and

- has those discarded that its own store knows as finished, or as its own by now,
- fetches the others and carries them on like what it had held itself: it looks into the mailboxes
  first. What was delivered to another host before, and is forgotten here, goes there twice: better
  than never.

What is older than the safety net remembers, and unknown here, is taken for finished: a shadow that
was away for days would have it sent again. Not so if it is from before a promotion by force: then
nobody else may have it.

Dying at any point leaves the copy with the shadow, held; the next start asks again. A message that
was fetched is ``resubmitting`` here, and held there until it has been carried on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from umbra.epoch import epoch_of
from umbra.peer.exchange import PeerError
from umbra.peer.link import PeerLink
from umbra.transport import ids
from umbra.transport.fetch import LOST, fetch
from umbra.transport.store import ShadowStore, State, StoreError

log = logging.getLogger(__name__)

TIMEOUT = 30.0
BATCH = 1000


class Settlement:
    """Goes through what shadows hold for others than this node.

    :param hold: seconds for which this node's safety net remembers delivered messages.
    :param serving: whether this node is primary still.
    :param resubmit: told when messages were fetched, which are to be carried on.
    """

    def __init__(
        self,
        store: ShadowStore,
        hold: float,
        serving: Callable[[], bool],
        resubmit: Callable[[], None],
    ) -> None:
        self._store = store
        self._hold = hold
        self._serving = serving
        self._resubmit = resubmit
        self._fetched: set[str] = set()

    def forget(self) -> None:
        """Forget what was fetched: another term has begun."""
        self._fetched.clear()

    async def run(self, peer: PeerLink, since: int) -> None:
        """Settle with one shadow, which is to be repeated when what was fetched is carried on.

        PeerError or StoreError ends it; what is done stays done.

        :param since: the epoch since which each acknowledged message has come to this node.
        """
        left = await self._left(peer)
        forgotten = ids.first(time.time() - self._hold)
        # What was set aside here is neither finished nor carried on: a copy elsewhere may be whole.
        parked = {meta.shadow_id async for meta in self._store.in_order(State.PARKED)}
        names = sorted(left.keys() - parked)
        for start in range(0, len(names), BATCH):
            batch = names[start : start + BATCH]
            finished = await self._store.carried_on({name: left[name] for name in batch})
            finished |= self._fetched & set(batch)
            finished |= {name for name in batch if name < forgotten and left[name] >= since}
            if finished:
                args = {"shadow_ids": sorted(finished)}
                await peer.request("shadow-settled", args, timeout=TIMEOUT)
            for name in batch:
                if name not in finished:
                    await self._fetch(peer, name, left[name])

    async def _left(self, peer: PeerLink) -> dict[str, int]:
        """Return what ``peer`` holds for others: by shadow id, under which epoch it was stored."""
        left: dict[str, int] = {}
        async with peer.exchange("shadow-left", {}, timeout=TIMEOUT) as exchange:
            await exchange.end()
            try:
                async for row in exchange.receive_lines():
                    left[str(row["shadow_id"])] = epoch_of(row["epoch"])
            except (KeyError, ValueError) as error:
                raise PeerError("protocol", f"a line of shadow-left: {error!r}") from None
            await exchange.result()
        return left

    async def _fetch(self, peer: PeerLink, shadow_id: str, epoch: int) -> None:
        """Fetch one message; it stays where it is if it cannot be read there."""
        try:
            async with fetch(peer, shadow_id) as message:
                writer = self._store.begin(
                    shadow_id, origin=message.origin, queue_id=message.queue_id,
                    envelope=message.envelope, epoch=epoch, state=State.RESUBMITTING,
                )  # fmt: skip
                try:
                    async for piece in message.content:
                        await writer.write(piece)
                    await writer.commit()
                finally:
                    writer.abort()
        except ValueError as error:
            raise PeerError("protocol", str(error)) from None
        except PeerError as error:
            if error.code != LOST:
                raise
            log.error("%s of %s stays held there: %s", shadow_id, peer.name, error)
            return
        if not self._serving():
            # What is taken back when a right ends was looked for before this was here.
            await self._store.give_back()
            raise StoreError("this node is not primary any more")
        self._fetched.add(shadow_id)
        log.warning("%s of %s was not known here and is carried on", shadow_id, peer.name)
        self._resubmit()
