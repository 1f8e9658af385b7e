"""An IMAP worker: changes mailboxes of its own and notes what the server said to each change.

It knows what each of its mailboxes holds, so it asks only for changes that do something. After a
change whose outcome it does not know it starts afresh with new mailboxes and leaves the old ones
alone: so of the changes to one set of mailboxes at most the last is unknown, and the accounting
stays exact.
"""

from __future__ import annotations

import contextlib
import imaplib
import random
import re
import ssl
from typing import Any

from .canonical import digest
from .connect import Imap, Nodes, spoken
from .journal import OK, REFUSED, UNKNOWN, UNREACHED, Journal, stamp, text
from .messages import Message, stream
from .pace import Pace
from .settings import Settings, User

FLAGS = (r"\Seen", r"\Flagged", r"\Answered", r"\Draft", "$Important", "FailoverTest")
# How often each change is asked for, and how full the working mailbox is kept.
WEIGHTS = {"append": 8, "store": 8, "copy": 3, "move": 3, "delete": 4, "mailbox": 3}
FULL = 30

_COPYUID = re.compile(rb"(\d+) (\S+) (\S+)")
_EXISTS_NOT = "OK, but no such message"


class Refused(Exception):
    """The server said NO or BAD, or OK to something that it did not do."""


class Changer:
    """Works in two mailboxes: ``a``, which is selected, and ``b``, which gets copies.

    A third one is created, renamed and deleted in turn.
    """

    def __init__(
        self, settings: Settings, journal: Journal, context: ssl.SSLContext, worker: int, user: User
    ) -> None:
        self._settings = settings
        self._journal = journal
        self._context = context
        self._worker = worker
        self._user = user
        self._nodes = Nodes(settings.targets)
        self._session: Imap | None = None
        self._chance = random.Random(f"{settings.run}-{worker}")
        self._messages = stream(settings.run, 1000 + worker, [])
        self._generation = -1
        self._made = False
        self._operations = 0
        self._start_afresh()

    def close(self) -> None:
        """End the session politely if it still answers."""
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(OSError, imaplib.IMAP4.error):
                session.logout()

    def step(self, pace: Pace) -> None:
        """Make one change, or as many as it takes until one is answered.

        The wait for the next turn is no part of an outage.
        """
        while True:
            session = self._connected()
            if session is not None:
                self._change(session)
            if self._session is not None or not pace.pause():
                return

    def _change(self, session: Imap) -> None:
        if not self._made:
            wanted = [name for name in (self._a, self._b) if name not in self._made_names]
            name = wanted[0]
            if self._do(session, "create", {"mailbox": name}, lambda: _done(session.create(name))):
                self._made_names.add(name)
                if len(self._made_names) == 2:
                    self._made = True
                    self._select(session)
            return
        kinds = [kind for kind in WEIGHTS if self._possible(kind)]
        kind = self._chance.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]
        getattr(self, f"_{kind}")(session)

    def _start_afresh(self) -> None:
        self._generation += 1
        stem = f"{self._settings.folder_prefix}{self._worker}-{self._generation}"
        self._a, self._b, self._c = f"{stem}-a", f"{stem}-b", f"{stem}-c"
        self._made = False
        self._made_names: set[str] = set()
        self._third: str | None = None
        self._thirds = 0
        self._flags: dict[int, set[str]] = {}  # what is in mailbox a: UID -> flags
        self._ids: dict[int, str] = {}

    # -- the connection

    def _connected(self) -> Imap | None:
        """Return a live session with mailbox a selected, or None when there is none now."""
        if self._session is not None and spoken(self._session.sock):
            self._drop()
        if self._session is None:
            begin = stamp()
            self._session, reason = self._nodes.connect(
                lambda target: Imap(
                    target, self._settings, self._context, self._user.address, self._user.password
                )
            )
            if self._session is None:
                self._log("connect", begin, UNREACHED, reason, None, {})
                return None
            if self._made:
                self._select(self._session)
        return self._session

    def _select(self, session: Imap) -> None:
        """Select mailbox a and log its UIDVALIDITY: it must be the same on every node for ever."""
        begin = stamp()
        node = session.target.node
        try:
            typ, data = session.select(self._a)
            validity = _last(session.response("UIDVALIDITY")[1])
        except (OSError, imaplib.IMAP4.error) as error:
            self._log("select", begin, UNREACHED, error, node, {"mailbox": self._a})
            self._drop()
            return
        details: dict[str, Any] = {"mailbox": self._a}
        if typ == "OK" and validity:
            details["uidvalidity"] = int(validity)
            self._log("select", begin, OK, data[-1], node, details)
        else:
            # The mailbox is gone: the accounting will say so. Go on with new ones.
            self._log("select", begin, REFUSED, data[-1], node, details)
            self._start_afresh()

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(OSError):
                session.shutdown()

    # -- the changes

    def _possible(self, kind: str) -> bool:
        if kind == "append":
            return len(self._flags) < FULL
        return kind == "mailbox" or len(self._flags) > FULL // 3

    def _append(self, session: Imap) -> None:
        message = self._next_message()

        def change() -> dict[str, Any]:
            session.untagged_responses.pop("APPENDUID", None)
            _done(session.append(self._a, "", "", message.raw))
            validity, uid = (_last(session.response("APPENDUID")[1]) or b"0 0").split()
            return {"uid": int(uid), "uidvalidity": int(validity)}

        details = {"mailbox": self._a, "message": message.id, "sent": digest(message.raw)}
        result = self._do(session, "append", details, change)
        if result and result["uid"]:
            self._flags[result["uid"]] = set()
            self._ids[result["uid"]] = message.id

    def _store(self, session: Imap) -> None:
        uid = self._some_uid()
        flag = self._chance.choice(FLAGS)
        add = flag not in self._flags[uid]
        if self._flag(session, uid, flag, add):
            (self._flags[uid].add if add else self._flags[uid].discard)(flag)

    def _flag(self, session: Imap, uid: int, flag: str, add: bool) -> dict[str, Any] | None:
        def change() -> dict[str, Any]:
            _typ, data = _done(
                session.uid("STORE", str(uid), "+FLAGS" if add else "-FLAGS", f"({flag})")
            )
            if not data or data[-1] is None:
                raise Refused(_EXISTS_NOT)
            return {}

        details = {"mailbox": self._a, "message": self._ids[uid], "flag": flag, "add": add}
        return self._do(session, "store", details, change)

    def _copy(self, session: Imap) -> None:
        uid = self._some_uid()
        details = {"mailbox": self._a, "message": self._ids[uid], "to": self._b}
        self._do(session, "copy", details, lambda: self._transfer(session, "COPY", uid))

    def _move(self, session: Imap) -> None:
        uid = self._some_uid()
        details = {"mailbox": self._a, "message": self._ids[uid], "to": self._b}
        if self._do(session, "move", details, lambda: self._transfer(session, "MOVE", uid)):
            del self._flags[uid], self._ids[uid]

    def _transfer(self, session: Imap, verb: str, uid: int) -> dict[str, Any]:
        session.untagged_responses.pop("COPYUID", None)
        _done(session.uid(verb, str(uid), self._b))
        match = _COPYUID.match(_last(session.response("COPYUID")[1]) or b"")
        if match is None:
            raise Refused(_EXISTS_NOT)
        return {"uid": int(match.group(3)), "uidvalidity": int(match.group(1))}

    def _delete(self, session: Imap) -> None:
        """Make two changes, as a client does: the flag, then the expunge of that message."""
        uid = self._some_uid()
        if not self._flag(session, uid, r"\Deleted", True):
            return
        self._flags[uid].add(r"\Deleted")

        def change() -> dict[str, Any]:
            session.untagged_responses.pop("EXPUNGE", None)
            _done(session.uid("EXPUNGE", str(uid)))
            if _last(session.response("EXPUNGE")[1]) is None:
                raise Refused(_EXISTS_NOT)
            return {}

        details = {"mailbox": self._a, "message": self._ids[uid]}
        if self._do(session, "expunge", details, change):
            del self._flags[uid], self._ids[uid]

    def _mailbox(self, session: Imap) -> None:
        """Create the third mailbox, rename it, delete it: one of these each time."""
        third = self._third
        if third is None:
            name = f"{self._c}{self._thirds}"
            self._thirds += 1
            if self._do(session, "create", {"mailbox": name}, lambda: _done(session.create(name))):
                self._third = name
        elif third.endswith("-renamed"):
            if self._do(
                session, "delete", {"mailbox": third}, lambda: _done(session.delete(third))
            ):
                self._third = None
        else:
            new = f"{third}-renamed"
            details = {"mailbox": third, "to": new}
            if self._do(session, "rename", details, lambda: _done(session.rename(third, new))):
                self._third = new

    # -- one change

    def _do(
        self, session: Imap, kind: str, details: dict[str, Any], change: Any
    ) -> dict[str, Any] | None:
        """Run one change and log it. Returns what it gave when it was acknowledged, else None."""
        begin = stamp()
        node = session.target.node
        details = {**details, "generation": f"{self._worker}-{self._generation}"}
        try:
            result = change()
        except (imaplib.IMAP4.abort, OSError) as error:
            self._log(kind, begin, UNKNOWN, error, node, details)
            self._drop()
            self._start_afresh()
            return None
        except (imaplib.IMAP4.error, Refused) as error:
            # Nobody else uses these names: this CREATE has made it, and a dsync opened it first.
            made = kind == "create" and "[ALREADYEXISTS]" in str(error)
            self._log(kind, begin, UNKNOWN if made else REFUSED, error, node, details)
            if made or str(error) == _EXISTS_NOT:
                self._start_afresh()  # the accounting finds out what is there
            return None
        given = result if isinstance(result, dict) else {}
        self._log(kind, begin, OK, "OK", node, {**details, **given})
        return {"uid": 0, **given}

    def _log(
        self,
        kind: str,
        begin: dict[str, float],
        outcome: str,
        answer: object,
        node: str | None,
        details: dict[str, Any],
    ) -> None:
        self._operations += 1
        self._journal.write(
            {
                "type": "op",
                "kind": kind,
                "id": f"{self._settings.run}-i{self._worker}-{self._operations:06d}",
                "worker": f"i{self._worker}",
                "user": self._user.address,
                "start": begin["at"],
                "end": stamp()["at"],
                "wall": begin["wall"],
                "node": node,
                "outcome": outcome,
                "answer": text(answer),
                **details,
            }
        )

    def _some_uid(self) -> int:
        return self._chance.choice(list(self._flags))

    def _next_message(self) -> Message:
        # IMAP gives the bytes as they are; bare CR and LF belong to SMTP's part of the test.
        return next(
            message
            for message in self._messages
            if message.kind in ("plain", "8-bit", "attachment")
        )


def _done(answer: tuple[str, list[Any]]) -> tuple[str, list[Any]]:
    if answer[0] != "OK":
        raise Refused(f"{answer[0]} {text(answer[1][-1] if answer[1] else b'')}")
    return answer


def _last(data: list[Any] | None) -> bytes | None:
    return bytes(data[-1]) if data and data[-1] is not None else None
