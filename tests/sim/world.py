"""The simulated world in which the real protocol runs.

Everything is decided by one seed. Time is real time of an outside observer; each node has a clock
of its own that runs at its own rate. The coordinator is one compare-and-set register that a
majority of its members must reach; requests and answers to it are delayed and lost like all
messages, so that outcomes stay unknown, and a request may be committed long after its caller gave
up.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from umbra.cluster import protocol as p
from umbra.cluster.etcd import LATE

TIMING = p.PROFILES["default"]
D = TIMING.silence


class Violation(AssertionError):
    """An invariant did not hold; the message has the seed."""


@dataclass
class Layers:
    """Safety that can be switched off, so that what it masks is seen."""

    deadline: bool = True  # the primary's right ends
    introductions: bool = True  # a new primary's renewals reach the former one


@dataclass
class Op:
    number: int
    epoch: int
    stored: dict[str, float] = field(default_factory=dict)


class Node:
    """One mail host: the protocol's state, a disk and a clock."""

    def __init__(
        self, world: World, name: str, *, initial: bool, sites: dict[str, str], profile: str
    ) -> None:
        self.world = world
        self.name = name
        self.config = p.Config(
            node=name,
            site=sites[name],
            peers={n: s for n, s in sites.items() if n != name},
            timing=p.PROFILES[profile],
            initial=initial,
            preference=int(name == "c"),
            max_changes=world.max_changes,
        )
        self.durable = p.Durable(storage=f"{name}.0")
        self.data: set[int] = set()
        self.limbo: set[int] = set()
        self.up = False
        self.paused = False
        self.stalled = False
        self.life = 0
        self.waiting: list[Callable[[], None]] = []
        self.rate = 1.0
        self._base = (0.0, world.random.uniform(0, 1000))
        self.wall_offset = 0.0
        self.state = p.boot(name, self.durable, self.now())
        self.copying: dict[str, float] = {}
        self.endpoint = 0
        self.lease = p.NEVER

    def now(self) -> float:
        since, value = self._base
        return value + (self.world.time - since) * self.rate

    def run_at(self, rate: float) -> None:
        self._base = (self.world.time, self.now())
        self.rate = rate

    def wall(self) -> float:
        return self.world.time + self.wall_offset

    @property
    def timing(self) -> p.Timing:
        return self.config.timing

    @property
    def runs(self) -> bool:
        return self.up and not self.paused

    @property
    def is_open(self) -> bool:
        """Whether the kernel keeps the ports open, also for a process that is dead."""
        return self.now() < self.lease

    # -- life

    def start(self) -> None:
        self.up, self.paused, self.life = True, False, self.life + 1
        self.waiting.clear()
        self.copying.clear()
        self.state = p.boot(self.name, self.durable, self.now())
        self._every(self.timing.beat / 3, self._tick)
        self._every(self.timing.beat / 2, self._client)

    def crash(self) -> None:
        """The process dies; the kernel lives."""
        self.up = False
        self.life += 1
        self.waiting.clear()

    def become(self, profile: str) -> None:
        """The process starts again, with other times."""
        self.crash()
        self.config = replace(self.config, timing=p.PROFILES[profile])
        self.start()

    def wipe(self) -> None:
        self.crash()
        self.lease = p.NEVER
        self.data.clear()
        self.limbo.clear()
        number = int(self.durable.storage.split(".")[1]) + 1
        self.durable = p.Durable(storage=f"{self.name}.{number}")

    def pause(self) -> None:
        self.paused = self.up

    def thaw(self) -> None:
        if not self.paused:
            return
        self.paused = False
        queued, self.waiting = self.waiting, []
        # What waited in sockets and timers comes in any order.
        self.world.random.shuffle(queued)
        for call in queued:
            self.world.after(self.world.random.uniform(0, 0.01), self.guard(call))

    def guard(self, call: Callable[[], None]) -> Callable[[], None]:
        """Return ``call`` for this life of the process; while it is frozen the call waits."""
        life = self.life

        def guarded() -> None:
            if self.life != life or not self.up:
                return
            if self.paused:
                self.waiting.append(guarded)
            else:
                call()

        return guarded

    def _every(self, seconds: float, call: Callable[[], None]) -> None:
        def again() -> None:
            call()
            self.world.after(seconds / self.rate, self.guard(again))

        self.world.after(self.world.random.uniform(0, seconds), self.guard(again))

    # -- the shell

    def take(self, event: p.Event) -> None:
        state, effects = p.step(self.config, self.state, event, self.now(), self.wall())
        if state.phase is p.Phase.PRIMARY:
            self.lease = p.right_until(self.config, state)
        elif self.state.phase is p.Phase.PRIMARY:
            self.lease = p.NEVER
        self.state = state
        self.world.steps += 1
        for effect in effects:
            if self.world.crashing and self.world.random.random() < self.world.crashing:
                # Dying between any two effects must be harmless.
                self.crash()
                self.world.after(self.world.random.uniform(0.1, 3 * D), self.start)
                return
            self._carry_out(effect)

    def _carry_out(self, effect: p.Effect) -> None:
        world = self.world
        match effect:
            case p.Persist(durable):
                self.durable = durable
                if self.stalled:
                    self.pause()  # nothing goes on behind a write that hangs
            case p.Renew(epoch):
                if epoch > 1 and not world.layers.introductions:
                    return
                sent = self.now()
                for peer in self.config.peers:
                    world.send(self.name, peer, self._renewal(peer, epoch, sent))
            case p.Read():
                self._coordinate(None)
            case p.Swap(revision, record):
                self._coordinate((revision, record))
            case p.Nudge(peer):
                other = world.nodes[peer]
                world.send(self.name, peer, lambda: other.take(p.Nudged()))
            case p.Open():
                world.opened(self)
            case p.Close() | p.Reply():
                pass

    def _renewal(self, peer: str, epoch: int, sent: float) -> Callable[[], None]:
        silence = self.timing.silence

        def arrive() -> None:
            other = self.world.nodes[peer]
            refused = p.refusal(other.state, epoch)
            other.take(p.Asked(self.name, epoch, silence))
            if not other.up:
                return
            reply: p.Event = p.Answered(peer, sent, epoch, other.durable.storage)
            if refused is not None:
                if other.state.durable.epoch <= epoch:
                    return
                reply = p.Superseded(other.state.durable.epoch)
            self.world.send(peer, self.name, lambda: self.take(reply))

        return arrive

    def _coordinate(self, swap: tuple[int, p.Record] | None) -> None:
        """As ``etcd.Etcd`` does it: while nobody has answered, the next member is asked as well."""
        register, call = self.world.register, self.timing.call
        over = False

        def ask(member: int) -> None:
            if over:
                return
            sent = self.now()

            def answered(revision: int, record: p.Record | None) -> None:
                nonlocal over
                if not over and self.now() - sent <= call:
                    over = True
                    self.endpoint = member  # the next request goes there first
                    self.take(p.Seen(sent, revision, record))

            register.request(self, member, swap, answered)

        count = len(register.members)
        for late in range(count):
            member = (self.endpoint + late) % count
            since = sum(LATE / asked for asked in range(1, late + 1)) * call
            self.world.after(since, self.guard(functools.partial(ask, member)))

    def _tick(self) -> None:
        if not self.stalled:
            self.take(p.Worked(self.now()))
            if not self.runs:
                return
        self.take(p.Tick())
        if self.runs:
            self._copy()

    # -- replication: what the protocol decides on

    def acts(self) -> bool:
        if self.world.layers.deadline:
            return p.may_act(self.config, self.state, self.now())
        records = p.possible(self.state)
        return bool(records) and all(p.acting_under(self.state, r) for r in records)

    def _client(self) -> None:
        if not self.acts() or self.stalled or self.state.phase is p.Phase.DRAINING:
            return
        op = Op(next(self.world.numbers), self.state.durable.epoch)
        self.data.add(op.number)
        for peer in p.required(self.state):
            self.world.send(self.name, peer, self._store(peer, op))
        self._acknowledge(op)

    def _store(self, peer: str, op: Op) -> Callable[[], None]:
        def arrive() -> None:
            other = self.world.nodes[peer]
            if other.stalled:
                return
            refused = p.refusal(other.state, op.epoch)
            stale = op.epoch < max(other.state.durable.epoch, other.world.epoch_of(other))
            other.take(p.Asked(self.name, op.epoch, None))
            if refused is not None or not other.runs:
                return
            # What comes under an epoch that is over has missed the promotion.
            (other.limbo if stale else other.data).add(op.number)
            stored_at = self.world.time

            def stored() -> None:
                op.stored[peer] = stored_at
                self._acknowledge(op)

            self.world.send(peer, self.name, stored)

        return arrive

    def _acknowledge(self, op: Op) -> None:
        if op.number in self.world.acked:
            return
        if self.world.layers.deadline:
            may = p.may_acknowledge(self.config, self.state, self.now(), op.epoch, op.stored.keys())
        else:
            may = (
                self.acts()
                and op.epoch == self.state.durable.epoch
                and p.required(self.state) <= op.stored.keys()
            )
        if may:
            self.world.acknowledged(self, op)

    def _copy(self) -> None:
        """Bring shadows into the protected set, as catch-up does."""
        if self.state.phase is not p.Phase.PRIMARY or self.state.known is None:
            return
        members = {m.node for m in self.state.known.protected}
        for peer, answer in self.state.answers.items():
            fresh = self.now() - answer.sent < self.timing.miss
            join = self.state.joining.get(peer)
            late = join is not None and self.now() - join.since > self.timing.silence
            if join is not None and not join.complete and late:
                self.take(p.Lost(peer))
                return
            if peer in members or join is not None or not fresh:
                continue
            if answer.epoch != self.state.durable.epoch:
                continue
            self.take(p.Join(peer, answer.storage))
            if not self.runs or peer not in self.state.joining:
                return
            since, epoch = self.state.joining[peer].since, self.state.durable.epoch
            everything = frozenset(self.data)
            self.world.send(self.name, peer, self._copied(peer, since, epoch, everything))

    def _copied(
        self, peer: str, since: float, epoch: int, everything: frozenset[int]
    ) -> Callable[[], None]:
        storage = self.state.joining[peer].storage

        def arrive() -> None:
            other = self.world.nodes[peer]
            refused = p.refusal(other.state, epoch)
            if other.stalled or refused is not None or other.durable.storage != storage:
                return
            other.data |= everything
            other.take(p.Reconciled())
            if other.runs:
                self.world.send(peer, self.name, lambda: self.take(p.Complete(peer, since)))

        return arrive


