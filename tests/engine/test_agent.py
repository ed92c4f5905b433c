"""The public face: agents that answer whole or event by event, inside whatever the caller has around them."""

from __future__ import annotations

from math import nan

import pytest
import trio
from trio.testing import MockClock

from engine import (
    AgentStarted,
    BasicAgent,
    Deadlines,
    DeadlineTooLongError,
    DeadlineWish,
    Emit,
    Error,
    Event,
    FinishPiece,
    GenerationComplete,
    Message,
    Messages,
    Metadata,
    ModelRequest,
    ProviderError,
    RunFailedError,
    RunOptions,
    RunStoppedError,
    StepComplete,
    StreamingAgent,
    StreamingConfig,
    TextDelta,
    Usage,
    UsagePiece,
)
from engine.agent import DEFAULT_INSTRUCTIONS, RunStream

from .scripted import FOREVER, SENT, Line, ProgrammedProvider, ScriptedProvider, agent_for, assert_ended_once, text

SILENCE: Line = (FOREVER, ())
HELLO: list[Line] = [(0.5, [SENT]), (1, text("Hel")), (2, text("lo")), (2.5, [FinishPiece("stop"), UsagePiece(3, 2)])]


def streaming(provider: ScriptedProvider | ProgrammedProvider, **config: float) -> StreamingAgent:
    return StreamingAgent.with_config(agent_for(provider), StreamingConfig(**config))  # type: ignore[arg-type]  # any


def living_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


# Whole answers


