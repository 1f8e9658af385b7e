"""Memory of the agent's processes, as the kernel counts it: real store, link and milter."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.bench.transport import pair

MIB = 1024  # KiB


@pytest.mark.timeout(300)
def test_ten_messages_of_50_mb_at_once_cost_either_side_little(tmp_path: Path) -> None:
    with pair.running(tmp_path) as both:
        both.drive(200, 10, 4096)
        parts = (both.primary, both.shadow)
        before = [part.resident() for part in parts]
        for part in parts:
            part.forget_peak()
        assert len(both.drive(10, 10, 50_000_000)) == 10
        cost = [part.resident("VmHWM") - was for part, was in zip(parts, before, strict=True)]
        spooled = sum(path.stat().st_size for path in (tmp_path / "held" / "spool").iterdir())
        assert spooled > 10 * 49_000_000  # they did go there
    assert max(cost) < 64 * MIB, cost
