"""Measures mailboxes in a lab, alternating, and writes ``build/bench/mailbox.json``.

``make bench-mailbox`` makes a lab for it and removes it afterwards. ``--lab NAME`` takes one that
the site playbook has set up, and leaves it as it was.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.figures import lines
from tests.bench.mailbox import figures, scene
from tests.bench.mailbox.figures import (
    ALONE,
    ASYNC,
    MANY,
    OLD,
    OLD_SYNC,
    OPERATIONS,
    SYNC,
    Burst,
    Copy,
    Lag,
    Samples,
    Size,
)
from tests.bench.mailbox.scene import Scene
from tests.bench.place import ROOT, SceneError

OUTPUT = ROOT / "build" / "bench" / "mailbox.json"
LAB = "bench"
DOMAIN = "bench.example.org"


@dataclass(frozen=True)
class Variant:
    """Who answers, and where the other copy is."""

    name: str
    host: str
    port: int
    lmtp: str
    replica: str | None
    users: str
    mode: str | None = None


VARIANTS = (
    Variant(ALONE, "mail-a", scene.ALONE_PORT, scene.ALONE_LMTP, None, "u"),
    Variant(SYNC, "mail-a", 143, scene.LMTP, "mail-b", "u", SYNC),
    Variant(ASYNC, "mail-a", 143, scene.LMTP, "mail-b", "u", ASYNC),
    Variant(OLD, "old-a", 143, scene.OLD_LMTP, "old-b", "u"),
    Variant(OLD_SYNC, "old-a", 143, scene.OLD_LMTP, "old-b", "s"),
)
# Clients and users: one user each; and a few busy users, whose changes share syncs.
CLIENTS = ((1, 1), (4, 4), (MANY, MANY))
FEW = (MANY, 4)
LAGS = 6  # changes in each round, and seconds between them
PACE = 0.5
SIZES = (100, 10_000, 100_000)
SINGLE = 40  # single changes in each round
MANIES = (100, 1_000, 10_000)


class Bench:
    """One run: the lab, the samples so far, and the parts that add to them."""

    def __init__(self, place: Scene, options: argparse.Namespace) -> None:
        self.place = place
        self.samples = Samples()
        self.load_before: dict[str, float] = {}  # tells a reader what else the machine had to do
        self._options = options
        self._variants = [v for v in VARIANTS if v.name in options.variants]

    def run(self, parts: Sequence[str]) -> dict[str, str]:
        """Run these parts; return why some did not end. What they had measured by then stays."""
        failed = {}
        for part in parts:
            self.load_before[part] = os.getloadavg()[0]
            began = time.monotonic()
            try:
                getattr(self, part)()
            except (SceneError, subprocess.SubprocessError) as error:
                failed[part] = str(error)[-500:]
            say(f"{part} took {time.monotonic() - began:.0f} s {failed.get(part, '')}")
        return failed

    @property
    def old(self) -> bool:
        """Whether Dovecot 2.3 takes part."""
        return any(variant.host in scene.OLD for variant in self._variants)

    def latency(self) -> None:
        """Latency and throughput of single operations, and the replication lag."""
        place, rounds = self.place, self._options.rounds
        if self.old:
            place.prepare_old()
            place.users(scene.OLD, names("u", MANY))
            place.users(scene.OLD, names("s", MANY), "userdb_replication_sync_timeout=5")
            place.start_old()
        place.users(scene.MAIL, names("u", MANY))
        # Round 0 warms up and is no sample.
        for number in range(rounds + 1):
            began = time.monotonic()
            for variant in random.Random(number).sample(self._variants, len(self._variants)):
                if variant.mode:
                    place.set_mode(variant.mode)
                self._bursts(variant, number)
                if variant.replica:
                    self._lag(variant, number)
            say(f"latency, round {number}/{rounds}: {time.monotonic() - began:.0f} s")
        place.set_mode(SYNC)

    def _bursts(self, variant: Variant, number: int) -> None:
        wanted = (*CLIENTS, FEW) if variant.name == SYNC else CLIENTS
        for clients, users in wanted if number else CLIENTS[:1]:
            answer = self.place.load(
                variant.host,
                imap=variant.port,
                lmtp=variant.lmtp,
                prefix=f"r{number}c{clients}u{users}",
                users=names(variant.users, users),
                clients=clients,
                operations=self._options.operations,
                seconds=self._options.seconds if number else 0.3,
            )
            for operation, result in answer.items() if number else ():
                took = [round((end - begin) * 1000, 3) for begin, end in result["changes"]]
                self.samples.bursts.append(
                    Burst(variant.name, operation, clients, users, number, result["seconds"], took)
                )

    def _lag(self, variant: Variant, number: int) -> None:
        assert variant.replica
        for operation in ("append", "store") if number else ():
            changes = self.place.lag(
                variant.host, variant.replica, names(variant.users, 1)[0],
                # Each variant its own: they may share a store.
                f"lag{number}{operation}{VARIANTS.index(variant)}", operation, LAGS, PACE,
            )  # fmt: skip
            seen = [(begun, done, at) for begun, done, at in changes if at is not None]
            self.samples.lags.append(
                Lag(
                    variant.name, operation, number,
                    [max(0.0, round((at - done) * 1000, 3)) for _, done, at in seen],
                    [round((at - begun) * 1000, 3) for begun, _, at in seen],
                    len(changes) - len(seen),
                )
            )  # fmt: skip

    def sizes(self) -> None:
        """One operation in small and in large mailboxes."""
        for messages in SIZES:
            user = f"big{messages}@{DOMAIN}"
            self.place.users(scene.MAIL, [user])
            took = self.place.fill(user, messages)
            say(f"a mailbox of {messages} messages: {took:.0f} s")
        self.place.restart_agent()
        for number in range(1, self._options.rounds + 1):
            for messages in random.Random(number).sample(SIZES, len(SIZES)):
                answer = self.place.load(
                    "mail-a", imap=143, users=[f"big{messages}@{DOMAIN}"], clients=1,
                    operations=["append", "store"], mailbox="INBOX", reset=True, count=SINGLE,
                )  # fmt: skip
                for operation, result in answer.items():
                    took_ms = [round((end - begin) * 1000, 3) for begin, end in result["changes"]]
                    self.samples.sizes.append(Size(operation, messages, number, took_ms))
        self.place.forget_users()

    def seeding(self) -> None:
        """A whole copy, by the agent and by plain ``doveadm backup``, both with as many at once."""
        users = names("seed", self._options.seed_users)
        self.place.users(scene.MAIL, users)
        megabytes = self.place.fill_many(users, self._options.seed_messages)
        self.place.restart_agent()
        for number in range(1, self._options.seed_rounds + 1):
            ways: list[tuple[str, Callable[[list[str]], float]]] = [
                (figures.SEED, self.place.seed),
                (figures.PLAIN, self.place.backup),
            ]
            for way, copy in random.Random(number).sample(ways, 2):
                copied = Copy(way, number, megabytes, copy(users))
                self.samples.copies.append(copied)
                say(f"{way}: {megabytes:.0f} MB in {copied.seconds:.1f} s")
        self.place.forget_users()

    def many(self) -> None:
        """What an agent with many users costs."""
        have = 0
        for mailboxes in self._options.many:
            self.place.users(scene.MAIL, names("m", mailboxes)[have:])
            have = mailboxes
            self.samples.many.append(self.place.many(names("m", mailboxes)))
            say(f"{mailboxes} users: {self.samples.many[-1]}")
        self.place.forget_users()


PARTS = ("latency", "sizes", "seeding", "many")


def names(prefix: str, count: int) -> list[str]:
    """So many users."""
    return [f"{prefix}{number:05}@{DOMAIN}" for number in range(count)]


def main() -> int:
    """Set up, measure, write, print; leave nothing behind."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="this part (repeatable)")
    parser.add_argument("--variants", nargs="+", default=[v.name for v in VARIANTS])
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each burst")
    parser.add_argument("--many", nargs="+", type=int, default=list(MANIES), metavar="USERS")
    parser.add_argument("--seed-users", type=int, default=40)
    parser.add_argument("--seed-messages", type=int, default=100, help="of 50 kB, of each user")
    parser.add_argument("--seed-rounds", type=int, default=3)
    parser.add_argument("--lab", metavar="NAME", help="a lab that is set up already")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    # Leave by way of `finally`, so that a stopped run removes its lab.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    place = Scene(options.lab or LAB)
    parts = options.only or PARTS
    try:
        if not options.lab:
            stores = [*scene.MAIL, *(scene.OLD if "latency" in parts else ())]
            place.lab(
                "up", "--wan-delay", "0", "--hosts", ",".join([*stores, "witness", "client"]),
                # What one writes to disk, no other waits for.
                "--disks", ",".join(stores),
            )  # fmt: skip
            place.lab(
                "control", "--", "ansible-playbook", "-i", "inventories/lab", "umbra.mail.site"
            )
        bench = Bench(place, options)
        about = place.about("tests.bench.mailbox.run", "mail-a")
        try:
            place.prepare()
            failed = bench.run(parts)
            old = scene.OLD if "latency" in parts and bench.old else ()
            asked = [host for host in scene.PACKAGES if host in (*scene.MAIL, *old)]
            about["packages"] = place.packages({host: scene.PACKAGES[host] for host in asked})
        finally:
            place.undo()
    except SceneError as error:
        print(f"bench-mailbox: {error}", file=sys.stderr)
        return 1
    finally:
        if not options.lab:
            place.lab("down")
    results = {
        "about": {**about, "load_before": bench.load_before, "failed": failed},
        **asdict(bench.samples),
        "summary": figures.summary(bench.samples),
        "goals": [asdict(goal) for goal in figures.goals(bench.samples)],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results) + "\n")
    print("\n".join(_table(results["summary"])))
    print(lines(results["goals"]))
    print(f"\nWritten to {options.output}")
    return 1 if failed else 0


