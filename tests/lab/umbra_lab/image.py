"""The Debian 13 image that all hosts share, cached under a hash of what it is made from."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from .paths import STATE_ROOT, Lab, locked, write_atomically
from .shell import LabError, run, say

SUITE = "trixie"
# What a plain Debian server has that Ansible and the roles count on, and tools to look around with.
BASE = (
    *("systemd", "systemd-sysv", "dbus", "openssh-server", "sudo", "python3", "python3-apt"),
    *("iproute2", "iputils-ping", "nftables", "procps", "less"),
)
_OPTIONS = ("--variant=minbase", "--format=directory", "--skip=cleanup/apt")
_HERE = Path(__file__).parent
_HOOK = _HERE / "image_hook.sh"
_PACKAGES = _HERE.parent / "packages.txt"


def cache_dir() -> Path:
    """Where images are kept."""
    return Path(os.environ.get("UMBRA_LAB_CACHE", "/var/cache/umbra-lab"))


def package_names(text: str) -> list[str]:
    """The names in a package list, one a line, sorted; `#` begins a comment."""
    lines = (line.split("#", 1)[0].strip() for line in text.splitlines())
    return sorted({line for line in lines if line})


def image_name(base: Iterable[str], cached: Iterable[str], hook: str, architecture: str) -> str:
    """A name that changes when, and only when, something that goes into the image changes."""
    parts = [SUITE, architecture, *_OPTIONS]
    parts += [" ".join(sorted(base)), " ".join(sorted(cached)), hook]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{SUITE}-{digest[:16]}"


def current_name() -> str:
    """The name of the image that the files beside this one describe."""
    return image_name(
        BASE, package_names(_PACKAGES.read_text()), _HOOK.read_text(), os.uname().machine
    )


def root_of(name: str) -> Path:
    """The root directory of an image."""
    return cache_dir() / name / "root"


def ensure(lab: Lab | None = None, *, rebuild: bool = False) -> str:
    """Build the image unless it is there, note that `lab` uses it, remove unused ones."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    name = current_name()
    # One lock for all of it: two labs that start at once build once, and none loses its image.
    with locked(cache_dir() / "lock", "Waiting for another lab that builds the image."):
        if rebuild and name in _in_use():
            raise LabError("A lab uses the image: remove the labs first (`lab down --all`).")
        if rebuild or not (cache_dir() / name).is_dir():
            _build(name)
        if lab:
            lab.dir.mkdir(parents=True, exist_ok=True)
            write_atomically(lab.image_record, name + "\n")
        keep = _in_use() | {name}
        for entry in cache_dir().iterdir():
            if entry.is_dir() and entry.name not in keep:
                say(f"Removing the unused image {entry.name}.")
                shutil.rmtree(entry)
    return name


def _in_use() -> set[str]:
    # A lab's record, and its hosts': these may be older than the lab's last `up`.
    records = [*STATE_ROOT.glob("*/image"), *STATE_ROOT.glob("*/hosts/*/image")]
    return {path.read_text().strip() for path in records}


def _build(name: str) -> None:
    started = time.monotonic()
    say(f"Building the Debian image {name}: two to four minutes, once.")
    temporary = cache_dir() / f".build-{name}"
    if temporary.exists():  # left by an interrupted run, whose processes died with it
        shutil.rmtree(temporary)
    temporary.mkdir()
    packages = " ".join(package_names(_PACKAGES.read_text()))
    mirror = [value] if (value := os.environ.get("UMBRA_LAB_MIRROR")) else []
    # If we are killed the build dies with us (PID namespace), and its mounts (mount namespace).
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork"]
    command += ["--kill-child=KILL", "--mount-proc", "nice", "mmdebstrap", "--mode=root"]
    command += [*_OPTIONS, f"--include={','.join(BASE)}", f'--customize-hook=sh {_HOOK} "$1"']
    command += [SUITE, str(temporary / "root"), *mirror]
    log = cache_dir() / "build.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"LAB_PACKAGES": packages, "LC_ALL": "C.UTF-8"},
        )
        assert process.stdout
        for line in process.stdout:
            file.write(line)
            if line.startswith("I: ") and "success" not in line:
                say(f"  {line[3:].strip()}")
            elif line.startswith("E: "):
                say(f"  error: {line[3:].strip()}")
        if process.wait():
            shutil.rmtree(temporary, ignore_errors=True)
            raise LabError(f"The image could not be built; what happened is in {log}.")
    # On disk before it gets its name: a power cut must not leave a named half image.
    run(["sync", "-f", str(temporary)], timeout=600)
    target = cache_dir() / name
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    size = int(run(["du", "-sm", str(target)], timeout=300).stdout.split()[0])
    say(f"Built the image in {time.monotonic() - started:.0f} s: {size} MB in {target}.")
