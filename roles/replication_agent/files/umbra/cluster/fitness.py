"""Looks after the host: whether it is fit to be primary. What follows of that, others decide.

All that is remembered is in memory: an agent that dies begins to count anew, which at worst keeps
an ailing primary for some crashes more.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from umbra.api.report import Check
from umbra.cluster import ailing
from umbra.config import HandoverRules
from umbra.node.client import NodeHelper
from umbra.node.helper import HelperError

log = logging.getLogger(__name__)

PAUSE = 2.0
MAIL, QUEUE = Path("/var/vmail"), Path("/var/spool/postfix")
OWN, VOTER = Path("/var/lib/umbra"), Path("/var/lib/umbra-coordinator")


def free_space(paths: Sequence[Path] = (MAIL, QUEUE, OWN, VOTER)) -> dict[str, int]:
    """Return the bytes that are free on each file system, by the first path on it.

    What is not there, or has no limit, is not full.
    """
    found: dict[int, tuple[str, int]] = {}
    for path in paths:
        try:
            device, free = os.stat(path).st_dev, room(path)
        except OSError:
            continue
        if free is not None:
            found.setdefault(device, (str(path), free))
    return dict(found.values())


def room(path: Path) -> int | None:
    """Return the bytes that are free on a path's file system; None if it has no limit. OSError.

    One without free inodes has none.
    """
    stats = os.statvfs(path)
    if not stats.f_blocks:
        return None
    return 0 if stats.f_files > 0 and stats.f_favail == 0 else stats.f_bavail * stats.f_frsize


class Fitness:
    """What speaks against this host as primary: crashes, full disks, clients out of reach."""

    def __init__(self, settings: HandoverRules, helper: NodeHelper) -> None:
        self._rules = ailing.Rules(settings.crashes, settings.window, settings.free * 2**20)
        self._probes = settings.client_probes
        self._helper = helper
        self._history = ailing.History()
        self._crashed: list[str] = []
        self._restarts: int | None = None
        self._told: list[str] = []
        self._blind = ""
        self.free: Callable[[], Mapping[str, int]] = free_space

    def crashed(self, server: str) -> None:
        """Note that a mail server has crashed."""
        self._crashed.append(server)

    def ailments(self) -> list[str]:
        """Return why another node should be primary; what has just begun is no reason yet."""
        return ailing.ailments(self._rules, self._history, time.monotonic())

    def doubts(self) -> list[str]:
        """Return the same with what has just begun: such a node is not the better one."""
        return ailing.ailments(replace(self._rules, settle=0.0), self._history, time.monotonic())

    def check(self) -> Check:
        """Return the finding for the operator."""
        found = [*self.ailments(), *([self._blind] if self._blind else [])]
        text = "; ".join(found) if found else "Nothing speaks against this node as primary"
        return Check("fit to be primary", not found, len(found), 0, f"{text}.")

    async def run(self, on_ailing: Callable[[Sequence[str]], Awaitable[None]]) -> None:
        """Look every two seconds until cancelled.

        :param on_ailing: called after each look that leaves ailments, with these.
        """
        while True:
            seen = await self._look()
            self._history = ailing.observe(self._rules, self._history, seen, time.monotonic())
            found = self.ailments()
            if found != self._told:
                log.warning("fit to be primary: %s", "; ".join(found) if found else "yes, again")
                self._told = found
            if found:
                await on_ailing(found)
            await asyncio.sleep(PAUSE)

    async def _look(self) -> ailing.Observed:
        clients, blind = None, ""
        try:
            self._count(await self._helper.dovecot_restarts())
            if self._probes:
                clients = await self._helper.reach(self._probes)
        except HelperError as error:
            blind = str(error)
        if blind and blind != self._blind:
            log.warning("whether this node is fit to be primary cannot be told: %s", blind)
        self._blind = blind
        crashed, self._crashed = tuple(self._crashed), []
        # A disk that hangs here has no proof of work either, so another node takes over.
        free = await asyncio.to_thread(self.free) if self._rules.least_free else {}
        return ailing.Observed(crashed, free, clients)

    def _count(self, restarts: int) -> None:
        """Note Dovecot's crashes; a person's restart sets systemd's count back to 0."""
        before, self._restarts = self._restarts, restarts
        if before is not None and restarts > before:
            self._crashed += ["Dovecot"] * (restarts - before)
