"""Who is told of whose clients, and where the addresses are seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.unit.cluster import support

from umbra.cluster import service_address
from umbra.cluster.service_address import GRACE, ServiceAddress
from umbra.config import Config, Service
from umbra.node import connections
from umbra.node.client import NodeHelper
from umbra.node.helper import HelperError
from umbra.node.packets import Connection
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.identity import PeerIdentity

ADDRESS = "192.0.2.20"
CONFIG = replace(support.CONFIG, service=Service((ADDRESS,)))
# 192.0.2.20:993 as the kernel writes it, with clients 192.0.2.140 to 142 at port 50000.
END = next(iter(connections.endpoints([ip_address(ADDRESS)], [993])))
ROWS = [(END, f"{0x8C + number:02X}0200C0:C350") for number in range(3)]


def client(number: int) -> Connection:
    return Connection(ip_address(ADDRESS), 993, ip_address(f"192.0.2.{140 + number}"), 50000)


class Host(NodeHelper):
    """Notes whom it was asked to tell."""

    def __init__(self) -> None:
        super().__init__(Path("/nonexistent"))
        self.tickled: list[list[Connection]] = []
        self.refuses = False

    async def tickle(self, connections: Sequence[Connection]) -> None:
        if self.refuses:
            raise HelperError("this host has no service address now")
        self.tickled.append(list(connections))


class Link:
    """A peer that takes the list of clients, or does not."""

    def __init__(self) -> None:
        self.lists: list[list[Any]] = []
        self.refuses = False
        self.asked = asyncio.Event()
        self.takes = asyncio.Event()
        self.takes.set()

    @asynccontextmanager
    async def exchange(
        self, op: str, args: dict[str, Any], *, timeout: float
    ) -> AsyncIterator[Any]:
        assert op == "clients"
        self.asked.set()
        await self.takes.wait()
        if self.refuses:
            raise PeerError("unreachable", "nobody")
        yield self

    async def send_lines(self, rows: list[dict[str, Any]]) -> None:
        self.lists.append(rows)

    async def result(self) -> dict[str, Any]:
        return {}


class Field:
    """This node, its peer as it was heard last, and where the address is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: Config = CONFIG) -> None:
        self.now = 100.0
        self.here = True
        self.answers = True
        self.rows = list(ROWS[:2])
        self.link = Link()
        self.helper = Host()
        self.peer: dict[str, Any] = {
            "state": "shadow", "service_addresses": [], "service_clients": 0,
        }  # fmt: skip
        self.group = cast(Any, SimpleNamespace())
        self.group.links = {"b": self.link}
        self.group.statuses = {"b": self.peer}
        self.group.answers = lambda name: self.answers
        self.group.is_primary = lambda: self.group.state.phase == "primary"
        self.group.state = SimpleNamespace(phase="primary")
        self.group.switching = False
        monkeypatch.setattr(connections, "is_here", lambda address: self.here)
        monkeypatch.setattr(connections, "read", lambda wanted: frozenset(self.rows))
        self.part = ServiceAddress(config, self.group, self.helper, lambda: self.now)

    async def turn(self) -> None:
        """Pass one second."""
        self.now += 1
        await self.part._turn()

    async def receive(self, rows: list[Any]) -> None:
        class Incoming:
            async def receive_lines(self) -> AsyncIterator[dict[str, Any]]:
                for row in rows:
                    yield {"client": row}

        handle = self.part.handlers()["clients"]
        await handle(cast(PeerIdentity, None), {}, cast(Exchange, Incoming()))


@pytest.fixture
def field(monkeypatch: pytest.MonkeyPatch) -> Field:
    return Field(monkeypatch)


def told(rows: list[dict[str, Any]]) -> set[Connection]:
    return {Connection.from_json(row["client"]) for row in rows}


async def test_the_shadow_hears_of_clients_once_and_of_each_change(field: Field) -> None:
    await field.turn()
    field.peer["service_clients"] = 2
    await field.turn()
    assert [told(rows) for rows in field.link.lists] == [{client(0), client(1)}]
    field.rows = [ROWS[1], ROWS[2]]  # as many as before
    await field.turn()
    assert told(field.link.lists[-1]) == {client(1), client(2)}


async def test_a_shadow_that_has_forgotten_is_told_again(field: Field) -> None:
    await field.turn()
    field.peer["service_clients"] = 2
    await field.turn()
    field.peer["service_clients"] = 0  # its agent died
    await field.turn()
    assert len(field.link.lists) == 2


async def test_the_next_primary_hears_of_those_who_came_last(field: Field) -> None:
    await field.turn()
    field.peer["service_clients"] = 2
    field.rows.append(ROWS[2])
    await field.group.before_disconnect("b")
    assert told(field.link.lists[-1]) == {client(0), client(1), client(2)}
    field.link.refuses = True  # then it goes without
    field.rows.pop()
    await field.group.before_disconnect("b")
    await field.group.before_disconnect("c")  # which has no such address


async def test_the_last_list_stays_the_last_one(field: Field) -> None:
    """While clients are disconnected, each look sees fewer of them."""
    field.link.takes.clear()
    before = asyncio.create_task(field.turn())
    await field.link.asked.wait()
    field.rows.append(ROWS[2])
    field.group.switching = True
    last = asyncio.create_task(field.group.before_disconnect("b"))
    await asyncio.sleep(0.05)
    field.link.takes.set()
    await asyncio.gather(before, last)
    field.rows.clear()
    await field.turn()
    assert [len(rows) for rows in field.link.lists] == [2, 3]
    field.group.switching = False  # it was broken off
    await field.turn()
    assert field.link.lists[-1] == []


