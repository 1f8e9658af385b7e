"""What a former primary's queue still has of what it has handed over.

The new primary has it durably, and carries it on: that brings it to a shadow again, one message
after the other. Until then the queue file here, which is on hold, is the other copy. Then it is
deleted. If the new primary is lost before and this node takes over, what was not carried on there
is released here, and Postfix goes on with it; not what was on hold before the handover. So is what
the new primary could not carry on at all, once this node is primary again.

If a node that may never have had them is promoted by force, its word says nothing of them: they
stay on hold. If this agent dies before, the files stay on hold for the administrator, as after a
failover.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Set
from typing import Protocol

from umbra.cluster.group import Group
from umbra.node.client import NodeHelper
from umbra.node.helper import HelperError
from umbra.peer.exchange import PeerError
from umbra.transport.store import StoreError

log = logging.getLogger(__name__)

INTERVAL = 1.0
TIMEOUT = 5.0


class Messages(Protocol):
    """What this needs of the transport."""

    async def passed_on(self, shadow_ids: Mapping[str, str], since: int) -> set[str]:
        """Return the queue ids of what came back here, as a shadow's copy, since that epoch.

        :param shadow_ids: by queue id. StoreError if that cannot be told.
        """
        ...


class LeftBehind:
    """Queue files of a former primary. Losing the object loses nothing but their tidying."""

    def __init__(self, group: Group, helper: NodeHelper, messages: Messages) -> None:
        self._group = group
        self._helper = helper
        self._messages = messages
        self._files: Mapping[str, str] = {}
        self._held: Set[str] = frozenset()
        self._since = 0
        self._put = asyncio.Event()

    def put(self, files: Mapping[str, str], since: int, held: Set[str] = frozenset()) -> None:
        """Tidy these up when it is time to: shadow ids by queue id.

        They are on hold, and were handed over to the primary of epoch ``since``.

        :param held: those that were on hold before, so that releasing them is not for us.
        """
        # What could not be tidied up since an earlier handover stays to be.
        self._since = min(since, self._since) if self._files else since
        self._held = (self._held & self._files.keys()) | held
        self._files = {**self._files, **files}
        self._put.set()

    async def finish(self, primary: str) -> None:
        """Tidy up now: the primary hands over, so it has nothing left to carry on.

        Dying before leaves all on hold.
        """
        files, self._files = self._files, {}
        if not files:
            return
        if self._forced():
            log.error(
                "%d messages stay on hold here: who carried them on was replaced by force: %s",
                len(files), ", ".join(sorted(files)[:20]),
            )  # fmt: skip
            return
        try:
            left, parked = await self._outstanding(primary)
            if left:
                # Such as what somebody has told it to try again just now: ``run`` finds out.
                self._files = files
                return
            self._files = {key: value for key, value in files.items() if value in parked}
            await self._helper.queue_delete(sorted(files.keys() - self._files.keys()))
        except (PeerError, HelperError) as error:
            log.error("%d messages stay on hold here, although delivered: %s", len(files), error)

    async def run(self) -> None:
        """Do that, until cancelled."""
        while True:
            await self._put.wait()
            self._put.clear()
            while self._files:
                try:
                    files = self._files
                    if self._group.is_primary():
                        await self._release(files)
                    else:
                        done = await self._carried_on(files)
                        await self._helper.queue_delete(sorted(done))
                        self._forget(done)
                except (PeerError, HelperError, StoreError) as error:
                    log.info("what was handed over stays on hold here for now: %s", error)
                if self._files:
                    await asyncio.sleep(INTERVAL)

    async def _carried_on(self, files: Mapping[str, str]) -> Set[str]:
        """Return of which ``files`` the primary, whoever that is by now, needs no copy here.

        That is of none while there is anything left that only it has.
        """
        primary = self._group.primary()
        if primary is None or self._forced():
            return set()
        left, parked = await self._outstanding(primary)
        return set() if left else {key for key, value in files.items() if value not in parked}

    async def _outstanding(self, primary: str) -> tuple[bool, Set[str]]:
        """Return whether ``primary`` has messages left, and the ids of those that it set aside."""
        link = self._group.links[primary]
        answer = await link.request("shadow-outstanding", {}, timeout=TIMEOUT)
        parked = answer.get("parked", [])
        if not isinstance(parked, list) or not all(isinstance(item, str) for item in parked):
            raise PeerError("protocol", f"{primary} does not say what it has set aside")
        return answer.get("messages") != 0, set(parked)

    def _forced(self) -> bool:
        """Whether a node has been promoted by force since, which may never have had them."""
        return self._group.whole_since() > self._since

    def _forget(self, files: Collection[str]) -> None:
        # Not all: a handover may have put others meanwhile.
        self._files = {key: value for key, value in self._files.items() if key not in files}

    async def _release(self, files: Mapping[str, str]) -> None:
        """Go on with what the lost primary had not carried on.

        With what it had, this node goes on by the copy. One that it had delivered elsewhere, and
        that the safety net does not keep, is repeated.
        """
        passed_on = await self._messages.passed_on(files, self._since)
        await self._helper.queue_delete(sorted(passed_on))
        left = sorted(files.keys() - passed_on - self._held)
        await self._helper.queue_release(left)
        self._forget(files)
        if left:
            log.warning("%d messages that had been handed over are this node's again", len(left))
