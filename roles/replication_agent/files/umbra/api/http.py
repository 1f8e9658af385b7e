"""The HTTP API: everything on the unix socket, status and metrics on the tunnel address too.

Access to the socket is the authentication of an operator (root, and the group of the agent). On the
tunnel WireGuard authenticates the host
and nftables admits nothing else; nothing can be changed there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from umbra import listener
from umbra.api.report import GroupReport
from umbra.cluster.switchover import Refused

MAX_BODY = 64 * 1024
MAX_CONNECTIONS = 256
MAX_SWITCHOVER_S = 600.0

Query = Callable[[], Awaitable[dict[str, Any]]]
Operation = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
Stream = Callable[[dict[str, Any]], AsyncGenerator[dict[str, Any], None]]


class Api:
    """Routes of the API.

    :param queries: what a GET of ``/NAME`` answers, beside the report; may raise Refused. They name
        users and messages, so the socket alone has them.
    :param operations: what a POST to ``/NAME`` does; it gets the JSON body and returns the answer,
        or raises Refused.
    :param streams: the same for operations that take long: each item is one line of the answer, as
        soon as it is there. A client that goes away ends the operation.
    """

    def __init__(
        self,
        report: Callable[[], GroupReport],
        queries: dict[str, Query],
        operations: dict[str, Operation],
        streams: dict[str, Stream],
    ) -> None:
        self._report = report
        self._queries = queries
        self._streams = streams
        self._operations = operations
        self._runners: list[web.AppRunner] = []
        self._servers: list[asyncio.Server] = []

    async def start(self, socket: Path, address: str, port: int) -> None:
        """Listen on both. OSError if either cannot be had."""
        local = self._application()
        for name, query in self._queries.items():
            local.router.add_get(f"/{name}", self._answer(query))
        for name, operation in self._operations.items():
            local.router.add_post(f"/{name}", self._handler(operation))
        for name, stream in self._streams.items():
            local.router.add_post(f"/{name}", self._streaming(stream))
        loop = asyncio.get_running_loop()
        socket.unlink(missing_ok=True)
        self._servers.append(await loop.create_unix_server(await self._run(local), str(socket)))
        socket.chmod(0o660)
        remote = await self._run(self._application())
        at = listener.bound("api", address, port)
        self._servers.append(await loop.create_server(remote, sock=at))

    async def stop(self) -> None:
        """Close the listeners and end what runs."""
        for server in self._servers:
            server.close()
        for runner in self._runners:
            await runner.cleanup()

    async def _run(self, application: web.Application) -> listener.Entrance:
        @web.middleware
        async def heard(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            entrance.heard(request)
            return await handler(request)

        application.middlewares.append(heard)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        self._runners.append(runner)
        assert runner.server is not None
        entrance = listener.Entrance(runner.server, MAX_CONNECTIONS)
        return entrance

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_BODY)
        application.router.add_get("/health", self._health)
        application.router.add_get("/status", self._status)
        application.router.add_get("/metrics", self._metrics)
        return application

    async def _health(self, _: web.Request) -> web.Response:
        report = self._report()
        return web.json_response(report.health(), status=200 if report.protected else 503)

    async def _status(self, _: web.Request) -> web.Response:
        return web.json_response(self._report().to_json())

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @staticmethod
    def _answer(query: Query) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(_: web.Request) -> web.Response:
            try:
                return web.json_response(await query())
            except Refused as error:
                return web.json_response({"error": str(error)}, status=409)

        return handle

    @staticmethod
    def _handler(operation: Operation) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            try:
                return web.json_response(await operation(await _body(request)))
            except (ValueError, Refused) as error:
                return _refusal(error)

        return handle

    @staticmethod
    def _streaming(stream: Stream) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                rows = stream(await _body(request))
                row: dict[str, Any] | None = await anext(rows, None)
            except (ValueError, Refused) as error:
                return _refusal(error)
            response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            await response.prepare(request)
            try:
                while row is not None:
                    await response.write(json.dumps(row).encode() + b"\n")
                    row = await anext(rows, None)
            except ConnectionError:
                pass  # the client has gone
            finally:
                await rows.aclose()
            return response

        return handle


async def _body(request: web.Request) -> dict[str, Any]:
    body = await request.json() if request.can_read_body else {}
    if not isinstance(body, dict):
        raise ValueError("the body must be a JSON object")
    return body


def _refusal(error: Exception) -> web.Response:
    if isinstance(error, Refused):
        return web.json_response({"error": str(error)}, status=409)
    return web.json_response({"error": f"{error}."}, status=400)
