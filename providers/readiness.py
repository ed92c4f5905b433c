"""Who waits for a socket is told in trio's own loop, while it waits: a token wakes no task, and is no pass of the loop.

A task that waits for the sockets and tells the others is a step of the loop's and two system calls more, each token.
What a worker thread has done is told there, too: by trio's own way a task wakes for it first.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from time import perf_counter
from typing import Any, TypeAlias

import outcome
import trio

Call: TypeAlias = Callable[[], None]
"""Synchronous, and must not raise. It may be called outside of every task (no ``trio.lowlevel.current_task()``)."""

_logger = logging.getLogger(__name__)


class Readiness:
    """Sockets that are watched, in an epoll set of their own.

    While ``run`` runs, trio waits for that set, in which its own is one of them, and who is ready is told in that wait
    (``_Waiting``). Where trio's is not found (``_runner_of_trio``), the task of ``run`` waits for it, and tells.

    Attributes:
        ended: whether ``run`` has: nobody is told any more.
    """

    def __init__(self, epoll: select.epoll) -> None:
        """``epoll`` is the caller's, and outlives ``run``."""
        self._epoll = epoll
        self._from_threads = _CallsFromThreads()
        self._watched: dict[int, tuple[Call, Call | None]] = {}
        self._task: trio.lowlevel.Task | None = None
        self.ended = False

    def watch(self, descriptor: int, on_readable: Call, on_end: Call | None = None, *, once: bool = False) -> None:
        """From now on, to ``forget``, call ``on_readable`` as long as there is something to read, the end or an error.

        That is ``once`` only, if so wanted. ``on_end`` is called when ``run`` ends; who comes later is not told of it.
        """
        if not self.ended:
            self._epoll.register(descriptor, select.EPOLLIN | (select.EPOLLONESHOT if once else 0))
            self._watched[descriptor] = on_readable, on_end

    def forget(self, descriptor: int) -> None:
        """Of one that is not watched: nothing. Comes before the descriptor is closed."""
        if self._watched.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def call_soon(self, call: Call) -> bool:
        """From another thread: have it called where who waits is told. False: ``run`` has ended, it never will be."""
        return self._from_threads.add(call)

    async def run(self) -> None:
        """Tell them, until cancelled. What a call raises, a bug, is raised here; after the cancelling, it is logged."""
        self.watch(self._from_threads.open(), self._from_threads.make)
        try:
            if (runner := _runner_of_trio()) is None:
                await self._tell_in_this_task()
            else:
                await self._tell_in_the_loop(runner)
        finally:
            self.ended = True
            for descriptor, (_, on_end) in list(self._watched.items()):
                self.forget(descriptor)
                if on_end is not None:
                    on_end()
            self._from_threads.close()

    async def _tell_in_this_task(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._epoll)
            self.tell(self._epoll.poll(0))

    async def _tell_in_the_loop(self, runner: Any) -> None:
        self._task = trio.lowlevel.current_task()
        manager = runner.io_manager
        waiting = _Waiting(runner, self._epoll.poll, self)
        self.watch(manager._epoll.fileno(), waiting.note_theirs)
        runner.io_manager = waiting
        try:
            await trio.lowlevel.wait_task_rescheduled(self._give_up)
        finally:
            runner.io_manager = manager
            self.forget(manager._epoll.fileno())

    def _give_up(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def tell(self, ready: Iterable[tuple[int, int]]) -> None:
        """Tell these descriptors (with their events) once: then others have their turn. Raises what calls raise."""
        for descriptor, _ in ready:
            if (calls := self._watched.get(descriptor)) is not None:  # one told before may have closed it
                calls[0]()

    def fail(self, bug: BaseException) -> None:
        """Let ``run`` raise it. For trio's loop, which would end with it."""
        task, self._task = self._task, None
        if task is None:  # it is being cancelled
            _logger.error("who was told of a socket has failed", exc_info=bug)
        else:
            trio.lowlevel.reschedule(task, outcome.Error(bug))


class _CallsFromThreads:
    """Calls that threads want made in the loop; a descriptor (eventfd(2)) is readable while there are any."""

    def __init__(self) -> None:
        self._calls: deque[Call] = deque()
        self._opening = threading.Lock()
        self._descriptor = -1

    def open(self) -> int:
        """From now on to ``close``, take calls; the descriptor."""
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return self._descriptor

    def add(self, call: Call) -> bool:
        """From any thread; False: it is not open."""
        with self._opening:
            if self._descriptor != -1:
                self._calls.append(call)
                os.eventfd_write(self._descriptor, 1)
            return self._descriptor != -1

    def make(self) -> None:
        """There are some: make them."""
        os.eventfd_read(self._descriptor)
        self._make_all()

    def close(self) -> None:
        """Take no more, and make those that wait. Comes after the descriptor is forgotten."""
        with self._opening:
            descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)
        self._make_all()

    def _make_all(self) -> None:
        while self._calls:
            self._calls.popleft()()


