r"""Client of Dovecot's doveadm-server protocol on its unix socket.

The wire format, as Dovecot 2.4.1 speaks it (its documentation: "Doveadm Protocol"; checked by
experiment):

* The client says ``VERSION\tdoveadm-server\t1\t0\n``. With minor version 0 the answers are plain;
  from 1 on they are multiplexed.
  The server says ``+\n`` at once if the socket's mode is exactly 0600 (it trusts the file's owner),
  else ``-\n`` and wants a password.
* A command is ``FLAGS\tUSER\tCOMMAND\tARGUMENT...\n``, each field with NUL, 1, tab, CR and LF
  escaped by the byte 1.
* A command that reads its standard input gets it after that, with dots stuffed as in SMTP, and
  ``.\r\n`` on a line of its own.
* The answer is one line of output, escaped in the same way, then ``+\n`` or ``-CODE\n``.

Each command has a connection of its own: Dovecot keeps the processes waiting, so a new connection
costs nothing that can be measured,
while a kept one would hold on to a process with an old configuration after a reload.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from umbra.peer.exchange import PeerError
from umbra.transport import ids

SOCKET = Path("/run/dovecot/umbra-doveadm")
HELLO = b"VERSION\tdoveadm-server\t1\t0\n"
# One line holds the list of all users: 32 MiB is about half a million of them.
MAX_LINE = 32 * 1024 * 1024
TIMEOUT = 30.0
# How long dsync waits for the lock of a user's mailboxes (seconds); without it two crossing syncs
# wait for each other.
LOCK_SECONDS = 10
# Output that is streamed: bytes at a time, and how long the next ones may take (seconds).
CHUNK = 64 * 1024
STREAM_STALL = 60.0
# dsync gives up when the other side says nothing for this long (seconds).
STALL_SECONDS = 60

_ESCAPES = str.maketrans(
    {"\0": "\x010", "\x01": "\x011", "\t": "\x01t", "\r": "\x01r", "\n": "\x01n"}
)
_UNESCAPES = {"0": "\0", "1": "\x01", "t": "\t", "r": "\r", "n": "\n"}


class DoveadmError(Exception):
    """Dovecot could not be asked, or did not answer as the protocol says."""


class Outcome(Enum):
    """How a sync ended."""

    SYNCED = "synced"
    EQUAL = "equal"  # of a merge: the peer has nothing to bring, so nothing was done
    CHANGED = "changed"  # something changed while it ran: run it again
    NO_USER = "no-user"  # unknown here or there
    SURPRISED = "surprised"  # the peer did not say what was foretold; next time from scratch
    UNSAFE = "unsafe"  # not done: the copy would be without acknowledged messages for a while
    FAILED = "failed"
    LOST = "lost"  # the peer cannot be reached, or refuses this node
    GAVE_WAY = "gave-way"  # broken off here for another peer's: run it again later


@dataclass(frozen=True)
class Reply:
    """The answer to a command: its output and the code, empty for success."""

    fields: list[str]
    code: str


@dataclass(frozen=True)
class SyncResult:
    """What a sync said.

    ``state`` is for the next one, None if there is none to keep; ``reason`` is for people; ``bare``
    tells whether a name without a mailbox holds others here, True if that is not known; ``begun``
    of one that failed whether the peer's copy may lack something by it.
    """

    outcome: Outcome
    state: str | None = None
    reason: str = ""
    bare: bool = True
    begun: bool = False

    @classmethod
    def of(cls, error: Exception) -> SyncResult:
        """Return what it means for a sync that something beside it could not be done."""
        if not isinstance(error, PeerError):
            return cls(Outcome.FAILED, reason=str(error))
        lost = error.code in ("unreachable", "stale-epoch", "refused")
        return cls(Outcome.LOST if lost else Outcome.FAILED, reason=error.text)


def escape(field: str) -> str:
    """Escape one field of a command."""
    return field.translate(_ESCAPES)


def unescape(field: str) -> str:
    """The reverse of ``escape``.

    An unknown escape stands for the character itself, as Dovecot has it.
    """
    if "\x01" not in field:
        return field
    chars = iter(field)
    return "".join(
        _UNESCAPES.get(after, after) if char == "\x01" and (after := next(chars, "")) else char
        for char in chars
    )


def nameable(mailbox: str) -> bool:
    """Return whether dsync's ``-x`` can name this mailbox and no other.

    It takes wildcards, and a leading backslash for a special use.
    """
    return not (mailbox.startswith("\\") or "*" in mailbox or "?" in mailbox)


def listable(mailbox: str) -> bool:
    """Return whether dsync's ``-m`` can name this mailbox and no other.

    It takes the wildcards of LIST, and a leading backslash for a special use.
    """
    return not (mailbox.startswith("\\") or "*" in mailbox or "%" in mailbox) and _utf8(mailbox)


def with_id(shadow_id: str) -> tuple[str, ...]:
    """Return the search for messages that bear this id, whoever has written it."""
    return "HEADER", ids.HEADER, shadow_id


def given_id(headers: str) -> str:
    """Return the id that the milter has given a message, of what ``hdr.x-umbra-id`` tells.

    It is the first of that name: any sender who knows an id can write others below it.
    """
    return headers.partition("\n")[0].strip()


def _utf8(text: str) -> bool:
    """Return whether it is UTF-8: no lone surrogates, which stand for other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


