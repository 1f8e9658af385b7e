"""A milter that does nothing: what any milter costs Postfix. Run on a mail host by the benchmark.

It speaks the protocol with the agent's own codec, so the difference to the agent is what the agent
does with a message, not how it reads it.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvloop

from umbra.transport.milter import ACCEPT, Flow, Transaction
from umbra.transport.milter_server import MilterServer


class Nothing:
    """Takes every message and looks at none."""

    def mail(self, transaction: Transaction) -> bytes | None:
        """Go on."""
        return None

    def message(self, transaction: Transaction, flow: Flow) -> Nothing:
        """The same for every message."""
        return self

    def header(self, name: bytes, lines: bytes) -> None:
        """Drop it."""

    def body(self, data: bytes) -> None:
        """Drop it."""

    async def finish(self) -> bytes:
        """Accept."""
        return ACCEPT

    def abort(self) -> None:
        """Nothing to undo."""


async def main(path: Path) -> None:
    """Serve until the unit is stopped."""
    server = MilterServer(path, Nothing())
    await server.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1])))
