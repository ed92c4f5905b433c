"""Percentiles and intervals: by nearest rank over events, by bootstrap over rounds."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from statistics import median

import msgspec

from benchmarks.bench.histogram import rank_of

PERCENTS = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9, "max": 100.0}
RESAMPLES = 5000


def nearest_rank(values: Iterable[float], percent: float) -> float | None:
    """The smallest of the values that so many percent of them do not exceed; None of no values."""
    ordered = sorted(values)
    rank = rank_of(percent, len(ordered))
    return None if rank is None else ordered[rank - 1]


class Interval(msgspec.Struct, frozen=True):
    """A ratio of two medians and what it may be by chance."""

    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def differs(self) -> bool:
        """Whether the interval leaves 1 out: only then may the one be called less or more than the other."""
        return self.high < 1 or self.low > 1


def ratio_interval(
    ours: Mapping[int, float], theirs: Mapping[int, float], *, seed: int, confidence: float = 0.95
) -> Interval:
    """The ratio of the medians over the rounds that both have, by round number, with its bootstrap interval.

    Rounds are drawn in pairs: what disturbed the machine in a round disturbed both. The same seed gives the same
    interval. Raises ``ValueError`` if they have no round in common, or a figure that is not above 0.
    """
    pairs = [(ours[number], theirs[number]) for number in sorted(ours.keys() & theirs.keys())]
    if not pairs:
        raise ValueError("no round in common")
    if not all(a > 0 and b > 0 for a, b in pairs):
        raise ValueError("a ratio needs figures above 0")
    of_draw = {drawn: _ratio([pairs[place] for place in drawn]) for drawn in set(_draws(seed, len(pairs)))}
    ratios = sorted(of_draw[drawn] for drawn in _draws(seed, len(pairs)))
    outside = 100 * (1 - confidence) / 2
    low, high = (nearest_rank(ratios, percent) for percent in (outside, 100 - outside))
    assert low is not None
    assert high is not None
    return Interval(_ratio(pairs), low, high, len(pairs))


@cache
def _draws(seed: int, count: int) -> list[tuple[int, ...]]:
    """The resamples, each as sorted places: few different ones, and the same for all figures of a result."""
    draw = random.Random(seed)
    return [tuple(sorted(draw.choices(range(count), k=count))) for _ in range(RESAMPLES)]


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return median(a for a, _ in pairs) / median(b for _, b in pairs)


def slope_per(values: Sequence[tuple[float, float]]) -> float:
    """How steeply the second rises with the first, by least squares: 0 is flat. Needs two different first values."""
    mean_x = sum(x for x, _ in values) / len(values)
    mean_y = sum(y for _, y in values) / len(values)
    spread = sum((x - mean_x) ** 2 for x, _ in values)
    return sum((x - mean_x) * (y - mean_y) for x, y in values) / spread
