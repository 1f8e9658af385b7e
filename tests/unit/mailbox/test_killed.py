"""kill -9 to an agent that records changes: what it answered is on disk, on real files."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from umbra.mailbox.ledger import Ledger

# An agent's part that records: the mirror in its phase "recording" (no peer), with its ledger. It
# answers changes as fast as it can, several at a time, and says of each that it was answered.
RECORDER = """
import asyncio, sys
from contextlib import nullcontext
from pathlib import Path
from umbra.mailbox.ledger import Ledger
from umbra.mailbox.mirror import PeerMirror

class World:
    def is_primary(self): return True
    async def mirror_failed(self, peer, reason, *, lost=True): pass
    def begin_work(self): return nullcontext()
    def progress(self, user): return 0.0
    def cut(self, user=""): pass

async def client(peer, number):
    for turn in range(100_000):
        user = f"u{number}-{turn}"
        await peer.changed(user)
        sys.stdout.write(user + "\\n")
        sys.stdout.flush()

async def main():
    ledger = Ledger(Path(sys.argv[1]), Path(sys.argv[1]))
    await ledger.open()
    world = World()
    peer = PeerMirror("mail-b", world, ledger, world, world, workers=4, timeout=5)
    running = asyncio.create_task(peer.run())
    await asyncio.gather(*(client(peer, f"{sys.argv[2]}-{number}") for number in range(8)))

asyncio.run(main())
"""
KILLS = 8


async def changed(directory: Path) -> set[str]:
    """What an agent that starts finds noted."""
    ledger = Ledger(directory, directory)
    await ledger.open()
    try:
        return set(ledger.changed("mail-b"))
    finally:
        await ledger.close()


def test_what_was_answered_survives_kill_9(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1_000_000)
    print(f"seed {seed}")
    chance = random.Random(seed)
    code = Path(sys.modules["umbra"].__path__[0]).parent
    answered: set[str] = set()
    for life in range(KILLS):
        before = len(answered)
        with subprocess.Popen(
            [sys.executable, "-c", RECORDER, str(tmp_path), str(life)],
            env={**os.environ, "PYTHONPATH": str(code)},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            enough = chance.randrange(1, 400)
            lines = [first, *(process.stdout.readline() for _ in range(enough))]
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
        answered |= {line.strip() for line in lines if line.endswith("\n")}
        assert len(answered) > before, "nothing was recorded, so nothing was tried"
        noted = asyncio.run(changed(tmp_path))
        assert answered <= noted, f"forgotten: {sorted(answered - noted)[:5]}"
