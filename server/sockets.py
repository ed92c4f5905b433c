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
_LINGER_ZERO = struct.pack("ii", 1, 0)  # struct linger: on, zero seconds


class SocketStream(trio.abc.HalfCloseableStream):
    """An accepted TCP connection: trio's stream (TCP_NODELAY), and its socket for writes that need not wait."""

    def __init__(self, accepted: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
        self._accepted = accepted
        self.socket = self._stream.socket

    def send_now(self, data: bytes) -> int:
        """Write what fits into the kernel's buffer; how many bytes that was."""
        try:
            return self._accepted.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError from error

    def reset(self) -> None:
        """Close at once; the peer gets a RST and the kernel drops what is unsent."""
        if self.socket.fileno() != -1:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            self.socket.close()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As trio's."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As trio's."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As trio's."""
        return await self._stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        """As trio's."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """As trio's."""
        await self._stream.aclose()


class SocketListener(trio.abc.Listener[SocketStream]):
    """A listening socket that hands out all that its backlog holds at each wake (trio's takes one a pass)."""

    def __init__(self, listening: socket.socket) -> None:
        listening.setblocking(False)
        self._listening = listening
        self._accepted: deque[SocketStream] = deque()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it is bound to."""
        host, port = self._listening.getsockname()[:2]
        return host, port

    async def accept(self) -> SocketStream:
        """The next connection. Raises OSError when the process is out of descriptors (trio's loop waits then)."""
        await trio.lowlevel.checkpoint()
        while not self._accepted:
            if self._listening.fileno() == -1:
                raise trio.ClosedResourceError("this listener was closed")
            self._drain_backlog()
            if not self._accepted:
                await trio.lowlevel.wait_readable(self._listening)
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
