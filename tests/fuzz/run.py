"""``make fuzz``: the coverage-guided fuzzer on both parsers, for a bounded time.

What it finds on the way stays in ``build/fuzz``, where the next run goes on. ``--keep`` puts those
inputs into the corpus that reach what no sample there reaches.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "fuzz"
SITE = BUILD / "site"
REQUIREMENTS = Path(__file__).parent / "requirements.txt"
PARSERS = ("milter", "frames")
MAX_LENGTH = 4096
SHARED_MEMORY = Path("/dev/shm")  # the store syncs; what is fuzzed is not the disk


def main() -> int:
    """Fuzz one parser after the other; 1 if something was found."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    arguments.add_argument("--seconds", type=int, default=60, help="for each parser")
    arguments.add_argument("--parser", choices=PARSERS, action="append")
    arguments.add_argument("--keep", action="store_true", help="put new inputs into the corpus")
    options = arguments.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if not install():
        return 2
    found = [name for name in options.parser or PARSERS if not fuzz(name, options)]
    return 1 if found else 0


def install() -> bool:
    """Have the fuzzer beside the project's own packages; only this target needs it."""
    stamp = SITE / "requirements.txt"
    wanted = REQUIREMENTS.read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return True
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--target", str(SITE), "--requirement", str(REQUIREMENTS)]
    if subprocess.run(command, check=False).returncode:
        print(
            "make fuzz: atheris could not be installed; there are packages of it for Linux and"
            " Python 3.11 to 3.13.",
            file=sys.stderr,
        )
        return False
    stamp.write_text(wanted)
    return True


def fuzz(parser: str, options: argparse.Namespace) -> bool:
    """Fuzz one parser; True if nothing was found."""
    work, corpus = BUILD / parser, ROOT / "tests" / "fuzz" / parser
    work.mkdir(exist_ok=True)
    print(f"== {parser}: {options.seconds} s", flush=True)
    done = guided(
        parser,
        f"-max_total_time={options.seconds}",
        "-timeout=20",  # seconds for one input
        "-rss_limit_mb=1024",
        "-verbosity=0",
        "-print_final_stats=1",
        f"-max_len={MAX_LENGTH}",
        f"-artifact_prefix={BUILD}/{parser}-found-",
        str(work),
        str(corpus),
    )
    if done:
        print(
            f"\n{parser}: an input breaks the parser. It is in {BUILD}/{parser}-found-*;"
            f" when it is understood and mended, keep it as tests/fuzz/{parser}/WHAT_IT_IS.",
            file=sys.stderr,
        )
        return False
    if options.keep:
        before = set(corpus.iterdir())
        guided(
            parser, "-merge=1", "-use_counters=0", f"-max_len={MAX_LENGTH}", str(corpus), str(work)
        )
        print(f"{parser}: {len(set(corpus.iterdir()) - before)} new samples in {corpus}")
    return True


def guided(parser: str, *options: str) -> int:
    """Run the fuzzer's process."""
    place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    packages = [SITE, ROOT, ROOT / "roles" / "replication_agent" / "files"]
    with tempfile.TemporaryDirectory(dir=place) as directory:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(str, packages)),
            "FUZZ_PARSER": parser,
            "FUZZ_STORE": directory,
        }
        return subprocess.run(
            [str(Path(__file__).with_name("guided.py")), *options],
            env=environment,
            cwd=BUILD,
            check=False,
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
