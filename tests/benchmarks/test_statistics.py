from __future__ import annotations

import random

import pytest

from benchmarks.bench.statistics import nearest_rank, ratio_interval, slope_per


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 15), (5, 15), (30, 20), (40, 20), (40.001, 35), (50, 35), (99.9, 50), (100, 50)]
)
def test_nearest_rank(percent: float, value: float) -> None:
    assert nearest_rank([50, 15, 40, 20, 35], percent) == value


def test_a_rank_that_is_whole_is_not_rounded_up() -> None:
    """99.9 / 100 * 1000 is a little more than 999 in floating point."""
    assert nearest_rank(range(1, 1001), 99.9) == 999
    assert nearest_rank(range(1, 101), 55) == 55


def test_of_nothing() -> None:
    assert nearest_rank([], 50) is None


@pytest.mark.parametrize("percent", [-1, 100.1])
def test_no_percentage(percent: float) -> None:
    with pytest.raises(ValueError, match="no percentage"):
        nearest_rank([1], percent)


def test_a_ratio_that_is_the_same_in_all_rounds_is_certain() -> None:
    interval = ratio_interval({0: 2, 1: 4, 2: 6}, {0: 4, 1: 8, 2: 12}, seed=1)
    assert (interval.ratio, interval.low, interval.high, interval.rounds) == (0.5, 0.5, 0.5, 3)
    assert interval.differs


def test_rounds_are_drawn_in_pairs() -> None:
    """A round in which the machine was ten times slower says the same about the ratio."""
    ours = {0: 1.0, 1: 10.0, 2: 1.1, 3: 11.0, 4: 1.0}
    interval = ratio_interval(ours, {number: 2 * value for number, value in ours.items()}, seed=1)
    assert interval.low == interval.high == 0.5


def test_noise_is_no_difference() -> None:
    interval = ratio_interval({0: 1, 1: 3, 2: 2}, {0: 2, 1: 1, 2: 3}, seed=1)
    assert interval.low < 1 < interval.high
    assert not interval.differs


def test_the_seed_decides() -> None:
    draw = random.Random(0)
    ours, theirs = ({number: 1 + draw.random() for number in range(20)} for _ in range(2))
    intervals = [ratio_interval(ours, theirs, seed=seed) for seed in (1, 1, 2)]
    assert intervals[0] == intervals[1]
    assert intervals[0] != intervals[2]
    assert intervals[0].ratio == intervals[2].ratio
    assert intervals[0].low <= intervals[0].ratio <= intervals[0].high


def test_only_rounds_that_both_have() -> None:
    assert ratio_interval({0: 1, 1: 5}, {1: 10, 2: 1}, seed=1).ratio == 0.5
    with pytest.raises(ValueError, match="no round in common"):
        ratio_interval({0: 1}, {1: 1}, seed=1)


def test_nought_has_no_ratio() -> None:
    with pytest.raises(ValueError, match="above 0"):
        ratio_interval({0: 1}, {0: 0}, seed=1)


def test_slope() -> None:
    assert slope_per([(100, 5), (1000, 5), (10_000, 5)]) == 0
    assert slope_per([(1, 3), (2, 5), (3, 7)]) == pytest.approx(2)
