"""The decisions: a pure function of (state, event), without I/O or clock.

The rules (docs/architecture.md, "Roles, modes, epochs"):

1. A node that learns of a higher epoch has no right to act: it becomes a shadow, whatever it was.
2. A primary that starts is closed until every reason to doubt is gone: a peer of no higher epoch
   answered, or its own disk says that it was
   alone, in which case no other could have been promoted without a person's word.
3. A primary that starts was dead for a while, so it does not know what its shadow has: it is alone
   until the copies were compared.
4. To hand over, the right is given up on disk first. It is taken back only after the other, still a
   shadow, has durably seen a higher epoch than the
   one it was offered; had it taken over, it keeps the right under an epoch that is higher still.
5. Two primaries of one epoch are a defect or a cloned disk: both close and wait for a person.

The caller makes ``durable`` durable before it acts on the new state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from umbra.cluster.state import Change, Durable, Mode, PeerView, Phase, Role, State


@dataclass(frozen=True)
class Started:
    """The agent has read its state."""


@dataclass(frozen=True)
class PeerSeen:
    """A peer said this of itself.

    :param answered: it answered a request of ours; one that only asks us may not hear us.
    :param handing_to: whom it has offered the role and does not know the outcome.
    """

    peer: str
    epoch: int
    role: Role
    phase: Phase
    storage_id: str
    answered: bool
    handing_to: str | None = None


@dataclass(frozen=True)
class PeerLost:
    """A peer is silent or failed to take something."""

    peer: str
    reason: str


@dataclass(frozen=True)
class Unmirrored:
    """Mailbox changes are acknowledged from now on that ``peer`` lacks; it is not to blame."""

    peer: str
    reason: str


@dataclass(frozen=True)
class CatchingUp:
    """From now on changes wait for ``peer`` again, while the rest is copied."""

    peer: str


@dataclass(frozen=True)
class CaughtUp:
    """``peer`` has everything."""

    peer: str


@dataclass(frozen=True)
class Drain:
    """Take no new work: a switchover has begun."""


@dataclass(frozen=True)
class DrainAborted:
    """The switchover was given up before the right was."""


@dataclass(frozen=True)
class GiveUp:
    """Give the right to act to ``to``. Nothing is in flight any more."""

    to: str
    at: str


@dataclass(frozen=True)
class TakenOver:
    """The other has taken the right under ``change``."""

    change: Change


@dataclass(frozen=True)
class Promote:
    """Become primary under ``epoch``.

    By a handover (protected) or by an operator's word (alone).
    """

    epoch: int
    change: Change
    protected: bool


@dataclass(frozen=True)
class Opened:
    """The services are open again after a change.

    Clients were without them for so long (seconds).
    """

    outage_s: float


@dataclass(frozen=True)
class Merged:
    """The primary has brought its mailboxes and this node's together."""


@dataclass(frozen=True)
class Reclaim:
    """Take the right back: first step, raise the epoch over the one that was offered."""


@dataclass(frozen=True)
class OpenByForce:
    """An operator's word that no other node acts: open although no peer confirms it."""

    at: str


Event = (
    Started | PeerSeen | PeerLost | Unmirrored | CatchingUp | CaughtUp | Drain | DrainAborted
    | GiveUp | TakenOver | Promote | Opened | Merged | Reclaim | OpenByForce
)  # fmt: skip


class NotNow(Exception):
    """The event does not fit the state; one sentence for people."""


def step(state: State, event: Event) -> State:
    """Return the state after ``event``.

    NotNow if an operator's or a peer's wish cannot be granted.
    """
    match event:
        case Started():
            return _started(state)
        case PeerSeen():
            return _peer_seen(state, event)
        case PeerLost(peer, reason):
            return _peer_lost(state, peer, reason)
        case Unmirrored(peer, reason):
            return _unmirrored(state, peer, reason)
        case CatchingUp(peer):
            return _synchronous(state, peer)
        case CaughtUp(peer):
            return _caught_up(state, peer)
        case Drain():
            return _drain(state)
        case DrainAborted():
            return replace(state, phase=Phase.PRIMARY) if state.phase is Phase.DRAINING else state
        case GiveUp(to, at):
            if state.phase is not Phase.DRAINING:
                raise NotNow(f"{state.node} is {state.phase}, not draining")
            view = state.peers.get(to)
            if view is None or not (view.synchronous and view.complete):
                raise NotNow(f"{to} was lost on the way")
            durable = replace(
                state.durable,
                role=Role.SHADOW,
                since=at,
                handing_to=to,
                offered=state.durable.epoch + 1,
                merged=True,
            )
            return replace(_nobody_synchronous(state), durable=durable, phase=Phase.HANDING_OVER)
        case TakenOver(change):
            if state.phase is not Phase.HANDING_OVER:
                raise NotNow(f"{state.node} is {state.phase}, not handing over")
            durable = replace(
                state.durable, epoch=state.durable.offered, handing_to=None, last_change=change
            )
            return replace(state, durable=durable, phase=Phase.SHADOW)
        case Promote():
            return _promote(state, event)
        case Opened(outage_s):
            if state.durable.last_change is None or not state.serving:
                return state
            measured = replace(state.durable.last_change, outage_s=outage_s)
            return replace(state, durable=replace(state.durable, last_change=measured))
        case Merged():
            return replace(state, durable=replace(state.durable, merged=True, unshared=True))
        case Reclaim():
            if state.phase is not Phase.HANDING_OVER:
                raise NotNow(f"{state.node} is {state.phase}, not handing over")
            raised = max(state.durable.epoch, state.durable.offered + 1)
            return replace(state, durable=replace(state.durable, epoch=raised))
        case OpenByForce(at):
            return _open_by_force(state, at)


