"""Notices at once who leaves while being answered. All are watched in one place; none needs a task."""

from __future__ import annotations

from typing import Any, Protocol

import trio

from providers.readiness import Readiness

from .sockets import SocketStream


class Client(Protocol):
    """Whom to watch."""

    stream: Any

    def stirred(self) -> None:
        """There is something to read from it, or its end. Synchronous; must not raise."""
        ...


class Departures:
    """Clients that nobody reads from meanwhile. Each is told of once.

    A stream that is no socket (in memory) is watched by a task, as all are without ``readiness``.
    """

    def __init__(self, readiness: Readiness | None, nursery: trio.Nursery) -> None:
        """Both are the caller's: ``nursery`` is for those tasks."""
        self._readiness = readiness
        self._nursery = nursery
        self._others: dict[Client, trio.CancelScope] = {}

    def watch(self, client: Client) -> None:
        """From now on, to ``forget``: call ``client.stirred`` once there is something to read."""
        if self._readiness is not None and isinstance(client.stream, SocketStream):
            self._readiness.watch(client.stream.socket.fileno(), client.stirred, once=True)
        else:
            self._others[client] = trio.CancelScope()
            self._nursery.start_soon(self._wait, client, self._others[client])

    def forget(self, client: Client) -> None:
        """Of somebody who is not watched: nothing. Comes before the stream is closed."""
        if self._readiness is not None and isinstance(client.stream, SocketStream):
            self._readiness.forget(client.stream.socket.fileno())
        elif client in self._others:
            self._others.pop(client).cancel(reason="it was answered")

    async def _wait(self, client: Client, scope: trio.CancelScope) -> None:
        with scope:
            await client.stream.wait_readable()
            if client in self._others:
                client.stirred()
