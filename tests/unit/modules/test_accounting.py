"""Each way in which a run can go wrong: the account says so, and says nothing else."""

import copy
from typing import Any

import pytest
from ansible_collections.umbra.mail.plugins.module_utils import _accounting as accounting

S = 1_000_000_000  # nanoseconds
SENT = {"head": "h" * 64, "body": "b" * 64, "size": 100}
USER = "user01@example.org"
OTHER = "user02@example.org"
Json = dict[str, Any]


def send(identity: str, outcome: str = "ok", to: tuple[str, ...] = (USER,), end: int = S) -> Json:
    return {
        "type": "op",
        "kind": "send",
        "id": identity,
        "start": end - 5_000_000,
        "end": end,
        "outcome": outcome,
        "answer": "250 queued" if outcome == "ok" else "451 later",
        "recipients": list(to),
        "content": "plain",
        "sent": SENT,
    }


def stored(identity: str, uid: int = 1, flags: tuple[str, ...] = (), **other: Any) -> Json:
    return {"uid": uid, "id": identity, "flags": list(flags), **SENT, **other}


def inbox(*messages: Json, user: str = USER) -> Json:
    return {user: {"INBOX": {"uidvalidity": 7, "messages": list(messages)}}}


def counts(findings: list[accounting.Finding]) -> dict[str, int]:
    found: dict[str, int] = {}
    for finding in findings:
        found[finding.what] = found.get(finding.what, 0) + 1
    return found


def judge(sends: list[Json], *views: Json) -> dict[str, int]:
    named = {f"view{number}": view for number, view in enumerate(views)}
    return counts(accounting.judge_messages(accounting.final_outcomes(sends), named))


class TestMessages:
    @pytest.mark.parametrize(
        ("outcome", "copies", "expected"),
        [
            ("ok", 1, {}),
            ("ok", 0, {"lost": 1}),
            ("ok", 2, {"duplicated": 1}),
            ("unknown", 0, {}),
            ("unknown", 1, {}),
            ("unknown", 2, {"duplicated": 1}),
            ("refused", 0, {}),
            ("refused", 1, {"refused_but_present": 1}),
            ("refused", 2, {"refused_but_present": 1, "duplicated": 1}),
            ("unreached", 0, {}),
            ("unreached", 1, {"refused_but_present": 1}),
        ],
    )
    def test_outcome_and_copies(self, outcome: str, copies: int, expected: dict[str, int]) -> None:
        view = inbox(*(stored("m1", uid) for uid in range(1, copies + 1)))
        assert judge([send("m1", outcome)], view) == expected

    def test_message_never_sent(self) -> None:
        assert judge([], inbox(stored("m9"))) == {"unexpected": 1}

    def test_message_at_the_wrong_recipient(self) -> None:
        view = {**inbox(), **inbox(stored("m1"), user=OTHER)}
        assert judge([send("m1")], view) == {"lost": 1, "unexpected": 1}

    def test_lost_for_one_of_two_recipients(self) -> None:
        view = {**inbox(stored("m1")), **inbox(user=OTHER)}
        assert judge([send("m1", to=(USER, OTHER))], view) == {"lost": 1}

    def test_lost_on_one_node_only(self) -> None:
        assert judge([send("m1")], inbox(stored("m1")), inbox()) == {"lost": 1}

    @pytest.mark.parametrize("part", ["head", "body"])
    def test_altered(self, part: str) -> None:
        message = {**stored("m1"), part: "x" * 64}
        assert judge([send("m1")], inbox(message)) == {"altered": 1}

    def test_unknown_message_must_be_intact_too(self) -> None:
        assert judge([send("m1", "unknown")], inbox(stored("m1", body="x"))) == {"altered": 1}

    def test_attempts_that_reached_no_node_come_before_the_one_that_counts(self) -> None:
        attempts = [send("m1", "unreached"), send("m1", "unreached"), send("m1", "ok")]
        assert judge(attempts, inbox(stored("m1"))) == {}
        assert judge(attempts, inbox()) == {"lost": 1}

    def test_missing_inbox_is_an_empty_one(self) -> None:
        assert judge([send("m1")], {}) == {"lost": 1}


class Worker:
    """Writes one IMAP worker's log and keeps the mailboxes that a faultless server would have."""

    def __init__(self) -> None:
        self.log: list[Json] = []
        self.boxes: Json = {}

    def op(self, kind: str, outcome: str = "ok", **details: Any) -> str:
        identity = f"c{len(self.log)}"
        self.log.append(
            {
                "type": "op",
                "kind": kind,
                "id": identity,
                "user": USER,
                "generation": "0-0",
                "outcome": outcome,
                "start": S,
                "end": S + 1,
                **details,
            }
        )
        return identity

    def box(self, name: str) -> list[Json]:
        messages: list[Json] = self.boxes[name]["messages"]
        return messages

    def judge(self) -> list[accounting.Finding]:
        views = {"view": {USER: self.boxes}}
        found: list[accounting.Finding] = accounting.judge_changes(self.log, views)
        return found


