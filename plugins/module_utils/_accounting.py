# Copyright (c) umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Accounts for every message and change of a failover test: from log and mailboxes to a report.

In Jepsen's manner each operation was acknowledged (ok), refused, or is unknown. What was
acknowledged must be there exactly once, what was refused must not, what is unknown may. A view is
what one reader saw: the outside host by IMAP, and each node on its own disk. Everything must hold
in every view. All functions are pure.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OK, REFUSED, UNREACHED, UNKNOWN = "ok", "refused", "unreached", "unknown"
CHANGES = ("append", "store", "copy", "move", "expunge", "create", "rename", "delete")
SETTLE_S = 10.0  # after a move has ended: until then a gap is still its doing
FINDINGS_SHOWN = 100


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is not as it must be.

    ``what`` is the report's key that counts it; findings with one ``key`` count once.
    """

    what: str
    key: str
    view: str
    text: str


# -- messages


def final_outcomes(sends: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return for each message id the attempt that counts.

    An id is attempted again only as long as no node was reached.
    """
    rank = {UNREACHED: 0, REFUSED: 1, UNKNOWN: 2, OK: 3}
    final: dict[str, Mapping[str, Any]] = {}
    for send in sends:
        known = final.get(send["id"])
        if known is None or rank[send["outcome"]] > rank[known["outcome"]]:
            final[send["id"]] = send
    return final


def judge_messages(
    sends: Mapping[str, Mapping[str, Any]], views: Mapping[str, Mapping[str, Any]]
) -> list[Finding]:
    """Hold every message against every view of the INBOXes."""
    findings = []
    for view, users in views.items():
        present: dict[tuple[str, str], list[Mapping[str, Any]]] = collections.defaultdict(list)
        for user, mailboxes in users.items():
            for message in mailboxes.get("INBOX", {}).get("messages", []):
                present[user, message["id"]].append(message)
        for identity, send in sends.items():
            for recipient in send["recipients"]:
                found = present.pop((recipient, identity), [])
                findings += _judge_message(view, identity, recipient, send, found)
        for user, identity in present:
            text = f"{identity} is in the INBOX of {user} and was never sent there"
            findings.append(Finding("unexpected", identity, view, text))
    return findings


def _judge_message(
    view: str,
    identity: str,
    recipient: str,
    send: Mapping[str, Any],
    found: Sequence[Mapping[str, Any]],
) -> list[Finding]:
    name = "{} ({}) to {}".format(identity, send.get("content"), recipient)
    outcome = send["outcome"]
    findings = []
    if outcome == OK and not found:
        text = "{} was answered {} and is not there".format(name, send["answer"])
        findings.append(Finding("lost", identity, view, text))
    if outcome in (REFUSED, UNREACHED) and found:
        text = "{} was answered {} and is there all the same".format(name, send["answer"])
        findings.append(Finding("refused_but_present", identity, view, text))
    if len(found) > 1:
        text = f"{name} is there {len(found)} times"
        findings.append(Finding("duplicated", identity, view, text))
    for message in found:
        parts = [part for part in ("head", "body") if message[part] != send["sent"][part]]
        if parts:
            sizes = f"{send['sent']['size']} bytes sent, {message['size']} stored"
            text = f"{name}: the {' and the '.join(parts)} is not what was sent ({sizes})"
            findings.append(Finding("altered", identity, view, text))
    return findings


# -- mailboxes


@dataclasses.dataclass
class Entry:
    """A message that must be in a mailbox.

    ``uid`` None: any UID will do. ``flags``: whether each is set, and which change made it so.
    """

    id: str
    uid: int | None
    writer: str
    flags: dict[str, tuple[bool, str]] = dataclasses.field(default_factory=dict)
    sent: Mapping[str, Any] | None = None


