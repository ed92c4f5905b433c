"""Hypercorn's own connection and HTTP/1.1 classes over the listeners that it is given, with the cures they need.

The same code serves real sockets in production and in-memory streams in tests. Hypercorn 0.18 as it is: one bad byte
from one client ends every connection of the worker; a client that never reads cannot be timed out; idle connections
live for ever (measured: traps H1, H2 and H3 in ``docs/decisions.md``, each with a test of that name).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Protocol

import h11
import msgspec
import structlog
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11WSConnection
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import parse_socket_addr, wrap_app
from quart_trio import QuartTrio

from providers.chunked import chunked

from .direct import CLEANUP_SECONDS, DIRECT, DirectAnswer, DirectRoutes
from .doorkeeper import LINGER_SECONDS, Doorkeeper
from .http11 import Http11
from .sse import WRITER

STALL_BYTES = 65_536
REST_SECONDS = 0.05

_logger = structlog.get_logger("lumos")


class ServingLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What connections may cost; times in seconds.

    Attributes:
        connections: open at once; one more gets a 503, whatever it wants.
        write_stall: what a client may take to read the next 64 KiB; then the connection is reset.
        keep_alive: an idle connection, and each request's head.
        closing: what connections get to finish once serving has ended.
    """

    connections: int = 10_000
    write_stall: float = 20.0
    keep_alive: float = 10.0
    closing: float = 3.0


class ConnectionStream(Protocol):
    """What a connection needs of its stream beyond ``trio.abc.HalfCloseableStream``; ``socket`` tells the addresses."""

    socket: Any

    def send_now(self, data: bytes) -> int:
        """Write what fits without waiting; how many bytes that was."""
        ...

    def reset(self) -> None:
        """Close at once, dropping what is unsent."""
        ...


class _Tasks(TaskGroup):
    """A connection's tasks."""

    async def __aenter__(self) -> _Tasks:
        await super().__aenter__()
        return self

    def cancel(self, reason: str) -> None:
        """End them."""
        assert self._nursery is not None, "it is entered"
        self._nursery.cancel_scope.cancel(reason=reason)


@dataclass(frozen=True)
class Site:
    """What all connections serve: an app as Hypercorn calls it, and what they answer themselves."""

    app: AppWrapper
    direct: DirectRoutes
    config: Config


