"""Connections to whichever node answers: the last good one first, as a mail server tries MXs."""

from __future__ import annotations

import contextlib
import imaplib
import smtplib
import socket
import ssl
from collections.abc import Callable
from typing import Any, TypeVar

from .settings import Settings, Target

Connection = TypeVar("Connection")


class TlsContext(ssl.SSLContext):
    """Checks the server under the name in the settings, not under the address that was dialled."""

    server_name: str | None = None

    def wrap_socket(self, sock: socket.socket, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        """Wrap a client socket."""
        kwargs["server_hostname"] = self.server_name
        return super().wrap_socket(sock, *args, **kwargs)


def tls_context(settings: Settings) -> TlsContext:
    """Return the context for all connections of a run.

    Without a server name only the chain is verified: nodes are reached by their addresses.
    """
    context = TlsContext(ssl.PROTOCOL_TLS_CLIENT)
    context.server_name = settings.server_name
    context.check_hostname = settings.verify_tls and settings.server_name is not None
    if not settings.verify_tls:
        context.verify_mode = ssl.CERT_NONE
    elif settings.ca_file:
        context.load_verify_locations(settings.ca_file)
    else:
        context.load_default_certs()
    return context


class Smtp(smtplib.SMTP):
    """An SMTP client whose TCP connect has its own, short time-out."""

    def __init__(self, target: Target, settings: Settings, context: ssl.SSLContext) -> None:
        super().__init__(local_hostname="failover-test.invalid", timeout=settings.reply_timeout_s)
        self.target = target
        self.sent = 0
        self.sock = dial(target.address, settings.smtp_port, settings)
        try:
            code, answer = self.getreply()
            if code != 220:
                raise smtplib.SMTPConnectError(code, answer)
            self.starttls(context=context)
            self.ehlo()
        except (OSError, smtplib.SMTPException):
            self.close()
            raise


class Imap(imaplib.IMAP4):
    """An IMAPS client whose TCP connect has its own, short time-out. It logs in at once."""

    def __init__(
        self, target: Target, settings: Settings, context: ssl.SSLContext, user: str, password: str
    ) -> None:
        self.target = target
        self._settings = settings
        self._context = context
        super().__init__(target.address, settings.imap_port)
        try:
            self.login(user, password)
        except (OSError, imaplib.IMAP4.error):
            self.shutdown()
            raise

    def open(self, host: str = "", port: int = 993, timeout: float | None = None) -> None:
        """Dial and start TLS."""
        raw = dial(host, port, self._settings)
        try:
            self.sock = self._context.wrap_socket(raw)
        except OSError:
            raw.close()
            raise
        self._stream = self.sock.makefile("rb")

    def read(self, size: int) -> bytes:
        """Read bytes of a literal."""
        return self._stream.read(size)

    def readline(self) -> bytes:
        """Read one line of an answer."""
        return self._stream.readline()

    def send(self, data: Any) -> None:
        """Send all of data."""
        self.sock.sendall(data)

    def shutdown(self) -> None:
        """Close the connection without a word."""
        self._stream.close()
        self.sock.close()


def dial(address: str, port: int, settings: Settings) -> socket.socket:
    """Open a TCP connection; a node that refuses or is fenced costs the short time-out at most."""
    sock = socket.create_connection((address, port), timeout=settings.connect_timeout_s)
    sock.settimeout(settings.reply_timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class Nodes:
    """One worker's memory of which node answered last."""

    def __init__(self, targets: tuple[Target, ...]) -> None:
        self._order = list(targets)

    def connect(self, attempt: Callable[[Target], Connection]) -> tuple[Connection | None, str]:
        """Try each node once; return the connection, or None and what the last node answered."""
        reason = "no target"
        for target in list(self._order):
            try:
                connection = attempt(target)
            except (OSError, smtplib.SMTPException, imaplib.IMAP4.error) as error:
                reason = f"{target.node}: {error}"
                continue
            self._order.remove(target)
            self._order.insert(0, target)
            return connection, ""
        return None, reason


def spoken(sock: socket.socket | None) -> bool:
    """Whether an idle connection has something to read: a good-bye or its end.

    Then a request on it is pointless.
    """
    if sock is None:
        return True
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return True
    timeout = sock.gettimeout()
    try:
        sock.setblocking(False)
        # TLS session tickets are read here too, and are no data: that raises SSLWantReadError.
        return sock.recv(1) is not None
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True
    finally:
        with contextlib.suppress(OSError):
            sock.settimeout(timeout)
