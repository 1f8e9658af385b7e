"""Has Dovecot rebuild mailboxes whose messages a power cut has taken away in part.

Dovecot (2.4.1, sdbox, ``mail_fsync = optimized``) writes to the index log that a message is
expunged and then removes the message's file; neither is synced before OK, and the file system may
keep the second and lose the first. Such a message is in the index without a file. The other node
still has it, since nobody was told OK; but dsync, which looks at the indexes, takes the two copies
for equal. Rebuilt, the index tells the truth, and the message is copied back before the node counts
as a copy.

Runs after Dovecot's start and before the agent's. If it dies half-way, the rest is found by whoever
reads such a message, or within a day by the comparison of all copies.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

# What was written so long before the newest change (seconds) was on the disk: Linux writes back
# within half a minute.
RECENT = 120.0
TIMEOUT = 60.0
# The directory of a mailbox's messages; the mailboxes below that one lie beside it.
MESSAGES = "dbox-Mails"
# What is changed here is the copy's own affair.
ALONE = [
    word
    for plugin in ("push_notification_lua", "mail_lua", "push_notification", "notify")
    for word in ("-o", f"mail_plugins/{plugin}=no")
]

Doveadm = Callable[..., str]


def doveadm(*command: str) -> str:
    """Return what doveadm prints; OSError or subprocess.SubprocessError if it fails."""
    return subprocess.run(
        ["/usr/bin/doveadm", *ALONE, *command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT,
    ).stdout


def decoded(name: str) -> str:
    """Decode a mailbox's name on the disk: modified UTF-7 (RFC 3501, 5.1.3)."""

    def plain(match: re.Match[str]) -> str:
        coded = match[1].replace(",", "/")
        if not coded:
            return "&"
        return base64.b64decode(coded + "=" * (-len(coded) % 4)).decode("utf-16-be")

    return re.sub("&([^-]*)-", plain, name)


def _directories(path: Path) -> Iterator[Path]:
    try:
        with os.scandir(path) as entries:
            below = [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        # ext4's lost+found is root's alone; a mailbox may be gone meanwhile.
        print(f"{path}: {error.strerror}", file=sys.stderr)
        return
    for directory in below:
        if directory.name == MESSAGES:
            yield directory
        else:
            yield from _directories(directory)


def recent(mail: Path) -> list[Path]:
    """Return the directories of messages in which something was made or removed last."""
    found: dict[Path, float] = {}
    for path in _directories(mail):
        with suppress(FileNotFoundError):
            found[path] = path.stat().st_mtime
    newest = max(found.values(), default=0.0)
    return [path for path, changed in found.items() if changed >= newest - RECENT]


def place(mail: Path, messages: Path) -> tuple[str, str]:
    """Return the user and the mailbox of a directory of messages; ValueError if it is no user's."""
    domain, user, *store, _ = messages.relative_to(mail).parts
    if store[:2] != ["mail", "mailboxes"] or not store[2:]:
        raise ValueError(f"{messages} is not where mailboxes are")
    return f"{user}@{domain}", "/".join(map(decoded, store[2:]))


def known(user: str, mailboxes: Iterable[str], run: Doveadm) -> dict[str, set[int]]:
    """Return the UIDs that each mailbox has by its index. One question: a process is not cheap.

    The names are the user's choice: after "--" none is an option.
    """
    query = [word for name in mailboxes for word in ("OR", "mailbox", name)][1:]
    rows = run("-f", "tab", "fetch", "-u", user, "--", "mailbox uid", *query).splitlines()[1:]
    found: dict[str, set[int]] = {}
    for row in rows:
        name, _, uid = row.rpartition("\t")
        found.setdefault(name, set()).add(int(uid))
    return found


def lost(mailboxes: Mapping[str, Path], uids: Mapping[str, set[int]]) -> dict[str, set[int]]:
    """Return the UIDs that have no file, of those mailboxes that have such."""
    found = {
        name: {uid for uid in uids.get(name, ()) if not (messages / f"u.{uid}").exists()}
        for name, messages in mailboxes.items()
    }
    return {name: gone for name, gone in found.items() if gone}


def mend(user: str, mailboxes: Mapping[str, Path], run: Doveadm = doveadm) -> dict[str, set[int]]:
    """Rebuild the indexes of mailboxes that have lost files; return the UIDs of the messages."""
    try:
        gone = lost(mailboxes, known(user, mailboxes, run))
    except subprocess.CalledProcessError:
        # Who finds an index damaged mends it, and fails all the same.
        gone = lost(mailboxes, known(user, mailboxes, run))
    if gone:
        still = known(user, gone, run)  # who is expunged meanwhile is not lost
        gone = {name: uids & still.get(name, set()) for name, uids in gone.items()}
    gone = {name: uids for name, uids in gone.items() if uids}
    for name in gone:
        run("force-resync", "-u", user, "--", name)
    return gone


def by_user(mail: Path, directories: Iterable[Path]) -> dict[str, dict[str, Path]]:
    """Return each user's mailboxes among ``directories``, by their names."""
    found: dict[str, dict[str, Path]] = {}
    for messages in directories:
        try:
            user, mailbox = place(mail, messages)
        except ValueError as error:
            print(error, file=sys.stderr)
        else:
            found.setdefault(user, {})[mailbox] = messages
    return found


def main(mail: str) -> int:
    """Mend what was changed last below ``mail``."""
    for user, mailboxes in by_user(Path(mail), recent(Path(mail))).items():
        try:
            for name, gone in mend(user, mailboxes).items():
                uids = ", ".join(map(str, sorted(gone)[:10]))
                print(f"{user}, {name}: {len(gone)} messages had no file (UID {uids}); rebuilt")
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"{user}: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
