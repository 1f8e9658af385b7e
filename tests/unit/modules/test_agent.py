"""The client of the agent's API, against a real unix socket."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest
from ansible_collections.umbra.mail.plugins.module_utils import _agent as agent

Serve = Callable[[int, Any], list[tuple[str, str, Any]]]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "api.sock")


@pytest.fixture
def serve(path: str) -> Iterator[Serve]:
    """Answer every request with one status and body; return the list of requests that came."""
    servers = []

    def start(status: int, body: Any) -> list[tuple[str, str, Any]]:
        seen: list[tuple[str, str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def address_string(self) -> str:
                return "unix"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                sent = self.rfile.read(size)
                seen.append((self.command, self.path, json.loads(sent) if sent else None))
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if content:
                    self.wfile.write(content)

            do_GET = do_POST = answer

        server = ThreadingUnixStreamServer(path, Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_status(serve: Serve, path: str) -> None:
    seen = serve(200, {"primary": "mail-a"})
    assert agent.AgentClient(path).status() == {"primary": "mail-a"}
    assert seen == [("GET", "/status", None)]


@pytest.mark.parametrize("status", [200, 503])
def test_health_answers_in_both_states(serve: Serve, path: str, status: int) -> None:
    serve(status, {"status": "degraded", "reasons": ["peer lost"]})
    assert agent.AgentClient(path).health()["reasons"] == ["peer lost"]


def test_switchover_sends_what_was_asked(serve: Serve, path: str) -> None:
    seen = serve(200, {"changed": True})
    agent.AgentClient(path).switchover("mail-b", 30.0, dry_run=True)
    assert seen == [("POST", "/switchover", {"to": "mail-b", "dry_run": True, "timeout_s": 30.0})]


def test_refusal_carries_the_reason(serve: Serve, path: str) -> None:
    serve(409, {"error": "mail-b is not reachable."})
    with pytest.raises(agent.AgentRefused, match=r"^mail-b is not reachable\.$"):
        agent.AgentClient(path).switchover("mail-b", 30.0)


def test_refusal_without_a_reason(serve: Serve, path: str) -> None:
    serve(409, b"")
    with pytest.raises(agent.AgentRefused, match="without a reason"):
        agent.AgentClient(path).status()


def test_error_status(serve: Serve, path: str) -> None:
    serve(500, {"error": "boom"})
    with pytest.raises(agent.AgentError, match="answered 500 to GET /status: boom"):
        agent.AgentClient(path).status()


@pytest.mark.parametrize("body", [b"<html>", b"", b"[1]", b"\xff"])
def test_answer_that_is_no_object(serve: Serve, path: str, body: bytes) -> None:
    serve(200, body)
    with pytest.raises(agent.AgentError, match="no JSON object"):
        agent.AgentClient(path).status()


def test_no_socket(path: str) -> None:
    client = agent.AgentClient(path)
    client.host = "mail-a"
    with pytest.raises(
        agent.AgentUnavailable,
        match=r"^the agent does not run on mail-a; start umbra-agent\.service$",
    ):
        client.status()


def test_socket_without_a_listener(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as orphan:
        orphan.bind(path)
    with pytest.raises(agent.AgentUnavailable, match="does not run"):
        agent.AgentClient(path).status()


def test_silence_is_bounded(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        with pytest.raises(agent.AgentUnavailable, match="did not answer /status in time"):
            agent.AgentClient(path, timeout=0.05).status()


def test_connection_closed_without_an_answer(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def hang_up() -> None:
            connection = listener.accept()[0]
            connection.recv(1000)
            connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        with pytest.raises(agent.AgentUnavailable, match="closed the connection"):
            agent.AgentClient(path).status()
