"""Readers that do not read cost a bounded piece of memory, however much there is for them to read."""

from __future__ import annotations

from benchmarks.slow_readers import ANSWER_BYTES, measure

READERS = 200
MOST_BYTES = 400 * 1024
"""For each reader. It is about 150 KiB, of which 16 KiB are text, three times: joined, framed and what is unsent."""


def test_readers_that_do_not_read_cost_a_fraction_of_what_waits_for_them() -> None:
    report = measure(READERS, stalled=True, watch_seconds=3.0)
    assert report.connected == READERS
    assert report.bytes_a_reader < MOST_BYTES < ANSWER_BYTES / 10
