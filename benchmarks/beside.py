"""What an event costs this checkout and another one, or another arm, at the same time on the same core.

    python -m benchmarks.beside CHECKOUT_OR_ARM [--work paced|short|gpt4o] [--streams 100] [--rounds 5]

Both servers have the same work in the same seconds, so what the neighbours take is taken from both: a server beside
itself differs by 1 to 2 % where one after the other (``token_cost``) they differ by 3 to 8. Each also has less of the
caches than alone: ratios of two checkouts hold, those of two arms are another figure than ``make bench`` has.
Servers run pinned to core 1, upstream and clients to core 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from statistics import median

import click
import msgspec

from benchmarks.bench.arms import RunningArm, find_arm, started
from benchmarks.bench.drive import RunningUpstream, run_client, running_upstream
from benchmarks.bench.job import Job, Progress
from benchmarks.token_cost import OTHER_CORE, SERVER_CORE, WORK, Work, code_of, job_for, one_round

WORKS = {
    "paced": Work("paced-20x120", 100, 3.0),
    "short": Work("paced-20x40", 100, 3.0),
    "gpt4o": Work("gpt4o", 100, 2.0),
}


class Cost(msgspec.Struct, frozen=True):
    """Microseconds of CPU an event: of all that the server did, and of the time in which all streams were open."""

    event_us: float
    steady_us: float


def cost_of(running: RunningArm, job: Job, streams: int) -> Cost:
    """Have an arm do the job. Raises RuntimeError if a stream failed."""
    process = running.process
    seen: list[tuple[Progress, float]] = []
    before = process.cpu_seconds()
    outcome = run_client(job, cpu=OTHER_CORE, on_progress=lambda now: seen.append((now, process.cpu_seconds())))
    spent = process.cpu_seconds() - before
    if bad := [stream for stream in outcome.streams if not stream.exact]:
        raise RuntimeError(f"{running.arm.name}: {len(bad)} streams failed: {bad[0]}")
    full = [(now.events, cpu) for now, cpu in seen if now.open == streams]
    steady_us = float("nan")
    if len(full) > 2:
        (first, cpu_first), (last, cpu_last) = full[0], full[-1]
        steady_us = (cpu_last - cpu_first) / (last - first) * 1e6
    return Cost(spent / outcome.events * 1e6, steady_us)


def both_at_once(arms: Sequence[RunningArm], work: Work, upstream: RunningUpstream) -> list[Cost]:
    """A round: both at the same time."""
    upstream.reset()
    jobs = [job_for(arm, work) for arm in arms]
    with ThreadPoolExecutor(len(arms)) as clients:
        return list(clients.map(cost_of, arms, jobs, [work.streams] * len(arms)))


@click.command()
@click.argument("other")
@click.option("--work", default="paced", type=click.Choice(sorted(WORKS)))
@click.option("--streams", default=100, help="At each of the two.")
@click.option("--rounds", default=5)
def main(other: str, work: str, streams: int, rounds: int) -> None:
    """Measure this checkout beside OTHER: another checkout, or the name of an arm."""
    chosen = msgspec.structs.replace(WORKS[work], streams=streams)
    models = tuple(dict.fromkeys((chosen.model, WORK["flood"].model)))
    with running_upstream(cpu=OTHER_CORE) as upstream, ExitStack() as stack:
        arms = [stack.enter_context(started(find_arm("lumos"), upstream.base_url, models, core=SERVER_CORE))]
        checkout = Path(other) if Path(other).is_dir() else None
        arm = find_arm("lumos" if checkout else other)
        with code_of(checkout) if checkout else nullcontext():
            arms.append(stack.enter_context(started(arm, upstream.base_url, models, core=SERVER_CORE)))
        for running in arms:
            one_round(running, WORK["flood"], upstream)
        ratios: list[tuple[float, float]] = []
        for _ in range(rounds):
            ours, theirs = both_at_once(arms, chosen, upstream)
            ratios.append((ours.event_us / theirs.event_us, ours.steady_us / theirs.steady_us))
            click.echo(
                f"event {ours.event_us:6.1f} {theirs.event_us:6.1f} us  x {ratios[-1][0]:.3f}   "
                f"steady {ours.steady_us:6.1f} {theirs.steady_us:6.1f} us  x {ratios[-1][1]:.3f}"
            )
        event, steady = (median(column) for column in zip(*ratios, strict=True))
        click.echo(f"median: event x {event:.3f}, steady x {steady:.3f}")


if __name__ == "__main__":
    main()
