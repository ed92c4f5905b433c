"""What is shown of an answer, and Ctrl-C's scope, on the virtual clock."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from engine import AgentStarted, AgentStopped, Error, Event, GenerationComplete, ReasoningDelta, TextDelta, Usage
from server.terminal import StreamSummary, interruptible, show_answer, show_summary

STARTED = AgentStarted("a", "r", "2026-11-22T00:00:00+00:00")
COUNTED = Usage(7, 30)
DONE = GenerationComplete("Hello.", 1, 0, None, COUNTED)
FAILED = Error("timeout.idle", "no token from the model for 30 s", "Hel", Usage(7, 1, estimated=True))
STOPPED = AgentStopped("requested", "Hel", None)


@asynccontextmanager
async def a_second_apart(events: Sequence[Event]) -> AsyncIterator[AsyncIterator[Event]]:
    async def each_in_time() -> AsyncIterator[Event]:
        for event in events:
            await trio.sleep(1)
            yield event

    yield each_in_time()


async def test_the_summary_has_the_first_token_and_the_end(autojump_clock: MockClock) -> None:
    events: list[Event] = [STARTED, TextDelta("Hel", "s"), TextDelta("lo.", "s"), DONE]
    summary = await show_answer(a_second_apart(events))
    assert summary == StreamSummary("Hello.", COUNTED, ttfb=2.0, elapsed=4.0, ending=DONE)
    assert not summary.failed
    assert summary.line() == "TTFB 2.000 s · 30 tokens · 15.0 tokens/s · 4.00 s"


async def test_a_thought_is_the_first_token_and_not_of_the_answer(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = await show_answer(a_second_apart([STARTED, ReasoningDelta("Hm.", "s"), TextDelta("Hello.", "s"), DONE]))
    assert (summary.ttfb, summary.response) == (2.0, "Hello.")
    assert capsys.readouterr() == ("Hello.\n", "Hm.\n\n")


@pytest.mark.parametrize(
    ("deltas", "printed"), [((), ""), (("Hi",), "Hi\n"), (("Hi\n",), "Hi\n"), (("a\n", "\nb"), "a\n\nb\n")]
)
async def test_the_answer_ends_in_one_line_end(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str], deltas: tuple[str, ...], printed: str
) -> None:
    await show_answer(a_second_apart([STARTED, *(TextDelta(text, "s") for text in deltas), DONE]))
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("ending", "shown"),
    [
        (DONE, "TTFB 2.000 s · 30 tokens · 30.0 tokens/s · 3.00 s\n"),
        (
            FAILED,
            "error timeout.idle: no token from the model for 30 s\nTTFB 2.000 s · ~1 tokens · 1.0 tokens/s · 3.00 s\n",
        ),
        (STOPPED, "stopped: requested\nTTFB 2.000 s · ~1 tokens · 1.0 tokens/s · 3.00 s\n"),
    ],
)
async def test_the_end_is_told_on_stderr(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str], ending: Event, shown: str
) -> None:
    show_summary(await show_answer(a_second_apart([STARTED, TextDelta("Hel", "s"), ending])))
    assert capsys.readouterr() == ("Hel\n", shown)


async def test_no_token_and_no_rate(autojump_clock: MockClock) -> None:
    nothing = await show_answer(a_second_apart([STARTED, DONE]))
    assert nothing.line() == "no token · 2.00 s"
    burst = StreamSummary("Hello.", COUNTED, ttfb=2.0, elapsed=2.05, ending=DONE)
    assert burst.line() == "TTFB 2.000 s · 30 tokens · 2.05 s"


async def test_ctrl_c_leaves_the_run(autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(press_ctrl_c, 2.5)
        summary = await show_answer(a_second_apart([STARTED, TextDelta("Hel", "s"), TextDelta("lo.", "s"), DONE]))
    assert summary == StreamSummary("Hel", None, ttfb=2.0, elapsed=2.5, ending=None)
    assert summary.interrupted
    assert summary.failed
    show_summary(summary)
    assert capsys.readouterr() == ("Hel\n", "stopped\nTTFB 2.000 s · ~1 tokens · 2.0 tokens/s · 2.50 s\n")


async def press_ctrl_c(after: float) -> None:
    await trio.sleep(after)
    os.kill(os.getpid(), signal.SIGINT)
    await trio.lowlevel.checkpoint()


async def test_ctrl_c_before_there_is_a_connection(autojump_clock: MockClock) -> None:
    @asynccontextmanager
    async def connect_for_an_hour() -> AsyncIterator[AsyncIterator[Event]]:
        await trio.sleep(3600)
        async with a_second_apart([DONE]) as events:
            yield events

    async with trio.open_nursery() as nursery:
        nursery.start_soon(press_ctrl_c, 1)
        summary = await show_answer(connect_for_an_hour())
    assert summary == StreamSummary("", None, None, 1.0, None)


async def test_ctrl_c_cancels_the_block_alone_and_is_itself_again_after_it(autojump_clock: MockClock) -> None:
    usual = signal.getsignal(signal.SIGINT)
    started_at = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(press_ctrl_c, 1)
        with interruptible():
            async with trio.open_nursery() as inner:
                inner.start_soon(trio.sleep_forever)
                inner.start_soon(trio.sleep_forever)
        assert trio.current_time() - started_at == 1
    assert signal.getsignal(signal.SIGINT) is usual


async def test_an_error_passes_through_the_block_unwrapped(autojump_clock: MockClock) -> None:
    with pytest.raises(RuntimeError, match=r"^as it is$"), interruptible():
        raise RuntimeError("as it is")
