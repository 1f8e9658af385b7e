"""The transport as one part of the agent: makes its pieces and joins them to the cluster."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol

from umbra.api.report import Check
from umbra.cluster.group import Group
from umbra.config import Config
from umbra.node.client import NodeHelper
from umbra.peer.exchange import PeerError
from umbra.peer.link import PeerLink
from umbra.peer.server import Handler
from umbra.transport.backfill import BackFill
from umbra.transport.discard import Discarder, Holder, LocalHolder, PeerHolder
from umbra.transport.milter_server import MilterServer
from umbra.transport.ports import Refusal
from umbra.transport.resubmit import Resubmission, Resubmitter
from umbra.transport.service import ShadowService
from umbra.transport.shadowing import Shadowing
from umbra.transport.store import ShadowStore, State, StoreError

log = logging.getLogger(__name__)

STATS_INTERVAL = 1.0
BACK_FILL_PAUSE = 0.2
BACK_FILL_TIMEOUT = 3600.0


class Paths(Protocol):
    """The paths that this part uses."""

    @property
    def state(self) -> Path: ...  # noqa: D102
    @property
    def milter(self) -> Path: ...  # noqa: D102


class _Face:
    """The group as ``transport.ports.Group``."""

    def __init__(self, group: Group) -> None:
        self._group = group

    @property
    def epoch(self) -> int:
        return self._group.epoch

    def accepting(self) -> Refusal | None:
        return self._group.accepting()

    def shadows(self) -> Sequence[PeerLink]:
        return self._group.shadows()

    async def shadow_failed(self, peer: str, reason: str) -> None:
        await self._group.shadow_failed(peer, reason)

    def begin_work(self) -> AbstractContextManager[None]:
        return self._group.messages.begin()


class Messages:
    """Messages in transit, on either side."""

    def __init__(
        self,
        config: Config,
        group: Group,
        helper: NodeHelper,
        paths: Paths,
        delivered: Callable[[str, str], Awaitable[bool]],
    ) -> None:
        self._config = config
        self._group = group
        self._helper = helper
        self._store = ShadowStore(paths.state / "shadow")
        holders: list[Holder] = [
            LocalHolder(self._store, config.node),
            *map(PeerHolder, group.links.values()),
        ]
        self._discarder = Discarder(holders, self._queue_ids)
        resubmissions: dict[str, Resubmission] = {}
        self._shadowing = Shadowing(
            config.node,
            _Face(group),
            self._store,
            self._discarder,
            resubmissions,
            policy=config.transport.shadow_policy,
            timeout=config.transport.shadow_timeout,
        )
        self._milter = MilterServer(paths.milter, self._shadowing)
        self._service = ShadowService(self._store, lambda: group.epoch)
        self._back_fill = BackFill(
            config.node, self._store, self._discarder, lambda: self._shadowing.storing_alone
        )
        self._resubmitter = Resubmitter(
            config.node,
            self._store,
            self._discarder,
            resubmissions,
            queue_ids=self._queue_ids,
            committed_ids=self._committed_ids,
            delivered=delivered,
        )
        self._resubmitting = asyncio.Event()
        self._held = (0, 0)
        self._own = 0

    async def open(self) -> None:
        """Open the store."""
        await self._store.open()

    async def close(self) -> None:
        """Stop listening and close the store; what was not answered is not acknowledged."""
        await self._milter.stop()
        await self._store.close()

    async def listen(self) -> None:
        """Let Postfix in."""
        await self._milter.start()

    def handlers(self) -> dict[str, Handler]:
        """Return the operations of the peer link."""
        return self._service.handlers()

    async def run(self) -> None:
        """Discard, resubmit and count, until cancelled."""
        if self._group.is_primary():  # it was alone and has opened at once
            self._resubmitting.set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._discarder.run())
            tasks.create_task(self._resubmit_when_told())
            tasks.create_task(self._count())

    async def _count(self) -> None:
        while True:
            with suppress(StoreError):
                rows = await self._store.stats()
                held = [row for row in rows if row.state is State.HELD]
                self._held = sum(row.count for row in held), sum(row.bytes for row in held)
                self._own = sum(row.count for row in rows if row.state is not State.HELD)
            await asyncio.sleep(STATS_INTERVAL)

    def held(self) -> tuple[int, int]:
        """Return (messages, bytes) that are held for other nodes; at most a second old."""
        return self._held

    def checks(self) -> Sequence[Check]:
        """Return the findings of this part."""
        return [
            Check(
                "own messages", True, self._own, None,
                f"{self._own} messages are kept here until a shadow has them.",
            )
        ]  # fmt: skip

    async def catch_up(self, peer: str) -> None:
        """Copy to ``peer`` what only this node has; return when nothing is left.

        PeerError or StoreError if it cannot be done now.
        """
        found = await self._discarder.reconcile(peer)
        if found.missing:
            log.warning("%s has lost %d shadow messages", peer, len(found.missing))
        try:
            async with asyncio.timeout(BACK_FILL_TIMEOUT):
                while True:
                    if (await self._back_fill.run(self._group.links[peer])).complete:
                        return
                    await asyncio.sleep(BACK_FILL_PAUSE)
        except TimeoutError:
            raise PeerError("timeout", f"the back-fill of {peer} did not end") from None

    async def prove_caught_up(self, peer: str) -> None:
        """Copy what is left, if anything, at once. PeerError if that is not the end of it."""
        if not (await self._back_fill.run(self._group.links[peer])).complete:
            raise PeerError("catch-up", f"there are still messages that {peer} lacks")

    # -- promotion

    async def take_over(self, origin: str, remaining: Mapping[str, Sequence[str]] | None) -> None:
        """Make ``origin``'s messages this node's to resubmit; see ``cluster.switchover``."""
        self._discarder.forget()
        await self._resubmitter.claim(origin, remaining)

    def covered(self, peer: str) -> set[str]:
        """Return the queue ids of this node's messages that ``peer`` has a copy of."""
        return self._discarder.covered(peer)

    def gave_up(self) -> None:
        """Forget the copies elsewhere: they are the new primary's."""
        self._discarder.forget()

    def resubmit(self) -> None:
        """Begin to resubmit what was taken over."""
        self._resubmitting.set()

    async def _resubmit_when_told(self) -> None:
        while True:
            await self._resubmitting.wait()
            self._resubmitting.clear()
            if not self._group.is_primary():
                continue
            try:
                # What a crash between promotion and claim has left.
                for origin in self._group.links:
                    await self._resubmitter.claim(origin, None)
            except StoreError as error:
                log.error("messages of the former primary cannot be claimed: %s", error)
            report = await self._resubmitter.run()
            if report.resubmitted or report.duplicates or report.finished_before:
                log.info(
                    "resubmitted %d messages, dropped %d duplicates, %d were finished before",
                    report.resubmitted, report.duplicates, report.finished_before,
                )  # fmt: skip

    # -- the queue

    async def _queue_ids(self) -> set[str]:
        return set(await self._helper.queue())

    async def _committed_ids(self) -> set[str]:
        return await self._helper.committed()