def _started(state: State) -> State:
    durable = state.durable
    if durable.handing_to is not None:
        return replace(state, phase=Phase.HANDING_OVER)
    if durable.role is Role.SHADOW:
        return replace(state, phase=Phase.SHADOW)
    if durable.mode is Mode.ALONE:
        return _open(state, "it was alone when its agent stopped")
    return replace(state, phase=Phase.STARTING)


def _peer_seen(state: State, seen: PeerSeen) -> State:
    mine, mode = state.durable.epoch, state.durable.mode
    old = state.peers.get(seen.peer, PeerView())
    # Another store under the same name has nothing of what the former one had.
    same_store = old.storage_id in ("", seen.storage_id)
    view = PeerView(
        reachable=old.reachable or seen.answered,
        epoch=seen.epoch,
        role=seen.role,
        phase=seen.phase,
        storage_id=seen.storage_id,
        synchronous=old.synchronous and same_store and seen.role is Role.SHADOW,
        complete=old.complete and same_store and seen.role is Role.SHADOW,
        reason="" if seen.answered else old.reason,
    )
    state = replace(state, peers={**state.peers, seen.peer: view})
    if old.synchronous and not view.synchronous:
        state = _alone(
            state,
            f"{seen.peer} has another store than before"
            if not same_store
            else f"{seen.peer} is no shadow",
        )
    if seen.epoch > mine:
        return _superseded(state, seen, mode)
    if seen.epoch == mine and seen.role is Role.PRIMARY and state.durable.role is Role.PRIMARY:
        reason = (
            f"{seen.peer} is primary under the same epoch {mine}; a person must decide who stays"
        )
        return replace(_nobody_synchronous(state), phase=Phase.HELD, held_reason=reason)
    if state.phase is Phase.STARTING and seen.role is Role.SHADOW and seen.answered:
        return _open(state, "the agent has just started and compares the copies")
    if state.phase is Phase.HANDING_OVER and seen.peer == state.durable.handing_to:
        return _outcome(state, seen)
    return state


def _outcome(state: State, seen: PeerSeen) -> State:
    """Tell what became of an offer by what its receiver says of itself."""
    if seen.role is Role.PRIMARY and seen.epoch >= state.durable.epoch:
        return _superseded(state, seen, state.durable.mode)
    if seen.role is Role.SHADOW and seen.epoch > state.durable.offered:
        # Rule 4: it has durably seen the raised epoch, so it refuses the offer if that is still on
        # its way.
        durable = replace(state.durable, role=Role.PRIMARY, handing_to=None)
        return _open(replace(state, durable=durable), "a handover was taken back")
    return state


def _superseded(state: State, seen: PeerSeen, mode: Mode) -> State:
    """End this node's right. ``mode``: in which it acknowledged last."""
    if state.serving and seen.role is Role.SHADOW and seen.phase is Phase.HANDING_OVER:
        # It offered us the right, we took it, and the answer was lost: it only asks for the
        # outcome. Say it under an epoch that it accepts.
        return replace(state, durable=replace(state.durable, epoch=seen.epoch + 1))
    if seen.phase is Phase.HANDING_OVER and seen.handing_to not in (None, state.node):
        # Its raised epoch is a question to another. Repeated here, it would end that one's right.
        return state
    durable = replace(state.durable, epoch=max(seen.epoch, state.durable.epoch))
    if durable.role is Role.SHADOW and not (durable.handing_to and seen.role is Role.PRIMARY):
        return replace(state, durable=durable)
    # Rule 1. A right that was lost, not handed over, may have left changes that are only here.
    handed_over = state.durable.role is Role.SHADOW
    # Whoever was promoted has what this node acknowledged, if all others had to have that.
    shared = mode is Mode.PROTECTED and state.others <= state.copies
    durable = replace(
        durable, role=Role.SHADOW, mode=Mode.PROTECTED, handing_to=None, merged=handed_over,
        unshared=not shared,
    )  # fmt: skip
    return replace(_nobody_synchronous(state), durable=durable, phase=Phase.SHADOW)


