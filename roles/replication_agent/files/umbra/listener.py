"""Ports that stay this agent's while it restarts, and HTTP connections with a bound.

Any user of the host may listen on a port over 1023 that is free, and Dovecot would tell him the
token of the notifications and believe his answers. So systemd keeps a second socket on each port of
the agent's. It is bound and does not listen: whoever connects while there is no agent is refused at
once, as ever.
"""

from __future__ import annotations

import asyncio
import logging
import socket

from aiohttp import web

from umbra import systemd

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""How long a connection may take to its first request (seconds)."""


def bound(name: str, address: str, port: int) -> socket.socket:
    """Return a socket bound to a port, and have systemd keep the port under ``name``.

    OSError if the port cannot be had.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    _keep(name, family, (address, port))
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Nor do connections of the agent before this one that have ended keep the port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _keep(name: str, family: socket.AddressFamily, place: tuple[str, int]) -> None:
    kept = systemd.stored_socket(name)
    if kept is not None:
        with kept:
            if kept.getsockname()[:2] == place:
                return
        systemd.forget_socket(name)
    with socket.socket(family) as keeper:
        # Processes of one user may share a port then. Without SO_REUSEADDR, which would let others
        # in while nobody listens.
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            keeper.bind(place)
        except OSError as error:
            log.warning("port %d is not kept over a restart of the agent: %s", place[1], error)
        else:
            systemd.store_socket(name, keeper)


class _Closed(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class Entrance:
    """Makes the handlers of an HTTP server's connections: so many, and each with a request soon.

    aiohttp keeps a connection that never sends a request for ever.

    :param most: connections at a time; further ones are closed.
    """

    def __init__(self, server: web.Server, most: int) -> None:
        self._server = server
        self._most = most
        self._silent: set[web.RequestHandler] = set()

    def __call__(self) -> asyncio.BaseProtocol:
        """Return what handles a new connection."""
        if len(self._server.connections) >= self._most:
            log.warning("a connection was closed: there are %d already", self._most)
            return _Closed()
        handler = self._server()
        self._silent.add(handler)
        asyncio.get_running_loop().call_later(PATIENCE, self._look, handler)
        return handler

    def heard(self, request: web.BaseRequest) -> None:
        """Note that a connection has sent a request, head and all."""
        self._silent.discard(request.protocol)

    def _look(self, handler: web.RequestHandler) -> None:
        if handler in self._silent:
            self._silent.remove(handler)
            handler.force_close()
