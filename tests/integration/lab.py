"""The system under test, as clients, operators and hosts see it.

Runs on the lab's controller (`tests/lab/lab --name NAME control -- pytest ...`). Clients'
connections go out from the lab's host `client`, which has no part in the system.
"""

from __future__ import annotations

import email.policy
import imaplib
import json
import os
import shlex
import smtplib
import socket
import ssl
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import EmailMessage
from functools import cache
from pathlib import Path
from typing import Any

import testinfra
import yaml
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = ROOT / "inventories" / "lab"
SERVICE_PORTS = (25, 465, 587, 143, 993, 110, 995, 4190)
TIMEOUT = 30.0

_hosts = yaml.safe_load((INVENTORY / "hosts.yml").read_text())
_mail = yaml.safe_load((INVENTORY / "group_vars" / "all" / "mailboxes.yml").read_text())
ADDRESSES: dict[str, str] = {
    name: host["ansible_host"] for name, host in _hosts["umbra_nodes"]["hosts"].items()
}
NODES = tuple(ADDRESSES)
MAILBOXES = tuple(item["address"] for item in _mail["mail_server_mailboxes"])
PASSWORD: str = _mail["lab_password"]
SERVICE_NAME = "mail.example.org"

# Subject of a message that is deleted while the shadow is off.
DELETED = "deleted while the shadow was off"
# Whose last message loses its file when the shadow loses its power.
HALF_LOST = "user09@example.org"
# As the agent's own doveadm: what it changes is mirrored by nobody.
DOVEADM_ALONE = "doveadm " + " ".join(
    f"-o mail_plugins/{name}=no"
    for name in ("push_notification_lua", "mail_lua", "push_notification", "notify")
)


def ssh_config() -> str:
    """The lab's SSH configuration, which `lab control` names."""
    return os.environ["UMBRA_LAB_SSH_CONFIG"]


def power(name: str, on: bool) -> None:
    """Switch a host on, or off as a power cut does: all its processes at once, nothing is told."""
    lab_name = Path(ssh_config()).parents[1].name
    # A shared connection to a host that is gone would hold up whoever uses it.
    leave = ["ssh", "-F", ssh_config(), "-O", "exit", name]
    subprocess.run(leave, check=False, stderr=subprocess.DEVNULL)
    command = ["power-on" if on else "power-off", name]
    subprocess.run([ROOT / "tests" / "lab" / "lab", "--name", lab_name, *command], check=True)


@cache
def host(name: str) -> Host:
    """A lab host to look into."""
    # A host that has lost its power must not hold up whoever asks it.
    return testinfra.get_host(
        f"ssh://{name}?controlpersist=120&timeout=5",
        ssh_config=ssh_config(),
        ssh_extra_args="-o ServerAliveInterval=2 -o ServerAliveCountMax=3",
    )


def answers(name: str) -> bool:
    """Whether a host can be reached."""
    try:
        return bool(host(name).run("true").rc == 0)
    except RuntimeError:  # what testinfra makes of ssh's own exit status
        return False


def run(name: str, command: str, *values: str) -> str:
    """What a command prints on a host; it must succeed. Values are quoted into the command's %s."""
    result = host(name).run(command, *values)
    assert result.rc == 0, f"{name}: {result.command!r} gave {result.rc}: {result.stderr}"
    return str(result.stdout)


def status(name: str) -> dict[str, Any]:
    """The group as a node's agent reports it."""
    result = host(name).run("umbractl status --json")
    assert result.rc in (0, 1), f"{name}: umbractl status gave {result.rc}: {result.stderr}"
    return dict(json.loads(result.stdout))


# Runs on a host: one request to an agent's API, by its socket or at an address and port.
_ASK = """
import http.client, socket, sys
method, where, path = sys.argv[1:]
address, _, port = where.rpartition(" ")
connection = http.client.HTTPConnection(address or "localhost", int(port) if address else 80)
if not address:
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(where)
connection.request(method, path)
answer = connection.getresponse()
print(answer.status)
print(answer.read().decode())
"""


