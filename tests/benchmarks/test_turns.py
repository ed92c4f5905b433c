"""The order of an arm's steps, and that parts become the whole."""

from __future__ import annotations

import pytest

from benchmarks.bench.histogram import Histogram
from benchmarks.bench.job import Outcome, Stream
from benchmarks.bench.metrics import Seen
from benchmarks.bench.turns import FIRST_TAG_STEP, merged, turns
from benchmarks.bench.upstream_log import Served
from benchmarks.bench.workloads import WORKLOADS, Step, Workload, selected, steps_of
from benchmarks.bench.yardstick import Pieces


def workload(name: str, *, starts: int = 1, steps: int = 1, sliced: bool = False) -> Workload:
    made = tuple(Step(n=n, script="one", starts_s=[number * 0.1 for number in range(starts)]) for n in range(steps))
    return Workload(name=name, title="", about="", measures=(), short=made, sliced=sliced)


def planned(*workloads: Workload) -> list[tuple[Workload, tuple[Step, ...]]]:
    return [(each, each.short) for each in workloads]


def test_a_sliced_workload_is_done_between_those_that_follow() -> None:
    found = turns(planned(workload("a"), workload("s", starts=10, sliced=True), workload("b", steps=2), workload("c")))
    assert [(turn.workload.name, turn.first_tag, turn.last) for turn in found] == [
        ("a", 0, True),
        ("s", FIRST_TAG_STEP, False),
        ("b", 2 * FIRST_TAG_STEP, True),
        ("b", 3 * FIRST_TAG_STEP, True),
        ("s", FIRST_TAG_STEP + 4, False),
        ("c", 4 * FIRST_TAG_STEP, True),
        ("s", FIRST_TAG_STEP + 8, True),
    ]
    assert [len(turn.step.starts_s) for turn in found if turn.workload.name == "s"] == [4, 4, 2]


@pytest.mark.parametrize(("starts", "parts"), [(1, 1), (2, 2), (4, 2), (5, 3)])
def test_there_are_no_more_parts_than_starts_and_nothing_is_left_out(starts: int, parts: int) -> None:
    sliced = [
        turn
        for turn in turns(planned(workload("s", starts=starts, sliced=True), workload("b"), workload("c")))
        if turn.workload.sliced
    ]
    assert len(sliced) == parts
    assert [at for turn in sliced for at in turn.step.starts_s] == [number * 0.1 for number in range(starts)]
    assert [turn.last for turn in sliced] == [False] * (parts - 1) + [True]


def test_alone_it_is_done_in_one_go() -> None:
    [turn] = turns(planned(workload("s", starts=9, sliced=True)))
    assert (len(turn.step.starts_s), turn.last) == (9, True)


@pytest.mark.parametrize("full", [False, True])
def test_all_tags_have_six_digits_and_are_none_of_the_warm_ups(full: bool) -> None:
    chosen = selected((), full=full)
    found = turns([(each, steps_of(each, full=full)) for each in chosen])
    assert max(turn.first_tag for turn in found) + FIRST_TAG_STEP < 800_000
    assert sum(turn.last for turn in found) == sum(len(steps_of(each, full=full)) for each in chosen)
    assert all(each.full[0].one_at_a_time for each in WORKLOADS if each.sliced)


def part(tag: int, *, work: float = 2.0) -> Seen:
    counts = Histogram({5: 1}, 5)
    outcome = Outcome(
        start_ns=tag, streams=[Stream(tag, 0)], lateness=counts, events=3, events_in_window=2, window_ns=(0, 0),
        start_lateness=counts, cpu_s=0.5, progress=[],
    )  # fmt: skip
    return Seen(
        outcome=outcome, log=[Served(tag, "one", 0)], cpu_s=0.25, idle_bytes=tag, pieces=Pieces([tag], [9]), work=work
    )


def test_parts_become_the_whole() -> None:
    whole = merged([part(1), part(2), part(3)])
    assert [stream.tag for stream in whole.outcome.streams] == [served.tag for served in whole.log] == [1, 2, 3]
    assert (whole.outcome.events, whole.outcome.events_in_window, whole.outcome.cpu_s) == (9, 6, 1.5)
    assert (whole.outcome.lateness.total, whole.outcome.start_lateness.total) == (3, 3)
    assert (whole.cpu_s, whole.work, whole.idle_bytes) == (0.75, 6, 1)
    assert whole.pieces == Pieces([1, 2, 3], [9, 9, 9])
    assert merged([part(1), part(2, work=0)]).work == 0, "told as measured, if a part has nothing beside it"
    [alone] = [part(1)]
    assert merged([alone]).outcome.streams == alone.outcome.streams
