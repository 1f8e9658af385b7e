"""Lab hosts: preparing a disk, booting, waiting, entering, killing."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
import uuid
from contextlib import suppress
from pathlib import Path

from . import cgroups, disk, image, network
from .paths import NETNS_ROOT, TOOLS, Lab
from .plan import CONTROL, Member, hosts_file
from .shell import LabError, run

# Mounts are made in a mount namespace of the host's own and vanish with its processes.
_BOOT = """
set -eu
FILES="$DIR"
if [ -e "$DIR/disk.img" ]; then
    FILES="$DIR/disk"
    mount -o loop "$DIR/disk.img" "$FILES"
    if [ ! -e "$FILES/work" ]; then
        rm -rf "$FILES/upper"
        cp -a "$DIR/upper" "$FILES/upper"
        sync -f "$FILES"
        mkdir "$FILES/work"
    fi
fi
mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=$FILES/upper,workdir=$FILES/work" "$DIR/root"
[ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn
exec systemd-nspawn --quiet --boot --directory="$DIR/root" \\
    --machine="$MACHINE" --hostname="$HOST" --register=no --keep-unit --settings=no \\
    --network-namespace-path="$NETNS" --bind=/dev/net/tun \\
    --capability=CAP_NET_ADMIN,CAP_NET_RAW --drop-capability=CAP_SYS_TIME \\
    --resolv-conf=off --timezone=off --link-journal=no --console=pipe
"""

_ENVIRONMENT = [
    *("HOME=/root", "USER=root", "LOGNAME=root", "SHELL=/bin/bash", "LANG=C.UTF-8"),
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
]


def cgroup(lab: Lab, member: Member) -> str:
    """The cgroup of all of a host's processes."""
    return f"{lab.cgroup}/hosts/{member.name}"


def is_on(lab: Lab, member: Member) -> bool:
    """Whether the host has any process."""
    return cgroups.is_populated(cgroup(lab, member))


def state(lab: Lab, member: Member) -> str:
    """One word: absent, off, frozen, booting, running, or what systemd says."""
    if not lab.host_dir(member).exists():
        return "absent"
    if not is_on(lab, member):
        return "off"
    if cgroups.is_frozen(cgroup(lab, member)):
        return "frozen"
    command = enter_command(lab, member, ["systemctl", "is-system-running"])
    return (run(command, check=False, timeout=10).stdout.strip() if command else "") or "booting"


def prepare(lab: Lab, member: Member, image_name: str, *, own_disk: bool = False) -> None:
    """Make the host's files if it has none: what differs from the image, in the overlay's upper.

    :param own_disk: have them on a file system of its own, see `disk`.
    """
    final = lab.host_dir(member)
    if final.exists():
        return
    # Made aside and renamed: an interrupted run leaves no half host.
    new = final.with_name(f".{member.name}.new")
    if new.exists():
        shutil.rmtree(new)
    for name in ("root", "work", "upper/etc/ssh", "upper/root/.ssh"):
        (new / name).mkdir(parents=True)
    upper = new / "upper"
    upper.chmod(0o755)
    (upper / "root").chmod(0o700)
    (upper / "root/.ssh").chmod(0o700)
    (upper / "etc/hostname").write_text(member.name + "\n")
    (upper / "etc/hosts").write_text(hosts_file())
    # With an id of its own systemd does not take this for a first boot, which is slow.
    (upper / "etc/machine-id").write_text(uuid.uuid4().hex + "\n")
    key = upper / "etc/ssh/ssh_host_ed25519_key"
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", member.name, "-f", str(key)])
    authorized = upper / "root/.ssh/authorized_keys"
    shutil.copyfile(lab.ssh_dir / "id_ed25519.pub", authorized)
    authorized.chmod(0o600)
    (new / "image").write_text(image_name + "\n")
    if own_disk:
        disk.make(new)
    new.rename(final)


def host_key(lab: Lab, member: Member) -> str | None:
    """The host's public SSH key (type and base64), or None if it has no disk yet."""
    path = lab.host_dir(member) / "upper/etc/ssh/ssh_host_ed25519_key.pub"
    return " ".join(path.read_text().split()[:2]) if path.exists() else None


def boot(lab: Lab, member: Member) -> None:
    """Start the host; it is on when this returns, but has not booted: see `wait`."""
    network.attach(lab, member)
    directory = lab.host_dir(member)
    procs = cgroups.make(cgroup(lab, member)) / "cgroup.procs"
    script = f'echo $$ >{procs} && exec unshare --mount --propagation private sh -c "$BOOT"'
    with (directory / "console.log").open("ab") as log:
        process = subprocess.Popen(
            ["sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "BOOT": _BOOT,
                "LOWER": str(image.root_of((directory / "image").read_text().strip())),
                "DIR": str(directory),
                "HOST": member.name,
                "MACHINE": f"umbra-{lab.name}-{member.name}",
                "NETNS": str(NETNS_ROOT / lab.netns(member)),
            },
        )
    while process.poll() is None and not is_on(lab, member):
        time.sleep(0.001)


def wait(lab: Lab, member: Member, timeout: float = 180) -> None:
    """Wait until systemd has booted with no failed unit and SSH answers with the right key."""
    deadline = time.monotonic() + timeout
    init = None
    while not (init and Path(f"/proc/{init}/root/run/systemd/private").exists()):
        on = is_on(lab, member)
        if time.monotonic() > deadline or not on:
            why = f"has not booted in {timeout:g} s" if on else "has no process any more"
            last = _console(lab, member)
            see = f"lab --name {lab.name} logs {member.name}"
            raise LabError(f"{member.name} does not boot: it {why}; {last}; see `{see}`.")
        time.sleep(0.02)
        init = _init(lab, member)
    command = enter_command(lab, member, ["systemctl", "is-system-running", "--wait"])
    answer = run(command, timeout=max(1, deadline - time.monotonic()), check=False).stdout.strip()
    if answer != "running":
        command = enter_command(lab, member, ["systemctl", "--failed", "--plain", "--no-legend"])
        failed = run(command).stdout.splitlines()
        units = ", ".join(line.split()[0] for line in failed if line) or "no failed unit"
        raise LabError(f"{member.name} booted, but systemd says {answer!r}: {units}.")
    ssh = control_command(lab, ["ssh", "-o", "ConnectTimeout=5", member.name, "true"])
    while (done := run(ssh, check=False)).returncode:
        if time.monotonic() > deadline:
            raise LabError(f"{member.name} booted, but SSH does not answer: {done.stderr.strip()}")
        time.sleep(0.1)


def _console(lab: Lab, member: Member) -> str:
    """What the host's console said last, in one line. A good boot says nothing there."""
    lines = (lab.host_dir(member) / "console.log").read_text(errors="replace").split("\n")
    said = " | ".join(line.strip() for line in lines[-6:] if line.strip())
    return f"its console: {said}" if said else "its console is empty"


def power_off(lab: Lab, member: Member) -> None:
    """Cut the power: not a packet more, every process killed at one instant; the files stay."""
    # The link first: a dying process must not say goodbye to its connections.
    network.unlink(lab, member)
    if disk.exists(lab, member) and is_on(lab, member):
        disk.fail(lab, member)
    cgroups.kill(cgroup(lab, member))
    if disk.exists(lab, member):
        disk.wait_unmounted(lab, member)
    network.discard(lab.netns(member))


def enter_command(lab: Lab, member: Member, command: list[str]) -> list[str]:
    """The command that runs `command` in the host, with its init's capabilities and no more.

    Without that, a root shell entered from outside could set the whole machine's clock.
    """
    init = _init(lab, member)
    if init is None:
        raise LabError(f"{member.name} is off in lab {lab.name!r}.")
    if cgroups.is_frozen(cgroup(lab, member)):
        raise LabError(f"{member.name} is frozen in lab {lab.name!r}.")
    procs = cgroups.make(f"{cgroup(lab, member)}/exec") / "cgroup.procs"
    bounding = int(_status(init)["CapBnd"], 16)
    capabilities = ",".join(["-all", *(f"+cap_{n}" for n in range(64) if bounding >> n & 1)])
    term = f"TERM={os.environ.get('TERM', 'dumb')}"
    return [
        *["sh", "-c", f'echo $$ >{procs}; exec "$@"', "sh"],
        *["nsenter", "--target", str(init), "--all", "--root", "--wd", "--"],
        *["env", "--ignore-environment", *_ENVIRONMENT, term],
        *[
            "setpriv",
            f"--bounding-set={capabilities}",
            f"--inh-caps={capabilities}",
            "--",
            *command,
        ],
    ]


def control_command(lab: Lab, command: list[str]) -> list[str]:
    """The command that runs `command` in the controller's namespace, where `ssh HOST` works."""
    namespace = NETNS_ROOT / lab.netns(CONTROL)
    if not namespace.exists():
        raise LabError(f"There is no lab {lab.name!r}: run `lab --name {lab.name} up`.")
    procs = cgroups.make(f"{lab.cgroup}/control") / "cgroup.procs"
    mounts = "; ".join(
        f"mount --bind {shlex.quote(str(source))} {target}"
        for source, target in (
            (lab.dir / "hosts.txt", "/etc/hosts"),
            (lab.dir / "resolv.conf", "/etc/resolv.conf"),
            (lab.ssh_config, "/etc/ssh/ssh_config"),
        )
        if Path(target).exists()
    )
    path = os.environ.get("PATH", os.defpath)
    if (TOOLS / "ansible-playbook").exists():
        path = f"{TOOLS}:{path}"
    return [
        *["sh", "-c", f'echo $$ >{procs}; exec "$@"', "sh"],
        *["nsenter", f"--net={namespace}", "unshare", "--mount", "--propagation", "private"],
        *["sh", "-ec", f'{mounts}; exec "$@"', "sh"],
        # Two labs have the same addresses: they must not share Ansible's kept SSH connections.
        *["env", f"ANSIBLE_SSH_CONTROL_PATH_DIR={lab.ssh_dir}/cp", f"UMBRA_LAB_NAME={lab.name}"],
        *[f"UMBRA_LAB_SSH_CONFIG={lab.ssh_config}", f"PATH={path}", *command],
    ]


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _init(lab: Lab, member: Member) -> int | None:
    """The process that is PID 1 in the host."""
    for pid in cgroups.processes(cgroup(lab, member)):
        with suppress(OSError, KeyError):
            numbers = _status(pid)["NSpid"].split()
            if len(numbers) > 1 and numbers[-1] == "1":
                return pid
    return None
