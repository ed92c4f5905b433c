"""Spans of a run: who is under whom, when, how they end; and what the in-memory collector tells of them."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from engine.trace import CANCELLED, NOT_ENDED, EachOf, InMemoryTraces, Span, Tracer, error_name


class Told:
    """A collector that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []
        self.spans: dict[int, Span] = {}

    def span_started(self, span: Span) -> None:
        self.spans[span.span_id] = span
        self.heard.append(("started", span.span_id))

    def span_ended(self, span: Span) -> None:
        assert span.ended_at is not None
        self.heard.append(("ended", span.span_id))


class Broken:
    """A collector that fails at everything."""

    def span_started(self, span: Span) -> None:
        raise RuntimeError("no room")

    def span_ended(self, span: Span) -> None:
        raise RuntimeError("no room")


async def test_spans_have_their_parents_and_their_times(autojump_clock: MockClock) -> None:
    told = Told()
    tracer = Tracer("r", told)
    start = trio.current_time()
    run = tracer.begin("run", "helper", provider="replay")
    await trio.sleep(1)
    step = tracer.begin("step", "step-1", run)
    tool = tracer.begin("tool", "calculator", step)
    await trio.sleep(2)
    tracer.end(tool, "timed out", bytes=3)
    tracer.end(step)
    memory = tracer.begin("memory", "history")
    tracer.end(memory)
    tracer.end(run, steps=1)
    assert told.heard == [
        ("started", 1),
        ("started", 2),
        ("started", 3),
        ("ended", 3),
        ("ended", 2),
        ("started", 4),
        ("ended", 4),
        ("ended", 1),
    ]
    assert [span.parent_id for span in told.spans.values()] == [None, 1, 2, 1]
    assert [(span.started_at - start, span.ended_at) for span in (run, step, tool)] == [
        (0, start + 3),
        (1, start + 3),
        (1, start + 3),
    ]
    assert run.attributes == {"provider": "replay", "steps": 1}
    assert (run.error, tool.error, tool.attributes) == (None, "timed out", {"bytes": 3})
    assert {span.run_id for span in told.spans.values()} == {"r"}


async def test_a_span_ends_once(autojump_clock: MockClock) -> None:
    told = Told()
    tracer = Tracer("r", told)
    run = tracer.begin("run", "helper")
    tracer.end(run, "first")
    ended_at = run.ended_at
    await trio.sleep(1)
    tracer.end(run, "second", late=True)
    tracer.note(run, late=True)
    assert (run.ended_at, run.error, run.attributes) == (ended_at, "first", {})
    assert told.heard == [("started", 1), ("ended", 1)]


async def test_what_is_open_under_an_ended_span_is_ended_first() -> None:
    told = Told()
    tracer = Tracer("r", told)
    run = tracer.begin("run", "helper")
    step = tracer.begin("step", "step-1", run)
    tool = tracer.begin("tool", "slow", step)
    other = tracer.begin("step", "step-2", run)
    tracer.end(step)
    assert (tool.error, step.error) == (NOT_ENDED, None)
    assert other.ended_at is None
    tracer.end(run, "stopped")
    assert (other.error, run.error) == (NOT_ENDED, "stopped")
    assert [span_id for what, span_id in told.heard if what == "ended"] == [3, 2, 4, 1]


async def test_the_end_of_a_run_ends_all_of_it() -> None:
    told = Told()
    tracer = Tracer("r", told)
    run = tracer.begin("run", "helper")
    tracer.begin("tool", "slow", tracer.begin("step", "step-1", run))
    tracer.end(run)
    assert [span_id for what, span_id in told.heard if what == "ended"] == [3, 2, 1]
    assert [span.error for span in told.spans.values()] == [None, NOT_ENDED, NOT_ENDED]


async def test_a_block_is_timed_and_may_note_what_it_learns(autojump_clock: MockClock) -> None:
    told = Told()
    tracer = Tracer("r", told)
    with tracer.span("run", "helper", size=1) as run, tracer.span("model", "m", run) as model:
        tracer.note(model, ttfb_ms=12.5)
        await trio.sleep(2)
    assert model.ended_at == model.started_at + 2
    assert (model.parent_id, model.attributes, run.attributes) == (1, {"ttfb_ms": 12.5}, {"size": 1})
    assert (model.error, run.error) == (None, None)


async def test_what_a_block_raises_is_its_error_and_goes_on() -> None:
    told = Told()
    tracer = Tracer("r", told)
    with pytest.raises(ZeroDivisionError), tracer.span("run", "helper"):
        raise ZeroDivisionError("a secret")
    with trio.CancelScope() as scope, tracer.span("step", "step-1"):
        scope.cancel()
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert [span.error for span in told.spans.values()] == ["ZeroDivisionError", CANCELLED]


async def test_a_group_is_named_after_what_really_failed() -> None:
    cancelled: list[trio.Cancelled] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled as reason:
            cancelled.append(reason)
            raise
    told = Told()
    tracer = Tracer("r", told)
    with pytest.RaisesGroup(trio.Cancelled, KeyError), tracer.span("run", "helper"):
        raise BaseExceptionGroup("of tasks", [*cancelled, KeyError("a secret")])
    assert told.spans[1].error == "KeyError"
    assert error_name(BaseExceptionGroup("of tasks", cancelled)) == CANCELLED


