"""systemd's notification protocol (sd_notify(3)): readiness, status, watchdog, stored sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

FIRST_FD = 3
MAX_STATUS = 1000  # characters


def notify(message: str, sockets: Sequence[socket.socket] = ()) -> None:
    """Send ``message``, for example ``READY=1``, to the service manager, and sockets along.

    Nothing happens outside of a unit.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.connect(address)
        data = message.encode("utf-8", "replace")
        if sockets:
            socket.send_fds(channel, [data], [item.fileno() for item in sockets])
        else:
            channel.send(data)


def alive(status: str) -> None:
    """Tell the service manager that the process is alive, and in what state.

    In one line that is cut where it is long: a message of over 4096 bytes is dropped as a whole.
    """
    notify(f"WATCHDOG=1\nSTATUS={' '.join(status.split())[:MAX_STATUS]}")


def store_socket(name: str, item: socket.socket) -> None:
    """Have the service manager keep a socket for the next process (``FileDescriptorStoreMax``)."""
    # It would drop one that does not listen: the kernel calls that hung up.
    notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [item])


def forget_socket(name: str) -> None:
    """Have the service manager close what it keeps under this name."""
    notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def stored_socket(name: str) -> socket.socket | None:
    """Return the socket that an earlier process has stored under this name, if there is one."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    if name not in names:
        return None
    return socket.socket(fileno=FIRST_FD + names.index(name))


def watchdog_interval() -> float | None:
    """Return how often to say ``WATCHDOG=1``, half of what the unit asks for, in seconds."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 2_000_000 if usec.isdigit() and int(usec) else None
