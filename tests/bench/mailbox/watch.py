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


async def main(
    port: int, user: str, password: str, mailbox: str, operation: str, count: int, seconds: float
) -> list[float | None]:
    """Watch until all have been seen or the time is up."""
    imap = await Imap.login(port, user, password)
    selected = b"".join(await imap.do(f"SELECT {mailbox}"))
    found = re.search(rb"\* (\d+) EXISTS", selected)
    assert found
    before = int(found[1])
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
                if int(number) <= count:
                    seen[int(number) - 1] = seen[int(number) - 1] or now
        await asyncio.sleep(STEP)
    return seen


if __name__ == "__main__":
    _, port, user, password, mailbox, operation, count, seconds = sys.argv
    times = asyncio.run(
        main(int(port), user, password, mailbox, operation, int(count), float(seconds))
    )
    print(json.dumps(times))
