"""Measures the transport in a lab, alternating, and writes ``build/bench/transport.json``.

``make bench-transport`` makes a lab for it and removes it afterwards. ``--lab NAME`` takes one that
the site playbook has set up, and leaves it as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.figures import lines
from tests.bench.place import ROOT, SceneError
from tests.bench.transport import figures, scene
from tests.bench.transport.figures import LARGE, SMALL, Held, Latencies, Peak, Rate
from tests.bench.transport.scene import Scene

OUTPUT = ROOT / "build" / "bench" / "transport.json"
LAB = "bench"


@dataclass(frozen=True)
class Variant:
    """What looks at a message before it is accepted, and how far the other host is (ms)."""

    name: str
    port: int
    round_trip: float


VARIANTS = (
    Variant(figures.PLAIN, scene.PLAIN, 0.2),
    Variant("do-nothing milter", scene.NOTHING, 0.2),
    Variant("proxy 0.2 ms", scene.PROXY, 0.2),
    Variant("proxy 40 ms", scene.PROXY, 40),
    Variant(figures.LOCAL, scene.UMBRA, 0.2),
    Variant("umbra 10 ms", scene.UMBRA, 10),
    Variant(figures.FAR, scene.UMBRA, 40),
)
CONNECTIONS = (1, 10, 50)
SIZES = (SMALL, LARGE)
# connections, size, messages, messages a second: far from saturation, where latency is the queue's.
PACED = ((1, SMALL, 60, 15), (10, SMALL, 300, 60))
MOST = 4000  # messages in a burst


def main() -> int:
    """Set up, measure, write, print; leave nothing behind."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="0: memory only")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each burst, roughly")
    parser.add_argument("--lab", metavar="NAME", help="a lab that is set up already")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    # Leave by way of `finally`, so that a stopped run removes its lab.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    place = Scene(options.lab or LAB)
    try:
        if not options.lab:
            # On disks of their own: a sync of the others reaches only the machine's page cache.
            place.lab("up", "--wan-delay", "0", "--disks", ",".join(scene.HOSTS))
            place.lab(
                "control", "--", "ansible-playbook", "-i", "inventories/lab", "umbra.mail.site"
            )
        try:
            place.prepare()
            results = measure(place, options.rounds, options.seconds)
        finally:
            if options.lab:
                place.undo()
    except SceneError as error:
        print(f"bench-transport: {error}", file=sys.stderr)
        return 1
    finally:
        if not options.lab:
            place.lab("down")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results["summary"]))
    print(lines(results["goals"]))
    print(f"\nWritten to {options.output}")
    return 0


