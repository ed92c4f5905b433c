"""A TCP connection to a model's server, read as one reads a stream of tokens: wait first, then take all there is."""

from __future__ import annotations

import errno
import os
import select
import socket

import trio

DEFAULT_READ_BYTES = 65_536


async def open_tcp(host: str, port: int) -> TcpStream:
    """Connect as ``trio.open_tcp_stream`` does, without Nagle's delay; an address is connected to without a race.

    Raises:
        OSError: nobody there, no such name.
        UnicodeError: DNS cannot hold such a name.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.inet_pton(family, host)
    except (OSError, UnicodeError):
        return TcpStream.of(await trio.open_tcp_stream(host, port))
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setblocking(False)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await _connect(opened, (host, port))
    except BaseException:
        opened.close()
        raise
    return TcpStream(opened)


async def _connect(opened: socket.socket, address: tuple[str, int]) -> None:
    await trio.lowlevel.checkpoint_if_cancelled()
    error = opened.connect_ex(address)
    if error == errno.EINPROGRESS:
        await trio.lowlevel.wait_writable(opened)
        error = opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


class TcpStream(trio.abc.Stream):
    """A connected socket that does not block, which it closes; one reader and one writer at a time.

    Trio's own ``receive_some`` reads at once and waits only if there is nothing, which is the rule where tokens come
    one by one: each cost a read in vain, an exception and, where one was there, a scheduler pass of its own.
    """

    __slots__ = ("_socket",)

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    @classmethod
    def of(cls, stream: trio.SocketStream) -> TcpStream:
        """What trio has connected, without trio's three objects around the socket; ``stream`` is spent."""
        opened = stream.socket
        return cls(socket.socket(opened.family, opened.type, opened.proto, opened.detach()))

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has come, up to ``max_bytes``, as soon as there is something; b"" at the end.

        Raises:
            trio.BrokenResourceError: the peer is gone.
            trio.ClosedResourceError: it was closed here.
        """
        while (descriptor := self._socket.fileno()) != -1:
            await trio.lowlevel.wait_readable(descriptor)
            try:
                return os.read(descriptor, max_bytes or DEFAULT_READ_BYTES)
            except BlockingIOError:  # nothing after all, as select(2) warns
                continue
            except OSError as error:
                raise _broken(error) from error
        await trio.lowlevel.checkpoint()
        raise _closed()

    def is_readable(self) -> bool:
        """Whether a read would return at once."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As trio's, but what the socket takes at once costs no scheduler pass: a sender waits for its answer next."""
        await trio.lowlevel.checkpoint_if_cancelled()
        sent = self._write_now(data)
        if sent < len(data):
            with memoryview(data) as view:
                while sent < len(view):
                    await self.wait_send_all_might_not_block()
                    sent += self._write_now(view[sent:])

    def _write_now(self, data: bytes | bytearray | memoryview) -> int:
        """How many bytes the socket took."""
        if (descriptor := self._socket.fileno()) == -1:
            raise _closed()
        try:
            return os.write(descriptor, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _broken(error) from error

    async def wait_send_all_might_not_block(self) -> None:
        """As trio's."""
        if self._socket.fileno() == -1:
            raise _closed()
        await trio.lowlevel.wait_writable(self._socket)

    async def aclose(self) -> None:
        """As trio's."""
        if self._socket.fileno() != -1:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        await trio.lowlevel.checkpoint()


def _broken(error: OSError) -> trio.BrokenResourceError:
    return trio.BrokenResourceError(f"socket connection broken: {error}")


def _closed() -> trio.ClosedResourceError:
    return trio.ClosedResourceError("this socket was already closed")
