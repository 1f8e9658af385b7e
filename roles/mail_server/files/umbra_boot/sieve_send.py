"""Sends what Sieve sends (redirect, vacation, reject), in the place of sendmail(1).

It goes to Postfix by SMTP, so that the shadow has it before the delivery that it comes from is
over; sendmail ends when it lies in ``maildrop``, of which no other node knows. What Postfix does
not take just now, as while the agent restarts, goes there all the same: a delivery that has filed
its message already would not send again. If Postfix itself is away, the delivery is deferred.
"""

from __future__ import annotations

import os
import re
import smtplib
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import BinaryIO

PORT = 26
# Postfix waits for the agent for 120 s.
TIMEOUT = 130.0
SENDMAIL = "/usr/sbin/sendmail"


def send(sender: str, recipients: Sequence[str], content: bytes, port: int = PORT) -> None:
    """Have Postfix take it. SMTPResponseException if it does not want to, OSError if it cannot."""
    session = smtplib.SMTP("127.0.0.1", port, local_hostname="localhost", timeout=TIMEOUT)
    try:
        session.ehlo_or_helo_if_needed()
        options = ["BODY=8BITMIME"] if session.has_extn("8bitmime") else []
        if not all(address.isascii() for address in (sender, *recipients)):
            session.command_encoding = "utf-8"
            options.append("SMTPUTF8")
        _expect(250, *session.mail(sender, options))
        for recipient in recipients:
            _expect(250, *session.rcpt(recipient))
        _expect(250, *session.data(re.sub(rb"\r?\n", b"\r\n", content)))
        # It is taken, whatever comes after that.
        with suppress(smtplib.SMTPException, OSError):
            session.quit()
    finally:
        session.close()


def _expect(code: int, found: int, text: bytes) -> None:
    if found != code:
        raise smtplib.SMTPResponseException(found, text)


def drop(arguments: Sequence[str], content: bytes, sendmail: str = SENDMAIL) -> int:
    """Leave it to sendmail(1), which gets the same arguments; return its exit status."""
    reading, writing = os.pipe()
    pid = os.posix_spawn(
        sendmail, [sendmail, *arguments], os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0), (os.POSIX_SPAWN_CLOSE, writing)],
    )  # fmt: skip
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(content)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(arguments: Sequence[str], content: BinaryIO) -> int:
    """Send. The arguments are what Dovecot has for sendmail: ``-i -f SENDER -- RECIPIENT...``."""
    end = arguments.index("--")
    sender, recipients = arguments[arguments.index("-f") + 1], arguments[end + 1 :]
    data = content.read()
    try:
        send(sender.removeprefix("<").removesuffix(">"), recipients, data)
    except smtplib.SMTPResponseException as error:
        print(f"{error.smtp_code} {error.smtp_error!r}: left to sendmail", file=sys.stderr)
        return drop(arguments, data)
    except (smtplib.SMTPException, OSError) as error:
        print(f"Postfix does not answer: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin.buffer))
