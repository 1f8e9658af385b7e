"""The benchmark's statistics and goals, on samples whose figures are known."""

from __future__ import annotations

import json

import pytest
from tests.bench.figures import Missing, percentile
from tests.bench.transport import figures, run
from tests.bench.transport.figures import (
    FAR,
    LARGE,
    LOCAL,
    PLAIN,
    SMALL,
    Held,
    Latencies,
    Peak,
    Rate,
)


def rate(
    variant: str, number: int, per_second: float, connections: int = 10, size: int = SMALL
) -> Rate:
    return Rate(variant, connections, size, number, round(per_second * 2), 2.0)


def latency(variant: str, number: int, *ms: float) -> Latencies:
    return Latencies(variant, 10, SMALL, number, [value / 1000 for value in ms])


@pytest.mark.parametrize(
    ("percent", "value"), [(50, 5), (99, 10), (100, 10), (90, 9), (0, 1), (91, 10)]
)
def test_percentile_is_a_value_that_was_measured(percent: float, value: float) -> None:
    assert percentile([10, 1, 9, 2, 8, 3, 7, 4, 6, 5], percent) == value


def test_a_percentile_of_nothing_is_missing() -> None:
    with pytest.raises(Missing):
        percentile([], 50)


def test_ratios_compare_within_a_round_so_drift_cancels() -> None:
    rates = [
        *(rate(PLAIN, number, value) for number, value in enumerate((400, 200, 100))),
        *(rate(LOCAL, number, value) for number, value in enumerate((360, 180, 90))),
        rate(LOCAL, 9, 1000),  # its round has no plain one
        rate(LOCAL, 0, 1, connections=1),  # another cell
    ]
    assert figures.ratios(rates, LOCAL, 10, SMALL) == pytest.approx([0.9, 0.9, 0.9])


def test_added_latency_is_the_difference_of_percentiles_in_ms() -> None:
    latencies = [latency(PLAIN, 1, 5, 6, 50), latency(LOCAL, 1, 7, 8, 49)]
    assert figures.added(latencies, LOCAL, 10, SMALL, 50) == pytest.approx([2])
    assert figures.added(latencies, LOCAL, 10, SMALL, 99) == pytest.approx([-1])


def test_missing_samples_are_no_figure() -> None:
    with pytest.raises(Missing):
        figures.ratios([rate(LOCAL, 1, 5)], LOCAL, 10, SMALL)
    with pytest.raises(Missing):
        figures.added([latency(PLAIN, 1, 5)], LOCAL, 10, SMALL, 50)
    assert figures.goals([], []) == []


def everything(local: float, far: float, added_ms: float) -> tuple[list[Rate], list[Latencies]]:
    rates, latencies = [], []
    for number in (1, 2, 3):
        for size in (SMALL, LARGE):
            for connections in (10, 50):
                for variant, per_second in ((PLAIN, 1000), (LOCAL, local), (FAR, far)):
                    rates.append(rate(variant, number, per_second, connections, size))
        latencies += [latency(PLAIN, number, 6.0), latency(LOCAL, number, 6.0 + added_ms)]
    return rates, latencies


@pytest.mark.parametrize(
    ("local", "far", "added_ms", "holding"),
    [(800, 700, 2.9, 5), (799, 700, 2.9, 3), (800, 699, 2.9, 3), (800, 700, 3.1, 4), (1, 1, 9, 0)],
)
def test_goals_hold_from_their_bound_on(
    local: float, far: float, added_ms: float, holding: int
) -> None:
    found = figures.goals(*everything(local, far, added_ms))
    assert len(found) == 5
    assert sum(goal.holds for goal in found) == holding
    assert {goal.unit for goal in found} == {"of plain Postfix", "ms"}


def test_a_single_odd_round_decides_nothing() -> None:
    rates, latencies = everything(900, 800, 1)
    rates = [item for item in rates if (item.variant, item.round) != (LOCAL, 2)]
    rates += [
        rate(LOCAL, 2, 10, connections, size) for connections in (10, 50) for size in (SMALL, LARGE)
    ]
    assert all(goal.holds for goal in figures.goals(rates, latencies))


def test_each_goal_is_of_its_own_size() -> None:
    rates, latencies = everything(900, 800, 1)
    rates = [item for item in rates if (item.variant, item.size) != (LOCAL, LARGE)]
    rates += [rate(LOCAL, 1, 10, 10, LARGE)]
    failed = [goal.name for goal in figures.goals(rates, latencies) if not goal.holds]
    assert failed == ["throughput, local link, 10 connections, 256 KiB"]


def test_summary_has_a_row_for_each_cell_and_can_be_printed_and_written() -> None:
    rates, latencies = everything(900, 800, 1)
    rows = figures.summary(rates, latencies)
    assert len(rows) == 3 * 2 * 2
    row = next(r for r in rows if (r["variant"], r["size"], r["connections"]) == (LOCAL, SMALL, 10))
    assert row["messages_per_s"] == {"median": 900, "min": 900, "max": 900}
    assert row["of_plain"]["median"] == pytest.approx(0.9)
    assert row["p50_added_ms"]["median"] == pytest.approx(1)
    assert len(run.table(json.loads(json.dumps(rows))).splitlines()) == 2 + len(rows)


@pytest.mark.parametrize(
    ("per_second", "connections", "count"), [(400, 10, 1200), (1, 50, 100), (9e9, 10, run.MOST)]
)
def test_a_burst_is_bounded(per_second: float, connections: int, count: int) -> None:
    assert run.wanted(per_second, connections, 3.0) == count


def test_each_round_has_every_variant_in_an_order_of_its_own() -> None:
    orders = [run.order(number) for number in range(6)]
    assert all(sorted(o, key=str) == sorted(run.VARIANTS, key=str) for o in orders)
    assert len({str(o) for o in orders}) > 3
    assert run.order(3) == orders[3]


@pytest.mark.parametrize(
    ("kib", "peak_kib", "holds"),
    [
        (146_000, 70_000, [True, True]),
        (146_500, 70_000, [False, True]),
        (146_000, 72_600, [True, False]),
    ],
)
def test_memory_is_judged_in_millions_of_bytes(kib: int, peak_kib: int, holds: list[bool]) -> None:
    held = [Held(25_000, 900_000), Held(100_000, kib)]
    peaks = [Peak("mail-b", 10, 50_000_000, 10_000, peak_kib)]
    found = figures.memory_goals(held, peaks)
    assert [goal.holds for goal in found] == holds
    assert found[0].value == pytest.approx(kib * 1.024e-3)


def test_too_few_held_decide_nothing() -> None:
    assert figures.memory_goals([Held(99_999, 1)], []) == []
