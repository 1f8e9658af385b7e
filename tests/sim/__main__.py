"""Simulate for as long as asked: ``python -m tests.sim --seconds 600 --seed 1``.

The seed of each run is the first one plus its number; ``--only SEED`` runs one again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from tests.sim.faults import Count, episode
from tests.sim.world import Violation


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="CPU time to spend")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run")
    parser.add_argument("--only", type=int, help="run this seed alone")
    arguments = parser.parse_args()
    count, broken, runs = Count(), [], 0
    seed = arguments.seed if arguments.only is None else arguments.only
    while time.process_time() < arguments.seconds:
        try:
            count.add(*episode(seed))
        except Violation as violation:
            broken.append(str(violation))
            print(violation, file=sys.stderr)
        runs += 1
        seed += 1
        if arguments.only is not None:
            break
    print(
        json.dumps(
            {
                "seeds": [seed - runs, seed - 1],
                "simulated_hours": round(count.seconds / 3600, 2),
                "faults": count.faults,
                "changes_of_epoch": count.changes,
                "acknowledged": count.acknowledged,
                "cpu_seconds": round(time.process_time(), 1),
                "violations": broken,
            },
            indent=2,
        )
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