def ask(
    name: str, path: str, method: str = "GET", where: str = "/run/umbra/api.sock"
) -> tuple[int, str]:
    """Ask an agent from a host, by its socket or at `ADDRESS PORT`: HTTP status and body."""
    out = run(name, "python3 -c %s %s %s %s", _ASK, method, where, path)
    code, _, body = out.partition("\n")
    return int(code), body.removesuffix("\n")


# Runs on the client: an IMAP user who waits for new mail, and when the end of the connection came.
_IDLE = r"""
import socket, ssl, sys, time
host, user, password = sys.argv[1:]
plain = ssl.create_default_context()
plain.check_hostname, plain.verify_mode = False, ssl.CERT_NONE
with plain.wrap_socket(socket.create_connection((host, 993), 10)) as connection:
    answers = connection.makefile("rb")
    for line, wanted in (
        ("", b"* OK"), (f"a LOGIN {user} {password}", b"a OK"), ("b SELECT INBOX", b"b OK"),
        ("c IDLE", b"+"),
    ):
        if line:
            connection.sendall(line.encode() + b"\r\n")
        while not (answer := answers.readline()).startswith(wanted):
            assert answer, line
    print("idle", flush=True)
    connection.settimeout(60)
    try:
        while answers.readline():
            pass
        how = "closed"
    except OSError as error:
        how = type(error).__name__
print(time.time(), how, flush=True)
"""


@dataclass
class Idler:
    """An IMAP client on the host `client` that does nothing but wait."""

    process: subprocess.Popen[str]

    def ended(self, seconds: float = TIMEOUT) -> float:
        """When its connection ended, as seconds since the epoch; the machine has one clock."""
        out, _ = self.process.communicate(timeout=seconds)
        return float(out.split()[0])


@contextmanager
def idling(addresses: Sequence[str], user: str) -> Iterator[list[Idler]]:
    """Have an idle IMAP client on each address."""
    clients = []
    try:
        for address in addresses:
            command = shlex.join(["python3", "-c", _IDLE, address, user, PASSWORD])
            process = subprocess.Popen(
                ["ssh", "-F", ssh_config(), "client", command], stdout=subprocess.PIPE, text=True
            )
            clients.append(Idler(process))
        for client in clients:
            assert client.process.stdout is not None
            assert client.process.stdout.readline() == "idle\n"
        yield clients
    finally:
        for client in clients:
            client.process.kill()
            client.process.wait()


def overlay_address(name: str) -> str:
    """A host's address in the tunnel."""
    (interface,) = json.loads(run(name, "ip -j addr show dev umbra0"))
    return str(next(a["local"] for a in interface["addr_info"] if a["scope"] == "global"))


def metrics(name: str) -> dict[str, float]:
    """A node's metrics by their full names, labels and all."""
    _, text = ask(name, "/metrics")
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {key: float(value) for key, value in lines}


def wait(what: str, condition: Callable[[], Any], seconds: float = TIMEOUT) -> Any:
    """Wait until a condition holds and return its value; the test fails if it does not in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.2)
    return value


@contextmanager
def route(address: str, port: int) -> Iterator[socket.socket]:
    """A TCP connection from the host `client` to an address."""
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT)
    command = ["ssh", "-F", ssh_config(), "-W", f"{address}:{port}", "client"]
    end = theirs.fileno()
    with subprocess.Popen(command, stdin=end, stdout=end, stderr=subprocess.DEVNULL) as process:
        theirs.close()
        try:
            yield ours
        finally:
            ours.close()
            process.terminate()


@cache
def _authority() -> str:
    return run(NODES[0], "cat /etc/ssl/umbra/ca.crt")


def tls() -> ssl.SSLContext:
    """What a client trusts: the group's own authority, and the name that its users were given."""
    return ssl.create_default_context(cadata=_authority())


class _Smtp(smtplib.SMTP):
    """A session over a connection that is there already."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        super().__init__(SERVICE_NAME, 1, local_hostname="client.example.org", timeout=TIMEOUT)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        return self._connection


class Imap(imaplib.IMAP4):
    """A session over a connection that is there already."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        super().__init__(SERVICE_NAME, 1, TIMEOUT)

    def _create_socket(self, timeout: float | None) -> socket.socket:
        return self._connection


