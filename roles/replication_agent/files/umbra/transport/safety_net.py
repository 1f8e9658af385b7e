"""Safety Net: keeps delivered messages for a while, so that they can be replayed.

Who keeps what, so that either node can replay alone:

- A shadow keeps its copy when the primary has it discarded: it is durable already, and only its
  state changes.
- The primary writes a copy of its own after the message was acknowledged, some together, never in
  the way of mail. Dying with up to INTERVAL seconds of them in memory loses those here; the shadow
  has them.
- What was accepted alone is in the primary's store anyway, and stays there.

What Postfix does not have in the end (a message that was refused after a shadow took it) and what
comes from a replay is not kept.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Set

from umbra.node.helper import HelperError
from umbra.transport import metrics
from umbra.transport.store import ShadowStore, ShadowWriter, StoreError

log = logging.getLogger(__name__)

INTERVAL = 1.0


async def nothing() -> Set[str]:
    """Return what the queue has of a node that has none."""
    return frozenset()


MAX_PENDING = 16 * 1024 * 1024
"""Bytes of memory for copies that are not written yet; on a slow disk the next ones are left out,
which the shadow has."""
FLUSH_AT = 4 * 1024 * 1024

PURGE_INTERVAL = 30.0
PURGE_BATCH = 200
ROOM = 64 * 1024 * 1024
"""Bytes that the net leaves to new messages on top of the store's reserve."""


class SafetyNet:
    """The net of one node.

    :param hold: seconds for which a delivered message is kept; 0 keeps none.
    :param max_size: bytes of content that are kept at most; the oldest go first.
    :param queued: returns queue ids and shadow ids of what is in the queue still, however old: a
        shadow that comes back gets its copy from here. HelperError.
    """

    def __init__(
        self,
        store: ShadowStore,
        *,
        hold: float,
        max_size: int,
        queued: Callable[[], Awaitable[Set[str]]] = nothing,
    ) -> None:
        self._store = store
        self._queued = queued
        self._hold = hold
        self._max_size = max_size
        self._pending: list[ShadowWriter] = []
        self._bytes = 0
        self._wake = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._tight = False

    @property
    def wanted(self) -> bool:
        """Whether the primary should offer a copy."""
        return self._hold > 0 and not self._tight and self._bytes < MAX_PENDING

    def missed(self, count: int = 1) -> None:
        """Count what was accepted and is not kept here, if anything is to be kept."""
        if self._hold > 0:
            metrics.NET_MISSED.inc(count)

    def keep(self, writer: ShadowWriter) -> None:
        """Keep a message that was acknowledged and is whole in ``writer``. Never waits."""
        self._pending.append(writer)
        self._bytes += writer.buffered
        if self._bytes >= FLUSH_AT:
            self._wake.set()

    async def run(self) -> None:
        """Write and purge until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write())
            tasks.create_task(self._purge())

    async def close(self) -> None:
        """Write what is left."""
        await self.flush()

    async def flush(self) -> None:
        """Write what was kept so far; what another call is writing is written, too."""
        async with self._flushing:
            pending, self._pending = self._pending, []
            size = sum(writer.buffered for writer in pending)
            try:
                found = await asyncio.gather(
                    *(writer.commit(delivered=True) for writer in pending), return_exceptions=True
                )
            finally:
                self._bytes -= size
                for writer in pending:
                    writer.abort()
        failed = [error for error in found if isinstance(error, BaseException)]
        if failed:
            self.missed(len(failed))
            log.warning("%d messages are not in this node's safety net: %s", len(failed), failed[0])

    async def _write(self) -> None:
        while True:
            try:
                async with asyncio.timeout(INTERVAL):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            if self._pending:
                await self.flush()

    async def _purge(self) -> None:
        purge_at = 0.0
        while True:
            try:
                self._tight = await self._store.room() < ROOM
                if self._tight:
                    # Mail goes before history: what is kept makes room, the oldest first.
                    spared = await self._queued()
                    while await self._store.purge(time.time() + 1, 0, PURGE_BATCH, spared):
                        if await self._store.room() >= ROOM:
                            break
                if time.monotonic() >= purge_at:
                    purge_at = time.monotonic() + PURGE_INTERVAL
                    await self.purge()
            except (StoreError, HelperError) as error:
                log.warning("the safety net cannot be purged now: %s", error)
            await asyncio.sleep(INTERVAL)

    async def purge(self) -> int:
        """Delete what is too old or too much, in small transactions; return how many."""
        total = 0
        spared = await self._queued()
        while gone := await self._store.purge(
            time.time() - self._hold, self._max_size if self._hold else 0, PURGE_BATCH, spared
        ):
            total += gone
            if gone < PURGE_BATCH:
                break
        metrics.NET_PURGED.inc(total)
        return total
