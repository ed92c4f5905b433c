from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bench.histogram import Histogram, bucket_of, middle_of
from benchmarks.bench.statistics import nearest_rank


@given(st.integers(min_value=0, max_value=2**62))
def test_the_middle_of_a_bucket_is_within_one_percent(value: int) -> None:
    middle = middle_of(bucket_of(value))
    assert abs(middle - value) <= value / 100
    assert bucket_of(middle) == bucket_of(value)


@given(st.integers(min_value=0, max_value=2**62))
def test_buckets_rise_with_the_values(value: int) -> None:
    assert bucket_of(value) <= bucket_of(value + 1) <= bucket_of(value) + 1


def test_every_small_value_has_a_bucket_of_its_own() -> None:
    assert [bucket_of(value) for value in range(130)] == [*range(129), 128]
    assert [middle_of(bucket) for bucket in range(128)] == [*range(128)]


@given(
    st.lists(st.integers(min_value=0, max_value=10**10), min_size=1, max_size=50),
    st.sampled_from([0, 1, 50, 90, 99, 99.9, 100]),
)
def test_percentiles_are_those_of_the_values(values: list[int], percent: float) -> None:
    histogram = Histogram()
    histogram.add_all(values)
    exact = nearest_rank(values, percent)
    assert exact is not None
    assert histogram.percentile(percent) == pytest.approx(exact, rel=0.01)
    assert histogram.percentile(100) == max(values)
    assert histogram.total == len(values)


def test_of_nothing() -> None:
    assert Histogram().percentile(50) is None
    assert Histogram().total == 0


def test_negative_is_nought_and_weights_count() -> None:
    histogram = Histogram()
    histogram.add(-5, 3)
    histogram.add(100)
    assert (histogram.percentile(75), histogram.percentile(76)) == (0, 100)


def test_merged_and_through_json() -> None:
    one, other, both = Histogram(), Histogram(), Histogram()
    one.add_all([5, 10**6])
    other.add_all([5, 10**9])
    both.add_all([5, 10**6, 5, 10**9])
    one.merge(other)
    assert msgspec.json.decode(msgspec.json.encode(one), type=Histogram) == both


def test_no_histogram_shares_its_counts() -> None:
    Histogram().add(1)
    assert Histogram().counts == {}
