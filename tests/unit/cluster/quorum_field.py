"""Nodes of a group with a witness in one process, on a clock that runs as fast as they think.

Everything but network, disk and host is the agent's own: driver, protocol, group and handover.
"""

from __future__ import annotations

import asyncio
import json
import math
import selectors
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from umbra.cluster import heartbeat
from umbra.cluster import protocol as p
from umbra.cluster.etcd import EtcdError, Shown
from umbra.cluster.handover import Handover
from umbra.cluster.quorum import QuorumGroup
from umbra.cluster.static import StateFile
from umbra.cluster.work import POSTFIX
from umbra.config import (
    Config,
    Coordinator,
    CoordinatorKind,
    Endpoint,
    HandoverRules,
    Heartbeat,
    Mailbox,
    Peer,
    Profile,
)
from umbra.node.client import NodeHelper
from umbra.node.helper import HelperError
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.identity import PeerIdentity
from umbra.peer.link import PeerLink
from umbra.peer.server import Handler
from umbra.transport.coverage import uncovered
from umbra.transport.remaining import Remaining

TIMING = p.PROFILES["default"]
D = TIMING.silence
SITES = {"a": "alpha", "b": "beta", "c": "gamma"}


class _Selector(selectors.SelectSelector):
    """Waits for nothing: where a loop would wait, its clock jumps."""

    jump: Callable[[float], None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0 if timeout is not None else None)
        if not ready and timeout:
            self.jump(timeout)
        return ready


class FastLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer."""

    def __init__(self) -> None:
        selector = _Selector()
        selector.jump = self._jump
        self._now = 1000.0
        super().__init__(selector)

    def _jump(self, seconds: float) -> None:
        self._now += seconds

    def time(self) -> float:
        return self._now


def run(scenario: Awaitable[None]) -> None:
    """Run a scenario on a fast loop."""

    async def main() -> None:
        await scenario

    with asyncio.Runner(loop_factory=FastLoop) as runner:
        runner.run(main())


def clock() -> float:
    return asyncio.get_running_loop().time()


class Register:
    """The coordinator: one key, and what can go wrong with it."""

    def __init__(self) -> None:
        self.revision = 0
        self.cluster = "first"
        self.value: bytes | None = None
        self.frozen = asyncio.Event()
        self.mute = False
        self.delay = 0.005
        self.cut: set[str] = set()

    def seen_by(self, node: str) -> _View:
        return _View(self, node)

    @property
    def record(self) -> p.Record:
        assert self.value is not None
        return p.Record.from_json(json.loads(self.value))


class _View:
    def __init__(self, register: Register, node: str) -> None:
        self._register = register
        self._node = node

    async def _reach(self) -> float:
        register, sent = self._register, clock()
        await asyncio.sleep(register.delay)
        if register.frozen.is_set() or self._node in register.cut:
            await asyncio.sleep(TIMING.call)
            raise EtcdError("no answer")
        return sent

    async def read(self, key: str) -> Shown:
        sent = await self._reach()
        register = self._register
        return Shown(sent, register.revision, register.value, cluster=register.cluster)

    async def silent(self) -> list[str]:
        return ["a voter"] if self._register.frozen.is_set() else []

    async def swap(self, key: str, revision: int, value: bytes) -> Shown:
        register, sent = self._register, await self._reach()
        swapped = register.revision == revision
        if swapped:
            register.revision += 1
            register.value = value
        if register.mute:
            await asyncio.sleep(TIMING.call)
            raise EtcdError("the answer was lost")
        return Shown(sent, register.revision, register.value, swapped, register.cluster)


class Host(NodeHelper):
    """A host: ports with a lease, Postfix, disks that can stall."""

    def __init__(self) -> None:
        super().__init__(Path("/nonexistent"))
        self.until = 0.0
        self.postfix = False
        self.refuses = ""
        self.works = asyncio.Event()
        self.works.set()
        self.queue_ids: dict[str, str] = {}
        self.held: list[str] = []
        self.shot: list[str] = []
        self.hook_fails = False
        self.crashed = False
        self.restarts = 0
        self.warm = 0
        self.mail = ""
        self.free = {"/var/vmail": 2**30}
        self.clients_reach = True

    @property
    def open(self) -> bool:
        return clock() < self.until

    async def ports_open_until(
        self, ports: Sequence[int], until: float, postfix_until: float
    ) -> None:
        self.until = until

    async def ports_close(self) -> None:
        self.until = 0.0

    async def mail_store(self, storage: str, *, claim: bool) -> str | None:
        if claim:
            self.mail = storage
        return self.mail

    async def postfix_start(self) -> None:
        await asyncio.sleep(0.1)
        if self.refuses:
            raise HelperError(self.refuses)
        self.postfix, self.crashed = True, False

    def kill_postfix(self) -> None:
        self.postfix, self.crashed = False, True

    async def postfix_stop(self) -> None:
        self.postfix = False

    async def postfix_running(self) -> bool:
        return self.postfix

    async def postfix_failed(self) -> bool:
        return self.crashed

    async def dovecot_restarts(self) -> int:
        return self.restarts

    async def reach(self, addresses: Sequence[str]) -> bool:
        return self.clients_reach

    async def stonith(self, node: str) -> str:
        self.shot.append(node)
        if self.hook_fails:
            raise HelperError("no route to the switch")
        return f"{node} is off"

    async def kick(self, ports: Sequence[int]) -> None:
        pass

    async def queue(self) -> Mapping[str, str]:
        return dict(self.queue_ids)

    async def queue_hold(self, ids: Sequence[str]) -> None:
        self.held += ids
        for key in ids:
            self.queue_ids[key] = "hold"

    async def queue_release(self, ids: Sequence[str]) -> None:
        for key in ids:
            self.queue_ids[key] = "deferred"

    async def queue_delete(self, ids: Sequence[str]) -> None:
        for key in ids:
            self.queue_ids.pop(key)

    async def remaining(self) -> Mapping[str, Sequence[str]]:
        # As postqueue(1), which does not look at what Postfix could not read.
        listed = (key for key, place in self.queue_ids.items() if place != "corrupt")
        return {key: ["x@example.org"] for key in listed}

    async def prove(self) -> None:
        await self.works.wait()


class Parts:
    """Messages and mailboxes, as far as a change of primary asks for them."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.taken: list[tuple[str, Remaining | None]] = []
        self.left = 0
        self.settling: set[str] = set()
        self.parked: list[str] = []
        self.came_back: set[str] = set()
        self.resumed: list[str] = []
        self.given_back = 0
        self.replacing = 0

    def covered(self, peer: str) -> Mapping[str, str]:
        return {"Q1": "s1"}

    async def uncovered(self, peer: str) -> Mapping[str, str]:
        return uncovered(self.host.queue_ids, self.covered(peer))

    async def outstanding(self) -> int:
        return self.left

    def unsettled(self, peer: str) -> bool:
        return peer in self.settling

    async def passed_on(self, shadow_ids: Mapping[str, str], since: int) -> set[str]:
        return {key for key, value in shadow_ids.items() if value in self.came_back}

    def gave_up(self) -> None: ...

    async def take_over(self, origin: str, remaining: Remaining | None) -> None:
        self.taken.append((origin, remaining))

    def resubmit(self) -> None: ...

    async def give_back(self) -> None:
        self.taken.clear()
        self.given_back += 1

    def only_asynchronous(self, to: str) -> bool:
        return False

    async def hurry(self, to: str, timeout: float) -> None: ...

    async def confirm(self, to: str) -> None: ...

    def at_ease(self) -> None: ...

    async def resume(self, peer: str, epoch: int) -> None:
        self.resumed.append(peer)

    def stop(self) -> None: ...

    async def quiet(self) -> None:
        pass

    def replaces_a_lost_one(self) -> None:
        self.replacing += 1


