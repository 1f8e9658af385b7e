"""Waits until the mirror has all changes: run on the primary by the benchmark.

Usage: ``settle.py ADDRESS MODE SECONDS``; asks the agent's API at that address of the tunnel.
Standard library only.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from typing import Any

STEP = 0.05


def settled(status: dict[str, Any], mode: str) -> bool:
    """Whether the mirror has all changes and nothing but the mode keeps it from protected.

    Of this node: with a coordinator, a restart of its agent may have another one take over.
    """
    if status["primary"] != status["node"]:
        return False
    if mode == "sync":
        return bool(status["protected"])
    lacks = sum(node["lag_changes"] for node in status["nodes"])
    return not lacks and all("asynchronous" in reason for reason in status["reasons"])


def main(address: str, mode: str, seconds: float) -> None:
    """Ask until it is so; SystemExit if the time is up."""
    until = time.monotonic() + seconds
    status: dict[str, Any] = {}
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://{address}:8687/status", timeout=5) as answer:
                status = json.load(answer)
        except OSError:  # it is just starting
            status = {}
        if status and settled(status, mode):
            return
        time.sleep(STEP)
    raise SystemExit(
        f"the mirror does not settle: {status.get('primary')} is primary; {status.get('reasons')}"
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
