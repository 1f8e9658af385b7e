"""Stores messages until it is killed; prints the id of each one that was acknowledged."""

import asyncio
import hashlib
import os
import sys
from pathlib import Path

from tests.unit.transport.support import ENVELOPE

from umbra.transport import ids
from umbra.transport.store import ShadowStore


async def main() -> None:
    store = ShadowStore(Path(sys.argv[1]))
    await store.open()

    async def work(size: int) -> None:
        while True:
            shadow_id, data = ids.new(), os.urandom(size)
            writer = store.begin(shadow_id, origin="a", queue_id="q", envelope=ENVELOPE, epoch=1)
            for start in range(0, size, 65536):
                await writer.write(data[start : start + 65536])
            await writer.commit()
            # One write, so that a line is there whole or not at all.
            os.write(1, f"{shadow_id} {hashlib.sha256(data).hexdigest()}\n".encode())

    await asyncio.gather(*(work(size) for size in (100, 4096, 4096, 100_000, 400_000)))


asyncio.run(main())
