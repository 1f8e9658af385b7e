"""What can be done to a host, a process or a link: the words of the table in catalogue.py."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tests.faults.field import WITNESS, Field, FieldError, wait
from tests.lab.umbra_lab.links import Settings

Action = Callable[[Field, random.Random], None]
Side = Callable[[Field], str]

AGENT = "umbra-agent.service"
HELPER = "umbra-helper.service"
VOTER = "umbra-coordinator.service"
POSTFIX = "postfix.service"
DOVECOT = "dovecot.service"
CONFIG = "/etc/umbra/agent.yml"
SAVED_CONFIG = "/run/faults-agent.yml"
FILLER = "faults-filler"
DELAY_MS = Settings().delay_ms  # of the lab's line, one way

# Kills each process of unit $1 that bears name $2. One that comes and goes is waited for: a trial
# whose fault hit nothing would prove nothing.
_KILL = """
for try in $(seq 300); do
  hit=
  for pid in $(cat $(find /sys/fs/cgroup/system.slice/$1 -name cgroup.procs)); do
    read -r name < /proc/$pid/comm && [ "$name" = "$2" ] && kill -KILL $pid && hit=yes
  done 2> /dev/null
  [ "$hit" ] && exit 0
  sleep 0.01
done
echo "no process $2 in $1" >&2
exit 1
"""

# $1 directory, $2 MiB beside what it holds; the rest are the units that use it, in starting order.
# The agent starts and stops Postfix by itself.
_SMALL = """
set -e
disk=$1; room=$2; shift 2
systemctl stop postfix $*
rm -rf /run/faults-disk && cp -a $disk /run/faults-disk
size=$(($(du -sm /run/faults-disk | cut -f1) + room))
mount -t tmpfs -o size=${size}m tmpfs $disk
chown --reference=/run/faults-disk $disk && chmod --reference=/run/faults-disk $disk
cp -a /run/faults-disk/. $disk/
rm -r /run/faults-disk
systemctl start $*
"""

_LARGE = """
set -e
disk=$1; shift
mountpoint -q $disk || exit 0
systemctl stop postfix $*
rm -rf /run/faults-disk && cp -a $disk /run/faults-disk
umount $disk
find $disk -mindepth 1 -delete
cp -a /run/faults-disk/. $disk/
rm -r /run/faults-disk
systemctl start $*
"""


# Whatever stands still goes on: the units named.
_CONTINUE = """
for unit; do systemctl kill --kill-whom=main -s CONT $unit 2> /dev/null; done
true
"""


def primary(field: Field) -> str:
    """The primary as the trial began."""
    return field.primary


def shadow(field: Field) -> str:
    """The shadow as the trial began."""
    return field.shadow


def follower(field: Field) -> str:
    """The shadow of three that changes did not wait for as the trial began."""
    return field.follower


def witness(field: Field) -> str:
    """The host that only votes."""
    return WITNESS


def both_back(field: Field, chance: random.Random) -> None:
    """Boot both nodes, in either order."""
    for node in chance.sample(field.nodes, len(field.nodes)):
        field.lab("power-on", node)


def killed(unit: str, process: str, side: Side) -> Action:
    """SIGKILL to all processes of that name in a unit."""

    def act(field: Field, chance: random.Random) -> None:
        field.run(side(field), _KILL, unit, process)

    return act


def main_killed(unit: str, side: Side) -> Action:
    """SIGKILL to a unit's main process."""
    return signalled(unit, "KILL", side)


def signalled(unit: str, signal: str, side: Side) -> Action:
    """A signal to a unit's main process."""

    def act(field: Field, chance: random.Random) -> None:
        field.run(side(field), "systemctl kill --kill-whom=main -s $1 $2", signal, unit)

    return act


def continued(unit: str, side: Side) -> Action:
    """SIGCONT to a unit's main process, unless the watchdog has had it killed meanwhile."""

    def act(field: Field, chance: random.Random) -> None:
        field.run(side(field), _CONTINUE, unit)

    return act


def storm(unit: str, side: Side, times: int) -> Action:
    """SIGKILL to a unit's main process again and again, whatever it has got to by then."""

    def act(field: Field, chance: random.Random) -> None:
        pauses = [f"{chance.uniform(0.3, 2.0):.2f}" for _ in range(times)]
        script = "systemctl kill --kill-whom=main -s KILL $unit 2> /dev/null; sleep $pause"
        # Between two lives there is nothing to kill.
        loop = f"unit=$1; shift; for pause; do {script}; done"
        field.run(side(field), loop, unit, *pauses)

    return act


