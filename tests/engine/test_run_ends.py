"""What ends a run from outside: a stop, readers gone, a cancelled surrounding. And who wins when two things end it."""

from __future__ import annotations

from math import inf

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from engine import (
    AgentStarted,
    AgentStopped,
    Deadlines,
    Emit,
    Error,
    FinishPiece,
    GenerationComplete,
    ProviderError,
    Run,
    StreamingConfig,
    TextDelta,
    TextPiece,
    Usage,
    UsagePiece,
)
from engine.trace import CANCELLED, InMemoryTraces

from .scripted import (
    FOREVER,
    SENT,
    Line,
    ProgrammedProvider,
    ScriptedProvider,
    WritingObserver,
    assert_ended_once,
    events_of,
    read_timed,
    spec_for,
    text,
)

SILENCE: Line = (FOREVER, ())
STEP = "step-1"
ANSWER: list[Line] = [(1, [SENT]), (2, text("a")), (20, text("b")), (40, ())]


async def stopped_at(
    at: float, *script: Line, streaming: StreamingConfig | None = None
) -> tuple[Run, ScriptedProvider]:
    """A run of the script with a reader, stopped at that time."""
    provider = ScriptedProvider(*script)
    run = Run("run", spec_for(provider, streaming=streaming))
    with run.log.attached():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.execute)
            await trio.sleep(at)
            assert run.stop() is True
            assert run.log.ended, "the terminal event is there when stop returns"
    assert trio.current_time() == at
    assert_ended_once(run)
    return run, provider


# Stop


async def test_a_stop_before_the_first_token(autojump_clock: MockClock) -> None:
    run, provider = await stopped_at(1.5, (1, [SENT]), SILENCE)
    assert run.log.terminal == AgentStopped("requested", "", Usage(2, 0, estimated=True))
    assert provider.seen == [(0.0, "asked"), (1.5, "cancelled")]


async def test_a_stop_before_the_connection_stands(autojump_clock: MockClock) -> None:
    run, provider = await stopped_at(1.5, SILENCE)
    assert run.log.terminal == AgentStopped("requested", "", None)
    assert provider.seen == [(0.0, "asked"), (1.5, "cancelled")]


async def test_a_stop_mid_stream_keeps_text_and_usage(autojump_clock: MockClock) -> None:
    run, provider = await stopped_at(2.5, (1, text("1234")), (2, text("5678")), (3, text("never")))
    assert events_of(run.log)[-1] == AgentStopped("requested", "12345678", Usage(2, 2, estimated=True))
    assert provider.seen[-1] == (2.5, "cancelled")


async def test_a_stop_keeps_the_vendors_usage(autojump_clock: MockClock) -> None:
    run, _ = await stopped_at(2.5, (1, [*text("1234"), UsagePiece(7, 8)]), SILENCE)
    assert run.log.terminal == AgentStopped("requested", "1234", Usage(7, 8))


async def test_a_stop_seals_what_has_gathered(autojump_clock: MockClock) -> None:
    streaming = StreamingConfig(text_buffer_size=1000, flush_after=10)
    run, _ = await stopped_at(2.5, (1, text("said ")), (2, text("and kept")), SILENCE, streaming=streaming)
    assert TextDelta("said and kept", STEP) in events_of(run.log)