def say(text: str) -> None:
    """Print one line of progress."""
    print(text, flush=True)


def _table(summary: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    if summary["changes"]:
        yield (
            f"\n{'':7} {'clients':>7} {'users':>5} {'':17} {'per s':>17} {'p50':>7} {'p99':>7} ms"
        )
    for row in summary["changes"]:
        rate = row["per_s"]
        yield (
            f"{row['operation']:7} {row['clients']:7} {row['users']:5} {row['variant']:17}"
            f" {rate['median']:6.0f} ({rate['min']:4.0f}-{rate['max']:4.0f})"
            f" {row['p50_ms']['median']:7.1f} {row['p99_ms']['median']:7.1f}"
        )
    for row in summary["lag"]:
        lag, whole = row["lag_ms"], row["from_command_ms"]
        yield (
            f"lag of {row['operation']:6} {row['variant']:17} {lag['median']:6.1f} ms"
            f" ({lag['min']:.1f}-{lag['max']:.1f}), from the command {whole['median']:.1f} ms,"
            f" {row['unseen']} unseen"
        )
    for row in summary["sizes"]:
        yield f"{row['operation']:7} {row['messages']:7} messages {row['p50_ms']['median']:7.1f} ms"
    for part in ("many", "copies"):
        for row in summary[part]:
            yield ", ".join(f"{key} {value}" for key, value in row.items())


if __name__ == "__main__":
    sys.exit(main())
