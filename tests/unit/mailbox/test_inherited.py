"""Which of a former primary's states the new one trusts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

from umbra.mailbox.carrier import Exchange
from umbra.mailbox.inherited import LONGEST, InheritedStates, StateHandler
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity

USER = "a@example.org"


class Former:
    """The former primary: its ledger, and the link to it."""

    name = "mail-a"

    def __init__(self, binding: str = "b", state: str = "s") -> None:
        self._binding, self._state = binding, state
        self.error: PeerError | None = None

    def binding(self, peer: str) -> str:
        assert peer == "mail-b"
        return self._binding

    async def state(self, peer: str, user: str) -> str:
        assert (peer, user) == ("mail-b", USER)
        return self._state

    async def request(self, op: str, args: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        assert op == "sync-state"
        if self.error is not None:
            raise self.error
        handler = StateHandler(self)
        return await handler(PeerIdentity("mail-b", "s"), args, cast(Exchange, None))


@pytest.mark.parametrize(
    ("former", "state"),
    [
        (Former(), "s"),
        (Former(state=""), ""),
        (Former(binding="of another term"), ""),
        (Former(state="s" * LONGEST), "s" * LONGEST),
        (Former(state="s" * (LONGEST + 1)), ""),
    ],
    ids=["one", "none", "of another term", "long", "too long"],
)
async def test_a_state_is_trusted_if_it_is_of_the_term_before(former: Former, state: str) -> None:
    assert await InheritedStates(former, "b")(USER) == state


async def test_a_former_primary_that_does_not_answer_costs_a_comparison() -> None:
    former = Former()
    former.error = PeerError("unreachable", "mail-a is gone")
    assert await InheritedStates(former, "b")(USER) == ""


async def test_nobody_has_no_state() -> None:
    handler = StateHandler(Former())
    answer = await handler(PeerIdentity("mail-b", "s"), {"user": 7}, cast(Exchange, None))
    assert answer == {"state": "", "binding": "b"}
