"""Random faults, and whole runs of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from tests.sim.world import TIMING, D, Layers, Node, World

from umbra.cluster import protocol as p

Fault = Callable[[World], None]


def _node(world: World) -> Node:
    primary = world.primary()
    if primary is not None and world.random.random() < 0.6:
        return primary
    return world.random.choice(list(world.nodes.values()))


def _span(world: World) -> float:
    return world.random.choice([0.2, 0.5, 1.0, 1.5, 3.0, 6.0]) * D * world.random.uniform(0.5, 1.2)


def crash(world: World) -> None:
    node = _node(world)
    node.crash()
    world.after(_span(world), lambda: None if node.up else node.start())


def wipe(world: World) -> None:
    """The disk of a shadow is replaced, while everybody else is well."""
    primary = world.primary()
    record = world.register.record
    if primary is None or record is None or record.mode is not p.Mode.PROTECTED:
        return
    if not all(n.up and not n.paused for n in world.nodes.values()):
        return
    node = world.random.choice([n for n in world.nodes.values() if n is not primary])
    node.wipe()
    world.after(_span(world), lambda: None if node.up else node.start())


def pause(world: World) -> None:
    node = _node(world)
    node.pause()
    world.after(_span(world), node.thaw)


def stall(world: World) -> None:
    node = _node(world)
    node.stalled = True

    def end() -> None:
        node.stalled = False
        node.thaw()

    world.after(_span(world), end)


def cut(world: World) -> None:
    """Cut some links, each in one direction or both."""
    hosts = [*world.nodes, "w"]
    if world.random.random() < 0.4:
        lonely = _node(world).name
        links = [(lonely, h) for h in hosts if h != lonely]
    else:
        links = [world.random.choice(list(itertools.combinations(hosts, 2)))]
    style = world.random.choice(["both", "out", "in"])
    broken = set(links) if style != "in" else set()
    if style != "out":
        broken |= {(b, a) for a, b in links}
    world.blocked |= broken
    world.after(_span(world), lambda: world.blocked.difference_update(broken))


def coordinator(world: World) -> None:
    register = world.register
    frozen = set(world.random.sample(register.members, world.random.choice([1, 1, 2, 3])))
    register.frozen |= frozen
    world.after(_span(world), lambda: register.frozen.difference_update(frozen))


def witness(world: World) -> None:
    world.hosts_down.add("w")
    world.after(_span(world), lambda: world.hosts_down.discard("w"))


def slow(world: World) -> None:
    world.register.slow = 2 * D
    world.after(_span(world), lambda: setattr(world.register, "slow", 0.0))


def weather(world: World) -> None:
    world.loss = world.random.choice([0.02, 0.3])
    world.tail = world.random.choice([0.05, 0.5 * D, 1.5 * D])

    def end() -> None:
        world.loss = world.tail = 0.0

    world.after(_span(world), end)


def brittle(world: World) -> None:
    """Processes die between two effects."""
    world.crashing = 0.02
    world.after(_span(world), lambda: setattr(world, "crashing", 0.0))


def clock(world: World) -> None:
    """Wall clocks jump; the others keep within a tenth of the right rate."""
    node = _node(world)
    node.wall_offset += world.random.choice([-3600.0, 3600.0])
    low, high = (0.9, 1.1) if world.strict else (0.5, 2.0)
    node.run_at(world.random.choice([low, 1.0, high]))


def profile(world: World) -> None:
    """An agent starts with other times than it had, and maybe than the others have."""
    node = _node(world)
    if node.runs:
        node.become(world.random.choice(list(p.PROFILES)))


def switchover(world: World) -> None:
    primary = world.primary()
    if primary is None or primary.state.known is None:
        return
    names = sorted(m.node for m in primary.state.known.protected)
    if not names:
        return
    try:
        primary.take(p.Switch(world.random.choice(names)))
    except p.NotNow:
        return
    world.after(0.05, primary.guard(lambda: primary.take(p.Drained())))


def overlay(world: World) -> None:
    node = _node(world)
    if not node.runs:
        return
    node.take(p.Pause(True))

    def end() -> None:
        for other in world.nodes.values():
            if other.runs:
                other.take(p.Pause(False))

    world.after(_span(world), end)


def force(world: World) -> None:
    """A person gives the key to a node although nothing is certain."""
    node = world.random.choice(list(world.nodes.values()))
    known = node.state.known
    if not node.runs or known is None or not world.strict:
        return
    try:
        node.take(p.Force())
    except p.NotNow:
        return
    world.forced.update(range(known.epoch + 1, known.epoch + 10))


FAULTS: tuple[Fault, ...] = (
    crash, crash, wipe, pause, pause, stall, cut, cut, cut, coordinator, witness, slow, weather,
    brittle, clock, switchover, overlay, profile,
)  # fmt: skip


@dataclass
class Count:
    seconds: float = 0.0
    faults: int = 0
    acknowledged: int = 0
    changes: int = 0
    steps: int = 0

    def add(self, world: World, faults: int) -> None:
        self.seconds += world.time
        self.faults += faults
        self.acknowledged += len(world.acked)
        self.changes += world.history[-1].epoch - 1 if world.history else 0
        self.steps += world.steps


def unpause(world: World) -> None:
    for node in world.nodes.values():
        if node.runs:
            node.take(p.Pause(False))


def episode(
    seed: int, *, layers: Layers | None = None, strict: bool | None = None, live: bool = True
) -> tuple[World, int]:
    """Run one world through random faults, some at the same time. Violation if it breaks a law."""
    world = World(seed, layers=layers)
    chance = world.random
    world.strict = chance.random() < 0.75 if strict is None else strict
    mixed = chance.random() < 0.25
    if (three := chance.random() < 0.25) or mixed:
        world = World(
            seed, layers=layers, nodes=3 if three else 2, strict=world.strict,
            profiles=list(p.PROFILES) if mixed else ["default"],
        )  # fmt: skip
        chance = world.random
    low, high = (0.9, 1.1) if world.strict else (0.5, 2.0)
    for node in world.nodes.values():
        node.run_at(chance.choice([low, 1.0, high]))
    world.start()
    world.run(6 * D)
    faults = 0
    forcing = chance.random() < 0.1
    for _ in range(chance.randint(1, 3)):
        for _ in range(chance.randint(1, 6)):
            chance.choice(FAULTS)(world)
            faults += 1
            world.run(chance.choice([0.02, 0.3, TIMING.miss, D, 2 * D]) * chance.random())
            if forcing and chance.random() < 0.3:
                force(world)
                world.run(D * chance.random())
        world.run(7 * D)
        world.heal()
        unpause(world)
        if live:
            world.settle(30 * D)
        else:
            world.run(6 * D)
    return world, faults
