"""A disk of a host's own, which can stall and fail, and forgets in a power cut what was not synced.

An ext4 file system in a file, mounted where the host's processes see it and nobody else. Without
one, a host's files are the machine's, whose page cache outlives every power cut of the lab.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from contextlib import suppress
from pathlib import Path

from . import cgroups
from .paths import Lab
from .plan import Member
from .shell import LabError, run

_SIZE = 8 << 30  # bytes; sparse

# linux/fs.h and fs/ext4/ext4.h
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2


def make(directory: Path) -> None:
    """Make an empty disk for the host with that directory."""
    (directory / "disk").mkdir()
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(_SIZE)
    run(["mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard", str(image)])


def exists(lab: Lab, member: Member) -> bool:
    """Whether that host was given a disk of its own."""
    return (lab.host_dir(member) / "disk.img").exists()


def stall(lab: Lab, member: Member) -> None:
    """Whoever writes, or waits for what is written, waits until `release`."""
    _control(lab, member, _FIFREEZE, 0, already=errno.EBUSY)


def release(lab: Lab, member: Member) -> None:
    """Let a stalled disk go on."""
    _control(lab, member, _FITHAW, 0, already=errno.EINVAL)


def fail(lab: Lab, member: Member) -> None:
    """From now on all fails with EIO; what was not synced is lost. A new boot mounts it again."""
    _control(lab, member, _SHUTDOWN, _NO_LOG_FLUSH)
    release(lab, member)  # it may have been stalled


def wait_unmounted(lab: Lab, member: Member, timeout: float = 10) -> None:
    """Wait until the kernel has let go of it, which is a moment after the last process died."""
    image = lab.host_dir(member) / "disk.img"
    deadline = time.monotonic() + timeout
    while run(["losetup", "--associated", str(image)]).stdout:
        if time.monotonic() > deadline:
            raise LabError(f"The disk of {member.name} is still mounted after {timeout:g} s.")
        time.sleep(0.01)


def _mounted(lab: Lab, member: Member) -> Path | None:
    """The mount point as one of the host's processes sees it: it is in their namespace only."""
    for pid in cgroups.processes(f"{lab.cgroup}/hosts/{member.name}"):
        seen = Path(f"/proc/{pid}/root{lab.host_dir(member)}/disk")
        with suppress(OSError):
            if seen.is_mount():
                return seen
    return None


def _control(
    lab: Lab, member: Member, request: int, value: int, already: int | None = None
) -> None:
    """Make a request of the file system; ``already`` is the error that says that it is so."""
    if (mounted := _mounted(lab, member)) is None:
        raise LabError(
            f"{member.name} has no disk of its own in lab {lab.name!r}, or is off: "
            f"`lab --name {lab.name} up --disks {member.name}` makes one for a new host."
        )
    fd = os.open(mounted, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, request, struct.pack("I", value))
    except OSError as error:
        if error.errno != already:
            raise LabError(f"The disk of {member.name} refuses: {error.strerror}.") from error
    finally:
        os.close(fd)
