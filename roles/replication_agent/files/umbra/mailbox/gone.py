"""Mailboxes that are gone here and that dsync cannot remove from the peer.

When nested mailboxes are deleted or renamed, dsync may meet an assertion of its own about their
directories, on both nodes, and again with every try (2.4.1, found by the model test). So after a
sync that has failed, the peer is told which mailboxes there are and removes all others itself, the
deepest first. When that was not enough, and as soon as nobody relies on the copy, those go, too,
that have another name here: they are copied anew.
It only takes from a copy what the next sync would take: a node that may have mail of its own
refuses. That next sync is the mirror's, from scratch: what the failed one has saved already, its
state does not tell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from umbra.mailbox.carrier import Exchange, valid_user
from umbra.mailbox.describe import Dovecot, is_guid
from umbra.mailbox.doveadm import DoveadmError, Outcome, SyncResult
from umbra.mailbox.mirror import Carrier
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity

log = logging.getLogger(__name__)

TIMEOUT = 30.0
MAX_MAILBOXES = 1500
"""As many GUIDs as fit a request; a user with more keeps what the syncs leave."""


class Link(Protocol):
    """The part of ``PeerLink`` that is used here."""

    async def request(self, op: str, args: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        """Run an exchange without data."""


class GoneCarrier:
    """A carrier that has the peer remove what is gone when a sync has failed.

    :param relied_on: whether the peer may have to take over from the copy as it is.
    """

    def __init__(
        self, carrier: Carrier, link: Link, dovecot: Dovecot, relied_on: Callable[[], bool]
    ) -> None:
        self._carrier = carrier
        self._link = link
        self._dovecot = dovecot
        self._relied_on = relied_on
        self._failed: set[str] = set()  # whose last sync has failed, too

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        """See ``Carrier.sync``."""
        result = await self._carrier.sync(user, state, merge=merge, apart=apart)
        if result.outcome is Outcome.FAILED and not merge:
            await self._remove(user, renamed=user in self._failed and not self._relied_on())
            self._failed.add(user)
        elif result.outcome is Outcome.SYNCED:
            self._failed.discard(user)
        return result

    def progress(self, user: str) -> float:
        """See ``Carrier.progress``."""
        return self._carrier.progress(user)

    def cut(self, user: str = "") -> None:
        """See ``Carrier.cut``."""
        self._carrier.cut(user)

    async def _remove(self, user: str, *, renamed: bool) -> None:
        try:
            found = await self._dovecot.mailboxes(user)
            if not found or len(found) > MAX_MAILBOXES:
                return  # without a mailbox at all, something else is wrong
            args: dict[str, Any] = {"user": user, "keep": list(found.values())}
            if renamed:
                args["names"] = list(found)
            await self._link.request("mailboxes", args, timeout=TIMEOUT)
        except (DoveadmError, PeerError) as error:
            log.info("mailboxes of %s that are gone stay for now: %s", user, error)


class GoneHandler:
    """Shadow side: the handler of the operation ``mailboxes``.

    :param closed: why nothing may be removed here, "" if it may.
    """

    def __init__(self, closed: Callable[[], str], dovecot: Dovecot) -> None:
        self._closed = closed
        self._dovecot = dovecot

    async def __call__(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Remove the mailboxes of ``user`` whose GUID is not in ``keep``.

        With ``names``, in the same order, also those that have another one there. PeerError if that
        cannot be.
        """
        if reason := self._closed():
            raise PeerError("refused", reason)
        user, keep = args.get("user"), args.get("keep")
        if (
            not isinstance(user, str)
            or not valid_user(user)
            or not isinstance(keep, list)
            or not 0 < len(keep) <= MAX_MAILBOXES
            or not all(map(is_guid, keep))
        ):
            raise PeerError("refused", "not a list of mailboxes")
        names = args.get("names", ())
        if names and not (
            isinstance(names, list)
            and len(names) == len(keep)
            and all(isinstance(name, str) for name in names)
        ):
            raise PeerError("refused", "not a list of mailboxes")
        wanted = dict(zip(keep, names, strict=False))
        try:
            found = await self._dovecot.mailboxes(user)
            # A child's name is longer than its parent's. The INBOX is everybody's.
            gone = sorted(
                (
                    name
                    for name, guid in found.items()
                    if name != "INBOX" and (guid not in keep or wanted.get(guid, name) != name)
                ),
                key=len,
                reverse=True,
            )
            for name in gone:
                await self._dovecot.remove_mailbox(user, name)
                log.warning("removed mailbox %r of %s, which %s has not", name, user, peer.node)
        except DoveadmError as error:
            raise PeerError("dovecot", str(error)) from None
        return {"removed": len(gone)}
