"""Answers that come line by line, from the API to the operator's command."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from umbra import cli
from umbra.api.client import ApiError, stream
from umbra.api.http import Api
from umbra.api.report import GroupReport
from umbra.cluster.switchover import Refused


class Operation:
    """Counts, and notes how it ended."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def __call__(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        if "refuse" in body:
            raise Refused("Not here.")
        if "wrong" in body:
            raise ValueError("that is wrong")
        try:
            for number in range(body["count"]):
                yield {"number": number}
                await asyncio.sleep(body.get("pause", 0))
        finally:
            self.ended.set()


@asynccontextmanager
async def api(path: Path, operation: Operation) -> AsyncIterator[Path]:
    server = Api(lambda: cast(GroupReport, None), {}, {}, {"count": operation})
    await server.start(path / "api.sock", "127.0.0.1", 0)
    try:
        yield path / "api.sock"
    finally:
        await server.stop()


def ask(at: Path, body: object) -> list[dict[str, Any]]:
    return list(stream("/count", body, at=at, timeout=5))


async def test_lines_come_in_order(tmp_path: Path) -> None:
    operation = Operation()
    async with api(tmp_path, operation) as at:
        rows = await asyncio.to_thread(ask, at, {"count": 1000})
        assert rows == [{"number": number} for number in range(1000)]
        assert await asyncio.to_thread(ask, at, {"count": 0}) == []


@pytest.mark.parametrize(
    ("body", "words"),
    [({"refuse": 1}, "Not here."), ({"wrong": 1}, "that is wrong."), ([], "must")],
)
async def test_refusals_come_before_the_first_line(
    tmp_path: Path, body: object, words: str
) -> None:
    async with api(tmp_path, Operation()) as at:
        with pytest.raises(ApiError, match=words):
            await asyncio.to_thread(ask, at, body)


async def test_a_client_that_goes_ends_the_operation(tmp_path: Path) -> None:
    operation = Operation()
    async with api(tmp_path, operation) as at:

        def first() -> None:
            rows = stream("/count", {"count": 10_000, "pause": 0.005}, at=at, timeout=5)
            assert next(rows) == {"number": 0}
            rows.close()  # type: ignore[attr-defined]

        await asyncio.to_thread(first)
        async with asyncio.timeout(5):
            await operation.ended.wait()


ROW = {"user": "a@example.org", "peer": "mail-b", "outcome": "equal", "count": 0, "reason": "",
       "differences": []}  # fmt: skip
DIFFERENT = {
    **ROW,
    "outcome": "different",
    "count": 3,
    "differences": [{"mailbox": "INBOX", "what": "[uidnext]", "here": "4", "there": ""}],
}


@pytest.mark.parametrize(
    ("rows", "status", "words"),
    [
        ([{"total": 2}, ROW, ROW, {"done": True}], 0, ["2 equal"]),
        ([{"total": 1}, {**ROW, "outcome": "repaired"}, {"done": True}], 0, ["1 repaired"]),
        (
            [{"total": 2}, ROW, DIFFERENT, {"done": True}],
            1,
            ["1 different, 1 equal", "[uidnext]", "and 2 more"],
        ),
        (
            [{"total": 1}, {**ROW, "outcome": "failed", "reason": "no way"}, {"done": True}],
            1,
            ["no way"],
        ),
        ([{"total": 2}, ROW], 1, ["ended before"]),
        ([{"total": 0}, {"done": True}], 0, ["nobody"]),
    ],
)
def test_umbractl_verify(
    monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], status: int, words: list[str]
) -> None:
    asked: list[object] = []

    def answer(path: str, body: object) -> Any:
        asked.append((path, body))
        return iter(rows)

    monkeypatch.setattr(cli, "stream", answer)
    result = CliRunner().invoke(cli.cli, ["verify", "a@example.org", "--repair"])
    assert result.exit_code == status, result.output
    for word in words:
        assert word in result.output
    assert asked == [("/verify", {"users": ("a@example.org",), "repair": True, "bodies": False})]
    listed = CliRunner().invoke(cli.cli, ["verify", "--json"])
    printed = [json.loads(line) for line in listed.output.splitlines() if line.startswith("{")]
    assert printed == [row for row in rows if "user" in row]


def test_umbractl_suspend_and_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def answer(method: str, path: str, body: object, timeout: float) -> dict[str, Any]:
        asked.append((method, path, body))
        return {"changed": path == "/resume" and body == {"user": ""}}

    monkeypatch.setattr(cli, "call", answer)
    run = CliRunner().invoke
    assert run(cli.cli, ["suspend"]).exit_code == 2, "a reason is needed"
    result = run(cli.cli, ["suspend", "a@example.org", "--reason", "moves"])
    assert "mirror of a@example.org is suspended" in result.output
    assert "mirror of all mailboxes is resumed" in run(cli.cli, ["resume"]).output
    assert "was not suspended" in run(cli.cli, ["resume", "b@example.org"]).output
    assert asked == [
        ("POST", "/suspend", {"user": "a@example.org", "reason": "moves"}),
        ("POST", "/resume", {"user": ""}),
        ("POST", "/resume", {"user": "b@example.org"}),
    ]


SEEDING = {"phase": "catching-up", "users": 3, "total": 9, "bytes": 10, "bytes_per_s": 5_000_000,
           "remaining_s": 4, "reasons": []}  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "status", "words"),
    [
        ([SEEDING, {"done": True}], 0, "mail-b has a whole copy."),
        ([SEEDING, {"done": False, "reasons": []}], 1, "mail-b is not complete"),
        ([SEEDING], 1, "mail-b is not complete"),
    ],
)
def test_umbractl_seed(
    monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], status: int, words: str
) -> None:
    asked: list[object] = []

    def answer(path: str, body: object) -> Any:
        asked.append((path, body))
        return iter(rows)

    monkeypatch.setattr(cli, "stream", answer)
    result = CliRunner().invoke(cli.cli, ["seed", "mail-b", "--rate", "2.5"])
    assert (result.exit_code, words in result.output) == (status, True)
    assert asked == [("/seed", {"node": "mail-b", "rate": 2_500_000.0})]
    listed = CliRunner().invoke(cli.cli, ["seed", "mail-b", "--json"])
    assert json.loads(listed.output.splitlines()[0]) == SEEDING
