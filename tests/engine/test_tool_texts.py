"""``docs/tools.md`` shows the texts that models see, as the code writes them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import trio
from msgspec import Meta
from trio.testing import MockClock

from engine import Deadlines, FinishPiece, Run, ToolCallPiece, ToolUse
from engine.function_tool import tool
from engine.tool_threads import MAX_ABANDONED, ToolThreads
from engine.tools import MAX_RESULT_BYTES

from .fake_guests import FakeTool, takes
from .loop_scene import lasting, outcomes_of
from .scripted import FOREVER, Line, StepwiseProvider, calling, saying
from .tool_contexts import make_context

PAGE = (Path(__file__).parents[2] / "docs" / "tools.md").read_text()
ROWS = {
    cells[1].strip(): cells[2].strip().strip("`").strip()
    for line in PAGE.partition("## What the model sees when it goes wrong")[2].splitlines()
    if len(cells := line.split("|")) == 4
}


def shown(what: str) -> str:
    """The text in the table's row for that."""
    (text,) = (text for row, text in ROWS.items() if row.startswith(what))
    return text


async def refusals(*scripts: list[Line], **use: Any) -> list[object]:
    """What the calls of a run were answered, those that failed."""
    hangs = FakeTool("hangs", takes(FOREVER))
    quick = FakeTool("quick", takes(0))
    run = Run("run", lasting(StepwiseProvider(*scripts), tool_use=ToolUse(tools=(hangs, quick), **use)))
    await run.execute()
    return [result for _, status, result in outcomes_of(run) if status == "Error"]


@pytest.mark.parametrize("use", [{"max_tool_calls": 0}, {"max_steps": 1}], ids=str)
async def test_a_call_too_many(autojump_clock: MockClock, use: dict[str, int]) -> None:
    assert await refusals(calling("a quick"), **use) == [shown("more calls than `max_tool_calls`")]


async def test_a_filtered_call(autojump_clock: MockClock) -> None:
    filtered: list[Line] = [(0, [ToolCallPiece(0, "a", "quick"), FinishPiece("content_filter")])]
    assert await refusals(filtered) == [shown("a call in an answer that the vendor's filter cut off")]


async def test_an_unknown_tool(autojump_clock: MockClock) -> None:
    assert await refusals(calling("a x"), saying("y")) == [shown("no such tool").replace("…", "hangs, quick")]


async def test_the_deadline(autojump_clock: MockClock) -> None:
    assert await refusals(calling("a hangs"), saying("y")) == [shown("the tool's deadline")]
    assert f"`deadlines.tool`, {Deadlines().tool:g} s" in PAGE


async def test_bad_arguments() -> None:
    @tool
    async def convert(amount: Annotated[float, Meta(ge=0)], to: Literal["CHF", "EUR"] = "EUR") -> None:
        """Converts.

        Args:
            amount: how many dollars.
            to: the currency to convert to.
        """

    result = await convert.call('{"amount": "10", "to": "CHF"}', make_context())
    assert result.value == shown("bad arguments")


async def test_too_many_hung_threads() -> None:
    release, begun = threading.Event(), threading.Semaphore(0)
    threads = ToolThreads()

    @tool(run_sync=threads.run)
    def hang() -> None:
        begun.release()
        release.wait(50)

    try:
        async with trio.open_nursery() as nursery:
            for _ in range(MAX_ABANDONED):
                nursery.start_soon(hang.call, "", make_context())
            for _ in range(MAX_ABANDONED):
                await trio.to_thread.run_sync(begun.acquire)
            nursery.cancel_scope.cancel()
        assert (await hang.call("", make_context())).value == shown("too many hung threads")
    finally:
        release.set()


def test_the_sizes() -> None:
    assert f"more than {MAX_RESULT_BYTES // 1024} KiB" in PAGE
    assert f"When {MAX_ABANDONED} such threads" in " ".join(PAGE.split())
