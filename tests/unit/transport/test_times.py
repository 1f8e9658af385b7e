"""Points in time as people write them."""

from __future__ import annotations

import pytest

from umbra.transport import ids, times

NOW = 1_800_000_000.0  # 2027-01-15T08:00:00Z


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("0s", NOW),
        ("30min", NOW - 1800),
        ("2h", NOW - 7200),
        (" 1.5 h ", NOW - 5400),
        ("3d", NOW - 3 * 86400),
        ("1w", NOW - 7 * 86400),
        ("2027-01-15T08:00:00Z", NOW),
        ("2027-01-15 07:30", NOW - 1800),
        ("2027-01-15", NOW - 8 * 3600),
        ("2027-01-15T09:00+01:00", NOW),
    ],
)
def test_a_time_is_read(text: str, moment: float) -> None:
    assert times.parse(text, NOW) == moment


@pytest.mark.parametrize("text", ["", "yesterday", "2", "2m", "-2h", "2027-13-01", "2h ago"])
def test_what_is_no_time_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match="is no time; write for example 30min"):
        times.parse(text, NOW)


def test_a_time_is_shown_in_utc() -> None:
    assert times.shown(NOW) == "2027-01-15T08:00:00Z"


def test_ids_are_ordered_around_a_moment() -> None:
    import time

    before = ids.first(time.time())
    made = ids.new()
    assert before <= made < ids.first(time.time() + 1)
    assert ids.valid(ids.first(-5.0))
    assert ids.valid(ids.first(1e20))
