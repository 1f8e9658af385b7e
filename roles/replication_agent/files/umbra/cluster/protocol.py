"""The protocol of a group with a witness: a pure function of (state, event, time), without I/O.

One key per group names the holder, its epoch, the mode and the protected set; it changes by
compare-and-set only. docs/architecture.md ("The protocol with a witness") has the argument why two
nodes never act at once. The rules, by the names of the functions that hold them:

1. ``may_acknowledge``: a 250 or OK needs every protected shadow's durable copy under this epoch, or
   a committed ``alone``.
2. ``refusal`` and ``Persist``: a node takes nothing of a lower epoch than it has seen, and an epoch
   is on disk before the services open.
3. ``silent_enough``: a protected shadow takes over when it has heard nothing for D: its own or the
   primary's, which each renewal carries, whichever is longer (``patience``).
4. ``unanswered``: the primary leaves a silent shadow behind by compare-and-set, sooner than D.
5. ``basis``: the answers of all who could take over extend the primary's right, and need no
   quorum; a primary that nobody answers needs the key.
6. ``Timing.hold``: the right counts from the sending of what was answered, and is shorter than D.
7. ``proven``: no renewal without a recent proof that the node can do its work.
8. Only what a committed transaction showed (``Seen``) is decided upon.
9. A record is believed in the cluster only in which it was written, and never under a lower epoch
   than this node has seen: what voters have from a snapshot gives nobody a right (``Vacancy``).

What is unresolved counts as possible: a compare-and-set without an answer may be committed now,
later or never, so the node does only what the known record and all pending ones allow. A node that
starts has forgotten what it asked for: it acts only when the key was written since (``settled``).

All times are seconds on one CLOCK_BOOTTIME of the node, except ``wall``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

from umbra.epoch import epoch_of

NEVER = float("-inf")
HOUR = 3600.0
WRITE_DOWN = 10.0
"""What a person wants, and the coordinator has not written down after so long, is withdrawn."""


class Mode(StrEnum):
    """What the key says of the holder."""

    PROTECTED = "protected"
    ALONE = "alone"
    HANDOVER = "handover"  # given by the former holder; the new one has not confirmed it yet


class Phase(StrEnum):
    """What a node is doing now."""

    STARTING = "starting"  # has not seen the key yet: closed
    SYNCING = "syncing"  # a shadow that lacks something
    READY = "ready"  # a shadow in the protected set
    CANDIDATE = "candidate"  # asked for the key; answers no primary until the outcome is known
    PROMOTING = "promoting"  # holds the key; not open yet
    PRIMARY = "primary"
    DRAINING = "draining"  # still primary; takes no new work
    DEMOTING = "demoting"  # offered the key to another; closed until the outcome is known
    FENCED = "fenced"  # holds the key without a right that is still running: closed
    REJOINING = "rejoining"  # was primary; what only it has is not reconciled yet
    HELD = "held"  # waits for a person


class Policy(StrEnum):
    """When a shadow may take over by itself."""

    AUTOMATIC = "automatic"
    SAME_SITE_ONLY = "same_site_only"
    BLOCKED = "blocked"

    def allows(self, site: str | None, own: str) -> bool:
        """Whether a shadow at ``own`` may take over by itself from a primary at ``site``."""
        return self is Policy.AUTOMATIC or (self is Policy.SAME_SITE_ONLY and site == own)


class Member(NamedTuple):
    """A store, not only a name: a node that comes back with an emptied disk is another member."""

    node: str
    storage: str


@dataclass(frozen=True)
class Record:
    """The value of the group's key.

    :param storage: the holder's store; the same node with another store has no right.
    :param protected: who has everything that was acknowledged. Empty exactly when ``alone``.
    :param paused: nobody takes over by itself. An overlay, so that a pause loses no mode.
    :param automatic: wall clock times of the last changes that no person asked for. A wall clock
        that jumps can delay or allow one change, never make two primaries.
    :param forced: the epoch of the last holder whom a person promoted though it did not have
        everything that was acknowledged, 0 for none.
    """

    holder: str
    storage: str
    epoch: int
    mode: Mode
    protected: frozenset[Member] = frozenset()
    paused: bool = False
    automatic: tuple[float, ...] = ()
    forced: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the value as it stands in the key."""
        return {
            "holder": self.holder,
            "storage": self.storage,
            "epoch": self.epoch,
            "mode": self.mode.value,
            "protected": dict(sorted(self.protected)),
            "paused": self.paused,
            "automatic": list(self.automatic),
            "forced": self.forced,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        """Read what ``to_json`` wrote. KeyError, TypeError or ValueError if it makes no sense."""
        record = cls(
            holder=str(value["holder"]),
            storage=str(value["storage"]),
            epoch=epoch_of(value["epoch"]),
            mode=Mode(value["mode"]),
            protected=frozenset(Member(str(n), str(s)) for n, s in value["protected"].items()),
            paused=bool(value["paused"]),
            automatic=tuple(float(at) for at in value["automatic"]),
            forced=epoch_of(value.get("forced", 0)),  # a key from before this was noted
        )
        if (record.mode is Mode.ALONE) is bool(record.protected):
            raise ValueError(f"mode {record.mode} with {len(record.protected)} protected shadows")
        return record


@dataclass(frozen=True)
class Timing:
    """All times of a profile, in seconds.

    :param silence: D, after which a protected shadow takes over.
    :param hold: for how long an answer extends the primary's right, from the sending of its
        request: 0.7 to 0.8 of D.
    :param miss: silence after which the primary leaves a shadow behind, sooner than D.
    :param beat: pause between renewals, and between reads of the key.
    :param call: time-out of one request to the coordinator.
    :param work: the age at which a proof of work no longer counts.
    :param stagger: by so much a shadow waits longer for each step of its preference.
    """

    silence: float
    hold: float
    miss: float
    beat: float
    call: float
    work: float
    stagger: float

    @property
    def round_trip(self) -> float:
        """The longest round trip between hosts that this is safe for.

        One lost answer leaves no shadow behind (two beats and a round trip are over before
        ``miss``), and a transaction fits into its time-out: from a voter that does not lead to the
        leader, to a majority and back is two round trips, and another member may have to be asked.
        """
        return min(self.miss - 2 * self.beat, self.call / 4)

    def findings(self, round_trip: float) -> list[str]:
        """Return why this is not safe or not sound for a round trip of so many seconds."""
        found = []
        if not 0.7 * self.silence <= self.hold <= 0.8 * self.silence:
            found.append(f"hold {self.hold:g} s is not 0.7 to 0.8 of silence {self.silence:g} s.")
        if self.miss + 2 * self.call > self.silence:
            found.append("a primary could not go alone before its shadow takes over.")
        if round_trip > self.round_trip:
            found.append(
                f"the round trip of {1000 * round_trip:.0f} ms is over the"
                f" {1000 * self.round_trip:.0f} ms that it is safe for."
            )
        return found


PROFILES: Mapping[str, Timing] = {
    "lan-fast": Timing(1.5, 1.1, 0.65, 0.2, 0.3, 1.5, 0.5),
    "default": Timing(2.5, 1.9, 1.2, 0.4, 0.4, 2.5, 0.8),
    "wan": Timing(6.0, 4.5, 3.0, 1.0, 0.5, 5.0, 1.5),
}
LONGEST = max(timing.silence for timing in PROFILES.values())
"""D of a primary that has not said its own."""


def profile_findings(name: str, round_trip: float) -> list[str]:
    """Return why a profile does not fit a measured round trip (seconds), and which would."""
    found = PROFILES[name].findings(round_trip)
    if not found:
        return []
    fits = [other for other, timing in PROFILES.items() if not timing.findings(round_trip)]
    advice = (
        f"Set replication_agent_profile to {fits[0]}."
        if fits
        else "No profile fits; set replication_agent_coordinator to static, or find a shorter line."
    )
    return [f"Profile {name}: {finding} {advice}" for finding in found]


@dataclass(frozen=True)
class Config:
    """What the inventory says of this node.

    :param peers: the other mail hosts, with their sites.
    :param preference: 0 takes over first.
    :param initial: this node makes the key of a group that never had one.
    """

    node: str
    site: str
    peers: Mapping[str, str]
    timing: Timing
    policy: Policy = Policy.AUTOMATIC
    preference: int = 0
    initial: bool = False
    max_changes: int = 3


@dataclass(frozen=True)
class Durable:
    """What is on disk.

    :param epoch: the highest epoch seen; 0 on a new store.
    :param acted: the last epoch under which this node opened its services; 0 once reconciled.
    :param silence: the longest D of a primary whose renewals this node has answered lately.
    """

    storage: str
    epoch: int = 0
    acted: int = 0
    silence: float = LONGEST


@dataclass(frozen=True)
class Joining:
    """A shadow that is brought into the protected set.

    :param since: when it began; the answer to ``Join`` names it, so that an old one counts nothing.
    :param complete: it has everything.
    """

    storage: str
    since: float
    complete: bool = False


@dataclass(frozen=True)
class Answer:
    """The last renewal that a peer answered: its sending, and under which epoch."""

    sent: float
    epoch: int
    storage: str


@dataclass(frozen=True)
class Vacancy:
    """The voters have no key to believe: they were made anew, or restored from a snapshot.

    A snapshot does not know what happened after it: its protected shadows may lack something, and
    its holder may have been replaced. So a person says who is primary.

    :param cluster: the cluster that says so.
    :param revision: the revision to write over; 0 if there is no key at all.
    :param restored: what the snapshot says.
    """

    cluster: str
    revision: int
    restored: Record | None

    def __str__(self) -> str:
        if self.restored is None:
            return "the coordinator has no key of this group"
        return (
            "the voters were restored from a snapshot or made anew, and their key does not count:"
            f" {self.restored.holder} with epoch {self.restored.epoch}"
        )


@dataclass(frozen=True)
class State:
    """Everything that decisions are made of.

    :param cluster: in which ``known`` was seen.

    :param revision: of ``known`` in the coordinator; 0 while there is no key.
    :param read_sent: when the last request was sent whose answer showed ``known``.
    :param pending: what this node asked to write over ``revision`` and has no outcome of.
    :param settled: what this node asked for before it started is committed or void: the key has
        been written since it first saw it.
    :param heard: when this node last answered a holder's renewal, or booted.
    :param waits_until: this node takes over from nobody before.
    :param former_until: what it answered before it started counts until then.
    :param longest: the longest D of a primary whose renewals it has answered since.
    :param lost: peers that could not take something since they joined, and when that was.
    :param not_before: a new holder does not open sooner.
    """

    node: str
    durable: Durable
    heard: float
    waits_until: float
    former_until: float
    longest: float = 0.0
    known: Record | None = None
    revision: int = 0
    read_sent: float = NEVER
    cluster: str = ""
    vacancy: Vacancy | None = None
    pending: frozenset[Record] = frozenset()
    settled: bool = False
    asked_at: float = NEVER
    beat_at: float = NEVER
    worked: float = NEVER
    holding_since: float = NEVER
    not_before: float = NEVER
    answers: Mapping[str, Answer] = field(default_factory=dict)
    joining: Mapping[str, Joining] = field(default_factory=dict)
    lost: Mapping[str, float] = field(default_factory=dict)
    switching: str | None = None
    switch_automatic: bool = False
    drained: bool = False
    switch_until: float = NEVER
    forced: bool = False
    forced_until: float = NEVER
    pause: bool | None = None
    pause_until: float = NEVER
    phase: Phase = Phase.STARTING
    cause: str = "the node has started"


def boot(node: str, durable: Durable, now: float) -> State:
    """Return the state of a node that starts: fenced until the key says otherwise.

    It may have answered a renewal just before.
    """
    until = now + durable.silence
    return State(node, durable, heard=now, waits_until=until, former_until=until)


# -- events


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Nudged:
    """A peer says that the key has changed. Only a reason to read it at once."""


@dataclass(frozen=True)
class Seen:
    """A committed transaction, sent at ``sent``, showed this record (None: there is no key).

    :param cluster: the cluster that showed it.
    :param restored: a record that was written in another cluster, instead of ``record``.
    """

    sent: float
    revision: int
    record: Record | None
    cluster: str = ""
    restored: Record | None = None


@dataclass(frozen=True)
class Asked:
    """A peer asks something under ``epoch``. The answer is ``Reply``.

    :param silence: D of the peer if this is a renewal, which keeps this node from taking over;
        None for any other request.
    """

    peer: str
    epoch: int
    silence: float | None


@dataclass(frozen=True)
class Answered:
    """A peer accepted the renewal that was sent at ``sent`` under ``epoch``."""

    peer: str
    sent: float
    epoch: int
    storage: str


@dataclass(frozen=True)
class Superseded:
    """A peer refused because it has seen this higher epoch."""

    epoch: int


@dataclass(frozen=True)
class Worked:
    """A proof of work that began at ``at`` has succeeded."""

    at: float


@dataclass(frozen=True)
class Join:
    """From now on everything waits for this peer too, while the rest is copied to it."""

    peer: str
    storage: str


@dataclass(frozen=True)
class Complete:
    """A peer that joins since ``since`` has everything."""

    peer: str
    since: float


@dataclass(frozen=True)
class Lost:
    """A peer could not take something that waits for it: go on without it, by the key."""

    peer: str


@dataclass(frozen=True)
class Reconciled:
    """What only this node had from its time as primary has been dealt with."""


@dataclass(frozen=True)
class Switch:
    """Another primary is wanted: by a person, or by this node itself (``automatic``)."""

    to: str
    automatic: bool = False


@dataclass(frozen=True)
class Drained:
    """Nothing is in flight any more."""


@dataclass(frozen=True)
class Pause:
    """A person wants automatic changes off, or on again."""

    on: bool


@dataclass(frozen=True)
class Force:
    """A person makes this node primary and accepts what may be lost.

    :param stores: the store of each peer that was heard of, by its name.
    """

    stores: Mapping[str, str] = field(default_factory=dict)


Event = (
    Tick | Nudged | Seen | Asked | Answered | Superseded | Worked | Join | Complete | Lost
    | Reconciled | Switch | Drained | Pause | Force
)  # fmt: skip


# -- effects, to be carried out in their order; dying between two must be harmless


@dataclass(frozen=True)
class Persist:
    """Make this durable. Nothing that follows happens if it fails."""

    durable: Durable


@dataclass(frozen=True)
class Reply:
    """Answer the request; ``refused`` says why not."""

    refused: str | None


@dataclass(frozen=True)
class Renew:
    """Send a renewal under ``epoch`` to every peer."""

    epoch: int


@dataclass(frozen=True)
class Read:
    """Read the key, linearizably."""


@dataclass(frozen=True)
class Swap:
    """Write ``record`` if the key's revision still is ``revision``."""

    revision: int
    record: Record


@dataclass(frozen=True)
class Nudge:
    """Tell this peer that the key has changed."""

    peer: str


@dataclass(frozen=True)
class Open:
    """Open the services: this node is primary."""

    epoch: int


@dataclass(frozen=True)
class Close:
    """Close the services."""


Effect = Persist | Reply | Renew | Read | Swap | Nudge | Open | Close


class NotNow(Exception):
    """A person's wish cannot be granted; one sentence for people."""


# -- the rules


def holds(state: State) -> bool:
    """Whether the key names this node, with this store, as far as it knows."""
    known = state.known
    return known is not None and (known.holder, known.storage) == (
        state.node,
        state.durable.storage,
    )


def possible(state: State) -> frozenset[Record]:
    """Return every record that may be the committed one, as far as this node knows."""
    return state.pending | {state.known} if state.known else state.pending


def acting_under(state: State, record: Record) -> bool:
    """Whether ``record`` makes this node, with this store, the one that acts (rule 2's disk)."""
    return (
        (record.holder, record.storage) == (state.node, state.durable.storage)
        and record.mode is not Mode.HANDOVER
        and record.epoch == state.durable.epoch == state.durable.acted
    )


def basis(config: Config, state: State, record: Record) -> float:
    """Return the time from which the right under ``record`` counts (rules 5 and 6).

    Every protected shadow can take over, so each must have answered. Alone, only a person can have
    given the key to another: the key tells, or every other node, since none answers once it has
    asked for the key.
    """
    if record.protected:
        return min(_answer_sent(state, member, record.epoch) for member in record.protected)
    answers = [state.answers.get(peer) for peer in config.peers]
    sent = [a.sent if a and a.epoch == record.epoch else NEVER for a in answers]
    return max(state.read_sent, min(sent, default=NEVER))


def right_until(config: Config, state: State) -> float:
    """Return until when this node may act."""
    records = possible(state)
    if not (records and state.settled and all(acting_under(state, r) for r in records)):
        return NEVER
    return min(basis(config, state, record) for record in records) + config.timing.hold


def required(state: State) -> frozenset[str]:
    """Return the peers that must have a message or change before it is acknowledged."""
    members = {member.node for record in possible(state) for member in record.protected}
    return frozenset(members | state.joining.keys())


def may_act(config: Config, state: State, now: float) -> bool:
    """Whether this node is primary at ``now``."""
    return now < right_until(config, state)


def may_acknowledge(
    config: Config, state: State, now: float, epoch: int, stored_by: Collection[str]
) -> bool:
    """Whether what ``stored_by`` have stored under ``epoch`` may be acknowledged (rule 1)."""
    return (
        may_act(config, state, now)
        and epoch == state.durable.epoch
        and required(state) <= set(stored_by)
    )


def refusal(state: State, epoch: int) -> str | None:
    """Return why a request under ``epoch`` is refused, or None (rule 2)."""
    seen = state.durable.epoch
    if not seen:
        return "this store is new and has not seen the key yet"
    if epoch < seen:
        return f"epoch {epoch} is over; here it is {seen}"
    if epoch == seen and any(record.holder == state.node for record in possible(state)):
        return "this node holds the key, or has asked for it"
    return None


def patience(config: Config, state: State, now: float, silence: float) -> float:
    """Return until when this node waits after it has heard a primary with D ``silence`` (rule 3).

    The two may have different profiles while one is being changed. What an earlier renewal was
    answered with still holds: the right that it extended runs on when D has become shorter.
    """
    return max(state.waits_until, now + max(config.timing.silence, silence))


def silent_enough(config: Config, state: State, now: float) -> bool:
    """Whether the primary has been silent for D, and this node's turn has come (rule 3).

    The key was read after the silence, so the coordinator answers: an outage of it makes no
    candidate, who would have to refuse a primary that comes back.
    """
    turn = state.waits_until + config.preference * config.timing.stagger
    return now >= turn and state.read_sent >= state.waits_until


def expects_the_role(config: Config, state: State, now: float, wall: float) -> bool:
    """Whether this node takes over soon, unless it hears of the primary.

    Half-way between the silence after which a primary that lives leaves this node behind, which the
    key shows then, and the one after which this node takes over. Not without the coordinator: then
    it takes over nothing, however long that lasts.
    """
    known = state.known
    return (
        known is not None
        and state.phase in (Phase.READY, Phase.CANDIDATE)
        and entitled(state, known)
        and now - state.heard >= (config.timing.miss + config.timing.silence) / 2
        and now - state.read_sent < config.timing.silence
        and hindrance(config, known, wall) is None
    )


def entitled(state: State, record: Record) -> bool:
    """Whether this node has everything that was acknowledged (rule 3)."""
    member = Member(state.node, state.durable.storage)
    return member in record.protected and record.epoch >= state.durable.epoch


def hindrance(config: Config, record: Record, wall: float) -> str | None:
    """Return why this node may not take over without a person, or None."""
    if config.policy.allows(config.peers.get(record.holder), config.site):
        return restraint(config, record, wall)
    if config.policy is Policy.BLOCKED:
        return f"{config.node} is blocked from taking over by itself"
    return f"{config.node} takes over by itself only within its site"


def restraint(config: Config, record: Record, wall: float) -> str | None:
    """Return why nothing may be changed without a person, on any node, or None."""
    if record.paused:
        return "automatic failover is paused"
    # A stamp of the future, by a clock that was set back since, must not count for ever.
    if sum(abs(wall - at) < HOUR for at in record.automatic) >= config.max_changes:
        return f"the primary has changed {config.max_changes} times within an hour"
    return None


def by_itself(was: Record, record: Record) -> bool:
    """Whether ``record``, written over ``was``, is a change that no person asked for: it counts."""
    return record.automatic != was.automatic


def proven(config: Config, state: State, now: float) -> bool:
    """Whether this node has recently shown that it can do its work (rule 7)."""
    return now - state.worked <= config.timing.work


def unanswered(config: Config, state: State, record: Record, now: float) -> frozenset[Member]:
    """Return the protected shadows that are to be left behind (rule 4).

    They have been silent for too long, or could not take something. That may be this node's own
    fault, a disk that fails here: so it has to have done its work since, or the only node that
    could take over would be left out by the one that has to be replaced.
    """
    return frozenset(
        member
        for member in record.protected
        if (
            state.worked >= state.lost[member.node]
            if member.node in state.lost
            else now - max(_answer_sent(state, member, record.epoch), state.holding_since)
            >= config.timing.miss
        )
    )


def _answer_sent(state: State, member: Member, epoch: int) -> float:
    answer = state.answers.get(member.node)
    if answer is None or (answer.epoch, answer.storage) != (epoch, member.storage):
        return NEVER
    return answer.sent


# -- the step


def step(
    config: Config, state: State, event: Event, now: float, wall: float
) -> tuple[State, list[Effect]]:
    """Return the state after ``event`` and what is to be done, in this order.

    NotNow if a person's wish cannot be granted; then nothing has changed.
    """
    effects: list[Effect] = []
    state = _take(config, state, event, now, wall, effects)
    return _settle(config, state, now, wall, effects), effects


def _take(
    config: Config, state: State, event: Event, now: float, wall: float, effects: list[Effect]
) -> State:
    match event:
        case Tick():
            return state
        case Nudged():
            return replace(state, beat_at=NEVER)
        case Seen():
            return _seen(config, state, event, now, effects)
        case Asked():
            return _asked(config, state, event, now, effects)
        case Answered(peer, sent, epoch, storage):
            if peer in state.lost and any(peer in _names(r) for r in possible(state)):
                # It lacks something, and nobody has written that down: what only this node has
                # must not be acknowledged on the word of the one that would take over without it.
                return state
            old = state.answers.get(peer)
            if old is not None and (old.epoch, old.sent) >= (epoch, sent):
                return state
            return replace(state, answers={**state.answers, peer: Answer(sent, epoch, storage)})
        case Superseded(epoch):
            return _learn(state, epoch, effects)
        case Worked(at):
            return replace(state, worked=max(state.worked, at))
        case Join(peer, storage):
            joining = {**state.joining, peer: Joining(storage, now)}
            if not holds(state):
                return state
            return replace(state, joining=joining, lost=_without(state.lost, peer))
        case Complete(peer, since):
            join = state.joining.get(peer)
            if join is None or join.since != since:
                return state
            return replace(state, joining={**state.joining, peer: replace(join, complete=True)})
        case Lost(peer):
            joining = {name: join for name, join in state.joining.items() if name != peer}
            return replace(state, joining=joining, lost={peer: now, **state.lost})
        case Reconciled():
            if state.durable.acted and not holds(state):
                return _persist(state, replace(state.durable, acted=0), effects)
            return state
        case Switch():
            return _switch(config, state, event, now, wall)
        case Drained():
            return replace(state, drained=state.switching is not None)
        case Pause(on):
            return replace(state, pause=on, pause_until=now + WRITE_DOWN)
        case Force(stores):
            return _force(state, stores, now)


def _persist(state: State, durable: Durable, effects: list[Effect]) -> State:
    if durable == state.durable:
        return state
    effects.append(Persist(durable))
    return replace(state, durable=durable)


def _without(lost: Mapping[str, float], peer: str) -> Mapping[str, float]:
    return {name: at for name, at in lost.items() if name != peer}


def _learn(state: State, epoch: int, effects: list[Effect]) -> State:
    return _persist(state, replace(state.durable, epoch=max(epoch, state.durable.epoch)), effects)


def _asked(config: Config, state: State, event: Asked, now: float, effects: list[Effect]) -> State:
    refused = refusal(state, event.epoch)
    if refused is None:
        durable = replace(state.durable, epoch=max(event.epoch, state.durable.epoch))
        if event.silence is not None:
            # On disk before the answer: who dies after it waits for as long after the next start.
            durable = replace(durable, silence=_remembered(state, now, event.silence))
            waits_until = patience(config, state, now, event.silence)
            longest = max(state.longest, event.silence)
            state = replace(state, heard=now, waits_until=waits_until, longest=longest)
        state = _persist(state, durable, effects)
    effects.append(Reply(refused))
    return state


def _remembered(state: State, now: float, silence: float) -> float:
    former = state.durable.silence if now < state.former_until else 0.0
    return max(former, state.longest, silence)


def _seen(config: Config, state: State, seen: Seen, now: float, effects: list[Effect]) -> State:
    record = seen.record
    if record is None:
        return replace(state, vacancy=Vacancy(seen.cluster, seen.revision, seen.restored))
    if state.known is not None and seen.cluster != state.cluster:
        # These voters count from a person's word on, which is over what this node has known. The
        # former ones have lost their quorum for good, and with it what was pending there.
        if record.epoch <= state.known.epoch:
            return replace(state, vacancy=Vacancy(seen.cluster, seen.revision, record))
        state = replace(state, revision=0, pending=frozenset())
    if seen.revision < state.revision:
        return state  # an answer that was overtaken
    read_sent = max(state.read_sent, seen.sent)
    if seen.revision == state.revision:
        return replace(state, read_sent=read_sent)
    was = state.known
    mine = record in state.pending and (was is None or by_itself(was, record))
    # Whatever was pending was asked over an older revision: it is this record, or void.
    state = replace(
        state, known=record, revision=seen.revision, read_sent=read_sent, pending=frozenset(),
        cluster=seen.cluster, vacancy=None, asked_at=NEVER, beat_at=NEVER,
        settled=state.settled or was is not None,
    )  # fmt: skip
    if state.switching and not (holds(state) and _names(record) & {state.switching}):
        state = replace(state, switching=None, drained=False)
    if state.pause is record.paused:
        state = replace(state, pause=None)
    is_new = was is None or record.epoch > was.epoch
    if not holds(state):
        if was is not None and was.holder == state.node:
            effects.append(Nudge(record.holder))
        # A person's word was given on who was primary, and had everything, at that time. Whoever
        # changes that since is there, and acts.
        stands = was is not None and not is_new and record.protected == was.protected
        state = replace(
            state, joining={}, lost={}, holding_since=NEVER,
            forced=state.forced and stands,
        )  # fmt: skip
        resumed = was is not None and was.paused and not record.paused
        if is_new or resumed:
            # It has its D before anybody calls it silent: a new one, and one whose agent was
            # restarted under a pause that has ended before it is heard again.
            waits_until = patience(config, state, now, config.timing.silence)
            state = replace(state, heard=now if is_new else state.heard, waits_until=waits_until)
        return _learn(state, record.epoch, effects)
    if is_new:
        gate = _gate(state, record, mine, now)
        state = replace(state, holding_since=now, not_before=gate, forced=False)
    kept = {
        name: join
        for name, join in state.joining.items()
        if Member(name, join.storage) not in record.protected
    }
    return _learn(replace(state, joining=kept), record.epoch, effects)


def _gate(state: State, record: Record, mine: bool, now: float) -> float:
    """Return when a holder may open: when no former one can have a right any more.

    A handover was written by the former holder itself after it had stopped; a node that opened
    under this epoch before it restarted has waited already. A right that this node's answers
    extended ends before it takes over. In any other case (a person's word, a candidate that died
    before it knew the outcome) this node only knows that nobody's right was extended after the
    commit, and not what D the former holder had by then.
    """
    if record.mode is Mode.HANDOVER or record.epoch == state.durable.acted:
        return now
    return state.waits_until if mine else now + LONGEST


def _names(record: Record) -> set[str]:
    return {member.node for member in record.protected}


def _switch(config: Config, state: State, event: Switch, now: float, wall: float) -> State:
    known, to = state.known, event.to
    if known is None or not may_act(config, state, now):
        raise NotNow(f"{state.node} is {state.phase}, not an open primary")
    if to not in _names(known):
        raise NotNow(f"{to} is not protected, so it may lack something")
    if state.pending:
        raise NotNow("another change of the group's key is under way; try again")
    if event.automatic and (reason := restraint(config, known, wall)) is not None:
        raise NotNow(reason)
    until = now + config.timing.silence
    return replace(
        state, switching=to, switch_automatic=event.automatic, drained=False, switch_until=until
    )


def unforceable(state: State, stores: Mapping[str, str]) -> str | None:
    """Return why a person cannot make this node primary, or None.

    :param stores: see ``Force``. One that is not the member's has nothing, and its answers extend
        no right.
    """
    known = state.known
    if known is None:
        return "the coordinator does not answer; a forced failover needs it too"
    if holds(state):
        return f"{state.node} holds the key already"
    others = sorted(
        name
        for name, storage in known.protected
        if name != state.node and stores.get(name, storage) == storage
    )
    if others:
        # With one of these the primary may go on without a quorum.
        return f"{', '.join(others)} has everything that was acknowledged; promote that one"
    return None


def _force(state: State, stores: Mapping[str, str], now: float) -> State:
    reason = unforceable(state, stores)
    if reason is not None:
        raise NotNow(reason)
    return replace(state, forced=True, forced_until=now + WRITE_DOWN)


def _settle(config: Config, state: State, now: float, wall: float, effects: list[Effect]) -> State:
    """Do what the state wants at this time."""
    was_open = state.phase in (Phase.PRIMARY, Phase.DRAINING)
    known = state.known
    state = _drop_joiners(config, state, now)
    if state.switching and now >= state.switch_until:
        state = replace(state, switching=None, drained=False)
    if state.forced and now >= state.forced_until:
        state = replace(state, forced=False)
    if state.pause is not None and now >= state.pause_until:
        state = replace(state, pause=None)
    if (
        known is not None
        and holds(state)
        and known.mode is not Mode.HANDOVER
        and known.epoch == state.durable.epoch > state.durable.acted
        and now >= state.not_before
    ):
        state = _persist(state, replace(state.durable, acted=known.epoch), effects)
    state = _ask_for(config, state, now, wall, effects)
    phase, cause = _phase(config, state, now, wall)
    is_open = phase in (Phase.PRIMARY, Phase.DRAINING)
    if phase is not state.phase or cause != state.cause:
        state = replace(state, phase=phase, cause=cause)
    if was_open and not is_open:
        effects.append(Close())
    if is_open and not was_open:
        effects.append(Open(state.durable.epoch))
    # A read as soon as the silence is over keeps the pause between beats out of the outage.
    over = state.beat_at < state.waits_until <= now
    if now - state.beat_at >= config.timing.beat or over:
        state = replace(state, beat_at=now)
        # What it could not do for clients it does not claim to its shadows either.
        if (
            holds(state)
            and known is not None
            and known.epoch == state.durable.epoch
            and proven(config, state, now)
        ):
            effects.append(Renew(known.epoch))
        effects.append(Read())
    return state


def _drop_joiners(config: Config, state: State, now: float) -> State:
    if not state.joining:
        return state
    kept = {}
    for name, join in state.joining.items():
        sent = _answer_sent(state, Member(name, join.storage), state.durable.epoch)
        if now - max(sent, join.since) < config.timing.miss:
            kept[name] = join
    return replace(state, joining=kept) if len(kept) < len(state.joining) else state


def _ask_for(config: Config, state: State, now: float, wall: float, effects: list[Effect]) -> State:
    if now - state.asked_at < config.timing.call:
        return state
    wish = _wish(config, state, now, wall)
    if wish is None and (state.pending or (holds(state) and not state.settled)):
        wish = state.known  # writing what is there resolves what is pending
    if wish is None:
        return state
    effects.append(Swap(state.revision, wish))
    return replace(state, pending=state.pending | {wish}, asked_at=now)


def _wish(config: Config, state: State, now: float, wall: float) -> Record | None:
    """Return the record that this node wants instead of the known one, or None."""
    known = state.known
    if known is None:
        # Rule 8 holds for the first record too: the coordinator has said that there is no key.
        if _never_was(config, state):
            return Record(config.node, state.durable.storage, 1, Mode.ALONE)
        return None
    wish = None
    if holds(state):
        if known.epoch == state.durable.epoch:
            wish = _wish_of_holder(config, state, known, now, wall)
    elif state.forced:
        epoch = max(known.epoch, state.durable.epoch) + 1
        wish = replace(
            known, holder=state.node, storage=state.durable.storage, epoch=epoch,
            mode=Mode.ALONE, protected=frozenset(),
            forced=known.forced if entitled(state, known) else epoch,
        )  # fmt: skip
    elif _takes_over(config, state, known, now) and hindrance(config, known, wall) is None:
        wish = replace(
            known, holder=state.node, storage=state.durable.storage, epoch=known.epoch + 1,
            mode=Mode.ALONE, protected=frozenset(),
            automatic=(*known.automatic, wall)[-config.max_changes:],
        )  # fmt: skip
        # A retry must ask for the same record, whatever the wall clock says by now.
        wish = next((r for r in state.pending if r.holder == state.node), wish)
    if wish is None and state.pause is not None and state.pause is not known.paused:
        wish = replace(known, paused=state.pause)
    return wish


def _never_was(config: Config, state: State) -> bool:
    """Whether this node is to make the key of a new group."""
    vacant = state.vacancy is not None and state.vacancy.restored is None
    return vacant and config.initial and not state.durable.epoch


def _takes_over(config: Config, state: State, known: Record, now: float) -> bool:
    return (
        known.epoch == state.durable.epoch
        and entitled(state, known)
        and silent_enough(config, state, now)
    )


def _wish_of_holder(
    config: Config, state: State, known: Record, now: float, wall: float
) -> Record | None:
    if known.mode is Mode.HANDOVER:
        return replace(known, mode=Mode.PROTECTED)
    if not proven(config, state, now):
        return None  # a node that cannot work leaves it to the others
    if state.drained and state.switching:
        to = next(member for member in known.protected if member.node == state.switching)
        me = Member(state.node, state.durable.storage)
        automatic = (*known.automatic, wall)[-config.max_changes :]
        wish = replace(
            known, holder=to.node, storage=to.storage, epoch=known.epoch + 1,
            mode=Mode.HANDOVER, protected=known.protected - {to} | {me},
            automatic=automatic if state.switch_automatic else known.automatic,
        )  # fmt: skip
        # As in a takeover: a retry asks for the same record.
        return next((r for r in state.pending if r.holder == to.node), wish)
    silent = unanswered(config, state, known, now)
    joined = {Member(name, join.storage) for name, join in state.joining.items() if join.complete}
    protected = known.protected - silent | joined
    if protected == known.protected:
        return None
    mode = Mode.PROTECTED if protected else Mode.ALONE
    return replace(known, protected=protected, mode=mode)


def _phase(config: Config, state: State, now: float, wall: float) -> tuple[Phase, str]:
    known = state.known
    if known is None:
        if state.vacancy is not None and not _never_was(config, state):
            return Phase.HELD, str(state.vacancy)
        return Phase.STARTING, "the key has not been seen yet"
    if known.holder != state.node:
        return _phase_of_shadow(config, state, known, now, wall)
    if known.storage != state.durable.storage:
        return Phase.HELD, "the key is that of another store of this node"
    if known.epoch < state.durable.epoch:
        return Phase.FENCED, f"another node acts under epoch {state.durable.epoch}"
    if state.durable.acted < known.epoch:
        return Phase.PROMOTING, f"epoch {known.epoch} is this node's"
    if any(record.holder != state.node for record in state.pending):
        return Phase.DEMOTING, f"the key is offered to {state.switching or 'another node'}"
    if not state.settled:
        return Phase.FENCED, "the key must be written once after the start of the agent"
    if not may_act(config, state, now):
        needs = "a protected shadow's answer" if known.protected else "the coordinator's answer"
        return Phase.FENCED, f"the right to act has run out; it needs {needs}"
    if state.switching:
        return Phase.DRAINING, f"a switchover to {state.switching}"
    return Phase.PRIMARY, f"{known.mode}"


def _phase_of_shadow(
    config: Config, state: State, known: Record, now: float, wall: float
) -> tuple[Phase, str]:
    if any(record.holder == state.node for record in state.pending):
        return Phase.CANDIDATE, f"{known.holder} is silent"
    if not entitled(state, known):
        if state.durable.acted:
            return Phase.REJOINING, f"{known.holder} took over from epoch {state.durable.acted}"
        if known.epoch < state.durable.epoch:
            return (
                Phase.SYNCING,
                f"the key is of epoch {known.epoch}; {state.durable.epoch} is over it",
            )
        others = ", ".join(sorted(member.node for member in known.protected))
        if others:
            return Phase.SYNCING, f"{known.holder} waits for {others}; this node follows"
        return Phase.SYNCING, f"{known.holder} has not taken this node into the protected set"
    if silent_enough(config, state, now):
        reason = hindrance(config, known, wall)
        if reason is not None:
            return Phase.HELD, f"{known.holder} is silent, but {reason}"
    return Phase.READY, f"{known.holder} is primary"
