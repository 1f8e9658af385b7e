# Copyright (c) umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Client of the umbra agent's HTTP API on its unix socket. Standard library only."""

from __future__ import annotations

import http.client
import json
import os
import socket
import typing as t

DEFAULT_SOCKET = "/run/umbra/api.sock"

Json = dict[str, t.Any]


class AgentError(Exception):
    """The agent did not do what was asked; the text is a sentence for the operator."""


class AgentUnavailable(AgentError):
    """Nothing answered: the request was not carried out, or nobody can say whether it was."""


class AgentRefused(AgentError):
    """The agent answered that it will not do it, and why."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket; the timeout bounds each single read and write."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(self.timeout)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            raise
        self.sock = sock


class AgentClient:
    """Asks the agent of this host. Every call is bounded by a timeout in seconds."""

    def __init__(self, path: str = DEFAULT_SOCKET, timeout: float = 5.0) -> None:
        self.path = path
        self.timeout = timeout
        self.host = os.uname().nodename

    def health(self) -> Json:
        """Return ``{"status": "protected"|"degraded", "reasons": [...]}``; 503 means degraded."""
        return self._call("GET", "/health", expected=(200, 503))

    def status(self) -> Json:
        """Return what this node knows of the group."""
        return self._call("GET", "/status")

    def switchover(self, to: str, timeout_s: float, dry_run: bool = False) -> Json:
        """Move the primary to the node ``to``.

        Raises AgentRefused with the agent's reason, or AgentUnavailable when no answer came:
        the move may then have happened all the same, so ask for the status.
        """
        body = {"to": to, "dry_run": dry_run, "timeout_s": timeout_s}
        # The agent bounds the wait before the move by that, and the move itself by a minute.
        return self._call("POST", "/switchover", body, timeout=timeout_s + 70.0)

    def _call(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        expected: t.Sequence[int] = (200,),
        timeout: float | None = None,
    ) -> Json:
        connection = _UnixConnection(self.path, timeout if timeout is not None else self.timeout)
        payload = None if body is None else json.dumps(body).encode()
        headers = {} if payload is None else {"Content-Type": "application/json"}
        try:
            connection.request(method, path, body=payload, headers=headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise AgentUnavailable(self._explain(error, path)) from error
        finally:
            connection.close()
        return interpret(response.status, content, expected, f"{method} {path}")

    def _explain(self, error: Exception, path: str) -> str:
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            return f"the agent does not run on {self.host}; start umbra-agent.service"
        if isinstance(error, PermissionError):
            return f"no access to {self.path} on {self.host}; run as root or in group umbra"
        if isinstance(error, socket.timeout):
            return f"the agent on {self.host} did not answer {path} in time"
        return f"the agent on {self.host} closed the connection during {path}: {error}"


def interpret(status: int, content: bytes, expected: t.Sequence[int], request: str) -> Json:
    """Turn an HTTP answer into its JSON object, or into the error that it stands for."""
    try:
        answer = json.loads(content.decode("utf-8"))
    except ValueError:
        answer = None
    if status == 409:
        reason = answer.get("error") if isinstance(answer, dict) else None
        raise AgentRefused(str(reason or "refused without a reason"))
    if status not in expected:
        detail = answer.get("error") if isinstance(answer, dict) else None
        reason = f": {detail}" if detail else ""
        raise AgentError(f"the agent answered {status} to {request}{reason}")
    if not isinstance(answer, dict):
        raise AgentError(f"the agent answered {request} with something that is no JSON object")
    return answer
