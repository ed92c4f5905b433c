"""Whatever models, tools and memories do and whoever ends the run: one end, each call answered once, nothing left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import msgspec
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import (
    AgentStopped,
    Deadlines,
    Error,
    FinishPiece,
    GenerationComplete,
    MemoryUse,
    Message,
    Piece,
    ProviderError,
    Run,
    RunSupervisor,
    StepComplete,
    TextDelta,
    TextPiece,
    ToolCallComplete,
    ToolCallDelta,
    ToolCallPiece,
    ToolCallStart,
    ToolContext,
    ToolError,
    ToolUse,
    UsagePiece,
)
from engine.emitter import CLOSING_BYTES, closes
from engine.pieces import FinishReason
from engine.run import GUESTS_CLEANUP_SECONDS, SAVE_SECONDS

from .fake_guests import FakeMemory, FakeTool, WritingTraces
from .scripted import Line, StepwiseProvider, WritingObserver, assert_ended_once, events_of, in_virtual_time, spec_for

TICK = 1 / 8
DELTA_ENVELOPE_BYTES = 120
STATUSES: dict[Any, str] = {GenerationComplete: "done", Error: "error", AgentStopped: "stop"}
Manner = Literal[
    "gives", "raises", "raises oddly", "ignores one cancellation", "holds", "cleans up", "breaks in cleanup"
]


@dataclass(frozen=True)
class Behaviour:
    """How a tool goes on: for how many ticks, and how it ends, or takes its cancellation."""

    ticks: int
    manner: Manner
    value: Any

    async def conduct(self, _: str, context: ToolContext) -> Any:
        context.memory_updated("key", "Set")
        try:
            if self.manner == "holds":
                with trio.CancelScope(shield=True):
                    await trio.sleep(self.ticks * TICK)
            else:
                await trio.sleep(self.ticks * TICK)
        except trio.Cancelled:  # noqa: ASYNC103 - some tools do swallow it
            if self.manner == "ignores one cancellation":
                return "sorry"  # noqa: ASYNC104
            if self.manner == "breaks in cleanup":
                raise BaseExceptionGroup("cleanup", [OSError("broke")]) from None  # noqa: ASYNC104
            if self.manner == "cleans up":
                with trio.move_on_after(TICK, shield=True):
                    await trio.sleep_forever()
            raise
        if self.manner == "raises":
            raise ToolError("no")
        if self.manner == "raises oddly":
            raise BaseExceptionGroup("odd", [SystemExit(1), ValueError("v")])
        return self.value


behaviours = st.builds(
    Behaviour,
    st.sampled_from([0, 1, 2, 5, 30, 200]),
    st.sampled_from(
        [
            "gives",
            "gives",
            "raises",
            "raises oddly",
            "ignores one cancellation",
            "holds",
            "cleans up",
            "breaks in cleanup",
        ]
    ),
    st.sampled_from(["ok", "", {"a": 1}, None, "x" * 3000, [[[]]], object(), "\ud800"]),
)
toolsets = st.lists(behaviours, min_size=1, max_size=3)
call_pieces = st.builds(
    ToolCallPiece,
    st.integers(0, 4),
    st.sampled_from([None, "a", "b", "a-2"]),
    st.sampled_from(["t0", "t0", "t1", "t2", "nothing", None]),
    st.sampled_from(["", "{}", '{"x":', "1}"]),
)
texts = st.builds(TextPiece, st.text("aé日👋\n ", max_size=6))
reads = st.lists(
    st.one_of(texts, call_pieces, call_pieces, st.builds(UsagePiece, st.integers(0, 9), st.integers(0, 9))), max_size=4
)
FINISHES: list[FinishReason] = ["stop", "tool_calls", "tool_calls", "length", "content_filter", "error"]
endings = st.one_of(
    st.sampled_from(FINISHES).map(lambda reason: [FinishPiece(reason)]),
    st.sampled_from([[FinishPiece("tool_calls")], [FinishPiece("stop")], ProviderError("upstream.server", "no")]),
)


def as_step(parts: list[list[Piece]], ticks: list[int], ending: Any) -> list[Line]:
    """The reads at their times, then the end."""
    at, script = 0.0, []
    for ticked, read in zip(ticks, parts, strict=False):
        at += ticked * TICK
        script.append((at, read))
    return [*script, (at, ending)]


scripts = st.lists(
    st.builds(as_step, st.lists(reads, max_size=3), st.lists(st.integers(0, 8), min_size=3, max_size=3), endings),
    min_size=1,
    max_size=4,
)
uses: st.SearchStrategy[dict[str, int]] = st.fixed_dictionaries(
    {
        "max_steps": st.integers(1, 4),
        "max_tool_calls": st.integers(0, 5),
        "max_result_bytes": st.sampled_from([500, 500, 4000]),
    }
)
acts = st.lists(
    st.tuples(st.integers(0, 60), st.sampled_from(["stop", "fail", "leave", "cancel the surrounding", "drain"])),
    max_size=2,
)
limits = st.builds(
    Deadlines,
    total=st.sampled_from([5 * TICK, 40 * TICK, 100.0, 100.0]),
    tool=st.sampled_from([TICK, 10 * TICK, 20.0]),
    idle=st.sampled_from([3 * TICK, 30.0]),
)
memories: st.SearchStrategy[dict[str, Any] | None] = st.one_of(
    st.none(),
    st.builds(
        dict,
        delays=st.dictionaries(
            st.sampled_from(["history", "recall", "save_turn"]), st.sampled_from([TICK, 0.2, 3.0, inf])
        ),
        failures=st.dictionaries(
            st.sampled_from(["history", "working_memory", "save_turn"]), st.sampled_from([OSError("x"), SystemExit(1)])
        ),
        history=st.just((Message("user", "before"),)),
    ),
)


class Trial:
    """One run with everything that happens to it."""

    def __init__(self, nursery: trio.Nursery, settings: dict[str, Any]) -> None:
        self.deadlines: Deadlines = settings["deadlines"]
        self.memory = None if settings["memory"] is None else FakeMemory(**settings["memory"])
        self.tools = [FakeTool(f"t{n}", behaviour.conduct) for n, behaviour in enumerate(settings["behaviours"])]
        self.provider = StepwiseProvider(*settings["scripts"])
        self.traces, self.observer = WritingTraces(), WritingObserver()
        self.told_ended: list[Run] = []
        self.max_run_bytes: int = settings["max_run_bytes"]
        self.use = ToolUse(tools=tuple(self.tools), **settings["use"])
        self.supervisor = RunSupervisor(nursery, self.observer)
        self.nursery = nursery
        self.leaving = trio.Event()
        spec = spec_for(
            self.provider,
            deadlines=self.deadlines,
            resume_grace=0,
            max_run_bytes=self.max_run_bytes,
            tool_use=self.use,
            memory_use=None if self.memory is None else MemoryUse(memory=self.memory),
            trace=self.traces,
            on_ended=self.told_ended.append,
        )
        self.run = self.supervisor.start(spec)

    async def read(self) -> None:
        """Be there as a reader until told to leave."""
        with self.run.log.attached():
            await self.leaving.wait()

    async def act(self, tick: int, what: str) -> None:
        await trio.sleep(tick * TICK)
        match what:
            case "stop":
                self.run.stop()
            case "fail":
                self.run.fail("draining", "bye")
            case "leave":
                self.leaving.set()
            case "cancel the surrounding":
                self.nursery.cancel_scope.cancel()
            case "drain":
                await self.supervisor.drain(TICK)
                assert self.run.log.ended

    def check(self) -> None:
        run, terminal = self.run, self.run.log.terminal
        assert_ended_once(run)
        assert terminal is not None
        events = events_of(run.log)
        said = "".join(event.content for event in events if isinstance(event, TextDelta))
        assert terminal.response == run.response == said
        self.check_size()
        assert self.observer.bugs == []
        assert [what for what in self.observer.story if what != "first token"] == [
            "started",
            str(terminal.__struct_config__.tag),
        ]
        assert self.told_ended == [run]
        self.check_calls(events, terminal)
        self.check_times()
        self.check_requests()
        self.check_memory(terminal)
        self.check_traces()

    def check_size(self) -> None:
        """Beyond the bound there is what closes the run, and a last delta's envelope."""
        log = self.run.log
        assert log.size_bytes <= 2 * self.max_run_bytes + CLOSING_BYTES
        open_frames = [len(entry.frame) for entry in log.entries() if not closes(entry.event)]
        assert sum(open_frames) <= self.max_run_bytes + DELTA_ENVELOPE_BYTES

    def check_calls(self, events: Sequence[Any], terminal: Any) -> None:
        started = {event.call_id: event for event in events if isinstance(event, ToolCallStart)}
        completed = {event.call_id: event for event in events if isinstance(event, ToolCallComplete)}
        assert len(started) == sum(isinstance(event, ToolCallStart) for event in events)
        assert set(completed) <= set(started)
        if isinstance(terminal, GenerationComplete):
            assert set(completed) == set(started)
            assert terminal.total_steps == len(self.provider.asked_at)
            assert terminal.finish_reason == "content_filter" or terminal.response.strip()
        steps = [event for event in events if isinstance(event, StepComplete)]
        for step in steps:
            ids = [call.call_id for call in step.tool_calls]
            assert ids == [outcome.call_id for outcome in step.tool_results]
            for call, outcome in zip(step.tool_calls, step.tool_results, strict=True):
                told = completed[call.call_id]
                assert (told.status, told.result, told.step_id) == (outcome.status, outcome.result, step.step_id)
                assert len(msgspec.json.encode(told.result)) < self.use.max_result_bytes + 200
                self.check_arguments(events, call)
        assert sum(step.step_type == "Final" for step in steps) <= 1
        assert sum(len(tool.contexts) for tool in self.tools) <= self.use.max_tool_calls
        assert len(self.provider.asked_at) <= self.use.max_steps

    def check_arguments(self, events: Sequence[Any], call: Any) -> None:
        (start,) = [event for event in events if isinstance(event, ToolCallStart) and event.call_id == call.call_id]
        deltas = [event for event in events if isinstance(event, ToolCallDelta) and event.call_id == call.call_id]
        if isinstance(call.arguments, str):
            assert call.arguments.endswith("".join(delta.arguments_fragment for delta in deltas))
        elif not deltas:
            assert call.arguments == (start.arguments or {})

    def check_times(self) -> None:
        run = self.run
        assert run.elapsed <= self.deadlines.total
        for tool in self.tools:
            for at, what in tool.seen:
                if what.startswith("called"):
                    assert at <= run.elapsed
        assert all(at <= run.elapsed for at in self.provider.asked_at)

    def check_requests(self) -> None:
        """Each request goes on where the last one ended; every call in it is answered, in order."""
        messages: tuple[Message, ...] = ()
        for request in self.provider.requests:
            assert request.messages[: len(messages)] == messages
            messages = request.messages
            waiting: list[str] = []
            for message in messages:
                if message.role == "tool":
                    assert message.tool_call_id == waiting.pop(0)
                else:
                    assert not waiting
                    waiting = [call.call_id for call in message.tool_calls]
                    assert len(set(waiting)) == len(waiting)
                    assert message.content or waiting
            assert not waiting

    def check_memory(self, terminal: Any) -> None:
        if self.memory is None:
            return
        saves = [at for at, what in self.memory.seen if what == "save_turn"]
        assert saves == [self.run.elapsed]
        for record in self.memory.saved:
            assert record.status == STATUSES[type(terminal)]
            assert record.response == terminal.response
            texts = [message.content for message in record.messages if message.role == "assistant"]
            assert "".join("".join(texts).split()) == "".join(record.response.split())

    def check_traces(self) -> None:
        assert {id(span) for span in self.traces.ended} == {id(span) for span in self.traces.spans}
        assert len(self.traces.ended) == len(self.traces.spans)
        for span in self.traces.spans:
            assert span.ended_at is not None
            assert span.started_at <= span.ended_at


