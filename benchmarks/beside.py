"""What an event costs this checkout and another one, or another arm, at the same time on the same core.

    python -m benchmarks.beside CHECKOUT_OR_ARM [--work paced|brief|gpt4o] [--streams 100] [--rounds 5]

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
from benchmarks.bench.drive import RunningUpstream, running_upstream
from benchmarks.token_cost import MODELS, OTHER_CORE, SERVER_CORE, WORK, Figures, Work, code_of, measured, one_round


def both_at_once(arms: Sequence[RunningArm], work: Work, upstream: RunningUpstream) -> list[Figures]:
    """A round: both at the same time."""
    upstream.reset()
    with ThreadPoolExecutor(len(arms)) as clients:
        return list(clients.map(measured, arms, [work] * len(arms)))


@click.command()
@click.argument("other")
@click.option("--work", default="paced", type=click.Choice(sorted(WORK)))
@click.option("--streams", default=100, help="At each of the two.")
@click.option("--rounds", default=5)
def main(other: str, work: str, streams: int, rounds: int) -> None:
    """Measure this checkout beside OTHER: another checkout, or the name of an arm."""
    chosen = msgspec.structs.replace(WORK[work], streams=streams)
    with running_upstream(cpu=OTHER_CORE) as upstream, ExitStack() as stack:
        arms = [stack.enter_context(started(find_arm("lumos"), upstream.base_url, MODELS, core=SERVER_CORE))]
        checkout = Path(other) if Path(other).is_dir() else None
        arm = find_arm("lumos" if checkout else other)
        with code_of(checkout) if checkout else nullcontext():
            arms.append(stack.enter_context(started(arm, upstream.base_url, MODELS, core=SERVER_CORE)))
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
