"""Where one lab keeps its things. Everything is named after the lab, so that labs never meet."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .plan import Member, Site

STATE_ROOT = Path("/var/lib/umbra-lab")
NETNS_ROOT = Path("/run/netns")
# Where `make venv` puts Ansible.
TOOLS = Path(__file__).resolve().parents[3] / ".venv" / "bin"


@dataclass(frozen=True)
class Lab:
    """The names of one lab's files, namespaces and cgroups."""

    name: str

    @property
    def dir(self) -> Path:
        """All of the lab's state."""
        return STATE_ROOT / self.name

    @property
    def lock(self) -> Path:
        """Held by commands that make or remove things; outside of what `down` removes."""
        return Path(f"/run/lock/umbra-lab.{self.name}.lock")

    @property
    def ssh_dir(self) -> Path:
        """Key pair, known hosts and configuration for SSH."""
        return self.dir / "ssh"

    @property
    def ssh_config(self) -> Path:
        """Configuration for `ssh -F`."""
        return self.ssh_dir / "config"

    @property
    def wan_settings(self) -> Path:
        """The WAN's settings, the truth that the relay reads."""
        return self.dir / "wan.json"

    @property
    def wan_socket(self) -> Path:
        """The relay's control socket."""
        return self.dir / "wan.sock"

    @property
    def image_record(self) -> Path:
        """Holds the name of the image that the lab uses, which is therefore not pruned."""
        return self.dir / "image"

    @property
    def netns_prefix(self) -> str:
        """What the names of all of the lab's network namespaces begin with."""
        return f"umbra.{self.name}."

    @property
    def cgroup(self) -> str:
        """The cgroup of all of the lab's processes, below the cgroup root."""
        return f"umbra-lab/{self.name}"

    def host_dir(self, member: Member) -> Path:
        """A host's disk, console log and mount point."""
        return self.dir / "hosts" / member.name

    def netns(self, thing: Member | Site) -> str:
        """The network namespace of a member, or of a site's router."""
        router = "router-" if isinstance(thing, Site) else ""
        return f"{self.netns_prefix}{router}{thing.name}"


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file in one step: whoever reads it sees the old or the new text, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.touch(mode=mode)
    temporary.write_text(text)
    temporary.chmod(mode)
    temporary.replace(path)


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Hold an exclusive lock on a file; say `waiting` when another process has it."""
    from .shell import say

    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(waiting)
                fcntl.flock(file, fcntl.LOCK_EX)
            # The holder before us may have removed the file: then our lock is on nothing.
            with suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    yield
                    return
