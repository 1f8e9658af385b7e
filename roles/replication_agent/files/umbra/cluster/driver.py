"""Runs the protocol with a witness (``protocol``) on the real world.

One task takes the events, one after the other, and carries out what each asks for, in that order.
Nobody who waits for an event can interrupt that by going away. Requests to the coordinator and to
peers run beside it, each with a time-out, and come back as events.

If the process dies between two effects, the next one starts from what is on disk, fenced. If the
disk refuses an epoch, the driver ends and the agent with it: the kernel closes the ports when the
right that was last written there ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any, Protocol

from umbra.cluster import protocol as p
from umbra.cluster.etcd import EtcdError, Shown, boottime
from umbra.epoch import epoch_of
from umbra.peer.exchange import PeerError

log = logging.getLogger(__name__)

# Requests of one kind that may be under way: a coordinator that hangs must not gather them.
MAX_READS = 3
OPEN_PHASES = (p.Phase.PRIMARY, p.Phase.DRAINING)


class Coordinator(Protocol):
    """The register that holds the group's key; ``etcd.Etcd`` is one."""

    async def read(self, key: str) -> Shown:
        """Return the key as a committed transaction shows it. EtcdError if none answered."""
        ...

    async def swap(self, key: str, revision: int, value: bytes) -> Shown:
        """Write if the key's revision still is ``revision``. EtcdError: the outcome is unknown."""
        ...

    async def silent(self) -> list[str]:
        """Return the voters that are not healthy."""
        ...


Renew = Callable[[str, int], Awaitable[Mapping[str, Any]]]
Nudge = Callable[[str], Awaitable[None]]
Changed = Callable[[p.State, p.State], None]