async def test_generate_answers_whole(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider(*HELLO)
    done = await agent_for(provider).generate("Hi")
    assert done == GenerationComplete("Hello", 1, 2500.0, 1000.0, Usage(3, 2), "stop")
    assert trio.current_time() == 2.5
    assert provider.seen[-1] == (2.5, "answered")


async def test_a_failed_run_raises_with_its_code_and_partial_text(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider((1, text("par")), (2, ProviderError("upstream.overloaded", "try later")))
    with pytest.raises(RunFailedError, match=r"^upstream\.overloaded: try later$") as caught:
        await agent_for(provider).generate("Hi")
    assert (caught.value.code, caught.value.response) == ("upstream.overloaded", "par")


async def test_a_deadline_raises_with_its_code(autojump_clock: MockClock) -> None:
    with pytest.raises(RunFailedError) as caught:
        await agent_for(ScriptedProvider((1, text("a")), SILENCE)).generate("Hi")
    assert (caught.value.code, caught.value.response) == ("timeout.idle", "a")
    assert trio.current_time() == 31.0


async def test_a_bug_of_the_provider_raises_as_a_failed_run(autojump_clock: MockClock) -> None:
    with pytest.raises(RunFailedError, match=r"^internal: internal error$"):
        await agent_for(ScriptedProvider((1, ZeroDivisionError()))).generate("Hi")


async def test_a_whole_answer_that_is_stopped_raises(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams: list[RunStream] = []
    init = RunStream.__init__

    def noting(stream: RunStream, *args: object) -> None:
        streams.append(stream)
        init(stream, *args)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(RunStream, "__init__", noting)
    async with trio.open_nursery() as nursery:

        async def generate() -> None:
            with pytest.raises(RunStoppedError, match="stopped: enough") as caught:
                await agent_for(ScriptedProvider((1, text("a")), SILENCE)).generate("Hi")
            assert (caught.value.reason, caught.value.response) == ("enough", "a")

        nursery.start_soon(generate)
        await trio.sleep(2)
        (stream,) = streams
        assert stream.run is not None
        assert stream.run.stop("enough")
    assert trio.current_time() == 2.0


async def test_whole_answers_side_by_side(autojump_clock: MockClock) -> None:
    agent = agent_for(ScriptedProvider(*HELLO))
    answers: list[str] = []

    async def ask(after: float) -> None:
        await trio.sleep(after)
        answers.append((await agent.generate("Hi")).response)

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(ask, number / 4)
    assert answers == ["Hello"] * 10


# Event by event


async def test_a_stream_gives_every_event_at_its_time_and_ends(autojump_clock: MockClock) -> None:
    async with streaming(ScriptedProvider(*HELLO)).execute_streaming("Hi") as events:
        got = [(trio.current_time(), event) async for event in events]
        assert [event async for event in events] == []
    assert isinstance(got[0][1], AgentStarted)
    assert [
        (at, event) for at, event in got[1:] if isinstance(event, TextDelta | StepComplete | GenerationComplete)
    ] == [
        (1.0, TextDelta("Hel", "step-1")),
        (2.0, TextDelta("lo", "step-1")),
        (2.5, StepComplete("Final", "step-1")),
        (2.5, GenerationComplete("Hello", 1, 2500.0, 1000.0, Usage(3, 2), "stop")),
    ]


async def test_the_script_of_the_readme(autojump_clock: MockClock) -> None:
    said = ""
    agent = BasicAgent(agent_id="demo", provider=ScriptedProvider(*HELLO), model="a-model")
    async with StreamingAgent.with_config(agent, StreamingConfig()).execute_streaming("Say hello") as events:
        async for event in events:
            match event:
                case TextDelta(content):
                    said += content
                case GenerationComplete():
                    said += f" ({event.ttfb_ms:.0f} ms)"
    assert said == "Hello (1000 ms)"


async def test_an_error_is_the_last_event_of_a_stream(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider((1, ProviderError("upstream.auth", "no")))
    async with streaming(provider).execute_streaming("Hi") as events:
        got = [event async for event in events]
    assert got[1:] == [Error("upstream.auth", "no")]


async def test_a_busy_consumer_gets_all_in_order_in_larger_deltas(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider((0, text("a")), *[(number / 8, text("b")) for number in range(1, 17)])
    said: list[str] = []
    async with streaming(provider).execute_streaming("Hi") as events:
        async for event in events:
            if isinstance(event, TextDelta):
                said.append(event.content)
                await trio.sleep(1.0625)
    assert said == ["a", "b" * 8, "b" * 8]


# Leaving the block


@pytest.mark.parametrize("leave_at", [0.25, 0.5, 1.5])
async def test_leaving_the_block_ends_the_run_at_once(autojump_clock: MockClock, leave_at: float) -> None:
    provider = ScriptedProvider(*HELLO)
    before = living_tasks()
    stream = streaming(provider).execute_streaming("Hi")
    async with stream:
        await trio.sleep(leave_at)
    assert provider.seen == [(0.0, "asked"), (leave_at, "cancelled")]
    assert trio.current_time() == leave_at
    assert living_tasks() == before
    assert stream.run is not None
    assert_ended_once(stream.run)
    assert stream.run.log.readers == 0


async def test_leaving_the_block_in_the_tick_of_entering_it(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider(*HELLO)
    before = living_tasks()
    async with streaming(provider).execute_streaming("Hi"):
        pass
    assert trio.current_time() == 0.0
    assert living_tasks() == before
    assert [what for _, what in provider.seen] in ([], ["asked", "cancelled"])


async def test_breaking_out_of_the_loop_ends_the_run(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider(*HELLO)
    async with streaming(provider).execute_streaming("Hi") as events:
        async for event in events:
            if isinstance(event, TextDelta):
                break
    assert provider.seen[-1] == (1.0, "cancelled")
    assert trio.current_time() == 1.0


async def test_the_block_waits_for_the_models_cleanup(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(2, shield=True):
                await trio.sleep_forever()

    before = living_tasks()
    async with streaming(ProgrammedProvider(answer)).execute_streaming("Hi"):
        await trio.sleep(1)
    assert trio.current_time() == 3.0
    assert living_tasks() == before


async def test_what_the_caller_raises_comes_out_as_it_is(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider(*HELLO)
    error = ValueError("the caller's own")

    async def raise_in_the_loop() -> None:
        async with streaming(provider).execute_streaming("Hi") as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    raise error

    with pytest.raises(ValueError, match="the caller's own") as caught:
        await raise_in_the_loop()
    assert caught.value is error
    assert provider.seen[-1] == (1.0, "cancelled")


async def test_what_the_caller_raises_is_not_lost_in_a_cancelled_surrounding(autojump_clock: MockClock) -> None:
    error = ValueError("the caller's own")

    async def raise_while_cancelled() -> None:
        with trio.CancelScope() as scope:
            async with streaming(ScriptedProvider(*HELLO)).execute_streaming("Hi"):
                await trio.sleep(1)
                scope.cancel()
                raise error

    with pytest.raises(ValueError, match="the caller's own") as caught:
        await raise_while_cancelled()
    assert caught.value is error


async def test_a_block_left_in_a_cancelled_surrounding_passes_the_cancellation_on(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider(*HELLO)
    with trio.CancelScope() as scope:
        async with streaming(provider).execute_streaming("Hi"):
            await trio.sleep(1.5)
            scope.cancel()
    assert scope.cancelled_caught
    assert provider.seen[-1] == (1.5, "cancelled")


async def test_a_bug_in_the_models_cleanup_hides_nothing(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ZeroDivisionError

    async def raise_in_the_block() -> None:
        async with streaming(ProgrammedProvider(answer)).execute_streaming("Hi"):
            await trio.sleep(1)
            raise ValueError("the caller's own")

    with pytest.raises(ValueError, match="the caller's own"):
        await raise_in_the_block()


# Cancellation around


@pytest.mark.parametrize("seconds", [0.25, 1.5])
async def test_a_deadline_around_a_whole_answer_ends_the_run(autojump_clock: MockClock, seconds: float) -> None:
    provider = ScriptedProvider(*HELLO)
    before = living_tasks()
    with trio.move_on_after(seconds) as scope:
        await agent_for(provider).generate("Hi")
    assert scope.cancelled_caught
    assert provider.seen[-1] == (seconds, "cancelled")
    assert trio.current_time() == seconds
    assert living_tasks() == before


@pytest.mark.parametrize("seconds", [0.25, 1.5])
async def test_a_deadline_around_a_stream_ends_the_run(autojump_clock: MockClock, seconds: float) -> None:
    provider = ScriptedProvider(*HELLO)
    before = living_tasks()
    with trio.move_on_after(seconds) as scope:
        async with streaming(provider).execute_streaming("Hi") as events:
            async for _ in events:
                pass
    assert scope.cancelled_caught
    assert provider.seen[-1] == (seconds, "cancelled")
    assert living_tasks() == before


async def test_a_read_that_is_cancelled_loses_no_event(autojump_clock: MockClock) -> None:
    got: list[Event] = []
    async with streaming(ScriptedProvider(*HELLO)).execute_streaming("Hi") as events:
        while not got or not isinstance(got[-1], GenerationComplete):
            with trio.move_on_after(0.375):
                got.append(await anext(events))
    assert "".join(event.content for event in got if isinstance(event, TextDelta)) == "Hello"


# What the model is asked


@pytest.mark.parametrize(
    ("messages", "conversation"),
    [
        ("Hi", [Message("user", "Hi")]),
        ("", [Message("user", "")]),
        (Message("user", "Hi"), [Message("user", "Hi")]),
        ([Message("user", "Hi"), Message("assistant", "Ho")], [Message("user", "Hi"), Message("assistant", "Ho")]),
        (iter([Message("user", "Hi")]), [Message("user", "Hi")]),
        ([], []),
    ],
    ids=["text", "empty text", "message", "list", "iterator", "nothing"],
)
def test_messages_in_any_form_follow_the_instructions(messages: Messages, conversation: list[Message]) -> None:
    request = agent_for(ScriptedProvider()).run_spec(messages).request
    assert request == ModelRequest((Message("system", DEFAULT_INSTRUCTIONS), *conversation), "model")


def test_empty_instructions_send_none() -> None:
    request = agent_for(ScriptedProvider(), instructions="").run_spec("Hi").request
    assert request.messages == (Message("user", "Hi"),)


def test_the_agents_settings_are_the_runs() -> None:
    config = StreamingConfig(text_buffer_size=7)
    agent = agent_for(
        ScriptedProvider(),
        instructions="Be brief.",
        temperature=0.0,
        max_tokens=9,
        deadlines=Deadlines(total=9),
        streaming=config,
        max_run_bytes=12345,
    )
    spec = agent.run_spec("Hi")
    assert spec.request == ModelRequest(
        (Message("system", "Be brief."), Message("user", "Hi")), "model", temperature=0.0, max_tokens=9
    )
    assert (spec.agent_id, spec.provider) == ("agent", agent.provider)
    assert (spec.deadlines, spec.streaming, spec.max_run_bytes) == (Deadlines(total=9), config, 12345)
    assert spec.resume_grace == 5.0


def test_options_win_over_the_agents_settings() -> None:
    agent = agent_for(ScriptedProvider(), temperature=1.0, max_tokens=9, deadlines=Deadlines(total=9))
    config = StreamingConfig(text_buffer_size=7)
    options = RunOptions(
        deadlines=DeadlineWish(idle=3.0),
        streaming=config,
        temperature=0.0,
        max_tokens=1,
        extra={"seed": 1},
        resume_grace=0.0,
    )
    spec = agent.run_spec("Hi", options)
    assert (spec.request.temperature, spec.request.max_tokens, spec.request.extra) == (0.0, 1, {"seed": 1})
    assert (spec.deadlines, spec.streaming, spec.resume_grace) == (Deadlines(total=9, idle=3.0), config, 0.0)


def test_a_streaming_agents_configuration_yields_to_the_options() -> None:
    agent = StreamingAgent.with_config(agent_for(ScriptedProvider()), StreamingConfig(text_buffer_size=7))
    assert agent.execute_streaming("Hi")._spec.streaming == agent.config
    for_this_run = StreamingConfig(text_buffer_size=9)
    options = RunOptions(streaming=for_this_run, temperature=0.5)
    spec = agent.execute_streaming("Hi", options)._spec
    assert spec.streaming == for_this_run
    assert spec.request.temperature == 0.5


async def test_the_configuration_rules_the_stream(autojump_clock: MockClock) -> None:
    agent = StreamingAgent.with_config(agent_for(ScriptedProvider(*HELLO)), StreamingConfig(emit_metadata=True))
    async with agent.execute_streaming("Hi") as events:
        got = [event async for event in events]
    assert [type(event) for event in got[:3]] == [AgentStarted, Metadata, Metadata]


# Deadlines and options of one call


async def test_a_call_may_shorten_its_deadlines(autojump_clock: MockClock) -> None:
    agent = agent_for(ScriptedProvider((0, [SENT]), SILENCE))
    with pytest.raises(RunFailedError) as caught:
        await agent.generate("Hi", RunOptions(deadlines=DeadlineWish(first_token=2.5)))
    assert caught.value.code == "timeout.first_token"
    assert trio.current_time() == 2.5


async def test_a_call_for_longer_deadlines_is_refused_before_anything_starts(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider(*HELLO)
    options = RunOptions(deadlines=DeadlineWish(total=121.0))
    with pytest.raises(DeadlineTooLongError, match="total"):
        streaming(provider).execute_streaming("Hi", options)
    with pytest.raises(DeadlineTooLongError, match="total"):
        await agent_for(provider).generate("Hi", options)
    assert provider.seen == []


async def test_a_grace_that_makes_no_sense_is_refused_before_anything_starts(autojump_clock: MockClock) -> None:
    with pytest.raises(ValueError, match="resume_grace"):
        streaming(ScriptedProvider()).execute_streaming("Hi", RunOptions(resume_grace=nan))


async def test_a_run_that_cannot_begin_leaves_nothing_open(autojump_clock: MockClock) -> None:
    before = living_tasks()
    agent = BasicAgent(agent_id="\ud800", provider=ScriptedProvider(), model="model")
    with pytest.raises(UnicodeEncodeError):
        await agent.generate("Hi")
    await trio.sleep(1)
    assert living_tasks() == before