@pytest.fixture
def worker() -> Worker:
    """Mailbox a with m1 (UID 1) and m2 (UID 2, seen), mailbox b with a copy of m2 (UID 1)."""
    it = Worker()
    for name in ("a", "b"):
        it.op("create", mailbox=name)
        it.boxes[name] = {"uidvalidity": 7, "messages": []}
    it.op("append", mailbox="a", message="m1", uid=1, uidvalidity=7, sent=SENT)
    it.op("append", mailbox="a", message="m2", uid=2, uidvalidity=7, sent=SENT)
    it.op("store", mailbox="a", message="m2", flag=r"\Seen", add=True)
    it.op("copy", mailbox="a", message="m2", to="b", uid=1, uidvalidity=7)
    it.box("a").extend([stored("m1", 1), stored("m2", 2, (r"\Seen",))])
    it.box("b").append(stored("m2", 1, (r"\Seen",)))
    return it


def only(worker: Worker) -> tuple[str, str]:
    findings = worker.judge()
    assert len(findings) == 1, findings
    return findings[0].what, findings[0].key


class TestChanges:
    def test_all_there(self, worker: Worker) -> None:
        assert worker.judge() == []

    def test_append_lost(self, worker: Worker) -> None:
        del worker.box("a")[0]
        assert only(worker) == ("changes_lost", "c2")

    def test_flag_lost(self, worker: Worker) -> None:
        worker.box("a")[1]["flags"] = []
        assert only(worker) == ("changes_lost", "c4")

    def test_cleared_flag_is_back(self, worker: Worker) -> None:
        change = worker.op("store", mailbox="a", message="m2", flag=r"\Seen", add=False)
        assert only(worker) == ("changes_lost", change)

    def test_flag_out_of_nowhere(self, worker: Worker) -> None:
        worker.box("a")[0]["flags"] = [r"\Flagged"]
        assert only(worker)[0] == "unexpected"

    def test_flags_are_compared_without_case(self, worker: Worker) -> None:
        worker.box("a")[1]["flags"] = [r"\SEEN"]
        assert worker.judge() == []

    def test_copy_lost(self, worker: Worker) -> None:
        worker.box("b").clear()
        assert only(worker) == ("changes_lost", "c5")

    def test_copy_lost_its_flag(self, worker: Worker) -> None:
        worker.box("b")[0]["flags"] = []
        assert only(worker) == ("changes_lost", "c4")

    def test_flag_set_after_the_copy_belongs_to_the_original(self, worker: Worker) -> None:
        worker.op("store", mailbox="a", message="m2", flag="$Important", add=True)
        worker.box("a")[1]["flags"] = [r"\Seen", "$Important"]
        assert worker.judge() == []

    def test_move_done(self, worker: Worker) -> None:
        worker.op("move", mailbox="a", message="m1", to="b", uid=2, uidvalidity=7)
        worker.box("b").append(stored("m1", 2))
        del worker.box("a")[0]
        assert worker.judge() == []

    def test_move_undone(self, worker: Worker) -> None:
        change = worker.op("move", mailbox="a", message="m1", to="b", uid=2, uidvalidity=7)
        assert {(item.what, item.key) for item in worker.judge()} == {("changes_lost", change)}

    def test_move_lost_the_message(self, worker: Worker) -> None:
        change = worker.op("move", mailbox="a", message="m1", to="b", uid=2, uidvalidity=7)
        del worker.box("a")[0]
        assert only(worker) == ("changes_lost", change)

    def test_expunged_message_is_back(self, worker: Worker) -> None:
        worker.op("store", mailbox="a", message="m1", flag=r"\Deleted", add=True)
        change = worker.op("expunge", mailbox="a", message="m1")
        assert only(worker) == ("changes_lost", change)

    def test_second_copy_of_an_appended_message(self, worker: Worker) -> None:
        worker.box("a").append(stored("m1", 9))
        assert only(worker) == ("duplicated", "m1")

    def test_message_of_a_refused_append(self, worker: Worker) -> None:
        worker.op("append", "refused", mailbox="a", message="m3", sent=SENT)
        assert worker.judge() == []
        worker.box("a").append(stored("m3", 3))
        assert only(worker)[0] == "unexpected"

    def test_uid_changed(self, worker: Worker) -> None:
        worker.box("a")[0]["uid"] = 5
        assert only(worker) == ("uids_changed", "c2")

    def test_appended_content_altered(self, worker: Worker) -> None:
        worker.box("a")[0]["body"] = "x"
        assert only(worker) == ("altered", "m1")

    def test_create_lost(self, worker: Worker) -> None:
        change = worker.op("create", mailbox="c")
        assert only(worker) == ("changes_lost", change)

    def test_refused_create_has_happened(self, worker: Worker) -> None:
        worker.op("create", "refused", mailbox="c")
        worker.boxes["c"] = {"uidvalidity": 7, "messages": []}
        assert only(worker)[0] == "unexpected"

    def test_rename_done_and_undone(self, worker: Worker) -> None:
        worker.op("create", mailbox="c")
        change = worker.op("rename", mailbox="c", to="d")
        worker.boxes["d"] = {"uidvalidity": 7, "messages": []}
        assert worker.judge() == []
        worker.boxes["c"] = worker.boxes.pop("d")
        assert {(item.what, item.key) for item in worker.judge()} == {("changes_lost", change)}

    def test_rename_takes_the_messages_along(self, worker: Worker) -> None:
        worker.op("rename", mailbox="b", to="d")
        worker.boxes["d"] = worker.boxes.pop("b")
        assert worker.judge() == []
        worker.box("d").clear()
        assert only(worker) == ("changes_lost", "c5")

    def test_deleted_mailbox_is_back(self, worker: Worker) -> None:
        change = worker.op("delete", mailbox="b")
        assert only(worker) == ("changes_lost", change)
        del worker.boxes["b"]
        assert worker.judge() == []

    def test_name_used_again(self, worker: Worker) -> None:
        worker.op("delete", mailbox="b")
        worker.op("create", mailbox="b")
        worker.box("b").clear()
        assert worker.judge() == []

    def test_whole_mailbox_gone_counts_every_change_in_it(self, worker: Worker) -> None:
        del worker.boxes["a"]
        keys = {item.key for item in worker.judge() if item.what == "changes_lost"}
        assert keys == {"c0", "c2", "c3"}

    def test_another_generation_is_judged_by_itself(self, worker: Worker) -> None:
        worker.op("create", mailbox="x", generation="0-1")
        worker.boxes["x"] = {"uidvalidity": 7, "messages": []}
        assert worker.judge() == []


