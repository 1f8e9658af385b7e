"""Mailboxes that dsync cannot remove: removed on the copy by GUID, only when a sync has failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest

from umbra.mailbox.describe import Dovecot
from umbra.mailbox.doveadm import DoveadmError, Outcome, SyncResult
from umbra.mailbox.gone import MAX_MAILBOXES, GoneCarrier, GoneHandler
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.identity import PeerIdentity

USER = "a@example.org"


def guid(number: int) -> str:
    return f"{number:032x}"


class FakeDovecot:
    def __init__(self, **found: int) -> None:
        self.found = {name.replace("_", "/"): guid(number) for name, number in found.items()}
        self.removed: list[str] = []
        self.error = ""

    async def mailboxes(self, user: str) -> dict[str, str]:
        if self.error:
            raise DoveadmError(self.error)
        return dict(self.found)

    async def remove_mailbox(self, user: str, name: str) -> None:
        del self.found[name]
        self.removed.append(name)


class World:
    """The shadow still has ``m``, ``m/c`` and ``m/c/d``, which dsync fails to remove."""

    def __init__(self) -> None:
        self.here = FakeDovecot(INBOX=1, kept=2)
        self.there = FakeDovecot(INBOX=9, old=2, m=3, m_c=4, m_c_d=5)
        self.closed = ""
        self.syncs: list[str] = []
        self.failed = SyncResult(Outcome.FAILED, reason="the connection ended")
        self.handler = GoneHandler(lambda: self.closed, cast(Dovecot, self.there))
        self.relied_on = False
        self.carrier = GoneCarrier(self, self, cast(Dovecot, self.here), lambda: self.relied_on)

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        self.syncs.append(state)
        nested = "m/c/d" in self.there.found
        return self.failed if nested else SyncResult(Outcome.SYNCED, "new")

    def progress(self, user: str) -> float:
        return 0.0

    def cut(self, user: str = "") -> None:
        pass

    async def request(self, op: str, args: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        assert op == "mailboxes"
        return await self.ask(args)

    async def ask(self, args: Mapping[str, Any]) -> dict[str, Any]:
        return await self.handler(PeerIdentity("mail-a", "x"), args, cast(Exchange, None))


@pytest.fixture
def world() -> World:
    return World()


async def test_what_is_gone_is_removed_deepest_first(world: World) -> None:
    # The failed sync may have saved something, so the next one is not by this state.
    assert await world.carrier.sync(USER, "state") == world.failed
    assert world.syncs == ["state"]
    assert world.there.removed == ["m/c/d", "m/c", "m"]
    # The INBOX stays whatever its GUID is, and so does what was only renamed.
    assert set(world.there.found) == {"INBOX", "old"}
    assert await world.carrier.sync(USER, "") == SyncResult(Outcome.SYNCED, "new")


async def test_what_was_renamed_goes_when_that_was_not_enough_and_nobody_relies_on_it(
    world: World,
) -> None:
    """dsync cannot rename it; it is copied anew."""
    world.there.found |= {"m/c/d": guid(1)}
    world.relied_on = True
    for _ in range(3):
        assert await world.carrier.sync(USER, "") == world.failed
        assert set(world.there.found) == {"INBOX", "old", "m/c/d"}
    world.relied_on = False
    await world.carrier.sync(USER, "")
    assert set(world.there.found) == {"INBOX"}, "whatever its GUID is"
    assert (await world.carrier.sync(USER, "")).outcome is Outcome.SYNCED
    # The next failure is a first one again.
    world.there.found |= {"old": guid(2), "m/c/d": guid(1)}
    assert await world.carrier.sync(USER, "") == world.failed
    assert set(world.there.found) == {"INBOX", "old", "m/c/d"}


async def test_nothing_is_removed_after_a_sync_that_worked_nor_by_a_merge(world: World) -> None:
    assert (await world.carrier.sync(USER, "", merge=True)).outcome is Outcome.FAILED
    world.failed = SyncResult(Outcome.CHANGED, "new")
    assert (await world.carrier.sync(USER, "state")).outcome is Outcome.CHANGED
    world.failed = SyncResult(Outcome.SURPRISED)
    assert (await world.carrier.sync(USER, "state")).outcome is Outcome.SURPRISED
    assert world.there.removed == []


async def test_nothing_to_remove_leaves_the_failure(world: World) -> None:
    world.there.found = {"m/c/d": guid(2)}
    assert await world.carrier.sync(USER, "state") == world.failed
    assert world.syncs == ["state"]


@pytest.mark.parametrize("broken", ["here", "there"])
async def test_a_dovecot_that_does_not_answer_leaves_the_failure(world: World, broken: str) -> None:
    getattr(world, broken).error = "no answer"
    assert await world.carrier.sync(USER, "state") == world.failed
    assert world.there.removed == []


async def test_a_user_without_any_mailbox_here_loses_nothing_there(world: World) -> None:
    world.here.found = {}
    assert await world.carrier.sync(USER, "state") == world.failed
    assert world.there.removed == []


async def test_a_node_that_is_no_copy_refuses(world: World) -> None:
    world.closed = "this node is primary"
    with pytest.raises(PeerError, match="primary"):
        await world.ask({"user": USER, "keep": [guid(1)]})
    assert await world.carrier.sync(USER, "state") == world.failed


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"user": "a\tb", "keep": [guid(1)]},
        {"user": USER, "keep": []},
        {"user": USER, "keep": "all"},
        {"user": USER, "keep": ["INBOX"]},
        {"user": USER, "keep": [guid(1)] * (MAX_MAILBOXES + 1)},
        {"user": USER, "keep": [guid(1)], "names": ["a", "b"]},
        {"user": USER, "keep": [guid(1)], "names": "a"},
        {"user": USER, "keep": [guid(1)], "names": [1]},
    ],
)
async def test_nonsense_is_refused(world: World, args: dict[str, Any]) -> None:
    with pytest.raises(PeerError, match="not a list"):
        await world.ask(args)
    assert world.there.removed == []
