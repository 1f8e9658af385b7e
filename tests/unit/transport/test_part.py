"""The transport as a part: who is told to wait, and what the checks say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.unit.transport.support import ENVELOPE, FakeLink

from umbra import config
from umbra.cluster.group import Group
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity
from umbra.transport import ids, part
from umbra.transport.part import HEADROOM, Messages
from umbra.transport.remaining import Left
from umbra.transport.resubmit import Report, narrow
from umbra.transport.service import ShadowService
from umbra.transport.store import ShadowStore, State

RAW: dict[str, Any] = {
    "group": "mail",
    "node": "a",
    "site": "alpha",
    "role": "primary",
    "link": {"address": "10.86.0.1", "port": 8686},
    "api": {"address": "10.86.0.1", "port": 8687},
    "peers": [{"name": "b", "site": "beta", "address": "10.86.0.2"}],
}

PEERS = [*RAW["peers"], {"name": "c", "site": "gamma", "address": "10.86.0.3"}]


@dataclass
class Paths:
    state: Path
    delivery: Path
    milter: Path


class PlayedGroup:
    """A group with one shadow, whose heartbeat says ``load``."""

    def __init__(self) -> None:
        self.links = {"b": FakeLink("b", {})}
        self.synchronous = True
        self.statuses: dict[str, dict[str, Any]] = {"b": {"load": ""}}
        self.epoch = 1
        self.leading: str | None = "b"
        self.right = True
        self.state = SimpleNamespace(serving=True)

    def primary(self) -> str | None:
        return self.leading

    def whole_since(self) -> int:
        return 5

    def is_primary(self) -> bool:
        return self.right

    def shadows(self) -> list[FakeLink]:
        return list(self.links.values()) if self.synchronous else []

    def answers(self, peer: str) -> bool:
        return self.synchronous

    def is_whole(self, peer: str) -> bool:
        return self.synchronous


class NoMailboxes:
    async def delivered(self, recipient: str, shadow_id: str) -> bool:
        return False

    async def present(self, recipient: str, shadow_id: str, message_id: str) -> bool | None:
        return None


class Helper:
    async def queue(self) -> dict[str, str]:
        return {}

    async def aliases(self, keys: list[str]) -> dict[str, str]:
        return {}

    async def shadow_ids(self, ids: list[str]) -> dict[str, str]:
        return dict.fromkeys(ids, "")

    async def committed(self) -> set[str]:
        return set()


def messages(
    tmp_path: Path, group: PlayedGroup, peers: Any = RAW["peers"], **transport: Any
) -> Messages:
    said = {**RAW, "peers": peers, "transport": transport}
    if len(peers) > 1:  # the static coordinator is for two
        voters = [f"https://10.86.0.{number}:2379" for number in (1, 2, 3)]
        said["coordinator"] = {"kind": "etcd", "endpoints": voters}
    settings = config.parse(said)
    return Messages(
        settings,
        cast(Group, group),
        cast(Any, Helper()),
        Paths(tmp_path, tmp_path, tmp_path / "m"),
        NoMailboxes(),
    )


@pytest.fixture
def group() -> PlayedGroup:
    return PlayedGroup()


@pytest.fixture
async def made(tmp_path: Path, group: PlayedGroup) -> AsyncIterator[Messages]:
    made = messages(tmp_path, group, shadow_max_size=1)
    await made.open()
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("policy", "load", "code"),
    [
        ("defer", "", None),
        ("defer", "disk", 452),
        ("defer", "queue", 452),
        ("defer", "busy", 451),
        ("accept", "disk", None),
        ("accept", "queue", None),
        ("accept", "busy", 451),
    ],
)
async def test_the_load_of_the_shadow_is_answered_at_mail(
    tmp_path: Path, group: PlayedGroup, policy: str, load: str, code: int | None
) -> None:
    made = messages(tmp_path, group, shadow_policy=policy)
    group.statuses["b"]["load"] = load
    refusal = made._shadowing.pressure()
    assert (refusal.code if refusal else None) == code


@pytest.mark.parametrize(
    ("policy", "copies", "load", "code"),
    [
        ("defer", 1, "disk", None),
        ("defer", 1, "busy", None),
        ("defer", 2, "disk", 452),
        ("accept", 1, "busy", None),
        ("accept", 2, "disk", None),
        ("accept", 2, "busy", 451),
    ],
)
async def test_a_loaded_shadow_is_no_reason_while_the_others_are_enough(
    tmp_path: Path, group: PlayedGroup, policy: str, copies: int, load: str, code: int | None
) -> None:
    group.links["c"] = FakeLink("c", {})
    group.statuses = {"b": {"load": ""}, "c": {"load": load}}
    made = messages(tmp_path, group, peers=PEERS, shadow_policy=policy, shadow_copies=copies)
    refusal = made._shadowing.pressure()
    assert (refusal.code if refusal else None) == code
    group.statuses["b"]["load"] = load
    refusal = made._shadowing.pressure()
    assert (refusal is None) is (policy == "accept" and load != "busy")


async def test_alone_the_own_disk_decides(tmp_path: Path, group: PlayedGroup) -> None:
    made = messages(tmp_path, group, shadow_policy="accept")
    made._room = HEADROOM - 1
    assert made._shadowing.pressure() is None, "the shadow takes it"
    group.synchronous = False
    refusal = made._shadowing.pressure()
    assert refusal is not None
    assert refusal.code == 452


async def test_a_full_queue_is_told_and_refuses(
    made: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "STATS_INTERVAL", 0.01)
    assert made.load() == ""
    writer = made._store.begin(ids.new(), origin="b", queue_id="q", envelope=ENVELOPE, epoch=1)
    for _ in range(17):
        await writer.write(bytes(65536))
    await writer.commit()
    task = asyncio.create_task(made._count())
    async with asyncio.timeout(5):
        while not made.load():  # noqa: ASYNC110 (the counting task has no event)
            await asyncio.sleep(0.01)
    assert made.load() == "queue"
    [check] = [check for check in made.checks() if check.name == "load"]
    assert not check.passed
    link = FakeLink("a", made.handlers(), caller="b")
    args = {
        "shadow_id": ids.new(), "queue_id": "q2", "envelope": ENVELOPE.to_object(),
    }  # fmt: skip
    with pytest.raises(PeerError) as caught:
        await link.request("shadow-store", args, timeout=5)
    assert caught.value.code == "store-full"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_age_of_the_queue_is_a_check(made: Messages) -> None:
    def age() -> Any:
        return next(check for check in made.checks() if check.name == "shadow queue age")

    assert age().passed
    made._oldest = 1.0
    assert not age().passed
    assert age().value > part.MAX_AGE


async def test_too_few_copies_are_shown(tmp_path: Path, group: PlayedGroup) -> None:
    made = messages(tmp_path, group)
    found = {check.name: check.passed for check in made.checks()}
    assert found["shadow copies"]
    made._config = replace(made._config, transport=replace(made._config.transport, shadow_copies=2))
    found = {check.name: check.passed for check in made.checks()}
    assert not found["shadow copies"]
    group.synchronous = False  # alone: the group's reasons say it
    assert "shadow copies" not in {check.name for check in made.checks()}


async def test_the_queue_view_reads_the_store(made: Messages) -> None:
    writer = made._store.begin(ids.new(), origin="b", queue_id="q", envelope=ENVELOPE, epoch=1)
    await writer.commit()
    view = await made.queue()
    assert [(row["origin"], row["state"], row["messages"]) for row in view["messages"]] == [
        ("b", "held", 1)
    ]
    assert [row["holder"] for row in view["copies"]] == ["a", "b"]


async def held(store: ShadowStore, origin: str) -> str:
    shadow_id = ids.new()
    writer = store.begin(shadow_id, origin=origin, queue_id="q", envelope=ENVELOPE, epoch=1)
    await writer.commit()
    return shadow_id


def resubmitting(
    made: Messages, monkeypatch: pytest.MonkeyPatch
) -> tuple[asyncio.Event, asyncio.Task[None]]:
    """Have it wait to be told; the event is set when it resubmits."""
    ran = asyncio.Event()

    async def run() -> Report:
        ran.set()
        return Report()

    monkeypatch.setattr(made._resubmitter, "run", run)
    return ran, asyncio.create_task(made._resubmit_when_told())


@pytest.mark.parametrize(
    ("remaining", "waits"), [(None, True), ({}, False)], ids=["failover", "switchover"]
)
async def test_only_a_failover_waits_before_it_resubmits(
    tmp_path: Path,
    group: PlayedGroup,
    monkeypatch: pytest.MonkeyPatch,
    remaining: dict[str, Left] | None,
    waits: bool,
) -> None:
    made = messages(tmp_path, group, resubmit_after=1.0)
    await made.open()
    ran, task = resubmitting(made, monkeypatch)
    began = asyncio.get_running_loop().time()
    await made.take_over("b", remaining)
    made.resubmit()
    async with asyncio.timeout(5):
        await ran.wait()
    assert (asyncio.get_running_loop().time() - began >= 1.0) is waits
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await made.close()


async def test_the_primary_has_former_primaries_copies_dropped_once_all_is_carried_on(
    tmp_path: Path, group: PlayedGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbra.transport.part.STATS_INTERVAL", 0.01)
    told: list[str] = []

    there = ShadowStore(tmp_path / "there")
    await there.open()
    lost = await held(there, "c")

    def leads(node: str) -> bool:
        told.append(node)
        return len(told) > 1

    group.links["b"] = FakeLink("b", ShadowService(there, lambda: 1, leads).handlers())
    made = messages(tmp_path, group)
    await made.open()
    finished = await held(made._store, "c")
    made._unsettled = {"b"}
    task = asyncio.create_task(made._settle())
    await asyncio.sleep(0.1)
    assert not told, "what was not claimed yet is not carried on"
    await made._store.discard([finished], origin="c")
    await asyncio.sleep(0.2)
    assert made._unsettled == set(), "the second time it has heard who is primary"
    assert made._resubmitting.is_set()
    assert [meta.shadow_id async for meta in made._store.in_order(State.RESUBMITTING)] == [lost]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await made.close()
    await there.close()


async def test_what_is_held_for_a_node_that_left_the_group_is_claimed_too(
    made: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow_id = await held(made._store, "z")
    ran, task = resubmitting(made, monkeypatch)
    made.resubmit()
    async with asyncio.timeout(5):
        await ran.wait()
    assert [meta.shadow_id async for meta in made._store.in_order(State.RESUBMITTING)] == [
        shadow_id
    ]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_is_outstanding_is_told_to_the_former_primary(
    made: Messages, group: PlayedGroup
) -> None:
    async def outstanding() -> int:
        handler = made.handlers()["shadow-outstanding"]
        return int((await handler(PeerIdentity("b", "s"), {}, cast(Any, None)))["messages"])

    assert await outstanding() == 0
    writer = made._store.begin(ids.new(), origin="b", queue_id="q", envelope=ENVELOPE, epoch=1)
    await writer.commit()
    assert await outstanding() == 1, "not claimed yet"
    await made._store.claim("b", None, narrow)
    assert await outstanding() == 1
    await made.give_back()
    await made._store.settle(
        "a", [meta.shadow_id async for meta in made._store.in_order(State.HELD)]
    )
    assert await outstanding() == 0


async def test_what_was_set_aside_holds_up_no_switchover_and_is_shown_until_somebody_acts(
    made: Messages, group: PlayedGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "STATS_INTERVAL", 0.01)
    shadow_id = await held(made._store, "b")
    await made._store.claim("b", None, narrow)
    await made._store.park(shadow_id)
    assert await made.outstanding() == 0
    handler = made.handlers()["shadow-outstanding"]
    # The former primary keeps its queue file of it.
    answer = await handler(PeerIdentity("b", "s"), {}, cast(Any, None))
    assert answer == {"messages": 0, "parked": [shadow_id]}
    await made.give_back()
    counting = asyncio.create_task(made._count())
    await asyncio.sleep(0.1)
    [check] = [check for check in made.checks() if check.name == "parked messages"]
    assert not check.passed
    assert shadow_id in check.message
    assert made.alone() == 1
    [row] = (await made.queue())["parked"]
    assert (row["shadow_id"], row["origin"], row["message_id"]) == (
        shadow_id, "b", ENVELOPE.message_id,
    )  # fmt: skip
    ran, task = resubmitting(made, monkeypatch)
    made.resubmit()  # a start, a promotion, an operator
    async with asyncio.timeout(5):
        await ran.wait()
    assert [meta.shadow_id async for meta in made._store.in_order(State.RESUBMITTING)] == [
        shadow_id
    ]
    assert not await made.drop(shadow_id), "it is being carried on"
    await made._store.park(shadow_id)
    assert await made.drop(shadow_id)
    assert await made._store.find(shadow_id) is None
    assert not await made.drop(shadow_id)
    for running in (task, counting):
        running.cancel()
    await asyncio.gather(task, counting, return_exceptions=True)


@pytest.mark.parametrize("op", ["shadow-settled", "shadow-left", "shadow-fetch"])
async def test_only_the_primary_settles(made: Messages, group: PlayedGroup, op: str) -> None:
    group.leading = None
    link = FakeLink("a", made.handlers(), caller="b")
    args = {"shadow_ids": [ids.new()], "shadow_id": ids.new()}
    with pytest.raises(PeerError, match="not primary"):
        await link.request(op, args, timeout=5)


async def with_a_shadow(tmp_path: Path, group: PlayedGroup) -> tuple[Messages, ShadowStore]:
    """Return this node's messages and the store of the shadow ``b``, both open."""
    shadow = ShadowStore(tmp_path / "there")
    await shadow.open()
    service = ShadowService(shadow, lambda: 1, lambda node: True)
    group.links["b"] = FakeLink("b", service.handlers())
    made = messages(tmp_path, group)
    await made.open()
    return made, shadow