def measure(place: Scene, rounds: int, seconds: float) -> dict[str, Any]:
    """Take all samples; each round has every cell once, in an order of its own."""
    about = place.about("tests.bench.transport.run", "mail-a")
    about["packages"] = place.packages({"mail-a": scene.PACKAGES})["mail-a"]
    cells = [
        (variant, count, size) for variant in VARIANTS for size in SIZES for count in CONNECTIONS
    ]
    counts: dict[tuple[str, int, int], int] = {}
    rates: list[Rate] = []
    latencies: list[Latencies] = []
    round_trips: dict[str, list[float]] = {variant.name: [] for variant in VARIANTS}
    resident = [place.resident()]
    load: list[float] = []  # tells a reader what else the machine had to do
    # Round 0 warms up and tells how many messages fill a burst; it is no sample.
    for number in range(rounds + 1):
        began = time.monotonic()
        load.append(os.getloadavg()[0])
        for variant in order(number):
            measured = place.round_trip(variant.round_trip)
            for _, connections, size in (cell for cell in cells if cell[0] is variant):
                key = (variant.name, connections, size)
                messages = counts.get(key, 2 * connections + 5)
                took = place.burst(variant.port, connections, size, messages)
                if number == 0:
                    counts[key] = wanted(messages / took, connections, seconds)
                else:
                    rates.append(Rate(*(variant.name, connections, size, number, messages, took)))
            if number:
                round_trips[variant.name].append(measured)
                for connections, size, messages, pace in PACED:
                    values = place.latencies(variant.port, connections, size, messages, pace)
                    latencies.append(Latencies(variant.name, connections, size, number, values))
            print(
                f"round {number}/{rounds}  {variant.name:18}"
                f" {rates[-1].per_second if number else 0:7.0f}/s at {CONNECTIONS[-1]} connections",
                flush=True,
            )
        print(f"round {number} took {time.monotonic() - began:.0f} s", flush=True)
    resident.append(place.resident())
    held: list[Held] = []
    peaks: list[Peak] = []
    memory_error = ""
    try:
        held, peaks = measure_memory(place)
    except SceneError as error:  # the other samples are good all the same
        memory_error = str(error)
        print(f"bench-transport: memory was not measured: {error}", file=sys.stderr)
    return {
        "about": about,
        "round_trip_ms": round_trips,
        "agents_resident_kib": resident,
        "held": [asdict(item) for item in held],
        "memory_error": memory_error,
        "large_at_once": [asdict(item) for item in peaks],
        "load_before_each_round": load,
        "rates": [asdict(rate) for rate in rates],
        "latencies": [asdict(item) for item in latencies],
        "summary": figures.summary(rates, latencies),
        "goals": [
            asdict(goal)
            for goal in figures.goals(rates, latencies) + figures.memory_goals(held, peaks)
        ],
    }


def measure_memory(place: Scene) -> tuple[list[Held], list[Peak]]:
    """What large messages cost both agents, then what held messages cost the shadow's."""
    place.round_trip(0.2)
    before = place.resident()
    place.forget_peak()
    place.burst(scene.UMBRA, figures.AT_ONCE, figures.HUGE, figures.AT_ONCE)
    most = place.resident("VmHWM")
    peaks = [
        Peak(host, figures.AT_ONCE, figures.HUGE, before[host], most[host]) for host in scene.HOSTS
    ]
    held = []
    step = figures.HELD // 4
    try:
        for begin in range(0, figures.HELD, step):
            place.hold("store", begin, begin + step)
            # Counted last: the primary may have found meanwhile that it has no such messages.
            resident = place.resident()["mail-b"]
            held.append(Held(place.held(), resident))
            print(f"{held[-1].messages} messages held: {resident} KiB", flush=True)
    finally:
        place.hold("discard", 0, figures.HELD)
    if held[-1].messages < figures.HELD:
        raise SceneError(f"the shadow held only {held[-1].messages} messages at the end")
    return held, peaks


def order(number: int) -> list[Variant]:
    """The variants of a round, shuffled the same way in every run: nobody always comes first."""
    return random.Random(number).sample(VARIANTS, len(VARIANTS))


def wanted(per_second: float, connections: int, seconds: float) -> int:
    """How many messages fill ``seconds``, at least two for each connection."""
    return max(2 * connections, min(round(per_second * seconds), MOST))


def table(rows: list[dict[str, Any]]) -> str:
    """The summary for people."""
    return "\n".join(_lines(rows))


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield ""
    yield (
        f"{'':18} {'size':>7} {'conn':>4}  {'messages/s (min-max)':>22}  {'of plain':>8}"
        f"  {'p50 ms':>7} {'added':>7}  {'p99 ms':>7} {'added':>7}"
    )
    for row in rows:
        rate, share = row["messages_per_s"], row["of_plain"]["median"]
        text = (
            f"{row['variant']:18} {row['size']:7} {row['connections']:4}"
            f"  {rate['median']:8.0f} ({rate['min']:5.0f}-{rate['max']:5.0f})  {share:8.2f}"
        )
        if "p50_ms" in row:
            for name in ("p50", "p99"):
                value, more = row[f"{name}_ms"]["median"], row[f"{name}_added_ms"]["median"]
                text += f"  {value:7.1f} {more:+7.1f}"
        yield text


if __name__ == "__main__":
    sys.exit(main())
