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

    def __init__(self, binding: str = "b", state: str = "s", tree: bytes = b"t") -> None:
        self._binding, self._state, self._tree = binding, state, tree
        self.error: PeerError | None = None

    def binding(self, peer: str) -> str:
        assert peer == "mail-b"
        return self._binding

    async def state(self, peer: str, user: str) -> str:
        assert (peer, user) == ("mail-b", USER)
        return self._state

    def tree(self, user: str) -> bytes:
        assert user == USER
        return self._tree

    def teach(self, user: str, tree: bytes) -> None:
        raise AssertionError("this node is the former primary")

    async def request(self, op: str, args: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        assert op == "sync-state"
        if self.error is not None:
            raise self.error
        handler = StateHandler(self, {"mail-b": self})
        return await handler(PeerIdentity("mail-b", "s"), args, cast(Exchange, None))


class Learner:
    """What the new primary's carrier is taught."""

    def __init__(self) -> None:
        self.trees: dict[str, bytes] = {USER: b"of an earlier term"}

    def tree(self, user: str) -> bytes:
        return self.trees.get(user, b"")

    def teach(self, user: str, tree: bytes) -> None:
        if tree:
            self.trees[user] = tree
        else:
            self.trees.pop(user, None)


@pytest.mark.parametrize(
    ("former", "state", "tree"),
    [
        (Former(), "s", b"t"),
        (Former(state=""), "", b""),
        (Former(tree=b""), "s", b""),
        (Former(binding="of another term"), "", b""),
        (Former(state="s" * (LONGEST - 2)), "s" * (LONGEST - 2), b"t"),
        (Former(state="s" * LONGEST), "s" * LONGEST, b""),
        (Former(state="s" * (LONGEST + 1)), "", b""),
    ],
    ids=["one", "none", "no tree", "of another term", "long", "without its tree", "too long"],
)
async def test_a_state_is_trusted_if_it_is_of_the_term_before(
    former: Former, state: str, tree: bytes
) -> None:
    learner = Learner()
    assert await InheritedStates(former, "b", learner)(USER) == state
    assert learner.tree(USER) == tree


@pytest.mark.parametrize("tree", [None, 7, "", "no hexadecimal", ["t"]])
async def test_a_former_primary_of_before_teaches_nothing(tree: object) -> None:
    class Before(Former):
        async def request(
            self, op: str, args: Mapping[str, Any], *, timeout: float
        ) -> dict[str, Any]:
            return {"state": "s", "binding": "b"} | ({} if tree is None else {"tree": tree})

    learner = Learner()
    assert await InheritedStates(Before(), "b", learner)(USER) == "s"
    assert learner.trees == {}


async def test_a_former_primary_that_does_not_answer_costs_a_comparison() -> None:
    former, learner = Former(), Learner()
    former.error = PeerError("unreachable", "mail-a is gone")
    assert await InheritedStates(former, "b", learner)(USER) == ""
    assert learner.trees == {}


async def test_nobody_has_no_state() -> None:
    handler = StateHandler(Former(), {})
    answer = await handler(PeerIdentity("mail-b", "s"), {"user": 7}, cast(Exchange, None))
    assert answer == {"state": "", "tree": "", "binding": "b"}
