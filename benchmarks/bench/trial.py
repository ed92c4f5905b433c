"""One trial: a step of a workload asked of a started arm, judged and measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from benchmarks.bench.arms import RunningArm
from benchmarks.bench.calibration import Limits, why_invalid
from benchmarks.bench.drive import RunningUpstream, run_client
from benchmarks.bench.job import Job, Outcome, Progress
from benchmarks.bench.metrics import Sample, Seen, histograms
from benchmarks.bench.process import ServerProcess
from benchmarks.bench.result import Trial
from benchmarks.bench.turns import Turn, merged
from benchmarks.bench.workloads import Step, job_for
from benchmarks.bench.yardstick import NEAR_NS, Pieces, Yardstick

LEAK_SECONDS = 5.0
QUIET_SECONDS = 0.05
QUIET_CPU_SECONDS = 0.002
LONGEST_WORK_AFTER_SECONDS = 20.0
"""Of an arm that was asked for more than it can do; else the next workload would pay for it."""
FEWEST_PIECES = 5
FAR_NS = 1_000_000_000
"""A core that had no time for the yardstick during a trial had the same speed a second before more often than not."""

WARM_UP = Step(n=30, script="flood-20", starts_s=[number / 100 for number in range(30)])


class Place(msgspec.Struct, frozen=True):
    """What a trial needs around it.

    Attributes:
        upstream: of all arms.
        cpu: the client's core; None for any.
        on_progress: told how far a trial is.
        yardstick: knows how fast the arm's core is; None where nobody measures that.
    """

    upstream: RunningUpstream
    cpu: int | None
    on_progress: Callable[[Progress], None]
    yardstick: Yardstick | None = None


def settle(place: Place, process: ServerProcess) -> None:
    """Wait until the upstream's answers have ended, 5 s at most, and the arm has done what it does afterwards.

    The polling is of another process, which tells nobody when it is done.
    """
    deadline = time.monotonic() + LEAK_SECONDS
    while place.upstream.open_now().answers and time.monotonic() < deadline:
        time.sleep(QUIET_SECONDS)
    deadline = time.monotonic() + LONGEST_WORK_AFTER_SECONDS
    cpu_s, before = process.cpu_seconds(), -1.0
    while cpu_s - before > QUIET_CPU_SECONDS and time.monotonic() < deadline:
        time.sleep(QUIET_SECONDS)
        before, cpu_s = cpu_s, process.cpu_seconds()


def warm_up(place: Place, running: RunningArm, tag: int) -> None:
    """Have it do everything once, so that nothing is imported or compiled during a trial.

    Raises:
        RuntimeError: streams failed; the text tells of the first.
    """
    outcome = run_client(job_for(WARM_UP, running, tag), cpu=place.cpu)
    if errors := [stream.error for stream in outcome.streams if stream.error]:
        raise RuntimeError(f"{len(errors)} of {len(outcome.streams)} streams of the warm-up failed: {errors[0]}")
    settle(place, running.process)


def observe(place: Place, process: ServerProcess, job: Job, *, holds: bool = False) -> Seen:
    """Do the job and look at the arm meanwhile."""
    samples: list[Sample] = []

    def look(progress: Progress) -> None:
        memory = process.cost().pss_bytes if holds else 0
        samples.append(Sample(progress.events, progress.open, process.cpu_seconds(), memory, time.monotonic_ns()))
        place.on_progress(progress)

    place.upstream.reset()
    idle_bytes = process.cost().pss_bytes
    before_s = process.cpu_seconds()
    outcome = run_client(job, cpu=place.cpu, on_progress=look)
    settle(place, process)
    cpu_s = process.cpu_seconds() - before_s
    log = place.upstream.log()
    pieces = Pieces() if place.yardstick is None else during(outcome, place.yardstick.pieces())
    piece_us = pieces.mean_us()
    work = cpu_s * 1e6 / piece_us if piece_us else 0.0
    return Seen(outcome=outcome, log=log, cpu_s=cpu_s, idle_bytes=idle_bytes, samples=samples, pieces=pieces, work=work)


def during(outcome: Outcome, pieces: Pieces) -> Pieces:
    """Those of the time that the streams were open, and a little before and after; more, if those are few."""
    ended = max((max(stream.ended_ns, stream.last_event_ns) for stream in outcome.streams), default=0)
    for more_ns in (NEAR_NS, FAR_NS):
        found = pieces.between(outcome.start_ns - more_ns, max(ended, outcome.start_ns) + more_ns)
        if len(found.at_ns) >= FEWEST_PIECES:
            break
    return found


class Parts:
    """What has been seen of a step that is done in parts, of one arm in one round, and why it does not count."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []
        self._reasons: list[str] = []

    def do(self, place: Place, running: RunningArm, turn: Turn, *, number: int) -> Trial | None:
        """The next part; the trial, once it is the last.

        The trial says itself whether upstream and client kept to their schedules.
        """
        job = job_for(turn.step, running, turn.first_tag)
        seen = observe(place, running.process, job, holds=turn.step.holds)
        reason = why_not_counted(place, seen.outcome, turn.step.limits)
        self._reasons.append(reason if running.process.alive else "the server ended")
        self._seen.append(seen)
        return self._trial(running.arm.name, turn, number) if turn.last else None

    def _trial(self, arm: str, turn: Turn, number: int) -> Trial:
        seen = merged(self._seen)
        reason = next(filter(None, self._reasons), "")
        measured = turn.workload.metrics(seen)
        return Trial(
            arm=arm,
            workload=turn.workload.name,
            n=turn.step.n,
            round=number,
            valid=not reason,
            reason=reason,
            metrics=measured,
            in_pieces=turn.workload.in_pieces(seen, measured),
            hist=histograms(seen),
        )


def why_not_counted(place: Place, outcome: Outcome, limits: Limits | None) -> str:
    """ "" if the round counts."""
    if limits is not None and (why := why_invalid(outcome, place.upstream.stats(), limits)):
        return why
    return "" if outcome.streams else "no streams"
