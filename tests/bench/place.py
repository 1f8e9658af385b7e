"""The lab that a benchmark runs in, and what it says of the place where it ran."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240  # seconds that one command on a host may take


class SceneError(Exception):
    """Something in the lab is not as the benchmark needs it."""


class Place:
    """The hosts of one lab."""

    def __init__(self, lab: str) -> None:
        self._lab = [str(ROOT / "tests" / "lab" / "lab"), "--name", lab]

    def lab(self, *arguments: str, quiet: bool = False) -> None:
        """Run a command of the lab."""
        subprocess.run(
            [*self._lab, *arguments],
            check=True,
            cwd=ROOT,
            stdout=subprocess.DEVNULL if quiet else None,
        )

    def command(self, host: str, *command: str) -> list[str]:
        """The command that runs ``command`` on a host."""
        return [*self._lab, "exec", host, "--", *command]

    def run(self, host: str, *command: str, input: str | None = None, limit: float = LIMIT) -> str:
        """Return what a command on a host prints. SceneError if it fails."""
        done = subprocess.run(
            self.command(host, *command),
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        if done.returncode:
            raise SceneError(f"{host}: {' '.join(command)[:200]}: {done.stderr.strip()[-500:]}")
        return done.stdout

    def write(self, host: str, path: str, text: str) -> None:
        """Write a file on a host."""
        self.run(host, "sh", "-c", f"cat > {path}", input=text)

    def about(self, module: str, packages: dict[str, tuple[str, ...]]) -> dict[str, Any]:
        """What was measured and with which command: commit, kernel, packages of each host."""
        git = ["git", "-C", str(ROOT)]
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        first = next(iter(packages))
        versions = {
            host: dict(
                line.split(" ", 1)
                for line in self.run(
                    host, "dpkg-query", "-W", "-f", "${Package} ${Version}\\n", *names
                ).splitlines()
            )
            for host, names in packages.items()
        }
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
            "commit": commit + ("+changes" if dirty else ""),
            "kernel": self.run(first, "uname", "-r").strip(),
            "cpus": int(self.run(first, "nproc")),
            "packages": versions[first] if len(versions) == 1 else versions,
        }
