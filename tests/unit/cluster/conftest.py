"""A group with a witness, to play scenarios in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.unit.cluster.quorum_field import Field, Play, play


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Play:
    def start(scenario: Callable[[Field], Awaitable[None]], **settings: object) -> None:
        play(monkeypatch, tmp_path, scenario, **settings)  # type: ignore[arg-type]

    return start
