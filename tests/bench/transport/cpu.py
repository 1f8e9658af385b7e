#!/usr/bin/env python3
"""CPU time of both agents' transport for each message, without a lab or Postfix.

What is reported is user and system time of primary and shadow, and the rate at which the driver,
which speaks the milter protocol as Postfix does, was answered.

With ``--against DIR`` the package in DIR (a ``files`` folder of the role, of another commit) is
measured too, turn by turn, so that drift of the machine hits both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.bench.transport import pair

WARM_UP = 200


def main() -> None:
    """Measure turn by turn and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--messages", type=int, default=3000)
    parser.add_argument("--connections", type=int, default=10)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, metavar="DIR")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write cProfile data there")
    options = parser.parse_args()
    packages = {"this tree": pair.FILES}
    if options.against:
        packages["against"] = options.against.resolve()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in packages}
    for turn in range(options.rounds):
        for name, files in packages.items():
            result = _measure(files, options)
            results[name].append(result)
            text = "  ".join(f"{key} {value:.3f}" for key, value in result.items())
            print(f"{turn + 1}/{options.rounds} {name:10} {text}", flush=True)
    print()
    for name, rows in results.items():
        medians = "  ".join(
            f"{key} {statistics.median(row[key] for row in rows):.3f}" for key in rows[0]
        )
        print(f"median {name:10} {medians}")


def _measure(files: Path, options: argparse.Namespace) -> dict[str, float]:
    with (
        tempfile.TemporaryDirectory() as name,
        pair.running(Path(name), files, options.profile) as both,
    ):
        both.drive(WARM_UP, options.connections, options.size)
        before = both.primary.cpu(), both.shadow.cpu()
        started = time.perf_counter()
        waits = both.drive(options.messages, options.connections, options.size)
        seconds = time.perf_counter() - started
        primary, shadow = (
            (part.cpu() - was) / options.messages * 1000
            for part, was in zip((both.primary, both.shadow), before, strict=True)
        )
        return {
            "cpu_ms": primary + shadow,
            "primary_ms": primary,
            "shadow_ms": shadow,
            "messages_s": options.messages / seconds,
            "p50_ms": statistics.median(waits) * 1000,
        }


if __name__ == "__main__":
    main()
