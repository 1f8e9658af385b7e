"""Which processes belong to a lab, by cgroup v2: the kernel keeps it right even after `kill -9`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from .shell import LabError, run

_OWN_MOUNT = Path("/run/umbra-lab/cgroup")


@cache
def root() -> Path:
    """Where cgroup2 is mounted; mounted by us where the machine shows only cgroup v1."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    _OWN_MOUNT.mkdir(parents=True, exist_ok=True)
    run(["mount", "-t", "cgroup2", "cgroup2", str(_OWN_MOUNT)])
    return _OWN_MOUNT


def release_root() -> None:
    """Undo what `root` mounted, if no lab is left."""
    with suppress(OSError):
        (root() / "umbra-lab").rmdir()
    if root() == _OWN_MOUNT and not (root() / "umbra-lab").exists():
        run(["umount", str(_OWN_MOUNT)])
        _OWN_MOUNT.rmdir()
        _OWN_MOUNT.parent.rmdir()
        root.cache_clear()


def make(name: str) -> Path:
    """Make a cgroup if it is not there, and return its directory."""
    path = root() / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def enter(name: str) -> None:
    """Move this process to a cgroup; "" is the root."""
    (make(name) / "cgroup.procs").write_text(str(os.getpid()))


def processes(name: str) -> Iterator[int]:
    """The processes in a cgroup and those below it."""
    for directory, _, _ in os.walk(root() / name):
        with suppress(OSError):
            yield from map(int, (Path(directory) / "cgroup.procs").read_text().split())


def is_populated(name: str) -> bool:
    """Whether there is any process in a cgroup or below it.

    One read: a process that moves from one to another below is missed by who walks through them.
    """
    with suppress(OSError):  # there is no such cgroup
        return "populated 1" in (root() / name / "cgroup.events").read_text()
    return False


def kill(name: str, timeout: float = 10) -> None:
    """Kill all processes in a cgroup at one instant, wait until they are gone, remove it."""
    path = root() / name
    if not path.exists():
        return
    (path / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + timeout
    while True:
        if not is_populated(name):
            with suppress(OSError):
                for directory, _, _ in os.walk(path, topdown=False):
                    os.rmdir(directory)
                return
        if time.monotonic() > deadline:
            left = list(processes(name))
            raise LabError(f"Processes of {name} outlived SIGKILL by {timeout:g} s: {left}.")
        time.sleep(0.01)


def set_frozen(name: str, frozen: bool, timeout: float = 10) -> None:
    """Stop every process in a cgroup where it stands, or let all go on; returns when it is so."""
    path = root() / name
    (path / "cgroup.freeze").write_text("1" if frozen else "0")
    deadline = time.monotonic() + timeout
    while is_frozen(name) is not frozen:
        if time.monotonic() > deadline:
            raise LabError(f"The kernel did not {'freeze' if frozen else 'thaw'} {name}.")
        time.sleep(0.005)


def is_frozen(name: str) -> bool:
    """Whether all processes of a cgroup are frozen."""
    return "frozen 1" in (root() / name / "cgroup.events").read_text()