class _Waiting:
    """Stands in for trio's I/O manager: waits for our set, which trio's is in, and asks trio's only if that is ready.

    Trio's loop goes on where there is something for it: a socket or a thread that a task waits for, a task to run, a
    deadline. A token is none of these.
    """

    def __init__(self, runner: Any, poll: Callable[[float], list[tuple[int, int]]], readiness: Readiness) -> None:
        """``runner`` is trio's, as ``_runner_of_trio`` knows it; ``poll`` waits for our set."""
        self._runner = runner
        self._manager = runner.io_manager
        self._poll = poll
        self._readiness = readiness
        self._is_theirs = False

    def note_theirs(self) -> None:
        """Trio's set is ready."""
        self._is_theirs = True

    def get_events(self, timeout: float) -> bool:
        """For trio: false if that time, in seconds, is over and there was nothing at all."""
        runner, until = self._runner, perf_counter() + timeout
        first = runner.deadlines.next_deadline()
        while ready := self._poll(timeout):
            try:
                self._readiness.tell(ready)
            except BaseException as bug:  # noqa: ASYNC103, BLE001 - raised in ``Readiness.run``
                self._readiness.fail(bug)
            timeout = until - perf_counter()
            if self._is_theirs or runner.runq or timeout <= 0 or runner.deadlines.next_deadline() < first:
                return True
        return False

    def process_events(self, _: bool) -> None:
        """For trio: wake who waits for what there is in its set."""
        if self._is_theirs:
            self._is_theirs = False
            self._manager.process_events(self._manager.get_events(0))

    def __getattr__(self, name: str) -> Any:
        """All else is trio's: who waits for a socket in a task, what wakes its loop."""
        return getattr(self._manager, name)


def _runner_of_trio() -> Any | None:
    """What runs trio's loop. For who is in a task.

    None if it is not as we know it (0.35, on Linux, not as a guest), or another one tells in it already.
    """
    runner = getattr(trio.lowlevel.current_task(), "_runner", None)
    manager, deadlines = getattr(runner, "io_manager", None), getattr(runner, "deadlines", None)
    known = [(runner, "runq"), (deadlines, "next_deadline"), (manager, "get_events"), (manager, "process_events")]
    is_known = isinstance(getattr(manager, "_epoll", None), select.epoll) and all(hasattr(*one) for one in known)
    is_free = getattr(runner, "is_guest", None) is False and not isinstance(manager, _Waiting)
    return runner if is_known and is_free else None


_shared: trio.lowlevel.RunVar[Readiness | None] = trio.lowlevel.RunVar("shared readiness", None)


def shared_readiness() -> Readiness | None:
    """What is run for everybody now; None: who waits for a socket waits for it alone."""
    readiness = _shared.get()
    return None if readiness is None or readiness.ended else readiness


def caller_from_threads() -> Callable[[Call], None]:
    """What a thread that is started now has something called with in this loop; not if that has ended."""
    readiness, token = shared_readiness(), trio.lowlevel.current_trio_token()

    def call_soon(call: Call) -> None:
        if readiness is None or not readiness.call_soon(call):
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(call)

    return call_soon


@contextmanager
def share_readiness() -> Iterator[Readiness | None]:
    """In the block there is one for everybody, which its owner is to ``run``; None where a system has no epoll.

    The latest one counts.
    """
    if not hasattr(select, "epoll"):
        yield None
        return
    with closing(select.epoll()) as epoll:
        readiness = Readiness(epoll)
        before = _shared.set(readiness)
        try:
            yield readiness
        finally:
            if _shared.get() is readiness:
                _shared.reset(before)
