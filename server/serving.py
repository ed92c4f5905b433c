"""Hypercorn's own connection and HTTP/1.1 classes over the listeners that it is given, with the cures they need.

The same code serves real sockets in production and in-memory streams in tests. Hypercorn 0.18 as it is: one bad byte
from one client ends every connection of the worker; a client that never reads cannot be timed out; idle connections
live for ever (measured: traps H1, H2 and H3 in ``docs/decisions.md``, each with a test of that name).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import h11
import msgspec
import structlog
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11WSConnection
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import MAX_RECV
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import parse_socket_addr, wrap_app
from quart_trio import QuartTrio

from providers.chunked import chunked
from providers.readiness import share_readiness

from .departures import Departures
from .direct import CLEANUP_SECONDS, DIRECT, DirectRoutes
from .doorkeeper import LINGER_SECONDS, Doorkeeper, accept_all
from .http11 import Http11
from .idling import Idling
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


@dataclass(frozen=True)
class Site:
    """What all connections serve and share: an app as Hypercorn calls it, and what they answer themselves."""

    app: AppWrapper
    direct: DirectRoutes
    config: Config
    context: WorkerContext
    limits: ServingLimits
    departures: Departures
    idling: Idling
    connections: set[Connection] = field(default_factory=set)


class Connection:
    """One client's connection. Whatever its bytes are, it ends nothing but itself.

    It answers plain requests in its own task. From the first other one on, Hypercorn's protocol has what comes, with
    tasks for what it answers. The scope around its reading is cancelled when this side closes, as an idle connection's
    keep-alive limit has it do, or can no longer write.

    Attributes:
        client_left: while a plain request was being answered.
    """

    __slots__ = ("_protocol", "_reading", "_send_lock", "_site", "_unsent", "client_left", "stream")

    def __init__(self, site: Site, stream: Any) -> None:
        self.stream = stream  # a ConnectionStream that is a trio.abc.HalfCloseableStream
        self.client_left = False
        self._site = site
        self._protocol: Any = None
        self._reading = trio.CancelScope()
        self._unsent = b""
        self._send_lock: trio.Lock | None = None

    async def run(self) -> None:
        """Serve until either side closes. Raises nothing but what cancels the task (H1)."""
        data = b""
        try:
            with self._reading:
                data = await self._answer_plain(await self.stream.receive_some(MAX_RECV))
            if data:
                await self._serve_others(data)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer is gone
        except* Exception as crash:
            _logger.error("connection.crashed", exc_info=crash)
        finally:
            if self._unsent:
                self.stream.reset()
            self.stream.close()
            self._site.idling.discard(self)
            self._site.connections.discard(self)

    def end(self, reason: str) -> None:
        """Read no more, answer no more; what Hypercorn's protocol has under way goes on to its end."""
        self._reading.cancel(reason=reason)

    async def _answer_plain(self, data: bytes) -> bytes:
        """Answer these bytes, and what follows them, to the first that are no plain request: those. b"" at the end."""
        while data:
            answer, data = await self._site.direct.find(bytes(data), self._receive_rest)
            if answer is None:
                return data
            data = b""
            self._site.idling.discard(self)
            self._site.departures.watch(self)
            try:
                await answer.send_to(self)
            finally:
                self._site.departures.forget(self)
            if not answer.is_whole or self._site.context.terminated.is_set():
                break
            self._site.idling.add(self)
            if data := await self.stream.receive_some(MAX_RECV):
                structlog.contextvars.unbind_contextvars("key_id")  # another request, perhaps with another key
        return b""

    def stirred(self) -> None:
        """Something came while a plain request was being answered: its client's end, or the next request too early."""
        if self.stream.peer_closed():
            self.client_left = True
            self.end("the client is gone")

    async def _serve_others(self, data: bytes) -> None:
        """Have Hypercorn serve what begins with these bytes, to the client's end."""
        self._reading = trio.CancelScope()
        async with _Tasks() as tasks:
            self._protocol = self._make_protocol(tasks)
            with self._reading:
                await self._read_others(data)
            await self._protocol.handle(Closed())
        await self._linger()

    async def _read_others(self, data: bytes) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data:
                await self._protocol.handle(RawData(data))
                data = bytes(await self.stream.receive_some(MAX_RECV))
                if self._at_rest:
                    data = await self._answer_plain(data)
            await self._protocol.handle(RawData(b""))

    async def _receive_rest(self) -> bytes:
        """A body that its client writes behind the head, as most do in Python. One that dawdles is for the app."""
        with trio.move_on_after(REST_SECONDS):
            return bytes(await self.stream.receive_some(MAX_RECV))
        return b""

    @property
    def _at_rest(self) -> bool:
        """Whether the protocol has no request, and nothing of one."""
        states = {self._protocol.connection.our_state, self._protocol.connection.their_state}
        return states == {h11.IDLE} and not self._protocol.connection.trailing_data[0]

    def _make_protocol(self, tasks: _Tasks) -> Http11:
        site, peer = self._site, self.stream.socket
        client = parse_socket_addr(peer.family, peer.getpeername())
        server = parse_socket_addr(peer.family, peer.getsockname())
        state = ConnectionState({WRITER: self})
        return Http11(site.app, site.config, site.context, tasks, state, False, client, server, self.protocol_send)

    async def _linger(self) -> None:
        """Take what a client still sends that was answered early: closing on unread bytes would reset its answer."""
        connection = self._protocol.connection
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
                await trio.lowlevel.checkpoint()  # an app that always has data stays cancellable and lets others run
            case Updated(idle=True):
                self._site.idling.add(self)
            case Updated():
                self._site.idling.discard(self)
            case Closed():
                self.end("this side closes")  # it may wait for an answer's end, not for bytes (H7)
                if self._protocol is None:
                    return
                with trio.move_on_after(CLEANUP_SECONDS, shield=True):
                    await self._protocol.handle(event)

    @property
    def _is_writing(self) -> bool:
        """Whether somebody waits for the client to read."""
        return self._send_lock is not None and self._send_lock.locked()

    @property
    def behind(self) -> bool:
        """Whether some of a chunk waits for the client to read; see ``write_now``."""
        return bool(self._unsent)

    def write_now(self, data: bytes) -> bool:
        """Write a chunk of a streamed body past Quart and Hypercorn, if that takes no waiting; else nothing of it.

        For who is sure that it comes in chunks, that its head was sent, and that nothing is being sent now.
        What does not fit comes first at the next write, which is to follow: ``flush``.
        """
        if self._unsent or self._is_writing:
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
            sent = 0 if self._is_writing else self.stream.send_now(data)
            if sent < len(data):
                await self._write_rest(data[sent:])
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self.protocol_send(Closed())

    async def _write_rest(self, data: bytes) -> None:
        """Wait for the client to read, ``write_stall`` seconds at most (H2). A write left half done is a reset."""
        written = False
        self._send_lock = self._send_lock or trio.Lock()
        try:
            async with self._send_lock:
                with trio.CancelScope() as stall:  # noqa: ASYNC912 - there is something to send
                    for start in range(0, len(data), STALL_BYTES):
                        stall.deadline = trio.current_time() + self._site.limits.write_stall
                        await self.stream.send_all(data[start : start + STALL_BYTES])
                    written = True
        finally:
            if not written:
                self._site.departures.forget(self)
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
    with share_readiness() as readiness:
        async with trio.open_nursery() as watching:
            if readiness is not None:
                watching.start_soon(readiness.run)
            site = _site(app, limits or ServingLimits(), Departures(readiness, watching))
            watching.start_soon(site.idling.run)
            async with trio.open_nursery() as connections:
                async with trio.open_nursery() as accepting:
                    take = partial(_take, site, connections, Doorkeeper())
                    for listener in listeners:
                        accepting.start_soon(accept_all, listener, take)
                    task_status.started()
                    await stopping.wait()
                    accepting.cancel_scope.cancel(reason="serving has ended")
                await site.context.terminated.set()
                site.idling.end_all("serving has ended")
                connections.cancel_scope.deadline = trio.current_time() + site.limits.closing
            watching.cancel_scope.cancel(reason="serving has ended")


def _take(site: Site, nursery: trio.Nursery, doorkeeper: Doorkeeper, stream: Any) -> None:
    """Serve that connection, in a task of its own, or refuse it."""
    if len(site.connections) >= site.limits.connections:
        nursery.start_soon(doorkeeper.refuse, stream)
        return
    connection = Connection(site, stream)
    site.connections.add(connection)
    site.idling.add(connection)
    nursery.start_soon(connection.run)


def _site(app: QuartTrio, limits: ServingLimits, departures: Departures) -> Site:
    config = _hypercorn_config()
    wrapped = wrap_app(app, config.wsgi_max_body_size, "asgi")
    direct = app.extensions.get(DIRECT, DirectRoutes([]))
    return Site(wrapped, direct, config, WorkerContext(None), limits, departures, Idling(limits.keep_alive))


def _hypercorn_config() -> Config:
    config = Config()
    config.errorlog = logging.getLogger("lumos.serving")  # bugs in a response's body end up here (Q10)
    config.accesslog = None
    config.include_server_header = False
    return config
