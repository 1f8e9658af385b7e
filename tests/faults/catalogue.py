"""The faults, as a table: what is done, what undoes it, how long it stands, what must become of it.

Nothing is ever to be lost or doubled, so the table does not say that. ``heals`` says how long after
the recovery the group may take until it is protected again by itself; ``moves`` whether another
node is primary then (None: either). docs/faults.md is made of the same names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.faults import actions as do
from tests.faults.actions import (
    AGENT,
    DOVECOT,
    HELPER,
    POSTFIX,
    Action,
    follower,
    primary,
    shadow,
    witness,
)
from tests.faults.load import RATE


@dataclass(frozen=True)
class Fault:
    """One row. Times are seconds; ``stands`` is a range from which each trial draws.

    :param refuses: for how long at most no message may be taken; None for as long as it lasts.
    :param unsure: in an answer: whoever gets it does not know. The message may be there.
    :param rate: messages a second, and changes.
    :param settles: for how long at most something may be in transit when the load has ended.
    :param changes: False where only messages can be held to it: a primary's Dovecot says OK to a
        change of flags that finds no room, and forgets it.
    """

    name: str
    inject: tuple[Action, ...]
    recover: tuple[Action, ...] = ()
    stands: tuple[float, float] = (0.5, 1.5)
    heals: float = 15.0
    moves: bool | None = False
    before: tuple[Action, ...] = ()
    after: tuple[Action, ...] = ()
    refuses: float | None = None
    unsure: str = ""
    rate: float = RATE
    changes: bool = True
    settles: float = 20.0


def _parts(unit: str, word: str, names: tuple[str, ...], side: do.Side) -> list[Fault]:
    return [
        Fault(
            f"{word} {'master' if name == word else name} killed, {side.__name__}",
            (do.killed(unit, name, side),),
        )
        for name in names
    ]


FAULTS: tuple[Fault, ...] = (
    # Processes. systemd or their master starts them again.
    *(
        Fault(f"{word} killed, {side.__name__}", (do.main_killed(unit, side),))
        for word, unit in (("agent", AGENT), ("helper", HELPER))
        for side in (primary, shadow)
    ),
    *_parts(
        POSTFIX, "postfix",
        ("master", "qmgr", "cleanup", "trivial-rewrite", "smtpd", "lmtp"), primary,
    ),
    *_parts(DOVECOT, "dovecot", ("dovecot", "auth", "lmtp", "doveadm-server"), primary),
    *_parts(DOVECOT, "dovecot", ("dovecot", "doveadm-server"), shadow),
    *(
        Fault(f"agent killed five times, {side.__name__}", (do.storm(AGENT, side, 5),))
        for side in (primary, shadow)
    ),
    *(
        # Longer than every time-out of the other side (5 s). The watchdog hears of the agent each
        # 5 s and ends one that is silent for 10, so sometimes it comes first.
        Fault(
            f"agent stopped, {side.__name__}",
            (do.signalled(AGENT, "STOP", side),),
            (do.continued(AGENT, side),),
            stands=(5.5, 7.5),
        )
        for side in (primary, shadow)
    ),
    *(
        # systemd ends it after ten seconds; a primary's ports close a moment before that.
        Fault(
            f"helper stopped, {side.__name__}", (do.signalled(HELPER, "STOP", side),),
            stands=(11.0, 13.0), heals=30,
        )
        for side in (primary, shadow)
    ),
    # Hosts.
    Fault(
        "power cut, shadow", (do.power_cut(shadow),), (do.power_back(shadow),),
        stands=(1.0, 3.0), heals=30,
    ),
    Fault(
        "power cut and failover, primary",
        (do.power_cut(primary),),
        (do.failed_over, do.power_back(primary)),
        heals=30, moves=True, after=(do.held_queue_dropped,),
    ),
    Fault(
        "power cut and back, primary", (do.power_cut(primary),), (do.power_back(primary),),
        stands=(0.1, 3.0), heals=30,
    ),
    Fault(
        "both power cut", (do.power_cut(primary), do.power_cut(shadow)),
        (do.both_back,), heals=30,
    ),
    *(
        Fault(
            f"frozen, {side.__name__}", (do.frozen(side),), (do.thawed(side),), stands=(2.5, 6.0),
        )
        for side in (primary, shadow)
    ),
    Fault(
        "frozen and failover, primary",
        (do.frozen(primary),),
        (do.failed_over, do.thawed(primary)),
        heals=30, moves=True, after=(do.held_queue_dropped,),
    ),
    # The link between the sites.
    Fault("link cut", (do.wan_cut,), (do.wan_healed,), stands=(1.0, 5.0)),
    Fault(
        "link loses 20 %", (do.wan_set(loss=20),), (do.wan_set(loss=0),), stands=(4.0, 7.0),
        heals=30,
    ),
    Fault(
        "link of 256 kbit/s", (do.wan_set(rate=256),), (do.wan_set(rate=0),), stands=(4.0, 7.0),
        heals=30,
    ),
    # The disk.
    *(
        Fault(
            f"disk full, {name}, {side.__name__}", (disk.filled(side),), (disk.emptied(side),),
            stands=(2.0, 4.0), heals=30, before=(disk.small(side),), after=(disk.large(side),),
            changes=(disk, side) != (do.MAIL, primary),
        )
        for name, disk, side in (
            ("store", do.STORE, shadow), ("mail", do.MAIL, primary),
            ("mail", do.MAIL, shadow), ("queue", do.QUEUE, primary),
        )
    ),
    *(
        Fault(
            f"disk stalls, {side.__name__}",
            (do.disk("stall", side),), (do.disk("release", side),),
            stands=(2.0, 6.0), heals=30,
        )
        for side in (primary, shadow)
    ),
    # Settings of the transport: policy, time-out, safety net.
    *(
        Fault(
            f"settings changed, {side.__name__}",
            (do.reconfigured(side),), (do.configured(side),), heals=30,
        )
        for side in (primary, shadow)
    ),
    # Changes of primary.
    Fault("switchover", (do.switched_over,), moves=True),
    *(
        Fault(
            f"agent killed in a switchover, {side.__name__}",
            (do.switchover_begun, do.main_killed(AGENT, side)),
            heals=30, moves=None, after=(do.held_queue_dropped,),
        )
        for side in (primary, shadow)
    ),
)  # fmt: skip

WITNESS: tuple[Fault, ...] = (
    Fault(
        "power cut, primary, taken over", (do.power_cut(primary),),
        (do.taken_over, do.power_back(primary)),
        heals=60, moves=True, after=(do.held_queue_dropped,),
    ),
    Fault(
        "frozen, primary, taken over", (do.frozen(primary),), (do.taken_over, do.thawed(primary)),
        heals=60, moves=True, after=(do.held_queue_dropped,),
    ),
    Fault(
        "agent stopped, primary, taken over", (do.signalled(AGENT, "STOP", primary),),
        (do.taken_over, do.continued(AGENT, primary)),
        heals=60, moves=True, after=(do.held_queue_dropped,),
    ),
    Fault(
        "helper stopped, primary, taken over", (do.signalled(HELPER, "STOP", primary),),
        (do.taken_over,), heals=60, moves=True, after=(do.held_queue_dropped,),
    ),
    Fault(
        "power cut, shadow, with a witness", (do.power_cut(shadow),), (do.power_back(shadow),),
        stands=(3.0, 6.0), heals=60,
    ),
    Fault(
        "link cut, both see the witness", (do.wan_cut,), (do.wan_healed,), stands=(4.0, 8.0),
        heals=60,
    ),
    Fault(
        # Only by the third voter the primary can write down that it goes on alone.
        "link cut, shadow with etcd's leader", (do.wan_cut,), (do.wan_healed,), stands=(4.0, 8.0),
        heals=60, before=(do.leader(shadow),),
    ),
    Fault(
        "voters frozen", (do.voters("STOP"),), (do.voters("CONT"),), stands=(5.0, 15.0), heals=30,
    ),
    Fault(
        # Far enough apart to have greeted in between: a handover, not a takeover. The former
        # primary forgets the crashes when its agent starts anew; else it would hand back, later.
        "dovecot crashes again and again, primary",
        (
            do.killed(DOVECOT, "dovecot", primary), do.paused(4.0),
            do.killed(DOVECOT, "dovecot", primary),
        ),
        (do.handed_over,),
        heals=60, moves=True, after=(do.restarted(AGENT, shadow),),
    ),
    Fault(
        # The small disk is made while its node is shadow: that restarts the agent. Some room is
        # left: without any, a change of flags lives in memory, says OK and has dsync crash.
        "disk nearly full, mail, primary", (do.MAIL.filled(primary, left_mib=8),),
        (do.handed_over, do.MAIL.emptied(primary)),
        heals=60, moves=True,
        before=(do.MAIL.small(shadow), do.switched_over), after=(do.MAIL.large(shadow),),
    ),
    Fault(
        "clients do not reach the primary", (do.clients_cut(primary),),
        (do.handed_over, do.clients_back(primary)), heals=60, moves=True,
    ),
    Fault(
        "disk stalls, primary, taken over", (do.disk("stall", primary),),
        (do.taken_over, do.disk("release", primary)),
        heals=60, moves=True, after=(do.held_queue_dropped,),
    ),
    Fault(
        "disk stalls, shadow, with a witness", (do.disk("stall", shadow),),
        (do.disk("release", shadow),),
        stands=(4.0, 8.0), heals=60,
    ),
    Fault(
        # The shadow has it, and then Postfix cannot write it down: nobody is left to say so.
        "disk fails, primary, taken over", (do.disk("fail", primary),),
        (do.taken_over, do.power_cut(primary), do.power_back(primary)),
        heals=60, moves=True, after=(do.held_queue_dropped,), unsure="queue file write error",
    ),
    Fault(
        "disk fails, shadow", (do.disk("fail", shadow),),
        (do.power_cut(shadow), do.power_back(shadow)),
        stands=(4.0, 8.0), heals=60,
    ),
    Fault(
        "power cut, primary with etcd's leader, taken over", (do.power_cut(primary),),
        (do.taken_over, do.power_back(primary)),
        heals=60, moves=True, before=(do.leader(primary),), after=(do.held_queue_dropped,),
    ),
    Fault(
        "shadow, then primary cut, shadow back first",
        (do.power_cut(shadow), do.alone, do.power_cut(primary)),
        (do.power_back(shadow), do.not_taken_over(8.0), do.power_back(primary)), heals=60,
    ),
    Fault(
        "both power cut, with a witness", (do.power_cut(primary), do.power_cut(shadow)),
        (do.both_back,),
        heals=60, moves=None, after=(do.held_queue_dropped,),
    ),
    Fault(
        "cut off from shadow and witness, primary, taken over", (do.cut_off(primary),),
        (do.taken_over, do.all_ways_healed),
        heals=60, moves=True, after=(do.held_queue_dropped,),
    ),
    *(
        Fault(
            f"one-way loss, from {side.__name__}", (do.cut_one_way(side),), (do.all_ways_healed,),
            stands=(4.0, 8.0), heals=60, moves=None, after=(do.held_queue_dropped,),
        )
        for side in (primary, shadow)
    ),
    Fault("link flaps ten times", (do.link_flaps,), heals=60),
    Fault(
        "link loses 30 %, with a witness", (do.wan_set(loss=30),), (do.wan_set(loss=0),),
        stands=(8.0, 12.0), heals=60, moves=None, after=(do.held_queue_dropped,),
    ),
    Fault(
        "line of 200 ms, with a witness", (do.wan_set(delay=100),),
        (do.wan_set(delay=do.DELAY_MS),),
        stands=(8.0, 12.0), heals=60, moves=None, after=(do.held_queue_dropped,),
    ),
    Fault("power cut, witness", (do.power_cut(witness),), (do.power_back(witness),), heals=60),
    Fault(
        "voters frozen for a minute", (do.voters("STOP"),), (do.voters("CONT"),),
        stands=(60.0, 60.0), heals=30, refuses=0.5,
    ),
    Fault(
        "voters frozen, then shadow power cut", (do.voters("STOP"), do.power_cut(shadow)),
        (do.voters("CONT", primary, witness), do.power_back(shadow)),
        stands=(5.0, 10.0), heals=60,
    ),
    Fault(
        "voter frozen, primary", (do.voters("STOP", primary),), (do.voters("CONT", primary),),
        stands=(5.0, 10.0), heals=30,
    ),
    Fault(
        "etcd's leader frozen in a takeover",
        (do.voters("STOP", witness), do.signalled(AGENT, "STOP", primary)),
        (do.taken_over, do.voters("CONT", witness), do.continued(AGENT, primary)),
        heals=60, moves=True, before=(do.leader(witness),), after=(do.held_queue_dropped,),
    ),
    Fault(
        "paused, primary power cut, resumed", (do.paused_failover, do.power_cut(primary)),
        (do.not_taken_over(8.0), do.resumed_failover, do.taken_over, do.power_back(primary)),
        heals=60, moves=True, after=(do.held_queue_dropped,),
    ),
    Fault("switchover, with a witness", (do.switched_over,), moves=True),
)  # fmt: skip
"""For a lab whose group has the coordinator etcd (``--witness``): nobody moves a hand."""

_THREE = (
    Fault(
        "power cut, primary of three, taken over", (do.power_cut(primary),),
        (do.taken_over, do.power_back(primary)),
        heals=60, moves=True, after=(do.held_queue_dropped,),
    ),
    Fault(
        "cut off, primary of three, taken over", (do.cut_off(primary),),
        (do.taken_over, do.all_ways_healed),
        heals=60, moves=True, after=(do.held_queue_dropped,),
    ),
    Fault(
        "power cut, shadow of three, replaced", (do.power_cut(shadow),),
        (do.replaced, do.power_back(shadow)), heals=60,
    ),
    Fault(
        "link cut, of three, shadow replaced", (do.wan_cut,), (do.replaced, do.wan_healed),
        heals=60,
    ),
    Fault(
        "link cut, of three, shadow with etcd's leader replaced", (do.wan_cut,),
        (do.replaced, do.wan_healed), heals=60, before=(do.leader(shadow),),
    ),
    Fault(
        "agent killed, shadow of three", (do.main_killed(AGENT, shadow),), heals=60,
    ),
    Fault(
        "power cut, follower", (do.power_cut(follower),), (do.power_back(follower),),
        stands=(3.0, 6.0), heals=60, refuses=2.0,
    ),
    Fault(
        "frozen, follower", (do.frozen(follower),), (do.thawed(follower),),
        stands=(3.0, 6.0), heals=60, refuses=2.0,
    ),
    Fault(
        # What the former primary has changed last and told nobody, two others have to agree on.
        "power cut, primary of three, replaced and back", (do.power_cut(primary),),
        (do.taken_over, do.replaced_after_takeover, do.power_back(primary)),
        heals=60, moves=True, after=(do.held_queue_dropped,),
    ),
    Fault("switchover, of three", (do.switched_over,), heals=60, moves=True),
    Fault("switchover to the follower", (do.switched_to(follower),), heals=60, moves=True),
)  # fmt: skip

THREE: tuple[Fault, ...] = tuple(
    # Three mail hosts have less of the same cores, and one more that may have to catch up.
    replace(fault, rate=3.0, heals=2 * fault.heals, settles=3 * fault.settles)
    for fault in _THREE
)
"""For a lab with three mail hosts and the coordinator etcd (``--three``)."""

ENDURANCE: tuple[Fault, ...] = (
    Fault(
        "line of 2 % loss and 50 ms jitter for an hour",
        (do.wan_set(loss=2, jitter=50),), (do.wan_set(loss=0, jitter=0),),
        stands=(3600.0, 3600.0), heals=30, rate=2.0,
    ),
)  # fmt: skip
"""With a witness, too; each only when it is named (``--fault``)."""

BY_NAME = {fault.name: fault for fault in (*FAULTS, *WITNESS, *THREE, *ENDURANCE)}

SELECTION = (
    "agent killed, primary",
    "postfix lmtp killed, primary",
    "dovecot master killed, primary",
    "agent stopped, shadow",
    "power cut, shadow",
    "power cut and failover, primary",
    "both power cut",
    "link cut",
    "switchover",
)
"""What `make test` tries: one of each kind."""
