"""Whose copies count."""

from __future__ import annotations

import pytest

from umbra.transport.selection import ShadowPreference, counting, enough

SITES = {"near": "alpha", "far": "beta", "farther": "gamma"}
PREFER, REMOTE, LOCAL = ShadowPreference


@pytest.mark.parametrize(
    ("preference", "holders", "count"),
    [
        (PREFER, [], 0),
        (PREFER, ["near"], 1),
        (PREFER, ["near", "far", "farther"], 3),
        (REMOTE, ["near"], 0),
        (REMOTE, ["near", "far"], 1),
        (REMOTE, ["far", "farther"], 2),
        (LOCAL, ["far", "farther"], 0),
        (LOCAL, ["near", "far"], 1),
    ],
)
def test_what_counts(preference: ShadowPreference, holders: list[str], count: int) -> None:
    assert len(counting(holders, SITES, "alpha", preference)) == count
    for wanted in (1, 2, 3):
        assert enough(holders, SITES, "alpha", preference, wanted) is (count >= wanted)
