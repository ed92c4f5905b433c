"""Hypercorn's own connection and HTTP/1.1 classes over the listeners that it is given, with the cures they need.

The same code serves real sockets in production and in-memory streams in tests. Hypercorn 0.18 as it is: one bad byte
from one client ends every connection of the worker; a client that never reads cannot be timed out; idle connections
live for ever (measured: traps H1, H2 and H3 in ``docs/decisions.md``, each with a test of that name).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, Protocol, cast

import h11
import msgspec
import structlog
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, Request, Response
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol, H11WSConnection
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import parse_socket_addr, wrap_app
from quart_trio import QuartTrio

from .doorkeeper import LINGER_SECONDS, Doorkeeper
from .errors import RETRY_AFTER_SECONDS, bare_refusal
from .sse import WRITER
from .websocket_protocol import GuardedWSStream, handshake_headers, is_upgrade

CLEANUP_SECONDS = 5.0
STALL_BYTES = 65_536

_TARGET = re.compile(rb"/|\*$|https?://(\[[\da-f:.]+\]|[\w.-]+)(:\d*)?([/?]|$)", re.IGNORECASE)
"""What a request may ask for (RFC 9112, section 3.2): a path, ``*`` or a URL. On other targets Quart crashes."""

_HOST = re.compile(rb"(\[[\da-f:.]+\]|[\w-]+(\.[\w-]+)*\.?)?(:\d*)?", re.IGNORECASE)
"""What a Host header may say (RFC 9110, section 7.2). On others, as ``.``, Werkzeug raises before our routes."""

_UNANSWERED = [(b"content-length", b"0"), (b"connection", b"close")]
"""The headers of Hypercorn's own 500: the app's task has ended without a word, as it does when serving ends."""

_CUT_OFF_BODY = bare_refusal("the server is shutting down")
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


class _Http11(H11Protocol):
    """Hypercorn's HTTP/1.1 without the ways into cleartext HTTP/2: no browser uses them, seven of H1's inputs do."""

    _asked_head = False

    async def handle(self, event: Event) -> None:
        await super().handle(event)
        if isinstance(self.stream, WSStream) and self.stream.closed:
            await self.send(Closed())  # refused with a 400, after which Hypercorn would wait for the client

    async def stream_send(self, event: StreamEvent) -> None:
        """Pass on what the app says; an answer to a body that is still to come is the connection's last, and says so.

        Without, Hypercorn only closes it, and the next request of a client that keeps connections finds it dead.
        """
        if isinstance(event, Response):
            if event.status_code == 500 and event.headers == _UNANSWERED:
                await self._answer_cut_off(event)
                return
            if event.status_code >= 200 and self.connection.their_state is h11.SEND_BODY:
                event = replace(event, headers=[*event.headers, (b"connection", b"close")])
            event = replace(event, headers=_true_headers(event, self._asked_head))
        await super().stream_send(event)

    async def _answer_cut_off(self, event: Response) -> None:
        """A request that still waited when serving ended gets a 503 instead of an empty 500. Its end comes behind."""
        headers = [
            (b"content-type", b"application/json"),
            (b"cache-control", b"no-store"),
            (b"retry-after", b"%d" % RETRY_AFTER_SECONDS),
            (b"content-length", b"%d" % len(_CUT_OFF_BODY)),
            (b"connection", b"close"),
        ]
        with trio.move_on_after(CLEANUP_SECONDS, shield=True):  # the task that brings this is cancelled
            await super().stream_send(replace(event, status_code=503, headers=headers))
            if not self._asked_head:
                await super().stream_send(Body(STREAM_ID, _CUT_OFF_BODY))

    async def _check_protocol(self, event: h11.Request) -> None:
        """Stay with HTTP/1.1."""

    async def _create_stream(self, request: h11.Request) -> None:
        self._asked_head = request.method == b"HEAD"
        hosts = (value for name, value in request.headers if name == b"host")
        if not (_TARGET.match(request.target) and all(map(_HOST.fullmatch, hosts))):
            await self._refuse()
        elif not is_upgrade(request):
            await super()._create_stream(request)
        elif (headers := handshake_headers(request)) is None:
            await self._refuse()
        else:
            await self._create_socket(request, headers)

    async def _refuse(self) -> None:
        await self._send_error_response(400)
        await self.send(Closed())

    async def _create_socket(self, request: h11.Request, headers: list[tuple[bytes, bytes]]) -> None:
        """As Hypercorn's, with a stream of ours."""
        self.stream = GuardedWSStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        self.connection = H11WSConnection(cast(h11.Connection, self.connection))
        version = request.http_version.decode()
        await self.stream.handle(Request(STREAM_ID, headers, version, "GET", request.target, self.connection_state))


