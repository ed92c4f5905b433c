"""What tools in threads say of the memory: told in order, dropped when it is too late, and never the server's end."""

from __future__ import annotations

import threading
from math import inf
from typing import Any

import pytest
import trio
import trio.testing

from engine import (
    Deadlines,
    Emit,
    Error,
    FinishPiece,
    MemoryUpdate,
    ModelRequest,
    Piece,
    Run,
    StreamingConfig,
    TextPiece,
    ToolCallComplete,
    UsagePiece,
)
from engine.function_tool import FunctionTool, tool
from engine.memory_news import MemoryNews
from engine.tool_threads import ToolThreads
from engine.tools import ToolContext

from .loop_scene import lasting
from .scripted import (
    ProgrammedProvider,
    StepwiseProvider,
    assert_ended_once,
    calling,
    events_of,
    run_read_by_one,
    saying,
)

LOUD = StreamingConfig(emit_memory_updates=True)


def run_of(provider: Any, *tools: FunctionTool, **settings: Any) -> Run:
    return Run("run", lasting(provider, tools=tools, streaming=LOUD, **settings))


def outcomes(run: Run) -> list[object]:
    """Updates, and the results of calls, in the order of the log."""
    kept = (MemoryUpdate, ToolCallComplete)
    return [
        event.key if isinstance(event, MemoryUpdate) else event.result
        for event in events_of(run.log)
        if isinstance(event, kept)
    ]


async def test_a_sync_tool_tells_of_the_memory_while_a_reader_waits() -> None:
    @tool
    def note(context: ToolContext) -> str:
        context.memory_updated("name", "Set")
        context.memory_updated("\ud800", "Delete")
        return "noted" if threading.current_thread() is not threading.main_thread() else "no thread"

    run = run_of(StepwiseProvider(calling("a note"), saying("x")), note)
    got = await run_read_by_one(run)
    assert outcomes(run) == ["name", "?", "noted"], "the result comes after what the tool said"
    assert [event for _, event in got] == events_of(run.log)
    assert run.memory_updates == 2
    assert_ended_once(run)


async def test_many_threads_at_once() -> None:
    @tool
    def note(who: str, context: ToolContext) -> str:
        for number in range(50):
            context.memory_updated(f"{who}{number}", "Set")
        return who

    calls = [f'{who} note {{"who":"{who}"}}' for who in "abcd"]
    run = run_of(StepwiseProvider(calling(*calls), saying("x")), note)
    await run_read_by_one(run)
    told = outcomes(run)
    for who in "abcd":
        assert [what for what in told if str(what)[0] == who] == [*(f"{who}{number}" for number in range(50)), who]
    assert run.memory_updates == 200
    assert_ended_once(run)


async def test_out_of_a_thread_of_trios_it_is_told_at_once() -> None:
    @tool
    def note(context: ToolContext) -> str:
        trio.from_thread.run_sync(context.memory_updated, "name", "Set")
        return "noted"

    run = run_of(StepwiseProvider(calling("a note"), saying("x")), note)
    await run_read_by_one(run)
    assert outcomes(run) == ["name", "noted"]


class LateTool:
    """A sync tool that says something of the memory when it is let, whoever has given up on it by then."""

    def __init__(self) -> None:
        self.release, self.said = threading.Event(), threading.Event()
        self.contexts: list[ToolContext] = []

        @tool(run_sync=ToolThreads().run)
        def late(context: ToolContext) -> str:
            self.contexts.append(context)
            self.release.wait(50)
            context.memory_updated("late", "Set")
            self.said.set()
            return "late"

        self.tool = late

    async def let(self) -> None:
        self.release.set()
        await trio.to_thread.run_sync(self.said.wait, 50)
        await trio.testing.wait_all_tasks_blocked()


async def test_a_thread_that_was_given_up_on_tells_a_run_that_goes_on() -> None:
    late = LateTool()

    class WaitsForIt(StepwiseProvider):
        async def stream(self, request: ModelRequest, emit: Emit) -> None:
            if self.requests:
                await late.let()
            await super().stream(request, emit)

    run = run_of(WaitsForIt(calling("a late"), saying("x")), late.tool, deadlines=Deadlines(tool=0.05))
    await run_read_by_one(run)
    assert outcomes(run) == ["timed out after 0.05 s", "late"]
    assert_ended_once(run)


async def test_and_a_run_that_has_ended_not_at_all() -> None:
    late = LateTool()
    run = run_of(StepwiseProvider(calling("a late"), saying("x")), late.tool, deadlines=Deadlines(tool=0.05))
    await run_read_by_one(run)
    await late.let()
    late.contexts[0].memory_updated("here", "Set")
    assert outcomes(run) == ["timed out after 0.05 s"]
    assert run.memory_updates == 0
    assert_ended_once(run)


def test_when_trio_itself_is_over_nothing_happens() -> None:
    late = LateTool()

    async def main() -> None:
        await run_read_by_one(
            run_of(StepwiseProvider(calling("a late"), saying("x")), late.tool, deadlines=Deadlines(tool=0.05))
        )

    trio.run(main)
    late.release.set()
    assert late.said.wait(50), "the late call raised"
    late.contexts[0].memory_updated("later", "Set")


@pytest.mark.parametrize(("key", "operation"), [(5, "Set"), ("name", "Nonsense"), ("name", 1j)], ids=repr)
@pytest.mark.parametrize("in_thread", [True, False])
async def test_what_is_no_change_is_the_tools_failure(key: Any, operation: Any, in_thread: bool) -> None:
    def note(context: ToolContext) -> str:
        context.memory_updated(key, operation)
        return "noted"

    async def note_here(context: ToolContext) -> str:
        return note(context)

    made = tool(note) if in_thread else tool(name="note")(note_here)
    run = run_of(StepwiseProvider(calling("a note"), saying("x")), made)
    await run_read_by_one(run)
    (result,) = outcomes(run)
    assert str(result).startswith(("TypeError: a memory key is text", "ValueError: the operation is one of Set, "))
    assert_ended_once(run)


async def test_a_bug_in_the_telling_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def tell(key: str, operation: str) -> None:
        raise OSError(key)

    news = MemoryNews(tell)
    await trio.to_thread.run_sync(news.pass_on, "name", "Set")
    assert "could not be told" in caplog.text


async def test_a_log_that_is_full_ends_the_run_and_nothing_else() -> None:
    @tool
    def note(context: ToolContext) -> str:
        for _ in range(1000):
            context.memory_updated("x" * 100, "Set")
        return "noted"

    run = run_of(StepwiseProvider(calling("a note"), saying("x")), note, max_run_bytes=20_000)
    await run_read_by_one(run)
    assert isinstance(run.log.terminal, Error)
    assert run.log.terminal.code == "output_limit"


@pytest.mark.parametrize("piece", [FinishPiece("stop"), UsagePiece(1, 1), TextPiece("x")], ids=["end", "usage", "text"])
async def test_a_model_that_speaks_in_a_thread_ends_its_run_and_nothing_else(piece: Piece) -> None:
    async def answer(emit: Emit) -> None:
        await trio.to_thread.run_sync(emit, [piece])

    run = Run("run", lasting(ProgrammedProvider(answer), resume_grace=inf))
    await run_read_by_one(run)
    assert isinstance(run.log.terminal, Error)
    assert run.log.terminal.code == "internal"
    assert run.log.last_seq == 2, "nothing is said"
    assert_ended_once(run)