class Register:
    """The key, kept by a majority of the members."""

    committed_reads = True  # else a member answers from what it has

    def __init__(self, world: World, members: list[str]) -> None:
        self.world = world
        self.members = members
        self.revision = 0
        self.record: p.Record | None = None
        self.frozen: set[str] = set()
        self.slow = 0.0
        self.late = 0.0  # a write that is asked for now is committed so much later
        self.applied: dict[str, tuple[int, p.Record | None]] = dict.fromkeys(members, (0, None))

    def lives(self, member: str) -> bool:
        node = self.world.nodes.get(member)
        if node is not None and (not node.runs or node.stalled):
            return False
        return member not in self.frozen and member not in self.world.hosts_down

    def quorum_of(self, member: str) -> list[str]:
        """Return the members that ``member`` can commit with, or nothing without a majority."""
        if not self.lives(member):
            return []
        world = self.world
        others = [
            m
            for m in self.members
            if m != member and self.lives(m) and world.passes(member, m) and world.passes(m, member)
        ]
        found = [member, *others]
        return found if len(found) > len(self.members) // 2 else []

    def request(
        self,
        node: Node,
        at: int,
        swap: tuple[int, p.Record] | None,
        answered: Callable[[int, p.Record | None], None],
    ) -> None:
        member = self.members[at]
        late = self.late if swap else 0.0

        def reply(revision: int, record: p.Record | None) -> None:
            self.world.send(member, node.name, lambda: answered(revision, record))

        def arrive() -> None:
            if not self.committed_reads and swap is None and self.lives(member):
                reply(*self.applied[member])
                return
            delay = late + self.world.random.expovariate(1 / 0.003)
            if self.slow and self.world.random.random() < 0.3:
                delay += self.world.random.uniform(0, self.slow)
            self.world.after(delay, commit)

        def commit() -> None:
            quorum = self.quorum_of(member)
            if not quorum:
                return
            if swap is not None and swap[0] == self.revision:
                self.revision += 1
                self.record = swap[1]
                self.world.committed(swap[1])
            for m in quorum:
                self.applied[m] = (self.revision, self.record)
            reply(self.revision, self.record)

        self.world.send(node.name, member, arrive)


