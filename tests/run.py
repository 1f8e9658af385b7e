#!/usr/bin/env python3
"""Runs test suites and counts what they ran: `tests/run.py lint unit ...`.

Each suite prints as it goes. At the end come what failed, by name, one line for each suite and a
last line "N passed, N failed". A suite that ran no test has failed, and so has one whose command
failed without saying which test did.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from threading import Event

import yaml

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "test"
MOLECULE = ROOT / "extensions" / "molecule"
LAST = "witness"
"""The scenario after which the lab's group is no pair without a coordinator any more."""
LAB = "molecule"
LIMIT = 1200  # seconds that one command may take
FAILURE = re.compile(r"^(FAILED |ERROR |CRITICAL |\* \[|fatal: |\[ERROR\]: )")
"""How a line begins by which pytest, molecule or Ansible names what failed."""

WIDTH, MOST = 300, 8  # how much of a failed command's output the summary shows

QUICK = "lint", "unit", "gates"
BESIDE = "sanity"
"""The suite that runs beside the quick ones: each uses one core, and none measures time."""

failures: list[str] = []
"""What failed, in the order in which it did; the end of a log is all that some readers see."""
running: set[subprocess.Popen[str]] = set()
"""The commands that run now."""
stopped = Event()
"""Set while the run is being stopped: no command starts any more."""
margin: ContextVar[str] = ContextVar("margin", default="")
"""What stands before each line of the suite that runs beside another."""


def say(line: str) -> None:
    """Prints a line of the suite that runs here."""
    print(f"{margin.get()}{line}", flush=True)


