"""Connections in memory: two ends, a direction each way, windows, latency and faults.

Where it is simpler than TCP, so that every test is exact:

* Only bytes, and the end behind them, take ``latency``. Freed window space, a reset and "the reader has gone" are known
  to the other side at once.
* A direction holds at most ``window`` unread bytes, those in flight included; there is no other buffer.
* Closing an end that has unread bytes sends no reset: the peer still reads all that was sent to it, then EOF.
"""

from __future__ import annotations

import operator
import socket
from collections import deque
from dataclasses import dataclass
from math import inf
from typing import TypeAlias

import trio

Address: TypeAlias = tuple[str, int]


class OneTask:
    """Refuses a second task inside it: trio's conflict rule, as its own streams keep it."""

    held = False

    def __enter__(self) -> None:
        if self.held:
            raise trio.BusyResourceError("another task is already using this")
        self.held = True

    def __exit__(self, *_: object) -> None:
        self.held = False


@dataclass(frozen=True)
class MemorySocket:
    """What servers read from ``stream.socket``: the address of this end, that of the other end, and their family."""

    local: Address
    peer: Address
    family: socket.AddressFamily = socket.AF_INET

    def getsockname(self) -> Address:
        """Return the address of this end."""
        return self.local

    def getpeername(self) -> Address:
        """Return the address of the other end."""
        return self.peer


class Direction:
    """One direction of a connection: the bytes under way and the end behind them.

    For tests: ``sent`` counts the bytes that were taken from the sender, ``unread`` those of them that are not read;
    ``window`` (bytes) and ``latency`` (seconds) may be set, best in ``MemoryNetwork.on_connect``. The rest is for the
    two streams: ``reader_gone`` makes sending an error, ``broken`` makes the end one; who waits is in ``changed``.
    """

    def __init__(self, window: int, latency: float) -> None:
        self.window = window
        self.latency = latency
        self.sent = self.unread = 0
        self.reader_gone = self.broken = False
        self.changed = trio.lowlevel.ParkingLot()
        self._in_flight: deque[tuple[float, bytes]] = deque()
        self._arrived = bytearray()
        self._ends_at = inf

    def put(self, data: memoryview) -> int:
        """Take as much of ``data`` as the window has room for and return how much that was."""
        count = min(len(data), max(0, self.window - self.unread))
        if count:
            self._in_flight.append((trio.current_time() + self.latency, bytes(data[:count])))
            self.sent += count
            self.unread += count
            self.changed.unpark_all()
        return count

    def take(self, max_bytes: int | None) -> bytes | None:
        """Return what has arrived, ``b""`` at the end, None before anything has; raise at the end of a broken one."""
        now = trio.current_time()
        while self._in_flight and self._in_flight[0][0] <= now:
            self._arrived += self._in_flight.popleft()[1]
        if self._arrived:
            data = bytes(self._arrived[:max_bytes])
            del self._arrived[:max_bytes]
            self.unread -= len(data)
            self.changed.unpark_all()
            return data
        if self.readable_at() > now:
            return None
        if self.broken:
            raise trio.BrokenResourceError("the connection was reset")
        return b""

    def readable_at(self) -> float:
        """The time from which ``take`` returns or raises something; infinite if nothing is under way."""
        if self._arrived:
            return -inf
        return self._in_flight[0][0] if self._in_flight else self._ends_at

    def end(self, *, broken: bool = False) -> None:
        """Put the end behind what is under way: EOF or, if ``broken``, an error. Only the first end counts."""
        if self._ends_at == inf:
            self._ends_at, self.broken = trio.current_time() + self.latency, broken
        self.changed.unpark_all()

    def lose_reader(self) -> None:
        """Drop what was not read and make sending an error."""
        self._in_flight.clear()
        self._arrived.clear()
        self.unread = 0
        self.reader_gone = True
        self.changed.unpark_all()

    def reset(self) -> None:
        """Make sending and receiving an error at once."""
        self._ends_at, self.broken = -inf, True
        self.lose_reader()

    async def wait_arrival(self) -> None:
        """Wait until ``take`` may have something to return; may be early."""
        with trio.CancelScope(deadline=self.readable_at()):
            await self.changed.park()


