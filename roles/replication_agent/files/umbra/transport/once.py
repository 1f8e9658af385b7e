"""Delivers a message once to each recipient: answers whether a mailbox has it already.

Dovecot asks before it stores a message, and is held until it has the answer. The truth is the
mailbox, where a message is found by its id. It is searched only when an earlier try may have
stored the message; what this process has given its id to, and nobody has asked about for that
recipient, cannot have been stored. So a delivery normally costs a look into memory.

What happens if a process dies:

- Postfix, or its lmtp, before it has noted the delivery: it tries again, which is a second
  question.
- Dovecot's lmtp between question and storing: the same; nothing is found, so it is stored.
- This process: it answers nothing, Dovecot asks again, and the next one knows no message, so it
  searches for each that was in the queue.

One thing the mailbox cannot tell: that the user has removed a message for good between the try that
was cut off and the next one. Then it comes once more.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic

from umbra.transport import metrics
from umbra.transport.tracking import DUPLICATE_DROPPED, track

log = logging.getLogger(__name__)

MAX_MESSAGES = 20_000
"""Messages that are remembered; of one that is forgotten the mailboxes are searched."""
MAX_PROCESSES = 1000
GRACE = 10.0
"""Seconds that an earlier try may still be storing the message when the next one asks."""
LOOK = 0.1
TIMEOUT = 55.0
"""Seconds for an answer: a little less than Dovecot waits (``sieve_execute_exec_timeout``)."""
PAUSE = 1.0
"""Seconds between two searches while Dovecot does not answer."""

Has = Callable[[str, str], Awaitable[bool]]


@dataclass(frozen=True, slots=True, eq=False)
class _Try:
    process: int
    at: float


@dataclass(slots=True)
class _Message:
    """``fresh``: all tries to deliver it have been seen here."""

    fresh: bool
    tries: dict[str, _Try] = field(default_factory=dict)


class Once:
    """Knows which deliveries have been tried before.

    :param has: (recipient, shadow id): whether a mailbox of the recipient has the message; OSError
        if that cannot be told now.
    :param alive: whether a process exists.
    """

    def __init__(
        self,
        has: Has,
        *,
        alive: Callable[[int], bool] | None = None,
        grace: float = GRACE,
        pause: float = PAUSE,
    ) -> None:
        self._has = has
        self._alive = alive or _alive
        self._grace = grace
        self._pause = pause
        self._messages: OrderedDict[str, _Message] = OrderedDict()
        self._latest: dict[int, _Try] = {}

    def accepted(self, shadow_id: str) -> None:
        """Note a message that has just got its id, before anybody can have delivered it."""
        self._remember(shadow_id, _Message(fresh=True))

    def doubt(self) -> None:
        """Note that another node may have delivered any of them since: it was primary."""
        for message in self._messages.values():
            message.fresh = False

    async def delivered(self, shadow_id: str, recipient: str, process: int) -> bool:
        """Return whether ``recipient`` has the message, so that it must not be stored again.

        Waits while Dovecot cannot tell; TimeoutError if that takes too long.

        :param process: the one that asks and will store the message if the answer is no.
        """
        message = self._messages.get(shadow_id)
        if message is None:
            message = self._remember(shadow_id, _Message(fresh=False))
        recipient = recipient.lower()
        earlier = message.tries.get(recipient)
        this = message.tries[recipient] = _Try(process, monotonic())
        self._note(this)
        if message.fresh and earlier is None:
            return False
        found, running = False, True
        async with asyncio.timeout(TIMEOUT):
            while running and not found:
                # In this order: what a try that has ended did not store, it will not store.
                running = earlier is not None and self._running(earlier, process)
                found = await self._search(recipient, shadow_id)
                if running and not found:
                    await asyncio.sleep(LOOK)
        if found:
            metrics.DUPLICATES.inc()
            track(DUPLICATE_DROPPED, "-", "", shadow_id, f"recipient={recipient!r}")
        return found

    def asked(self, user: str, shadow_id: str) -> bool:
        """Tell whether a delivery to ``user`` has asked for this message: it is stored, or will be.

        One that fails stays in the queue.
        """
        message = self._messages.get(shadow_id)
        return message is not None and any(
            user in (recipient, plain(recipient)) for recipient in message.tries
        )

    def _remember(self, shadow_id: str, message: _Message) -> _Message:
        self._messages[shadow_id] = message
        while len(self._messages) > MAX_MESSAGES:
            self._messages.popitem(last=False)
        return message

    def _note(self, this: _Try) -> None:
        if len(self._latest) >= MAX_PROCESSES:
            limit = monotonic() - self._grace
            self._latest = {key: old for key, old in self._latest.items() if old.at > limit}
        self._latest[this.process] = this

    def _running(self, earlier: _Try, process: int) -> bool:
        """Tell whether an earlier try may still come to its end: its process has begun no other."""
        return (
            earlier.process != process
            and self._latest.get(earlier.process) is earlier
            and monotonic() - earlier.at < self._grace
            and self._alive(earlier.process)
        )

    async def _search(self, recipient: str, shadow_id: str) -> bool:
        while True:
            try:
                return await self._has(recipient, shadow_id)
            except OSError as error:
                log.warning("a delivery to %r waits: %s", recipient, error)
            await asyncio.sleep(self._pause)


def plain(address: str) -> str:
    """Return an address without what stands after a ``+``."""
    local, at, domain = address.rpartition("@")
    return local.split("+", 1)[0] + at + domain


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