class World:
    """Everything, and the invariants."""

    def __init__(
        self,
        seed: int,
        *,
        layers: Layers | None = None,
        nodes: int = 2,
        strict: bool = True,
        max_changes: int = 1000,
        profiles: Sequence[str] = ("default",),
    ) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.layers = layers or Layers()
        self.strict = strict
        self.max_changes = max_changes
        self.time = 0.0
        self.steps = 0
        self.crashing = 0.0
        self.numbers = itertools.count(1)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        names = ["a", "b", "c"][:nodes]
        sites = {name: f"site-{name}" for name in names}
        self.blocked: set[tuple[str, str]] = set()
        self.hosts_down: set[str] = set()
        self.loss = 0.0
        self.delay = 0.001
        self.tail = 0.0
        self.nodes = {
            n: Node(self, n, initial=n == "a", sites=sites, profile=self.random.choice(profiles))
            for n in names
        }
        self.register = Register(self, ["a", "b", "w"])
        self.acked: set[int] = set()
        self.acked_at = 0.0
        self.longest_gap = 0.0
        self.first: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.forced: set[int] = set()
        self.history: list[p.Record] = []

    # -- time and messages

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.time + seconds, next(self._order), call))

    def run(self, seconds: float) -> None:
        end = self.time + seconds
        while self._queue and self._queue[0][0] <= end:
            self.time, _, call = heapq.heappop(self._queue)
            call()
        self.time = end

    def passes(self, source: str, target: str) -> bool:
        return (source, target) not in self.blocked

    def send(self, source: str, target: str, arrive: Callable[[], None]) -> None:
        if source == target:
            self.after(0.0002, self._delivery(target, arrive))
            return
        if not self.passes(source, target) or self.random.random() < self.loss:
            return
        delay = self.delay * self.random.uniform(0.8, 1.5)
        if self.tail and self.random.random() < 0.2:
            delay += self.random.uniform(0, self.tail)
        self.after(delay, self._delivery(target, arrive))

    def _delivery(self, target: str, arrive: Callable[[], None]) -> Callable[[], None]:
        node = self.nodes.get(target)
        return arrive if node is None else node.guard(arrive)

    def epoch_of(self, node: Node) -> int:
        """Return the epoch under which ``node`` has opened, as the world knows it."""
        return self._opened.get(node.name, 0)

    # -- invariants

    _opened: dict[str, int]

    def fail(self, text: str) -> None:
        raise Violation(f"seed {self.seed}, {self.time:.3f} s: {text}")

    def committed(self, record: p.Record) -> None:
        if self.history and record.epoch < self.history[-1].epoch:
            self.fail(f"the key's epoch went back: {self.history[-1]} -> {record}")
        self.history.append(record)

    def opened(self, node: Node) -> None:
        epoch = node.state.durable.epoch
        self._opened[node.name] = epoch
        missing = self.acked - node.data
        if epoch in self.forced:
            self.acked -= missing  # a person accepted that
        elif missing:
            self.fail(f"{node.name} opens under epoch {epoch} and lacks {sorted(missing)[:5]}")

    def acknowledged(self, node: Node, op: Op) -> None:
        if self.strict:
            for other in self.nodes.values():
                if other is node:
                    continue
                if other.runs and other.acts():
                    self.fail(f"{node.name} acknowledges while {other.name} may act too")
                if other.is_open:
                    self.fail(f"{node.name} acknowledges while the ports of {other.name} are open")
        # It is decided when the last shadow has it, or alone when the primary says so.
        decided = max(op.stored.values(), default=self.time) if op.stored else self.time
        for epoch, first in self.first.items():
            if epoch > op.epoch and first <= decided:
                self.fail(f"{node.name} acknowledges under {op.epoch} after {epoch} has begun")
        for epoch, last in self.last.items():
            if epoch < op.epoch and last >= decided and self.strict:
                self.fail(f"{epoch} was acknowledged under after {op.epoch} has begun")
        self.first[op.epoch] = min(decided, self.first.get(op.epoch, decided))
        self.last[op.epoch] = max(decided, self.last.get(op.epoch, decided))
        self.acked.add(op.number)
        self.longest_gap = max(self.longest_gap, self.time - self.acked_at)
        self.acked_at = self.time

    def start(self) -> None:
        self._opened = {}
        for node in self.nodes.values():
            node.start()

    def primary(self) -> Node | None:
        return next((n for n in self.nodes.values() if n.runs and n.acts()), None)

    def heal(self) -> None:
        """End every fault."""
        self.blocked.clear()
        self.hosts_down.clear()
        self.register.frozen.clear()
        self.register.slow = 0.0
        self.loss, self.tail, self.delay, self.crashing = 0.0, 0.0, 0.001, 0.0
        for node in self.nodes.values():
            node.stalled = False
            if not node.up:
                node.start()
            node.thaw()

    def settle(self, seconds: float = 12 * D) -> None:
        """Wait; then there must be a primary that acknowledges, and a protected group."""
        self.run(seconds)
        node = self.primary()
        if node is None or self.time - self.acked_at > 2 * D:
            states = {n.name: (str(n.state.phase), n.state.cause) for n in self.nodes.values()}
            self.fail(f"no primary {seconds:g} s after the last fault: {states}")
        elif self.register.record is None or self.register.record.mode is not p.Mode.PROTECTED:
            self.fail(f"not protected {seconds:g} s after the last fault: {self.register.record}")