class TestUnknownChanges:
    """Either outcome is right, and nothing else."""

    def test_append(self, worker: Worker) -> None:
        worker.op("append", "unknown", mailbox="a", message="m3", sent=SENT)
        assert worker.judge() == []
        worker.box("a").append(stored("m3", 3))
        assert worker.judge() == []
        worker.box("a").append(stored("m3", 4))
        assert only(worker) == ("duplicated", "m3")

    def test_store(self, worker: Worker) -> None:
        worker.op("store", "unknown", mailbox="a", message="m1", flag=r"\Draft", add=True)
        assert worker.judge() == []
        worker.box("a")[0]["flags"] = [r"\Draft"]
        assert worker.judge() == []
        worker.box("a")[0]["flags"] = [r"\Answered"]
        assert only(worker)[0] == "unexpected"

    def test_move(self, worker: Worker) -> None:
        worker.op("move", "unknown", mailbox="a", message="m1", to="b")
        assert worker.judge() == [], "not begun"
        worker.box("b").append(stored("m1", 2))
        assert worker.judge() == [], "copied, not yet expunged"
        del worker.box("a")[0]
        assert worker.judge() == [], "done"
        worker.box("b").pop()
        assert [item.what for item in worker.judge()] == ["changes_lost"], "in neither mailbox"

    def test_expunge(self, worker: Worker) -> None:
        worker.op("expunge", "unknown", mailbox="a", message="m1")
        assert worker.judge() == []
        del worker.box("a")[0]
        assert worker.judge() == []

    def test_rename(self, worker: Worker) -> None:
        worker.op("rename", "unknown", mailbox="b", to="d")
        assert worker.judge() == []
        worker.boxes["d"] = worker.boxes.pop("b")
        assert worker.judge() == []
        del worker.boxes["d"]
        assert {item.what for item in worker.judge()} == {"changes_lost"}

    def test_delete(self, worker: Worker) -> None:
        worker.op("delete", "unknown", mailbox="b")
        assert worker.judge() == []
        del worker.boxes["b"]
        assert worker.judge() == []

    def test_does_not_excuse_the_changes_before_it(self, worker: Worker) -> None:
        worker.op("append", "unknown", mailbox="a", message="m3", sent=SENT)
        del worker.box("a")[0]
        assert only(worker) == ("changes_lost", "c2")

    def test_views_may_not_each_take_another_outcome(self, worker: Worker) -> None:
        worker.op("append", "unknown", mailbox="a", message="m3", sent=SENT)
        other = copy.deepcopy(worker.boxes)
        other["a"]["messages"].append(stored("m3", 3))
        views = {"one": {USER: worker.boxes}, "two": {USER: other}}
        assert accounting.judge_changes(worker.log, views) == []
        assert counts(accounting.judge_views(views)) == {"nodes_differ": 1}


