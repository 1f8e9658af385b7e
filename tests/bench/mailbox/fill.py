"""Fills INBOXes as fast as Dovecot takes mail: run on a mail host by the benchmark.

Usage: ``fill.py CONFIG MESSAGES SIZE USER...``. Each user's messages go by MULTIAPPEND to an
``imap`` process of this configuration. Standard library only.
"""

from __future__ import annotations

import subprocess
import sys

IMAP = "/usr/lib/dovecot/imap"
BATCH = 2_000


def fill(config: str, messages: int, size: int, user: str) -> None:
    """Append to one user's INBOX; SystemExit if not all was taken."""
    with subprocess.Popen(
        [IMAP, "-c", config, "-u", user], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as imap:
        assert imap.stdin
        assert imap.stdout
        for first in range(0, messages, BATCH):
            imap.stdin.write(b"a APPEND INBOX")
            for number in range(first, min(first + BATCH, messages)):
                text = b"Subject: %d\r\nMessage-ID: <%d@bench.example.net>\r\n\r\n" % (
                    number,
                    number,
                )
                text += (b"%069d\r\n" % number) * max((size - len(text)) // 71, 1)
                imap.stdin.write(b" {%d+}\r\n%b" % (len(text), text))
            imap.stdin.write(b"\r\n")
            imap.stdin.flush()
            while not (line := imap.stdout.readline()).startswith(b"a "):
                if not line:
                    raise SystemExit(f"imap of {user} ended")
            if not line.startswith(b"a OK"):
                raise SystemExit(f"{user}: {line!r}")
        imap.stdin.write(b"b LOGOUT\r\n")
        imap.stdin.close()
        imap.stdout.read()


if __name__ == "__main__":
    _, config, messages, size, *users = sys.argv
    for user in users:
        fill(config, int(messages), int(size), user)
