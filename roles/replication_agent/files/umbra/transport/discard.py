"""The primary's side of discard.

Which messages in the queue have a copy where, and when that copy has done its duty.

A copy may go when its message has left the queue for good: its file is in none of Postfix's queue
directories.

Why an absence in one listing is no proof: a listing reads the directories one after another while
Postfix renames files between them, so a file can hop over the reader. If the listing reads
``incoming``, ``active``, ``deferred`` (then ``hold``, ``corrupt``) in the order in which mail
flows, a file that moves only with the flow is always seen: when the reader leaves a directory, the
file is there (seen) or further on. It can be missed only by moving against the flow (``deferred``
back to ``active`` or ``incoming``, which Postfix does when a retry is due, at the soonest minutes
after the last one) within the milliseconds of the listing. So a copy goes when its message is
absent in two listings in a row, an interval apart: missing it would take two retries of one message
within about a second, each inside a listing. And a file that exists from before the copy was made
(the queue id is known to the milter because the file is there) until the message is finished is
present in every listing between, so a message that is still at its end of message is never taken
for gone. Postfix's long queue ids are never used again.

A message may go on in another file: ``postsuper -r`` gives it one, past our milter. So before a
copy goes, files that came after its own and that nobody here knows are asked for the shadow id that
they bear; the copy is then that file's.

The same listing tells what is on hold, by an operator's word or a policy's. The holder is told, for
after a failover nobody else could tell it; what the primary dies before telling is delivered then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Protocol

from umbra.node.helper import HelperError
from umbra.peer.exchange import PeerError
from umbra.peer.link import PeerLink
from umbra.transport import metrics
from umbra.transport.store import ShadowStore, State, StoreError
from umbra.transport.tracking import DISCARDED, track

log = logging.getLogger(__name__)

BATCH = 1000
"""Ids in one ``shadow-discard`` or ``shadow-hold``: 35 bytes each in a frame of 64 KiB."""

HOLD = "hold"
"""Postfix's queue of what is on hold."""

TIMEOUT = 30.0
RECONCILE_INTERVAL = 600.0
DOUBT_INTERVAL = 5.0
"""Seconds after the discard of a copy that may have been there: by then it has come or never will,
so a copy that was stored after its discard is found."""

QueueIds = Callable[[], Awaitable[set[str]]]
Queue = Callable[[], Awaitable[Mapping[str, str]]]
ShadowIds = Callable[[Set[str]], Awaitable[Mapping[str, str]]]


async def nameless(queue_ids: Set[str]) -> Mapping[str, str]:
    """Return the shadow ids of queue files that bear none."""
    return dict.fromkeys(queue_ids, "")


Needed = Callable[[Set[str]], Awaitable[Set[str]]]


async def none_needed(shadow_ids: Set[str]) -> Set[str]:
    """Return that this node has none of them still to carry on."""
    return set()


@dataclass(frozen=True, slots=True)
class Listing:
    """What a holder keeps for this node.

    :param copies: shadow ids by queue id.
    :param held: those shadow ids of it that it knows to be on hold.
    """

    copies: dict[str, str]
    held: set[str]


class Holder(Protocol):
    """A place where copies are kept. Errors are PeerError or StoreError.

    ``own``: on this node.
    """

    name: str
    own: bool

    async def listing(self) -> Listing:
        """Return what is kept there for this node."""
        ...

    async def discard(self, shadow_ids: list[str], *, delivered: bool) -> None:
        """These have done their duty; ids that are not there do no harm.

        :param delivered: they may be kept for the safety net.
        """
        ...

    async def hold(self, shadow_ids: list[str], *, held: bool) -> Set[str]:
        """These are on hold in the queue now, or are no more; return which of them are there."""
        ...