@dataclass(frozen=True)
class Count:
    """What a suite, or a part of it, ran."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped
        )

    def __str__(self) -> str:
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"{self.passed} passed, {self.failed} failed{skipped}"

    def judged(self, returncode: int) -> Count:
        """This count, with one failure more if it hides that the command failed or ran nothing."""
        if self.failed == 0 and (returncode != 0 or self.passed == 0):
            return self + Count(failed=1)
        return self


def run(command: list[str], log: Path | None = None) -> tuple[int, str]:
    """Runs a command from the repository's root, showing and returning what it prints."""
    if stopped.is_set():
        sys.exit(143)
    say(f"$ {' '.join(command)}")
    lines = []
    with subprocess.Popen(
        ["timeout", "--kill-after=60", str(LIMIT), *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        running.add(process)
        if stopped.is_set():  # since it was asked above
            process.terminate()
        for line in process.stdout:
            say(line.rstrip("\n"))
            lines.append(line)
    running.discard(process)
    if process.returncode == 124:
        say(f"Stopped: it took more than {LIMIT} s.")
    output = "".join(lines)
    if process.returncode:
        named = [line for line in lines if FAILURE.match(line)] or lines
        failures.append(f"$ {' '.join(command)} (exit code {process.returncode})"[:WIDTH])
        failures.extend(f"  {line.rstrip()[:WIDTH]}" for line in named[-MOST:])
    if log:
        log.write_text(output)
    return process.returncode, output


def stop() -> None:
    """Ends what runs, and lets nothing follow it in its lane."""
    stopped.set()
    for process in running.copy():
        process.terminate()  # `timeout` hands it on to all that the command started


def junit_count(report: Path) -> Count:
    """Counts the tests in a JUnit report; none if it was not written."""
    if not report.exists():
        return Count()
    total = Count()
    for suite in ET.parse(report).getroot().iter("testsuite"):
        tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        total += Count(tests - skipped - failed, failed, skipped)
    return total


def pytest_count(output: str) -> list[Count]:
    """Counts from the closing lines of the pytest runs in a log, one for each run."""
    counts = []
    for line in re.findall(r"^=+ (.* in [0-9.]+s.*?) =+\s*$", output, re.MULTILINE):
        words = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", line)}
        failed = words.get("failed", 0) + words.get("error", 0) + words.get("errors", 0)
        counts.append(Count(words.get("passed", 0), failed, words.get("skipped", 0)))
    return counts


def pytest(name: str, folder: str) -> Count:
    """Runs the pytest suite in a folder."""
    report = REPORTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    returncode, _ = run([sys.executable, "-m", "pytest", "-q", folder, f"--junitxml={report}"])
    return junit_count(report).judged(returncode)


def lint() -> Count:
    """Each linter is one test. All of them fail by themselves when they find no file."""
    commands = [
        ["ruff", "check", "--output-format=concise", "."],
        ["ruff", "format", "--check", "."],
        ["mypy", *sorted(glob("roles/*/files/*/", root_dir=ROOT)), "plugins", "tests"],
        ["yamllint", "--strict", "."],
        ["ansible-lint", "-p"],
        ["antsibull-changelog", "lint"],
    ]
    total = Count()
    for command in commands:
        returncode, _ = run(command)
        total += Count(passed=1) if returncode == 0 else Count(failed=1)
    return total


def sanity() -> Count:
    """ansible-test sanity on the built collection."""
    returncode, output = run(["tests/tools/sanity"], REPORTS / "sanity.log")
    ran = len(re.findall(r"^Running sanity test ", output, re.MULTILINE))
    found = re.search(r"The (\d+) sanity test\(s\) listed below", output)
    failed = int(found[1]) if found else 0
    return Count(ran - failed, failed).judged(returncode)


def verify_steps(scenario: Path, base: Path) -> int:
    """How often a scenario verifies, by its own test sequence or else the base configuration's."""
    for file in (scenario, base):
        sequence = (yaml.safe_load(file.read_text()) or {}).get("scenario", {}).get("test_sequence")
        if sequence is not None:
            return sum(step.split()[0] == "verify" for step in sequence)
    return 0


def destroy() -> None:
    """Remove the lab of the scenarios, if it is there."""
    run(["molecule", "destroy", "--scenario-name", "default"])


def scenario(file: Path) -> Count:
    """A molecule scenario on the lab's controller; each verify step must have run tests."""
    name = file.parent.name
    command = ["molecule", "test", "--scenario-name", name, "--destroy", "never"]
    returncode, output = run(
        ["tests/lab/lab", "--name", LAB, "control", "--", *command],
        REPORTS / f"molecule-{name}.log",
    )
    counts = pytest_count(output)
    missing = verify_steps(file, MOLECULE / "config.yml") - len(counts)
    ran = sum(counts, Count()) + Count(failed=max(missing, 0))
    print(f"molecule {name}: {ran}", flush=True)
    return ran.judged(returncode)


def integration() -> Count:
    """Every molecule scenario but the last, serially, in one lab.

    The lab stays for the suites that come after it.
    """
    files = sorted(MOLECULE.glob("*/molecule.yml"))
    destroy()  # what an interrupted run may have left
    # The lab is made from outside; all else runs on its controller, which reaches its hosts.
    returncode, _ = run(["molecule", "create", "--scenario-name", "default"])
    names = [file for file in files if file.parent.name not in ("default", LAST)]
    total = sum((scenario(file) for file in names if returncode == 0), Count())
    return total.judged(returncode)


def faults() -> Count:
    """A short selection of the fault trials, in the pair that the scenarios have left."""
    report = REPORTS / "faults.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.faults", "--lab", LAB, "--selection"]
    returncode, _ = run([*command, "--output", str(report)])
    trials = json.loads(report.read_text())["trials"] if report.exists() else []
    failed = sum(bool(trial["reasons"]) for trial in trials)
    return Count(len(trials) - failed, failed).judged(returncode)


SUITES: dict[str, Callable[[], Count]] = {
    "lint": lint,
    "unit": lambda: pytest("unit", "tests/unit"),
    "gates": lambda: pytest("gates", "tests/gates"),
    "sanity": sanity,
    "lab": lambda: pytest("lab", "tests/lab"),
    "integration": integration,
    "faults": faults,
    "witness": lambda: scenario(MOLECULE / LAST / "molecule.yml"),
}
IN_LAB = {"integration", "faults", "witness"}


def stages(names: list[str]) -> list[list[list[str]]]:
    """What runs one after the other: lanes that run side by side, of suites one after the other."""
    quick = [name for name in names if name in QUICK]
    if not quick or BESIDE not in names:
        return [[[name]] for name in names]
    others = [name for name in names if name not in (*QUICK, BESIDE)]
    return [[quick, [BESIDE]], *([[name]] for name in others)]


def lane(suites: list[str], mark: str) -> dict[str, tuple[Count, float]]:
    """Runs suites one after the other; what each counted and the seconds that it took."""
    margin.set(mark)
    results = {}
    for name in suites:
        say("")
        say(f"=== {name} ===")
        started = time.monotonic()
        results[name] = SUITES[name](), time.monotonic() - started
    return results


def main(names: list[str]) -> int:
    """Runs the suites and prints the summary."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    os.environ["MOLECULE_COMMAND_BORDERS"] = "false"  # or pytest's closing line is not at its place
    os.environ["NO_COLOR"] = "1"
    told: list[int] = []

    def leave(number: int, _: object) -> None:
        # By way of `finally`, so that a stopped run removes its lab. Where nobody sees the
        # exception, as in a destructor, the run ends all the same.
        told.append(number)
        stop()
        sys.exit(143)

    signal.signal(signal.SIGTERM, leave)
    results: dict[str, tuple[Count, float]] = {}
    try:
        for lanes in stages(names):
            marks = ["", *(f"{suites[0]}: " for suites in lanes[1:])]
            with ThreadPoolExecutor() as pool:
                try:
                    for counted in pool.map(lane, lanes, marks):
                        results |= counted
                except BaseException:
                    stop()
                    raise
    finally:
        stopped.clear()  # every lane has ended
        if IN_LAB & set(names):
            destroy()
    if told:
        return 143
    if failures:
        print("\n=== failures ===", *failures, sep="\n")
    print("\n=== summary ===")
    for name, (count, seconds) in results.items():
        none = "  (ran no test)" if count.passed + count.skipped == 0 else ""
        print(f"{name:12} {count}  {seconds:.0f} s{none}")
    total = sum((count for count, _ in results.values()), Count())
    print(total, flush=True)
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
