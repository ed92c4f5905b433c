"""A run from its first event to its one terminal event: answers, failures, bugs, usage and times."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from engine import (
    AgentStarted,
    AgentStopped,
    AnsweredByPiece,
    ContinuationPiece,
    Emit,
    Error,
    FinishPiece,
    GenerationComplete,
    Message,
    Metadata,
    ModelRequest,
    Piece,
    ProviderError,
    ReasoningDelta,
    ReasoningPiece,
    Run,
    RunSpec,
    StepComplete,
    StreamingConfig,
    TextDelta,
    TextPiece,
    ToolCallPiece,
    Usage,
    UsagePiece,
    UsageUpdate,
)
from engine.errors import PROVIDER_ERROR_CODES
from engine.pieces import FinishReason

from .scripted import (
    FOREVER,
    SENT,
    TIMESTAMP,
    WALL_TIME,
    Line,
    ProgrammedProvider,
    ScriptedProvider,
    WritingObserver,
    assert_ended_once,
    events_of,
    reasoning,
    run_read_by_one,
    spec_for,
    text,
)

SILENCE: Line = (FOREVER, ())
BUG = RuntimeError("a secret of the implementation")
STEP = "step-1"


async def finished(
    *script: Line, observer: WritingObserver | None = None, streaming: StreamingConfig | None = None
) -> Run:
    """A run of this script, read by one reader to its end."""
    run = Run("run", spec_for(ScriptedProvider(*script), streaming=streaming), observer, lambda: WALL_TIME)
    await run_read_by_one(run)
    assert_ended_once(run)
    return run


def error_of(run: Run) -> Error:
    assert isinstance(run.log.terminal, Error)
    return run.log.terminal


def done_of(run: Run) -> GenerationComplete:
    assert isinstance(run.log.terminal, GenerationComplete)
    return run.log.terminal


# The answer


async def test_an_answer_from_start_to_done(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider(
        (0.25, [SENT]),
        (0.5, reasoning("Hm. ")),
        (0.75, text("Hel")),
        (1.0, text("lo")),
        (1.5, [FinishPiece("stop")]),
        (1.75, [UsagePiece(10, 20, 5, 3)]),
    )
    run = Run("run", spec_for(provider), wall_clock=lambda: WALL_TIME)
    usage = Usage(10, 20, 5, 3)
    assert await run_read_by_one(run) == [
        (0.0, AgentStarted("agent", "run", TIMESTAMP)),
        (0.5, ReasoningDelta("Hm. ", STEP)),
        (0.75, TextDelta("Hel", STEP)),
        (1.0, TextDelta("lo", STEP)),
        (1.75, UsageUpdate(usage)),
        (1.75, StepComplete("Final", STEP)),
        (1.75, GenerationComplete("Hello", 1, 1750.0, 500.0, usage, "stop")),
    ]
    assert_ended_once(run)
    assert provider.seen == [(0.0, "asked"), (1.75, "answered")]
    assert provider.requests == [spec_for(provider).request]


async def test_an_empty_answer_is_an_answer(autojump_clock: MockClock) -> None:
    run = await finished((2, [FinishPiece("stop")]))
    assert run.log.terminal == GenerationComplete("", 1, 2000.0, None, None, "stop")


async def test_metadata_comes_first_when_it_is_asked_for(autojump_clock: MockClock) -> None:
    run = await finished((0, text("a")), streaming=StreamingConfig(emit_metadata=True))
    assert events_of(run.log)[:4] == [
        AgentStarted("agent", "run", TIMESTAMP),
        Metadata("run_id", "run"),
        Metadata("streaming_mode", "direct"),
        TextDelta("a", STEP),
    ]


async def test_without_a_reader_the_whole_answer_is_in_the_log_too(autojump_clock: MockClock) -> None:
    run = Run("run", spec_for(ScriptedProvider((1, text("a")), (2, text("b")))))
    await run.execute()
    assert_ended_once(run)
    assert done_of(run).response == "ab"
    assert TextDelta("ab", STEP) in events_of(run.log)


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "content_filter"])
async def test_why_the_model_stopped_is_told(autojump_clock: MockClock, reason: FinishReason) -> None:
    run = await finished((1, text("a")), (2, [FinishPiece(reason)]))
    assert done_of(run).finish_reason == reason


async def test_a_model_that_breaks_off_with_an_error_is_no_answer(autojump_clock: MockClock) -> None:
    run = await finished((1, text("a")), (2, [FinishPiece("error")]))
    assert error_of(run).code == "upstream.server"
    assert error_of(run).response == "a"
    assert not any(isinstance(event, StepComplete) for event in events_of(run.log))


# Times


async def test_times_are_exact_to_the_millisecond_and_below(autojump_clock: MockClock) -> None:
    await trio.sleep(100)
    seen: list[tuple[float | None, float]] = []
    run = Run("run", spec_for(ScriptedProvider((0.125, [SENT]), (2.5, reasoning("hm")), (31.0009765625, ()))))

    async def look() -> None:
        for _ in range(3):
            await trio.sleep(1.5)
            seen.append((run.ttfb, run.elapsed))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await run_read_by_one(run)
    assert seen == [(None, 1.5), (2.5, 3.0), (2.5, 4.5)]
    await trio.sleep(50)
    assert (run.ttfb, run.elapsed) == (2.5, 31.0009765625)
    assert (done_of(run).ttfb_ms, done_of(run).elapsed_ms) == (2500.0, 31000.977)


# Usage


async def test_without_a_report_usage_is_estimated_and_says_so(autojump_clock: MockClock) -> None:
    run = await finished((1, text("12345")), (2, text("日本")))
    assert done_of(run).usage == Usage(2, 4, estimated=True)
    assert not any(isinstance(event, UsageUpdate) for event in events_of(run.log))


async def test_reasoning_counts_in_the_estimate(autojump_clock: MockClock) -> None:
    run = await finished((1, reasoning("1234", "5678")), (2, text("1234")))
    assert done_of(run).usage == Usage(2, 3, reasoning_tokens=2, estimated=True)


async def test_a_later_report_replaces_an_earlier_one(autojump_clock: MockClock) -> None:
    run = await finished((1, [UsagePiece(10, 1)]), (2, text("a")), (3, [UsagePiece(10, 20, cached_tokens=4)]))
    reports = [event.usage for event in events_of(run.log) if isinstance(event, UsageUpdate)]
    assert reports == [Usage(10, 1), Usage(10, 20, cached_tokens=4)]
    assert done_of(run).usage == run.usage == Usage(10, 20, cached_tokens=4)


async def test_a_report_that_says_the_same_again_is_no_event(autojump_clock: MockClock) -> None:
    run = await finished((1, [UsagePiece(10, 1)]), (2, [*text("a"), UsagePiece(10, 1)]), (3, [UsagePiece(10, 2)]))
    reports = [event.usage for event in events_of(run.log) if isinstance(event, UsageUpdate)]
    assert reports == [Usage(10, 1), Usage(10, 2)]


async def test_before_anything_was_said_there_is_no_usage(autojump_clock: MockClock) -> None:
    run = await finished((1, ProviderError("upstream.auth", "no")))
    assert error_of(run).usage is None


async def test_what_a_vendor_refuses_costs_nothing_and_what_breaks_off_costs_what_was_sent(
    autojump_clock: MockClock,
) -> None:
    refused = await finished((0, [SENT]), (1, ProviderError("upstream.rate_limit", "no")))
    assert error_of(refused).usage is None
    cut = await finished((0, [SENT]), (1, ProviderError("upstream.connection", "gone")))
    assert error_of(cut).usage == Usage(2, 0, estimated=True)


async def test_an_error_keeps_the_usage_so_far(autojump_clock: MockClock) -> None:
    run = await finished((1, text("1234")), (2, ProviderError("upstream.server", "no")))
    assert error_of(run).usage == Usage(2, 1, estimated=True)


@pytest.mark.parametrize("reported", [True, False])
async def test_usage_names_who_answered_where_there_were_several(autojump_clock: MockClock, reported: bool) -> None:
    pieces: list[Piece] = [AnsweredByPiece("vendor", "large"), TextPiece("1234")]
    pieces += [UsagePiece(2, 1)] if reported else []
    run = await finished((1, pieces))
    assert done_of(run).usage == Usage(2, 1, estimated=not reported, provider="vendor", model="large")


async def test_what_a_vendor_wants_back_is_no_event(autojump_clock: MockClock) -> None:
    run = await finished((1, [ContinuationPiece({"opaque": 1}), TextPiece("a")]))
    assert [type(event) for event in events_of(run.log)] == [AgentStarted, TextDelta, StepComplete, GenerationComplete]


# Failures


@pytest.mark.parametrize("code", sorted(PROVIDER_ERROR_CODES))
async def test_a_failure_of_the_model_ends_the_run_with_its_code(autojump_clock: MockClock, code: Any) -> None:
    error = ProviderError(code, "the vendor's words", retry_after=2.5)
    run = await finished((1, text("par")), (1.5, text("tial")), (2, error))
    assert events_of(run.log)[1:] == [
        TextDelta("par", STEP),
        TextDelta("tial", STEP),
        Error(code, "the vendor's words", "partial", Usage(2, 2, estimated=True), 2.5),
    ]
    assert run.elapsed == 2.0


async def test_a_failure_before_the_first_token(autojump_clock: MockClock) -> None:
    run = await finished((1, ProviderError("upstream.connection", "refused")))
    assert run.log.terminal == Error("upstream.connection", "refused")
    assert run.ttfb is None


@pytest.mark.parametrize("message", ["\ud83d broken", "日本", "a\nb", ""], ids=ascii)
async def test_a_vendors_message_of_any_characters_is_told(autojump_clock: MockClock, message: str) -> None:
    run = await finished((1, ProviderError("upstream.server", message)))
    assert run.log.terminal == Error("upstream.server", message.replace("\ud83d", "?"))


async def test_text_of_the_read_that_failed_stays_said(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        emit([SENT, TextPiece("last words")])
        raise ProviderError("upstream.truncated", "no end mark")

    run = Run("run", spec_for(ProgrammedProvider(answer)))
    await run_read_by_one(run)
    assert_ended_once(run)
    assert error_of(run).response == "last words"


@pytest.mark.parametrize("said", [[], [TextPiece("a")], [ReasoningPiece("a")]], ids=["nothing", "text", "reasoning"])
async def test_a_tool_call_without_tools_breaks_the_protocol(autojump_clock: MockClock, said: list[Piece]) -> None:
    observer = WritingObserver()
    run = await finished((1, [*said, ToolCallPiece(0, "call", "tool"), TextPiece("late")]), observer=observer)
    assert error_of(run).code == "upstream.protocol"
    assert error_of(run).response == ("a" if said == [TextPiece("a")] else "")
    assert observer.story == ["started", *["first token" for _ in said], "error"]
    assert run.ttfb == (1.0 if said else None)


# The output limit


async def test_too_much_output_ends_the_run_and_the_model(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider(*[(float(second), text("0123456789" * 10)) for second in range(1, 100)])
    run = Run("run", spec_for(provider, max_run_bytes=1000))
    await run_read_by_one(run)
    assert_ended_once(run)
    assert error_of(run).code == "output_limit"
    assert run.elapsed == provider.seen[-1][0] < 10
    assert provider.seen[-1][1] == "cancelled"
    said = "".join(event.content for event in events_of(run.log) if isinstance(event, TextDelta))
    assert error_of(run).response == said == "0123456789" * 10 * (len(events_of(run.log)) - 2)
    assert run.log.size_bytes - len(run.log.entries()[-1].frame) <= 1000 + 100


async def test_usage_reports_without_end_meet_the_limit_too(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider(*[(second / 8, [UsagePiece(1, second)]) for second in range(1, 80)])
    run = Run("run", spec_for(provider, max_run_bytes=2000))
    await run_read_by_one(run)
    assert_ended_once(run)
    assert error_of(run).code == "output_limit"
    assert run.log.size_bytes < 2500


async def test_the_limit_holds_whatever_a_provider_makes_of_exceptions(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        async def read() -> None:
            try:
                emit([SENT, *text("a" * 2000)])
            except Exception as error:
                raise ProviderError("upstream.protocol", "not understood") from error

        async with trio.open_nursery() as nursery:  # noqa: ASYNC112 - the group that it makes is the point
            nursery.start_soon(read)

    observer = WritingObserver()
    run = Run("run", spec_for(ProgrammedProvider(answer), max_run_bytes=1000), observer)
    await run_read_by_one(run)
    assert_ended_once(run)
    assert error_of(run).code == "output_limit"
    assert observer.bugs == []


# Bugs


async def test_a_bug_ends_the_run_and_is_told_to_the_operator_alone(autojump_clock: MockClock) -> None:
    observer = WritingObserver()
    run = await finished((1, text("a")), (2, BUG), observer=observer)
    assert run.log.terminal == Error("internal", "internal error", "a", Usage(2, 1, estimated=True))
    assert observer.seen == [(0.0, "started"), (1.0, "first token"), (2.0, "crashed"), (2.0, "error")]
    (bugs,) = observer.bugs
    assert isinstance(bugs, ExceptionGroup)
    assert bugs.exceptions == (BUG,)
    assert b"secret" not in b"".join(entry.frame for entry in run.log.entries())


@pytest.mark.parametrize(
    "group",
    [ExceptionGroup("", [BUG, ValueError()]), ExceptionGroup("", [ExceptionGroup("", [BUG])])],
    ids=["two", "nested"],
)
async def test_a_group_of_bugs_is_a_bug(autojump_clock: MockClock, group: Exception) -> None:
    observer = WritingObserver()
    run = await finished((1, group), observer=observer)
    assert error_of(run).code == "internal"
    assert observer.story == ["started", "crashed", "error"]


async def test_an_exception_that_is_none_of_ours_passes_after_the_terminal_event(autojump_clock: MockClock) -> None:
    class DoomError(BaseException):
        pass

    observer = WritingObserver()
    run = Run("run", spec_for(ScriptedProvider((1, text("a")), (2, DoomError()))), observer)
    with pytest.raises(DoomError):
        await run.execute()
    assert_ended_once(run)
    assert error_of(run).code == "interrupted"
    assert observer.story == ["started", "first token", "error"]


async def test_a_report_that_cannot_be_told_is_a_bug_and_the_run_still_ends(autojump_clock: MockClock) -> None:
    observer = WritingObserver()
    wrong: Any = object()
    run = await finished((1, text("a")), (2, [UsagePiece(wrong, 1)]), observer=observer)
    assert run.log.terminal == Error("internal", "internal error", "a", Usage(2, 1, estimated=True))
    assert observer.story == ["started", "first token", "crashed", "error"]


@pytest.mark.parametrize("turning_point", ["run_started", "run_first_token", "run_ended", "run_crashed"])
@pytest.mark.parametrize("last", [(3.0, ()), (3.0, BUG), (3.0, ProviderError("upstream.server", "no"))])
async def test_an_observer_that_raises_changes_no_run(
    autojump_clock: MockClock, turning_point: str, last: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    script: list[Line] = [(1.0, text("a")), last]
    undisturbed = await finished(*script)

    def broken(*_: object) -> None:
        raise RuntimeError("the observer is broken")

    observer = WritingObserver()
    monkeypatch.setattr(observer, turning_point, broken)
    run = await finished(*script, observer=observer)
    assert events_of(run.log) == events_of(undisturbed.log)


# Observers


async def test_an_observer_hears_in_order_when_the_events_are_in_the_log(autojump_clock: MockClock) -> None:
    seen: list[object] = []

    class Looking(WritingObserver):
        def run_started(self, run: Run) -> None:
            seen.append((trio.current_time(), events_of(run.log)))

        def run_first_token(self, run: Run) -> None:
            seen.append((trio.current_time(), run.ttfb))

        def run_ended(self, run: Run) -> None:
            seen.append((trio.current_time(), run.log.terminal))

    run = await finished((1, text("")), (2, text("a")), (3, text("b")), observer=Looking())
    assert seen == [(0.0, [AgentStarted("agent", "run", TIMESTAMP)]), (2.0, 2.0), (3.0, run.log.terminal)]


# What is left


async def test_nothing_is_left_of_a_run(autojump_clock: MockClock) -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    for last in ((2.0, ()), (2.0, BUG), (2.0, ProviderError("upstream.server", "no")), SILENCE):
        await finished((1.0, text("a")), last)
        assert trio.lowlevel.current_statistics().tasks_living == before


@pytest.mark.parametrize("grace", [-1.0, float("nan")])
def test_a_grace_that_makes_no_sense_is_refused(grace: float) -> None:
    with pytest.raises(ValueError, match="resume_grace"):
        spec_for(ScriptedProvider(), resume_grace=grace)


async def test_a_run_takes_its_whole_conversation_to_the_model(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider()
    request = ModelRequest((Message("system", "be"), Message("user", "1234"), Message("assistant", "日本")), "model")
    run = Run("run", RunSpec(agent_id="agent", provider=provider, request=request))
    await run.execute()
    assert provider.requests == [request]
    assert run.log.terminal != AgentStopped("disconnect", "", None)
