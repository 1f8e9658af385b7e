"""Another version of the collection while mail flows, and back: ``make upgrade FROM=COMMIT``.

A group that the former version has set up gets this one by ``umbra.mail.site``, the former one
again, and this one once more. After each of these the primary moves. All under load, with every
message and change accounted for on both nodes, as in ``tests/faults``.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from plugins.module_utils import _accounting as accounting
from tests.faults import actions, load
from tests.faults.field import ROOT, Field, FieldError
from tests.faults.trial import COUNTED, acknowledged

SITE_S = 1800.0
HEALS_S = 120.0
QUIET_S = 2.0  # of load before a step, and after it
RATE = 4.0


class Site:
    """Runs ``umbra.mail.site`` of a checkout in a lab; ``words`` go with it."""

    def __init__(self, lab: str, words: Sequence[str]) -> None:
        self._lab, self._words = lab, words

    def __call__(self, checkout: Path) -> None:
        """FieldError with the end of what it said if it fails."""
        play = ["ansible-playbook", "-i", "inventories/lab", "umbra.mail.site", *self._words]
        lab = [str(checkout / "tests" / "lab" / "lab"), "--name", self._lab, "control", "--", *play]
        done = subprocess.run(
            lab, cwd=checkout, capture_output=True, text=True, timeout=SITE_S, check=False
        )
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            raise FieldError(f"umbra.mail.site of {checkout} failed:\n{said}")


def longest(log: Sequence[dict[str, object]], kinds: Sequence[str], end: int) -> float:
    """Return the longest time without an acknowledged request of these kinds (seconds).

    :param end: of the load, on the clock of the log.
    """
    ends = [*(int(item["end"]) for item in acknowledged(log, kinds)), end]
    return max((later - earlier for earlier, later in pairwise(ends)), default=0) / 1e9


class Upgrade:
    """The steps, each under a load of its own."""

    def __init__(self, ground: Field, site: Site, former: Path) -> None:
        self._ground, self._site, self._former = ground, site, former
        self.failed: list[str] = []

    def run(self) -> None:
        """Make all steps."""
        self._site(self._former)
        load.install(self._ground)
        for name, checkout in (("forwards", ROOT), ("back", self._former), ("again", ROOT)):
            self._step(name, checkout)

    def _step(self, name: str, checkout: Path) -> None:
        ground, run = self._ground, f"{time.strftime('%H%M%S')}-{name}"
        ground.wait_protected(HEALS_S)
        generator = load.Load(ground, run, rate=RATE, max_s=SITE_S + 120)
        generator.start()
        began = time.monotonic()
        try:
            time.sleep(QUIET_S)
            self._site(checkout)
            took = time.monotonic() - began
            healed = ground.wait_protected(HEALS_S)
            actions.switched_over(ground, random.Random())
            ground.wait_protected(HEALS_S)
            generator.wait_for_more(generator.taken())
            time.sleep(QUIET_S)
            end = time.monotonic_ns()
            log = generator.stop()
        finally:
            generator.abandon()
        left = load.settle(ground, 60)
        account = accounting.account(
            log, [], load.read(ground, run), [], {"acknowledged": 1, "changes_acknowledged": 1}, run
        )
        load.clean(ground, run)
        reasons = [*left, *account["reasons"]]
        self.failed += [f"{name}: {reason}" for reason in reasons]
        mail, changes = longest(log, ("send",), end), longest(log, accounting.CHANGES, end)
        counts = ", ".join(f"{account[what]} {what.replace('_', ' ')}" for what in COUNTED)
        print(
            f"{name}: {took:.0f} s, protected {healed:.1f} s after that;"
            f" {account['acknowledged']} messages and {account['changes_acknowledged']} changes"
            f" acknowledged, {counts}; at most {mail:.1f} s without an"
            f" acknowledged message, {changes:.1f} s without a change",
            flush=True,
        )


def main() -> int:
    """Run it in a lab that is up; what else is said goes to ``umbra.mail.site``."""
    parser = argparse.ArgumentParser(prog="python -m tests.upgrade", description=__doc__)
    parser.add_argument("--lab", required=True, metavar="NAME")
    parser.add_argument("--former", required=True, type=Path, help="a checkout, its tarball built")
    options, words = parser.parse_known_args()
    upgrade = Upgrade(Field(options.lab), Site(options.lab, words), options.former.resolve())
    try:
        upgrade.run()
    except (FieldError, subprocess.SubprocessError) as error:
        upgrade.failed.append(str(error))
    print("\n".join(upgrade.failed) or "nothing lost, nothing doubled", flush=True)
    return 1 if upgrade.failed else 0


if __name__ == "__main__":
    sys.exit(main())