def restarted(unit: str, side: Side) -> Action:
    """Restart a unit, as an administrator does; what it keeps in memory is gone."""

    def act(field: Field, chance: random.Random) -> None:
        field.run(side(field), "systemctl restart $1", unit)
        field.wait_protected(60)

    return act


def paused(seconds: float) -> Action:
    """Let what was done come to its end."""

    def act(field: Field, chance: random.Random) -> None:
        time.sleep(seconds)

    return act


def power_cut(side: Side) -> Action:
    """All of a host's processes at one instant; its link is dead first."""

    def act(field: Field, chance: random.Random) -> None:
        field.lab("power-off", side(field))

    return act


def power_back(side: Side) -> Action:
    """Boot a host that is off."""

    def act(field: Field, chance: random.Random) -> None:
        field.lab("power-on", side(field))

    return act


def frozen(side: Side) -> Action:
    """All of a host's processes stand still; its kernel goes on."""

    def act(field: Field, chance: random.Random) -> None:
        field.lab("freeze", side(field))

    return act


def thawed(side: Side) -> Action:
    """And go on."""

    def act(field: Field, chance: random.Random) -> None:
        field.lab("thaw", side(field))

    return act


def disk(action: str, side: Side) -> Action:
    """The whole disk of a host: ``stall``, ``release`` or ``fail``."""

    def act(field: Field, chance: random.Random) -> None:
        field.lab("disk", action, side(field))

    return act


def cut_off(side: Side) -> Action:
    """No packet between that host's site and the others'; clients reach it."""

    def act(field: Field, chance: random.Random) -> None:
        for other in {*field.voters} - {side(field)}:
            field.lab("wan", "cut", side(field), other)

    return act


def cut_one_way(side: Side) -> Action:
    """No packet from that node to the other one; those back arrive."""

    def act(field: Field, chance: random.Random) -> None:
        (other,) = set(field.nodes) - {side(field)}
        field.lab("wan", "cut", side(field), other, "--one-way")

    return act


def clients_cut(side: Side) -> Action:
    """No packet comes in from the LAN of the clients, where the agents' probes go."""
    rules = (
        "add table inet faults; add chain inet faults in"
        " { type filter hook input priority -300; }; add rule inet faults in iifname eth1 drop"
    )

    def act(field: Field, chance: random.Random) -> None:
        field.run(side(field), "nft $1", rules)

    return act


def clients_back(side: Side) -> Action:
    """And again."""

    def act(field: Field, chance: random.Random) -> None:
        field.run(side(field), "nft delete table inet faults")

    return act


def link_flaps(field: Field, chance: random.Random) -> None:
    """The link between the nodes goes and comes, ten times."""
    for _ in range(10):
        wan_cut(field, chance)
        time.sleep(chance.uniform(0.2, 1.5))
        wan_healed(field, chance)
        time.sleep(chance.uniform(0.2, 1.5))


def all_ways_healed(field: Field, chance: random.Random) -> None:
    """Packets everywhere."""
    for host, other in combinations(field.voters, 2):
        field.lab("wan", "heal", host, other)


def wan_cut(field: Field, chance: random.Random) -> None:
    """No packet between the sites; clients reach both."""
    field.lab("wan", "cut", field.primary, field.shadow)


def wan_healed(field: Field, chance: random.Random) -> None:
    """Packets again."""
    field.lab("wan", "heal", field.primary, field.shadow)


def wan_set(**settings: float) -> Action:
    """Change the line between the sites: delay, jitter (ms), loss (percent), rate (kbit/s)."""

    def act(field: Field, chance: random.Random) -> None:
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        field.lab("wan", "set", *words, "--between", field.primary, field.shadow)

    return act


def taken_over(field: Field, chance: random.Random) -> None:
    """Nobody does anything; the shadow takes over."""

    def done() -> bool:
        status = field.status(field.shadow)
        return status is not None and status["primary"] == field.shadow

    wait(done, 30, lambda: f"{field.shadow} has not taken over: {field.why()}")


def _wait_protects(field: Field, primary: str, shadow: str) -> None:
    def done() -> bool:
        status = field.status(primary)
        return status is not None and shadow in status["protected_set"] and status["protected"]

    wait(done, 60, lambda: f"{shadow} does not protect {primary}: {field.why()}")


