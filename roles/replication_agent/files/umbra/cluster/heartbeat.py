"""Asks each peer for its state, tells it ours, and notices silence."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from umbra.cluster.group import Group
from umbra.config import Heartbeat
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.identity import PeerIdentity
from umbra.peer.link import PeerLink

log = logging.getLogger(__name__)

SAMPLES = 60

NodeStatus = Callable[[], dict[str, Any]]


async def watch(link: PeerLink, group: Group, status: NodeStatus, timing: Heartbeat) -> None:
    """Exchange states with one peer every ``timing.interval`` seconds; runs until cancelled.

    A peer is lost when it has not answered for ``timing.timeout`` seconds, on the monotonic clock,
    counted from the sending of the last request that it answered. An answer that makes no sense is
    none, and told once.
    """
    answered = time.monotonic()
    lost, told = True, ""
    while True:
        sent = time.monotonic()
        try:
            answer = await link.request("status", status(), timeout=timing.timeout)
            group.round_trips.setdefault(link.name, deque(maxlen=SAMPLES)).append(
                time.monotonic() - sent
            )
            await group.heard_from(link.name, answer, answered=True)
            answered = sent
            if lost:
                log.info("%s answers", link.name)
            lost, told = False, ""
        except PeerError as error:
            if error.code == "protocol" and error.text != told:
                told = error.text
                log.error("the answer of %s to a heartbeat does not count: %s", link.name, error)
            if not lost and time.monotonic() - answered >= timing.timeout:
                lost = True
                link.reset()
                log.warning("%s is lost: %s", link.name, error)
            if lost:
                await group.peer_silent(link.name, error.text)
        await asyncio.sleep(max(0.0, sent + timing.interval - time.monotonic()))


def answer(
    group: Group, status: NodeStatus
) -> Callable[[PeerIdentity, Mapping[str, Any], Exchange], Any]:
    """Return the handler of the ``status`` operation."""

    async def handle(peer: PeerIdentity, args: Mapping[str, Any], _: Exchange) -> dict[str, Any]:
        await group.heard_from(peer.node, args, answered=False)
        return status()

    return handle
