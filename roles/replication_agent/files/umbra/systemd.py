"""systemd's notification protocol (sd_notify(3)): readiness, status text and the watchdog."""

from __future__ import annotations

import os
import socket


def notify(message: str) -> None:
    """Send ``message``, for example ``READY=1``, to the service manager.

    Nothing happens outside of a unit.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.connect(address)
        channel.send(message.encode())


def watchdog_interval() -> float | None:
    """Return how often to say ``WATCHDOG=1``, half of what the unit asks for, in seconds."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 2_000_000 if usec.isdigit() and int(usec) else None