async def read_line(reader: asyncio.StreamReader) -> bytes:
    """Return the next line without its end.

    EOFError if there is no whole one, ValueError if it is longer than the reader's limit.
    """
    line = await reader.readline()
    if not line.endswith(b"\n"):
        raise EOFError("the connection ended")
    return line[:-1]


class Doveadm:
    """Runs commands of the local Dovecot.

    :param socket: of a doveadm-server; the agent must own it and its mode must be 0600.
    """

    def __init__(self, socket: Path = SOCKET) -> None:
        self._socket = socket

    async def run(
        self, user: str, *command: str, limit: float = TIMEOUT, data: bytes | None = None
    ) -> Reply:
        """Run one command for ``user`` ("" for none); ``data`` is its standard input.

        DoveadmError if Dovecot does not answer within ``limit`` seconds.
        """
        try:
            line = "\t".join(map(escape, ("", user, *command))).encode() + b"\n"
            if data is not None:
                # The line's end before the last dot is not of the data.
                line += (b"\n" + data).replace(b"\n.", b"\n..")[1:] + b"\r\n.\r\n"
            async with asyncio.timeout(limit):
                return await self._run(line)
        except TimeoutError:
            raise DoveadmError(f"doveadm {command[0]} took over {limit:g} s") from None
        except (OSError, EOFError, ValueError) as error:
            raise DoveadmError(f"doveadm {command[0]}: {error or type(error).__name__}") from None

    async def fields(
        self, user: str, command: str, *arguments: str, data: bytes | None = None
    ) -> list[str]:
        """Run one command for ``user`` and return its output; DoveadmError unless it succeeds."""
        reply = await self.run(user, command, "-u", user, *arguments, data=data)
        if reply.code:
            raise DoveadmError(f"doveadm {command} of {user} ended with {reply.code}")
        return reply.fields

    async def _run(self, line: bytes) -> Reply:
        reader, writer = await asyncio.open_unix_connection(self._socket, limit=MAX_LINE)
        try:
            writer.write(HELLO + line)
            if (hello := await read_line(reader)) != b"+":
                raise DoveadmError(
                    f"doveadm-server wants a password ({hello!r}): "
                    "its socket must have mode 0600 and belong to the agent"
                )
            output = (await read_line(reader)).decode()
            status = (await read_line(reader)).decode()
        finally:
            # A command that is cut off here goes on in Dovecot until it notices; a second one for
            # the same user waits for its lock.
            writer.transport.abort()
        if status[:1] not in ("+", "-"):
            raise DoveadmError(f"doveadm-server sent {status[:40]!r} where a result was expected")
        fields = [unescape(field) for field in output.split("\t")]
        return Reply(
            fields[:-1] if fields[-1] == "" else fields,
            "" if status == "+" else status[1:] or "UNKNOWN",
        )

    async def pieces(self, user: str, *command: str) -> AsyncIterator[tuple[bytes, bool]]:
        """Run a command whose output may be of any length; yield it as it comes.

        Each item is a part of a field, still escaped, and whether the field ends with it.
        DoveadmError if it fails, also half way.
        """
        name = command[0]
        line = "\t".join(map(escape, ("", user, *command))).encode() + b"\n"
        try:
            async with asyncio.timeout(STREAM_STALL):
                reader, writer = await asyncio.open_unix_connection(self._socket, limit=CHUNK)
        except (OSError, TimeoutError) as error:
            raise DoveadmError(f"doveadm {name}: {error or type(error).__name__}") from None
        try:
            writer.write(HELLO + line)
            async with asyncio.timeout(STREAM_STALL):
                if await read_line(reader) != b"+":
                    raise DoveadmError("doveadm-server wants a password")
            ended = False
            while not ended:
                async with asyncio.timeout(STREAM_STALL):
                    data = await reader.read(CHUNK)
                if not data:
                    raise EOFError("the connection ended")
                output, newline, status = data.partition(b"\n")
                ended = bool(newline)
                *fields, rest = output.split(b"\t")
                for field in fields:
                    yield field, True
                if rest:
                    yield rest, False
                # A long output that is there already must not keep the loop from others.
                await asyncio.sleep(0)
            if b"\n" not in status:
                async with asyncio.timeout(STREAM_STALL):
                    status += await read_line(reader)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            raise DoveadmError(f"doveadm {name}: {error or type(error).__name__}") from None
        finally:
            writer.transport.abort()
        if status.rstrip(b"\n") != b"+":
            code = status.strip().decode(errors="replace").lstrip("-")
            raise DoveadmError(f"doveadm {name} ended with {code or 'UNKNOWN'}")

    async def sync(
        self,
        user: str,
        destination: str,
        state: str,
        limit: float,
        *,
        merge: bool = False,
        apart: Sequence[str] = (),
        only: str = "",
    ) -> SyncResult:
        """Sync all mailboxes of ``user`` to ``destination`` (``tcp:/path`` or ``tcp:host:port``).

        One way (``doveadm backup``): afterwards the destination is as we are. Two-way dsync inside
        a notification waited 30 s for the list of mailboxes that a RENAME holds locked, and a
        RENAME soon after a CREATE was undone here by the destination's older names (2.4.1). Two-way
        from scratch, whatever the destination lacks or has too much was taken for the newer state
        where the logs did not tell; one-way from scratch, flags need a look, see ``flags``. From
        scratch it is told to look into each mailbox (``-f``): else it passes over one whose
        counters are the same on both sides by chance, whatever is in it (found by the model test).

        :param merge: two-way (``doveadm sync``): nothing that only one side has is lost.
        :param apart: mailboxes that it leaves as they are on both sides; names for which
            ``nameable`` holds.
        :param only: the one mailbox to be synced, a name for which ``listable`` holds. One that is
            not there is no error, and the new state tells of this one alone.
        :param state: of the last sync to the same place; "" compares everything.
        :param limit: seconds, after which the outcome is FAILED.
        """
        try:
            reply = await self.run(
                user,
                "sync" if merge else "backup",
                "-u",
                user,
                *([] if state else ["-f"]),
                *(word for name in apart for word in ("-x", name)),
                *(["-m", only] if only else []),
                "-l",
                str(LOCK_SECONDS),
                "-T",
                str(STALL_SECONDS),
                "-s",
                state,
                destination,
                limit=limit,
            )
        except DoveadmError as error:
            return SyncResult.of(error)
        new = reply.fields[0] if reply.fields and reply.fields[0] else None
        match reply.code:
            case "":
                return SyncResult(Outcome.SYNCED, new)
            case "CHANGED":
                return SyncResult(Outcome.CHANGED, new, "changed while it was synced")
            case "NOUSER":
                return SyncResult(Outcome.NO_USER, reason="the user is unknown")
        return SyncResult(
            Outcome.FAILED, reason=f"the sync ended with {reply.code}; Dovecot's log says why"
        )

    async def users(self) -> list[str]:
        """Return all users that the user database lists."""
        reply = await self.run("", "user", "*")
        if reply.code or len(reply.fields) != 1:
            raise DoveadmError(f"doveadm user ended with {reply.code or 'no output'}")
        return [str(user) for user in json.loads(reply.fields[0])["userList"]]

    async def exists(self, user: str) -> bool:
        """Return whether the user database knows ``user``."""
        reply = await self.run(user, "user", user)
        if reply.code not in ("", "NOUSER"):
            raise DoveadmError(f"doveadm user ended with {reply.code}")
        return not reply.code

    async def has_message(self, user: str, shadow_id: str, message_id: str = "") -> bool | None:
        """Return whether a mailbox of ``user`` has a message that bears this ``X-Umbra-Id``.

        None if there is no such user.

        :param message_id: one with this Message-ID will do as well. One that is not in angle
            brackets is not looked for: the search is for a part of the header.
        """
        query = with_id(shadow_id)
        if message_id.startswith("<") and message_id.endswith(">") and _utf8(message_id):
            # doveadm's OR stands between; a leading one, as in IMAP, ends its server process.
            query = (*query, "OR", "HEADER", "Message-ID", message_id)
        found = await self._of_user(user, "search", *query)
        return None if found is None else bool(found)

    async def has_delivery(self, user: str, shadow_id: str) -> bool | None:
        """Return whether the message that was given this id is in a mailbox of ``user``.

        None if there is no such user.
        """
        found = await self._of_user(user, "fetch", "hdr.x-umbra-id", *with_id(shadow_id))
        if found is None:
            return None
        return any(given_id(headers) == shadow_id for headers in found)

    async def _of_user(self, user: str, command: str, *arguments: str) -> list[str] | None:
        if not _utf8(user):
            return None  # a recipient may be any bytes; a user of Dovecot's has a name in UTF-8
        reply = await self.run(user, command, "-u", user, *arguments)
        if reply.code == "NOUSER":
            return None
        if reply.code:
            raise DoveadmError(f"doveadm {command} ended with {reply.code}")
        return reply.fields
