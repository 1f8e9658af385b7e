"""The pair under test: a helper on each node, and clients that come from outside."""

from __future__ import annotations

import base64
import json
import poplib
import re
import shlex
import smtplib
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

from tests.faults.field import ADDRESSES, NODES, PASSWORD
from tests.model.wire import Answer, Broken, Imap, Refused, quoted

SERVICE_NAME = "mail.example.org"
# More than a change may wait in the worst case (29 s).
TIMEOUT = 45.0
HERE = Path(__file__).parent


class NodeError(Exception):
    """A node's helper does not answer or could not do what was asked."""


class Node:
    """The helper on one mail host (``on_node.py``), reached by SSH; made anew when it is gone."""

    def __init__(self, name: str, ssh_config: str) -> None:
        self.name = name
        self._ssh = ["ssh", "-F", ssh_config, "-o", "ServerAliveInterval=2",
                     "-o", "ServerAliveCountMax=3", "-o", "ConnectTimeout=5"]  # fmt: skip
        self._process: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()

    def ask(self, do: str, **values: Any) -> Any:
        """One request; NodeError if it fails. Tried once more if the helper had gone meanwhile."""
        with self._turn:
            for again in (True, False):
                fresh = self._process is None
                try:
                    return self._ask({"do": do, **values})
                except OSError as error:
                    self.close()
                    if fresh or not again or do not in ("view", "status"):
                        raise NodeError(f"{self.name}: {error}") from None
        raise AssertionError

    def _ask(self, request: dict[str, Any]) -> Any:
        if self._process is None:
            code = (HERE / "wire.py").read_text() + "".join(
                line
                for line in (HERE / "on_node.py").read_text().splitlines(keepends=True)
                if not line.startswith(("from __future__", "from tests."))
            )
            command = f"exec python3 -u -c {shlex.quote(code)}"
            self._process = subprocess.Popen(
                [*self._ssh, self.name, command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise OSError("the helper has gone")
        said = json.loads(line)
        if "error" in said:
            raise NodeError(f"{self.name}: {said['error']}")
        return said["answer"]

    def close(self) -> None:
        """End the helper."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


class Client:
    """One IMAP session of a user, opened when it is needed."""

    def __init__(self, world: World, user: str) -> None:
        self.user = user
        self._world = world
        self._imap: Imap | None = None
        self._socket: ssl.SSLSocket | None = None
        self.selected: str | None = None

    def run(self, *parts: bytes) -> Answer:
        """One command; Broken if nobody knows what became of it."""
        if self._imap is None:
            self._socket = self._world.dial(993)
            stream = cast(BinaryIO, self._socket.makefile("rwb"))
            self._imap = Imap(stream, stream)
            self._imap.run(b"LOGIN", quoted(self.user.encode()), quoted(PASSWORD.encode()))
        try:
            return self._imap.run(*parts)
        except Broken:
            self.close()
            raise

    def open(self, mailbox: str) -> None:
        """Have a mailbox selected, and all known that others did to it."""
        if self.selected == mailbox:
            self.run(b"NOOP")
            return
        self.selected = None
        self.run(b"SELECT", quoted(mailbox.encode()))
        self.selected = mailbox

    def leave(self) -> None:
        """Have none selected."""
        if self.selected is not None:
            self.selected = None
            self.run(b"UNSELECT")

    def close(self) -> None:
        """End the session without a word."""
        if self._imap is not None:
            self._imap.close()
        if self._socket is not None:
            self._socket.close()
        self._imap = self._socket = self.selected = None


class Sieve:
    """A ManageSieve session: connected, one or more commands, closed."""

    def __init__(self, world: World, user: str) -> None:
        self._socket = world.dial(4190, tls=False)
        self._file = self._socket.makefile("rb")
        self._answer()
        self.run("STARTTLS")
        self._file.close()
        self._socket = world.context.wrap_socket(self._socket, server_hostname=SERVICE_NAME)
        self._file = self._socket.makefile("rb")
        self._answer()
        token = base64.b64encode(f"\0{user}\0{PASSWORD}".encode()).decode()
        self.run(f'AUTHENTICATE "PLAIN" "{token}"')

    def __enter__(self) -> Sieve:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def run(self, command: str) -> list[str]:
        """One command; its lines."""
        try:
            self._socket.sendall(command.encode() + b"\r\n")
        except OSError as error:
            raise Broken(str(error)) from None
        return self._answer()

    def _answer(self) -> list[str]:
        lines: list[str] = []
        while True:
            try:
                line = self._file.readline()
            except OSError as error:
                raise Broken(str(error)) from None
            if not line.endswith(b"\r\n"):
                raise Broken("the server closed the connection")
            if found := re.search(rb"\{(\d+)\}\r\n$", line):
                line += self._file.read(int(found[1])) + self._file.readline()
            text = line.decode().rstrip()
            if re.match(r"OK\b", text):
                return lines
            if re.match(r"(NO|BYE)\b", text):
                raise (Refused if text.startswith("NO") else Broken)(text)
            lines.append(text)


class Pop3(poplib.POP3):
    """POP3 over a connection that is there already."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        super().__init__(SERVICE_NAME, 995, TIMEOUT)

    def _create_socket(self, timeout: float | None) -> socket.socket:
        return self._connection


class World:
    """The nodes, who of them is primary, and how clients reach it."""

    def __init__(self, ssh_config: str, users: tuple[str, ...]) -> None:
        self.nodes = {name: Node(name, ssh_config) for name in NODES}
        self.users = users
        self.primary, self.shadow = self._roles()
        authority = subprocess.check_output(
            ["ssh", "-F", ssh_config, self.primary, "cat", "/etc/ssl/umbra/ca.crt"], text=True
        )
        self.context = ssl.create_default_context(cadata=authority)
        self.clients = [Client(self, user) for user in users for _ in range(2)]
        self._pool = ThreadPoolExecutor(2)

    def _roles(self) -> tuple[str, str]:
        primary = str(self.status(NODES[0])["primary"])
        return primary, next(name for name in NODES if name != primary)

    def find_roles(self) -> None:
        """Look who is primary; whoever had sessions must connect again if that changed."""
        before = self.primary
        self.primary, self.shadow = self._roles()
        if self.primary != before:
            self.disconnect()

    def status(self, node: str) -> dict[str, Any]:
        """The group as a node's agent sees it; NodeError if it does not answer."""
        return dict(self.nodes[node].ask("status"))

    def protected(self) -> bool:
        """Whether both nodes say so."""
        try:
            seen = [self.status(node) for node in NODES]
        except NodeError:
            return False
        return all(one["protected"] for one in seen) and len({s["primary"] for s in seen}) == 1

    def wait_protected(self, seconds: float) -> float:
        """Wait for that and return how long it took; AssertionError if it is late.

        And for Dovecot: it may have been killed a moment ago, which does not degrade the group.
        """
        began = time.monotonic()
        while not (self.protected() and self._open()):
            if time.monotonic() - began > seconds:
                reasons = []
                for node in NODES:
                    try:
                        reasons += self.status(node)["reasons"]
                    except NodeError as error:
                        reasons.append(str(error))
                raise AssertionError(f"not protected after {seconds:g} s: {reasons}")
            time.sleep(0.1)
        return time.monotonic() - began

    def _open(self) -> bool:
        self.find_roles()
        try:
            self.dial(993).close()
        except Broken:
            return False
        return True

    def dial(self, port: int, *, tls: bool = True) -> Any:
        """Connect to the primary as a client does; Broken if that cannot be."""
        try:
            plain = socket.create_connection((ADDRESSES[self.primary], port), timeout=TIMEOUT)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not tls:
                return plain
            return self.context.wrap_socket(plain, server_hostname=SERVICE_NAME)
        except OSError as error:
            raise Broken(str(error)) from None

    def views(self, user: str, *, fresh: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the primary and the shadow have of a user now; the shadow is asked first.

        ``fresh``: read every message, also of mailboxes that have not changed since the last look.
        """
        ask = {"user": user, "fresh": fresh}
        there = self._pool.submit(self.nodes[self.shadow].ask, "view", **ask)
        here = self._pool.submit(self.nodes[self.primary].ask, "view", **ask)
        shadow = there.result()
        return here.result(), shadow

    def smtp(self, recipient: str, content: bytes) -> None:
        """Send a message from outside; Refused or Broken."""
        try:
            with smtplib.SMTP(ADDRESSES[self.primary], 25, "client.example.org", TIMEOUT) as server:
                server.sendmail("model@example.com", [recipient], content)
        except (smtplib.SMTPResponseException, smtplib.SMTPRecipientsRefused) as error:
            raise Refused(str(error)) from None
        except (OSError, smtplib.SMTPException) as error:
            raise Broken(str(error)) from None

    def disconnect(self) -> None:
        """End all clients' sessions."""
        for client in self.clients:
            client.close()

    def close(self) -> None:
        """End everything."""
        self.disconnect()
        for node in self.nodes.values():
            node.close()
        self._pool.shutdown()