@contextmanager
def smtp(node: str, port: int = 25) -> Iterator[smtplib.SMTP]:
    """An SMTP session of the outside client with a node."""
    with route(ADDRESSES[node], port) as connection:
        session = _Smtp(connection)
        yield session
        session.close()


@contextmanager
def imap(node: str, user: str, port: int = 993) -> Iterator[imaplib.IMAP4]:
    """A logged-in IMAP session over TLS of the outside client with a node."""
    with route(ADDRESSES[node], port) as connection:
        session = Imap(tls().wrap_socket(connection, server_hostname=SERVICE_NAME))
        session.login(user, PASSWORD)
        yield session
        session.shutdown()


LIST_SCRIPTS = "doveadm sieve list -u %s"
CHANGE = "set -- %s; doveadm mailbox unsubscribe -u $1 INBOX; doveadm mailbox subscribe -u $1 INBOX"


@dataclass(frozen=True)
class Mail:
    """A message that the tests can find again."""

    id: str
    content: bytes


def mail(subject: str = "integration test", body: str = "one line\n") -> Mail:
    """A new message with an id of its own."""
    message = EmailMessage()
    message["From"] = "sender@example.com"
    message["To"] = MAILBOXES[0]
    message["Subject"] = subject
    message["Message-ID"] = f"<{uuid.uuid4()}@client.example.org>"
    message.set_content(body)
    return Mail(message["Message-ID"], message.as_bytes(policy=email.policy.SMTP))


def send(node: str, recipients: list[str], content: bytes) -> tuple[int, str]:
    """Send a message from outside; the answer to its end, or the first refusal before that."""
    with smtp(node) as session:
        session.starttls(context=tls())
        session.ehlo()
        answer = session.mail("sender@example.com")
        for recipient in recipients:
            if answer[0] == 250:
                answer = session.rcpt(recipient)
        if answer[0] == 250:
            answer = session.data(content)
        return answer[0], answer[1].decode()


def copies(node: str, user: str, message_id: str, mailbox: str = "*") -> list[str]:
    """The copies of a message in a user's mailboxes on a node, each as `mailbox guid`."""
    out = run(
        node,
        "doveadm -f tab fetch -u %s 'mailbox guid' mailbox %s HEADER Message-ID %s",
        user,
        mailbox,
        message_id,
    )
    return [line.replace("\t", " ") for line in out.splitlines()[1:]]


@contextmanager
def redirected(node: str, user: str, to: str) -> Iterator[None]:
    """What comes for ``user`` goes on to another address, by a Sieve script of both nodes."""
    (peer,) = set(NODES) - {node}
    script = f'redirect "{to}";'
    run(node, "echo %s | doveadm sieve put -a -u %s redirected", script, user)
    # doveadm tells nobody of a script; this it does tell of.
    run(node, CHANGE, user)
    wait("the peer has the script", lambda: "redirected" in run(peer, LIST_SCRIPTS, user), 5)
    yield
    run(node, "doveadm sieve deactivate -u %s && doveadm sieve delete -u %s redirected", user, user)
    run(node, CHANGE, user)


def queue(node: str) -> dict[str, tuple[str, str]]:
    """By recipient, the queue id of a message and the queue of Postfix's that it is in."""
    rows = map(json.loads, run(node, "postqueue -j").splitlines())
    return {row["recipients"][0]["address"]: (row["queue_id"], row["queue_name"]) for row in rows}


def contents(node: str) -> dict[str, list[str]]:
    """All that a node's mailboxes hold: for each user each message's place, GUID and flags."""
    found = {}
    for user in MAILBOXES:
        out = run(node, "doveadm -f tab fetch -u %s 'mailbox guid uid flags' ALL", user)
        lines = (line.split("\t") for line in out.splitlines()[1:])
        # \Recent belongs to a session, not to the message.
        found[user] = sorted(
            " ".join([*place, *sorted(set(flags.split()) - {r"\Recent"})])
            for *place, flags in lines
        )
    return found


def folders(node: str, user: str) -> tuple[set[str], set[str]]:
    """A user's mailboxes and subscriptions on a node."""
    every = run(node, "doveadm mailbox list -u %s", user)
    subscribed = run(node, "doveadm mailbox list -s -u %s", user)
    return set(every.splitlines()), set(subscribed.splitlines())
