"""The test itself: hypothesis draws operations, each OK is held against both nodes' disks."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from tests.faults import catalogue
from tests.faults.field import Field, FieldError
from tests.model.account import Account, Box, between
from tests.model.operations import OPERATIONS, SYSTEM, Turn
from tests.model.wire import Broken, Refused, quoted
from tests.model.world import NodeError, Sieve, World

# Steps of one example; each begins with empty mailboxes.
STEPS = 50
DICE = st.integers(0, 2**32 - 1)
# How long a difference is watched before it is told, so that it can be told how late it was.
LATE = 4.0
HEALS = 45.0
SUBSCRIBED = SYSTEM[1:]
FAULTS = (
    "agent killed, primary",
    "agent killed, shadow",
    "agent killed five times, primary",
    "agent killed five times, shadow",
    "agent stopped, shadow",
    "dovecot master killed, primary",
    "dovecot doveadm-server killed, primary",
    "dovecot master killed, shadow",
    "dovecot doveadm-server killed, shadow",
    "power cut, shadow",
    "power cut and back, primary",
    "link cut",
    "switchover",
)

# Scripts reach the other node within a second and are not synced here, see docs/mirrored.md: this
# fault may take those that were acknowledged just before it.
TAKES_SCRIPTS = "power cut and back, primary"

SELECTION = ("agent killed, primary", "dovecot doveadm-server killed, shadow", "link cut")
"""What `make test` tries."""


@dataclass
class Tally:
    """What was counted of one kind of operation."""

    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    compared: int = 0
    late_s: list[float] = field(default_factory=list)
    said: str = ""


@dataclass
class Run:
    """What outlives one example: the system, and what was counted."""

    world: World
    ground: Field | None
    faults: tuple[str, ...]
    wanted: int
    able: set[str] = field(default_factory=set)
    tallies: dict[str, Tally] = field(default_factory=dict)
    struck: Counter[str] = field(default_factory=Counter)
    trace: list[str] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    marks: int = 0
    operations: int = 0
    shrink: bool = False

    def note(self, text: str) -> None:
        """Add a line to the trace of the running example."""
        self.trace.append(f"{time.strftime('%H:%M:%S')} {text}")

    def tally(self, kind: str) -> Tally:
        """The count of a kind."""
        return self.tallies.setdefault(kind, Tally())


class Mirrored(RuleBasedStateMachine):
    """One example: empty mailboxes, then operations one after the other."""

    run: Run

    def __init__(self) -> None:
        super().__init__()
        self.world = self.run.world
        self.able = self.run.able
        self.accounts: dict[str, Account] = {}
        self.run.trace.clear()
        self._fault: threading.Thread | None = None
        self._fault_error = ""
        self._struck = ""
        self._earlier: dict[str, list[Account]] = {}  # before each change of scripts since then
        self._heals = 0.0
        with self._told("the begin of an example"):
            self.world.wait_protected(HEALS)
            for user in self.world.users:
                self.accounts[user] = self._emptied(user)
                self._compare(user, "empty mailboxes", LATE)

    def mark(self) -> str:
        """A new message's mark."""
        self.run.marks += 1
        return f"m{self.run.marks}"

    def teardown(self) -> None:
        """Take the last fault back and compare everything, every message read anew."""
        with self._told("the end of an example"):
            self.settle()
            if not self.run.failures:
                for user in self.accounts:
                    self._compare(user, "everything at the end", LATE, fresh=True)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Keep what ends an example: hypothesis runs it again, and may tell only of that."""
        try:
            yield
        except Exception as error:
            if not self.run.failures:
                details = traceback.format_exc().splitlines()[-12:]
                self._failed(f"{what} broke off: {error!r}", details, [])
            raise

    # -- one operation

    def turn(self, kind: str, dice: int) -> None:
        """Make an operation and hold its outcome against the disks."""
        with self._told(kind):
            self._turn(kind, dice)

    def _turn(self, kind: str, dice: int) -> None:
        if self._fault is not None and not self._fault.is_alive():
            self.settle()
        turn = OPERATIONS[kind](self, random.Random(dice))
        if turn is None:
            return
        self.run.operations += 1 + len(turn.also)
        before = self.accounts[turn.user]
        try:
            turn.act()
        except Refused as error:
            self._unsure(turn, before, error)
        except (Broken, NodeError, OSError) as error:
            self._unsure(turn, before, error)
        else:
            for one in (turn.kind, *turn.also):
                self.run.tally(one).acknowledged += 1
            self.run.note(f"{turn.kind} of {turn.user}: OK")
            self.accounts[turn.user] = before.after(turn.effect)
            if self._fault is None:
                late = self._compare(turn.user, turn.kind, turn.bound)
                for one in (turn.kind, *turn.also):
                    self.run.tally(one).compared += 1
                    self.run.tally(one).late_s.append(late)
            else:
                if turn.bound and self._struck == TAKES_SCRIPTS:
                    self._earlier.setdefault(turn.user, []).append(before)
                self._learn(turn.user)

    def _unsure(self, turn: Turn, before: Account, error: Exception) -> None:
        """Refused, or nobody knows: the primary must have all of it or nothing."""
        refused = isinstance(error, Refused)
        self.run.note(f"{turn.kind} of {turn.user}: {error!r}")
        tally = self.run.tally(turn.kind)
        tally.refused += refused
        tally.unknown += not refused
        tally.said = str(error)
        if not self.run.faults:
            assert refused, f"{turn.kind}: {error!r}"
            self._compare(turn.user, f"refused {turn.kind}", turn.bound)
            return
        self.settle([turn.user])
        self.world.disconnect()
        here, _ = self.world.views(turn.user)
        reasons = []
        for effect in (lambda account: None, turn.effect, *turn.half):
            candidate = before.after(effect)
            candidate.learn(here)
            found = candidate.differences(here)
            if not found:
                self.accounts[turn.user] = candidate
                self._compare(turn.user, f"unknown {turn.kind}", LATE)
                return
            reasons.append(found[:3])
        self._fail(f"{turn.kind} ended with {error!r}: what is there is no outcome of it", reasons)

    # -- what is on the disks

    def _learn(self, user: str) -> None:
        """Take from the primary what could not be foretold; later if it cannot be asked now."""
        try:
            here = self.world.nodes[self.world.primary].ask("view", user=user)
        except NodeError:
            return
        self.accounts[user].learn(here)

    def _compare(self, user: str, what: str, bound: float, *, fresh: bool = False) -> float:
        """Hold both nodes against the model; how long it took until they agreed (seconds).

        The first look comes right after the OK; with no ``bound`` it is the one that counts.
        """
        account = self.accounts[user]
        acknowledged = time.monotonic()
        first: list[str] = []
        while True:
            asked = time.monotonic()
            here, there = self.world.views(user, fresh=fresh)
            account.learn(here)
            found = [
                *(f"primary: {text}" for text in account.differences(here)),
                *(f"shadow: {text}" for text in account.differences(there)),
                *between(here, there),
            ]
            late = asked - acknowledged
            first = first or found
            if not found:
                break
            if late > max(bound, LATE):
                self._fail(f"{what} of {user}: after {late:.0f} s there is", found)
            time.sleep(0.02)
        if first and late > bound:
            self._fail(f"{what} of {user}: it took {late:.2f} s, {bound:g} s are allowed", first)
        return late if first else 0.0

    def _fail(self, what: str, details: list[Any]) -> None:
        try:
            reasons = self.world.status(self.world.primary)["reasons"]
        except NodeError as error:
            reasons = [str(error)]
        self._failed(what, details[:20], reasons)
        raise AssertionError(f"{what}: {details[:8]}; group: {reasons or 'protected'}")

    def _failed(self, what: str, details: list[Any], reasons: list[str]) -> None:
        self.run.failures.append(
            {"what": what, "details": details, "group": reasons, "trace": self.run.trace[-60:]}
        )

    # -- faults

    def strike(self, dice: int) -> None:
        """Begin a fault that lasts while the next operations are made."""
        if not self.run.faults or self._fault is not None or self.run.operations < 3:
            return
        chance = random.Random(dice)
        fault = catalogue.BY_NAME[chance.choice(self.run.faults)]
        ground = self.run.ground
        assert ground is not None
        ground.primary, ground.shadow = self.world.primary, self.world.shadow
        self.run.struck[fault.name] += 1
        self._struck, self._earlier = fault.name, {}
        self.run.note(f"fault: {fault.name}")
        self._heals = fault.heals
        self._fault_error = ""

        def work() -> None:
            try:
                time.sleep(chance.uniform(0, 0.4))
                for action in fault.inject:
                    action(ground, chance)
                time.sleep(chance.uniform(*fault.stands))
                for action in fault.recover:
                    action(ground, chance)
            except FieldError as error:
                self._fault_error = str(error)

        self._fault = threading.Thread(target=work, name=fault.name)
        self._fault.start()

    def settle(self, but: list[str] | None = None) -> None:
        """Wait for the fault's end and until the group is protected; then all must be there."""
        if self._fault is None:
            return
        self._fault.join()
        self._fault = None
        if self._fault_error:
            self._fail("the fault could not be made", [self._fault_error])
        took = self.world.wait_protected(self._heals + HEALS)
        self.run.note(f"protected after {took:.1f} s")
        for user, states in self._earlier.items():
            here, _ = self.world.views(user)
            self.accounts[user].take_scripts(here, reversed(states))
        for user in self.world.users:
            if user not in (but or []):
                self._compare(user, "everything after a fault", LATE)

    # -- the beginning

    def _emptied(self, user: str) -> Account:
        """Remove what the user has, as a client does; the account that is left."""
        client = next(one for one in self.world.clients if one.user == user)
        for one in self.world.clients:
            if one.user == user:
                one.close()
        for name in SYSTEM:
            client.run(b"SELECT", quoted(name.encode()))
            client.run(b"UID STORE 1:* +FLAGS.SILENT (\\Deleted)")
            client.run(b"EXPUNGE")
        client.run(b"UNSELECT")
        here = self.world.nodes[self.world.primary].ask("view", user=user)
        self.able |= {*here["able"], *(() if self.run.faults else ("SMTP",))}
        for name in sorted(here["mailboxes"].keys() - set(SYSTEM), reverse=True):
            client.run(b"DELETE", quoted(name.encode()))
        for name, rights in here["rights"].items():
            if name in SYSTEM and "anyone" in rights:
                client.run(b"DELETEACL", quoted(name.encode()), b"anyone")
        for name, notes in here["notes"].items():
            for key in notes if name in SYSTEM else ():
                client.run(b"SETMETADATA", quoted(name.encode()), f"({key} NIL)".encode())
        for name in here["subscriptions"]:
            if name not in SUBSCRIBED:
                client.run(b"UNSUBSCRIBE", quoted(name.encode()))
        for name in SUBSCRIBED:
            client.run(b"SUBSCRIBE", quoted(name.encode()))
        if here["scripts"]:
            with Sieve(self.world, user) as session:
                session.run('SETACTIVE ""')
                for name in here["scripts"]:
                    session.run(f'DELETESCRIPT "{name}"')
        here = self.world.nodes[self.world.primary].ask("view", user=user)
        boxes = {
            name: Box(seen["uidvalidity"], seen["uidnext"])
            for name, seen in here["mailboxes"].items()
        }
        return Account(boxes, set(SUBSCRIBED))


