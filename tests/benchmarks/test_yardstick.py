"""The yardstick: that the speeds of a core cancel out, and that its process ends with its owner."""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import sys
from contextlib import suppress

import pytest

from benchmarks.bench import metrics
from benchmarks.bench.drive import ROOT
from benchmarks.bench.histogram import Histogram
from benchmarks.bench.job import Outcome, Stream
from benchmarks.bench.metrics import Sample, Seen
from benchmarks.bench.result import Speed, Trial
from benchmarks.bench.summary import derived, summarize
from benchmarks.bench.trial import during
from benchmarks.bench.upstream_log import Served
from benchmarks.bench.workloads import WORKLOADS
from benchmarks.bench.yardstick import NEAR_NS, Pieces, running_yardstick

MS = 1_000_000
SECOND = 1_000 * MS
FAST_US = 300
OWN_MS = 0.5
"""What the upstream, on another core, takes of a request."""

SPEED = Speed(fast_us=FAST_US, mean_slowdown=1.3, slow_share=0.5, pieces=1000)
W1, W2 = (next(each for each in WORKLOADS if each.name == name) for name in ("w1", "w2"))


def slowdown(at_ns: int) -> float:
    """Of a core that is fast for two seconds and slow for the next three."""
    return 1.0 if at_ns % (5 * SECOND) < 2 * SECOND else 1.6


def pieces_until(last_ns: int) -> Pieces:
    at = range(0, last_ns, 12 * MS)
    return Pieces(list(at), [round(FAST_US * 1000 * slowdown(at_ns)) for at_ns in at])


ALL = pieces_until(60 * SECOND)


def one_at_a_time(first_ns: int, true_ms: float, count: int = 100) -> Seen:
    """So many requests that would take so long on a fast core, the upstream's part not counted."""
    streams, log, at, cpu_ns = [], [], first_ns, 0.0
    for tag in range(count):
        taken = round(true_ms * MS * slowdown(at))
        cpu_ns += taken
        event = at + taken + round(OWN_MS * MS)
        streams.append(Stream(tag, at, first_byte_ns=at + taken, first_event_ns=event, ended_ns=event, events=1))
        log.append(Served(tag, "one", at, first_write_ns=at + round(OWN_MS * MS), ended_ns=event, ending="whole"))
        at = event + 2 * MS
    return seen(first_ns, streams, cpu_s=cpu_ns / 1e9, log=log)


def paced(first_ns: int, true_us: float, seconds: int = 6, n: int = 10) -> Seen:
    """A thousand events a second on so many streams, each event so many microseconds of a fast core."""
    samples, cpu_ns = [], 0.0
    for event in range(1000 * seconds):
        at = first_ns + event * MS
        if event % 500 == 0:
            samples.append(Sample(event, n, cpu_ns / 1e9, at_ns=at))
        cpu_ns += true_us * 1000 * slowdown(at)
    last = first_ns + seconds * SECOND
    streams = [Stream(tag, first_ns, ended_ns=last, events=100 * seconds) for tag in range(n)]
    return seen(first_ns, streams, cpu_s=cpu_ns / 1e9, samples=samples)


def seen(start_ns: int, streams: list[Stream], *, cpu_s: float, **more: object) -> Seen:
    outcome = Outcome(
        start_ns=start_ns, streams=streams, lateness=Histogram(), events=sum(each.events for each in streams),
        events_in_window=0, window_ns=(0, 0), start_lateness=Histogram(), cpu_s=0.1, progress=[],
    )  # fmt: skip
    found = during(outcome, ALL)
    piece_us = found.mean_us()
    assert piece_us is not None
    return Seen(
        outcome=outcome, cpu_s=cpu_s, pieces=found, work=cpu_s * 1e6 / piece_us, **{"log": [], **more}  # type: ignore[arg-type]
    )  # fmt: skip


def trial(arm: str, number: int, of: Seen) -> Trial:
    workload, n = (W1, 1) if of.log else (W2, 200)
    measured = workload.metrics(of)
    pieces = workload.in_pieces(of, measured)
    return Trial(arm=arm, workload=workload.name, n=n, round=number, metrics=measured, in_pieces=pieces)


def test_ratios_are_those_of_a_core_with_one_speed() -> None:
    """One arm costs twice the other, and is measured when the core is fast, the other one when it is slow."""
    trials = [trial("lumos", number, one_at_a_time(number * 5 * SECOND + 200 * MS, 2.0)) for number in range(3)]
    trials += [trial("floor", number, one_at_a_time(number * 5 * SECOND + 2300 * MS, 1.0)) for number in range(3)]
    raw, told = (
        {(entry.arm, entry.metric): entry for entry in summarize(trials, seed=1, speed=speed)}
        for speed in (None, SPEED)
    )
    for metric in ("ttfe_added_ms.p50", "cpu_us_per_stream"):
        assert raw["lumos", metric].ratio_vs_floor == pytest.approx(1.25, rel=1e-3)
        assert told["lumos", metric].ratio_vs_floor == pytest.approx(2.0, rel=1e-3)
    assert told["lumos", "ttfe_added_ms.p50"].median == pytest.approx(2.0, rel=1e-3)
    assert told["floor", "cpu_us_per_stream"].median == pytest.approx(1000, rel=1e-3)
    assert raw["floor", "ttfe_added_ms.p50"].median == pytest.approx(1.6, rel=1e-3)
    assert told["floor", "core_us"].median == pytest.approx(480, rel=1e-3)


