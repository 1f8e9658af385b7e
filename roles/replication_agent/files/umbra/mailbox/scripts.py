"""What dsync does not tell of Sieve scripts (2.4.1): deletions, and a rename of the active one.

A script that was deleted or renamed would stay on the peer under its old name, and come back when
the peer becomes primary; and a peer that loses the active one that way would filter nothing. So a
sync that compares everything, and one of a user whose scripts have just changed, is followed by the
list of the scripts that there are, and which one is active; the peer removes all others and makes
that one active. The user's next sync begins only after that, so no newer script can be among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from umbra.mailbox.carrier import Exchange, valid_user
from umbra.mailbox.describe import Dovecot
from umbra.mailbox.doveadm import DoveadmError, Outcome, SyncResult
from umbra.mailbox.mirror import Carrier
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity

TIMEOUT = 30.0
MAX_SCRIPTS = 1000


class Link(Protocol):
    """The part of ``PeerLink`` that is used here."""

    async def request(self, op: str, args: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        """Run an exchange without data."""


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
            args = {"user": user, "keep": keep, "active": active}
            await self._link.request("scripts", args, timeout=TIMEOUT)
        except DoveadmError as error:
            return SyncResult(Outcome.FAILED, reason=str(error))
        except PeerError as error:
            return SyncResult.of(error)
        return None


class ScriptsHandler:
    """Shadow side: the handler of the operation ``scripts``."""

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
        except DoveadmError as error:
            raise PeerError("dovecot", str(error)) from None
        return {"removed": len(removed)}
