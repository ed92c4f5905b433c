from __future__ import annotations

import pytest

from benchmarks.bench.calibration import Limits, calibrate, direct_job, judge, line, scaled, why_invalid
from benchmarks.bench.drive import running_upstream
from benchmarks.bench.histogram import Histogram
from benchmarks.bench.job import Job, Outcome, Read, Stream
from benchmarks.bench.upstream_log import Stats

MS = 1_000_000
NO_LIMITS = Limits(client_ms=None, upstream_ms=None, start_ms=None)
JOB = Job(
    host="10.0.0.1",
    port=1,
    path="/api",
    headers={"X-API-Key": "key"},
    body="{}",
    starts_s=[0, 0.02, 0.04, 0.06],
    reads=(Read(close_after_events=1),),
    stamps="offset",
    patience_s=20,
)


@pytest.mark.parametrize(
    ("starts", "load", "more"),
    [
        ([0, 1, 2, 3], 1.5, [0, 0.6, 1.2, 1.8, 2.4, 3]),
        ([0, 0, 3, 3], 1.5, [0, 0, 0.6, 2.4, 3, 3]),
        ([5], 1.5, [5, 5]),
        ([1, 2], 1, [1, 2]),
        ([], 1.5, []),
    ],
)
def test_more_starts_over_the_same_time(starts: list[float], load: float, more: list[float]) -> None:
    assert scaled(starts, load) == pytest.approx(more)


def test_the_upstream_is_asked_itself_and_read_to_the_end() -> None:
    direct = direct_job(JOB, "flood-3", 4711)
    assert (direct.host, direct.port, direct.path, direct.stamps) == (
        "127.0.0.1",
        4711,
        "/v1/chat/completions",
        "clock",
    )
    assert direct.reads == (Read(),)
    assert len(direct.starts_s) == 6
    assert "bench-@TAG@:flood-3" in direct.body


def histogram(*values_ms: float) -> Histogram:
    made = Histogram()
    made.add_all(round(value * MS) for value in values_ms)
    return made


def outcome_of(*streams: Stream, late_ms: float = 1, start_ms: float = 1) -> Outcome:
    return Outcome(
        start_ns=0,
        streams=list(streams),
        lateness=histogram(*[late_ms] * len(streams)),
        events=sum(stream.events for stream in streams),
        events_in_window=0,
        window_ns=(0, 0),
        start_lateness=histogram(start_ms),
        cpu_s=0.001,
        progress=[],
    )


def stats_of(late_ms: float = 1) -> Stats:
    return Stats(connections=0, open_answers=0, requests=1, events=10, sends=10, lateness=histogram(late_ms), refused=0)


GOOD = Stream(0, 0, first_event_ns=0, last_event_ns=MS, events=10, whole=True, exact=True)


@pytest.mark.parametrize(
    ("outcome", "stats", "limits", "reason"),
    [
        (outcome_of(GOOD), stats_of(), Limits(), ""),
        (outcome_of(GOOD, late_ms=6), stats_of(), Limits(), "the client was 6.00 ms late at p99, more than 5 ms"),
        (outcome_of(GOOD), stats_of(6), Limits(), "the upstream was 6.00 ms late at p99, more than 5 ms"),
        (
            outcome_of(GOOD, start_ms=21),
            stats_of(),
            Limits(),
            "opening connections was 21.00 ms late at p99, more than 20 ms",
        ),
        (outcome_of(GOOD, late_ms=60, start_ms=60), stats_of(60), NO_LIMITS, ""),
        (outcome_of(GOOD, Stream(1, 0, error="unfinished")), stats_of(), Limits(), "1 of 2 streams failed: unfinished"),
        (outcome_of(GOOD, Stream(1, 0)), stats_of(), NO_LIMITS, "1 of 2 streams failed: "),
        (outcome_of(), stats_of(), NO_LIMITS, "no events came"),
    ],
)
def test_what_is_valid(outcome: Outcome, stats: Stats, limits: Limits, reason: str) -> None:
    judged = judge(outcome, stats, limits, workload="w2", n=4)
    assert (judged.reason, judged.valid) == (reason, not reason)
    assert (f"INVALID: {reason}" if reason else "; valid") in line(judged)


def test_a_round_with_an_arm_is_judged_by_our_own_schedules() -> None:
    assert why_invalid(outcome_of(GOOD, late_ms=900), stats_of(), Limits()) == ""
    assert why_invalid(outcome_of(GOOD), stats_of(6), Limits()).startswith("the upstream")
    assert why_invalid(outcome_of(GOOD, start_ms=30), stats_of(), Limits()).startswith("opening connections")


def test_the_rate_is_from_the_first_event_to_the_last() -> None:
    later = Stream(1, 0, first_event_ns=MS, last_event_ns=4 * MS, events=10, whole=True, exact=True)
    judged = judge(outcome_of(GOOD, later), stats_of(), Limits(), workload="w5", n=2)
    assert judged.events_per_s == 5000
    assert judged.client_cpu_us_per_event == 50


def test_a_calibration() -> None:
    with running_upstream() as upstream:
        judged = calibrate(JOB, "paced-100x5", upstream, workload="w2", limits=NO_LIMITS)
    assert judged.valid, judged.reason
    assert (judged.streams, judged.events, judged.failed, judged.load, judged.n) == (6, 30, 0, 1.5, 4)
    assert judged.client_late_ms.p99 is not None
    assert judged.upstream_late_ms.p99 is not None


def test_an_upstream_that_is_too_slow_makes_it_invalid() -> None:
    with running_upstream(slow_ms=20) as upstream:
        judged = calibrate(JOB, "paced-100x5", upstream, workload="w2", limits=Limits(client_ms=None, upstream_ms=19))
    assert not judged.valid
    assert judged.reason.startswith("the upstream was ")
    assert judged.failed == 0
