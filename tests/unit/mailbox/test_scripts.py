"""Deleted scripts: removed on the peer after the syncs that must, and never before."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from tests.unit.mailbox.exchange import Side, serve

from umbra.mailbox import describe, scripts
from umbra.mailbox.describe import Dovecot
from umbra.mailbox.doveadm import DoveadmError, Outcome, SyncResult
from umbra.mailbox.scripts import ScriptCarrier, ScriptsHandler
from umbra.peer import frames
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.frames import FrameType
from umbra.peer.identity import PeerIdentity

USER = "a@example.org"


class FakeDovecot:
    def __init__(self, *names: str) -> None:
        self.texts = {name: f"keep; # {name}" for name in names}
        self.active = ""
        self.error = ""
        self.broken = ""

    async def scripts(self, user: str) -> tuple[list[str], str]:
        if self.error:
            raise DoveadmError(self.error)
        return self.names, self.active

    @property
    def names(self) -> list[str]:
        return list(self.texts)

    contents = describe.Dovecot.contents

    async def script(self, user: str, name: str) -> str:
        if self.error or "\udcff" in self.texts[name]:
            raise DoveadmError("doveadm sieve get: not UTF-8")
        return self.texts[name]

    async def put_script(self, user: str, name: str, content: str) -> None:
        if "syntax error" in content:
            raise DoveadmError("doveadm sieve put ended with DATAERR")
        self.texts[name] = content

    async def remove_script(self, user: str, name: str) -> None:
        del self.texts[name]
        if self.active == name:
            self.active = ""

    async def activate_script(self, user: str, name: str) -> None:
        assert name in ("", *self.names)
        if name and name == self.broken:
            raise DoveadmError("doveadm sieve activate ended with DATAERR")
        self.active = name


class World:
    """The primary with scripts one and two, the shadow with an old one more."""

    def __init__(self) -> None:
        self.here, self.there = FakeDovecot("one", "two"), FakeDovecot("one", "two", "old")
        self.outcome = Outcome.SYNCED
        self.refusal: PeerError | None = None
        self.primary = False
        self.sent: list[str] = []
        handler = ScriptsHandler(lambda: self.primary, cast(Dovecot, self.there))
        self.handler = handler
        self.carrier = ScriptCarrier(self, self, cast(Dovecot, self.here))

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        return SyncResult(self.outcome, "state")

    def progress(self, user: str) -> float:
        return 0.0

    def cut(self, user: str = "") -> None:
        pass

    @asynccontextmanager
    async def exchange(
        self, op: str, args: Mapping[str, Any], *, timeout: float
    ) -> AsyncIterator[Side]:
        frames.encode_json(FrameType.REQUEST, {"op": op, "args": args})
        if op == "scripts":
            if self.refusal:
                raise self.refusal
            yield serve(self.handler, PeerIdentity("mail-a", "x"), args)
            return
        assert op == "script"
        self.sent.append(args["name"])
        yield serve(self.handler.put, PeerIdentity("mail-a", "x"), args)

    async def ask(self, args: Mapping[str, Any]) -> dict[str, Any]:
        return await self.handler(PeerIdentity("mail-a", "x"), args, cast(Exchange, None))


@pytest.fixture
def world() -> World:
    return World()


async def test_a_sync_of_everything_removes_what_is_gone_here(world: World) -> None:
    assert (await world.carrier.sync(USER, "")).outcome is Outcome.SYNCED
    assert world.there.names == ["one", "two"]


async def test_the_active_one_was_renamed(world: World) -> None:
    """dsync brings the new name, not that it is active (found by the model test)."""
    world.here.active, world.there.active = "two", "old"
    world.carrier.changed(USER)
    assert (await world.carrier.sync(USER, "state")).outcome is Outcome.SYNCED
    assert (world.there.names, world.there.active) == (["one", "two"], "two")


async def test_none_is_active_any_more(world: World) -> None:
    world.there.active = "one"
    world.carrier.changed(USER)
    await world.carrier.sync(USER, "state")
    assert world.there.active == ""


async def test_a_merge_and_a_plain_sync_remove_nothing(world: World) -> None:
    await world.carrier.sync(USER, "", merge=True)
    await world.carrier.sync(USER, "state")
    assert world.there.names == ["one", "two", "old"]


async def test_after_a_change_of_scripts_the_next_sync_that_works_removes(world: World) -> None:
    world.carrier.changed(USER)
    world.outcome = Outcome.CHANGED
    await world.carrier.sync(USER, "state")
    assert "old" in world.there.names
    world.outcome = Outcome.SYNCED
    await world.carrier.sync(USER, "state")
    assert "old" not in world.there.names
    world.there.texts["again"] = "keep;"
    await world.carrier.sync(USER, "state")
    assert "again" in world.there.names


@pytest.mark.parametrize(
    ("code", "outcome"), [("unreachable", Outcome.LOST), ("dovecot", Outcome.FAILED)]
)
async def test_a_peer_that_does_not_do_it(world: World, code: str, outcome: Outcome) -> None:
    world.refusal = PeerError(code, "it does not")
    world.carrier.changed(USER)
    result = await world.carrier.sync(USER, "state")
    assert (result.outcome, result.state, result.reason) == (outcome, None, "it does not")
    world.refusal = None
    assert (await world.carrier.sync(USER, "state")).outcome is Outcome.SYNCED
    assert world.there.names == ["one", "two"]


async def test_own_dovecot_that_cannot_tell_removes_nothing(world: World) -> None:
    world.here.error = "does not answer"
    assert (await world.carrier.sync(USER, "")).outcome is Outcome.FAILED
    assert world.there.names == ["one", "two", "old"]


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"user": USER},
        {"user": USER, "keep": []},
        {"user": "-A", "keep": [], "active": ""},
        {"user": USER, "keep": [["x"]], "active": ""},
        {"user": USER, "keep": ["x"], "active": "", "fingerprints": {"x": 1}},
        {"user": USER, "keep": ["x"], "active": "y"},
    ],
)
async def test_what_the_shadow_refuses(world: World, args: dict[str, Any]) -> None:
    with pytest.raises(PeerError, match="not a list"):
        await world.ask(args)


async def test_a_primary_refuses(world: World) -> None:
    world.primary = True
    with pytest.raises(PeerError, match="primary"):
        await world.ask({"user": USER, "keep": [], "active": ""})
    assert "old" in world.there.names


async def test_a_script_that_dsync_has_passed_over_is_sent(world: World) -> None:
    """Changed twice within a second (found by the model test)."""
    world.here.texts["two"] = "discard; # ü\n.\n"
    world.carrier.changed(USER)
    assert (await world.carrier.sync(USER, "state")).outcome is Outcome.SYNCED
    assert (world.there.texts, world.sent) == (world.here.texts, ["two"])


async def test_a_script_that_is_missing_is_sent_and_made_active(world: World) -> None:
    del world.there.texts["two"]
    world.here.active = "two"
    await world.carrier.sync(USER, "")
    assert (world.there.texts, world.there.active) == (world.here.texts, "two")


async def test_a_script_that_the_peer_refuses_keeps_no_mail_from_it(world: World) -> None:
    world.here.texts["two"] = "syntax error"
    assert (await world.carrier.sync(USER, "")).outcome is Outcome.SYNCED
    assert world.there.texts["two"] == "keep; # two"


async def test_a_peer_of_before_fingerprints_is_told_what_it_understands(world: World) -> None:
    answer = await world.ask({"user": USER, "keep": ["one"], "active": ""})
    assert answer == {"removed": 2, "stale": []}


async def test_a_primary_of_before_is_understood(world: World) -> None:
    """A run restarts one agent after the other."""
    args = {"user": USER, "keep": ["one"], "active": "one", "fingerprints": {"one": "other"}}
    assert await world.ask(args) == {"removed": 2, "stale": ["one"]}
    assert world.there.active == "one"


async def test_a_list_that_fits_no_request_is_taken(world: World) -> None:
    """Names and number are the user's choice: all scripts are missing there, too."""
    names = ["ш" * 121 + f"{number:03}" for number in range(1100)]
    world.here.texts = dict.fromkeys(names, "keep;")
    world.here.active = names[0]
    assert (await world.carrier.sync(USER, "")).outcome is Outcome.SYNCED
    assert world.there.active == names[0]
    assert (world.sent, world.there.names) == (names[:400], names[:400])


