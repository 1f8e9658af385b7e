"""Looks when changes become visible on this host: the benchmark runs it on the replica.

Usage: ``watch.py PORT USER PASSWORD MAILBOX OPERATION COUNT SECONDS``. Asks ``NOOP`` once a
millisecond and prints, after a line ``ready``, a JSON list: the monotonic time at which the n-th
change was seen, null for one that did not come within the time. Standard library only.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from load import Imap  # type: ignore[import-not-found]

STEP = 0.001
# Longer than mailboxes that are mirrored asynchronously are left alone.
QUIET, PATIENCE = 3.0, 30.0


async def settled(imap: Imap, mailbox: str) -> int:
    """Select the mailbox when what was changed before has arrived; return its messages."""
    until = time.monotonic() + PATIENCE
    while b" OK" not in (await imap.do(f"SELECT {mailbox}", may_fail=True))[-1]:
        if time.monotonic() > until:
            raise SystemExit(f"there is no mailbox {mailbox}")
        await asyncio.sleep(QUIET / 10)
    quiet = time.monotonic() + QUIET
    while (now := time.monotonic()) < quiet:
        if now > until:
            raise SystemExit(f"changes of {mailbox} do not cease to arrive")
        if len(await imap.do("NOOP")) > 1:
            quiet = now + QUIET
        await asyncio.sleep(QUIET / 10)
    selected = b"".join(await imap.do(f"SELECT {mailbox}"))
    found = re.search(rb"\* (\d+) EXISTS", selected)
    assert found
    return int(found[1])


async def main(
    port: int, user: str, password: str, mailbox: str, operation: str, count: int, seconds: float
) -> list[float | None]:
    """Watch until all have been seen or the time is up."""
    imap = await Imap.login(port, user, password)
    before = await settled(imap, mailbox)
    print("ready", flush=True)
    seen: list[float | None] = [None] * count
    until = time.monotonic() + seconds
    while None in seen and time.monotonic() < until:
        lines = b"".join(await imap.do("NOOP"))
        now = time.monotonic()
        if operation == "append":
            for number in re.findall(rb"\* (\d+) EXISTS", lines):
                for place in range(min(int(number) - before, count)):
                    seen[place] = seen[place] or now
        else:
            for number in re.findall(rb"\* (\d+) FETCH", lines):
                # Two changes of each message, one after the other.
                place = 2 * int(number) - 2
                place += place < count and seen[place] is not None
                if place < count and seen[place] is None:
                    seen[place] = now
        await asyncio.sleep(STEP)
    return seen


if __name__ == "__main__":
    _, port, user, password, mailbox, operation, count, seconds = sys.argv
    times = asyncio.run(
        main(int(port), user, password, mailbox, operation, int(count), float(seconds))
    )
    print(json.dumps(times))
