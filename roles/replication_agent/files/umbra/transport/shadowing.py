"""Shadow before 250: what becomes of a message at its end, before Postfix acknowledges it.

Order of events, and what holds if this process or this node dies between them:

1. The shadows have the message durably, or (policy ``accept``) the group is alone, durably, and
   then the own store has it. Dead before or here: Postfix got no answer, so the client got no 250
   and sends again; a copy without a queue file is discarded.
2. Epoch and role are checked again: an answer that came too late acknowledges nothing.
3. The answer goes to Postfix, which syncs its queue file and says 250.
   Dead here: perhaps never acknowledged, but on the shadow: it is delivered by the shadow, never
   lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from umbra.config import ShadowPolicy
from umbra.peer.exchange import PeerError
from umbra.peer.link import PeerLink
from umbra.transport import ids, metrics, milter, wire
from umbra.transport.body import Body, Reader
from umbra.transport.discard import Discarder
from umbra.transport.envelope import Envelope, EnvelopeError, address, clean
from umbra.transport.milter import Flow, Transaction
from umbra.transport.ports import Group, NotPrimary, Refusal
from umbra.transport.resubmit import Resubmission
from umbra.transport.safety_net import SafetyNet
from umbra.transport.store import ShadowStore, ShadowWriter, State, StoreError
from umbra.transport.tracking import SHADOW_CREATED, SHADOW_FAILED, track

log = logging.getLogger(__name__)

RESUBMISSION = b"umbra-resubmit"
"""``milter_macro_daemon_name`` of the smtpd that takes resubmitted messages."""
SIEVE = b"umbra-sieve"
"""That of the smtpd that takes what Sieve sends: a part of a delivery, which goes on in a drain."""
DRAINING = 421

RATE = 1024 * 1024
"""Bytes a second below which a shadow counts as stalled: so much longer than ``shadow_timeout`` a
large message may take."""

LIMIT = 90.0
"""Seconds that the shadows have for any message, however large; over MAX_SHADOW_TIMEOUT."""

ANSWER_LIMIT = 110.0
"""Seconds from a message's end to its answer, whatever fails meanwhile. Postfix gives up on us
after 120 (the milter's content_timeout), and then its client does not hear why."""

MAX_IN_FLIGHT = 250
"""Messages that may be between their end and their answer; the link has so many connections."""

BUSY = Refusal(451, "4.3.2", "Too many messages at this moment, try again later")
ALONE = Refusal(
    451, "4.7.1", "No second server can take a copy of this message now, try again later"
)
DEMOTED = Refusal(451, "4.7.1", "This server has just stopped being the primary, try again")
LATE = Refusal(451, "4.4.1", "A copy of this message took too long, try again later")
ORPHANED = Refusal(451, "4.4.2", "Nobody waits for this resubmission any more")
FULL = Refusal(451, "4.3.1", "No room to keep a copy of this message, try again later")
MALFORMED = Refusal(550, "5.1.7", "The envelope of this message cannot be copied to another server")

_ID_HEADER = ids.HEADER.lower().encode()


class _Refused(Exception):
    def __init__(self, refusal: Refusal, reason: str) -> None:
        super().__init__(reason)
        self.refusal = refusal


class Shadowing:
    """The milter's application: lets no message be acknowledged that is not where it has to be.

    Every peer that :meth:`Group.shadows` names is given the message; one that does not take it is
    taken out of them first.

    :param node: this node's name.
    :param resubmissions: ids that are being resubmitted by this process; told here what became of
        them.
    :param replays: ids of what the safety net is sending again.
    :param timeout: seconds that the shadows have for a message (``shadow_timeout``), plus one for
        each MiB.
    :param net: gets a copy of each accepted message.
    :param enough: whether these holders are enough for a message (see ``selection``).
    :param pressure: why no message is taken now, by this node's or the shadows' load.
    :param accepted: told the id of each new message before Postfix has it.
    """

    def __init__(
        self,
        node: str,
        group: Group,
        store: ShadowStore,
        discarder: Discarder,
        resubmissions: dict[str, Resubmission],
        replays: Container[str] = (),
        *,
        policy: ShadowPolicy,
        timeout: float,
        net: SafetyNet | None = None,
        enough: Callable[[Collection[str]], bool] = bool,
        pressure: Callable[[], Refusal | None] = lambda: None,
        accepted: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.node = node
        self.group = group
        self.store = store
        self.discarder = discarder
        self.resubmissions = resubmissions
        self.replays = replays
        self.policy = policy
        self.timeout = timeout
        self.net = net
        self.enough = enough
        self.pressure = pressure
        self.accepted = accepted
        self.in_flight = 0
        self.storing_alone = 0
        """Messages that found the group alone and are not in the own store yet."""
        self._tasks: set[asyncio.Task[None]] = set()

    def mail(self, transaction: Transaction) -> bytes | None:
        """Refuse at MAIL what would be refused at its end.

        That is: while draining, while not primary, under pressure, and while there are not enough
        shadows under ``defer``.
        """
        refusal = self.refusal(transaction)
        # What is resubmitted was acknowledged once and goes on even alone; so was what Sieve sends.
        if refusal is None and transaction.macro(b"daemon_name") not in (RESUBMISSION, SIEVE):
            refusal = BUSY if self.in_flight >= MAX_IN_FLIGHT else self.pressure()
            if (
                refusal is None
                and self.policy is ShadowPolicy.DEFER
                and not self.enough([peer.name for peer in self.group.shadows()])
            ):
                refusal = ALONE
        return None if refusal is None else answer(refusal)

    def refusal(self, transaction: Transaction) -> Refusal | None:
        """Return why the group takes no such message now, or None."""
        refusal = self.group.accepting()
        delivering = transaction.macro(b"daemon_name") == SIEVE
        return None if delivering and refusal and refusal.code == DRAINING else refusal

    def message(self, transaction: Transaction, flow: Flow) -> _Message:
        """Return the taker of one message."""
        return _Message(self, transaction, flow)

    def keep(self, task: asyncio.Task[None]) -> None:
        """Hold on to a task that was begun before its message's end."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def answer(refusal: Refusal) -> bytes:
    """Return a refusal as a milter packet and count it."""
    metrics.REFUSED.labels(str(refusal.code)).inc()
    return milter.reply(refusal.code, refusal.enhanced, refusal.text)


class _Message:
    def __init__(self, shadowing: Shadowing, transaction: Transaction, flow: Flow) -> None:
        self._shadowing = shadowing
        self._group = shadowing.group
        self._transaction = transaction
        self._body = Body(flow)
        self._queue_id = clean(transaction.macro(b"i"))
        self._message_id = ""
        self._shadow_id = ""
        self._epoch = 0
        self._envelope: Envelope | None = None
        self._named = False
        self._resubmission: Resubmission | None = None
        self._orphaned = False
        self._alone_here = False
        self._holders: set[str] = set()
        self._copy: ShadowWriter | None = None
        self._delivery: asyncio.Task[None] | None = None

    # -- what the milter says

    def header(self, name: bytes, lines: bytes) -> None:
        lowered = name.lower()
        if not self._named and lowered == _ID_HEADER and self._claim(lines):
            return
        if lowered == b"message-id" and not self._message_id:
            self._message_id = clean(lines.partition(b":")[2].strip())
        self._take(lines)

    def body(self, data: bytes) -> None:
        self._take(data)

    def abort(self) -> None:
        if self._delivery is not None:
            self._delivery.cancel()
        if self._resubmission is None:  # else it was acknowledged once, and is tried again
            self._shadowing.discarder.refused(self._queue_id)
        self._drop_copy()

    async def finish(self) -> bytes:
        started = time.monotonic()
        self._shadowing.in_flight += 1
        try:
            return await self._finish(started)
        finally:
            self._shadowing.in_flight -= 1

    async def _finish(self, started: float) -> bytes:
        with self._group.begin_work():
            try:
                refusal = self._shadowing.refusal(self._transaction)
                if refusal is not None:
                    raise _Refused(refusal, "not accepting")
                self._body.end()
                await self._delivered()
                # A drain waits for what has come so far, so it may be acknowledged.
                if not self._group.may_acknowledge(self._epoch, self._holders):
                    raise _Refused(DEMOTED, "the epoch or the role changed meanwhile")
                if not (self._alone_here or self._asked_of() <= self._holders):
                    # It has joined since, and counts on the messages that come from then on.
                    raise _Refused(ALONE, "the shadows changed meanwhile")
            except _Refused as refused:
                self.abort()
                log.info("%s refused: %s", self._queue_id, refused)
                return answer(refused.refusal)
        metrics.SHADOW_SECONDS.observe(time.monotonic() - started)
        await self._keep()
        if self._resubmission is not None:
            # The id is in its header already.
            return (milter.HOLD if self._resubmission.held else b"") + milter.ACCEPT
        self._shadowing.accepted(self._shadow_id)
        # The first of its name, as in a resubmitted message: whatever else bears that name came
        # with the message.
        return milter.insert_header(ids.HEADER, self._shadow_id) + milter.ACCEPT

    # -- within

    async def _delivered(self) -> None:
        try:
            async with asyncio.timeout(ANSWER_LIMIT):
                await (self._delivery or self._deliver())
        except TimeoutError:
            raise _Refused(LATE, f"it took over {ANSWER_LIMIT:g} s") from None

    def _asked_of(self) -> set[str]:
        return {peer.name for peer in self._group.shadows()}

    async def _keep(self) -> None:
        """Give the safety net what was accepted; what comes in by its own port is no news to it."""
        if self._transaction.macro(b"daemon_name") == RESUBMISSION:
            self._drop_copy()
            if self._resubmission is None:  # a replay: the net has it under its first id
                self._shadowing.discarder.refused(self._queue_id)
            return
        net, copy = self._shadowing.net, self._copy
        if net is None or self._alone_here:
            self._drop_copy()
            return
        if copy is None:
            if self._body.large or not net.wanted:  # a large one has streamed past
                net.missed()
                return
            assert self._envelope is not None
            copy = self._writer(self._envelope)
            await self._write(copy, self._body.reader())  # in memory: nothing to wait for
        self._copy = None
        net.keep(copy)

    def _drop_copy(self) -> None:
        if self._copy is not None:
            self._copy.abort()
            self._copy = None

    def _claim(self, lines: bytes) -> bool:
        """Tell whether this is our own resubmission, whose id header is no part of the content.

        To be asked about the first header of that name alone: further ones came with the message.
        Headers of other names may be before it, from milters that are asked before ours.
        """
        self._named = True
        # Once it is on its way to the shadows, it has an id.
        if self._transaction.macro(b"daemon_name") != RESUBMISSION or self._delivery is not None:
            return False
        shadow_id = clean(lines.partition(b":")[2].strip())
        # Only what this process is resubmitting right now: others may reach the port, but cannot
        # guess an id.
        resubmission = self._shadowing.resubmissions.get(shadow_id)
        if resubmission is None:
            # Postfix asks whether or not the client is still there. It will send the message again
            # (or has been restarted, and its successor will), so this one would be a second.
            self._orphaned = ids.valid(shadow_id) and shadow_id not in self._shadowing.replays
            return False
        self._shadow_id, self._resubmission = shadow_id, resubmission
        return True

    def _take(self, data: bytes) -> None:
        if self._body.write(data):
            self._delivery = asyncio.get_running_loop().create_task(self._deliver())
            # Its failure is told when it is awaited; an aborted message awaits nothing.
            self._delivery.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._shadowing.keep(self._delivery)

    def _checked_envelope(self) -> Envelope:
        # A message that no shadow could ever take must not look like a shadow's failure.
        try:
            envelope = Envelope.from_object(self._envelope_object())
            wire.names({"shadow_id": self._shadow_id, "queue_id": self._queue_id})
        except EnvelopeError as error:
            raise _Refused(MALFORMED, str(error)) from None
        return envelope

    def _envelope_object(self) -> dict[str, Any]:
        transaction = self._transaction
        return {
            "sender": address(transaction.sender),
            "sender_args": _texts(transaction.sender_args),
            "recipients": [
                (address(first), *_texts(rest)) for first, *rest in transaction.recipients
            ],
            "client_name": clean(transaction.client.name),
            "client_address": clean(transaction.client.address),
            "helo": clean(transaction.client.helo),
            "auth_user": clean(transaction.macro(b"auth_authen")),
            "message_id": self._message_id,
            "received": time.time(),
        }

    async def _deliver(self) -> None:
        """Bring the message where it has to be, or raise _Refused."""
        try:
            await self._bring()
        finally:
            # Whoever failed before reading must not leave the milter's connection braked.
            self._body.flow()

    async def _bring(self) -> None:
        if self._orphaned:
            raise _Refused(ORPHANED, "its client has gone")
        self._epoch = self._group.epoch
        self._shadow_id = self._shadow_id or ids.new()
        if self._resubmission is not None:
            # Before anything else: after a crash the queue tells by this id whether the message got
            # there.
            self._resubmission.queue_id = self._queue_id
            try:
                await self._shadowing.store.note_queue_id(self._shadow_id, self._queue_id)
            except StoreError as error:
                raise _Refused(FULL, str(error)) from None
        envelope = self._envelope = self._checked_envelope()
        peers = self._group.shadows()
        if (
            peers
            and self._shadowing.policy is ShadowPolicy.DEFER
            and self._resubmission is None
            and self._transaction.macro(b"daemon_name") != SIEVE
            and not self._shadowing.enough([peer.name for peer in peers])
        ):
            raise _Refused(ALONE, "there are not enough shadows")
        if peers:
            await self._to_shadows(peers, envelope)
        else:
            with self._storing_alone():
                await self._alone(None, envelope, "the group is alone")

    @contextmanager
    def _storing_alone(self) -> Iterator[None]:
        """Count the message as on its way into the own store.

        From before the group is alone, or without a pause after it was seen to be, until the store
        has it: a shadow may be back at once, and the end of its back-fill must not miss it.
        """
        self._shadowing.storing_alone += 1
        try:
            yield
        finally:
            self._shadowing.storing_alone -= 1

    async def _to_shadows(self, peers: Sequence[PeerLink], envelope: Envelope) -> None:
        writer: ShadowWriter | None = None
        net = self._shadowing.net
        kept = net is not None and net.wanted
        if (
            self._body.large
            and (kept or self._shadowing.policy is ShadowPolicy.ACCEPT)
            and self._resubmission is None
        ):
            # What streams past cannot be read again, so it is kept (unsynced) for the safety net,
            # and in case the shadow fails half way.
            writer = self._writer(envelope)
        # Before it is sent: where it fails or is cancelled it may have arrived all the same, and
        # will have to be discarded.
        self._note([peer.name for peer in peers], sure=False)
        try:
            failed = await self._send(peers, writer, envelope)
            self._holders = {peer.name for peer in peers} - failed.keys()
            self._note(self._holders, sure=True)
            if failed:
                with self._storing_alone():
                    await self._failed(failed, writer, envelope)
            else:
                self._shadowed("+".join(peer.name for peer in peers))
            # Also where one failed: it gets its copy from the net when it is back.
            if kept and not self._alone_here:
                self._copy, writer = writer, None
        finally:
            if writer is not None:
                writer.abort()

    def _note(self, holders: Collection[str], *, sure: bool) -> None:
        for holder in holders:
            self._shadowing.discarder.add(holder, self._queue_id, self._shadow_id, sure=sure)

    def _shadowed(self, where: str) -> None:
        metrics.ACCEPTED.labels("shadow").inc()
        if self._resubmission is not None:
            self._resubmission.shadowed = True
        track(SHADOW_CREATED, self._queue_id, self._message_id, self._shadow_id, f"at={where}")

    async def _failed(
        self,
        failed: dict[str, PeerError],
        writer: ShadowWriter | None,
        envelope: Envelope,
    ) -> None:
        reason = "; ".join(f"{name}: {error.text}" for name, error in failed.items())
        for name, error in failed.items():
            metrics.SHADOW_FAILED.labels(name, error.code).inc()
            track(
                SHADOW_FAILED,
                self._queue_id,
                self._message_id,
                self._shadow_id,
                f"at={name} reason={error.code}",
            )
            if error.code == "stale-epoch":
                raise _Refused(DEMOTED, reason)
        needed = self._shadowing.policy is ShadowPolicy.DEFER and self._resubmission is None
        if needed and not self._shadowing.enough(self._holders):
            raise _Refused(ALONE, reason)
        try:
            for name, error in failed.items():
                await self._group.shadow_failed(name, error.text)
        except NotPrimary as refusal:
            raise _Refused(DEMOTED, str(refusal)) from None
        left = self._asked_of()
        if not left:
            await self._alone(writer, envelope, reason)
        elif left <= self._holders and (not needed or self._shadowing.enough(left)):
            self._shadowed("+".join(sorted(left)))
        else:
            raise _Refused(ALONE, "the shadows changed meanwhile")

    async def _alone(self, writer: ShadowWriter | None, envelope: Envelope, reason: str) -> None:
        """The group is alone: put the message into the own store for the back-fill."""
        self._alone_here = True
        if self._resubmission is not None:
            return  # it is in the own store; the resubmission keeps it there
        if self._shadowing.policy is ShadowPolicy.DEFER:
            raise _Refused(ALONE, reason)
        self._note([self._shadowing.node], sure=False)
        try:
            if writer is None:
                writer = self._writer(envelope)
                reader = self._body.reader()
                self._body.flow()
                await self._write(writer, reader)
            await writer.commit()
        except StoreError as error:
            raise _Refused(FULL, str(error)) from None
        finally:
            if writer is not None:
                writer.abort()
        self._note([self._shadowing.node], sure=True)
        metrics.ACCEPTED.labels("alone").inc()
        track(
            SHADOW_CREATED,
            self._queue_id,
            self._message_id,
            self._shadow_id,
            f"at={self._shadowing.node}",
        )

    def _writer(self, envelope: Envelope) -> ShadowWriter:
        return self._shadowing.store.begin(
            self._shadow_id,
            origin=self._shadowing.node,
            queue_id=self._queue_id,
            envelope=envelope,
            epoch=self._epoch,
            state=State.UNSHADOWED,
        )

    async def _send(
        self, peers: Sequence[PeerLink], writer: ShadowWriter | None, envelope: Envelope
    ) -> dict[str, PeerError]:
        """Send to all at once; return who failed and why."""
        readers = [self._body.reader() for _ in peers]
        spare = self._body.reader() if writer is not None else None
        self._body.flow()
        if len(peers) == 1 and writer is None:
            errors = [await self._to_peer(peers[0], readers[0], envelope)]
        else:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._to_peer(peer, reader, envelope))
                    for peer, reader in zip(peers, readers, strict=True)
                ]
                if writer is not None and spare is not None:
                    group.create_task(self._spare(writer, spare))
            errors = [task.result() for task in tasks]
        return {
            peer.name: error for peer, error in zip(peers, errors, strict=True) if error is not None
        }

    async def _to_peer(
        self, peer: PeerLink, reader: Reader, envelope: Envelope
    ) -> PeerError | None:
        args, head = wire.arguments(self._shadow_id, self._queue_id, envelope)
        left = LIMIT - self._shadowing.timeout
        try:
            async with peer.exchange(
                "shadow-store", args, timeout=self._shadowing.timeout
            ) as exchange:
                if head:
                    await exchange.send(head)
                while (data := await reader.read()) is not None:
                    await exchange.send(data)
                    if self._body.large:  # a small one has one piece, for which it is enough
                        more = min(len(data) / RATE, left)
                        exchange.extend(more)
                        left -= more
                await exchange.result()
        except PeerError as error:
            return error
        finally:
            reader.close()
        return None

    async def _spare(self, writer: ShadowWriter, reader: Reader) -> None:
        try:
            await self._write(writer, reader)
        except StoreError as error:
            # Matters only if the shadow fails too; then the commit fails as well and the message is
            # refused.
            log.warning("no spare copy of %s: %s", self._queue_id, error)

    async def _write(self, writer: ShadowWriter, reader: Reader) -> None:
        try:
            while (data := await reader.read()) is not None:
                await writer.write(data)
        finally:
            reader.close()


def _texts(values: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(value.decode("utf-8", "surrogateescape") for value in values)