@pytest.mark.parametrize("name", ["-x", "a\u00a0b", "\ue000", "a\u200db"], ids=ascii)
async def test_a_name_that_is_odd_is_taken(world: World, name: str) -> None:
    world.here.texts[name] = "keep;"
    assert (await world.carrier.sync(USER, "")).outcome is Outcome.SYNCED
    assert world.there.texts == world.here.texts


@pytest.mark.parametrize("code", ["refused", "protocol"])
async def test_what_a_peer_says_against_the_list_keeps_no_mail_from_it(
    world: World, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As one of before does, which wants the list in the request; said again with the next sync."""
    world.refusal = PeerError(code, "not a list of scripts")
    assert (await world.carrier.sync(USER, "")).outcome is Outcome.SYNCED
    assert "the scripts of a@example.org wait" in caplog.text
    assert "old" in world.there.names
    world.refusal = None
    await world.carrier.sync(USER, "state")
    assert "old" not in world.there.names


async def test_a_script_over_the_limit_keeps_no_mail_from_the_peer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts, "MAX_SCRIPT", 20)
    world.here.texts["two"] = "keep;" * 100
    assert (await world.carrier.sync(USER, "")).outcome is Outcome.SYNCED
    assert world.there.texts["two"] == "keep; # two"


async def test_a_script_that_cannot_be_read_keeps_no_mail_from_the_peer(world: World) -> None:
    world.here.texts["one"] = world.there.texts["one"] = "# \udcff"
    world.there.texts["two"] = "# \udcff"
    assert (await world.carrier.sync(USER, "")).outcome is Outcome.SYNCED
    assert world.there.texts == world.here.texts


async def test_a_script_that_cannot_be_active_keeps_no_mail_from_the_peer(world: World) -> None:
    """For example one that includes a script that was deleted since."""
    world.here.active = world.there.broken = "one"
    assert (await world.carrier.sync(USER, "")).outcome is Outcome.SYNCED
    assert world.there.names == ["one", "two"]


@pytest.mark.parametrize("line", [b"[1]\n", b'["x"]\n', b'{"x": "y"}\n', b'["x", ""'])
async def test_lines_that_are_no_list(world: World, line: bytes) -> None:
    side = serve(world.handler, PeerIdentity("mail-a", "x"), {"user": USER, "active": ""})
    await side.send(line)
    await side.end()
    with pytest.raises(PeerError, match="protocol"):
        await side.result()
    assert "old" in world.there.names


@pytest.mark.parametrize(
    "change", [{"user": "-x"}, {"name": ""}, {"name": "a\n"}, {"name": 1}], ids=str
)
async def test_what_is_no_script_is_refused(world: World, change: dict[str, Any]) -> None:
    side = serve(
        world.handler.put, PeerIdentity("mail-a", "x"), {"user": USER, "name": "one", **change}
    )
    await side.end()
    with pytest.raises(PeerError, match="not a script"):
        await side.result()


async def test_a_primary_takes_no_script(world: World) -> None:
    world.primary = True
    side = serve(world.handler.put, PeerIdentity("mail-a", "x"), {"user": USER, "name": "one"})
    await side.end()
    with pytest.raises(PeerError, match="primary"):
        await side.result()
