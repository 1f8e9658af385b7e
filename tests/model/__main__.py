"""Runs the test and reports: ``tests/lab/lab --name NAME control -- python -m tests.model``.

Exit status: 0 when all held, 1 when something did not, 2 when there is nothing to test.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.faults.field import MAILBOXES, ROOT, Field
from tests.model import report
from tests.model.machine import FAULTS, Run, campaign
from tests.model.world import World

BUILD = ROOT / "build" / "model"
USERS = MAILBOXES[-4:-1]
PACKAGES = "dovecot-core dovecot-imapd dovecot-sieve postfix python3"


def about(ssh: list[str], node: str) -> dict[str, Any]:
    """What was tested: commit, date, kernel, packages."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    versions = subprocess.check_output(
        [*ssh, node, f"dpkg-query -W -f '${{Package}} ${{Version}}\\n' {PACKAGES}"], text=True
    )
    return {
        "commit": described.stdout.strip() or None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "packages": dict(line.split() for line in versions.splitlines()),
    }


def verified(ssh: list[str], node: str) -> list[dict[str, Any]]:
    """What ``umbractl verify --bodies`` says of every user who is not equal on both nodes."""
    done = subprocess.run(
        [*ssh, node, "umbractl verify --bodies --json"], capture_output=True, text=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    results = [row for row in found if "outcome" in row]
    if not results:
        raise RuntimeError(f"umbractl verify compared nobody: {done.stderr[-300:]}")
    return [row for row in results if row["outcome"] != "equal"]


def make(
    operations: int, number: int, faults: tuple[str, ...], output: Path, *, shrink: bool = False
) -> dict[str, Any]:
    """Make one run and write its report; the report."""
    config = os.environ["UMBRA_LAB_SSH_CONFIG"]
    ssh = ["ssh", "-F", config]
    lab = Path(config).parents[1].name
    began = time.monotonic()
    world = World(config, USERS)
    run = Run(world, Field(lab) if faults else None, faults, operations, shrink=shrink)
    error = ""
    try:
        campaign(run, number)
    except Exception:
        error = traceback.format_exc()
        if not run.failures:
            run.failures.append({"what": "the test broke off", "details": error.splitlines()[-5:],
                                 "trace": list(run.trace[-60:])})  # fmt: skip
    different = verified(ssh, world.primary)
    world.close()
    table = report.rows(run.tallies)
    made = {
        "seed": number,
        "seconds": round(time.monotonic() - began, 1),
        **about(ssh, world.primary),
        "users": list(USERS),
        "offered": sorted(run.able),
        "operations": run.operations,
        "by_operation": table,
        "faults": dict(run.struck),
        "failures": run.failures[:1],
        "error": error[-4000:],
        "different": different,
        "goals": report.goals(
            run.operations,
            run.failures[:1],
            len(different),
            sum(run.struck.values()) if faults else None,
            operations,
        ),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(made, indent=2) + "\n")
    print("\n".join(report.lines(table)))
    for failure in run.failures[:1]:
        print(json.dumps(failure, indent=2))
    return made


def main() -> int:
    """Parse the command line, make the run, print the table."""
    parser = argparse.ArgumentParser(prog="tests.model", description=__doc__)
    parser.add_argument("--operations", type=int, default=report.GOAL_OPERATIONS)
    parser.add_argument("--seed", type=int, default=None, help="default: a random one")
    parser.add_argument("--faults", action="store_true", help="with faults in between")
    parser.add_argument("--fault", action="append", choices=FAULTS, metavar="NAME")
    parser.add_argument(
        "--shrink", action="store_true", help="look for the shortest example that fails (minutes)"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if "UMBRA_LAB_SSH_CONFIG" not in os.environ:
        print("Run this on a lab's controller: tests/lab/lab control -- ...", file=sys.stderr)
        return 2
    number = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    faults = tuple(options.fault or (FAULTS if options.faults else ()))
    output = options.output or BUILD / ("faults.json" if faults else "report.json")
    print(f"seed {number}, {options.operations} operations, {len(faults)} faults", flush=True)
    made = make(options.operations, number, faults, output, shrink=options.shrink)
    print(
        f"\nseed {number}: {made['operations']} operations in {made['seconds']:.0f} s,"
        f" {sum(made['faults'].values())} faults; {output}"
    )
    for goal in made["goals"]:
        print(f"{'holds' if goal['holds'] else 'FAILS'}  {goal['name']}: {goal['value']}"
              f" (bound {goal['bound']})")  # fmt: skip
    return 0 if all(goal["holds"] for goal in made["goals"]) else 1


if __name__ == "__main__":
    sys.exit(main())