class _Exchange:
    """The rows of one exchange, as both ends use them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.answer: Callable[[], Awaitable[dict[str, Any]]]

    async def send_lines(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    async def receive_lines(self) -> AsyncIterator[dict[str, Any]]:
        for row in self.rows:
            yield row

    async def result(self) -> dict[str, Any]:
        return await self.answer()


class Link:
    """From one node to another."""

    def __init__(self, field: Field, source: str, target: str) -> None:
        self.name = target
        self._field, self._source = field, source

    async def request(self, op: str, args: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        async with self.exchange(op, args, timeout=timeout) as exchange:
            return await exchange.result()

    @asynccontextmanager
    async def exchange(
        self, op: str, args: Mapping[str, Any], *, timeout: float
    ) -> AsyncIterator[_Exchange]:
        exchange = _Exchange()
        epoch = self._field.nodes[self._source].group.epoch

        async def answer() -> dict[str, Any]:
            await asyncio.sleep(self._field.delay)
            there = self._field.nodes[self.name]
            if (self._source, self.name) in self._field.cut or not there.up:
                raise PeerError("unreachable", "no route")
            await there.group.check_epoch(self._source, op, epoch)
            who, through = PeerIdentity(self._source, ""), cast(Exchange, exchange)
            result: dict[str, Any] = await there.handlers[op](who, args, through)
            if (self.name, self._source) in self._field.cut:
                await asyncio.sleep(timeout)
            return result

        exchange.answer = answer
        try:
            async with asyncio.timeout(timeout):
                yield exchange
        except TimeoutError:
            raise PeerError("timeout", "no answer") from None

    def reset(self) -> None: ...

    def cut(self) -> None: ...


class Node:
    """One mail host with its agent."""

    def __init__(
        self,
        field: Field,
        name: str,
        path: Path,
        settings: Coordinator,
        rules: HandoverRules,
        copies: int,
    ) -> None:
        self.field, self.name = field, name
        self.up = False
        self.host = Host()
        self.load = ""
        others = [n for n in field.names if n != name]
        self.config = Config(
            group="mail", node=name, site=SITES[name],
            role="primary" if name == "a" else "shadow",
            link=Endpoint("127.0.0.1", 1), api=Endpoint("127.0.0.1", 2),
            peers=tuple(Peer(n, SITES[n], "127.0.0.2") for n in others),
            heartbeat=Heartbeat(0.5, 2.0), coordinator=settings, handover=rules,
            mailbox=Mailbox(mirror_copies=copies),
        )  # fmt: skip
        self.path = path / f"{name}.json"
        self._task: asyncio.Task[None] | None = None
        self.group: QuorumGroup
        self.parts: Parts
        self.broken_off: list[tuple[Collection[str], float]] = []

    def start(self) -> None:
        states = StateFile(self.path, "mail", self.name)
        view = self.field.register.seen_by(self.name)
        self.group = group = QuorumGroup(self.config, states, self.host, view, clock=clock)

        async def greet(ports: Sequence[int], expected: bytes, goodbye: bytes) -> None:
            if ports == POSTFIX[0] and not self.host.postfix:
                raise OSError("connection refused")

        group.work._greet = greet
        group.warm_up = self._warm_up
        group.fitness.free = lambda: self.host.free
        links = {p.name: Link(self.field, self.name, p.name) for p in self.config.peers}
        group.links = cast(dict[str, PeerLink], links)
        group.control = cast(dict[str, PeerLink], links)
        group.break_off = self._break_off
        self.parts = Parts(self.host)
        group.on_shadow = self.parts.give_back
        self.handover = Handover(self.config, group, self.host, self.parts, self.parts)

        async def catch_up(peer: str, protect: Callable[[], Awaitable[None]]) -> None:
            await asyncio.sleep(0.3)
            await group.links[peer].request("merged", {}, timeout=1)
            await protect()

        group.catch_up = catch_up

        async def merged(peer: PeerIdentity, args: Any, exchange: Any) -> dict[str, Any]:
            await group.merged()
            return {}

        async def outstanding(peer: PeerIdentity, args: Any, exchange: Any) -> dict[str, Any]:
            return {"messages": self.parts.left, "parked": self.parts.parked}

        def status() -> dict[str, Any]:
            durable = group.state.durable
            return {
                "storage_id": durable.storage_id, "epoch": group.epoch, "role": durable.role,
                "merged": durable.merged, "state": "", "load": self.load, **group.describe(),
            }  # fmt: skip

        self.handlers: dict[str, Handler] = {
            **group.handlers(),
            **self.handover.handlers(),
            "merged": merged,
            "status": heartbeat.answer(group, status),
            "shadow-store": merged,
            "shadow-outstanding": outstanding,
        }
        self.up = True
        self._task = asyncio.create_task(self._run(status))

    def _break_off(self, operations: Collection[str], below: float = math.inf) -> None:
        self.broken_off.append((operations, below))

    async def _warm_up(self) -> None:
        assert self.host.postfix
        self.host.warm += 1

    async def _run(self, status: Callable[[], dict[str, Any]]) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.group.run())
            tasks.create_task(self.handover.left_behind.run())
            for link in self.group.links.values():
                tasks.create_task(heartbeat.watch(link, self.group, status, self.config.heartbeat))

    async def crash(self) -> None:
        """The agent is gone; Postfix runs on, and the lease of the ports."""
        self.up = False
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.group.stop()

    async def power_cut(self) -> None:
        await self.crash()
        self.host.until, self.host.postfix = 0.0, False

    @property
    def phase(self) -> p.Phase:
        return self.group.driver.state.phase

    @property
    def serves(self) -> bool:
        return self.up and self.group.is_primary() and self.host.open


class Field:
    """All of it. Watches that never two serve."""

    def __init__(
        self,
        path: Path,
        names: str = "ab",
        *,
        rules: HandoverRules | None = None,
        copies: int = 1,
        **settings: Any,
    ) -> None:
        self.names = names
        self.register = Register()
        self.cut: set[tuple[str, str]] = set()
        self.delay = 0.001
        coordinator = Coordinator(
            CoordinatorKind.ETCD, Profile.DEFAULT, endpoints=("x",) * 3, **settings
        )
        self.nodes = {
            name: Node(self, name, path, coordinator, rules or HandoverRules(), copies)
            for name in names
        }
        self.a, self.b = self.nodes["a"], self.nodes["b"]
        self.longest_gap = 0.0
        self._last = clock()

    def separate(self, one: str, other: str) -> None:
        self.cut |= {(one, other), (other, one)}

    async def watch(self) -> None:
        while True:
            serving = [node.name for node in self.nodes.values() if node.serves]
            assert len(serving) <= 1, serving
            opened = [node.name for node in self.nodes.values() if node.host.open]
            assert len(opened) <= 1, f"ports open on {opened}"
            if serving:
                self.longest_gap = max(self.longest_gap, clock() - self._last)
                self._last = clock()
            await asyncio.sleep(0.01)

    async def until(self, condition: Callable[[], bool], seconds: float, what: str = "") -> float:
        began = clock()
        while not condition():
            if clock() - began > seconds:
                states = {
                    n.name: (str(n.phase), n.group.driver.state.cause, n.group.reasons())
                    for n in self.nodes.values()
                }
                pytest.fail(f"not after {seconds:g} s: {what} {states}")
            await asyncio.sleep(0.01)
        return clock() - began

    async def protected(self, primary: Node, seconds: float = 30.0) -> None:
        await self.until(
            lambda: primary.serves
            and primary.group.state.protected
            and not primary.group.reasons()
            and all(n.phase is p.Phase.READY for n in self.nodes.values() if n is not primary),
            seconds, f"{primary.name} protected",
        )  # fmt: skip


Play = Callable[..., None]
"""Plays a scenario; see ``play``."""


def play(
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
    scenario: Callable[[Field], Awaitable[None]],
    names: str = "ab",
    **settings: Any,
) -> None:
    """Start a group, wait until it is protected, and play a scenario."""

    async def direct(call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)

    monkeypatch.setattr("asyncio.to_thread", direct)
    monkeypatch.setattr("time.monotonic", clock)

    async def main() -> None:
        field = Field(path, names, **settings)
        for node in field.nodes.values():
            node.start()
        watch = asyncio.create_task(field.watch())
        try:
            await field.protected(field.a)
            field.longest_gap = 0.0
            await scenario(field)
            assert not watch.done() or watch.exception() is None, watch.exception()
        finally:
            watch.cancel()
            for node in field.nodes.values():
                if node.up:
                    await node.crash()

    run(main())
