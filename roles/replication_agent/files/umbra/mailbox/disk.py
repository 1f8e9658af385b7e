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
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic

from umbra.cluster.fitness import MAIL, room

log = logging.getLogger(__name__)

RETRY = 0.5  # seconds
FRESH = 1.0  # seconds for which a look counts
ROOM = 16 << 20  # bytes; Dovecot's logs and indexes grow by far less while a few syncs run


class MailDisk:
    """The file system of this node's mailboxes.

    :param sync: returns when the disk has all that was written before it was called; OSError if it
        does not.
    """

    def __init__(self, sync: Callable[[], Awaitable[None]], directory: Path = MAIL) -> None:
        self._sync = sync
        self._directory = directory
        self._looking: asyncio.Task[str] | None = None
        self._sentence, self._looked_at = "", -math.inf
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

    async def full(self) -> str:
        """Return a sentence if there is hardly any room, else ""; of a moment ago at most.

        Dovecot keeps a change of flags that finds none in its process, says that all is well and
        forgets it.
        """
        if monotonic() - self._looked_at < FRESH:
            return self._sentence
        # One at a time, in a thread: a disk that hangs must hang neither the loop nor all threads.
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(asyncio.to_thread(self._look))
        self._note(await asyncio.shield(self._looking))
        return self._sentence

    def full_now(self) -> str:
        """The same at this moment; for who was just ``settled``: a disk that answers does not hang.

        A thread for it would cost each sync more than the look itself.
        """
        self._note(self._look())
        return self._sentence

    def _note(self, sentence: str) -> None:
        self._sentence, self._looked_at = sentence, monotonic()

    def _look(self) -> str:
        try:
            free = room(self._directory)
        except OSError as error:
            return f"{self._directory}: {error.strerror}"
        if free is None or free >= ROOM:
            return ""
        return f"the mailboxes' disk has less than {ROOM >> 20} MiB left"

    async def close(self) -> None:
        """End whatever waits."""
        own = self._running, self._next, self._looking
        tasks = [task for task in own if task is not None]
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