def replaced(field: Field, chance: random.Random) -> None:
    """Nobody does anything; changes wait for the shadow that only followed."""
    _wait_protects(field, field.primary, field.follower)


def replaced_after_takeover(field: Field, chance: random.Random) -> None:
    """The same for the new primary."""
    _wait_protects(field, field.shadow, field.follower)


def handed_over(field: Field, chance: random.Random) -> None:
    """Nobody does anything; the primary gives its role to the shadow, by itself and as planned."""

    def change() -> dict[str, Any] | None:
        status = field.status(field.shadow)
        last = status["last_switchover"] if status else None
        return last if last and last["to"] == field.shadow and last["at"] > field.since else None

    made = wait(change, 30, lambda: f"{field.primary} has not given its role away: {field.why()}")
    if made is None or not made["planned"]:
        raise FieldError(f"{field.shadow} took over; {field.primary} has not handed over: {made}.")


def not_taken_over(seconds: float) -> Action:
    """For so long the shadow does not take over: it must not, whatever it sees."""

    def act(field: Field, chance: random.Random) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            status = field.status(field.shadow)
            if status is not None and status["primary"] == field.shadow:
                raise FieldError(f"{field.shadow} has taken over, which it must not.")
            time.sleep(0.2)

    return act


def alone(field: Field, chance: random.Random) -> None:
    """The primary goes on without its shadow, by the coordinator's word."""

    def done() -> bool:
        status = field.status(field.primary)
        return status is not None and not status["protected"]

    wait(done, 10, lambda: f"{field.primary} is not alone: {field.why()}")


def paused_failover(field: Field, chance: random.Random) -> None:
    """An operator forbids automatic failover."""
    field.run(field.primary, "umbractl pause")


def resumed_failover(field: Field, chance: random.Random) -> None:
    """And allows it again, on whichever node answers."""
    field.run(field.shadow, "umbractl unpause")


def voters(signal: str, *sides: Side) -> Action:
    """A signal to every member of the coordinator, or to those named."""

    def act(field: Field, chance: random.Random) -> None:
        for host in [side(field) for side in sides] or field.voters:
            field.run(host, "systemctl kill -s $1 $2", signal, VOTER)

    return act


def leader(side: Side) -> Action:
    """Have that host's member lead the coordinator."""

    def act(field: Field, chance: random.Random) -> None:
        voter = field.voters[-1]
        members = json.loads(field.run(voter, "umbra-etcdctl member list -w json"))["members"]
        [wanted] = [member["ID"] for member in members if member["name"] == side(field)]
        for member in json.loads(field.run(voter, "umbra-etcdctl endpoint status -w json")):
            leads = member["Status"]["leader"]
            if leads == member["Status"]["header"]["member_id"]:
                if leads != wanted:  # only the leader itself can give the lead away
                    command = "umbra-etcdctl --endpoints $1 move-leader $2"
                    field.run(voter, command, member["Endpoint"], f"{wanted:x}")
                return
        raise FieldError("no member leads the coordinator")

    return act


def failed_over(field: Field, chance: random.Random) -> None:
    """An operator promotes the shadow, as soon as it has noticed that the primary is gone."""
    script = "printf '%s\\n' $1 | umbractl failover --accept-loss"

    def done() -> bool:
        done = field.call(
            field.shadow, "sh", "-c", script, "sh", field.shadow, timeout=120, check=False
        )
        if done.returncode and "answers and is" not in done.stderr:
            raise FieldError(f"umbractl failover: {' '.join(done.stderr.split())}")
        return done.returncode == 0

    wait(done, 15, lambda: f"{field.shadow} could not be promoted")


def switched_to(side: Side) -> Action:
    """An operator moves the primary; a refusal for a moment's reason is tried again."""

    def act(field: Field, chance: random.Random) -> None:
        to = side(field)

        def done() -> bool:
            done = field.call(to, "umbractl", "switchover", to, timeout=120, check=False)
            return done.returncode == 0

        wait(done, 60, lambda: f"the primary could not be moved: {field.why()}")

    return act


def switched_over(field: Field, chance: random.Random) -> None:
    """An operator moves the primary to the shadow."""
    switched_to(shadow)(field, chance)


