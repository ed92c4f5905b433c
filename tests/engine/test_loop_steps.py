"""What steps add up to, and what happens when steps or tool calls run out."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from engine import (
    AnsweredByPiece,
    ContinuationPiece,
    Deadlines,
    FinishPiece,
    Piece,
    ProviderError,
    Run,
    ToolCallPiece,
    ToolUse,
    Usage,
    UsagePiece,
    UsageUpdate,
)

from .fake_guests import FakeTool, WritingTraces, takes
from .loop_scene import REFUSED, completed, failed, lasting, outcomes_of, said_in, steps_of
from .scripted import (
    FOREVER,
    SENT,
    Line,
    StepwiseProvider,
    calling,
    events_of,
    saying,
    text,
)

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
    assert (error.code, error.content) == ("max_steps", "the model gave no answer within 3 steps (max_steps)")
    assert len(tool.seen) == 4  # two calls
    assert outcomes_of(run) == [("a", "Success", "done"), ("a-2", "Success", "done"), ("a-3", "Error", REFUSED)]
    assert [step.step_type for step in steps_of(run)] == ["Initial", "Tool", "Tool"]


async def test_running_out_of_tool_calls_says_so(autojump_clock: MockClock) -> None:
    tool_use = ToolUse(tools=(FakeTool("t", takes(1)),), max_tool_calls=1)
    error = await failed(Run("run", lasting(StepwiseProvider(calling("a t"), saying("")), tool_use=tool_use)))
    text = "the model gave no answer after its 1 tool calls (max_tool_calls) were used up"
    assert (error.code, error.content) == ("max_steps", text)


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("last", [saying(""), saying(" \n"), [(0, ())]], ids=["empty", "blank", "no finish"])
async def test_an_empty_answer_with_steps_and_calls_left_is_the_models_fault(
    autojump_clock: MockClock, last: list[Line], called: bool
) -> None:
    provider = StepwiseProvider(*([calling("a t")] if called else []), last)
    error = await failed(Run("run", lasting(provider, tools=[FakeTool("t", takes(1))])))
    reason = " (finish reason: stop)" if last[0][1] else ""
    assert (error.code, error.content) == ("upstream.protocol", f"the model gave an empty answer{reason}")


async def test_an_empty_end_of_an_answer_that_was_said_before_is_an_end(autojump_clock: MockClock) -> None:
    provider = StepwiseProvider(calling("a t", said="So far."), saying(""))
    assert (await completed(Run("run", lasting(provider, tools=[FakeTool("t", takes(1))])))).response == "So far."


async def test_an_empty_answer_that_was_filtered_is_done(autojump_clock: MockClock) -> None:
    provider = StepwiseProvider(calling("a t"), [(0, [FinishPiece("content_filter")])])
    done = await completed(Run("run", lasting(provider, tools=[FakeTool("t", takes(1))])))
    assert (done.response, done.finish_reason) == ("", "content_filter")


async def test_an_agent_without_tools_may_say_nothing(autojump_clock: MockClock) -> None:
    assert (await completed(Run("run", lasting(StepwiseProvider(saying("")))))).response == ""


async def test_blank_text_is_no_answer(autojump_clock: MockClock) -> None:
    tool_use = ToolUse(tools=(FakeTool("t", takes(1)),), max_steps=2)
    run = Run("run", lasting(StepwiseProvider(calling("a t", said=" "), saying("\n")), tool_use=tool_use))
    assert (await failed(run)).code == "max_steps"


async def test_the_calls_of_one_step_may_use_up_all_that_there_are(autojump_clock: MockClock) -> None:
    tool_use = ToolUse(tools=(FakeTool("t", takes(1)),), max_tool_calls=2)
    provider = StepwiseProvider(calling("a t", "b t"), saying("x"))
    await completed(Run("run", lasting(provider, tool_use=tool_use)))
    assert [request.tool_choice for request in provider.requests] == [None, "none"]


@pytest.mark.parametrize(
    ("last", "more"), [(calling("z t"), ""), (saying(""), ""), (saying(" \n"), " \n")], ids=["calls", "empty", "blank"]
)
async def test_what_was_said_before_is_the_answer_of_a_run_that_ran_out(
    autojump_clock: MockClock, last: list[Line], more: str
) -> None:
    tool = FakeTool("t", takes(1))
    provider = StepwiseProvider(calling("a t", said="So far."), last)
    run = Run("run", lasting(provider, tool_use=ToolUse(tools=(tool,), max_steps=2)))
    assert (await completed(run)).response == "So far." + more
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
    fragments: list[Line] = [(at, [ToolCallPiece(0, None, None, "1")]) for at in (4, 6, 8, 10)]
    script: list[Line] = [(2, [ToolCallPiece(0, "a", "t")]), *fragments, (10, [FinishPiece("tool_calls")])]
    provider = StepwiseProvider(script, saying("x"))
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
