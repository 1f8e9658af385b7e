"""The suite runner never calls a run that tested nothing a success."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests import run
from tests.run import Count


@pytest.mark.parametrize(
    ("count", "returncode", "judged"),
    [
        (Count(passed=3), 0, Count(passed=3)),
        (Count(), 0, Count(failed=1)),  # ran nothing and called it success
        (Count(skipped=4), 0, Count(failed=1, skipped=4)),  # skipped all
        (Count(passed=3), 2, Count(passed=3, failed=1)),  # crashed after the tests
        (Count(passed=3, failed=2), 1, Count(passed=3, failed=2)),
    ],
)
def test_judged(count: Count, returncode: int, judged: Count) -> None:
    assert count.judged(returncode) == judged


def test_junit_count(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert run.junit_count(report) == Count()
    report.write_text(
        '<testsuites><testsuite tests="9" failures="1" errors="2" skipped="3"/></testsuites>'
    )
    assert run.junit_count(report) == Count(passed=3, failed=3, skipped=3)


def test_pytest_count() -> None:
    log = (
        "PLAY RECAP ****\n===== 12 passed, 1 skipped in 3.21s =====\n"
        "====== 1 failed, 2 passed, 1 error in 61.00s (0:01:01) ======\n"
        "===== warnings summary =====\n"
    )
    assert run.pytest_count(log) == [Count(12, 0, 1), Count(2, 2)]
    assert run.pytest_count("===== no tests ran in 0.01s =====\n") == [Count()]
    assert run.pytest_count("WARNING Skipping, no tests found.\n") == []


def test_verify_steps(tmp_path: Path) -> None:
    base, own = tmp_path / "config.yml", tmp_path / "molecule.yml"
    base.write_text("scenario: {test_sequence: [converge, verify, side_effect, verify]}\n")
    own.write_text("---\n")
    assert run.verify_steps(own, base) == 2
    own.write_text("scenario: {test_sequence: [converge, verify tests/first]}\n")
    assert run.verify_steps(own, base) == 1


def test_main_fails_when_a_suite_ran_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(run, "REPORTS", tmp_path)
    monkeypatch.setitem(run.SUITES, "some", lambda: Count(passed=2))
    monkeypatch.setitem(run.SUITES, "empty", lambda: run.pytest("empty", str(tmp_path / "empty")))
    assert run.main(["some"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 0 failed"
    assert run.main(["some", "empty"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 1 failed"


def test_the_summary_names_what_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_no.py").write_text("def test_no():\n    assert not 'kept'\n")
    monkeypatch.setattr(run, "REPORTS", tmp_path)
    monkeypatch.setattr(run, "failures", [])
    monkeypatch.setitem(run.SUITES, "bad", lambda: run.pytest("bad", str(tmp_path)))
    assert run.main(["bad"]) == 1
    end = capsys.readouterr().out.partition("=== failures ===")[2]
    assert "test_no.py::test_no" in end
    assert end.endswith("0 passed, 1 failed\n")


def test_sanity_runs_beside_the_quick_suites() -> None:
    assert run.stages(["sanity", "lint", "unit", "lab"]) == [
        [["lint", "unit"], ["sanity"]],
        [["lab"]],
    ]
    assert run.stages(["lint", "unit"]) == [[["lint"]], [["unit"]]]
    assert run.stages(["sanity"]) == [[["sanity"]]]


def test_each_line_of_the_suite_beside_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(word: str) -> Count:
        assert run.run(["echo", word])[0] == 0
        return Count(passed=1)

    monkeypatch.setitem(run.SUITES, "lint", lambda: says("quick"))
    monkeypatch.setitem(run.SUITES, "sanity", lambda: says("slow"))
    assert run.main(["lint", "sanity"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "quick" in lines
    assert "sanity: slow" in lines
    assert lines[-1] == "2 passed, 0 failed"


def test_a_stopped_run_ends_all_that_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    script = f"""
import signal, sys
from tests import run
def lint():
    run.run(["sleep", "60"])
    run.run(["touch", {str(tmp_path / "more")!r}])
    return run.Count(passed=1)
run.REPORTS = __import__("pathlib").Path({str(tmp_path)!r})
run.SUITES["lint"] = lint
run.SUITES["sanity"] = lambda: run.Count(int(run.run(["sleep", "60"])[0] == 0))
sys.exit(run.main(["lint", "sanity"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=run.ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("sanity: $ sleep"):
                break
        time.sleep(0.5)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 143
    assert time.monotonic() - started < 10
    assert not (tmp_path / "more").exists()
