"""An in-memory network on which real servers and clients run in virtual time: no file descriptor, no task of its own.

Where its connections are simpler than TCP's, ``memory_connection`` says.
"""

from __future__ import annotations

import errno
import itertools
from collections import deque
from collections.abc import Callable
from typing import Literal

import trio

from .memory_connection import Address, MemoryConnection, MemoryStream, OneTask


class MemoryListener(trio.abc.Listener[MemoryStream]):
    """Accepts the connections to one address, without a limit to those that wait; its owner closes it."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.closed = False
        self._waiting: deque[MemoryStream] = deque()
        self._changed = trio.lowlevel.ParkingLot()
        self._accepting = OneTask()

    def deliver(self, server_end: MemoryStream) -> None:
        """Queue a new connection; for the network."""
        self._waiting.append(server_end)
        self._changed.unpark_all()

    async def accept(self) -> MemoryStream:
        """Wait for a connection and return the server's end, the caller's to close; raises as ``trio.abc`` says."""
        with self._accepting:
            await trio.lowlevel.checkpoint()
            while not self._waiting:
                if self.closed:
                    raise trio.ClosedResourceError("this listener was closed")
                await self._changed.park()
            return self._waiting.popleft()

    def close(self) -> None:
        """Refuse connections from now on and, as a kernel does, reset those that were never accepted."""
        self.closed = True
        while self._waiting:
            server_end = self._waiting.popleft()
            server_end.reset()
            server_end.close()
        self._changed.unpark_all()

    async def aclose(self) -> None:
        """Close it as ``close`` does; it is closed also when this is cancelled."""
        self.close()
        await trio.lowlevel.checkpoint()


class MemoryNetwork:
    """Listeners by address, the connections made to them, and faults; any number of hops.

    ``connections`` holds every connection ever made, oldest first. ``on_connect`` may be set, and gets each new one
    before either end can use it: to cut it, or to set windows and latencies. Addresses match exactly.
    """

    def __init__(self, window: int = 65_536, latency: float = 0.0) -> None:
        if window < 1 or latency < 0:
            raise ValueError("window must be >= 1 and latency >= 0")
        self.window = window
        self.latency = latency
        self.connections: list[MemoryConnection] = []
        self.on_connect: Callable[[MemoryConnection], object] = lambda _: None
        self._listeners: dict[Address, MemoryListener] = {}
        self._faults: dict[Address, Literal["refuse", "black hole"]] = {}
        self._client_ports = itertools.count(1024)

    def listen(self, host: str, port: int) -> MemoryListener:
        """Return a listener on this address; ``OSError`` (EADDRINUSE) while another one is open there."""
        earlier = self._listeners.get((host, port))
        if earlier is not None and not earlier.closed:
            raise OSError(errno.EADDRINUSE, f"{host}:{port} is in use")
        listener = self._listeners[host, port] = MemoryListener((host, port))
        return listener

    def drop_listener(self, host: str, port: int) -> None:
        """Close the listener on this address, if there is one: its process has died."""
        listener = self._listeners.get((host, port))
        if listener is not None and not listener.closed:
            listener.close()

    async def connect(self, host: str, port: int, tls: bool = False, *, client_host: str = "127.0.0.1") -> MemoryStream:
        """Connect, which takes one round trip, and return the client's end, which the caller closes.

        Raises ``ConnectionRefusedError`` where nobody listens; waits for ever in a black hole.
        """
        await trio.sleep(2 * self.latency)
        address = (host, port)
        if self._faults.get(address) == "black hole":
            await trio.sleep_forever()
        listener = self._listeners.get(address)
        if listener is None or listener.closed or address in self._faults:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens on {host}:{port}")
        client = (client_host, next(self._client_ports))
        connection = MemoryConnection(client, address, tls=tls, window=self.window, latency=self.latency)
        self.on_connect(connection)
        self.connections.append(connection)
        listener.deliver(connection.server)
        return connection.client

    def open_connections(self, host: str | None = None) -> list[MemoryConnection]:
        """Return the connections (to ``host``, if given) of which at least one end was not closed by its owner."""
        return [c for c in self.connections if c.is_open and host in (None, c.server.socket.local[0])]

    def refuse(self, host: str, port: int) -> None:
        """Refuse new connections to this address even if somebody listens, until ``restore``."""
        self._faults[host, port] = "refuse"

    def black_hole(self, host: str, port: int) -> None:
        """Never answer new connections to this address, until ``restore``; those that wait then go on waiting."""
        self._faults[host, port] = "black hole"

    def restore(self, host: str, port: int) -> None:
        """Undo ``refuse`` and ``black_hole``."""
        self._faults.pop((host, port), None)
