"""A change is on this node's disk before it is acknowledged: one syncfs for all who wait.

Dovecot syncs a message that it stores, but neither flags nor what its mailbox list has written
(``mail_fsync = optimized``); and ``always`` would sync each of a change's four or five writes by
itself. So each change waits here, on the primary while the shadow gets it, and on the shadow before
the primary hears that the sync has ended.

What happens if the host dies before that: the change was not acknowledged. What Dovecot had written
of it may be there in part; docs/architecture.md, "What a power cut takes", says who mends that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from umbra.cluster.fitness import MAIL, room

log = logging.getLogger(__name__)

RETRY = 0.5  # seconds
ROOM = 16 << 20  # bytes; Dovecot's logs and indexes grow by far less while a few syncs run


class MailDisk:
    """The file system of this node's mailboxes.

    :param sync: returns when the disk has all that was written before it was called; OSError if it
        does not.
    """

    def __init__(self, sync: Callable[[], Awaitable[None]], directory: Path = MAIL) -> None:
        self._sync = sync
        self._directory = directory
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def settle(self) -> None:
        """Return when all that was written before this call is on stable storage.

        A disk that takes nothing makes everybody wait: nothing is acknowledged then. One that has
        lost something keeps them waiting until a boot, as the helper remembers it.
        """
        if self._next is None:
            # The one that runs may have begun before the caller's last write.
            self._next = asyncio.create_task(self._round(self._running), name="mailboxes to disk")
        await asyncio.shield(self._next)

    def full(self) -> str:
        """Return a sentence if there is hardly any room, else "".

        Dovecot keeps a change of flags that finds none in its process, says that all is well and
        forgets it.
        """
        try:
            free = room(self._directory)
        except OSError as error:
            return f"{self._directory}: {error.strerror}"
        if free is None or free >= ROOM:
            return ""
        return f"the mailboxes' disk has less than {ROOM >> 20} MiB left"

    async def close(self) -> None:
        """End whatever waits."""
        tasks = [task for task in (self._running, self._next) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _round(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
        self._running, self._next = self._next, None
        while True:
            try:
                await self._sync()
                return
            except OSError as error:
                log.error("the mailboxes are not on the disk: %s", error)
            await asyncio.sleep(RETRY)