class TestUids:
    def test_uidvalidity_kept(self, worker: Worker) -> None:
        assert accounting.judge_uidvalidity(worker.log, {"view": {USER: worker.boxes}}) == []

    def test_uidvalidity_changed_in_the_end(self, worker: Worker) -> None:
        worker.boxes["a"]["uidvalidity"] = 8
        findings = accounting.judge_uidvalidity(worker.log, {"view": {USER: worker.boxes}})
        assert counts(findings) == {"uids_changed": 1}

    def test_uidvalidity_changed_during_the_run(self, worker: Worker) -> None:
        worker.op("select", mailbox="a", uidvalidity=9)
        findings = accounting.judge_uidvalidity(worker.log, {})
        assert counts(findings) == {"uids_changed": 1}


class TestViews:
    def test_alike(self) -> None:
        views = {"one": inbox(stored("m1")), "two": inbox(stored("m1"))}
        assert accounting.judge_views(views) == []

    @pytest.mark.parametrize(
        "other",
        [
            inbox(stored("m1", 2)),
            inbox(stored("m1", flags=(r"\Seen",))),
            inbox(stored("m1", body="x")),
            inbox(stored("m1"), stored("m2", 2)),
            inbox(),
            {USER: {"INBOX": {"uidvalidity": 8, "messages": [stored("m1")]}}},
            {USER: {}},
            {USER: {**inbox(stored("m1"))[USER], "more": {"uidvalidity": 1, "messages": []}}},
        ],
    )
    def test_different(self, other: Json) -> None:
        findings = accounting.judge_views({"one": inbox(stored("m1")), "two": other})
        assert counts(findings) == {"nodes_differ": 1}


class TestTimes:
    def test_outage_is_the_gap_around_the_move(self) -> None:
        ends = [1 * S, 2 * S, 5 * S, 6 * S]
        assert accounting.outage_s(ends, int(2.5 * S), 4 * S, 6 * S) == 3.0

    def test_gap_outside_the_window_does_not_count(self) -> None:
        ends = [1 * S, 9 * S, 10 * S, 11 * S, 12 * S]
        assert accounting.outage_s(ends, int(10.5 * S), int(11.5 * S), 12 * S) == 1.0

    def test_no_success_afterwards_lasts_until_the_end(self) -> None:
        assert accounting.outage_s([1 * S, 2 * S], 3 * S, 4 * S, 30 * S) == 28.0

    def test_no_success_at_all(self) -> None:
        assert accounting.outage_s([], 3 * S, 4 * S, 30 * S) == 27.0

    @pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (1.0, 100)])
    def test_percentile(self, share: float, value: int) -> None:
        assert accounting.percentile(list(range(100, 0, -1)), share) == value

    def test_percentile_of_nothing(self) -> None:
        assert accounting.percentile([], 0.5) is None

    def test_latency_counts_acknowledged_operations_only(self) -> None:
        slow = {**send("m2", "unknown"), "start": 0, "end": 60 * S}
        assert accounting.latency_ms([send("m1"), slow]) == {"p50": 5.0, "p99": 5.0}

    def test_timeline(self) -> None:
        items = [
            send("m1", end=50_000_000),
            send("m2", "refused", end=150_000_000),
            {**send("m3", end=160_000_000), "kind": "store"},
            send("m4", end=300_000_000),
        ]
        line = accounting.timeline(items, 0, 300_000_000)
        assert line == {
            "bin_ms": 100,
            "messages": [1, 0, 1],
            "changes": [0, 1, 0],
            "failed": [0, 1, 0],
        }


MOVES = [{"from": "mail-a", "to": "mail-b"}, {"from": "mail-b", "to": "mail-a"}]


