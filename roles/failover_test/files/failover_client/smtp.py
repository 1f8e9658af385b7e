"""An SMTP worker: sends one message after the other and notes what became of each."""

from __future__ import annotations

import contextlib
import re
import smtplib
import ssl

from .canonical import digest, wire
from .connect import Nodes, Smtp, spoken
from .journal import OK, REFUSED, UNKNOWN, UNREACHED, Journal, stamp, text
from .messages import Message
from .pace import Pace
from .settings import Settings

MESSAGES_PER_CONNECTION = 20
_DOT = re.compile(rb"(?m)^\.")


class Sender:
    """Holds one connection at a time and hands each message over once."""

    def __init__(
        self, settings: Settings, journal: Journal, context: ssl.SSLContext, worker: int
    ) -> None:
        self._settings = settings
        self._journal = journal
        self._context = context
        self._worker = worker
        self._nodes = Nodes(settings.targets)
        self._session: Smtp | None = None

    def close(self) -> None:
        """End the session politely if it still answers."""
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(OSError, smtplib.SMTPException):
                session.quit()

    def send(self, message: Message, recipients: list[str], pace: Pace) -> None:
        """Send a message and log each attempt; one that reached no node is tried again."""
        sent = digest(message.raw)
        while True:
            begin = stamp()
            outcome, answer, node = self._attempt(message, recipients)
            end = stamp()
            self._journal.write(
                {
                    "type": "op",
                    "kind": "send",
                    "id": message.id,
                    "worker": f"s{self._worker}",
                    "start": begin["at"],
                    "end": end["at"],
                    "wall": begin["wall"],
                    "node": node,
                    "outcome": outcome,
                    "answer": answer,
                    "recipients": recipients,
                    "content": message.kind,
                    "sent": sent,
                }
            )
            if outcome != UNREACHED or not pace.pause():
                return

    def _attempt(self, message: Message, recipients: list[str]) -> tuple[str, str, str | None]:
        """Hand the message to the first node that takes it; return outcome, answer and node."""
        reason = ""
        for _ in range(2):  # the second time with a fresh connection, when the kept one had died
            kept = self._session
            if kept is not None and (kept.sent >= MESSAGES_PER_CONNECTION or spoken(kept.sock)):
                self._drop() if kept.sent < MESSAGES_PER_CONNECTION else self.close()
                kept = None
            if self._session is None:
                self._session, reason = self._nodes.connect(
                    lambda target: Smtp(target, self._settings, self._context)
                )
            session = self._session
            if session is None:
                return UNREACHED, text(reason), None
            try:
                refusal = self._envelope(session, recipients)
            except (OSError, smtplib.SMTPException) as error:
                # No byte of the content has gone out, so the message cannot have been taken.
                self._drop()
                reason = f"{session.target.node}: {error}"
                if kept is None:
                    return UNREACHED, text(reason), None
                continue
            if refusal is not None:
                return REFUSED, text(refusal), session.target.node
            return self._content(session, message)
        return UNREACHED, text(reason), None

    def _envelope(self, session: Smtp, recipients: list[str]) -> str | None:
        """Send everything up to DATA; return the answer that refused it, if one did."""
        commands = [("MAIL", f"FROM:<{self._settings.sender}> BODY=8BITMIME")]
        commands += [("RCPT", f"TO:<{recipient}>") for recipient in recipients]
        for verb, argument in [*commands, ("DATA", "")]:
            code, answer = session.docmd(verb, argument)
            if code == 421:
                raise smtplib.SMTPServerDisconnected(text(answer))
            if code >= 400:
                session.rset()
                return f"{code} {text(answer)}"
        return None

    def _content(self, session: Smtp, message: Message) -> tuple[str, str, str | None]:
        node = session.target.node
        try:
            if session.sock is not None:
                # A large message takes as long as it takes; 1 MB/s is slow for any site.
                session.sock.settimeout(self._settings.reply_timeout_s + len(message.raw) / 1e6)
            session.send(_DOT.sub(b"..", wire(message.raw)) + b".\r\n")
            code, answer = session.getreply()
            if session.sock is not None:
                session.sock.settimeout(self._settings.reply_timeout_s)
        except (OSError, smtplib.SMTPException) as error:
            self._drop()
            return UNKNOWN, text(error), node
        session.sent += 1
        if code == 421:
            self._drop()
        return (OK if 200 <= code < 300 else REFUSED), f"{code} {text(answer)}", node

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
