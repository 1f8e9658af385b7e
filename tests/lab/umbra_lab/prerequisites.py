"""What the lab needs of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .shell import PrerequisiteError, say

# Command: the Debian package that has it.
_COMMANDS = {
    "apt-ftparchive": "apt-utils",
    "ip": "iproute2",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "mount": "mount",
    "nft": "nftables",
    "nsenter": "util-linux",
    "ping": "iputils-ping",
    "setpriv": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sysctl": "procps",
    "systemd-nspawn": "systemd-container",
    "unshare": "util-linux",
}
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21
_FILES = {"/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring"}


def missing_packages() -> list[str]:
    """Debian packages that have to be installed."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = {package for name, package in _COMMANDS.items() if not shutil.which(name, path=path)}
    missing |= {package for name, package in _FILES.items() if not Path(name).exists()}
    return sorted(missing)


def check_root() -> None:
    """Refuse a machine or a user the lab cannot work with."""
    if sys.platform != "linux":
        raise PrerequisiteError("umbra.mail's lab needs Linux.")
    if os.geteuid() != 0:
        raise PrerequisiteError("umbra.mail's lab needs root: run it with sudo.")
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    if not all(effective >> number & 1 for number in (_CAP_NET_ADMIN, _CAP_SYS_ADMIN)):
        raise PrerequisiteError(
            "umbra.mail's lab needs a root with CAP_SYS_ADMIN and CAP_NET_ADMIN: "
            "run it on a machine of its own, or in a privileged container."
        )


def check() -> None:
    """Refuse at once if something is missing, in one sentence that says what to do."""
    check_root()
    if not Path("/dev/net/tun").exists():
        raise PrerequisiteError(
            "umbra.mail's lab needs /dev/net/tun: load the kernel module `tun`, "
            "or let this container have that device."
        )
    if missing := missing_packages():
        names = ", ".join(missing)
        raise PrerequisiteError(
            f"umbra.mail's lab needs the Debian packages {names}: run `lab prerequisites`."
        )


def install() -> None:
    """Install what is missing with apt, then check."""
    check_root()
    if missing := missing_packages():
        if not shutil.which("apt-get"):
            raise PrerequisiteError(
                f"umbra.mail's lab needs the commands of the Debian packages {', '.join(missing)}; "
                "this machine has no apt-get, so install them by its own means."
            )
        say(f"Installing {', '.join(missing)}.")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-qq", "--no-install-recommends", *missing]):
            done = subprocess.run(
                ["apt-get", "--yes", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                check=False,
            )
            # A failed update may be a foreign source; only the installation decides.
            if done.returncode and command[0] == "install":
                last = (done.stdout.strip().splitlines() or ["no message"])[-1]
                raise PrerequisiteError(f"apt-get could not install {', '.join(missing)}: {last}")
    check()
    say("All that the lab needs is there.")
