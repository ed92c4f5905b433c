"""The workloads' jobs, and their metrics on small results made by hand: no clock."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.bench import metrics
from benchmarks.bench.arms import ARMS, find_arm
from benchmarks.bench.histogram import Histogram
from benchmarks.bench.job import Outcome, Stream
from benchmarks.bench.metrics import Sample, Seen, passes
from benchmarks.bench.scripts import script_of
from benchmarks.bench.special import import_metrics, stamped
from benchmarks.bench.stamps import Finder
from benchmarks.bench.upstream_log import Served
from benchmarks.bench.workloads import WORKLOADS, Step, poisson, selected, steps_of, to_job
from engine.pieces import TextPiece
from providers.recording import load

MS = 1_000_000
SECOND = 1_000 * MS
STEPS = [(workload, step) for workload in WORKLOADS for step in (*workload.short, *workload.full)]


def stream(tag: int, *, first_byte: int = 1, first: int = 3, ended: int = 11, error: str = "") -> Stream:
    """Scheduled at second 1; the rest in milliseconds after that."""
    at = [SECOND + ms * MS for ms in (first_byte, first, ended)]
    return Stream(
        tag, SECOND, first_byte_ns=at[0], first_event_ns=at[1], last_event_ns=at[2], ended_ns=at[2], events=10,
        whole=not error, exact=not error, error=error,
    )  # fmt: skip


def outcome(*streams: Stream, late_ms: tuple[int, ...] = ()) -> Outcome:
    lateness = Histogram()
    lateness.add_all(ms * MS for ms in late_ms)
    return Outcome(
        start_ns=SECOND, streams=list(streams), lateness=lateness, events=sum(each.events for each in streams),
        events_in_window=0, window_ns=(0, 0), start_lateness=Histogram(), cpu_s=0.1, progress=[],
    )  # fmt: skip


def seen(*streams: Stream, log: tuple[Served, ...] = (), late_ms: tuple[int, ...] = (), **more: object) -> Seen:
    return Seen(outcome=outcome(*streams, late_ms=late_ms), log=list(log), **{"cpu_s": 0.02, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(("workload", "step"), STEPS, ids=[f"{w.name}-{number}" for number, (w, _) in enumerate(STEPS)])
def test_every_step_is_a_job(workload: object, step: Step) -> None:
    job = to_job(step, 80, "/", {}, "")
    assert job.starts_s == sorted(job.starts_s)
    assert job.starts_s[0] >= 0
    assert script_of(step.script, 0, tools_answered=True).count >= 0
    assert all(read.close_after_s is None or read.close_after_s > 0 for read in job.reads)
    if step.holds and len(job.reads) > 2:
        closes = {round(at + (read.close_after_s or 0), 6) for at, read in zip(job.starts_s, job.reads, strict=True)}
        assert len(closes) == 1, "they are open at the same time"


def test_what_is_calibrated_ends_by_itself() -> None:
    for _, step in STEPS:
        assert step.limits is None or script_of(step.script, 0).ending is not None


def test_no_two_steps_have_one_name() -> None:
    for workload in WORKLOADS:
        for steps in (workload.short, workload.full):
            assert len({step.n for step in steps}) == len(steps)
            assert workload.full


def test_selected() -> None:
    assert [workload.name for workload in selected((), full=False)] == [
        "w10", "w1", "w2", "w3", "w5", "w6-stream",
    ]  # fmt: skip
    assert len(selected((), full=True)) == len(WORKLOADS)
    assert [workload.name for workload in selected(["w6-silent", "w4", "w8"], full=False)] == [
        "w4-poisson", "w4-bursty", "w6-silent",
    ]  # fmt: skip
    with pytest.raises(KeyError, match="no workload 'w99'"):
        selected(["w99"], full=True)
    w11 = selected(["w11"], full=False)[0]
    assert steps_of(w11, full=False) == w11.full
    assert [arm.name for arm in ARMS if w11.is_for(arm) and not arm.optional] == [
        "lumos", "fastapi-openai", "openai-agents", "pydantic-ai",
    ]  # fmt: skip
    flat = selected(["flat"], full=True)
    assert [workload.is_for(find_arm("litellm")) for workload in flat] == [False, False]


def test_poisson_arrivals_are_the_same_each_time() -> None:
    starts = poisson(2000, 10)
    assert starts == poisson(2000, 10) == sorted(starts)
    assert starts[-1] == pytest.approx(200, rel=0.1)
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert sum(gap < 0.1 for gap in gaps) / len(gaps) == pytest.approx(0.632, abs=0.03)


def test_times_count_from_the_schedule_and_leave_out_what_is_the_upstreams() -> None:
    log = (Served(0, "one", 0, first_write_ns=2 * MS, ended_ns=3 * MS, ending="whole"),)
    found = metrics.first_times(seen(stream(0), stream(1, first=7), log=log))
    assert (found["ttfb_ms.p50"], found["ttfe_ms.p50"], found["ttfe_ms.max"]) == (1, 3, 7)
    assert found["ttfe_added_ms.p50"] == found["ttfe_added_ms.max"] == 1  # of stream 1 the log knows nothing
    assert metrics.first_times(seen(Stream(0, SECOND))) == {}


def test_costs() -> None:
    assert metrics.cost(seen(stream(0), stream(1))) == {
        "cpu_us_per_event": 1000,
        "cpu_us_per_stream": 10000,
        "events": 20,
    }
    assert metrics.cost(seen(Stream(0, SECOND))) == {}
    assert metrics.rate(seen(stream(0), stream(1))) == {"events_per_s": 2500}
    assert metrics.totals(seen(stream(0), stream(1, error="unfinished")))["total_ms.max"] == 11
    assert metrics.failures(seen(stream(0), stream(1, error="unfinished"))) == {"streams": 2, "failed": 1}


def test_steady_cost_is_of_the_time_that_all_are_open() -> None:
    samples = [Sample(0, 1, 0.0), *(Sample(100 * n, 2, 1 + n * n / 1000) for n in range(1, 11)), Sample(1100, 1, 9.0)]
    watched = seen(stream(0), stream(1), samples=samples)
    assert metrics.steady_cost(watched) == {"steady_cpu_us_per_event": pytest.approx(99e-3 / 900 * 1e6)}
    assert metrics.growth(watched) == {"growth": pytest.approx((100 - 64) / (9 - 1), rel=1e-3)}
    assert metrics.growth(seen(stream(0), samples=samples)) == {}
    assert metrics.steady_cost(seen(stream(0))) == {}


def test_memory_is_that_of_open_streams() -> None:
    samples = [
        Sample(0, 1, 0, 5_000_000),
        Sample(10, 2, 0, 3_000_000),
        Sample(20, 2, 0, 1_063_488),
        Sample(20, 0, 0, 1),
    ]
    idle = 1_000_000
    held = metrics.memory(seen(stream(0), stream(1), idle_bytes=idle, samples=samples))
    assert held == {"mem_kib_per_stream": 31, "idle_mib": 1.0}
    assert metrics.memory(seen(stream(0), Stream(1, SECOND), idle_bytes=idle, samples=samples)) == {}
    assert metrics.memory(seen(stream(0), stream(1))) == {}


def test_cancels() -> None:
    closed = [Stream(tag, SECOND, ended_ns=2 * SECOND, closed=True) for tag in range(3)]
    log = (Served(0, "silent", 0, ended_ns=2 * SECOND + 4 * MS, ending="fin"), Served(1, "silent", 0))
    found = metrics.cancels(seen(*closed, log=log))
    assert (found["cancel_ms.p99"], found["leaked_upstreams"], found["closed"], found["never_asked"]) == (4, 1, 1, 1)


def test_replay_errors_are_in_microseconds() -> None:
    streams = [stream(0), stream(1)]
    streams[0].last_error_ns, streams[1].last_error_ns = -3000, 5000
    found = metrics.replay_errors(seen(*streams, late_ms=(1, 2, 3)))
    assert found["replay_error_us.max"] == 3000
    assert found["replay_drift_us"] == 1, "the median, as streams' own errors are to both sides"


@pytest.mark.parametrize(
    ("late", "added", "failed", "held"), [(49, 99, 0, True), (50, 1, 0, False), (1, 100, 0, False), (1, 1, 1, False)]
)
def test_a_step_is_held(late: float, added: float, failed: int, held: bool) -> None:
    assert passes({"event_lateness_ms.p99": late, "ttfe_added_ms.p99": added, "failed": failed}) is held
    assert not passes({"failed": 0})


def test_a_recording_is_stamped_with_its_own_times() -> None:
    recording = load("gpt4o-short")
    found = Finder().feed(stamped(recording).text.encode())
    offsets = [read.at_ns for read in recording.reads for piece in read.pieces if isinstance(piece, TextPiece)]
    assert [int(ns) for _, _, ns, _ in found] == offsets
    assert [int(number) for number, _, _, _ in found] == list(range(len(offsets)))
    assert {tag for _, tag, _, _ in found} == {b"000000"}
    assert [mark for *_, mark in found] == [b";"] * (len(offsets) - 1) + [b"!"]


def test_an_import_is_told_with_what_its_use_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"pass": 0.02, "import engine": 0.022, "from engine import StreamingAgent": 0.17, "import litellm": 2.0}
    run: list[str] = []

    def run_seconds(_: object, statement: str) -> float:
        run.append(statement)
        return seconds[statement]

    monkeypatch.setattr("benchmarks.bench.special.run_seconds", run_seconds)
    monkeypatch.setattr("benchmarks.bench.special.python_for", lambda _: None)
    assert import_metrics(find_arm("lumos")) == {"import_ms": 2, "import_used_ms": 150}
    assert sorted(run) == ["from engine import StreamingAgent", "import engine", "pass"]
    run.clear()
    assert import_metrics(find_arm("litellm")) == {"import_ms": 1980, "import_used_ms": 1980}
    assert sorted(run) == ["import litellm", "pass"], "once, where both are the same"
