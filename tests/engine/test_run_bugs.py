"""Bugs that reach into a run's end: it still has a terminal event, and no other run hears of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import inf
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from engine import (
    AgentStopped,
    AnsweredByPiece,
    Error,
    FinishPiece,
    GenerationComplete,
    MemoryUse,
    Message,
    Piece,
    ProviderError,
    Run,
    RunSupervisor,
    TextPiece,
    Usage,
    UsagePiece,
)
from engine.agent_loop import AgentLoop
from engine.emitter import CLOSING_BYTES

from .fake_guests import FakeMemory
from .scripted import FOREVER, Line, ScriptedProvider, WritingObserver, assert_ended_once, spec_for, text

SILENCE: Line = (FOREVER, ())
WRONG: Any = "\ud800"
MANY: Any = "many"
"""What no annotation keeps a provider from sending: the first goes into no frame, the second into no sum."""

UNCOUNTABLE: Sequence[Piece] = [TextPiece("x"), UsagePiece(1, MANY)]


async def test_a_vendors_name_that_is_no_unicode_is_replaced(autojump_clock: MockClock) -> None:
    said: list[Piece] = [AnsweredByPiece("p\ud800", "m\ud800"), TextPiece("x"), UsagePiece(1, 1), FinishPiece("stop")]
    run = Run("run", spec_for(ScriptedProvider((1, said))))
    await run.execute()
    assert isinstance(run.log.terminal, GenerationComplete)
    assert run.log.terminal.usage == run.usage == Usage(1, 1, provider="p?", model="m?")


@pytest.mark.parametrize(
    "script",
    [
        [(1, UNCOUNTABLE)],
        [(1, UNCOUNTABLE), (2, ProviderError("upstream.server", "broke"))],
        [(1, UNCOUNTABLE), (2, ValueError("a bug"))],
        [(1, [*text("x"), FinishPiece(WRONG)])],
        [(1, text("x")), (2, ProviderError("upstream.server", "broke", retry_after=WRONG))],
    ],
    ids=["answered", "failed", "crashed", "finish reason", "retry after"],
)
async def test_an_end_that_cannot_be_told_becomes_an_internal_error(
    autojump_clock: MockClock, script: list[Line]
) -> None:
    observer = WritingObserver()
    run = Run("run", spec_for(ScriptedProvider(*script)), observer)
    await run.execute()
    assert_ended_once(run)
    assert run.log.terminal == Error("internal", "internal error", "x")
    assert (run.response, run.usage) == ("x", None)
    assert observer.story[-2:] == ["crashed", "error"]


async def test_a_bug_of_ours_in_the_keeping_of_a_whole_answer_does_not_cost_its_end(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(_: AgentLoop) -> tuple[Message, ...]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(AgentLoop, "said", break_down)
    memory, observer = FakeMemory(), WritingObserver()
    run = Run("run", spec_for(ScriptedProvider((1, text("x"))), memory_use=MemoryUse(memory=memory)), observer)
    await run.execute()
    assert_ended_once(run)
    assert isinstance(run.log.terminal, GenerationComplete)
    assert observer.story[-2:] == ["done", "crashed"]


@pytest.mark.parametrize("how", ["stop", "fail"])
async def test_a_stop_of_a_run_whose_usage_cannot_be_told(autojump_clock: MockClock, how: str) -> None:
    provider = ScriptedProvider((1, UNCOUNTABLE), SILENCE)
    run = Run("run", spec_for(provider))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        await trio.sleep(2)
        assert (run.stop() if how == "stop" else run.fail("draining", "bye")) is True
    assert_ended_once(run)
    assert provider.seen[-1] == (2.0, "cancelled")


async def test_one_run_that_cannot_end_itself_ends_no_other(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    execute = Run.execute

    async def execute_or_break(run: Run) -> None:
        await execute(run)
        if run.response == "bad":
            raise RuntimeError("beyond the last resort")

    monkeypatch.setattr(Run, "execute", execute_or_break)
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        bad = supervisor.start(spec_for(ScriptedProvider((1, text("bad")))))
        other = supervisor.start(spec_for(ScriptedProvider((1, text("good")), (3, text("!"))), resume_grace=inf))
    assert isinstance(other.log.terminal, GenerationComplete)
    assert other.response == "good!"
    (record,) = caplog.records
    assert (record.levelno, bad.id in record.getMessage()) == (logging.ERROR, True)
    assert record.exc_info is not None
    assert supervisor.active_runs == 0


async def test_a_run_that_cannot_end_itself_does_not_stop_the_cancelling(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def break_when_cancelled(_: Run) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            both = [cancelled, ValueError("a bug")]
            raise BaseExceptionGroup("both", both) from None  # noqa: ASYNC104 - the cancellation is in it

    monkeypatch.setattr(Run, "execute", break_when_cancelled)
    async with trio.open_nursery() as nursery:
        RunSupervisor(nursery).start(spec_for(ScriptedProvider(SILENCE)))
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert trio.current_time() == 1.0


async def test_of_an_ended_run_usage_and_response_are_the_terminal_events(autojump_clock: MockClock) -> None:
    run = Run("run", spec_for(ScriptedProvider((1, text("12345")), SILENCE)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        await trio.sleep(2)
        run.stop()
    assert isinstance(run.log.terminal, AgentStopped)
    assert run.usage is run.log.terminal.usage
    assert run.response is run.log.terminal.response


async def test_a_log_stays_within_its_bound_whatever_closes_it(autojump_clock: MockClock) -> None:
    long = "\x01" * 10**6
    said: list[Line] = [(1, [AnsweredByPiece(long, long), UsagePiece(1, 1)]), (2, text(*["\x01"] * 100_000)), SILENCE]
    limited = Run("run", spec_for(ScriptedProvider(*said), max_run_bytes=100_000))
    failed = Run("run", spec_for(ScriptedProvider(*said[:1], (2, ProviderError("upstream.server", long)))))
    await limited.execute()
    await failed.execute()
    stopped = Run("run", spec_for(ScriptedProvider()))
    stopped.stop(long)
    assert isinstance(limited.log.terminal, Error)
    assert limited.log.terminal.code == "output_limit"
    assert 180_000 < limited.log.size_bytes <= 2 * 100_000 + CLOSING_BYTES
    assert failed.log.size_bytes <= CLOSING_BYTES
    assert stopped.log.size_bytes <= CLOSING_BYTES
