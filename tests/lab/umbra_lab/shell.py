"""Running commands, and the two kinds of error that end as one sentence on stderr."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence


class LabError(Exception):
    """What went wrong, in one sentence for the person at the terminal (exit status 1)."""

    status = 1


class PrerequisiteError(LabError):
    """Something the lab needs is not there (exit status 2)."""

    status = 2


_STARTED = time.monotonic()


def say(text: str) -> None:
    """Print one line of progress with the seconds since the start."""
    print(f"[{time.monotonic() - _STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


def run(
    command: Sequence[str], *, input: str | None = None, timeout: float = 60, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output; a failure is a LabError with its last words."""
    try:
        # Empty input unless there is some: a command must never eat what feeds our caller's script.
        done = subprocess.run(
            command,
            input=input or "",
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as error:
        raise PrerequisiteError(
            f"The command {command[0]!r} is missing: run `lab prerequisites` first."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"No answer within {timeout:g} s from: {shlex.join(command)}") from error
    if check and done.returncode:
        words = (done.stderr or done.stdout).strip() or "no message"
        raise LabError(f"{shlex.join(command)} failed ({done.returncode}): {words}")
    return done