class PeerHolder:
    """A shadow."""

    own = False

    def __init__(self, link: PeerLink) -> None:
        self.name = link.name
        self._link = link

    async def listing(self) -> Listing:
        """Ask by ``shadow-list``."""
        copies: dict[str, str] = {}
        held: set[str] = set()
        async with self._link.exchange("shadow-list", {}, timeout=TIMEOUT) as exchange:
            await exchange.end()
            try:
                async for row in exchange.receive_lines():
                    copies[str(row["queue_id"])] = shadow_id = str(row["shadow_id"])
                    if row.get("held") is True:
                        held.add(shadow_id)
            except KeyError as error:
                raise PeerError("protocol", f"a line of shadow-list has no {error}") from None
            await exchange.result()
        return Listing(copies, held)

    async def discard(self, shadow_ids: list[str], *, delivered: bool) -> None:
        """Ask by ``shadow-discard``."""
        args = {"shadow_ids": shadow_ids, "delivered": delivered}
        await self._link.request("shadow-discard", args, timeout=TIMEOUT)

    async def hold(self, shadow_ids: list[str], *, held: bool) -> Set[str]:
        """Tell by ``shadow-hold``."""
        args = {"shadow_ids": shadow_ids, "held": held}
        answer = await self._link.request("shadow-hold", args, timeout=TIMEOUT)
        known = answer.get("known")
        if not isinstance(known, list):
            raise PeerError("protocol", f"{self.name} does not say what it has put on hold")
        return set(shadow_ids) & set(map(str, known))


