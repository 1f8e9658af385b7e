"""Measures changes of primary in a lab with a witness; writes ``build/bench/failover.json``.

``make bench-failover`` makes a lab for it and removes it afterwards. ``--lab NAME`` takes one that
is up, and sets it up with each profile in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plugins.module_utils import _accounting as accounting
from tests.bench.failover import figures
from tests.bench.failover.figures import LOST, MOVED, Change
from tests.bench.figures import lines
from tests.bench.place import ROOT, Place, SceneError
from tests.faults import actions, load
from tests.faults.field import NODES, Field, FieldError
from tests.faults.trial import acknowledged

OUTPUT = ROOT / "build" / "bench" / "failover.json"
LAB = "bench"
# Where clients find the group, in the lab's LAN (tests/lab/README.md).
SERVICE = {"group": "203.0.113.80"}
# Changes of primary under one load: each leaves a client's doubtful mailboxes behind, and with many
# of them the way back to protected is longer.
BATCH = 10
QUIET_S = 1.5  # of load before a change, and after it
HEALS_S = 90.0
PACKAGES = ("etcd-server", "postfix", "dovecot-core", "python3")


class Cell:
    """Changes of primary under one load, all with one profile and one delay of the line."""

    def __init__(self, ground: Field, profile: str, delay_ms: float) -> None:
        self._ground = ground
        self._profile = profile
        self._delay_ms = delay_ms
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._made = 0

    def run(self, kinds: Sequence[str]) -> tuple[list[Change], list[str]]:
        """Make these changes, one after the other.

        Returns them, and what is not accounted for.
        """
        ground, run = self._ground, f"{time.strftime('%H%M%S')}-{self._profile}"
        generator = load.Load(ground, run, targets=SERVICE, max_s=3600)
        made: list[tuple[str, int, int, float, str]] = []
        generator.start()
        try:
            for number, kind in enumerate(kinds, 1):
                time.sleep(QUIET_S)
                made.append(self._change(kind))
                print(
                    f"  {self._made + number} {kind}: protected after {made[-1][3]:.1f} s",
                    flush=True,
                )
                if kind == LOST:
                    actions.held_queue_dropped(ground, random.Random())
            time.sleep(QUIET_S)
            log = generator.stop()
            left = load.settle(ground, 30)
            views = load.read(ground, run)
        finally:
            generator.abandon()
        account = accounting.account(
            log, [], views, [], {"acknowledged": 1, "changes_acknowledged": 1}, "benchmark"
        )
        load.clean(ground, run)
        reasons = [*left, *account["reasons"]]
        reasons += [item["text"] for item in account["findings"][:5]]
        said = ", ".join(
            f"{account[name]} {name.replace('_', ' ')}"
            for name in (
                "acknowledged",
                "changes_acknowledged",
                "lost",
                "duplicated",
                "changes_lost",
            )
        )
        print(f"  {said}", flush=True)
        messages, changes = (
            [item["end"] for item in acknowledged(log, kinds)]
            for kinds in (("send",), accounting.CHANGES)
        )
        samples = [
            self._sample(messages, changes, number, *item)
            for number, item in enumerate(made, self._made + 1)
        ]
        self._made += len(made)
        return samples, reasons

    def _change(self, kind: str) -> tuple[str, int, int, float, str]:
        """Make one; returns kind, begin and end (monotonic ns), seconds until protected, whose."""
        ground, chance = self._ground, random.Random()
        old, new = ground.primary, ground.shadow
        began = time.monotonic_ns()
        if kind == LOST:
            actions.power_cut(lambda _: old)(ground, chance)
            actions.taken_over(ground, chance)
            # Clients are back before the host is: a boot on the same cores is no part of it.
            time.sleep(QUIET_S)
        else:
            actions.switched_over(ground, chance)
        until = time.monotonic_ns()
        if kind == LOST:
            actions.power_back(lambda _: old)(ground, chance)
        healed = ground.wait_protected(HEALS_S)
        if ground.primary != new:
            raise FieldError(f"the primary is {ground.primary} instead of {new}")
        return kind, began, until, healed, new

    def _sample(
        self,
        messages: Sequence[int],
        changes: Sequence[int],
        number: int,
        kind: str,
        began: int,
        until: int,
        healed: float,
        new: str,
    ) -> Change:
        end = until + int(QUIET_S * 1e9)
        parts: dict[str, float] = {}
        if kind == LOST:
            states = list(self._journal(new, began, end))
            opened = [at for at, line in states if "state: primary" in line]
            if opened:
                at_ns = int(opened[0] * 1e9) - self._offset_ns
                first = [next((e for e in es if e > at_ns), end) for es in (messages, changes)]
                parts = figures.parts(
                    self._wall(began), states, self._wall(first[0]), self._wall(first[1])
                )
        else:
            old = next(node for node in NODES if node != new)
            parts = figures.steps(line for _, line in self._journal(old, began, end))
        return Change(
            kind, self._profile, self._delay_ms, number,
            figures.window(messages, began, end), figures.window(changes, began, end),
            round(healed, 2), parts,
        )  # fmt: skip

    def _wall(self, ns: int) -> float:
        return (ns + self._offset_ns) / 1e9

    def _journal(self, node: str, began: int, end: int) -> Iterable[tuple[float, str]]:
        said = self._ground.run(
            node,
            "journalctl -u umbra-agent -o json --output-fields=MESSAGE --since @$1 --until @$2",
            f"{self._wall(began):.6f}",
            f"{self._wall(end):.6f}",
        )
        for line in said.splitlines():
            entry = json.loads(line)
            yield int(entry["__REALTIME_TIMESTAMP"]) / 1e6, str(entry["MESSAGE"])


def measure(
    ground: Field, place: Place, options: argparse.Namespace
) -> tuple[list[Change], list[str]]:
    """All profiles and delays; what was measured before something broke stays."""
    changes: list[Change] = []
    failed: list[str] = []
    for profile in options.profiles:
        settings = {
            "coordinator": "etcd",
            "profile": profile,
            # Each lost host is an automatic change; more than three an hour are left to a person.
            "failover_limit": 1000,
            "shadow_policy": "accept",  # with one host left, mail is to flow
            "service_addresses": list(SERVICE.values()),
        }
        words = json.dumps({f"replication_agent_{key}": value for key, value in settings.items()})
        site = ["ansible-playbook", "-i", "inventories/lab", "umbra.mail.site"]
        place.lab("control", "--", *site, "-e", words, quiet=True)
        load.install(ground)
        for delay_ms in options.delays:
            place.lab("wan", "set", "--delay", str(delay_ms), "--between", *NODES, quiet=True)
            print(f"{profile}, {delay_ms:g} ms", flush=True)
            kinds = [kind for kind in (LOST, MOVED) for _ in range(options.changes)]
            random.Random(options.seed).shuffle(kinds)
            cell, reasons = Cell(ground, profile, delay_ms), list[str]()
            try:
                ground.wait_protected(HEALS_S)
                for start in range(0, len(kinds), BATCH):
                    made, found = cell.run(kinds[start : start + BATCH])
                    changes += made
                    reasons += found
            except FieldError as error:
                reasons.append(str(error))
            for reason in reasons:
                print(f"  {reason}", flush=True)
            failed += [f"{profile}, {delay_ms:g} ms: {reason}" for reason in reasons]
            if reasons:
                actions.all_taken_back(ground)
        place.lab("wan", "set", "--delay", str(actions.DELAY_MS), "--between", *NODES, quiet=True)
    return changes, failed


def main() -> int:
    """Set up, measure, write, print; leave nothing behind."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--profiles", nargs="+", default=["lan-fast", "default"])
    parser.add_argument("--delays", nargs="+", type=float, default=[2.0, 40.0], metavar="MS")
    parser.add_argument("--changes", type=int, default=20, help="of each kind, in each cell")
    parser.add_argument("--seed", type=int, default=1, help="of the order of the changes")
    parser.add_argument("--lab", metavar="NAME", help="a lab that is up already")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    # Leave by way of `finally`, so that a stopped run removes its lab.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    name = options.lab or LAB
    place, ground = Place(name), Field(name)
    try:
        if not options.lab:
            place.lab("up", "--disks", ",".join(NODES))
        load_before = os.getloadavg()[0]
        changes, failed = measure(ground, place, options)
        about = place.about("tests.bench.failover.run", NODES[0])
        about["packages"] = place.packages(dict.fromkeys(NODES, PACKAGES))
    except (FieldError, SceneError, subprocess.SubprocessError) as error:
        print(f"bench-failover: {error}", file=sys.stderr)
        return 1
    finally:
        if not options.lab:
            place.lab("down")
    results: dict[str, Any] = {
        "about": {**about, "load_before": load_before, "failed": failed, "seed": options.seed},
        "changes": [asdict(change) for change in changes],
        "summary": figures.summary(changes),
        "goals": [asdict(goal) for goal in figures.goals(changes)],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results) + "\n")
    print("\n".join(_table(results["summary"])))
    print(lines(results["goals"]))
    print("\n".join(failed))
    print(f"\nWritten to {options.output}")
    return 1 if failed else 0


def _table(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    yield (
        f"\n{'':11} {'profile':9} {'delay':>6} {'n':>3}"
        f" {'SMTP p50':>9} {'p99':>6} {'IMAP p50':>9} {'p99':>6} s"
    )
    for row in rows:
        smtp, imap = row["smtp_s"], row["imap_s"]
        yield (
            f"{row['kind']:11} {row['profile']:9} {row['delay_ms']:4.0f}ms {row['changes']:3}"
            f" {smtp['p50']:9.2f} {smtp['p99']:6.2f} {imap['p50']:9.2f} {imap['p99']:6.2f}"
        )
        if row["parts"]:
            yield "            " + ", ".join(
                f"{part} {value['median']:.2f}" for part, value in row["parts"].items()
            )


if __name__ == "__main__":
    sys.exit(main())
