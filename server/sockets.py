"""Sockets as the serving code wants them: writes that need not wait, and a backlog taken whole."""

from __future__ import annotations

import resource
import socket
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import trio

LISTEN_BACKLOG = 1024
READ_BYTES = 65_536
_LINGER_ZERO = struct.pack("ii", 1, 0)  # struct linger: on, zero seconds
_UNSENT_BYTES = 16_384
"""What the kernel takes beyond what is under way, as trio's: a client that does not read is noticed sooner."""


class SocketStream(trio.abc.HalfCloseableStream):
    """An accepted TCP connection. Reading waits first and takes all there is then; writes need not wait."""

    __slots__ = ("_came_just_now", "socket")

    def __init__(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        self.socket = accepted
        self._came_just_now = True

    def send_now(self, data: bytes | memoryview) -> int:
        """Write what fits into the kernel's buffer; how many bytes that was."""
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError from error

    def peer_closed(self) -> bool:
        """Whether nothing comes any more, and all that came was read. Of a stream that is closed here: yes."""
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def reset(self) -> None:
        """Close at once; the peer gets a RST and the kernel drops what is unsent."""
        if self.socket.fileno() != -1:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()

    def close(self) -> None:
        """Close it; the peer reads what was sent, then its end. For the last one who uses it: nobody is woken."""
        self.socket.close()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As trio's, for what ``send_now`` did not take: waits first."""
        with memoryview(data) as rest:
            sent = 0
            while sent < len(rest):
                await self.wait_send_all_might_not_block()
                sent += self.send_now(rest[sent:])

    async def wait_send_all_might_not_block(self) -> None:
        """As trio's."""
        self._check_open()
        await trio.lowlevel.wait_writable(self.socket)

    async def wait_readable(self) -> None:
        """Until there is something to read, or the end."""
        await trio.lowlevel.wait_readable(self.socket)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As trio's, but waits before it reads: only a connection that was accepted just now may have its request."""
        self._check_open()
        data = self._read(max_bytes) if self._came_just_now else None
        self._came_just_now = False
        while data is None:
            await trio.lowlevel.wait_readable(self.socket)
            data = self._read(max_bytes)
        return data  # noqa: ASYNC910 - once

    def _read(self, max_bytes: int | None) -> bytes | None:
        """What is there, b"" at the end; None if there is nothing, as after a wait, too (select(2) warns of it)."""
        try:
            return self.socket.recv(max_bytes or READ_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise trio.BrokenResourceError(f"socket connection broken: {error}") from error

    async def send_eof(self) -> None:
        """As trio's."""
        await trio.lowlevel.checkpoint()
        self._check_open()
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise trio.BrokenResourceError from error

    async def aclose(self) -> None:
        """As trio's."""
        if self.socket.fileno() != -1:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()
        await trio.lowlevel.checkpoint()

    def _check_open(self) -> None:
        if self.socket.fileno() == -1:
            raise trio.ClosedResourceError("this socket was already closed")


class SocketListener(trio.abc.Listener[SocketStream]):
    """A listening socket that hands out all that its backlog holds at each wake (trio's takes one a pass)."""

    def __init__(self, listening: socket.socket) -> None:
        listening.setblocking(False)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)  # those it accepts have it then, too
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        self._listening = listening
        self._accepted: deque[SocketStream] = deque()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it is bound to."""
        host, port = self._listening.getsockname()[:2]
        return host, port

    async def accept(self) -> SocketStream:
        """The next connection; waits only if none is there already.

        Raises:
            OSError: the process is out of descriptors, say; who serves waits then.
            trio.ClosedResourceError: it was closed.
        """
        while not self._accepted:
            if self._listening.fileno() == -1:
                raise trio.ClosedResourceError("this listener was closed")
            await trio.lowlevel.wait_readable(self._listening)
            self._drain_backlog()
        return self._accepted.popleft()

    def _drain_backlog(self) -> None:
        try:
            while len(self._accepted) < LISTEN_BACKLOG:
                connection, _ = self._listening.accept()
                self._accepted.append(SocketStream(connection))
        except BlockingIOError:
            pass
        except ConnectionAbortedError:
            pass  # that client left while it queued
        except OSError:
            if not self._accepted:
                raise

    async def aclose(self) -> None:
        """Stop listening; connections accepted but not handed out are closed."""
        if self._listening.fileno() != -1:
            trio.lowlevel.notify_closing(self._listening)
            self._listening.close()
        while self._accepted:
            self._accepted.popleft().reset()
        await trio.lowlevel.checkpoint()


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as it may: the usual 1,024 are fewer than the connections it takes."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def listen_tcp(host: str, port: int, *, beside_others: bool = False) -> list[SocketListener]:
    """Listeners on every address that the host name has; port 0 takes a free one.

    ``beside_others``: other processes may listen there too, each for its share of the connections.

    Raises:
        OSError: the address is taken, or is none of this machine's.
    """
    listeners = []
    with ExitStack() as undone:
        for bound in _bind(host, port, undone, beside_others=beside_others):
            bound.listen(LISTEN_BACKLOG)
            listeners.append(SocketListener(bound))
        undone.pop_all()
    return listeners


@contextmanager
def hold_port(host: str, port: int) -> Iterator[int]:
    """Keep a port (0: a free one) on every address of the host for processes that listen there ``beside_others``.

    Raises:
        OSError: as ``listen_tcp``.
    """
    with ExitStack() as held:
        bound = list(_bind(host, port, held, beside_others=True))
        yield bound[0].getsockname()[1]


def _bind(host: str, port: int, closing: ExitStack, *, beside_others: bool) -> Iterator[socket.socket]:
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        bound = closing.enter_context(socket.socket(family, kind, protocol))
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        if beside_others:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, True)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, True)
        bound.bind((address[0], port, *address[2:]))
        port = bound.getsockname()[1]  # a free one, once taken, is the same on every address
        yield bound
