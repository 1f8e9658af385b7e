"""The table and the goals of a run."""

from tests.faults import report
from tests.faults.schedule import plan
from tests.faults.trial import Result


def result(number: int, fault: str, *reasons: str, lost: int = 0, refusal: float = 1.0) -> Result:
    return Result(
        plan(1, number, fault), "mail-a", 12.0, healed_s=2.0, refusal_s=refusal, acknowledged=100,
        counts={"lost": lost, "duplicated": 0}, reasons=reasons,
    )  # fmt: skip


RESULTS = [
    result(1, "agent killed"),
    result(2, "link cut", refusal=4.25),
    result(3, "agent killed", "1 acknowledged messages are lost.", lost=1),
]


def test_one_row_for_each_fault_and_one_for_all() -> None:
    lines = report.lines(RESULTS)
    assert [line.split("  ")[0] for line in lines[2:5]] == ["agent killed", "link cut", "all"]
    assert lines[2].split()[-8:] == ["2", "1", "200", "1", "0", "0", "0", "1.0"]
    assert lines[4].split() == ["all", "3", "1", "300", "1", "0", "0", "0", "4.25"]
    assert "Trial 3, agent killed: 1 acknowledged messages are lost." in lines


def test_a_trial_that_broke_off_is_counted_without_figures() -> None:
    broken = Result(plan(1, 4, "link cut"), "mail-a", 30.0, reasons=("It did not heal.",))
    total = report.row("all", [broken])
    assert (total["trials"], total["failed"], total["acknowledged"]) == (1, 1, 0)
    assert total["refusal_s"] is None
    assert "FAILED" in report.line(broken, 9)


def test_goals_hold_only_when_all_trials_do() -> None:
    found = {goal["name"]: goal for goal in report.goals(RESULTS)}
    assert (found["lost"]["value"], found["lost"]["holds"]) == (1, False)
    assert (found["duplicated"]["value"], found["duplicated"]["holds"]) == (0, True)
    assert (found["trials"]["bound"], found["trials"]["holds"]) == (200, False)
    assert found["failed trials"]["holds"] is False
    good = [result(number, "agent killed") for number in range(200)]
    assert all(goal["holds"] for goal in report.goals(good))


def test_the_file_has_the_samples_and_what_follows_from_them() -> None:
    found = report.report(5, RESULTS, {"commit": "abc"}, 36.04)
    assert (found["seed"], found["commit"], found["seconds"]) == (5, "abc", 36.0)
    assert [trial["plan"]["number"] for trial in found["trials"]] == [1, 2, 3]
    assert [row["fault"] for row in found["faults"]] == ["agent killed", "link cut"]
