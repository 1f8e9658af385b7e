"""A run can be had again from its seed, and tries every fault about equally often."""

from collections import Counter

from tests.faults.catalogue import BY_NAME, ENDURANCE, FAULTS, SELECTION, THREE, WITNESS
from tests.faults.schedule import EARLIEST_S, LATEST_S, plan, schedule

NAMES = [fault.name for fault in FAULTS]


def test_the_same_seed_gives_the_same_trials() -> None:
    assert schedule(7, NAMES, 200) == schedule(7, NAMES, 200)
    assert schedule(7, NAMES, 200) != schedule(8, NAMES, 200)


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    assert schedule(7, NAMES, 200)[:10] == schedule(7, NAMES, 10)


def test_every_fault_is_tried_about_equally_often() -> None:
    counts = Counter(plan.fault for plan in schedule(7, NAMES, 200))
    assert set(counts) == set(NAMES)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_rounds_have_orders_of_their_own() -> None:
    plans = schedule(7, NAMES, 2 * len(NAMES))
    first, second = plans[: len(NAMES)], plans[len(NAMES) :]
    assert [plan.fault for plan in first] != [plan.fault for plan in second]
    assert [plan.number for plan in plans] == list(range(1, 2 * len(NAMES) + 1))


def test_a_single_trial_can_be_made_again_alone() -> None:
    for one in schedule(7, NAMES, 50):
        assert plan(7, one.number, one.fault) == one
        assert EARLIEST_S <= one.moment_s <= LATEST_S
    assert len({one.moment_s for one in schedule(7, NAMES, 50)}) > 40


def test_names_are_told_apart_and_the_selection_exists() -> None:
    assert len(BY_NAME) == len((*FAULTS, *WITNESS, *THREE, *ENDURANCE))
    assert set(SELECTION) <= set(BY_NAME)
    assert len(set(SELECTION)) == len(SELECTION)
