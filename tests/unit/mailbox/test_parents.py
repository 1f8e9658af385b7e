"""A second sync where the first one may have made mailboxes too many."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from umbra.mailbox.doveadm import Outcome, SyncResult
from umbra.mailbox.parents import MOST, ParentsCarrier


class Dsync:
    def __init__(self) -> None:
        self.states: list[str] = []
        self.outcome = Outcome.SYNCED
        self.bare = True
        self.meanwhile: Callable[[], None] = lambda: None

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        self.states.append(state)
        self.meanwhile()
        return SyncResult(self.outcome, f"s{len(self.states)}", bare=self.bare)

    def progress(self, user: str) -> float:
        return 1.0

    def cut(self, user: str = "") -> None:
        self.states.append("cut")


async def test_one_sync_is_enough_as_a_rule() -> None:
    dsync = Dsync()
    carrier = ParentsCarrier(dsync)
    assert (await carrier.sync("u", "s0")).state == "s1"
    assert (await carrier.sync("u", "", merge=True)).state == "s2"
    assert dsync.states == ["s0", ""]


async def test_new_mailboxes_and_comparisons_from_scratch_take_two() -> None:
    dsync = Dsync()
    carrier = ParentsCarrier(dsync)
    carrier.restructured("u")
    assert (await carrier.sync("v", "s0")).state == "s1"
    assert (await carrier.sync("u", "s1")).state == "s3"
    assert (await carrier.sync("u", "s3")).state == "s4"
    assert (await carrier.sync("u", "")).state == "s6"
    assert dsync.states == ["s0", "s1", "s2", "s3", "", "s5"]


async def test_new_mailboxes_whose_parents_are_mailboxes_take_one() -> None:
    dsync = Dsync()
    dsync.bare = False
    carrier = ParentsCarrier(dsync)
    carrier.restructured("u")
    assert (await carrier.sync("u", "s0")).state == "s1"
    assert (await carrier.sync("u", "")).state == "s3", "from scratch nevertheless"
    assert dsync.states == ["s0", "", "s2"]


@pytest.mark.parametrize("state", ["", "s0"])
async def test_a_sync_during_which_mailboxes_were_renamed_is_followed_by_another(
    state: str,
) -> None:
    """It may have passed over one of them. What is done stays done, also from scratch."""
    dsync = Dsync()
    dsync.bare = False
    carrier = ParentsCarrier(dsync)
    times = iter("uv")
    dsync.meanwhile = lambda: carrier.restructured(next(times, "v"))
    result = await carrier.sync("u", state)
    assert (result.outcome, dsync.states) == (Outcome.SYNCED, [state, "s1"])
    assert result.state == "s2"


async def test_who_renames_for_ever_is_told_nothing() -> None:
    dsync = Dsync()
    carrier = ParentsCarrier(dsync)
    dsync.meanwhile = lambda: carrier.restructured("u")
    result = await carrier.sync("u", "s0")
    assert (result.outcome, result.state) == (Outcome.CHANGED, f"s{MOST}")


async def test_it_is_not_forgotten_when_a_sync_fails() -> None:
    dsync = Dsync()
    carrier = ParentsCarrier(dsync)
    carrier.restructured("u")
    dsync.outcome = Outcome.CHANGED
    assert (await carrier.sync("u", "s0")).outcome is Outcome.CHANGED
    dsync.outcome = Outcome.SYNCED
    assert (await carrier.sync("u", "s1")).state == "s3"
    carrier.cut()
    assert carrier.progress("u") == 1.0
