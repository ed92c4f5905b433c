"""A WebSocket client over any stream, in memory or real: wsproto's protocol, and nothing that the test does not see."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)

from server.testing.memory_connection import Direction
from tests.harness.world import LUMOS, World

SOCKET_PATH = "/api/v1/ws"
SUBPROTOCOL = "lumos.v1"


class RefusedError(Exception):
    """The server answered the handshake with HTTP."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"{status} {body!r}")
        self.status = status
        self.body = body

    def json(self) -> Any:
        """The body as JSON."""
        return msgspec.json.decode(self.body)


class SocketClosedError(Exception):
    """The server closed: with a close frame (``code``, ``reason``), or without one (``code`` is None)."""

    def __init__(self, code: int | None, reason: str | None) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


class WebSocketClient:
    """One socket; closing the stream is the caller's.

    Attributes:
        stream: a ``MemoryStream`` or a ``trio.SocketStream``.
        answers_pings: whether it does, as every browser.
        pings: when the server's came.
        heard: every message with its time on trio's clock.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.answers_pings = True
        self.pings: list[float] = []
        self.heard: list[tuple[float, Any]] = []
        self.subprotocol: str | None = None
        self.extensions: Sequence[Any] = ()
        self._ws = WSConnection(ConnectionType.CLIENT)
        self._unheard: deque[Event] = deque()
        self._text: list[str] = []

    async def shake_hands(
        self,
        path: str = SOCKET_PATH,
        subprotocols: Sequence[str] = (SUBPROTOCOL,),
        headers: dict[str, str] | None = None,
        host: str = "lumos",
        extensions: Sequence[Any] = (),
    ) -> None:
        """Open the socket.

        Raises:
            RefusedError: the server did not want to.
        """
        more = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        request = Request(
            host=host, target=path, subprotocols=list(subprotocols), extra_headers=more, extensions=list(extensions)
        )
        await self.stream.send_all(self._ws.send(request))
        status, body = 0, b""
        while True:
            match await self._event():
                case AcceptConnection() as accepted:
                    self.subprotocol, self.extensions = accepted.subprotocol, accepted.extensions
                    return
                case RejectConnection(status_code=status, has_body=has_body):
                    if not has_body:
                        raise RefusedError(status, b"")
                case RejectData(data=data, body_finished=finished):
                    body += data
                    if finished:
                        raise RefusedError(status, body)

    async def say(self, kind: str, **fields: Any) -> None:
        """Send a message of that type."""
        await self.say_text(msgspec.json.encode({"type": kind} | fields).decode())

    async def say_text(self, text: str) -> None:
        """Send a text message."""
        await self.stream.send_all(self._ws.send(TextMessage(data=text)))

    async def say_bytes(self, data: bytes) -> None:
        """Send a binary message."""
        await self.stream.send_all(self._ws.send(BytesMessage(data=data)))

    async def ping(self) -> None:
        """Send the protocol's own ping."""
        await self.stream.send_all(self._ws.send(Ping(payload=b"x")))

    async def close(self) -> None:
        """Say goodbye, and wait for the server to."""
        await self.stream.send_all(self._ws.send(CloseConnection(code=1000)))
        assert (await self.wait_closed()).code == 1000

    async def hear(self) -> Any:
        """The next message.

        Raises:
            SocketClosedError: there will be none.
        """
        while True:
            match await self._event():
                case TextMessage(data=data, message_finished=finished):
                    self._text.append(data)
                    if finished:
                        message = msgspec.json.decode("".join(self._text))
                        self._text.clear()
                        self.heard.append((trio.current_time(), message))
                        return message
                case Ping() as ping:
                    self.pings.append(trio.current_time())
                    if self.answers_pings:
                        await self.stream.send_all(self._ws.send(ping.response()))
                case Pong():
                    return "pong"
                case CloseConnection(code=code, reason=reason):
                    raise SocketClosedError(code if code != 1006 else None, reason)

    async def hear_until(self, kind: str, **fields: Any) -> Any:
        """The next message of that type with these fields; what comes before it is in ``heard``."""
        while True:
            message = await self.hear()
            if message["type"] == kind and fields.items() <= message.items():
                return message

    async def ask(self, kind: str, **fields: Any) -> Any:
        """Send a message; the next one that comes."""
        await self.say(kind, **fields)
        return await self.hear()

    async def wait_closed(self) -> SocketClosedError:
        """Hear to the end; how it came."""
        while True:  # noqa: ASYNC913 - what has come already need not be waited for
            try:
                await self.hear()
            except SocketClosedError as closed:
                return closed

    async def _event(self) -> Event:
        while not self._unheard:
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:
                data = b""
            self._ws.receive_data(data or None)
            self._unheard.extend(self._ws.events())
        return self._unheard.popleft()


@asynccontextmanager
async def open_socket(world: World, **handshake: Any) -> AsyncIterator[WebSocketClient]:
    """A socket to Lumos in the world; the connection is closed after the block, without a goodbye."""
    stream = await world.network.connect(*LUMOS)
    async with stream:
        client = WebSocketClient(stream)
        await client.shake_hands(**handshake)
        yield client


def count_writes(direction: Direction) -> list[bytes]:
    """What is written there from now on, write by write; with a window that has room for each."""
    writes: list[bytes] = []
    put = direction.put

    def counted(data: memoryview) -> int:
        writes.append(bytes(data))
        return put(data)

    direction.put = counted  # type: ignore[method-assign]
    return writes
