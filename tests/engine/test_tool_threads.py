"""Threads of sync tools: hung ones stop nobody else (trap T1)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from engine.function_tool import FunctionTool, tool
from engine.tool_threads import ToolThreads
from engine.tools import ToolContext, ToolResult

from .tool_contexts import make_context


async def call(tool: FunctionTool, arguments: str = "") -> ToolResult:
    return await tool.call(arguments, make_context())


async def test_a_sync_function_runs_in_a_thread_of_the_tools_own() -> None:
    threads = ToolThreads()

    @tool(run_sync=threads.run)
    def where(context: ToolContext) -> list[Any]:
        default = trio.from_thread.run_sync(trio.to_thread.current_default_thread_limiter).borrowed_tokens
        return [threading.current_thread() is threading.main_thread(), default]

    assert await call(where) == ToolResult([False, 0])
    assert threads.limiter().borrowed_tokens == 0
    assert threads.abandoned == 0


async def test_an_exception_in_the_thread_passes() -> None:
    @tool
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await call(fail)


class HangingTool:
    """A sync tool whose calls hang until they are let go, and that tells how many have begun."""

    def __init__(self, threads: ToolThreads) -> None:
        self.release = threading.Event()
        self._begun = threading.Semaphore(0)

        @tool(run_sync=threads.run)
        def hang() -> str:
            self._begun.release()
            self.release.wait(50)
            return "late"

        self.tool = hang

    async def begin(self, nursery: trio.Nursery, calls: int) -> None:
        for _ in range(calls):
            nursery.start_soon(call, self.tool)
        for _ in range(calls):
            await trio.to_thread.run_sync(self._begun.acquire)


async def all_threads_ended(threads: ToolThreads) -> None:
    """Returns when every place of the limiter is free: a place is given back when its thread has ended."""
    limiter = threads.limiter()
    for place in range(int(limiter.total_tokens)):
        await limiter.acquire_on_behalf_of(place)
    for place in range(int(limiter.total_tokens)):
        limiter.release_on_behalf_of(place)


async def test_t1_forty_hung_tool_threads_stop_nobody_else() -> None:
    threads = ToolThreads()
    hanging = HangingTool(threads)
    async with trio.open_nursery() as nursery:
        await hanging.begin(nursery, 40)
        nursery.cancel_scope.cancel()
    try:
        assert threads.abandoned == 40
        assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
        assert await trio.socket.getaddrinfo("localhost", 80)
        assert await trio.Path(__file__).exists()
        refused = await call(hanging.tool)
        assert refused.failed
        assert refused.value.startswith("not called: 40 earlier calls of tools that ran out of time are still running")
    finally:
        hanging.release.set()
    await all_threads_ended(threads)
    assert threads.abandoned == 0
    assert await call(hanging.tool) == ToolResult("late")


async def test_below_the_ceiling_there_is_a_thread_for_the_next_call() -> None:
    threads = ToolThreads(threads=3, max_abandoned=2)
    hanging = HangingTool(threads)

    @tool(run_sync=threads.run)
    def quick() -> int:
        return 1

    async with trio.open_nursery() as nursery:
        await hanging.begin(nursery, 1)
        nursery.cancel_scope.cancel()
    assert await call(quick) == ToolResult(1)
    async with trio.open_nursery() as nursery:
        await hanging.begin(nursery, 1)
        nursery.cancel_scope.cancel()
    assert (await call(quick)).failed
    hanging.release.set()
    await all_threads_ended(threads)
    assert await call(quick) == ToolResult(1)


async def test_a_call_that_is_cancelled_before_its_thread_begins_is_never_made() -> None:
    threads = ToolThreads(threads=2, max_abandoned=1)
    hanging = HangingTool(threads)
    made: list[int] = []

    @tool(run_sync=threads.run)
    def note() -> None:
        made.append(1)

    async with trio.open_nursery() as nursery:
        await hanging.begin(nursery, 2)
        with trio.CancelScope() as impatient:
            impatient.cancel()
            await call(note)
        assert impatient.cancelled_caught
        hanging.release.set()
    await all_threads_ended(threads)
    assert (made, threads.abandoned) == ([], 0)


async def test_a_thread_that_begins_after_its_call_was_cancelled_makes_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = ToolThreads()
    made: list[int] = []
    late: list[Callable[[], object]] = []

    async def begin_late(function: Callable[..., object], *arguments: object, **_: object) -> None:
        late.append(partial(function, *arguments))
        await trio.sleep_forever()

    monkeypatch.setattr(trio.to_thread, "run_sync", begin_late)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(threads.run, lambda: made.append(1))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    for begin in late:
        begin()
    assert (len(late), made, threads.abandoned) == (1, [], 0)


def test_threads_that_outlive_their_trio_run_are_counted_on_and_hold_no_place_in_the_next() -> None:
    threads = ToolThreads(threads=2, max_abandoned=1)
    hanging = HangingTool(threads)

    async def abandon() -> None:
        async with trio.open_nursery() as nursery:
            await hanging.begin(nursery, 1)
            nursery.cancel_scope.cancel()

    async def look() -> tuple[bool, int]:
        return (await call(hanging.tool)).failed, threads.limiter().borrowed_tokens

    trio.run(abandon)
    assert trio.run(look) == (True, 0)
    hanging.release.set()


def test_limits_that_could_starve_are_refused() -> None:
    with pytest.raises(ValueError, match="less than threads"):
        ToolThreads(threads=4, max_abandoned=4)
