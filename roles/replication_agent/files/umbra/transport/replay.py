"""Replays delivered messages from the safety net to one mailbox, on the primary.

A message goes only where it is missing: not while it is still in the queue, and not to a mailbox
that has it, by its id or by its Message-ID (it was refused once and sent again, for example).

A replay is a message of its own: it comes in by the port for resubmission, gets an id of its own
beside the one it had, and is shadowed like any other. Dying in the middle, it is repeated by the
operator: what was delivered by then is left out. Nobody is told if it cannot be delivered
(NOTIFY=NEVER): its sender has had his answer.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from umbra.transport import ids
from umbra.transport.discard import QueueIds
from umbra.transport.envelope import Recipient
from umbra.transport.resubmit import HOST, PORT
from umbra.transport.smtp import SmtpClient, SmtpError, SmtpUnreachable
from umbra.transport.store import ContentError, Meta, ShadowStore
from umbra.transport.times import shown
from umbra.transport.tracking import REPLAYED, track

log = logging.getLogger(__name__)

MAX_LISTED = 1000

Present = Callable[[str, str, str], Awaitable[bool | None]]
LeadingTo = Callable[[str, Sequence[str]], Awaitable[Sequence[str]]]


@dataclass(slots=True)
class Replayed:
    """What a replay has done.

    :param found: messages of the net in the window, to the recipient.
    :param present: left out, because the mailbox has them.
    :param queued: left out, because they are in the queue still.
    :param resubmitted: sent; in a dry run, those that would be.
    :param failed: by shadow id, why it was not taken; repeating the replay tries them again.
    :param messages: the first of those sent, each with shadow id, Message-ID, sender, time, size.
    """

    found: int = 0
    present: int = 0
    queued: int = 0
    resubmitted: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return it with the words of the API."""
        return asdict(self)


class UnknownMailbox(Exception):
    """There is no such mailbox here."""


class Replayer:
    """Replays to one mailbox at a time.

    :param present: (mailbox, shadow id, Message-ID): whether the mailbox has the message, None if
        there is no such mailbox; OSError if that cannot be told now.
    :param leading_to: (mailbox, addresses): those of the addresses whose mail comes to it.
    :param replays: the ids of what is being sent, shared with the milter's side.
    """

    def __init__(
        self,
        node: str,
        store: ShadowStore,
        *,
        queue_ids: QueueIds,
        present: Present,
        leading_to: LeadingTo,
        replays: set[str] | None = None,
        host: str = HOST,
        port: int = PORT,
    ) -> None:
        self._node = node
        self._store = store
        self._queue_ids = queue_ids
        self._present = present
        self._leading_to = leading_to
        self._replays = set() if replays is None else replays
        self._address = host, port

    async def run(
        self, recipient: str, since: float, until: float, *, dry_run: bool = False
    ) -> Replayed:
        """Replay what was accepted from ``since`` on and before ``until``, in its order.

        UnknownMailbox; SmtpUnreachable, StoreError or OSError if it makes no sense to go on now.
        """
        if await self._present(recipient, ids.first(until), "") is None:
            raise UnknownMailbox(f"{recipient} has no mailbox here")
        result = Replayed()
        first, last = ids.first(since), ids.first(until)
        addresses = await self._leading_to(recipient, await self._store.recipients(first, last))
        queued = await self._queue_ids()
        client: SmtpClient | None = None
        try:
            async for meta in self._store.delivered(addresses, first, last):
                result.found += 1
                # The primary's own copy is written before the message has left the queue. What was
                # resubmitted here is in it by its new id.
                own = meta.origin == self._node and meta.queue_id in queued
                if own or meta.new_queue_id in queued:
                    result.queued += 1
                    continue
                if await self._present(recipient, meta.shadow_id, meta.message_id):
                    result.present += 1
                    continue
                try:
                    row = _row(meta)
                    if not dry_run:
                        client = client or await SmtpClient.connect(*self._address, self._node)
                        await self._send(client, meta, recipient)
                except SmtpUnreachable:
                    raise
                except (SmtpError, OSError, ContentError) as error:
                    result.failed[meta.shadow_id] = str(error)
                    if client is not None and not getattr(error, "usable", False):
                        client.close()
                        client = None
                    continue
                result.resubmitted += 1
                if len(result.messages) < MAX_LISTED:
                    result.messages.append(row)
        finally:
            if client is not None:
                client.close()
        return result

    async def _send(self, client: SmtpClient, meta: Meta, recipient: str) -> None:
        envelope = meta.envelope.only([Recipient(recipient, ("NOTIFY=NEVER",))])
        self._replays.add(meta.shadow_id)
        try:
            answer = await client.send(envelope, self._content(meta))
        finally:
            self._replays.discard(meta.shadow_id)
        track(
            REPLAYED,
            answer.rpartition(" ")[2],
            meta.envelope.message_id,
            meta.shadow_id,
            f"recipient={recipient!r}",
        )

    async def _content(self, meta: Meta) -> AsyncIterator[bytes]:
        # The id that it had stays in its header, so that a second replay finds it; the milter adds
        # the new one.
        yield f"{ids.HEADER}: {meta.shadow_id}\r\n".encode("ascii")
        async for piece in self._store.content(meta):
            yield piece


def _row(meta: Meta) -> dict[str, Any]:
    return {
        "shadow_id": meta.shadow_id,
        "message_id": meta.envelope.message_id,
        "sender": meta.envelope.sender,
        "accepted": shown(meta.envelope.received),
        "bytes": meta.size,
    }
