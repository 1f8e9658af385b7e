"""Sends what Sieve sends (redirect, vacation, reject), in the place of sendmail(1).

It goes to Postfix by SMTP, so that the shadow has it before the delivery that it comes from is
over; sendmail ends when it lies in ``maildrop``, of which no other node knows. What Postfix does
not take just now, as while the agent restarts, goes there all the same: a delivery that has filed
its message already would not send again. If Postfix itself is away, the delivery is deferred.
"""

from __future__ import annotations

import os
import shutil
import smtplib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import IO, BinaryIO

PORT = 26
# Postfix waits for the agent for 120 s.
TIMEOUT = 130.0
SENDMAIL = "/usr/sbin/sendmail"
PIECE = 64 * 1024


def send(sender: str, recipients: Sequence[str], message: IO[bytes]) -> None:
    """Have Postfix take it. SMTPResponseException if it does not want to, OSError if it cannot."""
    session = smtplib.SMTP("127.0.0.1", PORT, local_hostname="localhost", timeout=TIMEOUT)
    try:
        session.ehlo_or_helo_if_needed()
        options = ["BODY=8BITMIME"] if session.has_extn("8bitmime") else []
        if not all(address.isascii() for address in (sender, *recipients)):
            session.command_encoding = "utf-8"
            options.append("SMTPUTF8")
        _expect(250, *session.mail(sender, options))
        for recipient in recipients:
            _expect(250, *session.rcpt(recipient))
        _expect(354, *session.docmd("data"))
        for piece in _pieces(message):
            session.send(piece)
        _expect(250, *session.getreply())
        # It is taken, whatever comes after that.
        with suppress(smtplib.SMTPException, OSError):
            session.quit()
    finally:
        session.close()


def _pieces(message: IO[bytes]) -> Iterator[bytes]:
    """Yield the content as DATA has it (RFC 5321, 4.5.2), with its end."""
    piece = bytearray()
    for line in message:
        piece += b"." * line.startswith(b".") + line.removesuffix(b"\n").removesuffix(b"\r")
        piece += b"\r\n"
        if len(piece) >= PIECE:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece) + b".\r\n"


def _expect(code: int, found: int, text: bytes) -> None:
    if found != code:
        raise smtplib.SMTPResponseException(found, text)


def drop(arguments: Sequence[str], message: IO[bytes]) -> int:
    """Leave it to sendmail(1), which gets the same arguments; return its exit status."""
    os.lseek(message.fileno(), 0, os.SEEK_SET)
    return subprocess.run([SENDMAIL, *arguments], stdin=message, check=False).returncode


def main(arguments: Sequence[str], content: BinaryIO) -> int:
    """Send. The arguments are what Dovecot has for sendmail: ``-i -f SENDER -- RECIPIENT...``."""
    end = arguments.index("--")
    sender, recipients = arguments[arguments.index("-f") + 1], arguments[end + 1 :]
    # Not in memory, of which Dovecot gives its processes little.
    with tempfile.TemporaryFile() as message:
        shutil.copyfileobj(content, message)
        message.seek(0)
        try:
            send(sender.removeprefix("<").removesuffix(">"), recipients, message)
        except smtplib.SMTPResponseException as error:
            print(f"{error.smtp_code} {error.smtp_error!r}: left to sendmail", file=sys.stderr)
            return drop(arguments, message)
        except (smtplib.SMTPException, OSError) as error:
            print(f"Postfix does not answer: {error}", file=sys.stderr)
            return os.EX_TEMPFAIL
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin.buffer))
