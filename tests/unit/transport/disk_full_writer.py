"""A store on a small file system that somebody else fills while messages are written.

Usage: ``disk_full_writer.py DIRECTORY``, the mount point. Prints what happened as JSON; fails if
something that was acknowledged is not there, or if anything but StoreFull was raised.
"""

import asyncio
import errno
import hashlib
import json
import os
import random
import sys
from pathlib import Path

from tests.unit.transport.support import ENVELOPE, content

from umbra.transport import discard, ids
from umbra.transport.store import RESERVE as DEFAULT
from umbra.transport.store import ShadowStore, State, StoreFull

RESERVE = 16 * 1024 * 1024  # over what the log of the database may grow to
STEP = discard.BATCH * RESERVE // DEFAULT


async def main(mount: Path) -> None:
    store = ShadowStore(mount / "s", reserve=RESERVE)
    await store.open()
    acknowledged: dict[str, str] = {}
    refused = in_the_middle = 0
    done = False

    async def work(size: int) -> None:
        nonlocal refused, in_the_middle
        while not done:
            shadow_id, data = ids.new(), os.urandom(size)
            writer = store.begin(shadow_id, origin="a", queue_id="q", envelope=ENVELOPE, epoch=1)
            try:
                for start in range(0, size, 65536):
                    await writer.write(data[start : start + 65536])
                await writer.commit()
                acknowledged[shadow_id] = hashlib.sha256(data).hexdigest()
            except StoreFull as error:
                refused += 1
                in_the_middle += "no room" in str(error)  # the disk said it, not our own check
                await asyncio.sleep(0.005)
            finally:
                writer.abort()

    async def until(condition: object) -> None:
        async with asyncio.timeout(30):
            while not condition():  # type: ignore[operator]  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    workers = [asyncio.create_task(work(size)) for size in (100, 4096, 4096, 100_000, 1_500_000)]
    await until(lambda: len(acknowledged) > 20)
    # In the middle of all this another program takes what is left, the reserve too; and the store
    # does not look before it writes, so that every write runs into the end of the disk.
    store._reserve = -(1 << 40)
    await asyncio.to_thread(fill, mount / "other", mount)
    await until(lambda: refused > 50)
    at_full = len(acknowledged)
    (mount / "other").unlink()
    store._reserve = RESERVE
    await until(lambda: len(acknowledged) > at_full + 20)  # it has recovered by itself
    before = refused
    await until(lambda: refused > before + 50)  # and now fills the disk itself
    done = True
    await asyncio.gather(*workers)

    # What it keeps free is enough to empty itself, in steps of its size: 1000 for 64 MiB.
    gone = random.sample(sorted(acknowledged), len(acknowledged) // 2)
    for start in range(0, len(gone), STEP):
        step = gone[start : start + STEP]
        assert len(await store.discard(step, origin="a")) == len(step)
    for shadow_id in gone:
        del acknowledged[shadow_id]
    await store.close()

    store = ShadowStore(mount / "s", reserve=RESERVE)
    await store.open()
    held = {meta.shadow_id: meta async for meta in store.in_order(State.HELD)}
    for shadow_id, digest in acknowledged.items():
        data = await content(store.content(held[shadow_id]))
        assert hashlib.sha256(data).hexdigest() == digest
    strays = set(os.listdir(store._spool)) - {meta.file for meta in held.values()}
    await store.close()
    print(
        json.dumps(
            {
                "acknowledged": len(acknowledged),
                "at_full": at_full,
                "refused": refused,
                "in_the_middle": in_the_middle,
                "unacknowledged": len(held.keys() - acknowledged.keys()),
                "strays": len(strays),
            }
        )
    )


def fill(path: Path, mount: Path) -> None:
    """Take all the room there is."""
    with path.open("wb", buffering=0) as file:
        for size in (262144, 4096, 512):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    assert os.statvfs(mount).f_bavail * os.statvfs(mount).f_bsize < RESERVE


asyncio.run(main(Path(sys.argv[1])))
