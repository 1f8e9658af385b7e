"""Has the shadow hold messages that nobody sent, and takes them back. Run on the primary.

Usage: ``hold.py store FROM TO EPOCH`` and ``hold.py discard FROM TO EPOCH``. It speaks to the
shadow's agent as the primary's does, over the peer link, with the node's own key.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import uvloop

from umbra.config import load
from umbra.peer import frames
from umbra.peer.identity import Identity
from umbra.peer.link import PeerLink
from umbra.transport import wire
from umbra.transport.discard import BATCH
from umbra.transport.envelope import Envelope, Recipient

AT_ONCE = 32
SIZE = 1024
TIMEOUT = 60.0


def shadow_id(number: int) -> str:
    """Always the same one, and none that a real message can have."""
    return f"{number:032x}"


async def main(what: str, begin: int, end: int, epoch: int) -> None:
    """Store or discard the messages from ``begin`` up to ``end``."""
    config = load(Path("/etc/umbra/agent.yml"))
    [peer] = config.peers
    hello = {
        "version": frames.VERSION,
        "group": config.group,
        "node": config.node,
        "storage_id": "benchmark",
    }
    identity = Identity(Path("/etc/umbra/tls"), {peer.name: None})
    link = PeerLink(peer.name, peer.address, peer.port, identity, hello, lambda: epoch)
    envelope = Envelope(
        sender="bench@example.net",
        recipients=(Recipient("bench@example.org"),),
        received=time.time(),
    )
    content = (b"x" * 62 + b"\r\n") * (SIZE // 64)
    numbers = iter(range(begin, end))

    async def store() -> None:
        for number in numbers:
            args, _ = wire.arguments(shadow_id(number), f"4bench{number:08d}", envelope)
            async with link.exchange("shadow-store", args, timeout=TIMEOUT) as exchange:
                await exchange.send(content)
                await exchange.result()

    if what == "store":
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(store())
    else:
        for start in range(begin, end, BATCH):
            ids = [shadow_id(number) for number in range(start, min(start + BATCH, end))]
            # Never accepted, so that the safety net does not keep them.
            args = {"shadow_ids": ids, "delivered": False}
            await link.request("shadow-discard", args, timeout=TIMEOUT)
    link.reset()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], *map(int, sys.argv[2:])))
