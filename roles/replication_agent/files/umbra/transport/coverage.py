"""Which acknowledged messages of Postfix's queue have no copy where they should have one.

Mail that passes our milter has its copies before it is acknowledged. What does not: a message that
``postsuper -r`` has put into a new queue file, one that another milter has quarantined before ours
was asked, notices of Postfix's own. The truth is the queue; the header that our milter has given to
a message tells which copy is that of a file it has never seen.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence, Set

from umbra.node.client import UNCOMMITTED

PORTION = 200
"""Queue files that are looked into at once; each costs a process."""
MAX_KNOWN = 200_000

Read = Callable[[Sequence[str]], Awaitable[Mapping[str, str]]]


def uncovered(queue: Mapping[str, str], covered: Collection[str]) -> dict[str, str]:
    """Return the queue files of acknowledged messages that are not ``covered``.

    With the queue that each is in, by queue id.
    """
    return {
        queue_id: place
        for queue_id, place in queue.items()
        if place not in UNCOMMITTED and queue_id not in covered
    }


class Names:
    """The shadow ids that queue files bear, which are read once.

    :param read: returns those of some queue files, "" for one that has none; one that could not be
        read is missing. OSError if none can be read now.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._known: dict[str, str] = {}

    async def of(self, queue_ids: Set[str]) -> dict[str, str]:
        """Return the shadow id of each, "" for one without; of many, and of some, only later.

        The newest first: who has been requeued is among them (long queue ids are ordered by time).
        """
        unread = sorted(queue_ids - self._known.keys(), reverse=True)[:PORTION]
        if unread:
            self._known |= await self._read(unread)
            while len(self._known) > MAX_KNOWN:
                del self._known[next(iter(self._known))]
        return {key: self._known[key] for key in queue_ids & self._known.keys()}

    async def of_all(self, queue_ids: Set[str]) -> dict[str, str]:
        """Return the same of all that can be read, however many they are."""
        found = await self.of(queue_ids)
        while len(found) < len(queue_ids):
            before, found = len(found), await self.of(queue_ids)
            if len(found) <= before:
                break
        return found
