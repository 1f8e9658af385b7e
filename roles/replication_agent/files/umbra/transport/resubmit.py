"""Promotion: carries on the messages of a primary that was lost or has handed over.

For each message, in the order in which they were accepted: leave out recipients whose mailbox has
it, send the rest with its id in the first header to the own smtpd for resubmission, and keep it in
the store until a shadow has it or it has left the queue. What a crash leaves, by the step it comes
after:

- claimed: the row is ``resubmitting``; the next run goes on with it.
- Postfix was offered it (the milter has noted the new queue id before it let Postfix accept): if a
  committed queue file of that id exists, it was accepted and is not sent again. While an
  uncommitted one exists, nobody knows: wait. With neither, it was either cancelled or is finished:
  mailboxes that have it are left out, the others get it. Only a recipient elsewhere, relayed within
  that instant, may get it twice: better than never.
- Postfix has said 250: as before, the committed queue file or the mailboxes tell.
- the row is deleted or ``unshadowed``: done; back-fill and discard go on with it.
- the row is ``parked``: it or its content cannot be read, or Postfix refuses it for good. It is
  tried again at each start, each promotion and an operator's word.

What was on hold with its former primary is put on hold again: the milter says so at its end. A
handover tells it; a lost primary has told it before (``discard``), but for the last second or two.

Mail from the null sender (bounces) is resubmitted like other mail. A bounce that the lost primary
had sent because of a message that is resubmitted is not recalled: the sender may be told twice.
What Postfix makes itself and gives to no milter is not here at all.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from umbra.node.helper import HelperError
from umbra.transport import ids, metrics
from umbra.transport.discard import Discarder, QueueIds
from umbra.transport.envelope import Envelope, Recipient
from umbra.transport.remaining import Left, Remaining
from umbra.transport.smtp import SmtpClient, SmtpError, SmtpUnreachable
from umbra.transport.store import ContentError, Meta, ShadowStore, State, StoreError
from umbra.transport.tracking import DISCARDED, DUPLICATE_DROPPED, RESUBMITTED, track

log = logging.getLogger(__name__)

HOST, PORT = "127.0.0.1", 24  # "any private mail system"; only root can listen there
CONCURRENCY = 8
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0

_QUEUED = re.compile(r"queued as (\w+)")

Delivered = Callable[[str, str], Awaitable[bool]]


async def itself(address: str) -> Sequence[str]:
    """Return where mail to an address ends on a host without aliases."""
    return [address]


@dataclass(slots=True)
class Resubmission:
    """A message that is being resubmitted by this process, as far as the milter has told.

    ``held``: it is to be put on hold.
    """

    queue_id: str = ""
    shadowed: bool = False
    held: bool = False


@dataclass(slots=True)
class Report:
    """What one pass has done; ``failed`` gives the reason by shadow id.

    ``parked``: how many were set aside.
    """

    resubmitted: int = 0
    duplicates: int = 0
    finished_before: int = 0
    parked: int = 0
    failed: dict[str, str] = field(default_factory=dict)


class Resubmitter:
    """Resubmits what was claimed.

    :param resubmissions: shared with the milter's side.
    :param queue_ids: all queue files that exist now.
    :param committed_ids: those of them that Postfix has acknowledged (in ``incoming`` only
        executable ones).
    :param delivered: (recipient, shadow id): whether the mailbox has the message; OSError if that
        cannot be told now. False for a recipient without a mailbox here.
    :param targets: returns where mail to an address ends, after aliases; OSError if that cannot be
        told now.
    """

    def __init__(
        self,
        node: str,
        store: ShadowStore,
        discarder: Discarder,
        resubmissions: dict[str, Resubmission],
        *,
        queue_ids: QueueIds,
        committed_ids: QueueIds,
        delivered: Delivered,
        targets: Callable[[str], Awaitable[Sequence[str]]] = itself,
        host: str = HOST,
        port: int = PORT,
        concurrency: int = CONCURRENCY,
    ) -> None:
        self._node = node
        self._store = store
        self._discarder = discarder
        self._resubmissions = resubmissions
        self._queue_ids = queue_ids
        self._committed_ids = committed_ids
        self._delivered = delivered
        self._targets = targets
        self._address = host, port
        self._concurrency = concurrency
        self.reasons: dict[str, str] = {}
        """Why messages were set aside, by shadow id; an agent that starts tries them again."""

    async def claim(self, origin: str, remaining: Remaining | None = None) -> int:
        """Make what is held for ``origin`` ours, durably.

        Return how many messages had no recipient left.

        To be called once this node is primary under its new epoch (no store for ``origin`` can
        succeed any more), and with a handover's ``remaining`` before the handover is answered: it
        is known only now.

        :param remaining: what was left of ``origin``'s queue; None if nobody knows.
        """
        gone = await self._store.claim(origin, remaining, narrow)
        for meta in gone:
            track(
                DISCARDED,
                meta.queue_id,
                meta.message_id,
                meta.shadow_id,
                f"origin={origin}",
            )
        return len(gone)

    async def run(self) -> Report:
        """Resubmit until nothing is left; what fails is tried again after a pause.

        What would fail each time is set aside: nothing else is to wait for it. Return the sum of
        all passes.
        """
        total, pause = Report(), FIRST_PAUSE
        while True:
            try:
                report = await self.step()
            except (SmtpUnreachable, StoreError, HelperError) as error:
                log.warning("resubmission waits: %s", error)
            else:
                total.resubmitted += report.resubmitted
                total.duplicates += report.duplicates
                total.finished_before += report.finished_before
                total.parked += report.parked
                total.failed = report.failed
                if not report.failed:
                    return total
                first = next(iter(report.failed.items()))
                log.warning(
                    "%d messages wait for their resubmission, for example %s: %s",
                    len(report.failed),
                    *first,
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def step(self) -> Report:
        """Try each message once.

        SmtpUnreachable, StoreError or HelperError if it makes no sense to go on now.
        """
        report = Report()
        # Committed first: a file that is committed between the two looks then counts as
        # uncommitted, which only waits.
        committed = await self._committed_ids()
        present = await self._queue_ids()
        work: asyncio.Queue[Meta | None] = asyncio.Queue(2 * self._concurrency)
        ended: Exception | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._concurrency):
                    group.create_task(self._worker(work, committed, present, report))
                async for meta in self._store.in_order(State.RESUBMITTING):
                    await work.put(meta)
                for _ in range(self._concurrency):
                    await work.put(None)
        except* (SmtpUnreachable, StoreError) as errors:
            ended = errors.exceptions[0]
        if ended is not None:
            raise ended
        return report

    async def _worker(
        self,
        work: asyncio.Queue[Meta | None],
        committed: set[str],
        present: set[str],
        report: Report,
    ) -> None:
        client: SmtpClient | None = None
        try:
            while (meta := await work.get()) is not None:
                if meta.new_queue_id in committed:
                    await self._accepted(meta, Resubmission(meta.new_queue_id))
                    report.finished_before += 1
                    continue
                if meta.new_queue_id in present:
                    report.failed[meta.shadow_id] = f"{meta.new_queue_id} is not committed yet"
                    continue
                try:
                    left = await self._left(meta, report)
                    if not left:
                        await self._store.discard(
                            [meta.shadow_id], origin=meta.origin, state=State.RESUBMITTING
                        )
                        continue
                    client = client or await SmtpClient.connect(*self._address, self._node)
                    await self._send(client, meta, meta.envelope.only(left))
                    report.resubmitted += 1
                except SmtpUnreachable:
                    raise
                except (SmtpError, OSError, ContentError) as error:
                    # One message that cannot be read does not stop the others, least of all in the
                    # middle. Closing takes back what was sent of it.
                    if client is not None and not getattr(error, "usable", False):
                        client.close()
                        client = None
                    if isinstance(error, ContentError) or getattr(error, "permanent", False):
                        await self._park(meta, str(error))
                        report.parked += 1
                    else:
                        report.failed[meta.shadow_id] = str(error)
        finally:
            if client is not None:
                client.close()

    async def _left(self, meta: Meta, report: Report) -> list[Recipient]:
        left = []
        for recipient in meta.envelope.recipients:
            targets = await self._targets(recipient.address)
            missing = [item for item in targets if not await self._has(item, meta)]
            report.duplicates += len(targets) - len(missing)
            if len(missing) == len(targets):
                left.append(recipient)
            else:
                # An alias of which some have it: the others, each by his own address.
                left += [Recipient(address, recipient.args) for address in missing]
        return left

    async def _park(self, meta: Meta, reason: str) -> None:
        await self._store.park(meta.shadow_id)
        self.reasons[meta.shadow_id] = reason
        log.error(
            "%s (message-id %s) of %s cannot be carried on and is kept here: %s",
            meta.shadow_id, meta.message_id or "-", meta.origin, reason,
        )  # fmt: skip

    async def _has(self, address: str, meta: Meta) -> bool:
        try:
            if not await self._delivered(address, meta.shadow_id):
                return False
        except OSError as error:
            # His delivery asks again (``once``), and waits for the answer; others need not.
            log.info("whether %r has %s cannot be told now: %s", address, meta.shadow_id, error)
            return False
        metrics.DUPLICATES.inc()
        track(
            DUPLICATE_DROPPED,
            meta.queue_id,
            meta.envelope.message_id,
            meta.shadow_id,
            f"recipient={address!r}",
        )
        return True

    async def _send(self, client: SmtpClient, meta: Meta, envelope: Envelope) -> None:
        progress = self._resubmissions[meta.shadow_id] = Resubmission(held=meta.envelope.held)
        try:
            answer = await client.send(envelope, self._content(meta))
        finally:
            del self._resubmissions[meta.shadow_id]
        if not progress.queue_id and (match := _QUEUED.search(answer)):
            # Postfix did not ask the milter (a fault in its settings), but has the message.
            progress.queue_id = match[1]
        await self._accepted(meta, progress)
        metrics.RESUBMITTED.inc()
        track(
            RESUBMITTED,
            progress.queue_id,
            meta.envelope.message_id,
            meta.shadow_id,
            f"origin={meta.origin}",
        )

    async def _accepted(self, meta: Meta, progress: Resubmission) -> None:
        if progress.shadowed:
            await self._store.discard(
                [meta.shadow_id], origin=meta.origin, state=State.RESUBMITTING
            )
        else:
            await self._store.keep_unshadowed(meta, progress.queue_id, origin=self._node)
            self._discarder.add(self._node, progress.queue_id, meta.shadow_id)

    async def _content(self, meta: Meta) -> AsyncIterator[bytes]:
        yield f"{ids.HEADER}: {meta.shadow_id}\r\n".encode("ascii")
        async for piece in self._store.content(meta):
            yield piece


def narrow(envelope: Envelope, left: Left) -> Envelope:
    """Return the envelope of what is ``left`` of a message, with those recipients only.

    The queue knows recipients after alias expansion. One that is not in the envelope came from an
    alias there and takes the alias's place; if only one alias can be meant, it keeps that one's
    arguments.
    """
    envelope = replace(envelope, held=left.held)
    if left.recipients is None:
        return envelope
    wanted = {address.lower(): address for address in left.recipients}
    kept = [item for item in envelope.recipients if item.address.lower() in wanted]
    others = [item for item in envelope.recipients if item.address.lower() not in wanted]
    for item in kept:
        wanted.pop(item.address.lower(), None)
    args = others[0].args if len(others) == 1 else ()
    return envelope.only([*kept, *(Recipient(address, args) for address in wanted.values())])
