"""What dsync does not tell of Sieve scripts (2.4.1).

Deletions, a rename of the active one, and a second change within a second.

A script that was deleted or renamed would stay on the peer under its old name, and come back when
the peer becomes primary; and a peer that loses the active one that way would filter nothing. So a
sync that compares everything, and one of a user whose scripts have just changed, is followed by the
list of the scripts that there are, and which one is active; the peer removes all others and makes
that one active. The user's next sync begins only after that, so no newer script can be among them.

dsync goes by the time of a script's file, in seconds. So the list has the scripts' fingerprints,
and the peer is sent those that it has otherwise.

* ``scripts {user, keep, active, fingerprints}``: the list; answers with the ``stale`` names.
* ``script {user, name, active}``, DATA: the script, and whether it is the active one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from umbra.mailbox.carrier import Exchange, valid_user
from umbra.mailbox.describe import Dovecot, fingerprint
from umbra.mailbox.doveadm import DoveadmError, Outcome, SyncResult
from umbra.mailbox.mirror import Carrier
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity

log = logging.getLogger(__name__)

TIMEOUT = 30.0
MAX_SCRIPTS = 1000
MAX_FINGERPRINTS = 400
"""As many as fit a request."""
MAX_SCRIPT = 4 * 1024 * 1024
MAX_NAME = 1000


class Link(Protocol):
    """The part of ``PeerLink`` that is used here."""

    async def request(self, op: str, args: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        """Run an exchange without data."""

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

    async def sync(self, user: str, state: str, *, merge: bool = False) -> SyncResult:
        """See ``Carrier.sync``. If only the scripts failed, all is done again."""
        changed = user in self._changed
        self._changed.discard(user)
        result = await self._carrier.sync(user, state, merge=merge)
        if result.outcome is Outcome.SYNCED and not merge and (changed or not state):
            failed = await self._keep(user)
            result = failed or result
        if changed and result.outcome is not Outcome.SYNCED:
            self._changed.add(user)
        return result

    def progress(self, user: str) -> float:
        """See ``Carrier.progress``."""
        return self._carrier.progress(user)

    def cut(self) -> None:
        """Break all syncs that run."""
        self._carrier.cut()

    async def _keep(self, user: str) -> SyncResult | None:
        try:
            keep, active = await self._dovecot.scripts(user)
            texts = {
                name: await self._dovecot.script(user, name) for name in keep[:MAX_FINGERPRINTS]
            }
            args = {
                "user": user,
                "keep": keep,
                "active": active,
                "fingerprints": {name: fingerprint(text) for name, text in texts.items()},
            }
            answer = await self._link.request("scripts", args, timeout=TIMEOUT)
            for name in answer.get("stale", ()):
                if name in texts:
                    await self._send(user, name, texts[name], active=name == active)
        except (DoveadmError, PeerError) as error:
            return SyncResult.of(error)
        return None

    async def _send(self, user: str, name: str, text: str, *, active: bool) -> None:
        args = {"user": user, "name": name, "active": active}
        try:
            async with self._link.exchange("script", args, timeout=TIMEOUT) as exchange:
                await exchange.send(text.encode())
                await exchange.end()
                await exchange.result()
        except PeerError as error:
            if error.code != "dovecot":
                raise
            # One that does not compile there must not keep the user's mail from being mirrored.
            log.warning("the script %s of %s is another one there: %s", name, user, error)


class ScriptsHandler:
    """Shadow side: the handlers of the operations ``scripts`` and ``script``."""

    def __init__(self, is_primary: Callable[[], bool], dovecot: Dovecot) -> None:
        self._is_primary = is_primary
        self._dovecot = dovecot

    async def __call__(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Remove the scripts of ``user`` that are not in ``keep``, and have ``active`` active.

        PeerError if that cannot be.
        """
        user, keep, active = args.get("user"), args.get("keep"), args.get("active")
        if self._is_primary():
            raise PeerError("refused", "this node is primary; it takes no changes from others")
        if (
            not isinstance(user, str)
            or not valid_user(user)
            or not isinstance(keep, list)
            or len(keep) > MAX_SCRIPTS
            or not isinstance(active, str)
            or (active and active not in keep)
        ):
            raise PeerError("refused", "not a list of scripts")
        try:
            names, now = await self._dovecot.scripts(user)
            # The other script first: there is no moment without one.
            if active and active != now and active in names:
                await self._dovecot.activate_script(user, active)
            removed = [name for name in names if name not in keep]
            for name in removed:
                await self._dovecot.remove_script(user, name)
            if not active and now in keep:
                await self._dovecot.activate_script(user, "")
            stale = await self._stale(user, names, args.get("fingerprints"))
        except DoveadmError as error:
            raise PeerError("dovecot", str(error)) from None
        return {"removed": len(removed), "stale": stale}

    async def _stale(self, user: str, names: list[str], wanted: object) -> list[str]:
        if not isinstance(wanted, dict):
            return []
        return [
            name
            for name, expected in wanted.items()
            if name not in names or fingerprint(await self._dovecot.script(user, name)) != expected
        ]

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
            or not name.isprintable()
            or name.startswith("-")
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
