"""Single faults with a known answer. Each raises Violation when the answer is another."""

from __future__ import annotations

from collections.abc import Callable

from tests.sim.world import TIMING, D, Layers, World

from umbra.cluster import protocol as p

Scenario = Callable[[], object]


def pair(seed: int = 1, *, max_changes: int = 1000, profile: str = "default") -> World:
    """Return a protected pair with `a` primary."""
    world = World(seed, max_changes=max_changes, profiles=[profile])
    world.start()
    world.settle(6 * D)
    expect(world, holder="a", epoch=1)
    world.longest_gap = 0.0
    return world


def expect(
    world: World, *, holder: str, epoch: int | None = None, mode: p.Mode = p.Mode.PROTECTED
) -> None:
    """Compare the key with what it should be, and the node with the key."""
    record = world.register.record
    if record is None or record.holder != holder or record.mode is not mode:
        world.fail(f"expected {holder} {mode}, found {record}")
    elif epoch is not None and record.epoch != epoch:
        world.fail(f"expected epoch {epoch}, found {record}")


def acting(world: World, name: str) -> None:
    """Fail unless ``name`` is primary and has just acknowledged something."""
    node = world.primary()
    if node is None or node.name != name or world.time - world.acked_at > 1:
        world.fail(f"{name} does not act: {world.nodes[name].state.cause}")


def host_lost() -> float:
    """The primary's host dies: return for how long nothing was acknowledged."""
    world = pair()
    world.nodes["a"].crash()
    world.run(3 * D)
    expect(world, holder="b", epoch=2, mode=p.Mode.ALONE)
    acting(world, "b")
    gap = world.longest_gap
    world.nodes["a"].start()
    world.settle(6 * D)
    expect(world, holder="b", epoch=2)
    return gap


def shadow_lost() -> None:
    world = pair()
    world.nodes["b"].crash()
    world.run(D)
    expect(world, holder="a", epoch=1, mode=p.Mode.ALONE)
    acting(world, "a")
    # Then the primary, and the shadow returns first: it lacks something and never takes over.
    world.nodes["a"].crash()
    world.nodes["b"].start()
    world.run(10 * D)
    expect(world, holder="a", epoch=1, mode=p.Mode.ALONE)
    if world.primary() is not None:
        world.fail("a shadow that lacks something acts")
    world.nodes["a"].start()
    world.settle(6 * D)
    expect(world, holder="a", epoch=1)


def link_cut() -> None:
    """The nodes lose each other; both see the witness: the primary goes on, alone."""
    for seed in range(5):
        world = pair(seed)
        world.blocked |= {("a", "b"), ("b", "a")}
        world.run(4 * D)
        expect(world, holder="a", epoch=1, mode=p.Mode.ALONE)
        acting(world, "a")
        world.heal()
        world.settle(6 * D)
        expect(world, holder="a", epoch=1)


def cut_off() -> None:
    """The primary is cut from both others: it stops, the shadow takes over."""
    for seed in range(5):
        world = pair(seed)
        for other in ("b", "w"):
            world.blocked |= {("a", other), (other, "a")}
        world.run(4 * D)
        expect(world, holder="b", epoch=2, mode=p.Mode.ALONE)
        acting(world, "b")
        world.heal()
        world.settle(6 * D)
        expect(world, holder="b", epoch=2)


def drifting() -> None:
    """The same, and the clock of the primary is slow, that of the shadow fast."""
    for seed in range(5):
        world = pair(seed)
        world.nodes["a"].run_at(0.9)
        world.nodes["b"].run_at(1.1)
        world.run(D)
        for other in ("b", "w"):
            world.blocked |= {("a", other), (other, "a")}
        world.run(4 * D)
        expect(world, holder="b", epoch=2, mode=p.Mode.ALONE)


def coordinator_frozen() -> None:
    """All members are frozen for 60 s: nothing happens, nobody waits."""
    world = pair()
    world.register.frozen |= {"a", "b", "w"}
    world.run(60)
    if world.longest_gap > 0.5:
        world.fail(f"nothing was acknowledged for {world.longest_gap:.2f} s")
    acting(world, "a")
    # Then the shadow dies: never silently alone.
    world.nodes["b"].crash()
    world.run(20)
    if world.time - world.acked_at < 20 - TIMING.hold:
        world.fail("alone without the coordinator")
    # And returns: both together need no quorum.
    world.nodes["b"].start()
    world.run(D)
    acting(world, "a")
    world.heal()
    world.settle(6 * D)
    expect(world, holder="a", epoch=1)


def disk_stall() -> None:
    """The primary's disk hangs: it renews nothing any more, the shadow takes over."""
    world = pair()
    world.nodes["a"].stalled = True
    # Its coordinator member has another disk here, so that only the renewal can tell.
    world.run(TIMING.work + 3 * D)
    expect(world, holder="b", epoch=2, mode=p.Mode.ALONE)
    acting(world, "b")


def wiped_shadow() -> None:
    """A protected shadow returns with an emptied disk and the primary dies at once."""
    for seed in range(5):
        world = pair(seed)
        world.nodes["b"].wipe()
        world.nodes["a"].crash()
        world.nodes["b"].start()
        world.run(6 * D)
        if world.primary() is not None:
            world.fail("an empty store acts")