@dataclasses.dataclass
class Mailbox:
    """A mailbox that must exist."""

    writer: str
    entries: list[Entry] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class State:
    """What one generation of an IMAP worker's mailboxes must hold.

    ``gone`` and ``removed`` remember which change took a mailbox or a message away.
    """

    mailboxes: dict[str, Mailbox] = dataclasses.field(default_factory=dict)
    gone: dict[str, str] = dataclasses.field(default_factory=dict)
    removed: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)

    def entry(self, operation: Mapping[str, Any]) -> Entry:
        """Return the message an operation is about: the last one with its id in its mailbox."""
        entries = self.mailboxes[operation["mailbox"]].entries
        return [entry for entry in entries if entry.id == operation["message"]][-1]

    def apply(self, operation: Mapping[str, Any]) -> None:
        """Make an operation's change."""
        getattr(self, "_" + operation["kind"])(operation)

    def _create(self, operation: Mapping[str, Any]) -> None:
        self.mailboxes[operation["mailbox"]] = Mailbox(operation["id"])
        self.gone.pop(operation["mailbox"], None)

    def _rename(self, operation: Mapping[str, Any]) -> None:
        mailbox = self.mailboxes.pop(operation["mailbox"])
        mailbox.writer = operation["id"]
        self.mailboxes[operation["to"]] = mailbox
        self.gone[operation["mailbox"]] = operation["id"]
        self.gone.pop(operation["to"], None)

    def _delete(self, operation: Mapping[str, Any]) -> None:
        del self.mailboxes[operation["mailbox"]]
        self.gone[operation["mailbox"]] = operation["id"]

    def _append(self, operation: Mapping[str, Any]) -> None:
        entry = Entry(
            operation["message"], operation.get("uid"), operation["id"], sent=operation.get("sent")
        )
        self.mailboxes[operation["mailbox"]].entries.append(entry)

    def _store(self, operation: Mapping[str, Any]) -> None:
        self.entry(operation).flags[operation["flag"]] = (operation["add"], operation["id"])

    def _copy(self, operation: Mapping[str, Any]) -> None:
        source = self.entry(operation)
        flags = {flag: held for flag, held in source.flags.items() if held[0]}
        self.mailboxes[operation["to"]].entries.append(
            Entry(source.id, operation.get("uid"), operation["id"], flags, source.sent)
        )

    def _move(self, operation: Mapping[str, Any]) -> None:
        self._copy(operation)
        self._expunge(operation)

    def _expunge(self, operation: Mapping[str, Any]) -> None:
        self.mailboxes[operation["mailbox"]].entries.remove(self.entry(operation))
        self.removed[operation["mailbox"], operation["message"]] = operation["id"]


def possible_states(operations: Sequence[Mapping[str, Any]]) -> list[State]:
    """Replay one generation.

    Its last change may be unknown; then every state that it can have left is returned.
    """
    state = State()
    for operation in operations:
        if operation["outcome"] == OK:
            state.apply(operation)
        elif operation["outcome"] == UNKNOWN:
            # The worker made no change to this generation after an unknown one.
            return [state, *_after_unknown(state, operation)]
    return [state]


def _after_unknown(state: State, operation: Mapping[str, Any]) -> list[State]:
    done = copy.deepcopy(state)
    done.apply(operation)
    if operation["kind"] != "move":
        return [done]
    # A move is a copy and then an expunge, and may have ended between them.
    copied = copy.deepcopy(state)
    copied.apply({**operation, "kind": "copy"})
    return [done, copied]


def judge_state(state: State, view: str, user: str, actual: Mapping[str, Any]) -> list[Finding]:
    """Hold what must be there against the mailboxes of one generation in one view."""
    findings = []

    def note(what: str, key: str, text: str) -> None:
        findings.append(Finding(what, key, view, f"{user}: {text}"))

    for name in sorted(set(actual) - set(state.mailboxes)):
        if name in state.gone:
            note(
                "changes_lost",
                state.gone[name],
                f"mailbox {name} is there after {state.gone[name]}",
            )
        else:
            note("unexpected", name, f"mailbox {name} was never acknowledged and is there")
    for name, mailbox in state.mailboxes.items():
        if name not in actual:
            note(
                "changes_lost",
                mailbox.writer,
                f"mailbox {name} of {mailbox.writer} is missing",
            )
        messages = list(actual.get(name, {"messages": []})["messages"])
        for entry in sorted(mailbox.entries, key=lambda entry: entry.uid is None):
            found = _take(messages, entry)
            where = f"{entry.id} in {name}"
            if found is None:
                note("changes_lost", entry.writer, f"{where} of {entry.writer} is missing")
                continue
            if entry.uid is not None and found["uid"] != entry.uid:
                note(
                    "uids_changed",
                    entry.writer,
                    "{} has UID {}, not {}".format(where, found["uid"], entry.uid),
                )
            if entry.sent and (found["head"], found["body"]) != (
                entry.sent["head"],
                entry.sent["body"],
            ):
                note("altered", entry.id, f"{where} is not what was appended")
            _judge_flags(entry, found, where, note)
        for message in messages:
            where = "{} in {}".format(message["id"], name)
            remover = state.removed.get((name, message["id"]))
            if remover is not None:
                note("changes_lost", remover, f"{where} is there after {remover}")
            elif any(entry.id == message["id"] for entry in mailbox.entries):
                note("duplicated", message["id"], f"{where} is there once too often")
            else:
                note("unexpected", message["id"], f"{where} was never acknowledged and is there")
    return findings