class MemoryStream(trio.abc.HalfCloseableStream):
    """One end of a connection; what each call may raise is what ``trio.abc`` says, also while it waits.

    A cancelled ``receive_some`` has taken nothing; a cancelled ``send_all`` has sent the first part of its data, how
    much ``Direction.sent`` tells. ``socket`` holds the addresses, ``connection`` is shared by both ends, ``closed_at``
    is the trio time at which the owner closed this end, None before.
    """

    def __init__(
        self, connection: MemoryConnection, sock: MemorySocket, *, incoming: Direction, outgoing: Direction
    ) -> None:
        self.connection = connection
        self.socket = sock
        self.closed_at: float | None = None
        self._incoming = incoming
        self._outgoing = outgoing
        self._eof_sent = self._cut_resets = False
        self._bytes_to_cut: int | None = None
        self._sending, self._receiving = OneTask(), OneTask()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send ``data``, waiting while the peer has a whole window unread."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            rest = memoryview(bytes(data))
            while rest := rest[self._put(rest) :]:
                await self._wait_room()

    def send_now(self, data: bytes | bytearray | memoryview) -> int:
        """Send what fits into the window without waiting and return how many bytes that was.

        It is 0 when the window is full and while another task sends. Raises as ``send_all`` does.
        """
        return 0 if self._sending.held else self._put(memoryview(bytes(data)))

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the window has room or the peer has gone."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_open()
            await self._wait_room()

    async def send_eof(self) -> None:
        """Tell the peer that nothing more comes; receiving goes on. A second call does nothing."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_open()
            if self._outgoing.broken:
                raise trio.BrokenResourceError("the connection was reset")
            self._eof_sent = True
            self._outgoing.end()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for bytes and return all that have arrived, up to ``max_bytes``; ``b""`` is the end."""
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be >= 1")
        with self._receiving:
            await trio.lowlevel.checkpoint()
            self._check_open()
            while (data := self._incoming.take(max_bytes)) is None:
                await self._incoming.wait_arrival()
                self._check_open()
            return data

    async def wait_readable(self) -> None:
        """Wait until ``receive_some`` would return or raise at once."""
        await trio.lowlevel.checkpoint()
        while not self.is_readable():
            await self._incoming.wait_arrival()

    def peer_closed(self) -> bool:
        """Whether nothing more will come: the peer's EOF or a reset was reached, and all before it was read."""
        return not self._incoming.unread and self.is_readable()

    def is_readable(self) -> bool:
        """Whether ``receive_some`` would return or raise at once; trio's sockets have it, and HTTP clients ask it."""
        return self._incoming.readable_at() <= trio.current_time()

    def close(self) -> None:
        """Close this end: the peer reads what was sent, then EOF, and can send no more. A second call does nothing."""
        if self.closed_at is None:
            self.closed_at = trio.current_time()
            self._incoming.lose_reader()
            self._outgoing.end()

    async def aclose(self) -> None:
        """Close this end as ``close`` does; it is closed also when this is cancelled."""
        self.close()
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        """Break the connection as an RST does, see ``MemoryConnection.reset``; this end still wants closing."""
        self.connection.reset()

    def cut_after(self, byte_count: int, *, reset: bool = False) -> None:
        """``MemoryConnection.cut`` it right behind the next ``byte_count`` bytes that this end sends."""
        self._bytes_to_cut, self._cut_resets = byte_count, reset

    def _put(self, data: memoryview) -> int:
        self._check_sendable()
        count = self._outgoing.put(data[: self._bytes_to_cut])
        if self._bytes_to_cut is not None:
            self._bytes_to_cut -= count
            if not self._bytes_to_cut:
                self.connection.cut(reset=self._cut_resets)
        return count

    async def _wait_room(self) -> None:
        while self._outgoing.unread >= self._outgoing.window and not self._outgoing.reader_gone:
            await self._outgoing.changed.park()
            self._check_open()

    def _check_open(self) -> None:
        if self.closed_at is not None:
            raise trio.ClosedResourceError("this end was closed")

    def _check_sendable(self) -> None:
        self._check_open()
        if self._eof_sent:
            raise trio.ClosedResourceError("nothing can be sent after send_eof")
        if self._outgoing.reader_gone:
            raise trio.BrokenResourceError("the peer has gone")


class MemoryConnection:
    """One connection as the network sees it: both ends, both directions, and what became of them.

    ``client`` and ``server`` are the ends (with ``closed_at``), ``to_server`` and ``to_client`` the directions (with
    ``sent``), ``opened_at`` is on trio's clock, ``tls`` is what the client asked for; there is no handshake.
    """

    def __init__(self, client: Address, server: Address, *, tls: bool, window: int, latency: float) -> None:
        self.tls = tls
        self.opened_at = trio.current_time()
        self.to_server = to_server = Direction(window, latency)
        self.to_client = to_client = Direction(window, latency)
        self.client = MemoryStream(self, MemorySocket(client, server), incoming=to_client, outgoing=to_server)
        self.server = MemoryStream(self, MemorySocket(server, client), incoming=to_server, outgoing=to_client)

    @property
    def is_open(self) -> bool:
        """Whether an owner has yet to close its end; an EOF, a cut or a reset closes neither, as with descriptors."""
        return self.client.closed_at is None or self.server.closed_at is None

    def reset(self) -> None:
        """Break it as an RST does: at once, at both ends, dropping what was not read."""
        self.to_server.reset()
        self.to_client.reset()

    def cut(self, *, reset: bool = False) -> None:
        """End it in the middle, as a dying host or proxy does: neither end can send any more.

        Each end still reads what was sent to it, then EOF or, with ``reset``, ``trio.BrokenResourceError``.
        """
        for direction in (self.to_server, self.to_client):
            direction.reader_gone = True
            direction.end(broken=reset)

    def __repr__(self) -> str:
        closed = f"client closed at {self.client.closed_at}, server closed at {self.server.closed_at}"
        ends = f"{self.client.socket.local} to {self.server.socket.local}"
        return f"<MemoryConnection {ends} opened at {self.opened_at}, {closed}>"
