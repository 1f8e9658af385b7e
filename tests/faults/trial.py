"""One trial: load, fault, recovery, and the account of every message and change."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plugins.module_utils import _accounting as accounting
from tests.faults import load
from tests.faults.actions import Action
from tests.faults.catalogue import Fault
from tests.faults.field import Field, FieldError
from tests.faults.schedule import Plan

COUNTED = (
    "lost", "duplicated", "changes_lost", "altered", "unexpected", "refused_but_present",
    "nodes_differ", "uids_changed",
)  # fmt: skip
UNITS = ("umbra-agent", "umbra-helper", "umbra-fence", "postfix", "dovecot")


@dataclass(frozen=True)
class Result:
    """What became of a trial. ``reasons`` is empty when all held that must hold."""

    plan: Plan
    primary: str
    seconds: float
    healed_s: float | None = None
    refusal_s: float | None = None
    acknowledged: int = 0
    changes_acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    reasons: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self)


def acknowledged(
    log: Iterable[Mapping[str, Any]], kinds: Collection[str]
) -> list[Mapping[str, Any]]:
    """Return the requests of these kinds that were acknowledged, by their ends. Pure."""
    found = [item for item in log if item.get("kind") in kinds and item["outcome"] == accounting.OK]
    return sorted(found, key=lambda item: int(item["end"]))


def turns(log: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which nodes acknowledged messages or changes, one after the other. Pure.

    An acknowledgement fell somewhere between its request's start and end, so it comes after
    another node's only if that request had ended before this one started.
    """
    found: list[str] = []
    since = 0
    for item in acknowledged(log, ("send", *accounting.CHANGES)):
        if not found or (item["node"] != found[-1] and item["start"] >= since):
            found.append(str(item["node"]))
            since = item["end"]
    return found


def judge(
    log: Sequence[Mapping[str, Any]],
    views: Mapping[str, Mapping[str, Any]],
    fault_ns: int,
    healed_ns: int,
    *,
    most_turns: int = 1,
    unsure: str = "",
) -> tuple[dict[str, Any], list[str]]:
    """Account for a trial's messages and changes: figures, and what is not as it must be. Pure.

    :param most_turns: so many nodes may acknowledge one after the other; with more, one did while
        another was primary.
    :param unsure: see ``Fault``.
    """
    if unsure:
        log = [
            {**item, "outcome": accounting.UNKNOWN}
            if item.get("outcome") == accounting.REFUSED and unsure in str(item.get("answer"))
            else item
            for item in log
        ]
    account = accounting.account(
        log, [], views, [], {"acknowledged": load.ENOUGH, "changes_acknowledged": 0}, "fault"
    )
    reasons = list(account["reasons"])
    ends = [item["end"] for item in acknowledged(log, ("send",))]
    last = max([item["end"] for item in log if item["type"] == "op"], default=healed_ns)
    if not any(end > healed_ns for end in ends):
        reasons.append("No message was taken after the group was protected again.")
    if len(taken := turns(log)) > most_turns:
        reasons.append(f"More than one node acknowledged at a time: {', then '.join(taken)}.")
    figures = {
        "refusal_s": accounting.outage_s(ends, fault_ns, max(healed_ns, fault_ns + 1), last),
        "acknowledged": account["acknowledged"],
        "changes_acknowledged": account["changes_acknowledged"],
        "refused": account["refused"],
        "unknown": account["unknown"],
        "counts": {name: account[name] for name in COUNTED},
    }
    return figures, [*reasons, *(item["text"] for item in account["findings"][:10])]


def make(ground: Field, fault: Fault, plan: Plan, run: str, evidence: Path) -> Result:
    """Make one trial; what it was judged from is left in ``evidence`` when it has failed."""
    began = time.monotonic()
    chance = random.Random(plan.seed)
    before, since = ground.primary, time.time()
    ground.since = datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    log: list[dict[str, Any]] = []
    views: dict[str, dict[str, Any]] = {}
    figures: dict[str, Any] = {}
    healed_s: float | None = None
    generator = load.Load(
        ground, run,
        rate=fault.rate, changes=fault.changes, max_s=load.LONGEST_S + fault.stands[1],
    )  # fmt: skip
    try:
        _act(fault.before, ground, chance)
        ground.wait_protected(fault.heals if fault.before else 5)
        before = ground.primary
        generator.start()
        time.sleep(plan.moment_s)
        fault_ns = time.monotonic_ns()
        _act(fault.inject, ground, chance)
        time.sleep(chance.uniform(*fault.stands))
        _act(fault.recover, ground, chance)
        healed_s = round(ground.wait_protected(fault.heals), 2)
        healed_ns = time.monotonic_ns()
        generator.wait_for_more(generator.taken())
        log = generator.stop()
        reasons = load.settle(ground, fault.settles)
        ground.wait_protected(fault.heals)
        views = load.read(ground, run)
        most_turns = 1 if fault.moves is False else 2
        figures, found = judge(
            log, views, fault_ns, healed_ns, most_turns=most_turns, unsure=fault.unsure
        )
        reasons += found
        if fault.refuses is not None and figures["refusal_s"] > fault.refuses:
            reasons.append(f"No message was taken for {figures['refusal_s']:.2f} s.")
        if fault.moves is not None and (ground.primary != before) is not fault.moves:
            reasons.append(f"The primary was {before} and is {ground.primary}.")
        if not reasons:  # or else all stays to be looked at
            _act(fault.after, ground, chance)
            load.clean(ground, run)
    except FieldError as error:
        reasons = [str(error)]
    finally:
        generator.abandon()
    result = Result(
        plan, before, round(time.monotonic() - began, 1), healed_s, reasons=reasons, **figures
    )
    if reasons:
        keep(ground, evidence / run, since, log, views, result)
    return result


def _act(actions: Sequence[Action], ground: Field, chance: random.Random) -> None:
    for action in actions:
        action(ground, chance)


def keep(
    ground: Field,
    directory: Path,
    since: float,
    log: Sequence[Mapping[str, Any]],
    views: Mapping[str, Mapping[str, Any]],
    result: Result,
) -> None:
    """Write down all that tells why a trial has failed, both nodes' journals included."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "result.json").write_text(json.dumps(result.to_json(), indent=2) + "\n")
    (directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    for node in ground.nodes:
        (directory / f"{node}.json").write_text(json.dumps(views.get(node, {})))
        units = " ".join(f"-u {unit}" for unit in UNITS)
        script = (
            f"journalctl --no-pager -o short-precise --since @$1 {units};"
            " postqueue -p; umbractl status"
        )
        try:
            said = ground.run(node, script, int(since), check=False)
        except FieldError as error:
            said = f"{error}\n"
        (directory / f"{node}.journal").write_text(said)
