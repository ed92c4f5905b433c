"""Who waits for a socket is told in trio's own loop, right after its wait: a token wakes no task.

A task that waits for the sockets and tells the others is a step of the loop's and two system calls more, each token.
"""

from __future__ import annotations

import logging
import select
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TypeAlias

import outcome
import trio

Call: TypeAlias = Callable[[], None]
"""Synchronous, and must not raise. It may be called outside of every task (no ``trio.lowlevel.current_task()``)."""

_logger = logging.getLogger(__name__)


class Readiness(trio.abc.Instrument):
    """Sockets that are watched, in an epoll set of their own.

    While ``run`` runs, that set is in trio's own: trio's wait ends with what comes, and calls ``after_io_wait``.
    Where trio's is not found (``_epoll_of_trio``), the task of ``run`` waits for it, and tells.

    Attributes:
        ended: whether ``run`` has: nobody is told any more.
    """

    def __init__(self, epoll: select.epoll) -> None:
        """``epoll`` is the caller's, and outlives ``run``."""
        self._epoll = epoll
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

    async def run(self) -> None:
        """Tell them, until cancelled. What a call raises, a bug, is raised here; after the cancelling, it is logged."""
        try:
            if (theirs := _epoll_of_trio()) is None:
                await self._tell_in_this_task()
            else:
                await self._tell_in_the_loop(theirs)
        finally:
            self.ended = True
            for descriptor, (_, on_end) in list(self._watched.items()):
                self.forget(descriptor)
                if on_end is not None:
                    on_end()

    async def _tell_in_this_task(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._epoll)
            self._tell()

    async def _tell_in_the_loop(self, theirs: select.epoll) -> None:
        self._task = trio.lowlevel.current_task()
        theirs.register(self._epoll, select.EPOLLIN)
        trio.lowlevel.add_instrument(self)
        try:
            await trio.lowlevel.wait_task_rescheduled(self._give_up)
        finally:
            theirs.unregister(self._epoll)
            trio.lowlevel.remove_instrument(self)

    def _give_up(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's
        """For trio: it has waited, and tasks have their turn after this."""
        try:
            self._tell()
        except BaseException as bug:  # noqa: ASYNC103 - raised in ``run``: trio would log it, and go on without
            task, self._task = self._task, None
            if task is None:  # it is being cancelled
                _logger.error("who was told of a socket has failed", exc_info=bug)
            else:
                trio.lowlevel.reschedule(task, outcome.Error(bug))

    def _tell(self) -> None:
        """Tell who is ready, each once: then others have their turn."""
        for descriptor, _ in self._epoll.poll(0):
            if (calls := self._watched.get(descriptor)) is not None:  # one told before may have closed it
                calls[0]()


def _epoll_of_trio() -> select.epoll | None:
    """What trio itself waits with, and keeps to itself; None if it is not as we know it (``EpollIOManager``, 0.35).

    There, a descriptor that no task waits for makes an empty entry, which is dropped. For who is in a task.
    """
    runner = getattr(trio.lowlevel.current_task(), "_runner", None)
    manager = getattr(runner, "io_manager", None)
    found = getattr(manager, "_epoll", None)
    makes_entries = isinstance(getattr(manager, "_registered", None), defaultdict)
    return found if makes_entries and isinstance(found, select.epoll) else None


_shared: trio.lowlevel.RunVar[Readiness | None] = trio.lowlevel.RunVar("shared readiness", None)


def shared_readiness() -> Readiness | None:
    """What is run for everybody now; None: who waits for a socket waits for it alone."""
    readiness = _shared.get()
    return None if readiness is None or readiness.ended else readiness


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
