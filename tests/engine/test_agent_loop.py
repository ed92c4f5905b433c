"""The loop of steps: tools side by side, each under its deadline, and what they may do to their run."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from engine import (
    Deadlines,
    DeadlineWish,
    GenerationComplete,
    MemoryUpdate,
    Message,
    Metadata,
    Run,
    RunOptions,
    StepComplete,
    StreamingConfig,
    ToolCall,
    ToolCallComplete,
    ToolContext,
    ToolUse,
)
from engine.emitter import CLOSING_BYTES
from engine.events import CalledTool, CallOutcome

from .fake_guests import FakeTool, WritingTraces, fails, holds_until, takes
from .loop_scene import completed, failed, lasting, outcomes_of, start_in, steps_of
from .scripted import (
    FOREVER,
    StepwiseProvider,
    WritingObserver,
    agent_for,
    assert_ended_once,
    calling,
    events_of,
    run_read_by_one,
    saying,
)

USER = Message("user", "12345678")


# Tools side by side


async def test_two_tools_of_a_step_take_as_long_as_the_longer(autojump_clock: MockClock) -> None:
    slow, fast = FakeTool("slow", takes(3, "first")), FakeTool("fast", takes(2, {"second": 2}))
    provider = StepwiseProvider(calling('a slow {"x":1}', "b fast", said="Let me see.", at=1), saying("Both.", at=1))
    run = Run("run", lasting(provider, tools=[slow, fast]))
    got = await run_read_by_one(run)
    assert provider.asked_at == [0.0, 4.0]
    assert (slow.seen, fast.seen) == ([(1.0, 'called {"x":1}'), (4.0, "ended")], [(1.0, "called"), (3.0, "ended")])
    completes = [(at, event.call_id) for at, event in got if isinstance(event, ToolCallComplete)]
    assert completes == [(3.0, "b"), (4.0, "a")]
    asked = (ToolCall("a", "slow", '{"x":1}'), ToolCall("b", "fast", ""))
    assert provider.requests[1].messages == (
        USER,
        Message("assistant", "Let me see.", tool_calls=asked),
        Message("tool", "first", tool_call_id="a"),
        Message("tool", '{"second":2}', tool_call_id="b"),
    )
    called = (CalledTool("a", "slow", {"x": 1}), CalledTool("b", "fast", {}))
    gave = (CallOutcome("a", "Success", "first"), CallOutcome("b", "Success", {"second": 2}))
    assert [(at, event) for at, event in got if isinstance(event, StepComplete)] == [
        (4.0, StepComplete("Initial", "step-1", called, gave)),
        (5.0, StepComplete("Final", "step-2")),
    ]
    assert got[-1] == (
        5.0,
        GenerationComplete("Let me see.\n\nBoth.", 2, 5000.0, 1000.0, run.usage, "stop"),
    )


async def test_the_steps_are_initial_tool_and_final(autojump_clock: MockClock) -> None:
    provider = StepwiseProvider(calling("a t"), calling("b t"), calling("c t"), saying("x"))
    run = Run("run", lasting(provider, tools=[FakeTool("t", takes(1))]))
    assert (await completed(run)).total_steps == 4
    steps = [(step.step_type, step.step_id) for step in steps_of(run)]
    assert steps == [("Initial", "step-1"), ("Tool", "step-2"), ("Tool", "step-3"), ("Final", "step-4")]
    assert [len(request.messages) for request in provider.requests] == [1, 3, 5, 7]


async def test_an_agent_without_tools_and_memory_sends_what_it_was_given(autojump_clock: MockClock) -> None:
    provider = StepwiseProvider(saying("x"))
    spec = lasting(provider)
    await completed(Run("run", spec))
    assert provider.requests == [spec.request]


async def test_a_tool_that_hangs_costs_exactly_its_deadline(autojump_clock: MockClock) -> None:
    hung, fast = FakeTool("hung", takes(FOREVER)), FakeTool("fast", takes(2))
    provider = StepwiseProvider(calling("a hung", "b fast", at=1), saying("x", at=1))
    run = Run("run", lasting(provider, tools=[hung, fast]))
    assert (await completed(run)).elapsed_ms == 32_000.0
    assert provider.asked_at == [0.0, 31.0]
    assert outcomes_of(run) == [("b", "Success", "done"), ("a", "Error", "timed out after 30 s")]
    assert provider.requests[1].messages[2] == Message(
        "tool", "timed out after 30 s", tool_call_id="a", tool_failed=True
    )
    assert hung.seen == [(1.0, "called"), (31.0, "cancelled")]


async def test_the_spans_of_tools_are_those_of_their_calls(autojump_clock: MockClock) -> None:
    let_go = trio.Event()
    tools = [FakeTool("good", takes(2)), FakeTool("bad", fails(ValueError(), 1)), FakeTool("held", holds_until(let_go))]
    traces = WritingTraces()
    provider = StepwiseProvider(calling("a good", "b bad", "c held", "d none", at=1), saying("x"))
    run = Run("run", lasting(provider, tools=tools, trace=traces))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        await trio.sleep(50)
        let_go.set()
    assert [span for span in traces.story if span[0] == "tool"] == [
        ("tool", "good", 1.0, 3.0, None),
        ("tool", "bad", 1.0, 2.0, "failed"),
        ("tool", "held", 1.0, 31.0, "failed"),
        ("tool", "none", 1.0, 1.0, "failed"),
    ]
    assert [span.attributes["call_id"] for span in traces.spans if span.kind == "tool"] == ["a", "b", "c", "d"]


async def test_a_request_may_shorten_the_tools_deadline(autojump_clock: MockClock) -> None:
    tool_use = ToolUse(tools=(FakeTool("hung", takes(FOREVER)),))
    agent = agent_for(StepwiseProvider(calling("a hung"), saying("x")), tool_use=tool_use)
    run = Run("run", agent.run_spec("hi", RunOptions(deadlines=DeadlineWish(tool=1.5))))
    await completed(run)
    assert outcomes_of(run) == [("a", "Error", "timed out after 1.5 s")]
    assert run.elapsed == 1.5


async def test_what_a_tool_makes_of_its_deadline_is_no_result(autojump_clock: MockClock) -> None:
    async def excuse(_: str, __: ToolContext) -> str:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:  # noqa: ASYNC103 - the point
            return "sorry"  # noqa: ASYNC104

    async def complain(_: str, __: ToolContext) -> str:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("in cleanup")

    tools = [FakeTool("excuse", excuse), FakeTool("complain", complain), FakeTool("just", takes(30))]
    run = Run("run", lasting(StepwiseProvider(calling("a excuse", "b complain", "c just"), saying("x")), tools=tools))
    await completed(run)
    assert {result for _, _, result in outcomes_of(run)} == {"timed out after 30 s"}
    assert run.elapsed == 30.0


@pytest.mark.parametrize("how", ["total", "stop", "disconnect", "cancelled"])
async def test_what_ends_a_run_ends_it_in_its_tools_at_that_instant(autojump_clock: MockClock, how: str) -> None:
    tools = [FakeTool("one", takes(FOREVER)), FakeTool("two", takes(FOREVER))]
    traces = WritingTraces()
    run = Run(
        "run",
        lasting(
            StepwiseProvider(calling("a one", "b two", said="Well.", at=1)),
            tools=tools,
            deadlines=Deadlines(total=7.5 if how == "total" else 100),
            resume_grace=0,
            trace=traces,
        ),
    )
    async with trio.open_nursery() as nursery:
        surrounding = start_in(nursery, run)
        with run.log.attached():
            await trio.sleep(7.5)
            if how == "stop":
                assert run.stop()
            elif how == "cancelled":
                surrounding.cancel()
        if how in ("stop", "disconnect"):
            await trio.testing.wait_all_tasks_blocked()
    assert trio.current_time() == run.elapsed == 7.5
    for tool in tools:
        assert tool.seen == [(1.0, "called"), (7.5, "cancelled")]
    assert_ended_once(run)
    terminal = run.log.terminal
    assert terminal is not None
    assert terminal.response == "Well."
    assert getattr(terminal, "code", None) or getattr(terminal, "reason", None) == {
        "total": "timeout.total",
        "stop": "requested",
        "disconnect": "disconnect",
        "cancelled": "interrupted",
    }.get(how)
    assert outcomes_of(run) == []
    assert len(traces.ended) == len(traces.spans) == 5
    assert {span.ended_at for span in traces.spans if span.kind != "model"} == {7.5}
    assert {span.error for span in traces.spans if span.kind == "tool"} == {"cancelled"}


async def test_the_tools_deadline_does_not_outlast_the_total(autojump_clock: MockClock) -> None:
    run = Run(
        "run",
        lasting(
            StepwiseProvider(calling("a t")),
            tools=[FakeTool("t", takes(FOREVER))],
            deadlines=Deadlines(total=3),
        ),
    )
    error = await failed(run)
    assert (error.code, run.elapsed) == ("timeout.total", 3.0)


async def test_a_tool_that_cannot_be_cancelled_does_not_hold_the_step(autojump_clock: MockClock) -> None:
    let_go = trio.Event()
    provider = StepwiseProvider(calling("a stubborn"), saying("Never mind.", at=1))
    observer = WritingObserver()
    held: list[float] = []
    run = Run("run", lasting(provider, tools=[FakeTool("stubborn", holds_until(let_go))]), observer)
    run.on_held = lambda _: held.append(trio.current_time())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        with run.log.attached():
            await trio.sleep(100)
        assert provider.asked_at == [0.0, 30.0]
        assert isinstance(run.log.terminal, GenerationComplete)
        assert run.elapsed == 31.0
        assert outcomes_of(run) == [("a", "Error", "timed out after 30 s")]
        assert held == [32.0]
        assert nursery.child_tasks
        before = run.log.entries()
        let_go.set()
    assert run.log.entries() == before
    assert observer.story == ["started", "first token", "done"]


async def test_a_tool_that_cannot_be_cancelled_does_not_hold_the_end(autojump_clock: MockClock) -> None:
    let_go = trio.Event()
    run = Run("run", lasting(StepwiseProvider(calling("a t")), tools=[FakeTool("t", holds_until(let_go))]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        await trio.sleep(2)
        assert run.stop()
        assert run.log.ended
        await trio.sleep(2)
        assert run.spec.tool_use == ToolUse()  # what it held is dropped, but for what the tool holds
        let_go.set()
    assert_ended_once(run)
    assert outcomes_of(run) == []


# What tools do to the run


async def test_memory_updates_are_counted_and_told_if_they_are_asked_for(autojump_clock: MockClock) -> None:
    async def remember(_: str, context: ToolContext) -> str:
        context.memory_updated("name", "Set")
        context.memory_updated("\ud800", "Delete")
        return "ok"

    for wanted in (True, False):
        run = Run(
            "run",
            lasting(
                StepwiseProvider(calling("a t"), saying("x")),
                tools=[FakeTool("t", remember)],
                streaming=StreamingConfig(emit_memory_updates=wanted),
            ),
        )
        await completed(run)
        assert run.memory_updates == 2
        told = [event for event in events_of(run.log) if isinstance(event, MemoryUpdate)]
        assert told == ([MemoryUpdate("name", "Set"), MemoryUpdate("?", "Delete")] if wanted else [])


async def test_a_tool_knows_the_run_that_calls_it(autojump_clock: MockClock) -> None:
    tool = FakeTool("t", takes(1))
    await completed(Run("run", lasting(StepwiseProvider(calling("a t"), saying("x")), tools=[tool])))
    (context,) = tool.contexts
    assert (context.run_id, context.call_id, context.agent_id, context.memory) == ("run", "a", "agent", None)


async def test_results_count_against_the_runs_bound(autojump_clock: MockClock) -> None:
    tool = FakeTool("t", takes(1, "x" * 30_000))
    provider = StepwiseProvider(calling("a t", "b t", said="Hm."), saying("never"))
    traces = WritingTraces()
    run = Run("run", lasting(provider, tools=[tool], max_run_bytes=50_000, trace=traces))
    error = await failed(run)
    assert (error.code, error.response) == ("output_limit", "Hm.")
    assert len(provider.requests) == 1
    assert run.log.size_bytes <= 2 * 50_000 + CLOSING_BYTES
    assert len(traces.ended) == len(traces.spans)


async def test_a_step_with_large_results_counts_too(autojump_clock: MockClock) -> None:
    tool = FakeTool("t", takes(1, "x" * 30_000))
    provider = StepwiseProvider(calling("a t"), saying("x"))
    run = Run("run", lasting(provider, tools=[tool], max_run_bytes=50_000))
    assert (await failed(run)).code == "output_limit"
    assert len(provider.requests) == 1
    assert len(outcomes_of(run)) == 1
    assert steps_of(run) == []


async def test_a_bug_of_ours_in_a_tools_task_ends_the_run_alone(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug = RuntimeError("a bug")

    def broken(*_: object) -> None:
        raise bug

    monkeypatch.setattr("engine.tool_calls.bounded", broken)
    observer = WritingObserver()
    run = Run("run", lasting(StepwiseProvider(calling("a t")), tools=[FakeTool("t", takes(1))]), observer)
    error = await failed(run)
    assert (error.code, error.content, run.elapsed) == ("internal", "internal error", 1.0)
    assert observer.bugs == [bug]


async def test_ctrl_c_in_a_tool_goes_on(autojump_clock: MockClock) -> None:
    run = Run("run", lasting(StepwiseProvider(calling("a t")), tools=[FakeTool("t", fails(KeyboardInterrupt()))]))
    with pytest.RaisesGroup(KeyboardInterrupt):
        await run.execute()
    assert_ended_once(run)


async def test_an_observer_and_an_end_that_raise_harm_nothing(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(WritingObserver):
        def run_ended(self, run: Run) -> None:
            super().run_ended(run)
            raise ValueError

    told: list[Run] = []

    def on_ended(run: Run) -> None:
        told.append(run)
        assert run.log.ended
        raise ValueError

    observer = Broken()
    run = Run("run", lasting(StepwiseProvider(saying("x")), on_ended=on_ended), observer)
    await completed(run)
    assert told == [run]
    assert observer.story == ["started", "first token", "done"]
    assert len(caplog.records) == 2


async def test_the_mode_is_told_to_who_wants_metadata(autojump_clock: MockClock) -> None:
    for tools, mode in (([FakeTool("t", takes(1))], "function_calling"), ([], "direct")):
        streaming = StreamingConfig(emit_metadata=True)
        run = Run("run", lasting(StepwiseProvider(saying("x")), tools=tools, streaming=streaming))
        await completed(run)
        assert Metadata("streaming_mode", mode) in events_of(run.log)
