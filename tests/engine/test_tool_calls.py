"""One tool call: whatever the tool does becomes a bounded result."""

from __future__ import annotations

from math import inf
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from engine import (
    GenerationComplete,
    MemoryRefusedError,
    Run,
    ToolCall,
    ToolCallComplete,
    ToolCallPiece,
    ToolContext,
    ToolError,
    ToolResult,
    ToolUse,
)
from engine.emitter import MAX_DEPTH
from engine.guests import describe, tamed
from engine.tool_calls import bounded

from .fake_guests import Conduct, FakeTool, fails, takes
from .loop_scene import run_with
from .scripted import (
    StepwiseProvider,
    assert_ended_once,
    calling,
    events_of,
    saying,
    spec_for,
)

STEP = "step-1"


async def result_of(conduct: Conduct, **use: int) -> ToolCallComplete:
    """What the one call of a run gave, which goes on after it."""
    provider = StepwiseProvider(calling("a t"), saying("x"))
    tool_use = ToolUse(tools=(FakeTool("t", conduct),), **use)
    run = Run("run", spec_for(provider, tool_use=tool_use, resume_grace=inf))
    await run.execute()
    assert isinstance(run.log.terminal, GenerationComplete), run.log.terminal
    (complete,) = [event for event in events_of(run.log) if isinstance(event, ToolCallComplete)]
    return complete


# What a tool does


class Unprintable(Exception):  # noqa: N818 - it is what it says
    def __str__(self) -> str:
        raise ValueError


def stray_cancelled() -> BaseException:
    """A ``Cancelled`` that belongs to a scope that has ended: another task's, say, that shares a connection."""
    caught: list[BaseException] = []

    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled as cancelled:
                caught.append(cancelled)
                raise

    trio.run(main)
    return caught[0]


STRAY = stray_cancelled()


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (ToolError("no such city"), "no such city"),
        (MemoryRefusedError("too long"), "too long"),
        (ValueError("bad"), "ValueError: bad"),
        (KeyError(), "KeyError"),
        (Unprintable(), "Unprintable"),
        (ValueError("half \ud83d"), "ValueError: half ?"),
        (SystemExit(2), "SystemExit: 2"),
        (GeneratorExit(), "GeneratorExit"),
        (ExceptionGroup("two", [ToolError("first"), ValueError("second")]), "first"),
        (ExceptionGroup("deep", [ExceptionGroup("er", [OSError("gone")])]), "OSError: gone"),
        (BaseExceptionGroup("mixed", [STRAY, ToolError("the reason")]), "the reason"),
        (BaseExceptionGroup("mixed", [STRAY, BaseExceptionGroup("er", [STRAY, OSError("x")])]), "OSError: x"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
async def test_whatever_a_tool_raises_is_a_failed_result(
    autojump_clock: MockClock, failure: BaseException, told: str
) -> None:
    assert await result_of(fails(failure, 1)) == ToolCallComplete("a", "Error", told, STEP)


@pytest.mark.parametrize("failure", [STRAY, BaseExceptionGroup("alone", [STRAY])], ids=["alone", "in a group"])
async def test_a_cancelled_that_is_not_the_runs_is_a_failed_result(
    autojump_clock: MockClock, failure: BaseException
) -> None:
    complete = await result_of(fails(failure, 1))
    assert complete.status == "Error"
    assert complete.result.startswith("Cancelled")


async def test_a_group_raised_in_the_cancellation_is_no_result(autojump_clock: MockClock) -> None:
    async def conduct(_: str, __: ToolContext) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            raise BaseExceptionGroup("cleanup", [cancelled, ValueError("broke")]) from None  # noqa: ASYNC104 - the point

    run = Run("run", spec_for(StepwiseProvider(calling("a t")), tools=[FakeTool("t", conduct)], resume_grace=inf))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        await trio.sleep(2)
        run.stop()
    assert trio.current_time() == 2.0
    assert_ended_once(run)
    assert await result_of(conduct) == ToolCallComplete("a", "Error", "timed out after 30 s", STEP)


async def test_a_tool_that_gives_no_result_is_broken(autojump_clock: MockClock) -> None:
    class Broken(FakeTool):
        async def call(self, arguments: str, context: ToolContext) -> ToolResult:
            return "bare"  # type: ignore[return-value]  # what it should not do

    run, _ = await run_with(Broken("t", takes(0)), [ToolCallPiece(0, "a", "t")])
    (complete,) = [event for event in events_of(run.log) if isinstance(event, ToolCallComplete)]
    assert complete.result == "the tool is broken: it gave no ToolResult but str"


async def test_a_failed_result_is_marked(autojump_clock: MockClock) -> None:
    complete = await result_of(takes(1, ToolResult({"why": 1}, failed=True)))
    assert (complete.status, complete.result) == ("Error", {"why": 1})


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("text", "text"),
        ("", ""),
        ({"a": [1, None, 2.5]}, {"a": [1, None, 2.5]}),
        (None, None),
        ("half \ud83d", "half ?"),
        (b"\x00\xff", "AP8="),
        ({1: (2, 3)}, {"1": [2, 3]}),
        (nested(MAX_DEPTH), nested(MAX_DEPTH)),
        (nested(MAX_DEPTH + 1), "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)),
    ],
    ids=lambda value: repr(value)[:20],
)
async def test_a_result_is_shown_as_it_is(autojump_clock: MockClock, value: object, shown: object) -> None:
    assert await result_of(takes(1, ToolResult(value))) == ToolCallComplete("a", "Success", shown, STEP)


