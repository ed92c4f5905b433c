"""Hypercorn's own connection and HTTP/1.1 classes over the listeners that it is given, with the cures they need.

The same code serves real sockets in production and in-memory streams in tests. Hypercorn 0.18 as it is: one bad byte
from one client ends every connection of the worker; a client that never reads cannot be timed out; idle connections
live for ever (measured: traps H1, H2 and H3 in ``docs/decisions.md``, each with a test of that name).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import h11
import msgspec
import structlog
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import parse_socket_addr, wrap_app
from quart_trio import QuartTrio

CLEANUP_SECONDS = 5.0

_TARGET = re.compile(rb"/|\*$|https?://(\[[\da-f:.]+\]|[\w.-]+)(:\d*)?([/?]|$)", re.IGNORECASE)
"""What a request may ask for (RFC 9112, section 3.2): a path, ``*`` or a URL. On other targets Quart crashes."""

_logger = structlog.get_logger("lumos")


class ServingLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a connection may cost, in seconds.

    Attributes:
        write_stall: one write to a client that does not read; then the connection is reset.
        keep_alive: an idle connection, and each request's head.
        closing: what connections get to finish once serving has ended.
    """

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

    async def _check_protocol(self, event: h11.Request) -> None:
        """Stay with HTTP/1.1."""

    async def _create_stream(self, request: h11.Request) -> None:
        if _TARGET.match(request.target):
            await super()._create_stream(request)
        else:
            await self._send_error_response(400)
            await self.send(Closed())


class Connection(TCPServer):
    """One client's connection. Whatever its bytes are, it ends nothing but itself."""

    stream: Any  # a ConnectionStream, which Hypercorn's annotation does not foresee
    protocol: Any

    def __init__(
        self, app: AppWrapper, config: Config, context: WorkerContext, limits: ServingLimits, stream: Any
    ) -> None:
        super().__init__(app, config, context, ConnectionState({}), stream)
        self._limits = limits

    async def run(self) -> None:
        """Serve until either side closes. Raises nothing but what cancels the task (H1)."""
        try:
            await self._serve()
        except* OSError:
            pass  # the peer is gone
        except* Exception as crash:
            _logger.error("connection.crashed", exc_info=crash)
        finally:
            with trio.move_on_after(CLEANUP_SECONDS, shield=True):
                await self._close()

    async def _serve(self) -> None:
        peer = self.stream.socket
        client = parse_socket_addr(peer.family, peer.getpeername())
        server = parse_socket_addr(peer.family, peer.getsockname())
        async with TaskGroup() as tasks:
            self._task_group = tasks
            self.protocol = _Http11(
                self.app,
                self.config,
                self.context,
                tasks,
                ConnectionState({}),
                False,
                client,
                server,
                self.protocol_send,
            )
            await self.protocol.initiate()
            await self.idle_task.restart(tasks, self._idle_timeout)
            await self._read_data()

    async def protocol_send(self, event: Event) -> None:
        """Write to the client, or follow the protocol's change of state.

        Quart-Trio cancels its request while Hypercorn is still inside ``send``; without a shield the keep-alive
        timer would not start again (H3). Writes stay cancellable.
        """
        if isinstance(event, RawData):
            await self._write(event.data)
        else:
            with trio.move_on_after(CLEANUP_SECONDS, shield=True):
                await super().protocol_send(event)

    async def _write(self, data: bytes) -> None:
        """Straight to the socket; the lock and the deadline are only for what does not fit (57 -> 19 µs an event)."""
        try:
            sent = 0 if self.send_lock.locked() else self.stream.send_now(data)
            if sent < len(data):
                await self._write_rest(data[sent:])
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self.protocol.handle(Closed())
        else:
            await trio.lowlevel.checkpoint()  # an app that always has data stays cancellable and lets others run

    async def _write_rest(self, data: bytes) -> None:
        """Wait for the client to read, ``write_stall`` seconds at most (H2). A write left half done is a reset."""
        written = False
        try:
            async with self.send_lock:
                with trio.move_on_after(self._limits.write_stall):
                    await self.stream.send_all(data)
                    written = True
        finally:
            if not written:
                self.stream.reset()
        if not written:
            raise trio.BrokenResourceError("the client does not read")

    async def _idle_timeout(self) -> None:
        with trio.move_on_after(self._limits.keep_alive):
            await self.context.terminated.wait()
        with trio.move_on_after(CLEANUP_SECONDS, shield=True):
            await self._initiate_server_close()


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
    config = _hypercorn_config(limits)
    context = WorkerContext(None)
    wrapped = wrap_app(app, config.wsgi_max_body_size, "asgi")

    async def serve_connection(stream: Any) -> None:
        await Connection(wrapped, config, context, limits, stream).run()

    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            accepting.start_soon(
                partial(trio.serve_listeners, serve_connection, list(listeners), handler_nursery=connections)
            )
            task_status.started()
            await stopping.wait()
            accepting.cancel_scope.cancel(reason="serving has ended")
        await context.terminated.set()
        connections.cancel_scope.deadline = trio.current_time() + limits.closing


def _hypercorn_config(limits: ServingLimits) -> Config:
    config = Config()
    config.errorlog = None
    config.accesslog = None
    config.include_server_header = False
    config.keep_alive_timeout = limits.keep_alive
    return config
