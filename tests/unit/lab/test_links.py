import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.lab.umbra_lab.links import PAIRS, QUEUE_S, Link, Settings, dump, load, uniform

QUIET = 0.99  # a chance that loses nothing


def test_a_packet_arrives_after_the_delay() -> None:
    link = Link(Settings(delay_ms=2))
    assert link.arrival(10.0, 1500, QUIET) == pytest.approx(10.002)
    assert (link.forwarded, link.dropped) == (1, 0)


def test_a_jitter_makes_packets_late_by_up_to_so_much_in_their_order() -> None:
    link = Link(Settings(delay_ms=2, jitter_ms=50))
    assert link.arrival(10.0, 1500, QUIET, 0.5) == pytest.approx(10.027)
    assert link.arrival(10.001, 1500, QUIET, 0.0) == pytest.approx(10.027)
    assert link.arrival(11.0, 1500, QUIET, 0.0) == pytest.approx(11.002)


def test_no_delay_means_now() -> None:
    assert Link(Settings(delay_ms=0)).arrival(10.0, 1500, QUIET) == 10.0


def test_a_cut_link_loses_everything_and_a_healed_one_nothing() -> None:
    link = Link(Settings(cut=True))
    assert link.arrival(1.0, 100, QUIET) is None
    link.configure(Settings())
    assert link.arrival(2.0, 100, QUIET) is not None
    assert (link.forwarded, link.dropped) == (1, 1)


@pytest.mark.parametrize(("chance", "lost"), [(0.0, True), (0.299, True), (0.3, False)])
def test_loss_is_the_share_of_chances_below_it(chance: float, lost: bool) -> None:
    assert (Link(Settings(loss_percent=30)).arrival(0.0, 100, chance) is None) is lost


def test_no_loss_loses_nothing_at_the_smallest_chance() -> None:
    assert Link(Settings(loss_percent=0)).arrival(0.0, 100, 0.0) is not None


def test_a_rate_spaces_packets_by_their_length() -> None:
    link = Link(Settings(delay_ms=0, rate_kbit=256))
    times = [link.arrival(0.0, 1600, QUIET) for _ in range(3)]
    assert times == pytest.approx([0.05, 0.10, 0.15])  # 12800 bits at 256 kbit/s


def test_a_rate_drops_what_would_wait_too_long_and_recovers() -> None:
    link = Link(Settings(delay_ms=0, rate_kbit=256))
    times = [link.arrival(0.0, 1600, QUIET) for _ in range(20)]
    kept = [time for time in times if time is not None]
    assert max(kept) <= QUEUE_S + 2 * 0.05
    assert link.dropped == times.count(None) > 0
    assert link.arrival(10.0, 1600, QUIET) == pytest.approx(10.05)


def test_a_shorter_delay_does_not_turn_the_order_around() -> None:
    link = Link(Settings(delay_ms=200))
    first = link.arrival(0.0, 100, QUIET)
    link.configure(Settings(delay_ms=0))
    assert link.arrival(0.01, 100, QUIET) == first
    assert link.arrival(1.0, 100, QUIET) == 1.0


@given(
    st.lists(st.tuples(st.floats(0, 0.1), st.integers(20, 1500), st.floats(0, 500)), max_size=50),
    st.sampled_from([0.0, 256.0, 10_000.0]),
)
def test_arrivals_never_go_back_and_never_precede_the_delay(
    packets: list[tuple[float, int, float]], rate: float
) -> None:
    link, now, last = Link(Settings(rate_kbit=rate)), 0.0, 0.0
    for gap, size, delay in packets:
        now += gap
        link.configure(Settings(delay_ms=delay, rate_kbit=rate))
        at = link.arrival(now, size, QUIET)
        if at is not None:
            assert at >= max(last, now + delay / 1000)
            last = at


def test_the_table_survives_its_file() -> None:
    table = uniform(Settings())
    table["alpha", "beta"] = replace(table["alpha", "beta"], cut=True, delay_ms=7.5)
    assert load(json.loads(json.dumps(dump(table)))) == table
    assert len(table) == len(PAIRS) == 12


def test_half_a_table_is_refused() -> None:
    data = dump(uniform(Settings()))
    del data["alpha>beta"]
    with pytest.raises(ValueError, match="every pair"):
        load(data)
    with pytest.raises(ValueError, match="every pair"):
        load(dump(uniform(Settings())) | {"alpha>beta": {"delay_ms": 1}})


@pytest.mark.parametrize(
    "wrong", [{"delay_ms": -1}, {"loss_percent": 101}, {"rate_kbit": -1}, {"delay_ms": 1e9}]
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Settings(**wrong)  # type: ignore[arg-type]


def test_only_plain_links_may_carry_bundles_of_segments() -> None:
    assert Settings(delay_ms=50).plain
    assert Settings(cut=True).plain
    assert not Settings(loss_percent=1).plain
    assert not Settings(rate_kbit=256).plain
    assert not Settings(jitter_ms=1).plain
