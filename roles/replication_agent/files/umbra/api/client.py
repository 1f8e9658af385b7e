"""A small client of the agent's API on its unix socket, for ``umbractl``; standard library only."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

SOCKET = Path("/run/umbra/api.sock")


class ApiError(Exception):
    """The agent does not answer, or refuses; one sentence for people."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def call(
    method: str, path: str, body: object = None, *, timeout: float = 5.0, at: Path = SOCKET
) -> Any:
    """Return the JSON answer of one request. ApiError if there is none or it is a refusal."""
    connection = _UnixConnection(at, timeout)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None)
        answer = connection.getresponse()
        value = json.loads(answer.read())
    except PermissionError:
        raise ApiError(f"{at} may be opened by root and the group umbra only: use sudo.") from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise ApiError(
            "the agent does not run here: systemctl status umbra-agent.service tells why."
        ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ApiError(f"the agent gave no answer ({error or type(error).__name__}).") from None
    finally:
        connection.close()
    if answer.status in (400, 409):
        raise ApiError(str(value.get("error", "refused")))
    return value