def _rules() -> dict[str, Any]:
    """One rule for each operation, named so that a failing example can be read."""

    def rule_of(kind: str) -> Any:
        def step(self: Mirrored, dice: int) -> None:
            self.turn(kind, dice)

        step.__name__ = "".join(char if char.isalnum() else "_" for char in kind).strip("_")
        return rule(dice=DICE)(step)

    made = {kind: rule_of(kind) for kind in OPERATIONS}
    return {f"do_{index}": function for index, function in enumerate(made.values())}


def campaign(run: Run, number: int) -> None:
    """Make operations until there are as many as wanted; raises what the first failure raised.

    :param number: the seed; it decides every draw.
    """

    def struck(self: Mirrored, dice: int) -> None:
        self.strike(dice)

    rules = _rules()
    if run.faults:
        rules |= {f"strike_{turn}": rule(dice=DICE)(_named(struck, turn)) for turn in range(2)}
    phases = [Phase.generate, *([Phase.shrink] if run.shrink else [])]
    while run.operations < run.wanted:
        left = run.wanted - run.operations
        machine = type("Mirror", (Mirrored,), {**rules, "run": run})
        seed(number)(machine)
        run_state_machine_as_test(
            machine,
            settings=settings(
                # The first example is always the simplest one: only one in some.
                max_examples=max(5, min(20, round(left / STEPS))),
                stateful_step_count=min(STEPS, max(left // 4, 10)),
                deadline=None,
                database=None,
                phases=phases,
                print_blob=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
        number += 1


def _named(function: Any, turn: int) -> Any:
    def strike(self: Mirrored, dice: int) -> None:
        function(self, dice)

    strike.__name__ = f"strike_{turn}"
    return strike
