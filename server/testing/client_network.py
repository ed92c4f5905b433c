"""The network between a client of the test's and Lumos: how slow it is, and when it breaks."""

from __future__ import annotations

import msgspec
import trio

from .memory_connection import MemoryConnection
from .memory_network import MemoryNetwork


class ClientNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """A client's network; made by ``faults``.

    Attributes:
        latency: seconds for each direction.
        window: bytes that may be under way unread; None leaves the network's.
        cut_after: bytes of the server's after which the connection ends; None never.
        reset: whether it ends by an RST.
    """

    latency: float = 0.0
    window: int | None = None
    cut_after: int | None = None
    reset: bool = False


class ClientLine:
    """How one client connects, and all the connections that it made."""

    def __init__(self, network: MemoryNetwork, quality: ClientNetwork | None = None) -> None:
        self.network = network
        self._quality = quality or ClientNetwork()
        self.connections: list[MemoryConnection] = []

    async def connect(self, host: str, port: int, tls: bool) -> trio.abc.Stream:
        """A ``providers.network.Connect``; connecting takes a round trip."""
        quality = self._quality
        await trio.sleep(2 * quality.latency)
        stream = await self.network.connect(host, port, tls)
        connection = stream.connection
        self.connections.append(connection)
        for direction in (connection.to_server, connection.to_client):
            direction.latency = quality.latency or direction.latency
            direction.window = quality.window or direction.window
        if quality.cut_after is not None:
            connection.server.cut_after(quality.cut_after, reset=quality.reset)
        return stream

    def cut(self, *, reset: bool = False) -> None:
        """End what is open, in the middle: neither side can send any more."""
        for connection in self.connections:
            if connection.is_open:
                connection.cut(reset=reset)