async def test_a_change_does_not_wait_for_a_list_that_is_not_taken(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_address, "LAST_TELL_TIMEOUT", 0.05)
    field.link.takes.clear()
    turn = asyncio.create_task(field.turn())
    await field.link.asked.wait()
    await asyncio.wait_for(field.group.before_disconnect("b"), 5)
    field.link.takes.set()
    await turn
    assert len(field.link.lists) == 1


async def test_a_third_node_that_does_not_answer_keeps_nobody_from_being_told(
    field: Field,
) -> None:
    field.group.links["c"] = third = Link()
    field.group.statuses["c"] = {**field.peer}
    third.takes.clear()
    turn = asyncio.create_task(field.turn())
    await third.asked.wait()
    field.rows.append(ROWS[2])
    field.group.switching = True
    await field.group.before_disconnect("b")
    assert len(field.link.lists[-1]) == 3
    third.takes.set()
    await turn


async def test_a_list_that_did_not_arrive_is_sent_again(field: Field) -> None:
    field.link.refuses = True
    await field.turn()
    field.link.refuses = False
    field.peer["service_clients"] = 2
    await field.turn()
    assert len(field.link.lists) == 1


async def test_only_a_primary_tells_and_only_who_could_have_the_address(field: Field) -> None:
    field.group.state.phase = "shadow"
    await field.turn()
    field.group.state.phase = "primary"
    del field.peer["service_clients"]  # it stands in another subnet
    await field.turn()
    field.peer["service_clients"] = 0
    field.answers = False
    await field.turn()
    assert field.link.lists == []


async def test_a_takeover_tells_the_clients_of_the_former_primary_three_times(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_address, "TICKLE_PAUSES", (0.0, 0.01, 0.01))
    field.group.state.phase = "shadow"
    await field.receive([client(0).to_json(), client(1).to_json()])
    assert field.part.describe()["service_clients"] == 2
    task = asyncio.create_task(field.part._tickle())
    field.helper.on_opened([], [])  # a renewal
    await asyncio.sleep(0.05)
    assert field.helper.tickled == []
    field.helper.on_opened([ADDRESS], [])
    await asyncio.sleep(0.1)
    field.helper.on_opened([ADDRESS], [])  # it lapsed and came back: these clients are our own
    await asyncio.sleep(0.1)
    assert field.helper.tickled == [[client(0), client(1)]] * 3
    assert field.part.describe()["service_clients"] == 0
    # The address went away again before all was said: the next one is told all the same.
    field.helper.refuses = True
    await field.receive([client(2).to_json()])
    field.helper.on_opened([ADDRESS], [])
    await asyncio.sleep(0.05)
    field.helper.refuses = False
    await field.receive([client(1).to_json()])
    field.helper.on_opened([ADDRESS], [])
    await asyncio.sleep(0.1)
    assert field.helper.tickled[3:] == [[client(1)]] * 3
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["192.0.2.21", 993, "192.0.2.140", 50000]], "no service address here"),
        ([["192.0.2.20", 993, "nobody", 50000]], "nobody"),
        ([None], "two addresses"),
    ],
)
async def test_a_list_that_makes_no_sense_changes_nothing(
    field: Field, rows: list[Any], words: str
) -> None:
    await field.receive([client(0).to_json()])
    with pytest.raises(PeerError, match=words):
        await field.receive([client(1).to_json(), *rows])
    assert field.part.describe()["service_clients"] == 1


async def test_a_list_without_end_is_refused(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CLIENTS", 2)
    with pytest.raises(PeerError, match="over 2 clients"):
        await field.receive([client(number).to_json() for number in range(3)])


async def test_the_check_passes_while_the_primary_alone_has_it(field: Field) -> None:
    for _ in range(10):
        await field.turn()
    [check] = field.part.checks()
    assert (check.name, check.passed) == (f"service address {ADDRESS}", True)
    assert (check.value, check.threshold) == (["a"], "a")
    assert check.message == "192.0.2.20 is at a."


@pytest.mark.parametrize(
    ("here", "there", "message"),
    [
        (True, True, "192.0.2.20 is at a and b; it should be at a."),
        (False, True, "192.0.2.20 is at b; it should be at a."),
        (False, False, "192.0.2.20 is nowhere; it should be at a."),
    ],
)
async def test_an_address_at_another_place_is_an_alarm_after_a_change_would_be_over(
    field: Field, here: bool, there: bool, message: str
) -> None:
    field.here = here
    field.peer["service_addresses"] = [ADDRESS] if there else []
    await field.turn()
    assert field.part.checks()[0].passed
    field.now += GRACE
    [check] = field.part.checks()
    assert (check.passed, check.message) == (False, message)
    field.here, field.peer["service_addresses"] = True, []
    await field.turn()
    assert field.part.checks()[0].passed


async def test_a_shadow_sees_it_too_and_a_silent_peer_counts_for_nothing(field: Field) -> None:
    field.group.state.phase = "shadow"
    field.peer.update(state="primary", service_addresses=[ADDRESS])
    await field.turn()
    field.now += GRACE
    assert field.part.checks()[0].message == "192.0.2.20 is at a and b; it should be at b."
    field.here = False
    field.answers = False
    await field.turn()
    [check] = field.part.checks()
    assert (check.passed, check.message) == (True, "192.0.2.20 is nowhere.")


async def test_what_the_helper_says_is_shown_on_the_primary(field: Field) -> None:
    field.helper.on_opened([ADDRESS], ["the interface of it has no carrier"])
    await field.turn()
    [check] = field.part.checks()
    assert not check.passed
    assert check.message == "192.0.2.20 is at a; the interface of it has no carrier."
    field.helper.on_opened([], [])
    assert field.part.checks()[0].passed


async def test_a_group_without_one_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    field = Field(monkeypatch, replace(CONFIG, service=Service()))
    await field.part.run()
    assert field.part.describe() == {}
    assert field.part.checks() == []
