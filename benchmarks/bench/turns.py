"""In which order an arm does the steps of its workloads, and how parts of one step become one again."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from benchmarks.bench.histogram import Histogram
from benchmarks.bench.metrics import Seen
from benchmarks.bench.workloads import Step, Workload

FIRST_TAG_STEP = 16_000
"""Between the tags of two steps: no conversation is anybody's again, and 160 recordings begin anew."""


class Turn(msgspec.Struct, frozen=True):
    """A step, or a part of one, that is done in one go; ``last``: nothing of the step is left after it."""

    workload: Workload
    step: Step
    first_tag: int
    last: bool = True


def turns(planned: Sequence[tuple[Workload, Sequence[Step]]]) -> list[Turn]:
    """All in their order, a sliced workload's in parts of about the same size."""
    tags = iter(range(0, 1_000_000, FIRST_TAG_STEP))
    found: list[Turn] = []
    sliced: list[list[Turn]] = []
    for place, (workload, steps) in enumerate(planned):
        whole = [Turn(workload, step, next(tags)) for step in steps]
        if workload.sliced:
            later = sum(not each.sliced for each, _ in planned[place + 1 :])
            waiting = [_parts(turn, 1 + later) for turn in whole]
            sliced += waiting
        else:
            found += whole
            waiting = sliced
        found += [parts.pop(0) for parts in waiting if parts]
    return found


def _parts(turn: Turn, count: int) -> list[Turn]:
    starts = turn.step.starts_s
    size = -(-len(starts) // count)
    return [
        Turn(
            turn.workload,
            msgspec.structs.replace(turn.step, starts_s=starts[first : first + size]),
            turn.first_tag + first,
            first + size >= len(starts),
        )
        for first in range(0, len(starts), size)
    ]


def merged(parts: Sequence[Seen]) -> Seen:
    """What was seen of all parts of a step, as if it had been done in one go."""
    first = parts[0].outcome
    lateness, start_lateness = Histogram(), Histogram()
    for part in parts:
        lateness.merge(part.outcome.lateness)
        start_lateness.merge(part.outcome.start_lateness)
    return Seen(
        outcome=msgspec.structs.replace(
            first,
            streams=[stream for part in parts for stream in part.outcome.streams],
            lateness=lateness,
            events=sum(part.outcome.events for part in parts),
            events_in_window=sum(part.outcome.events_in_window for part in parts),
            start_lateness=start_lateness,
            cpu_s=sum(part.outcome.cpu_s for part in parts),
            progress=[progress for part in parts for progress in part.outcome.progress],
        ),
        log=[served for part in parts for served in part.log],
        cpu_s=sum(part.cpu_s for part in parts),
        idle_bytes=parts[0].idle_bytes,
        samples=[sample for part in parts for sample in part.samples],
        pieces=parts[0].pieces.then([part.pieces for part in parts[1:]]),
        work=sum(part.work for part in parts) if all(part.work for part in parts) else 0.0,
    )