def _take(messages: list[Mapping[str, Any]], entry: Entry) -> Mapping[str, Any] | None:
    """Take out and return the message an entry stands for: by its UID, else one of its id."""
    same = [message for message in messages if message["id"] == entry.id]
    exact = [message for message in same if message["uid"] == entry.uid]
    if not same:
        return None
    found = (exact or same)[0]
    messages.remove(found)
    return found


def _judge_flags(entry: Entry, found: Mapping[str, Any], where: str, note: Any) -> None:
    flags = {flag.lower() for flag in found["flags"]}
    for flag, (wanted, writer) in entry.flags.items():
        if (flag.lower() in flags) != wanted:
            note(
                "changes_lost",
                writer,
                "{} {} {}".format(where, "lacks" if wanted else "still has", flag),
            )
    for flag in flags - {flag.lower() for flag in entry.flags}:
        note("unexpected", entry.id + flag, f"{where} has {flag}, which was never acknowledged")


def judge_changes(
    operations: Sequence[Mapping[str, Any]], views: Mapping[str, Mapping[str, Any]]
) -> list[Finding]:
    """Hold every generation of every IMAP worker against every view."""
    generations: dict[tuple[str, str], list[Mapping[str, Any]]] = collections.defaultdict(list)
    for operation in operations:
        generations[operation["user"], operation["generation"]].append(operation)
    findings = []
    for (user, _generation), changes in generations.items():
        states = possible_states(changes)
        names = {change["mailbox"] for change in changes} | {
            change["to"] for change in changes if "to" in change
        }
        for view, users in views.items():
            actual = {name: box for name, box in users.get(user, {}).items() if name in names}
            accounts = [judge_state(state, view, user, actual) for state in states]
            findings += sorted(accounts, key=len)[0]
    return findings


def judge_uidvalidity(
    operations: Iterable[Mapping[str, Any]], views: Mapping[str, Mapping[str, Any]]
) -> list[Finding]:
    """Compare the UIDVALIDITY that each mailbox had during the run with that in each view."""
    told: dict[tuple[str, str], int] = {}
    findings = []
    for operation in operations:
        if operation.get("uidvalidity"):
            key = (operation["user"], operation.get("to") or operation["mailbox"])
            known = told.setdefault(key, operation["uidvalidity"])
            if known != operation["uidvalidity"]:
                now = operation["uidvalidity"]
                text = f"{key[1]} of {key[0]} had UIDVALIDITY {known}, then {now}"
                findings.append(Finding("uids_changed", key[1], "during the run", text))
    for (user, name), validity in told.items():
        for view, users in views.items():
            now = users.get(user, {}).get(name, {}).get("uidvalidity", validity)
            if now != validity:
                text = f"{name} of {user} had UIDVALIDITY {validity} and has {now}"
                findings.append(Finding("uids_changed", name, view, text))
    return findings