@pytest.mark.parametrize(
    "value",
    [1j, {"a": 1j}, ENDLESS, {"a": "\ud800"}, msgspec.Raw(b"{")],
    ids=["no JSON type", "one inside", "endless", "half an emoji", "broken JSON"],
)
async def test_a_result_that_is_no_json_says_so(autojump_clock: MockClock, value: object) -> None:
    complete = await result_of(takes(1, ToolResult(value)))
    assert complete.status == "Error"
    assert complete.result.startswith("the result is no JSON: ")


async def test_the_deepest_of_results_ends_no_run(autojump_clock: MockClock) -> None:
    for depth in (200, 400, 800, 950, 990):
        complete = await result_of(takes(0, ToolResult(nested(depth))))
        assert isinstance(complete.result, str)


@pytest.mark.parametrize(
    ("value", "kept"),
    [("x" * 11, "x" * 10), ("日本語語", "日本語"), ({"abcdefgh": 1}, '{"abcdefgh'), ("👋👋👋", "👋👋")],
    ids=str,
)
async def test_a_long_result_is_cut_on_a_code_point_and_says_so(
    autojump_clock: MockClock, value: object, kept: str
) -> None:
    complete = await result_of(takes(1, ToolResult(value)), max_result_bytes=10)
    size = len(value.encode()) if isinstance(value, str) else len(msgspec.json.encode(value))
    assert complete == ToolCallComplete(
        "a", "Success", f"{kept}\n[cut: the result has {size} bytes, 10 are shown]", STEP
    )


def test_a_result_that_just_fits_is_whole() -> None:
    assert bounded(ToolResult("x" * 10), 10).value == "x" * 10
    assert bounded(ToolResult({"abcd": 1}), 10).value == {"abcd": 1}
    assert bounded(ToolResult({"abcd": 12}), 10).value == '{"abcd":12\n[cut: the result has 11 bytes, 10 are shown]'


async def test_bad_arguments_go_to_the_tool(autojump_clock: MockClock) -> None:
    tool = FakeTool("t", takes(0))
    cut = [ToolCallPiece(0, "a", "t"), ToolCallPiece(0, arguments_fragment='{"city": "Be')]
    run, provider = await run_with(tool, list(cut), finish="length")
    assert tool.seen[0] == (0.0, 'called {"city": "Be')
    assert provider.requests[1].messages[1].tool_calls == (ToolCall("a", "t", '{"city": "Be'),)
    assert isinstance(run.log.terminal, GenerationComplete)


async def test_tamed_passes_what_is_fine() -> None:
    async def gives() -> int:
        return 1

    async def interrupts() -> None:
        raise BaseExceptionGroup("", [KeyboardInterrupt()])

    assert await tamed(gives) == 1
    with pytest.RaisesGroup(KeyboardInterrupt):
        await tamed(interrupts)
    assert describe(ValueError("x" * 5000)) == f"ValueError: {'x' * (1000 - 12)}"