async def test_a_second_stop_does_nothing(autojump_clock: MockClock) -> None:
    observer = WritingObserver()
    run = Run("run", spec_for(ScriptedProvider((1, [SENT]), SILENCE)), observer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        await trio.sleep(2)
        assert run.stop("first") is True
        assert run.stop("second") is False
        assert run.fail("draining", "third") is False
        await trio.sleep(1)
        assert run.stop("fourth") is False
    assert_ended_once(run)
    assert run.log.terminal == AgentStopped("first", "", Usage(2, 0, estimated=True))
    assert observer.story == ["started", "stop"]


async def test_a_stop_after_the_end_does_nothing(autojump_clock: MockClock) -> None:
    run = Run("run", spec_for(ScriptedProvider((1, text("a")))))
    await run.execute()
    before = run.log.entries()
    assert run.stop() is False
    assert run.fail("internal", "late") is False
    assert run.log.entries() == before
    assert isinstance(run.log.terminal, GenerationComplete)


@pytest.mark.parametrize("how", ["stop", "fail"])
async def test_a_run_that_is_ended_before_its_first_step_asks_no_model(autojump_clock: MockClock, how: str) -> None:
    provider, observer = ScriptedProvider((1, text("a"))), WritingObserver()
    run = Run("run", spec_for(provider), observer)
    assert (run.stop() if how == "stop" else run.fail("draining", "bye")) is True
    assert_ended_once(run)
    await run.execute()
    assert_ended_once(run)
    assert [type(event) for event in events_of(run.log)] == [AgentStarted, AgentStopped if how == "stop" else Error]
    assert provider.seen == []
    assert observer.story == ["started", "stop" if how == "stop" else "error"]


@pytest.mark.parametrize("reason", ["\ud83d", "日本", ""], ids=ascii)
async def test_a_stop_for_any_reason_stops(autojump_clock: MockClock, reason: str) -> None:
    run = Run("run", spec_for(ScriptedProvider(SILENCE)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        await trio.sleep(1)
        assert run.stop(reason) is True
    assert_ended_once(run)
    assert run.log.terminal == AgentStopped(reason.replace("\ud83d", "?"), "", None)


async def test_a_stop_wins_over_a_completion_that_comes_later(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        emit(text("a"))
        with trio.CancelScope(shield=True):
            await trio.sleep(5)
            emit([*text("late"), UsagePiece(1, 1), FinishPiece("stop")])

    observer = WritingObserver()
    run = Run("run", spec_for(ProgrammedProvider(answer)), observer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        await trio.sleep(2)
        run.stop()
    assert trio.current_time() == 5.0
    assert_ended_once(run)
    assert run.log.terminal == AgentStopped("requested", "a", Usage(2, 1, estimated=True))
    assert run.usage == Usage(2, 1, estimated=True)
    assert observer.seen == [(0.0, "started"), (0.0, "first token"), (2.0, "stop")]
    assert run.elapsed == 2.0


@pytest.mark.parametrize("late", [ProviderError("upstream.connection", "broke"), FinishPiece("error")])
async def test_a_stop_wins_over_a_failure_that_comes_later(
    autojump_clock: MockClock, late: ProviderError | FinishPiece
) -> None:
    async def answer(emit: Emit) -> None:
        try:
            await trio.sleep_forever()
        finally:
            if isinstance(late, ProviderError):
                raise late
            emit([late])

    run = Run("run", spec_for(ProgrammedProvider(answer)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        await trio.sleep(2)
        run.stop()
    assert_ended_once(run)
    assert run.log.terminal == AgentStopped("requested", "", None)


async def test_a_bug_in_the_cleanup_of_a_stopped_model_is_told_and_changes_nothing(autojump_clock: MockClock) -> None:
    bug = ValueError("in cleanup")

    async def answer(emit: Emit) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise bug

    observer = WritingObserver()
    run = Run("run", spec_for(ProgrammedProvider(answer)), observer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        await trio.sleep(2)
        run.stop()
    assert_ended_once(run)
    assert run.log.terminal == AgentStopped("requested", "", None)
    assert observer.story == ["started", "stop", "crashed"]
    assert isinstance(observer.bugs[0], ExceptionGroup)
    assert observer.bugs[0].exceptions == (bug,)


async def test_a_stop_in_the_cleanup_of_a_deadline_comes_first(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(2, shield=True):
                await trio.sleep_forever()

    run = Run("run", spec_for(ProgrammedProvider(answer), deadlines=Deadlines(total=3.0)))
    with run.log.attached():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.execute)
            await trio.sleep(4)
            assert run.stop() is True
    assert trio.current_time() == 5.0
    assert_ended_once(run)
    assert run.log.terminal == AgentStopped("requested", "", None)


# Readers gone


@pytest.mark.parametrize(("grace", "ends_at"), [(0.0, 5.0), (5.0, 5.0), (4.0, 5.0), (7.5, 7.5)])
async def test_a_run_waits_so_long_for_its_first_reader(
    autojump_clock: MockClock, grace: float, ends_at: float
) -> None:
    provider = ScriptedProvider(*ANSWER)
    run = Run("run", spec_for(provider, resume_grace=grace))
    await run.execute()
    assert trio.current_time() == run.elapsed == ends_at
    assert_ended_once(run)
    assert run.log.terminal == AgentStopped("disconnect", "a", Usage(2, 1, estimated=True))
    assert provider.seen[-1] == (ends_at, "cancelled")


async def test_a_run_that_is_to_continue_needs_no_reader(autojump_clock: MockClock) -> None:
    run = Run("run", spec_for(ScriptedProvider(*ANSWER), resume_grace=inf))
    await run.execute()
    assert trio.current_time() == 40.0
    assert isinstance(run.log.terminal, GenerationComplete)


async def test_a_first_reader_at_the_last_moment_saves_the_run(autojump_clock: MockClock) -> None:
    run = Run("run", spec_for(ScriptedProvider(*ANSWER), resume_grace=0.0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        await trio.sleep(4.875)
        events = await read_timed(run.log)
    assert trio.current_time() == 40.0
    assert isinstance(events[-1][1], GenerationComplete)


async def watch_between(run: Run, start: float, end: float) -> None:
    await trio.sleep_until(start)
    with run.log.attached():
        await trio.sleep_until(end)


async def execute_watched(run: Run, *visits: tuple[float, float]) -> None:
    """Execute the run with readers that are there between these times."""
    async with trio.open_nursery() as nursery:
        for start, end in visits:
            nursery.start_soon(watch_between, run, start, end)
        await wait_all_tasks_blocked()
        nursery.start_soon(run.execute)
    assert_ended_once(run)


@pytest.mark.parametrize(
    ("grace", "visits", "ends_at"),
    [
        (0.0, [(0, 3)], 3.0),
        (5.0, [(0, 3)], 8.0),
        (0.5, [(0, 3)], 3.5),
        (5.0, [(0, 3), (7.875, 12)], 17.0),
        (5.0, [(0, 3), (0, 6)], 11.0),
        (5.0, [(0, 3), (2, 6), (5, 7), (11, 12)], 17.0),
        (0.0, [(0, 3), (2, 6)], 6.0),
        (0.0, [(0.5, 1)], 1.0),
        (30.0, [(0, 3), (32.875, 33)], 40.0),
    ],
    ids=str,
)
async def test_the_grace_runs_from_the_last_reader(
    autojump_clock: MockClock, grace: float, visits: list[tuple[float, float]], ends_at: float
) -> None:
    provider = ScriptedProvider(*ANSWER)
    run = Run("run", spec_for(provider, resume_grace=grace))
    await execute_watched(run, *visits)
    assert run.elapsed == ends_at
    assert provider.seen[-1] == (ends_at, "answered" if ends_at == 40.0 else "cancelled")
    if ends_at < 40.0:
        assert isinstance(run.log.terminal, AgentStopped)
        assert run.log.terminal.reason == "disconnect"
    else:
        assert isinstance(run.log.terminal, GenerationComplete)


async def test_a_run_to_be_continued_survives_all_its_readers(autojump_clock: MockClock) -> None:
    run = Run("run", spec_for(ScriptedProvider(*ANSWER), resume_grace=inf))
    await execute_watched(run, (0, 3), (10, 11))
    assert run.elapsed == 40.0


async def test_readers_of_an_ended_run_come_and_go(autojump_clock: MockClock) -> None:
    run = Run("run", spec_for(ScriptedProvider((1, text("a")))))
    await run.execute()
    first, second = await read_timed(run.log), await read_timed(run.log)
    assert first == second
    assert [event for _, event in first] == events_of(run.log)
    await trio.sleep(100)
    assert_ended_once(run)


async def test_a_reader_who_comes_after_the_cancelling_gets_the_stop(autojump_clock: MockClock) -> None:
    run = Run("run", spec_for(ScriptedProvider(*ANSWER), resume_grace=0.0))
    await execute_watched(run, (0, 3))
    assert [event for _, event in await read_timed(run.log, after=2)] == [run.log.terminal]


# The surrounding


async def test_a_cancelled_surrounding_interrupts_the_run(autojump_clock: MockClock) -> None:
    provider, observer = ScriptedProvider(*ANSWER), WritingObserver()
    run = Run("run", spec_for(provider), observer)
    with trio.move_on_after(3) as scope:
        await run.execute()
    assert scope.cancelled_caught
    assert_ended_once(run)
    assert run.log.terminal == Error("interrupted", "the server ended the run", "a", Usage(2, 1, estimated=True))
    assert provider.seen[-1] == (3.0, "cancelled")
    assert observer.story == ["started", "first token", "error"]


async def test_a_run_in_a_surrounding_that_is_cancelled_already(autojump_clock: MockClock) -> None:
    run = Run("run", spec_for(ScriptedProvider(*ANSWER)))
    with trio.CancelScope() as scope:
        scope.cancel()
        await run.execute()
    assert_ended_once(run)
    assert run.log.terminal == Error("interrupted", "the server ended the run")


async def test_a_bug_in_the_cleanup_of_an_interrupted_run_does_not_stop_the_cancelling(
    autojump_clock: MockClock,
) -> None:
    async def answer(emit: Emit) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("in cleanup")

    observer = WritingObserver()
    run = Run("run", spec_for(ProgrammedProvider(answer)), observer)
    with trio.move_on_after(3):
        await run.execute()
    assert_ended_once(run)
    assert isinstance(run.log.terminal, Error)
    assert observer.story == ["started", "crashed", "error"]


async def test_an_answer_that_was_complete_stays_one_when_the_surrounding_is_cancelled(
    autojump_clock: MockClock,
) -> None:
    run = Run("run", spec_for(ScriptedProvider((1, text("a")))))
    with trio.move_on_after(1.5):
        with run.log.attached():
            await run.execute()
        await trio.sleep_forever()
    assert_ended_once(run)
    assert isinstance(run.log.terminal, GenerationComplete)


async def test_what_a_model_still_says_after_the_end_is_in_no_trace(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        emit([SENT, TextPiece("a")])
        try:
            await trio.sleep_forever()
        finally:
            emit([TextPiece("b"), UsagePiece(7, 7), FinishPiece("stop")])

    traces = InMemoryTraces()
    run = Run("run", spec_for(ProgrammedProvider(answer), trace=traces))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        await trio.sleep(1)
        run.stop()
    (model,) = [span for span in traces.trace("run") if span.kind == "model"]
    assert model.error == CANCELLED
    assert model.attributes["output_tokens"] == 1, "an estimate of what was said before"
    assert "finish_reason" not in model.attributes
