"""The loop of steps: who is asked what and when, tools side by side, what runs out, and what all of it adds up to."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from engine import (
    AnsweredByPiece,
    ContinuationPiece,
    Deadlines,
    DeadlineWish,
    Error,
    FinishPiece,
    GenerationComplete,
    MemoryUpdate,
    Message,
    Metadata,
    Piece,
    Provider,
    ProviderError,
    Run,
    RunOptions,
    RunSpec,
    StepComplete,
    StreamingConfig,
    TextDelta,
    ToolCall,
    ToolCallComplete,
    ToolCallPiece,
    ToolContext,
    ToolUse,
    Usage,
    UsagePiece,
    UsageUpdate,
)
from engine.emitter import CLOSING_BYTES
from engine.events import CalledTool, CallOutcome

from .fake_guests import FakeTool, WritingTraces, fails, holds_until, takes
from .scripted import (
    FOREVER,
    SENT,
    Line,
    StepwiseProvider,
    WritingObserver,
    agent_for,
    assert_ended_once,
    calling,
    events_of,
    run_read_by_one,
    saying,
    spec_for,
    text,
)

USER = Message("user", "12345678")
REFUSED = "not called: no more tools may be called for this answer"


def lasting(provider: Provider, **settings: Any) -> RunSpec:
    """A run that needs no reader, unless the settings say so."""
    return spec_for(provider, **{"resume_grace": inf, **settings})


async def completed(run: Run) -> GenerationComplete:
    """Execute the run; its ``done``."""
    await run.execute()
    assert_ended_once(run)
    assert isinstance(run.log.terminal, GenerationComplete), run.log.terminal
    return run.log.terminal


async def failed(run: Run) -> Error:
    """Execute the run; its ``error``."""
    await run.execute()
    assert_ended_once(run)
    assert isinstance(run.log.terminal, Error), run.log.terminal
    return run.log.terminal


def said_in(run: Run) -> str:
    return "".join(event.content for event in events_of(run.log) if isinstance(event, TextDelta))


def outcomes_of(run: Run) -> list[tuple[str, str, object]]:
    """The calls that were completed, in the order of that."""
    events = [event for event in events_of(run.log) if isinstance(event, ToolCallComplete)]
    return [(event.call_id, event.status, event.result) for event in events]


def steps_of(run: Run) -> list[StepComplete]:
    return [event for event in events_of(run.log) if isinstance(event, StepComplete)]


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
    surrounding = trio.CancelScope()
    async with trio.open_nursery() as nursery:

        async def execute() -> None:
            with surrounding:
                await run.execute()

        nursery.start_soon(execute)
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


# Running out


async def test_the_last_step_is_asked_for_an_answer(autojump_clock: MockClock) -> None:
    tool = FakeTool("t", takes(1))
    provider = StepwiseProvider(calling("a t"), calling("b t"), saying("x"))
    run = Run("run", lasting(provider, tool_use=ToolUse(tools=(tool,), max_steps=3)))
    assert (await completed(run)).response == "x"
    assert [request.tool_choice for request in provider.requests] == [None, None, "none"]
    assert all(request.tools == (tool.spec,) for request in provider.requests)


async def test_without_any_text_running_out_is_an_error(autojump_clock: MockClock) -> None:
    tool = FakeTool("t", takes(1))
    run = Run("run", lasting(StepwiseProvider(calling("a t")), tool_use=ToolUse(tools=(tool,), max_steps=3)))
    error = await failed(run)
    assert (error.code, error.content) == ("max_steps", "the model gave no answer within 3 steps")
    assert len(tool.seen) == 4  # two calls
    assert outcomes_of(run) == [("a", "Success", "done"), ("a-2", "Success", "done"), ("a-3", "Error", REFUSED)]
    assert [step.step_type for step in steps_of(run)] == ["Initial", "Tool", "Tool"]


@pytest.mark.parametrize("last", [calling("z t"), saying(""), saying(" \n")], ids=["calls", "empty", "blank"])
async def test_what_was_said_before_is_the_answer_of_a_run_that_ran_out(
    autojump_clock: MockClock, last: list[Line]
) -> None:
    tool = FakeTool("t", takes(1))
    provider = StepwiseProvider(calling("a t", said="So far."), last)
    run = Run("run", lasting(provider, tool_use=ToolUse(tools=(tool,), max_steps=2)))
    assert (await completed(run)).response.strip() == "So far."
    assert len(tool.seen) == 2


async def test_a_model_that_calls_tools_anyway_is_refused_and_its_text_is_the_answer(autojump_clock: MockClock) -> None:
    tool = FakeTool("t", takes(1))
    provider = StepwiseProvider(calling("a t"), calling("b t", said="Answer."))
    run = Run("run", lasting(provider, tool_use=ToolUse(tools=(tool,), max_steps=2)))
    done = await completed(run)
    assert (done.response, done.finish_reason, done.elapsed_ms) == ("Answer.", "tool_calls", 1000.0)
    assert outcomes_of(run)[1] == ("b", "Error", REFUSED)


async def test_calls_beyond_the_limit_are_refused_and_the_next_step_has_to_answer(autojump_clock: MockClock) -> None:
    tool = FakeTool("t", takes(1))
    provider = StepwiseProvider(calling("a t"), calling("b t", "c t", "d t"), saying("x"))
    run = Run("run", lasting(provider, tool_use=ToolUse(tools=(tool,), max_tool_calls=2)))
    await completed(run)
    assert [what for _, what in tool.seen].count("ended") == 2
    assert sorted(outcomes_of(run)) == [
        ("a", "Success", "done"),
        ("b", "Success", "done"),
        ("c", "Error", REFUSED),
        ("d", "Error", REFUSED),
    ]
    assert [message.content for message in provider.requests[2].messages[-3:]] == ["done", REFUSED, REFUSED]
    assert [request.tool_choice for request in provider.requests] == [None, None, "none"]


@pytest.mark.parametrize("use", [{"max_steps": 1}, {"max_tool_calls": 0}], ids=str)
@pytest.mark.parametrize("answers", [True, False])
async def test_an_agent_that_may_call_nothing(autojump_clock: MockClock, use: dict[str, int], answers: bool) -> None:
    tool = FakeTool("t", takes(1))
    provider = StepwiseProvider(saying("x") if answers else calling("a t"))
    run = Run("run", lasting(provider, tool_use=ToolUse(tools=(tool,), **use)))
    if answers:
        assert (await completed(run)).response == "x"
    else:
        assert (await failed(run)).code == "max_steps"
    assert provider.requests[0].tool_choice == "none"
    assert tool.seen == []


async def test_a_filtered_answer_calls_nothing(autojump_clock: MockClock) -> None:
    tool = FakeTool("t", takes(1))
    script: list[Line] = [(0, [ToolCallPiece(0, "a", "t", "{}"), FinishPiece("content_filter")])]
    for use in (ToolUse(tools=(tool,)), ToolUse(tools=(tool,), max_steps=1)):
        run = Run("run", lasting(StepwiseProvider(script), tool_use=use))
        assert (await completed(run)).finish_reason == "content_filter"
        assert outcomes_of(run) == [("a", "Error", "not called: the answer was filtered")]
        assert len(steps_of(run)) == 1
    assert tool.seen == []


async def test_an_unknown_tool_is_told_of_those_there_are(autojump_clock: MockClock) -> None:
    provider = StepwiseProvider(calling("a nothing", f"b {'x' * 5000}"), saying("x"))
    tools = [FakeTool("one", takes(1)), FakeTool("two", takes(1))]
    run = Run("run", lasting(provider, tools=tools))
    await completed(run)
    assert outcomes_of(run)[0] == ("a", "Error", "there is no tool 'nothing'; there are: one, two")
    assert len(str(outcomes_of(run)[1][2])) < 200
    assert run.elapsed == 0


# What steps add up to


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (["One.", "Two.", "Three."], "One.\n\nTwo.\n\nThree."),
        (["", "Two.", "Three."], "Two.\n\nThree."),
        (["One.\n", "Two.", " Three."], "One.\nTwo. Three."),
        (["One.", "", "Three."], "One.\n\nThree."),
    ],
    ids=repr,
)
async def test_the_answer_is_the_texts_of_all_steps_kept_apart(
    autojump_clock: MockClock, parts: list[str], whole: str
) -> None:
    scripts = [calling("a t", said=parts[0]), calling("b t", said=parts[1]), saying(parts[2])]
    provider = StepwiseProvider(*scripts)
    run = Run("run", lasting(provider, tools=[FakeTool("t", takes(1))]))
    assert (await completed(run)).response == said_in(run) == whole
    told = [message.content for message in provider.requests[2].messages if message.role == "assistant"]
    assert told == parts[:2]


async def test_an_empty_piece_does_not_take_the_gap_away(autojump_clock: MockClock) -> None:
    provider = StepwiseProvider(calling("a t", said="One."), saying("", "Two", "", "."))
    run = Run("run", lasting(provider, tools=[FakeTool("t", takes(1))]))
    assert (await completed(run)).response == said_in(run) == "One.\n\nTwo."


async def test_usage_is_the_sum_over_the_steps(autojump_clock: MockClock) -> None:
    first: list[Piece] = [
        UsagePiece(10, 0),
        ToolCallPiece(0, "a", "t"),
        UsagePiece(10, 5, 2, 1),
        FinishPiece("tool_calls"),
    ]
    provider = StepwiseProvider(
        [(0, first)], [(0, [*text("x"), UsagePiece(20, 7, cached_tokens=4), FinishPiece("stop")])]
    )
    run = Run("run", lasting(provider, tools=[FakeTool("t", takes(1))]))
    done = await completed(run)
    assert done.usage == Usage(30, 12, 2, 5)
    updates = [event.usage for event in events_of(run.log) if isinstance(event, UsageUpdate)]
    assert updates == [Usage(10, 0), Usage(10, 5, 2, 1), Usage(30, 12, 2, 5)]


async def test_a_step_without_the_vendors_count_makes_the_sum_an_estimate(autojump_clock: MockClock) -> None:
    provider = StepwiseProvider(calling("a t"), [(0, [*text("1234"), UsagePiece(20, 7), FinishPiece("stop")])])
    run = Run("run", lasting(provider, tools=[FakeTool("t", takes(1))]))
    assert (await completed(run)).usage == Usage(2 + 20, 1 + 7, estimated=True)


async def test_a_tool_call_is_the_first_content(autojump_clock: MockClock) -> None:
    run = Run(
        "run", lasting(StepwiseProvider(calling("a t", at=2), saying("x", at=1)), tools=[FakeTool("t", takes(1))])
    )
    assert (await completed(run)).ttfb_ms == 2000.0


async def test_the_progress_deadlines_are_each_steps_own(autojump_clock: MockClock) -> None:
    limits = Deadlines(connect=2, first_token=4, idle=3, tool=50)
    slow: list[Line] = [(1, [SENT]), *calling("a t", at=4)]
    hung: list[Line] = [(0, [SENT]), (FOREVER, ())]
    run = Run(
        "run",
        lasting(StepwiseProvider(slow, hung), tools=[FakeTool("t", takes(40))], deadlines=limits),
    )
    assert (await failed(run)).code == "timeout.first_token"
    assert run.elapsed == 4 + 40 + 4


async def test_an_argument_that_comes_slowly_is_progress(autojump_clock: MockClock) -> None:
    pieces = [(number * 2, [ToolCallPiece(0, "a" if number == 1 else None, "t", "1")]) for number in range(1, 6)]
    provider = StepwiseProvider([*pieces, (10, [FinishPiece("tool_calls")])], saying("x"))
    run = Run("run", lasting(provider, tools=[FakeTool("t", takes(1))], deadlines=Deadlines(idle=3, first_token=3)))
    await completed(run)
    assert run.elapsed == 11.0


async def test_the_vendors_continuation_goes_back_with_the_name_of_who_answered(autojump_clock: MockClock) -> None:
    def step(provider: str, number: int) -> list[Line]:
        return [(0, [AnsweredByPiece(provider, "large"), ContinuationPiece({"n": number})]), *calling(f"c{number} t")]

    provider = StepwiseProvider(step("first", 1), step("second", 2), [(0, [AnsweredByPiece("third", "m"), *text("x")])])
    run = Run("run", lasting(provider, tools=[FakeTool("t", takes(1))]))
    done = await completed(run)
    assert [
        (message.continuation, message.continued_by)
        for message in provider.requests[2].messages
        if message.role == "assistant"
    ] == [({"n": 1}, "first"), ({"n": 2}, "second")]
    assert done.usage is not None
    assert (done.usage.provider, done.usage.model) == ("third", "m")


async def test_without_a_failover_the_continuation_is_the_providers_own(autojump_clock: MockClock) -> None:
    first: list[Line] = [(0, [ContinuationPiece("state")]), *calling("a t")]
    provider = StepwiseProvider(first, saying("x"))
    await completed(Run("run", lasting(provider, tools=[FakeTool("t", takes(1))])))
    assert provider.requests[1].messages[1].continued_by == "stepwise"
    assert provider.requests[1].messages[1].continuation == "state"


async def test_a_provider_that_fails_after_a_step_keeps_what_was_said(autojump_clock: MockClock) -> None:
    provider = StepwiseProvider(
        calling("a t", said="So."), [(1, text("And")), (2, ProviderError("upstream.server", "no"))]
    )
    traces = WritingTraces()
    run = Run("run", lasting(provider, tools=[FakeTool("t", takes(1))], trace=traces))
    error = await failed(run)
    assert (error.code, error.response) == ("upstream.server", "So.\n\nAnd")
    assert traces.story == [
        ("run", "agent", 0.0, 3.0, "upstream.server"),
        ("step", "step-1", 0.0, 1.0, None),
        ("model", "model", 0.0, 0.0, None),
        ("tool", "t", 0.0, 1.0, None),
        ("step", "step-2", 1.0, 3.0, None),
        ("model", "model", 1.0, 3.0, "upstream.server"),
    ]
    assert [span.parent_id for span in traces.spans] == [None, 1, 2, 2, 1, 5]
    assert traces.spans[2].attributes["finish_reason"] == "tool_calls"


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
    run = Run("run", lasting(StepwiseProvider(calling("a t"), saying("x")), tools=[tool], max_run_bytes=50_000))
    assert (await failed(run)).code == "output_limit"
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
