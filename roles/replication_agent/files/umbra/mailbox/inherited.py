"""Where the former primary's syncs ended, after a switchover.

Both nodes hold the same then, but the new primary has synced nothing yet, and its first sync of
each user would compare all mailboxes while a client waits. The former primary's states hold for the
other direction too: dsync's receiving side takes a state from the sender's counters and lifts its
own to them (2.4.1, ``dsync_mailbox_import_finish``), so whatever changes there later is newer than
the state; a mailbox that it does not tell of is compared.

``sync-state {user}``: the answer has the ``state`` of the last sync of a user to the node that asks
and the ``binding`` that it holds for, see the ledger; and in hexadecimal the ``tree``, from which
the new primary can foretell the first sync, see ``foretell``. If the agent dies here or there, all
users are compared, as after each start.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from umbra.mailbox.carrier import Exchange
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity

log = logging.getLogger(__name__)

TIMEOUT = 2.0
LONGEST = 60_000
"""Bytes of a state and a tree that fit an answer: some 800 mailboxes."""


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


class Carrier(Protocol):
    """The part of ``DsyncCarrier`` that is used here."""

    def tree(self, user: str) -> bytes:
        """What stands for the user's mailboxes, b"" if that is not known."""

    def teach(self, user: str, tree: bytes) -> None:
        """Make that known, or forget it for b""."""


class InheritedStates:
    """The states that a former primary kept for this node.

    :param binding: what they must hold for.
    :param carrier: learns which mailboxes the nodes have.
    """

    def __init__(self, link: Link, binding: str, carrier: Carrier) -> None:
        self._link = link
        self._binding = binding
        self._carrier = carrier

    async def __call__(self, user: str) -> str:
        """Return the state of ``user``, "" if there is none to trust."""
        self._carrier.teach(user, b"")  # what this node knew in an earlier term
        try:
            answer = await self._link.request("sync-state", {"user": user}, timeout=TIMEOUT)
        except PeerError as error:
            log.info("%s does not tell the state of %s: %s", self._link.name, user, error)
            return ""
        state, tree = answer.get("state"), answer.get("tree")
        if not isinstance(state, str) or answer.get("binding") != self._binding:
            return ""
        if state and isinstance(tree, str):  # a former primary of before tells none
            with suppress(ValueError):
                self._carrier.teach(user, bytes.fromhex(tree))
        return state


class StateHandler:
    """The handler of the operation ``sync-state``.

    :param carriers: of each peer.
    """

    def __init__(self, states: States, carriers: Mapping[str, Carrier]) -> None:
        self._states = states
        self._carriers = carriers

    async def __call__(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Tell the state of a user."""
        user = args.get("user")
        state, tree = "", ""
        if isinstance(user, str):
            state = await self._states.state(peer.node, user)
            carrier = self._carriers.get(peer.node)
            tree = carrier.tree(user).hex() if carrier else ""
        if len(state) > LONGEST:
            state = ""
        if len(state) + len(tree) > LONGEST:
            tree = ""
        return {"state": state, "tree": tree, "binding": self._states.binding(peer.node)}
