"""A small client of the agent's API on its unix socket, for ``umbractl``; standard library only."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
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
    with _answer(method, path, body, timeout, at) as answer:
        return json.loads(answer.read())


def stream(
    path: str, body: object, *, timeout: float = 600.0, at: Path = SOCKET
) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines that answer a POST, as they come.

    ApiError if it is refused, ends early, or nothing comes for ``timeout`` seconds.
    """
    with _answer("POST", path, body, timeout, at) as answer:
        for line in answer:
            yield json.loads(line)


@contextmanager
def _answer(
    method: str, path: str, body: object, timeout: float, at: Path
) -> Iterator[http.client.HTTPResponse]:
    connection = _UnixConnection(at, timeout)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None)
        answer = connection.getresponse()
        if answer.status in (400, 409):
            raise ApiError(str(json.loads(answer.read()).get("error", "refused")))
        yield answer
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