class Connection(TCPServer):
    """One client's connection. Whatever its bytes are, it ends nothing but itself.

    It lives as long as its reading does: the scope around that carries the keep-alive limit while the connection is
    idle (no timer task, no lock), and is cancelled when this side closes or can no longer write.
    """

    stream: Any  # a ConnectionStream, which Hypercorn's annotation does not foresee
    protocol: Any

    def __init__(self, site: Site, context: WorkerContext, limits: ServingLimits, stream: Any) -> None:
        super().__init__(site.app, site.config, context, ConnectionState({}), stream)
        self.protocol = None
        self._site = site
        self._limits = limits
        self._answer: DirectAnswer | None = None
        self._reading = trio.CancelScope()
        self._unsent = b""

    async def run(self) -> None:
        """Serve until either side closes. Raises nothing but what cancels the task (H1)."""
        try:
            await self._serve()
            await self._linger()
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer is gone
        except* Exception as crash:
            _logger.error("connection.crashed", exc_info=crash)
        finally:
            if self._unsent:
                self.stream.reset()
            with trio.move_on_after(CLEANUP_SECONDS, shield=True):
                await self._close()

    def end_if_idle(self) -> None:
        """Close unless a request is under way; its answer closes the connection then."""
        if self._reading.deadline < inf:
            self._reading.cancel(reason="serving has ended")

    async def _serve(self) -> None:
        async with _Tasks() as tasks:
            self._set_idle(True)
            with self._reading:
                await self._read(tasks)
            if self.protocol is not None:
                await self.protocol.handle(Closed())
            if self._answer is not None:
                self._answer.is_wanted = False
                tasks.cancel("the client is gone")

    async def _read(self, tasks: _Tasks) -> None:
        """Answer what comes, or hand it to the protocol, to the client's end. One request waits for the one before."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := bytes(await self.stream.receive_some(MAX_RECV)):
                if self._answer is not None:
                    self._answer.over = trio.Event()
                    await self._answer.over.wait()
                respond = None
                if self._at_rest:
                    respond, data = await self._site.direct.find(data, self._receive_rest)
                if respond is not None:
                    self._set_idle(False)
                    self._answer = DirectAnswer(respond, self)
                    tasks.spawn(self._answer.run)
                    continue
                if self.protocol is None:
                    self.protocol = self._make_protocol(tasks)
                await self.protocol.handle(RawData(data))
            if self.protocol is not None:
                await self.protocol.handle(RawData(b""))

    async def _receive_rest(self) -> bytes:
        """A body that its client writes behind the head, as most do in Python. One that dawdles is for the app."""
        with trio.move_on_after(REST_SECONDS):
            return bytes(await self.stream.receive_some(MAX_RECV))
        return b""

    @property
    def _at_rest(self) -> bool:
        """Whether the protocol has no request, and nothing of one."""
        if self.protocol is None:
            return True
        states = {self.protocol.connection.our_state, self.protocol.connection.their_state}
        return states == {h11.IDLE} and not self.protocol.connection.trailing_data[0]

    def _make_protocol(self, tasks: _Tasks) -> Http11:
        peer = self.stream.socket
        client = parse_socket_addr(peer.family, peer.getpeername())
        server = parse_socket_addr(peer.family, peer.getsockname())
        state = ConnectionState({WRITER: self})
        return Http11(self.app, self.config, self.context, tasks, state, False, client, server, self.protocol_send)

    def answered(self, *, whole: bool) -> None:
        """A direct answer is over: the next request may come, or nothing can any more."""
        self._answer = None
        if whole and not self.context.terminated.is_set():
            self._set_idle(True)
        else:
            self._reading.cancel(reason="this side closes")

    async def _linger(self) -> None:
        """Take what a client still sends that was answered early: closing on unread bytes would reset its answer."""
        if self.protocol is None:
            return
        connection = self.protocol.connection
        if isinstance(connection, H11WSConnection) or connection.their_state in {h11.SEND_BODY, h11.ERROR}:
            await self.stream.send_eof()
            with trio.move_on_after(LINGER_SECONDS):
                while await self.stream.receive_some(MAX_RECV):
                    pass

    async def protocol_send(self, event: Event) -> None:
        """Write to the client, or follow the protocol's change of state.

        Quart-Trio cancels its request while Hypercorn is still inside ``send``; without a shield the end would not
        go through (H3). Writes stay cancellable.
        """
        match event:
            case RawData(data):
                await self.write(data)
            case Updated(idle):
                self._set_idle(idle)
            case Closed():
                self._reading.cancel(reason="this side closes")  # it may wait for an answer's end, not for bytes (H7)
                if self.protocol is None:
                    return
                with trio.move_on_after(CLEANUP_SECONDS, shield=True):
                    await self.protocol.handle(event)

    def _set_idle(self, idle: bool) -> None:
        self._reading.deadline = trio.current_time() + self._limits.keep_alive if idle else inf

    @property
    def behind(self) -> bool:
        """Whether some of a chunk waits for the client to read; see ``write_now``."""
        return bool(self._unsent)

    def write_now(self, data: bytes) -> bool:
        """Write a chunk of a streamed body past Quart and Hypercorn, if that takes no waiting; else nothing of it.

        For who is sure that it comes in chunks, that its head was sent, and that nothing is being sent now.
        What does not fit comes first at the next write, which is to follow: ``flush``.
        """
        if self._unsent or self.send_lock.locked():
            return False
        framed = chunked(data)
        try:
            sent = self.stream.send_now(framed)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False  # who writes on, in a task of its own, finds out
        if not sent:
            return False
        self._unsent = framed[sent:]
        return True

    async def flush(self) -> None:
        """Wait for the client to have read so far that all is written, or break the connection as ``write`` does."""
        await self.write(b"")

    async def write(self, data: bytes) -> None:
        """Straight to the socket; the lock and the deadline are only for what does not fit (57 -> 19 µs an event)."""
        data, self._unsent = self._unsent + data, b""
        try:
            sent = 0 if self.send_lock.locked() else self.stream.send_now(data)
            if sent < len(data):
                await self._write_rest(data[sent:])
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self.protocol_send(Closed())
        await trio.lowlevel.checkpoint()  # an app that always has data stays cancellable and lets others run

    async def _write_rest(self, data: bytes) -> None:
        """Wait for the client to read, ``write_stall`` seconds at most (H2). A write left half done is a reset."""
        written = False
        try:
            async with self.send_lock:
                with trio.CancelScope() as stall:  # noqa: ASYNC912 - there is something to send
                    for start in range(0, len(data), STALL_BYTES):
                        stall.deadline = trio.current_time() + self._limits.write_stall
                        await self.stream.send_all(data[start : start + STALL_BYTES])
                    written = True
        finally:
            if not written:
                self.stream.reset()
        if not written:
            raise trio.BrokenResourceError("the client does not read")


async def serve(
    app: QuartTrio,
    listeners: Sequence[trio.abc.Listener[Any]],
    stopping: trio.Event,
    limits: ServingLimits | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the app on the listeners until ``stopping`` is set; then connections get ``limits.closing`` seconds.

    Closes the listeners. Drain runs before you set ``stopping``: what streams then is cut after ``closing``.
    """
    limits = limits or ServingLimits()
    config = _hypercorn_config()
    site = Site(wrap_app(app, config.wsgi_max_body_size, "asgi"), app.extensions.get(DIRECT, DirectRoutes([])), config)
    context = WorkerContext(None)

    open_connections: set[Connection] = set()
    doorkeeper = Doorkeeper()

    async def serve_connection(stream: Any) -> None:
        if len(open_connections) >= limits.connections:
            await doorkeeper.refuse(stream)
            return
        connection = Connection(site, context, limits, stream)
        open_connections.add(connection)
        await connection.run()
        open_connections.discard(connection)

    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            accepting.start_soon(
                partial(trio.serve_listeners, serve_connection, list(listeners), handler_nursery=connections)
            )
            task_status.started()
            await stopping.wait()
            accepting.cancel_scope.cancel(reason="serving has ended")
        await context.terminated.set()
        for connection in open_connections:
            connection.end_if_idle()
        connections.cancel_scope.deadline = trio.current_time() + limits.closing


def _hypercorn_config() -> Config:
    config = Config()
    config.errorlog = logging.getLogger("lumos.serving")  # bugs in a response's body end up here (Q10)
    config.accesslog = None
    config.include_server_header = False
    return config
