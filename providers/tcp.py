"""A TCP connection to a model's server, read as one reads a stream of tokens: wait first, then take all there is."""

from __future__ import annotations

import os

import trio

DEFAULT_READ_BYTES = 65_536


class TcpStream(trio.abc.Stream):
    """A connected ``trio.SocketStream``, which it closes.

    Trio's own ``receive_some`` reads at once and waits only if there is nothing, which is the rule where tokens come
    one by one: each cost a read in vain, an exception and, where one was there, a scheduler pass of its own.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._socket = stream.socket

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
                raise trio.BrokenResourceError(f"socket connection broken: {error}") from error
        await trio.lowlevel.checkpoint()
        raise trio.ClosedResourceError("this socket was already closed")

    def is_readable(self) -> bool:
        """Whether a read would return at once."""
        return self._socket.is_readable()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As trio's, but what the socket takes at once costs no scheduler pass: a sender waits for its answer next."""
        await trio.lowlevel.checkpoint_if_cancelled()
        sent = self._write_now(data)
        if sent < len(data):
            with memoryview(data) as view:
                await self._stream.send_all(view[sent:])

    def _write_now(self, data: bytes | bytearray | memoryview) -> int:
        """How many bytes the socket took; none if it was closed here, of which trio tells."""
        if (descriptor := self._socket.fileno()) == -1:
            return 0
        try:
            return os.write(descriptor, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(f"socket connection broken: {error}") from error

    async def wait_send_all_might_not_block(self) -> None:
        """As trio's."""
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """As trio's."""
        await self._stream.aclose()
