"""Makes trials and reports: ``python -m tests.faults --lab NAME [--trials N] [--seed N]``.

Exit status: 0 when every trial held, 1 when one did not, 2 when the lab cannot be tested.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.faults import load, report
from tests.faults.actions import all_taken_back
from tests.faults.catalogue import BY_NAME, FAULTS, SELECTION, THREE, WITNESS
from tests.faults.field import INVENTORY, INVENTORY_THREE, ROOT, Field, FieldError
from tests.faults.schedule import schedule
from tests.faults.trial import Result, make

BUILD = ROOT / "build" / "faults"
PACKAGES = ("postfix", "dovecot-core", "python3", "nftables")


def about(field: Field) -> dict[str, Any]:
    """What was tested: commit, date, kernel, packages."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = field.run(
        field.nodes[0], "dpkg-query -W -f '${Package} ${Version}\\n' $@", *PACKAGES
    )
    return {
        "commit": commit or None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "packages": dict(line.split() for line in versions.splitlines()),
    }


def campaign(field: Field, seed: int, faults: list[str], trials: int, output: Path) -> list[Result]:
    """Make all trials; a group that is not protected after one is repaired, or the run ends."""
    began = time.monotonic()
    results: list[Result] = []
    described = about(field)
    stem = datetime.now(UTC).strftime("%Y%m%d%H%M%S")
    output.parent.mkdir(parents=True, exist_ok=True)
    for plan in schedule(seed, faults, trials):
        run = f"{stem}-{plan.number}"
        result = make(field, BY_NAME[plan.fault], plan, run, output.parent / "failed")
        results.append(result)
        print(report.line(result, trials), flush=True)
        # After each trial: a run that is stopped leaves what it has found.
        found = report.report(seed, results, described, time.monotonic() - began)
        output.write_text(json.dumps(found, indent=2) + "\n")
        if result.reasons:
            all_taken_back(field)
    return results


def main() -> int:
    """Parse the command line, make the trials, print the table."""
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--lab", required=True, help="name of a lab that site has set up")
    parser.add_argument("--trials", type=int, default=None, help="default: 200, or the selection")
    parser.add_argument("--seed", type=int, default=None, help="default: a random one")
    parser.add_argument("--fault", action="append", choices=list(BY_NAME), metavar="NAME")
    parser.add_argument(
        "--selection", action="store_true", help="the few faults of `make test`, each once"
    )
    parser.add_argument(
        "--witness", action="store_true", help="the faults of a group whose coordinator is etcd"
    )
    parser.add_argument("--three", action="store_true", help="the faults of three mail hosts")
    parser.add_argument("--output", type=Path, default=BUILD / "transport.json")
    parser.add_argument("--list", action="store_true", help="print the faults' names and end")
    options = parser.parse_args()
    if options.list:
        print("\n".join(BY_NAME))
        return 0
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    catalogue = THREE if options.three else WITNESS if options.witness else FAULTS
    faults = list(SELECTION) if options.selection else [fault.name for fault in catalogue]
    faults = options.fault or faults
    trials = options.trials or (len(faults) if options.selection else report.GOAL_TRIALS)
    print(f"seed {seed}, {trials} trials of {len(faults)} faults", flush=True)
    field = Field(options.lab, INVENTORY_THREE if options.three else INVENTORY)
    try:
        field.wait_protected(60)
        load.install(field)
        for node in field.nodes:
            field.run(node, "sync")  # only what a trial writes may be lost in its power cut
        results = campaign(field, seed, faults, trials, options.output)
    except FieldError as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2
    print()
    print("\n".join(report.lines(results)))
    print(f"\nseed {seed}; {options.output}")
    return 1 if any(result.reasons for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
