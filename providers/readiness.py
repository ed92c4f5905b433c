"""One task waits for all sockets that others want to read from, and tells them: a token wakes no task of its own."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TypeAlias

import trio

Call: TypeAlias = Callable[[], None]
"""Synchronous, and must not raise."""


class Readiness:
    """Sockets that are watched, in an epoll set of their own; that is itself a descriptor, which ``run`` waits for.

    Attributes:
        ended: whether ``run`` has: nobody is told any more.
    """

    def __init__(self, epoll: select.epoll) -> None:
        """``epoll`` is the caller's, and outlives ``run``."""
        self._epoll = epoll
        self._watched: dict[int, tuple[Call, Call | None]] = {}
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
        """Tell them, until cancelled."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self._epoll)
                self._tell()
        finally:
            self.ended = True
            for descriptor, (_, on_end) in list(self._watched.items()):
                self.forget(descriptor)
                if on_end is not None:
                    on_end()

    def _tell(self) -> None:
        """Tell who is ready, and who becomes so meanwhile: for them that costs no pass. Each once: others wait."""
        told: set[int] = set()
        while ready := [descriptor for descriptor, _ in self._epoll.poll(0) if descriptor not in told]:
            for descriptor in ready:
                if (calls := self._watched.get(descriptor)) is not None:  # one told before may have closed it
                    calls[0]()
            told.update(ready)


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