@pytest.mark.parametrize("first_ns", [0, SECOND, 7 * SECOND // 2])
def test_cpu_time_over_both_speeds_is_that_of_the_fast_one(first_ns: int) -> None:
    told = trial("lumos", 0, paced(first_ns, 100)).at_full_speed(SPEED)
    assert told["cpu_us_per_event"] == pytest.approx(100, rel=0.01)
    assert told["steady_cpu_us_per_event"] == pytest.approx(100, rel=0.01)


def test_a_run_that_grows_slower_with_the_core_has_not_grown() -> None:
    found = metrics.growth(paced(0, 100, seconds=5))
    assert found["growth_as_measured"] == pytest.approx(1.6, rel=0.02)
    assert found["growth"] == pytest.approx(1.0, rel=0.02)


def test_what_is_made_of_several_steps_is_of_the_fast_core() -> None:
    trials = [
        Trial(
            arm="lumos", workload="flat-streams", n=n, round=0, metrics={"steady_cpu_us_per_event": 50.0},
            in_pieces={"steady_cpu_us_per_event": 50.0 / piece_us},
        )
        for n, piece_us in ((1, 300), (100, 400))
    ]  # fmt: skip
    assert derived(trials)[0].metrics == {"growth": 1.0}
    assert derived(trials, SPEED)[0].metrics == {"growth": 0.75}


def test_a_trial_with_few_pieces_beside_it_has_those_of_seconds_around() -> None:
    outcome = paced(10 * SECOND, 100, seconds=1).outcome
    assert len(during(outcome, ALL).at_ns) == pytest.approx(1.12 * SECOND / (12 * MS), abs=2)
    starved = Pieces([at for at in ALL.at_ns if not 10 * SECOND <= at <= 11 * SECOND], ALL.took_ns)
    assert during(outcome, starved).at_ns[0] == pytest.approx(10 * SECOND - NEAR_NS, abs=12 * MS)
    starved = Pieces([at for at in ALL.at_ns if not 9 * SECOND + 950 * MS <= at <= 11 * SECOND + 60 * MS], ALL.took_ns)
    assert during(outcome, starved).at_ns[0] == pytest.approx(9 * SECOND, abs=12 * MS)


def test_of_many_at_once_only_cpu_time_is_told_otherwise() -> None:
    assert trial("lumos", 0, paced(0, 100)).in_pieces.keys() == {
        "cpu_us_per_event",
        "cpu_us_per_stream",
        "steady_cpu_us_per_event",
    }


def test_without_pieces_all_is_as_measured() -> None:
    plain = one_at_a_time(0, 2.0)
    bare = Seen(outcome=plain.outcome, log=plain.log, cpu_s=plain.cpu_s)
    told = trial("lumos", 0, bare)
    assert told.in_pieces == {}
    assert "core_us" not in told.metrics
    assert told.at_full_speed(SPEED) == told.metrics == told.at_full_speed(None)
    assert Pieces().speed() is None
    assert Pieces().near_us(5) is None


def test_what_pieces_say() -> None:
    pieces = Pieces([10 * MS, 20 * MS, 30 * MS, 400 * MS], [300_000, 320_000, 9_000_000, 480_000])
    assert pieces.mean_us() == pytest.approx((300 + 320 + 480) / 3), "the hypervisor took one"
    assert pieces.near_us(15 * MS) == 320
    assert pieces.near_us(400 * MS + NEAR_NS) == 480
    assert [pieces.near_us(at) for at in (150 * MS, 300 * MS, 900 * MS)] == [9000, 480, 480], "the nearest"
    assert pieces.between(20 * MS, 30 * MS) == Pieces([20 * MS, 30 * MS], [320_000, 9_000_000])
    speed = ALL.speed()
    assert speed is not None
    assert (speed.fast_us, speed.pieces) == (FAST_US, 5000)
    assert speed.slow_share == pytest.approx(0.6, abs=0.01)
    assert speed.mean_slowdown == pytest.approx(0.4 + 0.6 * 1.6, abs=0.01)


CORE = min(os.sched_getaffinity(0))
RECORD = struct.Struct("<qq")


def wait_ended(pid: int) -> bool:
    """Whether it ends in time."""
    with suppress(ProcessLookupError):
        file = os.pidfd_open(pid)
        try:
            return bool(select.select([file], [], [], 20)[0])
        finally:
            os.close(file)
    return True


def test_the_process_writes_what_pieces_took_until_its_pipe_is_closed() -> None:
    command = [sys.executable, "-m", "benchmarks.bench.yardstick", str(CORE)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        (first_ns, first_took), (second_ns, second_took) = RECORD.iter_unpack(process.stdout.read(2 * RECORD.size))
        assert os.sched_getaffinity(process.pid) == {CORE}
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
        process.send_signal(signal.SIGINT)
        assert len(process.stdout.read(RECORD.size)) == RECORD.size, "Ctrl-C is its owner's, and so is its end"
        process.stdin.close()
        assert process.wait(20) == 0
    assert 0 < first_ns < second_ns
    assert first_took > 0
    assert second_took > 0


def test_it_ends_with_the_block() -> None:
    with running_yardstick(CORE) as yardstick:
        assert yardstick is not None
        assert yardstick.pieces().at_ns == yardstick.pieces().at_ns
    with pytest.raises(ProcessLookupError):
        os.kill(yardstick.pid, 0)
    with running_yardstick(None) as none:
        assert none is None


def test_it_ends_with_its_owner_even_if_that_is_killed() -> None:
    program = f"""if True:
        import sys
        from benchmarks.bench.yardstick import running_yardstick
        with running_yardstick({CORE}) as yardstick:
            print(yardstick.pid, flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        os.kill(pid, 0)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert wait_ended(pid)