async def test_what_is_on_hold_gets_no_new_copy(tmp_path: Path, group: PlayedGroup) -> None:
    made, shadow = await with_a_shadow(tmp_path, group)
    for queue_id in ("q1", "q2"):
        writer = made._store.begin(
            ids.new(), origin="a", queue_id=queue_id, envelope=ENVELOPE, epoch=1
        )
        await writer.commit(delivered=True)

    async def queue() -> dict[str, str]:
        return {"q1": "hold", "q2": "deferred", "q3": "arriving", "q4": "maildrop"}

    made._helper.queue = queue  # type: ignore[method-assign]
    await made.catch_up("b")
    assert [meta.queue_id async for meta in shadow.in_order(State.HELD)] == ["q2"]
    await made.close()
    await shadow.close()


async def test_what_has_no_copy_is_shown_and_copied_if_it_can_be(
    tmp_path: Path, group: PlayedGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "COVER_INTERVAL", 0.02)
    made, shadow = await with_a_shadow(tmp_path, group)
    known, former = ids.new(), ids.new()
    writer = made._store.begin(known, origin="a", queue_id="q0", envelope=ENVELOPE, epoch=1)
    await writer.commit(delivered=True)
    names = {"q1": known, "q4": former}

    async def shadow_ids(wanted: list[str]) -> dict[str, str]:
        return {key: names.get(key, "") for key in wanted}

    queue = {
        "q1": "deferred",  # requeued: the net has it by a former name
        "q2": "active",  # a notice of Postfix's own
        "q3": "hold",  # quarantined before our milter was asked
        "q4": "hold",  # a former primary's
        "q5": "arriving",
    }

    async def listed() -> dict[str, str]:
        return dict(queue)

    made._helper.queue = listed  # type: ignore[method-assign]
    made._names._read = shadow_ids  # type: ignore[assignment]

    def check() -> Any:
        return next(check for check in made.checks() if check.name == "queue copies")

    assert check().passed
    task = asyncio.create_task(made._cover())
    async with asyncio.timeout(5):
        while check().value != 2:  # noqa: ASYNC110 (the task has no event)
            await asyncio.sleep(0.01)
    assert not check().passed
    assert check().message == "b has no copy of 2 acknowledged messages of the queue: q2, q3."
    assert [meta.queue_id async for meta in shadow.in_order(State.HELD)] == ["q1"]
    tried = group.links["b"].ops.count("shadow-store")
    await asyncio.sleep(0.2)
    assert group.links["b"].ops.count("shadow-store") == tried == 1
    group.right = False
    async with asyncio.timeout(5):
        while not check().passed:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await made.close()
    await shadow.close()


async def test_resubmission_waits_for_a_right_that_lapsed_and_comes_back(
    tmp_path: Path, group: PlayedGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "RIGHT_PAUSE", 0.01)
    made = messages(tmp_path, group)
    await made.open()
    ran, task = resubmitting(made, monkeypatch)
    group.right = group.state.serving = False  # the role is another's: a later opening tells
    made.resubmit()
    await asyncio.sleep(0.05)
    group.right = True
    await asyncio.sleep(0.05)
    assert not ran.is_set()
    group.right, group.state.serving = False, True
    made.resubmit()
    await asyncio.sleep(0.05)
    assert not ran.is_set()
    group.right = True  # without a word
    async with asyncio.timeout(5):
        await ran.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await made.close()
