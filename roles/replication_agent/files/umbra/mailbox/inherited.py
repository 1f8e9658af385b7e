"""Where the former primary's syncs ended, after a switchover.

Both nodes hold the same then, but the new primary has synced nothing yet, and its first sync of
each user would compare all mailboxes while a client waits. The former primary's states hold for the
other direction too: dsync's receiving side takes a state from the sender's counters and lifts its
own to them (2.4.1, ``dsync_mailbox_import_finish``), so whatever changes there later is newer than
the state; a mailbox that it does not tell of is compared.

``sync-state {user}``: the answer has the ``state`` of the last sync of a user to the node that asks
and the ``binding`` that it holds for, see the ledger. If the agent dies here or there, all users
are compared, as after each start.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from umbra.mailbox.carrier import Exchange
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity

log = logging.getLogger(__name__)

TIMEOUT = 2.0
LONGEST = 60_000
"""Bytes of a state that fit an answer: about a thousand mailboxes."""


class States(Protocol):
    """The part of the ledger that is used here."""

    def binding(self, peer: str) -> str:
        """What the states hold for."""

    async def state(self, peer: str, user: str) -> str:
        """The state of the last sync, "" for none."""


class Link(Protocol):
    """The part of ``PeerLink`` that is used here."""

    name: str

    async def request(self, op: str, args: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        """Run an exchange without data."""


class InheritedStates:
    """The states that a former primary kept for this node.

    :param binding: what they must hold for.
    """

    def __init__(self, link: Link, binding: str) -> None:
        self._link = link
        self._binding = binding

    async def __call__(self, user: str) -> str:
        """Return the state of ``user``, "" if there is none to trust."""
        try:
            answer = await self._link.request("sync-state", {"user": user}, timeout=TIMEOUT)
        except PeerError as error:
            log.info("%s does not tell the state of %s: %s", self._link.name, user, error)
            return ""
        state = answer.get("state")
        return state if isinstance(state, str) and answer.get("binding") == self._binding else ""


class StateHandler:
    """The handler of the operation ``sync-state``."""

    def __init__(self, states: States) -> None:
        self._states = states

    async def __call__(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Tell the state of a user."""
        user = args.get("user")
        state = await self._states.state(peer.node, user) if isinstance(user, str) else ""
        whole = len(state) <= LONGEST
        return {"state": state if whole else "", "binding": self._states.binding(peer.node)}