@settings(max_examples=500, deadline=None)
@given(
    fixed=st.fixed_dictionaries(
        {
            "scripts": scripts,
            "behaviours": toolsets,
            "use": uses,
            "deadlines": limits,
            "memory": memories,
            "max_run_bytes": st.sampled_from([2000, 5000, 2**20, 2**20]),
        }
    ),
    happenings=acts,
    seed=st.integers(0, 2**16),
)
def test_one_end_and_each_call_answered(fixed: dict[str, Any], happenings: list[tuple[int, str]], seed: int) -> None:
    async def main() -> None:
        tasks = trio.lowlevel.current_statistics().tasks_living
        async with trio.open_nursery() as outer:
            runs: trio.Nursery = await outer.start(hosting_runs)
            trial = Trial(runs, fixed)
            outer.start_soon(trial.read)
            for tick, what in happenings:
                outer.start_soon(trial.act, tick, what)
            await trial.run.log.wait_ended()
            assert trio.current_time() - trial.run.elapsed <= SAVE_SECONDS
            await trio.sleep(SAVE_SECONDS + GUESTS_CLEANUP_SECONDS + TICK)
            assert trial.supervisor.active_runs == 0, "whatever the tools do"
            assert trial.supervisor.find(trial.run.id) is trial.run
            trial.leaving.set()
            runs.cancel_scope.cancel()
        trial.check()
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert trial.run.log.waiting == {}

    in_virtual_time(main, seed)


async def hosting_runs(task_status: trio.TaskStatus[trio.Nursery]) -> None:  # noqa: ASYNC114 - started with await
    """A nursery for the runs that can be cancelled without what watches them."""
    async with trio.open_nursery() as nursery:
        task_status.started(nursery)
        await trio.sleep_forever()
