"""kill -9 in the middle of commits: everything that was acknowledged is there, whole."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from pathlib import Path

from tests.unit.transport.support import content

from umbra.transport.store import ShadowStore, State

ROOT = Path(__file__).parents[3]
ROUNDS = 4


async def killed_after(directory: Path, seconds: float) -> dict[str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.unit.transport.crash_writer",
        str(directory),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}/roles/replication_agent/files:{ROOT}"},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    first = await process.stdout.readline()
    await asyncio.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    rest = await process.stdout.read()
    await process.wait()
    return dict(line.split() for line in (first + rest).decode().splitlines())


async def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    acknowledged: dict[str, str] = {}
    for turn in range(ROUNDS):
        told = await killed_after(tmp_path / "s", 0.3 + 0.17 * turn)
        assert told
        acknowledged |= told
        store = ShadowStore(tmp_path / "s")
        await store.open()
        held = {meta.shadow_id: meta async for meta in store.in_order(State.HELD)}
        assert acknowledged.keys() <= held.keys()
        for shadow_id, digest in told.items():
            data = await content(store.content(held[shadow_id]))
            assert hashlib.sha256(data).hexdigest() == digest
        # No file without a row is left either.
        files = {meta.file for meta in held.values() if meta.file}
        assert set(os.listdir(store._spool)) == files
        await store.close()
