"""The workloads as data: what streams are opened when and read how, and what is made of what was seen.

A workload is steps, each a job for the client but for where it goes. ``short`` is for ``make bench``, ``full`` for
``make bench-full``. Trials and goals name a step by its ``n``: streams at once, or what else the workload grows by.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import msgspec

from benchmarks.bench import metrics
from benchmarks.bench.arms import Arm, RunningArm
from benchmarks.bench.calibration import Limits
from benchmarks.bench.job import TAG, Job, Read
from benchmarks.bench.metrics import Measure, Metrics, Seen
from benchmarks.bench.traces import content_offsets_ns, gpt4o_streams, mooncake_arrivals

MODEL = "bench"
SEED = 7
GPT4O_SECONDS = sum(content_offsets_ns(stream)[-1] for stream in gpt4o_streams()) / 1e9 / len(gpt4o_streams())
"""How long a recorded answer takes, on average: so many streams at once are so many starts in that time."""

PACED = Limits()
FLOODED = Limits(client_ms=None, upstream_ms=None)
"""A flood waits for its reader: lateness says nothing, only failures do."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One job.

    Attributes:
        n: what the step is named by.
        script: what the upstream answers.
        starts_s, reads, patience_s, window_s, one_at_a_time, receive_buffer: as ``Job`` has them.
        agent: ask the agent with tools.
        leaving_cancels: a client that leaves ends its run at once, in Lumos too.
        holds: look at the memory while all streams are open.
        limits: of the calibration; None for what does not end by itself, and so cannot be calibrated.
    """

    n: int
    script: str
    starts_s: Sequence[float]
    reads: tuple[Read, ...] = (Read(),)
    patience_s: float = 10
    window_s: tuple[float, float] | None = None
    one_at_a_time: bool = False
    receive_buffer: int | None = None
    agent: bool = False
    leaving_cancels: bool = False
    holds: bool = False
    limits: Limits | None = None


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Its steps in both forms, and what is measured of each.

    Attributes:
        name: ``w1``, or ``w6-silent`` where it has several parts.
        about: for people, one line.
        measures: what each trial's metrics are.
        short, full: the steps; none where the form leaves it out.
        only: the arms that it is for; empty for all.
        sliced: its step is done in parts, one at its place and one after each workload that follows: what a part of a
            second of the machine's does to them is not all of what is measured.
        until_failing: a step that an arm does not hold is its last.
        when_named: its short form is run only if it is asked for by name.
    """

    name: str
    title: str
    about: str
    measures: tuple[Measure, ...]
    short: tuple[Step, ...] = ()
    full: tuple[Step, ...] = ()
    only: tuple[str, ...] = ()
    sliced: bool = False
    until_failing: bool = False
    when_named: bool = False

    def metrics(self, seen: Seen) -> Metrics:
        """All of them."""
        found: Metrics = metrics.failures(seen)
        for measure in self.measures:
            found |= measure(seen)
        if seen.work:
            found["core_us"] = round(seen.cpu_s * 1e6 / seen.work, 1)
        return found

    def in_pieces(self, seen: Seen, measured: Metrics) -> Metrics:
        """Of them, those that go with the core's speed, without it."""
        found = metrics.in_pieces(seen, measured)
        one_at_a_time = any(step.one_at_a_time for step in (*self.short, *self.full))
        return found | metrics.first_times_in_pieces(seen) if one_at_a_time else found

    def is_for(self, arm: Arm) -> bool:
        """Whether the arm can do it."""
        wants_agent = any(step.agent for step in self.full)
        return (not self.only or arm.name in self.only) and (not wants_agent or bool(arm.agent_path))


def job_for(step: Step, running: RunningArm, first_tag: int) -> Job:
    """The step's job at a started arm. Every stream is a conversation of its own."""
    arm = running.arm
    request = arm.request(
        MODEL,
        f"bench-{TAG}:{step.script}",
        headers=running.headers,
        session=f"s-{TAG}",
        agent=step.agent,
        leaving_cancels=step.leaving_cancels,
    )
    return to_job(step, running.process.port, request.path, dict(request.headers), request.body, first_tag)


def to_job(step: Step, port: int, path: str, headers: dict[str, str], body: str, first_tag: int = 0) -> Job:
    """The step's job at any address."""
    return Job(
        host="127.0.0.1",
        port=port,
        path=path,
        headers=headers,
        body=body,
        starts_s=list(step.starts_s),
        first_tag=first_tag,
        reads=step.reads,
        patience_s=step.patience_s,
        window_s=step.window_s,
        one_at_a_time=step.one_at_a_time,
        receive_buffer=step.receive_buffer,
    )


def spread(count: int, seconds: float) -> list[float]:
    """So many starts, evenly over that time."""
    return [number * seconds / count for number in range(count)]


def poisson(count: int, per_second: float, seed: int = SEED) -> list[float]:
    """So many starts at that mean rate, each independent of the others."""
    draw = random.Random(seed)
    at = 0.0
    starts = []
    for _ in range(count):
        at += draw.expovariate(per_second)
        starts.append(at)
    return starts


