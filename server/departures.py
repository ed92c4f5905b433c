"""Notices at once who leaves while being answered. One task watches all of them; each needs none of its own."""

from __future__ import annotations

import select
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, Protocol

import trio

from .sockets import SocketStream


class Client(Protocol):
    """Whom to watch."""

    stream: Any

    def stirred(self) -> None:
        """There is something to read from it, or its end. Synchronous; must not raise."""
        ...


def open_epoll() -> AbstractContextManager[select.epoll | None]:
    """A set to watch sockets by, until the block ends; None where a system has none."""
    return closing(select.epoll()) if hasattr(select, "epoll") else nullcontext()


class Departures:
    """Clients that nobody reads from meanwhile. Each is told of once.

    The sockets are in an epoll set of their own, itself a descriptor that ``run`` waits for. A stream that is no socket
    (in memory) is watched by a task, as all are where a system has no epoll.
    """

    def __init__(self, epoll: select.epoll | None, nursery: trio.Nursery) -> None:
        """Both are the caller's: ``nursery`` is for those tasks, ``epoll`` (``open_epoll``) outlives who is watched."""
        self._epoll = epoll
        self._nursery = nursery
        self._sockets: dict[int, Client] = {}
        self._others: dict[Client, trio.CancelScope] = {}

    def watch(self, client: Client) -> None:
        """From now on, to ``forget``: call ``client.stirred`` once there is something to read."""
        if self._epoll is not None and isinstance(client.stream, SocketStream):
            descriptor = client.stream.socket.fileno()
            self._sockets[descriptor] = client
            self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLONESHOT)
        else:
            self._others[client] = trio.CancelScope()
            self._nursery.start_soon(self._wait, client, self._others[client])

    def forget(self, client: Client) -> None:
        """Of somebody who is not watched: nothing. Comes before the stream is closed."""
        if self._epoll is not None and isinstance(client.stream, SocketStream):
            descriptor = client.stream.socket.fileno()
            if self._sockets.pop(descriptor, None) is not None:
                self._epoll.unregister(descriptor)
        elif client in self._others:
            self._others.pop(client).cancel(reason="it was answered")

    async def run(self) -> None:
        """Tell clients of theirs, until cancelled."""
        while self._epoll is not None:
            await trio.lowlevel.wait_readable(self._epoll)
            for descriptor, _ in self._epoll.poll(0):
                self._sockets[descriptor].stirred()

    async def _wait(self, client: Client, scope: trio.CancelScope) -> None:
        with scope:
            await client.stream.wait_readable()
            if client in self._others:
                client.stirred()