def superseded(seed: int) -> World:
    """Return a world in which `b` has taken over from `a`, which is frozen."""
    world = World(seed, layers=Layers(False, False), strict=False)
    world.register.members = ["w"]
    world.start()
    world.settle(6 * D)
    world.nodes["a"].pause()
    world.run(4 * D)
    expect(world, holder="b", epoch=2, mode=p.Mode.ALONE)
    acting(world, "b")
    return world


def comes_back() -> None:
    """A superseded primary thaws and sees the new one, but not the key; no deadline stops it."""
    for seed in range(5):
        world = superseded(seed)
        world.blocked |= {("a", "w"), ("w", "a")}
        world.nodes["a"].thaw()
        world.run(2 * D)


def epoch_survives() -> None:
    """The same, and the new primary dies and comes back while the coordinator is away."""
    for seed in range(5):
        world = superseded(seed)
        world.register.frozen.add("w")
        world.nodes["b"].crash()
        world.nodes["b"].start()
        world.nodes["a"].thaw()
        world.run(2 * D)


def late_answers() -> None:
    """Answers arrive long after their requests, then no request arrives any more."""
    for seed in range(5):
        world = pair(seed)
        world.layers.introductions = False
        world.register.members = ["w"]
        world.blocked |= {("a", "w"), ("w", "a")}
        world.delay = 0.6 * D
        world.run(D)
        world.blocked.add(("a", "b"))
        world.run(0.95 * D)
        world.delay = 0.001
        world.run(4 * D)


def join_unanswered() -> None:
    """The key names the shadow protected, but the primary never hears of it."""
    for seed in range(5):
        world = pair(seed)
        world.register.members = ["w"]
        a, b = world.nodes["a"], world.nodes["b"]
        b.crash()
        world.run(D)
        b.start()
        while not a.state.pending:
            world.run(0.0005)
        world.blocked |= {("w", "a"), ("a", "b"), ("b", "a")}
        world.run(4 * D)
        expect(world, holder="b", epoch=2, mode=p.Mode.ALONE)


def join_forgotten() -> None:
    """The key names the shadow protected late: the agent that asked for it has died since."""
    for seed in range(5):
        world = pair(seed)
        world.register.members = ["w"]
        a, b = world.nodes["a"], world.nodes["b"]
        b.crash()
        world.run(2 * D)
        world.register.late = 4 * D
        b.start()
        while not a.state.pending:
            world.run(0.0005)
        world.register.late = 0.0
        world.blocked |= {("a", "b"), ("b", "a")}
        a.become("default")
        world.run(3.9 * D)
        acting(world, "a")
        _cut_off(world, "a")
        world.run(4 * D)


def bad_weather() -> None:
    """2 % loss and 50 ms jitter are no fault."""
    world = pair()
    world.loss, world.tail = 0.02, 0.25
    world.run(200)
    record = world.register.record
    if record is None or record.epoch != 1:
        world.fail(f"a change of role: {record}")


def forced_while_cut_off() -> None:
    """A person gives the key to the shadow while the old primary is alone and cut off."""
    for seed in range(5):
        world = pair(seed)
        world.blocked |= {("a", "b"), ("b", "a")}
        world.run(2 * D)
        expect(world, holder="a", epoch=1, mode=p.Mode.ALONE)
        world.blocked |= {("a", "w"), ("w", "a")}
        world.run(0.1)
        world.forced.add(2)
        world.nodes["b"].take(p.Force())
        world.run(4 * D)
        expect(world, holder="b", epoch=2, mode=p.Mode.ALONE)
        acting(world, "b")


def forced_in_vain() -> None:
    """A person's word does not reach the coordinator; long after that the line is whole again."""
    for alone in (True, False):
        world = pair()
        world.blocked |= {("a", "b"), ("b", "a")}
        if alone:  # else the shadow still takes itself for protected
            world.run(2 * D)
            expect(world, holder="a", epoch=1, mode=p.Mode.ALONE)
        _cut_off(world, "b")
        world.run(0.1)
        world.nodes["b"].take(p.Force())
        world.run(60)
        expect(world, holder="a", epoch=1, mode=p.Mode.ALONE)
        acting(world, "a")
        world.heal()
        world.settle(6 * D)
        expect(world, holder="a", epoch=1)


def forced_before_a_return() -> None:
    """The same, and the lost primary comes back later, with the record as it was."""
    world = pair()
    world.nodes["b"].crash()
    world.run(2 * D)
    world.nodes["a"].crash()
    world.nodes["b"].start()
    world.run(2 * D)
    world.register.frozen |= {"a", "b", "w"}
    world.nodes["b"].take(p.Force())
    world.run(60)
    world.nodes["a"].start()
    world.heal()
    world.settle(6 * D)
    expect(world, holder="a", epoch=1)


