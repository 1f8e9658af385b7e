"""The Debian images that hosts share, one a release, named by a hash of what each is made from."""

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

# What a plain Debian server has that Ansible and the roles count on, and tools to look around with.
BASE = (
    *("systemd", "systemd-sysv", "dbus", "openssh-server", "sudo", "python3", "python3-apt"),
    *("iproute2", "iputils-ping", "nftables", "procps", "less"),
)
_OPTIONS = ("--variant=minbase", "--format=directory", "--skip=cleanup/apt")
_HERE = Path(__file__).parent
_HOOK = _HERE / "image_hook.sh"
# Which packages a host of a release can install.
PACKAGES = {
    "trixie": _HERE.parent / "packages.txt",
    "bookworm": _HERE.parent / "packages-bookworm.txt",
}


def cache_dir() -> Path:
    """Where images are kept."""
    return Path(os.environ.get("UMBRA_LAB_CACHE", "/var/cache/umbra-lab"))


def package_names(text: str) -> list[str]:
    """The names in a package list, one a line, sorted; `#` begins a comment."""
    lines = (line.split("#", 1)[0].strip() for line in text.splitlines())
    return sorted({line for line in lines if line})


def image_name(
    release: str, base: Iterable[str], cached: Iterable[str], hook: str, architecture: str
) -> str:
    """A name that changes when, and only when, something that goes into the image changes."""
    parts = [release, architecture, *_OPTIONS]
    parts += [" ".join(sorted(base)), " ".join(sorted(cached)), hook]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{release}-{digest[:16]}"


def current_name(release: str) -> str:
    """The name of the image of a release that the files beside this one describe."""
    return image_name(release, BASE, _cached(release), _HOOK.read_text(), os.uname().machine)


def _cached(release: str) -> list[str]:
    return package_names(PACKAGES[release].read_text())


def root_of(name: str) -> Path:
    """The root directory of an image."""
    return cache_dir() / name / "root"


def ensure(
    releases: Iterable[str], lab: Lab | None = None, *, rebuild: bool = False
) -> dict[str, str]:
    """Build the images that are not there, note that `lab` uses them, remove outdated ones.

    Returns the name of each release's image.
    """
    cache_dir().mkdir(parents=True, exist_ok=True)
    wanted = {release: current_name(release) for release in releases}
    # One lock for all of it: two labs that start at once build once, and none loses its image.
    with locked(cache_dir() / "lock", "Waiting for another lab that builds the image."):
        if rebuild and _in_use() & set(wanted.values()):
            raise LabError("A lab uses the image: remove the labs first (`lab down --all`).")
        for release, name in wanted.items():
            if rebuild or not (cache_dir() / name).is_dir():
                _build(release, name)
        if lab:
            lab.dir.mkdir(parents=True, exist_ok=True)
            write_atomically(lab.image_record, "".join(f"{name}\n" for name in wanted.values()))
        keep = _in_use() | {current_name(release) for release in PACKAGES}
        for entry in cache_dir().iterdir():
            if entry.is_dir() and entry.name not in keep:
                say(f"Removing the unused image {entry.name}.")
                shutil.rmtree(entry)
    return wanted


def _in_use() -> set[str]:
    # A lab's record, and its hosts': these may be older than the lab's last `up`.
    records = [*STATE_ROOT.glob("*/image"), *STATE_ROOT.glob("*/hosts/*/image")]
    return {name for path in records for name in path.read_text().split()}


def _build(release: str, name: str) -> None:
    started = time.monotonic()
    say(f"Building the Debian image {name}: two to four minutes, once.")
    temporary = cache_dir() / f".build-{name}"
    if temporary.exists():  # left by an interrupted run, whose processes died with it
        shutil.rmtree(temporary)
    temporary.mkdir()
    mirror = [value] if (value := os.environ.get("UMBRA_LAB_MIRROR")) else []
    # If we are killed the build dies with us (PID namespace), and its mounts (mount namespace).
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork"]
    command += ["--kill-child=KILL", "--mount-proc", "nice", "mmdebstrap", "--mode=root"]
    command += [*_OPTIONS, f"--include={','.join(BASE)}", f'--customize-hook=sh {_HOOK} "$1"']
    command += [release, str(temporary / "root"), *mirror]
    log = cache_dir() / "build.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ
            | {
                "LAB_PACKAGES": " ".join(_cached(release)),
                "LAB_RELEASE": release,
                "LC_ALL": "C.UTF-8",
            },
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