def _peer_lost(state: State, peer: str, reason: str) -> State:
    old = state.peers.get(peer, PeerView())
    view = replace(old, reachable=False, synchronous=False, complete=False, reason=reason)
    state = replace(state, peers={**state.peers, peer: view})
    return _alone(state, f"{peer}: {reason}") if old.synchronous else state


def _unmirrored(state: State, peer: str, reason: str) -> State:
    old = state.peers.get(peer, PeerView())
    if not state.serving or not old.complete:
        return state
    state = replace(state, peers={**state.peers, peer: replace(old, complete=False)})
    return _alone(state, reason)


def _alone(state: State, reason: str) -> State:
    """Leave the protected mode if too few shadows are left that have everything."""
    if state.durable.role is not Role.PRIMARY or state.enough:
        return state
    return replace(state, durable=replace(state.durable, mode=Mode.ALONE), alone_reason=reason)


def _open(state: State, reason: str) -> State:
    return replace(
        state,
        phase=Phase.PRIMARY,
        durable=replace(state.durable, epoch=max(state.durable.epoch, 1), mode=Mode.ALONE),
        alone_reason=reason,
        held_reason="",
    )


def _nobody_synchronous(state: State) -> State:
    return replace(
        state,
        peers={
            name: replace(view, synchronous=False, complete=False)
            for name, view in state.peers.items()
        },
    )


def _synchronous(state: State, peer: str) -> State:
    view = state.peers.get(peer, PeerView())
    if state.phase is not Phase.PRIMARY or not view.reachable or view.role is not Role.SHADOW:
        raise NotNow(
            f"{peer} cannot be waited for: {view.reason or f'{state.node} is {state.phase}'}"
        )
    return replace(state, peers={**state.peers, peer: replace(view, synchronous=True)})


def _caught_up(state: State, peer: str) -> State:
    view = state.peers.get(peer, PeerView())
    if state.phase is not Phase.PRIMARY or not view.synchronous:
        raise NotNow(f"{peer} was lost while it caught up")
    state = replace(state, peers={**state.peers, peer: replace(view, complete=True)})
    if not state.enough:
        return state
    return replace(state, durable=replace(state.durable, mode=Mode.PROTECTED), alone_reason="")


def _drain(state: State) -> State:
    if state.phase is not Phase.PRIMARY:
        raise NotNow(f"{state.node} is {state.phase}, not an open primary")
    if state.durable.mode is not Mode.PROTECTED:
        raise NotNow(f"the group is degraded: {state.alone_reason}")
    return replace(state, phase=Phase.DRAINING)


def _promote(state: State, event: Promote) -> State:
    if state.phase not in (Phase.SHADOW, Phase.HELD):
        raise NotNow(f"{state.node} is {state.phase}, not a shadow")
    if event.epoch <= state.durable.epoch:
        raise NotNow(
            f"epoch {event.epoch} is not over {state.durable.epoch}, which {state.node} has seen"
        )
    durable = Durable(
        storage_id=state.durable.storage_id,
        epoch=event.epoch,
        role=Role.PRIMARY,
        mode=Mode.ALONE,
        since=event.change.at,
        last_change=event.change,
        marked=state.durable.marked,
    )
    peers = dict(state.peers)
    if event.protected:
        # The old primary gave up after its last change was here: it has all that we have.
        old = peers.get(event.change.old, PeerView())
        peers[event.change.old] = replace(
            old,
            reachable=True,
            role=Role.SHADOW,
            phase=Phase.SHADOW,
            synchronous=True,
            complete=True,
        )
    state = replace(
        state,
        durable=durable,
        peers=peers,
        phase=Phase.PRIMARY,
        alone_reason="the other shadows are compared after the change of primary"
        if event.protected
        else f"promoted by an operator; {event.change.old} was lost",
        held_reason="",
    )
    if not state.enough:
        return state
    return replace(state, durable=replace(durable, mode=Mode.PROTECTED), alone_reason="")


def _open_by_force(state: State, at: str) -> State:
    if state.phase not in (Phase.STARTING, Phase.HANDING_OVER, Phase.HELD):
        raise NotNow(
            f"{state.node} is {state.phase}; only a node that waits can be opened by force"
        )
    # +2 is over everything that this node may have offered to another.
    durable = replace(
        state.durable, epoch=state.durable.epoch + 2, role=Role.PRIMARY, since=at, handing_to=None
    )
    return _open(
        replace(_nobody_synchronous(state), durable=durable), "opened by an operator's word"
    )