def forced_late() -> None:
    """A person's word is committed long after it was withdrawn: it still waits for the longest D.

    The primary has a longer one than the new holder has ever heard of.
    """
    for seed in range(5):
        world = pair(seed, profile="lan-fast")
        world.blocked |= {("a", "b"), ("b", "a")}
        world.run(2 * D)
        world.nodes["a"].become("wan")
        world.run(2 * D)
        world.register.late = p.WRITE_DOWN + 1
        world.forced.add(2)
        world.nodes["b"].take(p.Force())
        world.run(0.1)
        world.register.late = p.WRITE_DOWN + 2
        world.run(p.WRITE_DOWN + 0.7)
        _cut_off(world, "a")
        world.run(4 * D)
        expect(world, holder="b", epoch=2, mode=p.Mode.ALONE)
        acting(world, "b")


def _cut_off(world: World, name: str) -> None:
    for other in {"a", "b", "w"} - {name}:
        world.blocked |= {(name, other), (other, name)}


def shorter_at_the_shadow() -> None:
    """The shadow has a shorter profile than the primary, which is cut off."""
    for seed in range(5):
        world = pair(seed, profile="wan")
        world.nodes["b"].become("lan-fast")
        world.run(4 * D)
        expect(world, holder="a", epoch=1)
        _cut_off(world, "a")
        world.run(4 * D)
        expect(world, holder="b", epoch=2, mode=p.Mode.ALONE)


def shorter_at_the_primary() -> None:
    """The same at the primary; it renews with the new one, hears no answer, and dies.

    Its ports stay open for as long as the right that it had before.
    """
    _shorter_at_the_primary(starts=False)


def shorter_at_the_primary_and_a_start() -> None:
    """The same, and the shadow's process starts again after that."""
    _shorter_at_the_primary(starts=True)


def _shorter_at_the_primary(*, starts: bool) -> None:
    for seed in range(5):
        world = pair(seed, profile="wan")
        world.nodes["b"].become("lan-fast")
        world.run(4 * D)
        world.blocked.add(("b", "a"))
        world.nodes["a"].become("lan-fast")
        world.run(0.5)
        world.nodes["a"].crash()
        if starts:
            world.nodes["b"].become("lan-fast")
        world.run(4 * D)
        expect(world, holder="b", epoch=2, mode=p.Mode.ALONE)


def shadow_starts_unheard() -> None:
    """A shadow starts with a shorter profile, and its primary is cut off by then."""
    for seed in range(5):
        world = pair(seed, profile="wan")
        _cut_off(world, "a")
        world.nodes["b"].become("lan-fast")
        world.run(4 * D)
        expect(world, holder="b", epoch=2, mode=p.Mode.ALONE)


def forced_with_a_shorter_one() -> None:
    """A person gives the key to the shadow; the lonely primary has got a longer D since."""
    for seed in range(5):
        world = pair(seed, profile="lan-fast")
        world.blocked |= {("a", "b"), ("b", "a")}
        world.run(2 * D)
        world.nodes["a"].become("wan")
        world.run(2 * D)
        expect(world, holder="a", epoch=1, mode=p.Mode.ALONE)
        acting(world, "a")
        _cut_off(world, "a")
        world.run(0.1)
        world.forced.add(2)
        world.nodes["b"].take(p.Force())
        world.run(4 * D)
        expect(world, holder="b", epoch=2, mode=p.Mode.ALONE)
        acting(world, "b")


def paused() -> None:
    """While paused nothing happens by itself; afterwards it does."""
    world = pair()
    world.nodes["b"].take(p.Pause(True))
    world.run(1)
    world.nodes["a"].crash()
    world.run(10 * D)
    expect(world, holder="a", epoch=1)
    world.nodes["b"].take(p.Pause(False))
    world.run(2 * D)
    expect(world, holder="b", epoch=2, mode=p.Mode.ALONE)


def switchover() -> float:
    """A planned change: return for how long nothing was acknowledged."""
    world = pair()
    a = world.nodes["a"]
    a.take(p.Switch("b"))
    a.take(p.Drained())
    world.run(2)
    expect(world, holder="b", epoch=2)
    acting(world, "b")
    return world.longest_gap


def switchover_to_the_dying() -> None:
    """The candidate dies half-way: the former primary takes the key back."""
    world = pair()
    a = world.nodes["a"]
    a.take(p.Switch("b"))
    a.take(p.Drained())
    world.run(0.0021)
    world.nodes["b"].crash()
    world.run(4 * D)
    record = world.register.record
    if record is None or record.holder != "a":
        world.fail(f"{record}")
    acting(world, "a")


def limit() -> None:
    """A fourth automatic change within an hour waits."""
    world = pair(max_changes=3)
    for holder, other in (("a", "b"), ("b", "a"), ("a", "b")):
        world.nodes[holder].crash()
        world.run(3 * D)
        world.nodes[holder].start()
        world.settle(6 * D)
        expect(world, holder=other)
    world.nodes["b"].crash()
    world.run(10 * D)
    expect(world, holder="b", epoch=4)
    if world.nodes["a"].state.phase is not p.Phase.HELD:
        world.fail(world.nodes["a"].state.cause)
    world.nodes["a"].wall_offset += 3600
    world.run(D)
    expect(world, holder="a", epoch=5, mode=p.Mode.ALONE)
