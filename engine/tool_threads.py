"""Threads for tools that are not async: their own, so that hung tools never starve DNS look-ups and file access.

A thread cannot be cancelled, only given up on; it then runs on until its function returns, and meanwhile holds a place
of its limiter. With trio's default limiter, 40 such threads would stop every other user of threads in the process.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import trio

from .tools import ToolError

T = TypeVar("T")

RunSync: TypeAlias = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Calls a function that may block and gives what it returns, or raises what it raises."""

MAX_THREADS = 64
MAX_ABANDONED = 32


class TooManyAbandonedError(ToolError):
    """Too many threads that were given up on are still running, so no further one is started."""


class ToolThreads:
    """Runs functions in threads that are given up on when their caller is cancelled.

    Args:
        threads: of them at once, those given up on included; further calls wait.
        max_abandoned: threads given up on and still running from which on calls are refused. Less than ``threads``,
            so that there is always one left for a call that is not refused.
    """

    def __init__(self, *, threads: int = MAX_THREADS, max_abandoned: int = MAX_ABANDONED) -> None:
        if not 1 <= max_abandoned < threads:
            raise ValueError("max_abandoned is at least 1 and less than threads")
        self._threads = threads
        self._max_abandoned = max_abandoned
        self._abandoned = 0
        self._lock = threading.Lock()
        # Of each trio.run its own: a place held by a thread that outlives its run would never be given back.
        self._limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("tool threads")

    @property
    def abandoned(self) -> int:
        """Threads that were given up on and still run."""
        return self._abandoned

    def limiter(self) -> trio.CapacityLimiter:
        """The limiter of the current ``trio.run``."""
        try:
            return self._limiter.get()
        except LookupError:
            limiter = trio.CapacityLimiter(self._threads)
            self._limiter.set(limiter)
            return limiter

    async def run(self, function: Callable[[], T]) -> T:
        """Call it in a thread. A call that is cancelled before its thread has begun is never made.

        Raises:
            TooManyAbandonedError: too many threads that were given up on are still running.
        """
        if self._abandoned >= self._max_abandoned:
            raise TooManyAbandonedError(
                f"not called: {self._abandoned} earlier calls of tools that ran out of time are still running; "
                "try again later"
            )
        call = _ThreadCall(function)
        try:
            return await trio.to_thread.run_sync(
                self._run_here, call, abandon_on_cancel=True, limiter=self.limiter(), thread_name="lumos tool"
            )
        except trio.Cancelled:
            self._give_up(call)
            raise

    def _run_here(self, call: _ThreadCall) -> Any:
        with self._lock:
            if call.given_up:
                return None
            call.running = True
        try:
            return call.function()
        finally:
            with self._lock:
                call.running = False
                self._abandoned -= call.given_up

    def _give_up(self, call: _ThreadCall) -> None:
        with self._lock:
            call.given_up = True
            self._abandoned += call.running


class _ThreadCall:
    """What the caller's side and the thread's side know of each other; both are read and written under the lock."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.running = False
        self.given_up = False


async def run_inline(function: Callable[[], T]) -> T:
    """Call it right here, for tests on a virtual clock, which worker threads would upset."""
    await trio.lowlevel.checkpoint()
    return function()


TOOL_THREADS = ToolThreads()
"""Those of the process: threads are the process's, whoever starts them."""
