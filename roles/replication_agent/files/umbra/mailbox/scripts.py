"""What dsync does not tell of Sieve scripts (2.4.1).

Deletions, a rename of the active one, and a second change within a second.

A script that was deleted or renamed would stay on the peer under its old name, and come back when
the peer becomes primary; and a peer that loses the active one that way would filter nothing. So a
sync that compares everything, and one of a user whose scripts have just changed, is followed by the
list of the scripts that there are, and which one is active; the peer removes all others and makes
that one active. The user's next sync begins only after that, so no newer script can be among them.

dsync goes by the time of a script's file, in seconds. So the list has the scripts' fingerprints,
and the peer is sent those that it has otherwise.

Names and number of the scripts are the user's choice. So the list is of any length, and whatever
the peer says against it concerns this user's scripts alone: it neither drops the peer nor keeps the
user's mail from it.

* ``scripts {user, active}``, DATA: JSON lines ``[name, fingerprint]``, "" for one that is not
  compared; back come JSON lines ``[name]`` of those that are stale there. A primary of before says
  it in the request, ``{user, keep, active, fingerprints}``, and has the ``stale`` in the answer.
* ``script {user, name, active}``, DATA: the script, and whether it is the active one.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from umbra.mailbox.carrier import Exchange, valid_user
from umbra.mailbox.describe import Dovecot, fingerprint
from umbra.mailbox.doveadm import DoveadmError, Outcome, SyncResult
from umbra.mailbox.mirror import Carrier
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity
from umbra.peer.rows import received_rows, send_rows

log = logging.getLogger(__name__)

TIMEOUT = 30.0
MAX_SCRIPTS = 100_000
"""So that a peer cannot fill the memory; a user may have many."""
MAX_FINGERPRINTS = 400
"""Each is a question to Dovecot, here and there. The others are only kept."""
MAX_SCRIPT = 4 * 1024 * 1024
MAX_NAME = 1000
NEVER = "\0\r\n"
"""Not in a name. Dovecot says what else is; it takes many a character that is not printable."""
CONTENT = ("refused", "protocol")
"""What a peer says that does not want what this user has."""


class Link(Protocol):
    """The part of ``PeerLink`` that is used here."""

    def exchange(
        self, op: str, args: Mapping[str, Any], *, timeout: float
    ) -> AbstractAsyncContextManager[Any]:
        """Run an exchange."""


class ScriptCarrier:
    """A carrier whose syncs take deletions of scripts along. See the module for which."""

    def __init__(self, carrier: Carrier, link: Link, dovecot: Dovecot) -> None:
        self._carrier = carrier
        self._link = link
        self._dovecot = dovecot
        self._changed: set[str] = set()

    def changed(self, user: str) -> None:
        """Scripts of ``user`` changed: the next sync shall take that along."""
        self._changed.add(user)

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        """See ``Carrier.sync``. If only the scripts failed, all is done again."""
        changed = user in self._changed
        self._changed.discard(user)
        result = await self._carrier.sync(user, state, merge=merge, apart=apart)
        if result.outcome is Outcome.SYNCED and not merge and (changed or not state):
            failed = await self._keep(user)
            result = failed or result
        if changed and result.outcome is not Outcome.SYNCED:
            self._changed.add(user)
        return result

    def progress(self, user: str) -> float:
        """See ``Carrier.progress``."""
        return self._carrier.progress(user)

    def cut(self, user: str = "") -> None:
        """See ``Carrier.cut``."""
        self._carrier.cut(user)

    async def _keep(self, user: str) -> SyncResult | None:
        try:
            keep, active = await self._dovecot.scripts(user)
            texts = await self._dovecot.contents(user, keep[:MAX_FINGERPRINTS])
            for name in await self._tell(user, keep, active, texts):
                if name in texts:
                    await self._send(user, name, texts[name], active=name == active)
        except PeerError as error:
            if error.code not in CONTENT:
                return SyncResult.of(error)
            # Also a peer of before, until its agent is the new one: the user's next sync of all
            # mailboxes says it again. One that takes nothing at all from here says so to the next
            # sync of mail.
            log.warning("the scripts of %s wait: the peer does not take them: %s", user, error)
            self._changed.add(user)
        except DoveadmError as error:
            return SyncResult.of(error)
        return None

    async def _tell(
        self, user: str, keep: list[str], active: str, texts: Mapping[str, str]
    ) -> list[str]:
        """Tell the peer which scripts there are; return the names of those it has otherwise."""
        rows = ([name, fingerprint(texts[name]) if name in texts else ""] for name in keep)
        args = {"user": user, "active": active}
        async with self._link.exchange("scripts", args, timeout=TIMEOUT) as exchange:
            await send_rows(exchange, _each(rows))
            await exchange.end()
            stale = [row[0] async for row in received_rows(exchange) if _is_row(row, 1)]
            await exchange.result()
        return stale

    async def _send(self, user: str, name: str, text: str, *, active: bool) -> None:
        args = {"user": user, "name": name, "active": active}
        try:
            async with self._link.exchange("script", args, timeout=TIMEOUT) as exchange:
                await exchange.send(text.encode())
                await exchange.end()
                await exchange.result()
        except PeerError as error:
            if error.code != "dovecot" and error.code not in CONTENT:
                raise
            # One that does not compile there must not keep the user's mail from being mirrored.
            log.warning("the script %r of %s is another one there: %s", name, user, error)


class ScriptsHandler:
    """Shadow side: the handlers of the operations ``scripts`` and ``script``."""

    def __init__(self, is_primary: Callable[[], bool], dovecot: Dovecot) -> None:
        self._is_primary = is_primary
        self._dovecot = dovecot

    async def __call__(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Remove the scripts of ``user`` that are not listed, and have ``active`` active.

        PeerError if that cannot be.
        """
        user, active = args.get("user"), args.get("active")
        if self._is_primary():
            raise PeerError("refused", "this node is primary; it takes no changes from others")
        if not isinstance(user, str) or not valid_user(user) or not isinstance(active, str):
            raise PeerError("refused", "not a list of scripts")
        former = "keep" in args
        keep = _of_request(args) if former else await _of_lines(exchange)
        if active and active not in keep:
            raise PeerError("refused", "not a list of scripts")
        try:
            names, now = await self._dovecot.scripts(user)
            # The other script first: there is no moment without one.
            if active and active != now and active in names:
                await self._activate(user, active)
            removed = [name for name in names if name not in keep]
            for name in removed:
                await self._dovecot.remove_script(user, name)
            if not active and now in keep:
                await self._dovecot.activate_script(user, "")
            stale = await self._stale(user, set(names), keep)
        except DoveadmError as error:
            raise PeerError("dovecot", str(error)) from None
        if former:
            return {"removed": len(removed), "stale": stale}
        await send_rows(exchange, _each([name] for name in stale))
        await exchange.end()
        return {"removed": len(removed)}

    async def _stale(self, user: str, names: set[str], wanted: Mapping[str, str]) -> list[str]:
        return [
            name
            for name, expected in wanted.items()
            if expected and (name not in names or await self._fingerprint(user, name) != expected)
        ]

    async def _fingerprint(self, user: str, name: str) -> str:
        try:
            return fingerprint(await self._dovecot.script(user, name))
        except DoveadmError:
            return ""  # what cannot be read is replaced

    async def _activate(self, user: str, name: str) -> None:
        try:
            await self._dovecot.activate_script(user, name)
        except DoveadmError as error:
            # One that does not compile must not keep the user's mail from being mirrored.
            log.warning("the script %r of %s is not made active: %s", name, user, error)

    async def put(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Replace a script. PeerError if that cannot be."""
        user, name = args.get("user"), args.get("name")
        if self._is_primary():
            raise PeerError("refused", "this node is primary; it takes no changes from others")
        if (
            not isinstance(user, str)
            or not valid_user(user)
            or not isinstance(name, str)
            or not 0 < len(name) <= MAX_NAME
            or any(char in name for char in NEVER)
        ):
            raise PeerError("refused", "not a script")
        content = bytearray()
        while (data := await exchange.receive()) is not None:
            content += data
            if len(content) > MAX_SCRIPT:
                raise PeerError("refused", f"a script is over {MAX_SCRIPT} bytes")
        try:
            await self._dovecot.put_script(user, name, content.decode())
            if args.get("active") is True:
                await self._dovecot.activate_script(user, name)
        except UnicodeDecodeError:
            raise PeerError("protocol", "a script is not UTF-8") from None
        except DoveadmError as error:
            raise PeerError("dovecot", str(error)) from None
        await exchange.end()
        return {}


def _is_row(row: Any, width: int) -> bool:
    """Tell that this is a row of so many texts. PeerError ``protocol`` if it is none."""
    if (
        not isinstance(row, list)
        or len(row) != width
        or not all(isinstance(text, str) for text in row)
    ):
        raise PeerError("protocol", f"not a row of scripts: {row!r}"[:200])
    return True


async def _of_lines(exchange: Exchange) -> dict[str, str]:
    """Return the fingerprints that are listed, by name."""
    found: dict[str, str] = {}
    async for row in received_rows(exchange):
        if _is_row(row, 2):
            found[row[0]] = row[1]
        if len(found) > MAX_SCRIPTS:
            raise PeerError("refused", f"over {MAX_SCRIPTS} scripts")
    return found


def _of_request(args: Mapping[str, Any]) -> dict[str, str]:
    """Return the same of a request of a primary of before."""
    keep, fingerprints = args.get("keep"), args.get("fingerprints", {})
    if (
        not isinstance(keep, list)
        or not isinstance(fingerprints, dict)
        or not all(isinstance(text, str) for text in (*keep, *fingerprints.values()))
    ):
        raise PeerError("refused", "not a list of scripts")
    return {name: fingerprints.get(name, "") for name in keep}


async def _each(rows: Iterable[list[Any]]) -> AsyncIterator[list[Any]]:
    for row in rows:
        yield row