def judge_views(views: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Compare every view with the first: same mailboxes, UIDVALIDITY, UIDs, flags and contents."""
    names = list(views)
    findings = []
    for other in names[1:]:
        for user, mailboxes in views[names[0]].items():
            theirs = views[other].get(user, {})
            for name in sorted(set(mailboxes) | set(theirs)):
                difference = _difference(mailboxes.get(name), theirs.get(name))
                if difference:
                    text = f"{name} of {user} differs from what {names[0]} has: {difference}"
                    findings.append(Finding("nodes_differ", f"{user}/{name}", other, text))
    return findings


def _difference(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str | None:
    if one is None or other is None:
        return None if one is other else "it is there once only"
    if one["uidvalidity"] != other["uidvalidity"]:
        return "UIDVALIDITY {} and {}".format(one["uidvalidity"], other["uidvalidity"])
    mine, theirs = (
        {message["uid"]: message for message in box["messages"]} for box in (one, other)
    )
    for uid in sorted(set(mine) | set(theirs)):
        if mine.get(uid) != theirs.get(uid):
            return f"UID {uid} is {_shown(mine.get(uid))} and {_shown(theirs.get(uid))}"
    return None


def _shown(message: Mapping[str, Any] | None) -> str:
    if message is None:
        return "absent"
    return "{} [{}] {}".format(message["id"], " ".join(message["flags"]), message["body"][:8])


# -- times


def outage_s(ends: Sequence[int], begin: int, end: int, last: int) -> float:
    """Return the longest time in seconds without a success that touches the window.

    ``ends`` are the sorted times (ns) at which requests were acknowledged, ``last`` is the
    end of the log: if nothing succeeded after the move, the outage lasted until then.
    """
    longest = 0
    for before, after in zip([begin, *ends], [*ends, last], strict=False):
        if after > begin and before < end:
            longest = max(longest, after - before)
    return round(longest / 1e9, 3)


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the value that this share of the values does not exceed; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


def latency_ms(operations: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return how long acknowledged operations took: 50th and 99th percentile in milliseconds."""
    times = [(item["end"] - item["start"]) / 1e6 for item in operations if item["outcome"] == OK]
    shown = {"p50": percentile(times, 0.50), "p99": percentile(times, 0.99)}
    return {name: None if value is None else round(value, 1) for name, value in shown.items()}


def timeline(
    operations: Iterable[Mapping[str, Any]], begin: int, end: int, bin_ms: int = 100
) -> dict[str, Any]:
    """Count what ended in each bin: acknowledged messages and changes, and failed attempts."""
    size = max(1, -(-(end - begin) // (bin_ms * 1_000_000)))
    series = {name: [0] * size for name in ("messages", "changes", "failed")}
    for item in operations:
        if item["outcome"] == OK:
            name = "messages" if item["kind"] == "send" else "changes"
        else:
            name = "failed"
        place = (item["end"] - begin) // (bin_ms * 1_000_000)
        series[name][max(0, min(size - 1, place))] += 1
    return {"bin_ms": bin_ms, **series}


# -- the report


def account(
    log: Sequence[Mapping[str, Any]],
    marks: Sequence[Mapping[str, Any]],
    views: Mapping[str, Mapping[str, Any]],
    moves: Sequence[Mapping[str, Any]],
    minimum: Mapping[str, int],
    kind: str = "switchover",
) -> dict[str, Any]:
    """Return the report of a run.

    ``moves`` says from where to where, in the order of the marks move-1-begin, move-1-end, ...
    """
    begin = next(item for item in log if item["type"] == "begin")
    operations = [item for item in log if item["type"] == "op"]
    complete = any(item["type"] == "end" for item in log)
    last = max([item["end"] for item in operations] + [begin["at"]])
    sends = [item for item in operations if item["kind"] == "send"]
    changes = [item for item in operations if item["kind"] in CHANGES]
    messages = final_outcomes(sends)
    findings = (
        judge_messages(messages, views)
        + judge_changes(changes, views)
        + judge_uidvalidity((item for item in operations if "mailbox" in item), views)
        + judge_views(views)
    )
    counted = {
        what: len({finding.key for finding in findings if finding.what == what})
        for what in (
            "lost", "duplicated", "changes_lost", "altered", "unexpected", "refused_but_present",
            "uids_changed", "nodes_differ",
        )
    }  # fmt: skip
    timed = _timed_moves(moves, marks, sends, changes, begin["at"], last)
    outcomes = collections.Counter(send["outcome"] for send in messages.values())
    changed = collections.Counter(change["outcome"] for change in changes)
    report = {
        "kind": kind,
        "from": moves[0]["from"] if moves else None,
        "to": moves[0]["to"] if moves else None,
        "run": begin["run"],
        "started": _iso(begin["wall"]),
        "duration_s": round((last - begin["at"]) / 1e9, 1),
        "acknowledged": outcomes[OK],
        "refused": outcomes[REFUSED],
        "unknown": outcomes[UNKNOWN],
        "unreached": outcomes[UNREACHED],
        "lost": counted["lost"],
        "duplicated": counted["duplicated"],
        "altered": counted["altered"],
        "changes_acknowledged": changed[OK],
        "changes_refused": changed[REFUSED],
        "changes_unknown": changed[UNKNOWN],
        "changes_lost": counted["changes_lost"],
        "unexpected": counted["unexpected"],
        "refused_but_present": counted["refused_but_present"],
        "uids_changed": counted["uids_changed"],
        "nodes_differ": counted["nodes_differ"],
        "smtp_outage_s": max((move["smtp_outage_s"] for move in timed), default=None),
        "imap_outage_s": max((move["imap_outage_s"] for move in timed), default=None),
        "op_latency_ms": latency_ms([*sends, *changes]),
        "latency_ms": {
            name: latency_ms([item for item in operations if item["kind"] == name])
            for name in sorted({item["kind"] for item in [*sends, *changes]})
        },
        "contents": dict(
            sorted(
                collections.Counter(
                    _content(send) for send in messages.values() if send["outcome"] == OK
                ).items()
            )
        ),
        "samples_sent": len(
            {
                send["content"]
                for send in messages.values()
                if send["outcome"] == OK and _content(send) == "sample"
            }
        ),
        "views": list(views),
        "moves": timed,
        "findings": gathered(findings)[:FINDINGS_SHOWN],
        "findings_total": len(gathered(findings)),
    }
    report["reasons"] = verdict_reasons(report, complete, minimum, len(moves))
    report["verdict"] = "fail" if report["reasons"] else "pass"
    return report


def gathered(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """Return the findings for people: one that several views share is one, with their names."""
    views: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        views.setdefault((finding.what, finding.text), []).append(finding.view)
    return [
        {"what": what, "view": ", ".join(names), "text": text}
        for (what, text), names in views.items()
    ]


def verdict_reasons(
    report: Mapping[str, Any], complete: bool, minimum: Mapping[str, int], moves: int
) -> list[str]:
    """Return why the test failed, one sentence each; empty when it passed."""
    must_be_none = {
        "lost": "acknowledged messages are lost",
        "duplicated": "messages are there more than once",
        "changes_lost": "acknowledged changes are lost",
        "altered": "messages are not what was sent",
        "unexpected": "things are there that nobody asked for",
        "refused_but_present": "refused messages are there all the same",
        "uids_changed": "UIDs or UIDVALIDITYs changed",
        "nodes_differ": "mailboxes differ between the nodes",
    }
    reasons = [f"{report[key]} {text}." for key, text in must_be_none.items() if report[key]]
    for key in ("acknowledged", "changes_acknowledged"):
        if report[key] < minimum[key]:
            thing = "messages" if key == "acknowledged" else "changes"
            shortage = f"Only {report[key]} {thing} were acknowledged"
            reasons.append(f"{shortage}; a test needs {minimum[key]}.")
    if not complete:
        reasons.append("The workload ended before it was told to.")
    if len(report["moves"]) != moves:
        reasons.append(f"Only {len(report['moves'])} of {moves} moves were made under load.")
    return reasons


def _timed_moves(
    moves: Sequence[Mapping[str, Any]],
    marks: Sequence[Mapping[str, Any]],
    sends: Sequence[Mapping[str, Any]],
    changes: Sequence[Mapping[str, Any]],
    start: int,
    last: int,
) -> list[dict[str, Any]]:
    at = {mark["name"]: mark["at"] for mark in marks}
    successes = [
        sorted(item["end"] for item in items if item["outcome"] == OK) for items in (sends, changes)
    ]
    timed = []
    for number, move in enumerate(moves, 1):
        begin, end = at.get(f"move-{number}-begin"), at.get(f"move-{number}-end")
        # A move that nobody was there to notice has no outage, and proves nothing.
        if begin is None or end is None or begin > last:
            continue
        # A gap after the move is its doing for a while, but not once the next move has begun.
        until = min(end + int(SETTLE_S * 1e9), at.get(f"move-{number + 1}-begin", last), last)
        smtp, imap = (outage_s(ends, begin, max(end, until), last) for ends in successes)
        timed.append(
            {
                **move,
                "begin_s": round((begin - start) / 1e9, 3),
                "end_s": round((end - start) / 1e9, 3),
                "smtp_outage_s": smtp,
                "imap_outage_s": imap,
            }
        )
    return timed


def _content(send: Mapping[str, Any]) -> str:
    return "sample" if send["content"].startswith("sample ") else str(send["content"])


def _iso(wall: float) -> str:
    return datetime.datetime.fromtimestamp(wall, datetime.UTC).isoformat(timespec="seconds")
