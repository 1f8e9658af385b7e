"""What a peer says of itself: of its kind, or no answer at all."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.cluster.support import CONFIG

from umbra.api.compose import Composer
from umbra.api.metrics import ReportCollector
from umbra.cluster import heartbeat
from umbra.cluster.group import Group
from umbra.cluster.left_behind import LeftBehind
from umbra.cluster.said import _KINDS, checked
from umbra.cluster.service_address import ServiceAddress
from umbra.cluster.static import StateFile
from umbra.config import Heartbeat
from umbra.epoch import MAX_WHOLE
from umbra.node.client import NodeHelper
from umbra.peer.exchange import PeerError
from umbra.peer.link import PeerLink

SAID: dict[str, Any] = {
    "node": "b", "site": "beta", "storage_id": "b1", "handing_to": None, "epoch": 1,
    "role": "shadow", "state": "shadow", "mode": "protected", "since": "2026-01-01T00:00:00Z",
    "shadow_messages": 3, "shadow_bytes": 4096, "load": "", "lag": {"a": [2, 0.5]},
    "reasons": ["none"], "merged": True, "unshared": False, "boot_id": "x", "clock": 1.5,
    "alone_messages": 0, "coordinator": "static", "service_addresses": ["192.0.2.20"],
    "service_clients": 1, "entitled_s": None, "ailments": [], "policy": "automatic",
    "preference": 0, "merged_under": 0, "shut": True, "cause": "it follows",
    "last_change": {"from": "a", "to": "b", "at": "then", "planned": True, "outage_s": 0.1},
}  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def test_what_an_agent_says_is_taken_but_for_what_nobody_reads() -> None:
    said = json.loads(json.dumps(SAID))
    lag = {"lag": {"a": (2, 0.5)}}
    assert checked("b", said) == {**{name: said[name] for name in _KINDS}, **lag}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epoch", None), ("epoch", -1), ("epoch", True), ("epoch", float("inf")),
        ("epoch", MAX_WHOLE + 1), ("epoch", "1"), ("role", None), ("storage_id", 5),
        ("lag", []), ("lag", {"a": 1}), ("lag", {"a": ["x", 0.0]}), ("lag", {"a": [1]}),
        ("shadow_messages", float("inf")), ("shadow_bytes", 10**400), ("reasons", "because"),
        ("reasons", [["because"]]), ("service_addresses", None), ("service_addresses", 5),
        ("last_change", {"from": "a"}), ("last_change", []), ("entitled_s", float("nan")),
        ("merged", "yes"), ("merged_under", None), ("alone_messages", "many"),
    ],
)  # fmt: skip
def test_what_is_of_another_kind_is_named(name: str, value: object) -> None:
    with pytest.raises(PeerError, match=f"^b sent a status that makes no sense: {name} ") as caught:
        checked("b", {**SAID, name: value})
    assert caught.value.code == "protocol"


def test_an_older_agent_says_less() -> None:
    least = {name: SAID[name] for name in ("epoch", "role", "state", "storage_id")}
    assert checked("b", least) == least
    with pytest.raises(PeerError, match="storage_id"):
        checked("b", {**least, "storage_id": None})
    del least["epoch"]
    with pytest.raises(PeerError, match="epoch"):
        checked("b", least)


def test_what_a_terminal_or_systemd_would_obey_is_replaced() -> None:
    said = checked("b", {**SAID, "reasons": ["x\nMAINPID=1\x1b[2J\x9b\ud800"]})
    assert said["reasons"] == ["x?MAINPID=1?[2J??"]


@given(st.sampled_from(sorted(_KINDS)), VALUES)
def test_whatever_comes_is_refused_or_can_be_reported(name: str, value: Any) -> None:
    """The report, the metrics and the service addresses are made of it."""

    async def play() -> None:
        group = Group(CONFIG, cast(StateFile, Memory()), NodeHelper(Path("/nonexistent")))
        with suppress(PeerError):
            await group.heard_from("b", {**SAID, name: value}, answered=True)
        service = ServiceAddress(ADDRESSED, group, NodeHelper(Path("/nonexistent")))
        service._look()
        service.checks()
        nothing: dict[str, Any] = {}
        composer = Composer(
            CONFIG, group, lambda: (0, 0), str, lambda: nothing, list, service=lambda: nothing
        )
        report = composer.report()
        json.dumps(report.to_json())
        for family in ReportCollector(lambda: report).collect():
            for sample in family.samples:
                float(sample.value)
        "; ".join(report.reasons).encode()

    asyncio.run(play())


def test_nothing_that_is_told_gets_lost_unnoticed() -> None:
    group = Group(CONFIG, cast(StateFile, Memory()), NodeHelper(Path("/nonexistent")))
    nothing: dict[str, Any] = {}
    composer = Composer(
        CONFIG, group, lambda: (0, 0), str, lambda: nothing, list, service=lambda: nothing
    )
    assert composer.node_status().keys() - _KINDS.keys() == {"node", "clock"}


ADDRESSED = SimpleNamespace(
    node="a", service=SimpleNamespace(addresses=("192.0.2.20",)), fence=SimpleNamespace(ports=(25,))
)  # type: Any


class Memory:
    """A state file that keeps nothing."""

    def load(self) -> None:
        return None

    def save(self, durable: object) -> None: ...

    async def write(self, durable: object) -> None: ...


async def test_a_peer_that_talks_nonsense_is_lost_and_that_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers: list[dict[str, Any]] = [SAID, *[{**SAID, "reasons": None}] * 20]

    class Link:
        name = "b"

        async def request(self, *_: Any, **__: Any) -> dict[str, Any]:
            return answers.pop(0) if len(answers) > 1 else answers[0]

        def reset(self) -> None: ...

    group = Group(CONFIG, cast(StateFile, Memory()), NodeHelper(Path("/nonexistent")))
    caplog.set_level(logging.INFO)
    watching = asyncio.create_task(
        heartbeat.watch(cast(PeerLink, Link()), group, dict, Heartbeat(0.001, 0.01))
    )
    async with asyncio.timeout(5):
        while len(answers) > 1 or group.answers("b"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not watching.done()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert caplog.text.count("does not count") == 1
    assert "reasons" in caplog.text


@pytest.mark.parametrize("parked", [[[]], [{}], 5, None, "x"])
async def test_a_primary_that_does_not_say_what_it_has_set_aside_is_asked_again(
    parked: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbra.cluster.left_behind.INTERVAL", 0.001)
    answers: list[object] = [parked, []]
    deleted: list[list[str]] = []

    class Link:
        async def request(self, *_: Any, **__: Any) -> dict[str, Any]:
            return {"messages": 0, "parked": answers.pop(0)}

    async def delete(ids: list[str]) -> None:
        deleted.append(ids)

    group = SimpleNamespace(
        is_primary=lambda: False, primary=lambda: "b", whole_since=lambda: 1, links={"b": Link()}
    )
    helper = SimpleNamespace(queue_delete=delete)
    left = LeftBehind(cast(Group, group), cast(NodeHelper, helper), cast(Any, None))
    left.put({"Q1": "s1"}, 1)
    running = asyncio.create_task(left.run())
    async with asyncio.timeout(5):
        while not deleted and not running.done():  # noqa: ASYNC110
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert deleted == [["Q1"]]
