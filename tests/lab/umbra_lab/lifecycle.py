"""Bringing a lab up, taking it down, and proving that nothing is left."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import cgroups, disk, hosts, image, network, wan
from .links import PAIRS
from .paths import NETNS_ROOT, STATE_ROOT, Lab, write_atomically
from .plan import ALL_HOSTS, Member, hosts_file
from .shell import LabError, run, say

# A booted host takes 6, and Dovecot one for each idle IMAP client; the kernel's default is 128.
_INOTIFY_INSTANCES = 4096


def up(
    lab: Lab, members: Sequence[Member], changes: dict[str, Any], disks: Collection[Member] = ()
) -> None:
    """Make what is missing and leave what is whole.

    :param changes: settings of the WAN.
    :param disks: which new hosts get a disk of their own.
    """
    # A lab that is up already with other hosts keeps their images: each host names its own.
    images = image.ensure({member.release for member in members}, lab)
    _raise_limits()
    # Children of a process in the lab's cgroup cannot escape `down`, whenever we are killed.
    cgroups.enter(f"{lab.cgroup}/setup")
    _kill_other_setups(lab)
    _write_files(lab)
    if not network.is_complete(lab):
        say("Making the network: four sites, their routers, the WAN.")
        _kill_all(lab, keep_self=True)
        network.create(lab)
    wan.start(lab)
    if changes:
        wan.change(lab, list(PAIRS), **changes)
    for member in members:
        hosts.prepare(lab, member, images[member.release], own_disk=member in disks)
    _write_ssh(lab)
    for member in members:
        if hosts.is_on(lab, member):
            cgroups.set_frozen(hosts.cgroup(lab, member), False)
            if disk.exists(lab, member):
                disk.release(lab, member)
    off = [member for member in members if not hosts.is_on(lab, member)]
    for member in off:
        hosts.boot(lab, member)
    if off:
        say(f"Booting {', '.join(member.name for member in off)}.")
    for member in members:  # they boot side by side; only the waiting is in turn
        hosts.wait(lab, member)


def power_on(lab: Lab, member: Member) -> None:
    """Boot a host that is off, and wait until SSH answers."""
    if not network.is_complete(lab) or not lab.host_dir(member).exists():
        raise LabError(f"{member.name} is not part of lab {lab.name!r}: run `lab up`.")
    if not hosts.is_on(lab, member):
        cgroups.enter(f"{lab.cgroup}/setup")
        hosts.boot(lab, member)
    hosts.wait(lab, member)


def down(lab: Lab) -> None:
    """Remove everything of a lab, whatever state it is in."""
    cgroups.enter("")  # run from inside the lab, we would kill ourselves
    for member in ALL_HOSTS:
        if disk.exists(lab, member) and hosts.is_on(lab, member):
            disk.fail(lab, member)  # a process that waits for a stalled disk cannot be killed
    _kill_all(lab)
    network.remove(lab)
    if lab.dir.exists():
        shutil.rmtree(lab.dir)
    with suppress(OSError):
        STATE_ROOT.rmdir()
    cgroups.release_root()


def all_labs() -> list[Lab]:
    """Labs of which anything is left: state, a namespace or a cgroup."""
    found = {p.name for p in STATE_ROOT.glob("*") if p.is_dir()}
    found |= {p.name for p in (cgroups.root() / "umbra-lab").glob("*") if p.is_dir()}
    if NETNS_ROOT.is_dir():
        parts = [p.name.split(".") for p in NETNS_ROOT.iterdir()]
        found |= {part[1] for part in parts if len(part) == 3 and part[0] == "umbra"}
    return [Lab(name) for name in sorted(found)]


def leftovers(lab: Lab) -> list[str]:
    """Everything of the lab that is there, each in one line; after `down` there is none."""
    left = [f"process {pid}: {_command(pid)}" for pid in cgroups.processes(lab.cgroup)]
    left += [f"process {pid} in a namespace: {_command(pid)}" for pid in network.processes(lab)]
    left += [f"network namespace {name}" for name in network.namespaces(lab)]
    directory = cgroups.root() / lab.cgroup
    left += [f"cgroup {directory}"] if directory.exists() else []
    left += [f"state {lab.dir}"] if lab.dir.exists() else []
    # The lab's mounts are in its hosts' own mount namespaces: look into everybody's.
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if f"{lab.dir}/" in (entry / "mountinfo").read_text():
                    left.append(f"mount seen by process {entry.name}: {_command(int(entry.name))}")
    return left


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
    return "gone"


def _raise_limits() -> None:
    """Raise the one limit of the whole machine that the hosts share and soon exhaust."""
    path = Path("/proc/sys/fs/inotify/max_user_instances")
    if int(path.read_text()) < _INOTIFY_INSTANCES:
        say(f"Raising fs.inotify.max_user_instances to {_INOTIFY_INSTANCES}: hosts share it.")
        try:
            path.write_text(str(_INOTIFY_INSTANCES))
        except OSError:
            say("That is refused here: with many hosts, some units may fail to start.")


def _kill_other_setups(lab: Lab) -> None:
    """Kill what an interrupted `up` had begun to start."""
    for pid in cgroups.processes(f"{lab.cgroup}/setup"):
        if pid != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _kill_all(lab: Lab, *, keep_self: bool = False) -> None:
    if keep_self:
        for part in ("hosts", "wan", "control"):
            cgroups.kill(f"{lab.cgroup}/{part}")
    else:
        cgroups.kill(lab.cgroup)
    # Somebody's own `ip netns exec` is in no cgroup of ours, but would keep the namespace alive.
    deadline = time.monotonic() + 10
    while pids := [pid for pid in network.processes(lab) if pid != os.getpid()]:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise LabError(f"Processes in the lab's namespaces do not die: {pids}.")
        time.sleep(0.02)


def _write_files(lab: Lab) -> None:
    (lab.dir / "hosts").mkdir(parents=True, exist_ok=True)
    (lab.ssh_dir / "cp").mkdir(parents=True, exist_ok=True)
    lab.ssh_dir.chmod(0o700)
    write_atomically(lab.dir / "hosts.txt", hosts_file(own=socket.gethostname()))
    write_atomically(lab.dir / "resolv.conf", "# The lab has no name server.\n")
    key = lab.ssh_dir / "id_ed25519"
    # The public half is written last: without it the pair is made anew.
    if not key.with_suffix(".pub").exists():
        key.unlink(missing_ok=True)
        comment = f"lab {lab.name}"
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(key)])


def _write_ssh(lab: Lab) -> None:
    known = []
    for member in ALL_HOSTS:
        if key := hosts.host_key(lab, member):
            known.append(f"{member.name},{member.fqdn},{member.v4},{member.v6} {key}\n")
    write_atomically(lab.ssh_dir / "known_hosts", "".join(known))
    own = " ".join(f"{m.name} {m.fqdn} {m.v4} {m.v6}" for m in ALL_HOSTS)
    write_atomically(
        lab.ssh_config,
        f"Host {own}\n"
        "  User root\n"
        f"  IdentityFile {lab.ssh_dir}/id_ed25519\n"
        "  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {lab.ssh_dir}/known_hosts\n"
        "  StrictHostKeyChecking yes\n"
        f"  ControlPath {lab.ssh_dir}/cp/%C\n",
    )