def switchover_begun(field: Field, chance: random.Random) -> None:
    """An operator moves the primary and something happens meanwhile: the outcome is open."""
    field.run(field.shadow, "umbractl switchover $1 > /run/faults-switchover 2>&1 &", field.shadow)
    time.sleep(chance.uniform(0.2, 1.5))  # umbractl starts in about 0.3 s, the change takes as long


def reconfigured(side: Side) -> Action:
    """Change settings of the transport and restart the agent, as the role's handler does."""
    script = (
        "cp -n $1 $2;"
        " sed -i 's/shadow_policy: .*/shadow_policy: accept/;"
        " s/shadow_timeout: .*/shadow_timeout: 3/; s/safety_net_hold: .*/safety_net_hold: 3600/' $1"
        " && systemctl restart umbra-agent"
    )

    def act(field: Field, chance: random.Random) -> None:
        field.run(side(field), script, CONFIG, SAVED_CONFIG)

    return act


def configured(side: Side) -> Action:
    """Put the settings back."""

    def act(field: Field, chance: random.Random) -> None:
        put_back(field, side(field))

    return act


def put_back(field: Field, node: str) -> None:
    """Restart the agent with the settings that it had, if they were changed."""
    script = "test -e $1 || exit 0; cat $1 > $2 && rm $1 && systemctl restart umbra-agent"
    field.run(node, script, SAVED_CONFIG, CONFIG)


@dataclass(frozen=True)
class Disk:
    """A directory that a trial puts on a small file system of its own, to fill it."""

    path: str
    room_mib: int
    units: tuple[str, ...]

    def small(self, side: Side) -> Action:
        """Put it there; what it holds moves along."""

        def act(field: Field, chance: random.Random) -> None:
            field.run(side(field), _SMALL, self.path, self.room_mib, *self.units)

        return act

    def filled(self, side: Side, left_mib: int = 0) -> Action:
        """Fill it, to the last byte or but for so much."""
        script = (
            "cat /dev/zero > $1/$2 2> /dev/null;"
            " truncate -s $(($(stat -c %s $1/$2) - ($3 << 20))) $1/$2"
        )

        def act(field: Field, chance: random.Random) -> None:
            field.run(side(field), script, self.path, FILLER, left_mib)

        return act

    def emptied(self, side: Side) -> Action:
        """Give the space back."""

        def act(field: Field, chance: random.Random) -> None:
            field.run(side(field), "rm $1/$2", self.path, FILLER)

        return act

    def large(self, side: Side) -> Action:
        """Put it back where it was."""

        def act(field: Field, chance: random.Random) -> None:
            self.restore(field, side(field))

        return act

    def restore(self, field: Field, node: str) -> None:
        """Undo all of that, as far as it was done."""
        field.run(node, "rm -f $1/$2", self.path, FILLER)
        field.run(node, _LARGE, self.path, *self.units)


STORE = Disk("/var/lib/umbra/shadow", 128, (AGENT,))
"""The shadow store: its reserve of 64 MiB, the 32 under which it takes no message, and room."""
MAIL = Disk("/var/vmail", 64, (DOVECOT, AGENT))
QUEUE = Disk("/var/spool/postfix", 128, (DOVECOT, AGENT))
"""Postfix's queue, and the sockets that Dovecot and the agent have in it."""


def held_queue_dropped(field: Field, chance: random.Random) -> None:
    """Drop a former primary's queue, as docs/failures.md has an administrator do it."""
    for node in field.nodes:
        if node != field.primary:
            field.run(node, "postsuper -d ALL hold")


def all_taken_back(field: Field) -> None:
    """Undo whatever a trial that broke off may have left; FieldError if that does not help."""
    field.lab("up")
    for node in field.nodes:
        if field.call(node, "touch", "/root/faults", check=False).returncode:  # its disk has failed
            field.lab("power-off", node)
            field.lab("power-on", node)
    all_ways_healed(field, random.Random())
    field.lab(
        "wan", "set", "--loss", "0", "--rate", "0", "--delay", str(DELAY_MS), "--jitter", "0",
        "--between", *field.nodes[:2],
    )  # fmt: skip
    for node in field.voters:
        field.run(node, _CONTINUE, AGENT, VOTER)
    for node in field.nodes:
        put_back(field, node)
        for disk in (STORE, MAIL, QUEUE):
            disk.restore(field, node)
        field.run(
            node,
            "nft delete table inet faults; systemctl start dovecot; postsuper -d ALL hold",
            check=False,
        )
    field.run(field.nodes[0], "umbractl unpause", check=False)
    field.wait_protected(120)