class LocalHolder:
    """The own store, for messages that no shadow has yet."""

    own = True

    def __init__(self, store: ShadowStore, node: str) -> None:
        self.name = node
        self._store = store

    async def listing(self) -> Listing:
        """Read the store."""
        pages = self._store.copies(self.name, State.UNSHADOWED)
        copies = {copy.queue_id: copy.shadow_id async for page in pages for copy in page}
        return Listing(copies, set())

    async def discard(self, shadow_ids: list[str], *, delivered: bool) -> None:
        """Discard in the store."""
        for meta in await self._store.discard(
            shadow_ids, origin=self.name, state=State.UNSHADOWED, delivered=delivered
        ):
            metrics.DISCARDED.inc()
            track(
                DISCARDED,
                meta.queue_id,
                meta.message_id,
                meta.shadow_id,
                f"origin={self.name}",
            )

    async def hold(self, shadow_ids: list[str], *, held: bool) -> Set[str]:
        """Nothing to do: the queue file itself is here."""
        return set(shadow_ids)


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What comparing a holder's list with the queue found.

    :param held: how many messages the holder has for this node.
    :param missing: queue ids of messages it should have and has not (a lost disk, for example).
    """

    held: int
    missing: list[str]


class Copies:
    """The copies at one holder: decisions only, no I/O.

    A holder has one copy of a message, whatever the queue file: a try that failed and its retry
    share it, and the newest queue id stands for it. Else the end of the failed one's file would
    have the copy discarded that the retry lives on.
    """

    def __init__(self) -> None:
        self._queue_ids: dict[str, str] = {}
        self._settled: dict[str, str] = {}
        self._fresh: dict[str, str] = {}
        self._absent: set[str] = set()
        self._doubtful: set[str] = set()
        self._worthless: set[str] = set()
        self._held: set[str] = set()  # what the holder knows to be on hold, by shadow id

    def __len__(self) -> int:
        return len(self._settled) + len(self._fresh)

    def add(self, queue_id: str, shadow_id: str, *, sure: bool) -> None:
        """There is (if not ``sure``, may be) a copy of the message in this queue file."""
        former = self._queue_ids.get(shadow_id, queue_id)
        if former != queue_id:
            self.remove([former])
        self._note(queue_id, shadow_id)
        if sure:
            self._doubtful.discard(queue_id)
        else:
            self._doubtful.add(queue_id)

    def _note(self, queue_id: str, shadow_id: str) -> None:
        self._fresh[queue_id] = shadow_id
        self._queue_ids[shadow_id] = queue_id
        self._held.discard(shadow_id)  # what is stored, or stored again, is stored as not on hold

    def stands(self, queue_id: str, shadow_id: str) -> bool:
        """Return whether the copy is this queue file's still, not a newer one's."""
        return self._queue_ids.get(shadow_id, queue_id) == queue_id

    def shaken(self, shadow_ids: Iterable[str]) -> bool:
        """These were discarded; return whether newer queue files had come to need one meanwhile.

        Whether the discard or the new copy came first, only the holder knows.
        """
        taken = {self._queue_ids[item] for item in shadow_ids if item in self._queue_ids}
        self._doubtful |= taken
        return bool(taken)

    def refused(self, queue_id: str) -> None:
        """What is there of this message is not to be kept after its discard."""
        if queue_id in self._fresh or queue_id in self._settled:
            self._worthless.add(queue_id)

    def worth(self, ripe: dict[str, str]) -> Iterator[tuple[bool, dict[str, str]]]:
        """Give ``ripe`` in two parts: what may be kept (True) and what not."""
        lost = {queue_id: ripe[queue_id] for queue_id in ripe.keys() & self._worthless}
        for keep, part in ((True, {k: v for k, v in ripe.items() if k not in lost}), (False, lost)):
            if part:
                yield keep, part

    def begin_listing(self) -> None:
        """A listing of the queue begins: what is added from now on is not judged by it."""
        self._settled |= self._fresh
        self._fresh = {}

    def holds(self, queue: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """Return the shadow ids of what the holder has to hear: on hold now, and no more."""
        on_hold = self._settled.keys() & {key for key, place in queue.items() if place == HOLD}
        held = {self._settled[key] for key in on_hold}
        # What this listing has missed may be on hold still.
        released = {item for item in self._held - held if self._queue_ids.get(item) in queue}
        return sorted(held - self._held), sorted(released)

    def heard(self, shadow_ids: Iterable[str], *, held: bool) -> None:
        """The holder knows this of these now."""
        if held:
            self._held |= {item for item in shadow_ids if item in self._queue_ids}
        else:
            self._held.difference_update(shadow_ids)

    def judge(self, present: Set[str]) -> dict[str, str]:
        """Return the copies whose messages two listings in a row did not show."""
        absent = self._settled.keys() - present
        ripe = {queue_id: self._settled[queue_id] for queue_id in absent & self._absent}
        self._absent = absent
        return ripe

    def remove(self, queue_ids: Iterable[str]) -> None:
        """These copies are gone."""
        for queue_id in queue_ids:
            for copies in (self._settled, self._fresh):
                shadow_id = copies.pop(queue_id, None)
                if shadow_id is not None and self._queue_ids.get(shadow_id) == queue_id:
                    del self._queue_ids[shadow_id]
                    self._held.discard(shadow_id)
            self._absent.discard(queue_id)
            self._doubtful.discard(queue_id)
            self._worthless.discard(queue_id)

    def known(self) -> dict[str, str]:
        """Return all copies: shadow ids by queue id."""
        return self._settled | self._fresh

    def sure(self) -> dict[str, str]:
        """Return the copies that are surely there: shadow ids by queue id."""
        return {key: value for key, value in self.known().items() if key not in self._doubtful}

    def compare(self, before: dict[str, str], said: Listing) -> list[str]:
        """Take over what the holder says it has; return the queue ids it should have and has not.

        :param before: what was surely there before the holder was asked; others may be missing in
            its answer.
        """
        known, held = self.known(), said.copies
        for queue_id, shadow_id in held.items():
            # Of what is known by another queue id here, the answer may be older.
            if shadow_id not in self._queue_ids and queue_id not in known:
                self._note(queue_id, shadow_id)
        self._doubtful -= held.keys()
        self._held = said.held & self._queue_ids.keys()
        now = self.known()
        missing = [
            queue_id
            for queue_id, shadow_id in before.items()
            if held.get(queue_id) != shadow_id
            and queue_id in now
            and queue_id not in self._doubtful
        ]
        self.remove(missing)
        return missing


class Discarder:
    """Keeps the account of all copies and discards those that are needed no more.

    The account is in memory: after a restart :meth:`reconcile` has it again from the holders.

    :param queue: lists the queue files that exist now, each with the queue that it is in. It must
        raise, not return less, when a directory cannot be read.
    :param names: returns the shadow ids that queue files bear, "" for one that has none; one that
        is missing will be told later. HelperError.
    :param needed: returns which of these messages this node has still to carry on: the queue file
        of a try that was refused is gone, and the message is not delivered. StoreError.
    :param acts: whether this node is primary. If not, what shadows have is not its to judge: the
        new primary may need it, whatever has become of the queue files here.
    :param interval: seconds between two listings; none is made while no copy is outstanding.
    """

    def __init__(
        self,
        holders: Iterable[Holder],
        queue: Queue,
        *,
        names: ShadowIds = nameless,
        needed: Needed = none_needed,
        acts: Callable[[], bool] = lambda: True,
        interval: float = 1.0,
    ) -> None:
        self._holders = {holder.name: holder for holder in holders}
        self._copies = {name: Copies() for name in self._holders}
        self._queue = queue
        self._names = names
        self._needed = needed
        self._before: set[str] = set()
        self._acts = acts
        self._interval = interval
        self._doubt = False
        self._deaf: set[str] = set()  # until they are compared with

    def add(self, holder: str, queue_id: str, shadow_id: str, *, sure: bool = True) -> None:
        """``holder`` has a copy of the message in the queue file ``queue_id``, which exists.

        If not ``sure``, it may have one: a store that failed here may have been finished there.
        """
        self._copies[holder].add(queue_id, shadow_id, sure=sure)

    def refused(self, queue_id: str) -> None:
        """The message was not accepted, or is not to be kept: its copies are deleted at discard.

        After a restart that is forgotten, and the safety net keeps a message too many.
        """
        for copies in self._copies.values():
            copies.refused(queue_id)

    def forget(self) -> None:
        """Forget all copies: this node is primary no more, and they are the new primary's."""
        self._copies = {name: Copies() for name in self._holders}

    def counts(self) -> dict[str, int]:
        """Return by holder how many messages in the queue it keeps a copy of."""
        return {name: len(copies) for name, copies in self._copies.items()}

    def covered(self, holder: str) -> dict[str, str]:
        """Return the messages that ``holder`` surely has a copy of: shadow ids by queue id."""
        return self._copies[holder].sure()

    def known(self, holder: str = "") -> dict[str, str]:
        """Return the messages that a holder, or any, has or may have a copy of, likewise."""
        found: dict[str, str] = {}
        for name, copies in self._copies.items():
            if holder in (name, ""):
                found |= copies.known()
        return found

    async def run(self) -> None:
        """Discard once an interval and reconcile now and then, until cancelled."""
        loop = asyncio.get_running_loop()
        reconcile_at = loop.time() + RECONCILE_INTERVAL
        while True:
            await asyncio.sleep(self._interval)
            await self.discard()
            if self._doubt:
                self._doubt = False
                reconcile_at = min(reconcile_at, loop.time() + DOUBT_INTERVAL)
            if loop.time() >= reconcile_at:
                for name in self._mine():
                    try:
                        if missing := (await self.reconcile(name)).missing:
                            log.warning(
                                "%s has lost %d shadow messages: %s",
                                name, len(missing), ", ".join(missing[:20]),
                            )  # fmt: skip
                    except (PeerError, StoreError) as error:
                        log.info("cannot compare with %s now: %s", name, error)
                reconcile_at = loop.time() + RECONCILE_INTERVAL

    def _mine(self) -> list[str]:
        """Return the holders whose copies this node may judge now."""
        return [name for name, holder in self._holders.items() if holder.own or self._acts()]

    async def discard(self) -> None:
        """List the queue once and discard what two listings in a row did not show.

        Tell the shadows what is on hold. Failures wait for the next call.
        """
        if not any(map(len, self._copies.values())):
            return
        for copies in self._copies.values():
            copies.begin_listing()
        try:
            queue = await self._queue()
        except HelperError as error:
            log.warning("the queue cannot be listed, nothing is discarded: %s", error)
            return
        present = set(queue)
        for name in self._mine():
            copies = self._copies[name]
            await self._tell_held(name, copies, queue)
            try:
                gone = await self._gone(copies, copies.judge(present), present & self._before)
            except (HelperError, StoreError) as error:
                log.warning("nothing of %s is discarded: %s", name, error)
                continue
            for delivered, ripe in copies.worth(gone):
                await self._discard(name, copies, list(ripe.items()), delivered=delivered)
            metrics.OUTSTANDING.labels(name).set(len(copies))
        self._before = present

    async def _tell_held(self, name: str, copies: Copies, queue: Mapping[str, str]) -> None:
        if name in self._deaf:
            return
        for held, told in zip((True, False), copies.holds(queue), strict=True):
            for start in range(0, len(told), BATCH):
                batch = told[start : start + BATCH]
                try:
                    known = await self._holders[name].hold(batch, held=held)
                except (PeerError, StoreError) as error:
                    log.info("%s is told later what is on hold: %s", name, error)
                    if getattr(error, "code", "") == "refused":  # an agent of before
                        self._deaf.add(name)
                    return
                # What is still on its way there is told again; what is not there any more is not
                # on hold either.
                copies.heard(known if held else batch, held=held)

    async def _gone(
        self, copies: Copies, ripe: dict[str, str], present: set[str]
    ) -> dict[str, str]:
        """Return those of ``ripe`` whose messages do not go on in another file.

        :param present: the files that two listings have shown: others may be half written.
        """
        needed = await self._needed(set(ripe.values())) if ripe else set()
        ripe = {key: shadow_id for key, shadow_id in ripe.items() if shadow_id not in needed}
        if not ripe:
            return ripe
        oldest = min(ripe)  # a file's id tells its time
        newer = {key for key in present if key > oldest} - copies.known().keys()
        names = {key: value for key, value in self.known().items() if key in newer}
        names |= await self._names(newer - names.keys())
        unread = max(newer - names.keys(), default="")
        files = {shadow_id: queue_id for queue_id, shadow_id in names.items()}
        gone = {}
        for queue_id, shadow_id in ripe.items():
            if file := files.get(shadow_id):
                log.info("%s goes on as %s, with its copy", queue_id, file)
                copies.add(file, shadow_id, sure=False)  # there it bears the old name still
            elif unread < queue_id:
                gone[queue_id] = shadow_id
        return gone

    async def _discard(
        self, name: str, copies: Copies, ripe: list[tuple[str, str]], *, delivered: bool
    ) -> None:
        for start in range(0, len(ripe), BATCH):
            # While others were discarded, a newer queue file may have come to need one.
            batch = [item for item in ripe[start : start + BATCH] if copies.stands(*item)]
            if not batch:
                continue
            shadow_ids = [shadow_id for _, shadow_id in batch]
            try:
                await self._holders[name].discard(shadow_ids, delivered=delivered)
            except (PeerError, StoreError) as error:
                log.info(
                    "%d copies at %s wait for their discard: %s", len(ripe) - start, name, error
                )
                return
            self._doubt |= not copies.sure().keys() >= {queue_id for queue_id, _ in batch}
            copies.remove(queue_id for queue_id, _ in batch)
            self._doubt |= copies.shaken(shadow_ids)

    async def reconcile(self, holder: str) -> Reconciled:
        """Compare what ``holder`` has with what it should have.

        To be called when it was (re)connected and at the start.

        What it has and the queue has not goes by the next two listings. PeerError or StoreError if
        it cannot be asked.
        """
        copies = self._copies[holder]
        self._deaf.discard(holder)
        before = copies.sure()  # what is on its way may come after the answer
        said = await self._holders[holder].listing()
        missing = copies.compare(before, said)
        return Reconciled(len(said.copies), missing)