def _true_headers(answer: Response, asked_head: bool) -> list[tuple[bytes, bytes]]:
    """The answer's headers without what is not true where there is no body (RFC 9110, section 8.6).

    Quart gives every empty answer a length of 0. A 204 must not tell one; a 304 and an answer to HEAD may only tell
    what a GET would have had, and no GET that is answered with 200 has nothing.
    """
    if answer.status_code in {204, 304}:
        untrue = {b"content-length", b"content-type"}
        return [(name, value) for name, value in answer.headers if name.lower() not in untrue]
    if asked_head and answer.status_code == 200:
        return [(name, value) for name, value in answer.headers if (name.lower(), value) != (b"content-length", b"0")]
    return list(answer.headers)


class Connection(TCPServer):
    """One client's connection. Whatever its bytes are, it ends nothing but itself.

    It lives as long as its reading does: the scope around that carries the keep-alive limit while the connection is
    idle (no timer task, no lock), and is cancelled when this side closes or can no longer write.
    """

    stream: Any  # a ConnectionStream, which Hypercorn's annotation does not foresee
    protocol: Any

    def __init__(
        self, app: AppWrapper, config: Config, context: WorkerContext, limits: ServingLimits, stream: Any
    ) -> None:
        super().__init__(app, config, context, ConnectionState({}), stream)
        self._limits = limits
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
        peer = self.stream.socket
        client = parse_socket_addr(peer.family, peer.getpeername())
        server = parse_socket_addr(peer.family, peer.getsockname())
        async with TaskGroup() as tasks:
            self.protocol = _Http11(
                self.app,
                self.config,
                self.context,
                tasks,
                ConnectionState({WRITER: self}),
                False,
                client,
                server,
                self.protocol_send,
            )
            self._set_idle(True)
            with self._reading:
                await self._read()
            await self.protocol.handle(Closed())

    async def _read(self) -> None:
        """Hand to the protocol what comes, the client's end of it too."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                data = await self.stream.receive_some(MAX_RECV)
                await self.protocol.handle(RawData(bytes(data)))
                if not data:
                    return

    async def _linger(self) -> None:
        """Take what a client still sends that was answered early: closing on unread bytes would reset its answer."""
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
                await self._write(data)
            case Updated(idle):
                self._set_idle(idle)
            case Closed():
                self._reading.cancel(reason="this side closes")  # it may wait for an answer's end, not for bytes (H7)
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
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
        try:
            sent = self.stream.send_now(chunk)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False  # who writes on, in a task of its own, finds out
        if not sent:
            return False
        self._unsent = chunk[sent:]
        return True

    async def flush(self) -> None:
        """Wait for the client to have read so far that all is written, or break the connection as ``_write`` does."""
        await self._write(b"")

    async def _write(self, data: bytes) -> None:
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
    context = WorkerContext(None)
    wrapped = wrap_app(app, config.wsgi_max_body_size, "asgi")

    open_connections: set[Connection] = set()
    doorkeeper = Doorkeeper()

    async def serve_connection(stream: Any) -> None:
        if len(open_connections) >= limits.connections:
            await doorkeeper.refuse(stream)
            return
        connection = Connection(wrapped, config, context, limits, stream)
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
