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
from benchmarks.bench.workloads import Step, Workload, job_for

LEAK_SECONDS = 5.0
QUIET_SECONDS = 0.05
QUIET_CPU_SECONDS = 0.002
LONGEST_WORK_AFTER_SECONDS = 20.0
"""Of an arm that was asked for more than it can do; else the next workload would pay for it."""
WARM_UP = Step(n=30, script="flood-20", starts_s=[number / 100 for number in range(30)])


class Place(msgspec.Struct, frozen=True):
    """What a trial needs around it: the upstream, the client's core (None: any), and who hears how far it is."""

    upstream: RunningUpstream
    cpu: int | None
    on_progress: Callable[[Progress], None]


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
        samples.append(Sample(progress.events, progress.open, process.cpu_seconds(), memory))
        place.on_progress(progress)

    place.upstream.reset()
    idle_bytes = process.cost().pss_bytes
    before_s = process.cpu_seconds()
    outcome = run_client(job, cpu=place.cpu, on_progress=look)
    settle(place, process)
    cpu_s = process.cpu_seconds() - before_s
    log = place.upstream.log()
    return Seen(outcome=outcome, log=log, cpu_s=cpu_s, idle_bytes=idle_bytes, samples=samples)


def do_trial(
    place: Place, running: RunningArm, workload: Workload, step: Step, *, number: int, first_tag: int
) -> Trial:
    """The trial of one round; it says itself whether upstream and client kept to their schedules."""
    arm = running.arm.name
    seen = observe(place, running.process, job_for(step, running, first_tag), holds=step.holds)
    reason = why_not_counted(place, seen.outcome, step.limits)
    if not running.process.alive:
        reason = "the server ended"
    return Trial(
        arm=arm,
        workload=workload.name,
        n=step.n,
        round=number,
        valid=not reason,
        reason=reason,
        metrics=workload.metrics(seen),
        hist=histograms(seen),
    )


def why_not_counted(place: Place, outcome: Outcome, limits: Limits | None) -> str:
    """ "" if the round counts."""
    if limits is not None and (why := why_invalid(outcome, place.upstream.stats(), limits)):
        return why
    return "" if outcome.streams else "no streams"