@cache
def _mooncake(count: int, per_second: float) -> tuple[float, ...]:
    """The trace's first arrivals, bursts and all, sped up to that mean rate."""
    at_ms = [arrival.at_ms for arrival in mooncake_arrivals()[:count]]
    return tuple(at * count / per_second / at_ms[-1] for at in at_ms)


def _one_at_a_time(count: int) -> Step:
    starts = [number * 0.002 for number in range(count)]
    return Step(n=1, script="one", starts_s=starts, one_at_a_time=True, limits=PACED)


def _paced(n: int, seconds: float, *, rate: int = 20, ramp_s: float = 1, patience_s: float = 8) -> Step:
    """Steady from when the last has started."""
    script = f"paced-{rate}x{max(1, round(rate * seconds))}"
    starts = spread(n, ramp_s)
    return Step(n=n, script=script, starts_s=starts, patience_s=seconds + patience_s, limits=PACED)


def _evenly(n: int, seconds: float) -> Step:
    """2,000 events a second over n streams, all of them open so long; 40 start in a second, of which no arm is late."""
    ramp_s = n / 40
    return _paced(n, ramp_s + seconds, rate=2_000 // n, ramp_s=ramp_s)


def _recorded(n: int, *, warm_s: float, seconds: float) -> Step:
    """So many recorded streams at once, new ones coming as old ones end; only the time after ``warm_s`` counts."""
    every = GPT4O_SECONDS / n
    starts = [number * every for number in range(round((warm_s + seconds) / every))]
    return Step(n=n, script="gpt4o", starts_s=starts, window_s=(warm_s, warm_s + seconds), patience_s=20, limits=PACED)


def _arriving(starts: Sequence[float], n: int, longest: int) -> Step:
    return Step(n=n, script=f"mooncake-50x{longest}", starts_s=starts, patience_s=30, limits=PACED)


def _flood(n: int, events: int) -> Step:
    return Step(n=n, script=f"flood-{events}", starts_s=[0.0] * n, patience_s=30, limits=FLOODED)


def _closing(n: int, script: str, read: Read, *, per_second: float = 25, receive_buffer: int | None = None) -> Step:
    return Step(
        n=n,
        script=script,
        starts_s=spread(n, n / per_second),
        reads=(read,),
        receive_buffer=receive_buffer,
        leaving_cancels=True,
    )


def _held(n: int, *, ramp_s: float, seconds: float) -> Step:
    """Open, a few events old, and quiet. All close at the same time, so that all are open until then."""
    return Step(
        n=n,
        script="stalled-5",
        starts_s=spread(n, ramp_s),
        reads=tuple(Read(close_after_s=ramp_s + seconds - start) for start in spread(n, ramp_s)),
        leaving_cancels=True,
        holds=True,
    )


def _stalled_readers(n: int, seconds: float) -> Step:
    """Every second reader stops; the other ones must not notice."""
    stops = Read(stop_after_events=20, close_after_s=seconds)
    return Step(
        n=n,
        script=f"paced-200x{round(200 * seconds)}",
        starts_s=spread(n, 1),
        reads=(Read(), stops),
        receive_buffer=16_384,
        patience_s=seconds + 10,
        leaving_cancels=True,
        holds=True,
        limits=PACED,
    )


def _agents(n: int, seconds: float) -> Step:
    return Step(n=n, script="tools-2-paced-50x40", starts_s=poisson(n, n / seconds), agent=True, patience_s=20)


_FIRST = (metrics.first_times, metrics.cost)
_STREAMED = (metrics.first_times, metrics.lateness, metrics.cost, metrics.steady_cost)
_CANCELLED = (metrics.cancels, metrics.cost)
_AFTER_THREE = Read(close_after_events=3)
_BEFORE_HEADERS = Read(close_after_s=0.5)
_NOT_READING = Read(stop_after_events=1, close_after_s=2)
_OURS_AND_FLOOR = ("lumos", "floor")

WORKLOADS = (
    Workload(
        name="w10",
        title="Memory",
        about="streams open and quiet after five events, on a server that has served little before",
        measures=(metrics.memory,),
        short=(_held(50, ramp_s=0.5, seconds=2),),
        full=(_held(500, ramp_s=5, seconds=5),),
    ),
    Workload(
        name="w1",
        title="One at a time",
        about="one-token answers, each on a connection of its own, one after the other",
        measures=_FIRST,
        short=(_one_at_a_time(200),),
        full=(_one_at_a_time(500),),
        sliced=True,
    ),
    Workload(
        name="w2",
        title="Paced streams",
        about="20 events a second on each stream",
        measures=_STREAMED,
        short=(_paced(200, 2, ramp_s=0.5),),
        full=tuple(_paced(n, 20, ramp_s=3) for n in (1, 10, 50, 100, 200, 300, 400, 600)),
        until_failing=True,
    ),
    Workload(
        name="w3",
        title="Recorded GPT-4o",
        about="160 recorded GPT-4o answers with their own gaps, steadily so many at once",
        measures=_STREAMED,
        short=(
            Step(
                n=20,
                script="gpt4o",
                starts_s=spread(20, 0.5),
                reads=(Read(close_after_s=2.5),),
                leaving_cancels=True,
                limits=PACED,
            ),
        ),
        full=tuple(
            _recorded(n, warm_s=8, seconds=20)
            for n in (5, 10, 15, 20, 30, 40, 60, 80, 100, 120, 150, 180, 220, 260, 320)
        ),
        until_failing=True,
    ),
    Workload(
        name="w4-poisson",
        title="Poisson arrivals",
        about="starts independent of each other, answers as long as Mooncake's (up to 400), 50 events a second",
        measures=_STREAMED,
        full=(_arriving(poisson(200, 10), 200, 400),),
    ),
    Workload(
        name="w4-bursty",
        title="Bursty arrivals",
        about="Mooncake's own arrivals at the same mean rate, and the same answers",
        measures=_STREAMED,
        full=(_arriving(_mooncake(200, 10), 200, 400),),
    ),
    Workload(
        name="w5",
        title="Flood",
        about="50 streams at once of 200 events each, as fast as they go",
        measures=(metrics.cost, metrics.rate, metrics.totals),
        short=(_flood(50, 200),),
        full=(_flood(50, 200),),
    ),
    Workload(
        name="w11",
        title="Agent with two tools",
        about="a whole agent run: two tool calls at once, their results, an answer of 40 events; a session each",
        measures=(metrics.first_times, metrics.totals, metrics.cost),
        full=(_agents(100, 10),),
    ),
    Workload(
        name="flat-events",
        title="Longer runs",
        about="streams of 10,000 events each: the last fifth to the first",
        measures=(*_STREAMED, metrics.growth),
        when_named=True,
        short=(_paced(5, 10, rate=1_000, ramp_s=0.1),),
        full=(_paced(10, 20, rate=500, ramp_s=0.1),),
        only=_OURS_AND_FLOOR,
    ),
    Workload(
        name="flat-streams",
        title="More streams",
        about="2,000 events a second in all, on 1 to 1,000 streams",
        measures=_STREAMED,
        when_named=True,
        short=tuple(_evenly(n, 6) for n in (10, 400)),
        full=tuple(_evenly(n, 15) for n in (1, 10, 100, 1_000)),
        only=_OURS_AND_FLOOR,
    ),
    Workload(
        name="w7",
        title="Stalled readers",
        about="half of the readers stop reading; memory they hold, lateness of the others",
        measures=(metrics.lateness, metrics.memory, metrics.cost),
        full=(_stalled_readers(20, 8),),
    ),
    Workload(
        name="w6-stream",
        title="Leaving a stream",
        about="the client closes after three events",
        measures=_CANCELLED,
        short=(_closing(40, "paced-20x200", _AFTER_THREE, per_second=40),),
        full=(_closing(800, "paced-20x200", _AFTER_THREE),),
    ),
    Workload(
        name="w6-silent",
        title="Leaving before the answer",
        about="the client closes while the upstream has not even sent a head",
        measures=_CANCELLED,
        when_named=True,
        short=(_closing(40, "silent", _BEFORE_HEADERS),),
        full=(_closing(800, "silent", _BEFORE_HEADERS),),
    ),
    Workload(
        name="w6-stalled",
        title="Leaving unread",
        about="the client reads no more, then closes; its sockets are full",
        measures=_CANCELLED,
        when_named=True,
        short=(_closing(10, "stalled-60000", _NOT_READING, per_second=2, receive_buffer=4_096),),
        full=(_closing(60, "stalled-60000", _NOT_READING, per_second=2, receive_buffer=4_096),),
    ),
)
"""In the order that they are run in: memory on a young server, what may leave something behind at the end."""


def selected(names: Sequence[str], *, full: bool) -> list[Workload]:
    """The workloads of the form, by ``w6`` or ``w6-silent``; all of the form without names.

    Raises:
        KeyError: a name is none; the text says which there are.
    """
    known = {name for workload in WORKLOADS for name in (workload.name, workload.name.partition("-")[0])}
    if unknown := set(names) - known - {"w8", "w9"}:
        raise KeyError(f"no workload {min(unknown)!r}; there are {', '.join(sorted(known | {'w8', 'w9'}))}")
    found = [workload for workload in WORKLOADS if workload.full if full or workload.short or names]
    if not names:
        return [workload for workload in found if full or not workload.when_named]
    return [workload for workload in found if {workload.name, workload.name.partition("-")[0]} & set(names)]


def steps_of(workload: Workload, *, full: bool) -> tuple[Step, ...]:
    """In the form, or in the other where that has none."""
    return workload.full if full else workload.short or workload.full