async def test_without_a_collector_there_are_no_spans() -> None:
    tracer = Tracer("r", None)
    run = tracer.begin("run", "helper", provider="replay")
    tracer.note(run, steps=1)
    tracer.end(run, "failed", steps=1)
    with tracer.span("step", "step-1", run) as outer, tracer.span("tool", "t", outer) as inner:
        pass
    assert run is outer is inner
    assert (run.attributes, run.error) == ({}, None)


async def test_a_collector_that_raises_is_logged_once_and_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    tracer = Tracer("r", Broken())
    with caplog.at_level(logging.ERROR), tracer.span("run", "helper") as run:
        tracer.end(tracer.begin("step", "step-1", run))
    assert run.ended_at is not None
    assert [record.getMessage() for record in caplog.records] == [
        "the trace collector failed at run r; it is told of the rest"
    ]


async def test_several_collectors_are_told_whatever_one_of_them_does(caplog: pytest.LogCaptureFixture) -> None:
    told = Told()
    with Tracer("r", EachOf(Broken(), told)).span("run", "helper"):
        pass
    assert told.heard == [("started", 1), ("ended", 1)]
    assert len(caplog.records) == 1


def one_run(traces: InMemoryTraces, run_id: str, steps: int = 1, error: str | None = None) -> None:
    tracer = Tracer(run_id, traces)
    run = tracer.begin("run", "helper")
    for number in range(steps):
        tracer.end(tracer.begin("step", f"step-{number + 1}", run), error)
    tracer.end(run, error)


async def test_traces_keep_the_latest_runs_and_the_first_spans_of_each() -> None:
    traces = InMemoryTraces(max_runs=2, max_spans=3)
    for run_id in ("a", "b", "c"):
        one_run(traces, run_id, steps=4)
    assert [len(traces.trace(run_id)) for run_id in ("a", "b", "c")] == [0, 3, 3]
    assert traces.stats().dropped == 4
    assert traces.as_tree("a") is None
    tree = traces.as_tree("c")
    assert tree is not None
    assert (tree["dropped"], len(tree["children"])) == (2, 2)
    one_run(traces, "d")
    assert traces.stats().dropped == 2
    with pytest.raises(ValueError, match="at least 1"):
        InMemoryTraces(max_runs=0)


async def test_a_span_of_a_run_dropped_meanwhile_brings_it_not_back() -> None:
    traces = InMemoryTraces(max_runs=1)
    old = Tracer("old", traces)
    run = old.begin("run", "helper")
    one_run(traces, "new")
    old.end(old.begin("step", "step-1", run))
    old.end(run)
    assert (traces.stats().runs, traces.trace("old")) == (1, [])


async def test_traces_are_searched_newest_first() -> None:
    traces = InMemoryTraces()
    one_run(traces, "a", error="broke")
    one_run(traces, "b", steps=2)

    def found(**wanted: Any) -> list[tuple[str, str]]:
        return [(span.run_id, span.name) for span in traces.search(**wanted)]

    assert found(kind="run") == [("b", "helper"), ("a", "helper")]
    assert found(name="step-1") == [("b", "step-1"), ("a", "step-1")]
    assert found(failed=True) == [("a", "step-1"), ("a", "helper")]
    assert found(failed=False, kind="step") == [("b", "step-2"), ("b", "step-1")]
    assert found(kind="step", limit=1) == [("b", "step-2")]


async def test_stats_count_and_time(autojump_clock: MockClock) -> None:
    traces = InMemoryTraces()
    tracer = Tracer("r", traces)
    run = tracer.begin("run", "helper")
    for seconds, error in ((1, None), (3, "timed out")):
        tool = tracer.begin("tool", "slow", run)
        await trio.sleep(seconds)
        tracer.end(tool, error)
    assert msgspec.to_builtins(traces.stats()) == {
        "runs": 1,
        "dropped": 0,
        "kinds": {
            "run": {"spans": 1, "open": 1, "errors": 0, "mean_seconds": 0.0, "max_seconds": 0.0},
            "tool": {"spans": 2, "open": 0, "errors": 1, "mean_seconds": 2.0, "max_seconds": 3.0},
        },
    }


async def test_a_trace_is_a_tree_of_plain_values(autojump_clock: MockClock) -> None:
    traces = InMemoryTraces()
    tracer = Tracer("r", traces)
    run = tracer.begin("run", "helper", agent_id="a1")
    await trio.sleep(0.25)
    step = tracer.begin("step", "step-1", run)
    tool = tracer.begin("tool", "slow", step)
    await trio.sleep(0.5)
    tracer.end(tool, "timed out", bytes=0)
    leaf = {
        "kind": "tool",
        "name": "slow",
        "start_ms": 250.0,
        "duration_ms": 500.0,
        "error": "timed out",
        "attributes": {"bytes": 0},
        "children": [],
    }
    assert traces.as_tree("r") == {
        "run_id": "r",
        "dropped": 0,
        "kind": "run",
        "name": "helper",
        "start_ms": 0.0,
        "duration_ms": None,
        "error": None,
        "attributes": {"agent_id": "a1"},
        "children": [leaf | {"kind": "step", "name": "step-1", "duration_ms": None, "error": None, "attributes": {}}
                     | {"children": [leaf]}],
    }  # fmt: skip
