"""A TCP connection to a model's server, read as one reads a stream of tokens: wait first, then take all there is."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import outcome
import trio

from .readiness import Readiness, shared_readiness

READ_BYTES = 65_536
"""The most that one socket read takes: what it brings is handed on as one chunk."""

Take: TypeAlias = Callable[[bytes], bool]
"""Takes what one read brought, b"" at the end; whether more is wanted. Synchronous; perhaps outside
of every task, but always in its owner's context."""


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

    __slots__ = ("_pushing", "_socket")

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._pushing: _Pushing | None = None

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
            if (data := _read_now(descriptor, max_bytes or READ_BYTES)) is not None:
                return data
        await trio.lowlevel.checkpoint()
        raise _closed()

    async def read_into(self, take: Take) -> None:
        """Hand ``take`` what each read brings, until it says False or that was the end, b"".

        Where one watches for all (``share_readiness``), it is read there, and this task sleeps on meanwhile.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: as ``receive_some``.
            trio.BusyResourceError: another task does so now.
            BaseException: what ``take`` raises.
        """
        if self._pushing is not None:
            raise trio.BusyResourceError("another task reads this socket")
        while (readiness := shared_readiness()) is not None and (descriptor := self._socket.fileno()) != -1:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._pushing = _Pushing(descriptor, take, readiness)
            try:
                if not await self._pushing.wait():
                    return
            finally:
                self._pushing = None
        await read_alone(self, take)

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
            if self._pushing is not None:
                self._pushing.end(outcome.Error(_closed()))
            self._socket.close()
        await trio.lowlevel.checkpoint()


class _Pushing:
    """A task's wait for all that comes from its socket, while it is read for it and handed to ``take``."""

    __slots__ = ("_cancelled", "_context", "_descriptor", "_is_taking", "_readiness", "_take", "_task")

    def __init__(self, descriptor: int, take: Take, readiness: Readiness) -> None:
        self._descriptor = descriptor
        self._take = take
        self._readiness = readiness
        self._task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        self._context = self._task.context
        self._is_taking = self._cancelled = False

    async def wait(self) -> bool:
        """Until ``take`` has enough: False; or is to look again: nobody reads for it any more, or it is cancelled.

        Raises what reading and ``take`` raise.
        """
        self._readiness.watch(self._descriptor, self._read, partial(self.end, outcome.Value(True)))
        stopped: bool = await trio.lowlevel.wait_task_rescheduled(self._give_up)
        return stopped

    def end(self, became: outcome.Outcome[bool]) -> None:
        """Wake the task with that, if it still waits."""
        if self._task is not None:
            self._readiness.forget(self._descriptor)
            trio.lowlevel.reschedule(self._task, became)
            self._task = None

    def _read(self) -> None:
        """There is something: hand it on. Nothing is awaited here, so that what is caught is no cancellation."""
        self._is_taking = True
        try:
            data = _read_now(self._descriptor, READ_BYTES)
            wants_more = data is None or (self._context.run(self._take, data) and bool(data))
        except BaseException as error:  # noqa: ASYNC103, BLE001 - the waiting task's business, and raised there
            self.end(outcome.Error(error))
            return  # noqa: ASYNC104
        self._is_taking = False
        if not wants_more:
            self.end(outcome.Value(False))
        elif self._cancelled:
            self.end(outcome.Value(True))

    def _give_up(self, _: object) -> trio.lowlevel.Abort:
        """It is cancelled; by ``take`` itself, perhaps: then what that raises is not lost."""
        if self._is_taking:
            self._cancelled = True
            return trio.lowlevel.Abort.FAILED
        self._task = None
        self._readiness.forget(self._descriptor)
        return trio.lowlevel.Abort.SUCCEEDED


async def read_alone(stream: trio.abc.Stream, take: Take) -> None:
    """As ``TcpStream.read_into``, in this task."""
    while take(data := bytes(await stream.receive_some(READ_BYTES))) and data:
        pass


def _read_now(descriptor: int, max_bytes: int) -> bytes | None:
    """What has come; None: nothing after all, as select(2) warns."""
    try:
        return os.read(descriptor, max_bytes)
    except BlockingIOError:
        return None
    except OSError as error:
        raise _broken(error) from error


def _broken(error: OSError) -> trio.BrokenResourceError:
    return trio.BrokenResourceError(f"socket connection broken: {error}")


def _closed() -> trio.ClosedResourceError:
    return trio.ClosedResourceError("this socket was already closed")