class Driver:
    """The protocol's state and its effects.

    :param key: name of the group's key in the coordinator.
    :param save: makes a ``Durable`` durable; OSError if it is not.
    :param renew: sends a renewal under an epoch to a peer and returns its answer, with ``storage``,
        ``epoch`` and ``refused`` (None or a sentence); PeerError if there is none.
    :param nudge: tells a peer that the key has changed.
    :param changed: called with the old and the new state, before any effect that leaves the host.
    """

    def __init__(
        self,
        config: p.Config,
        durable: p.Durable,
        *,
        key: str,
        coordinator: Coordinator,
        save: Callable[[p.Durable], Awaitable[None]],
        renew: Renew,
        nudge: Nudge,
        changed: Changed = lambda old, new: None,
        clock: Callable[[], float] = boottime,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.state = p.boot(config.node, durable, clock())
        self.clock = clock
        self.coordinator_error = "it has not been asked yet"
        self.coordinator_answered: float | None = None
        self._key = key
        self._coordinator = coordinator
        self._save = save
        self._renew = renew
        self._nudge = nudge
        self._changed = changed
        self._wall = wall
        self._events: asyncio.Queue[tuple[p.Event, asyncio.Future[str | None] | None]] = (
            asyncio.Queue()
        )
        self._moved = asyncio.Condition()
        self._unsettled = False
        self._ended = False
        self._reading = 0
        self._requests: set[asyncio.Task[None]] = set()

    # -- what may be done now

    def may_act(self) -> bool:
        """Return whether this node is primary now, with everything on disk that this needs."""
        return (
            not self._unsettled
            and self.state.phase in OPEN_PHASES
            and p.may_act(self.config, self.state, self.clock())
        )

    def may_acknowledge(self, epoch: int, stored_by: Collection[str]) -> bool:
        """Return whether what ``stored_by`` have durably under ``epoch`` may be acknowledged."""
        return (
            not self._unsettled
            and self.state.phase in OPEN_PHASES
            and p.may_acknowledge(self.config, self.state, self.clock(), epoch, stored_by)
        )

    def right_until(self) -> float:
        """Return until when this node may act, on CLOCK_BOOTTIME."""
        return float("-inf") if self._unsettled else p.right_until(self.config, self.state)

    def members(self) -> frozenset[str]:
        """Return the peers that any record which may be the committed one names as protected."""
        return frozenset(m.node for record in p.possible(self.state) for m in record.protected)

    # -- events

    async def take(self, event: p.Event) -> str | None:
        """Decide on ``event`` and carry out what follows, up to what is durable.

        Return the answer to an ``Asked``: why it is refused, or None. NotNow if a person's wish
        cannot be granted; OSError if the disk refused.
        """
        if self._ended:
            raise OSError("the agent stops")
        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._events.put_nowait((event, future))
        return await future

    def note(self, event: p.Event) -> None:
        """Decide on ``event`` soon."""
        self._events.put_nowait((event, None))

    async def asked(self, peer: str, epoch: int, *, silence: float | None = None) -> str | None:
        """Return why a peer's request is refused, or None; what it teaches is on disk then.

        :param silence: of a renewal, see ``Asked``.
        """
        if silence is None and not self._unsettled:
            refused = p.refusal(self.state, epoch)
            if refused is not None or epoch == self.state.durable.epoch:
                return refused  # it teaches nothing
        return await self.take(p.Asked(peer, epoch, silence))

    async def write(self, vacancy: p.Vacancy, record: p.Record) -> None:
        """Write the key by an operator's word, past the rules; the outcome is seen as any other."""
        await self._swap(vacancy.revision, record, vacancy.cluster)

    async def until(self, condition: Callable[[], bool], seconds: float | None) -> bool:
        """Wait until ``condition`` holds; False if it does not after so many seconds, if any."""
        try:
            async with asyncio.timeout(seconds), self._moved:
                await self._moved.wait_for(condition)
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Take events and look at the clock until cancelled. OSError if the disk refuses."""
        ticks = asyncio.create_task(self._tick(), name="ticks of the protocol")
        try:
            while True:
                event, future = await self._events.get()
                try:
                    refused = await self._take(event)
                except p.NotNow as error:
                    if future is not None and not future.done():
                        future.set_exception(error)
                    continue
                except BaseException as error:
                    if future is not None and not future.done():
                        future.set_exception(
                            error if isinstance(error, Exception) else OSError("the agent stops")
                        )
                    raise
                if future is not None and not future.done():
                    future.set_result(refused)
                async with self._moved:
                    self._moved.notify_all()
        finally:
            self._ended = True
            for task in (ticks, *self._requests):
                task.cancel()
            await asyncio.gather(ticks, *self._requests, return_exceptions=True)
            while not self._events.empty():
                _, future = self._events.get_nowait()
                if future is not None and not future.done():
                    future.cancel()

    async def _tick(self) -> None:
        while True:
            if self._events.empty():
                self.note(p.Tick())
            await asyncio.sleep(self.config.timing.beat / 4)

    async def _take(self, event: p.Event) -> str | None:
        old = self.state
        new, effects = p.step(self.config, old, event, self.clock(), self._wall())
        # Between a decision and the disk nothing may be done that needs it; what is forbidden now
        # is forbidden at once. What is on disk too early is harmless, so that comes first.
        durables = [effect.durable for effect in effects if isinstance(effect, p.Persist)]
        self._unsettled = bool(durables)
        self.state = new
        if durables:
            await self._save(durables[-1])
            self._unsettled = False
        self._changed(old, new)
        for effect in effects:
            self._begin(effect)
        return next((effect.refused for effect in effects if isinstance(effect, p.Reply)), None)

    # -- effects

    def _begin(self, effect: p.Effect) -> None:
        """Start what leaves this host. Open and Close are the business of ``changed``."""
        match effect:
            case p.Renew(epoch):
                for peer in self.config.peers:
                    self._start(self._send_renewal(peer, epoch, self.clock()))
            case p.Read() if self._reading < MAX_READS:
                self._start(self._read())
            case p.Swap(revision, record):
                vacancy = self.state.vacancy if self.state.known is None else None
                cluster = vacancy.cluster if vacancy else self.state.cluster
                self._start(self._swap(revision, record, cluster))
            case p.Nudge(peer):
                self._start(self._send_nudge(peer))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)

    async def _send_renewal(self, peer: str, epoch: int, sent: float) -> None:
        try:
            async with asyncio.timeout(self.config.timing.miss):
                answer = await self._renew(peer, epoch)
            refused, theirs = answer["refused"], epoch_of(answer["epoch"])
            storage = str(answer["storage"])
        except (PeerError, TimeoutError):
            return  # a lost answer extends nothing
        except (KeyError, TypeError, ValueError) as error:
            log.warning("%s answered a renewal with nonsense: %r", peer, error)
            return
        if refused is None:
            self.note(p.Answered(peer, sent, epoch, storage))
        elif theirs > epoch:
            self.note(p.Superseded(theirs))

    async def _send_nudge(self, peer: str) -> None:
        try:
            async with asyncio.timeout(self.config.timing.call):
                await self._nudge(peer)
        except (PeerError, TimeoutError):
            pass  # it reads the key by itself at its next beat

    async def _read(self) -> None:
        self._reading += 1
        try:
            self._show(await self._coordinator.read(self._key))
        except EtcdError as error:
            self._fails(error)
        finally:
            self._reading -= 1

    async def _swap(self, revision: int, record: p.Record, cluster: str) -> None:
        log.warning(
            "asking for: %s holds epoch %d, %s%s%s",
            record.holder, record.epoch, record.mode,
            f" with {', '.join(sorted(m.node for m in record.protected))}"
            if record.protected else "",
            ", paused" if record.paused else "",
        )  # fmt: skip
        try:
            row = {**record.to_json(), "cluster": cluster}
            value = json.dumps(row, separators=(",", ":")).encode()
            self._show(await self._coordinator.swap(self._key, revision, value))
        except EtcdError as error:
            # Committed now, later or never: only a greater revision tells.
            self._fails(error)

    def _fails(self, error: EtcdError) -> None:
        if not self.coordinator_error:
            log.warning("the coordinator does not answer: %s", error)
        self.coordinator_error = str(error)

    def _show(self, shown: Shown) -> None:
        record = restored = None
        try:
            if shown.value is not None:
                row = json.loads(shown.value)
                record = p.Record.from_json(row)
                if row.get("cluster", shown.cluster) != shown.cluster:
                    record, restored = None, record
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            self._fails(EtcdError(f"the key {self._key} makes no sense: {error!r}"))
            return
        seen = p.Seen(shown.sent, shown.revision, record, shown.cluster, restored)
        if record is None and self.state.known is not None:
            # To a group that runs this is as good as no answer, until a person says who is primary.
            self._fails(EtcdError(str(p.Vacancy(shown.cluster, shown.revision, restored))))
            self.note(seen)
            return
        if self.coordinator_error:
            log.info("the coordinator answers")
        self.coordinator_error = ""
        self.coordinator_answered = shown.sent
        self.note(seen)
