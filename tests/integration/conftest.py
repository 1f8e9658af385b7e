"""Fixtures of the integration tests; what a failing test shows."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from tests.integration import lab

UNITS = "umbra-agent umbra-helper umbra-fence postfix dovecot wg-quick@umbra0"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show both nodes' journals below a failed test."""
    report = yield
    if report.failed:
        for node in filter(lab.answers, lab.NODES):
            journal = lab.host(node).run(
                f"journalctl --no-pager -o short-precise -n 40 "
                f"{' '.join(f'-u {unit}' for unit in UNITS.split())}"
            )
            report.sections.append((f"journal of {node}", journal.stdout + journal.stderr))
    return report


@pytest.fixture(scope="session")
def primary() -> str:
    """The node that is primary; the same by the word of every node that answers."""
    names = {lab.status(node)["primary"] for node in lab.NODES if lab.answers(node)}
    assert len(names) == 1, f"the nodes disagree on who is primary: {names}"
    return str(names.pop())


@pytest.fixture(scope="session")
def shadow(primary: str) -> str:
    """The node that is not primary."""
    (name,) = set(lab.NODES) - {primary}
    return name


@pytest.fixture(scope="session")
def protected(primary: str) -> None:
    """The group is protected, at once or within a minute: what a test may rely on from then on."""
    lab.wait("the group is protected", lambda: lab.status(primary)["protected"], 60)