def run(worker: Worker, messages: int = 20) -> tuple[list[Json], list[Json], Json]:
    """A whole run in which nothing went wrong: a message a second, two moves with a gap of 2 s."""
    times = [second for second in range(messages) if second not in (6, 13)]
    log: list[Json] = [{"type": "begin", "at": 0, "wall": 1767225600.0, "run": "r"}]
    log += [send(f"m-{second}", end=second * S) for second in times]
    log += [{**item, "end": messages * S} for item in worker.log]
    log.append({"type": "end", "at": messages * S})
    times_of_marks = {
        "move-1-begin": 5.5,
        "move-1-end": 6.5,
        "move-2-begin": 12.5,
        "move-2-end": 13.5,
    }
    marks = [{"type": "mark", "name": name, "at": at * S} for name, at in times_of_marks.items()]
    view = inbox(*(stored(f"m-{second}", second + 1) for second in times))
    view[USER].update(worker.boxes)
    return log, marks, view


def report(log: list[Json], marks: list[Json], *views: Json, minimum: int = 1) -> Json:
    named = dict(zip(("outside", "mail-a", "mail-b"), views, strict=False))
    least = {"acknowledged": minimum, "changes_acknowledged": minimum}
    result: Json = accounting.account(log, marks, named, MOVES, least)
    return result


class TestReport:
    def test_faultless_run_passes(self, worker: Worker) -> None:
        log, marks, view = run(worker)
        result = report(log, marks, view, view, view)
        assert result["verdict"] == "pass"
        assert result["findings"] == []
        wanted = {
            "kind": "switchover",
            "from": "mail-a",
            "to": "mail-b",
            "started": "2026-01-01T00:00:00+00:00",
            "acknowledged": 18,
            "refused": 0,
            "lost": 0,
            "duplicated": 0,
            "changes_acknowledged": 6,
            "changes_lost": 0,
            "smtp_outage_s": 2.0,
        }
        assert {key: result[key] for key in wanted} == wanted
        assert set(result["op_latency_ms"]) == {"p50", "p99"}
        assert [move["begin_s"] for move in result["moves"]] == [5.5, 12.5]

    def test_one_message_lost_on_one_node(self, worker: Worker) -> None:
        log, marks, view = run(worker)
        broken = copy.deepcopy(view)
        broken[USER]["INBOX"]["messages"].pop()
        result = report(log, marks, view, view, broken)
        assert (result["verdict"], result["lost"]) == ("fail", 1)
        assert "1 acknowledged messages are lost." in result["reasons"]

    def test_message_lost_on_both_nodes_counts_once(self, worker: Worker) -> None:
        log, marks, view = run(worker)
        view[USER]["INBOX"]["messages"].pop()
        result = report(log, marks, view, view, view)
        assert result["lost"] == 1
        assert result["findings_total"] == 1
        assert result["findings"][0]["view"] == "outside, mail-a, mail-b"

    def test_change_lost(self, worker: Worker) -> None:
        log, marks, view = run(worker)
        view[USER]["a"]["messages"].pop(0)
        result = report(log, marks, view, view, view)
        assert (result["verdict"], result["changes_lost"]) == ("fail", 1)

    def test_too_little_proves_nothing(self, worker: Worker) -> None:
        log, marks, view = run(worker)
        result = report(log, marks, view, minimum=500)
        assert result["verdict"] == "fail"
        assert len(result["reasons"]) == 2

    def test_workload_that_died(self, worker: Worker) -> None:
        log, marks, view = run(worker)
        result = report(log[:-1], marks, view)
        assert result["reasons"] == ["The workload ended before it was told to."]

    def test_missing_move(self, worker: Worker) -> None:
        log, marks, view = run(worker)
        result = report(log, marks[:2], view)
        assert result["reasons"] == ["Only 1 of 2 moves were made under load."]

    def test_a_move_after_the_load_is_none(self, worker: Worker) -> None:
        log, marks, view = run(worker, messages=12)
        result = report(log, marks, view)
        assert result["reasons"] == ["Only 1 of 2 moves were made under load."]
        assert len(result["moves"]) == 1

    @pytest.mark.parametrize(
        "key", ["altered", "unexpected", "refused_but_present", "nodes_differ"]
    )
    def test_every_kind_of_finding_fails(self, worker: Worker, key: str) -> None:
        log, marks, view = run(worker)
        other = copy.deepcopy(view)
        messages = other[USER]["INBOX"]["messages"]
        if key == "altered":
            messages[0]["body"] = "x"
        elif key == "unexpected":
            messages.append(stored("nobody", 99))
        elif key == "refused_but_present":
            log.insert(1, send("no", "refused"))
            messages.append(stored("no", 99))
        else:
            messages[0]["flags"] = [r"\Seen"]
        result = report(log, marks, view, other)
        assert result["verdict"] == "fail"
        assert result[key] == 1
