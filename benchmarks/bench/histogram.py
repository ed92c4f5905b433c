"""Counts of durations in buckets whose middle is less than 1 % off, without numpy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

_SUB_BITS = 6
_SUB_BUCKETS = 1 << _SUB_BITS


def bucket_of(value: int) -> int:
    """The bucket of a value of at least 0: exact below 128, then 64 buckets to each doubling."""
    shift = value.bit_length() - 1 - _SUB_BITS
    return value if shift <= 0 else (shift << _SUB_BITS) + (value >> shift)


def middle_of(bucket: int) -> int:
    """The middle of a bucket's values."""
    if bucket < 2 * _SUB_BUCKETS:
        return bucket
    shift = (bucket >> _SUB_BITS) - 1
    return ((bucket - (shift << _SUB_BITS)) << shift) + (1 << (shift - 1))


class Histogram(msgspec.Struct):
    """Durations in nanoseconds; negative ones count as 0. ``largest`` is exact."""

    counts: dict[int, int] = {}
    """How many are in each bucket."""
    largest: int = 0

    def add(self, value: int, count: int = 1) -> None:
        """Count a value so many times."""
        value = max(value, 0)
        bucket = bucket_of(value)
        self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.largest = max(self.largest, value)

    def add_all(self, values: Iterable[int]) -> None:
        """Count each value once."""
        for value in values:
            self.add(value)

    def merge(self, other: Histogram) -> None:
        """Count what another one has counted."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.largest = max(self.largest, other.largest)

    @property
    def total(self) -> int:
        """How many values were counted."""
        return sum(self.counts.values())

    def percentile(self, percent: float) -> int | None:
        """By nearest rank, the middle of its bucket; of the last rank, the largest value. None of nothing."""
        total = self.total
        rank = rank_of(percent, total)
        if rank is None:
            return None
        return self.largest if rank == total else min(next(self._from_rank(rank)), self.largest)

    def _from_rank(self, rank: int) -> Iterator[int]:
        passed = 0
        for bucket in sorted(self.counts):
            passed += self.counts[bucket]
            if passed >= rank:
                yield middle_of(bucket)


def rank_of(percent: float, total: int) -> int | None:
    """The nearest rank, from 1: of so many sorted values, the first that so many percent do not exceed."""
    if not 0 <= percent <= 100:
        raise ValueError(f"{percent} is no percentage")
    if not total:
        return None
    # In thousandths of a percent: 99.9 % of 1000 is rank 999, though 99.9 / 100 * 1000 is a little more.
    return max(1, -(-round(percent * 1000) * total // 100_000))
