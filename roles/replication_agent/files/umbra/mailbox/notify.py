"""Entrance of Dovecot's notifications: HTTP on the loopback address.

``POST /notify`` with ``Authorization: Bearer TOKEN`` and ``{"user": "...", "events": [...]}``, and
``"mailbox": "..."`` if nothing but messages in there has changed; Dovecot's process waits for the
answer before its client sees OK:

====  =====================================================================
200   the change may be acknowledged (``mirrored``, or ``recorded`` while the group is alone)
400   not a notification
401   wrong token
408   it did not come to its end
503   this node may not acknowledge changes; nothing is known of the change
====  =====================================================================
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from umbra import listener
from umbra.mailbox import metrics
from umbra.mailbox.carrier import valid_user
from umbra.mailbox.doveadm import listable
from umbra.mailbox.mirror import Verdict

log = logging.getLogger(__name__)

MAX_BODY = 64 * 1024
# Events of Dovecot after which the tree of mailboxes may need a second sync, see ``parents``.
RESTRUCTURING = frozenset({"MailboxCreate", "MailboxRename"})
# How long a connection without a request is kept (seconds): for longer than Dovecot's script keeps
# it, which has one for each session. So no change meets the end of one; and not for longer, since
# each takes memory here, and most sessions are idle.
KEEP_ALIVE = 2 * 60.0
# Connections at a time: half of what the agent may have open (LimitNOFILE).
MAX_CONNECTIONS = 32768
# How long a notification may take to come, once it has begun (seconds).
READ_TIMEOUT = 10.0
# Who still waits when the agent stops is cut off after this long (seconds).
SHUTDOWN_TIMEOUT = 1.0


class NotifyServer:
    """Listens for notifications.

    :param changed: given a user and a mailbox ("" for any), returns when the change may be
        acknowledged; whatever it raises is answered with 503.
    :param restructured: called before that with a user who has made or renamed mailboxes.
    """

    def __init__(
        self,
        address: str,
        port: int,
        token: str,
        changed: Callable[[str, str], Awaitable[Verdict]],
        restructured: Callable[[str], None] = lambda user: None,
    ) -> None:
        self._address = address
        self._port = port
        self._bearer = f"Bearer {token}".encode()
        self._changed = changed
        self._restructured = restructured
        self._runner: web.ServerRunner | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. OSError if the port is taken."""
        # The low-level server: one path needs no router, and each of its layers is paid for by
        # every change.
        server = web.Server(self._handle, access_log=None, keepalive_timeout=KEEP_ALIVE)
        self._runner = web.ServerRunner(server, shutdown_timeout=SHUTDOWN_TIMEOUT)
        await self._runner.setup()
        self._entrance = listener.Entrance(server, MAX_CONNECTIONS)
        self._server = await asyncio.get_running_loop().create_server(
            self._entrance,
            sock=listener.bound("notify", self._address, self._port),
            backlog=1024,
        )

    async def stop(self) -> None:
        """Stop listening; who still waits gets no answer, and so no OK."""
        if self._server is not None:
            self._server.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        self._entrance.heard(request)
        answer = await self._answer(request)
        metrics.NOTIFICATIONS.labels(answer.reason).inc()
        return answer

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        if request.method != "POST" or request.path != "/notify":
            return web.Response(status=404)
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self._bearer):
            return web.Response(status=401)
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                notification = await _notification(request)
        except TimeoutError:
            return web.Response(status=408)
        if notification is None:
            return web.Response(status=400)
        user, events, mailbox = notification
        if not RESTRUCTURING.isdisjoint(events):
            self._restructured(user)
        try:
            verdict = await self._changed(user, mailbox)
        except Exception as error:
            log.warning(
                "a change of %s cannot be acknowledged: %s", user, error or type(error).__name__
            )
            return web.Response(status=503)
        return web.Response(text=verdict.value)


async def _notification(request: web.BaseRequest) -> tuple[str, list[str], str] | None:
    if (request.content_length or 0) > MAX_BODY:
        return None
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > MAX_BODY:
            return None
    try:
        raw = json.loads(body)
        user, events = raw["user"], list(map(str, raw.get("events", ())))
        mailbox = raw.get("mailbox", "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not valid_user(user):
        return None
    # A change of mailboxes is one of all, and so is one in a mailbox that dsync cannot name.
    known = not events and isinstance(mailbox, str) and listable(mailbox)
    return user, events, mailbox if known else ""
