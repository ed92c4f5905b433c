"""Hypercorn's WebSocket stream with the cures it needs: what a client sends ends its own socket, and that at once.

Hypercorn 0.18 as it is: bytes in the handshake's headers that are no ASCII crash the connection, and so do frames after
the end; a message that is too large goes on growing in memory; an offered compression is taken, with which 64 KiB
become 64 MiB; a client that never answers is never dropped (trap H10); and an app whose queue is full does not hear
that its client has gone. Nor can it write several messages at once.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, cast

import h11
import trio
from hypercorn.protocol.events import Body, Data, Event, Request, StreamClosed
from hypercorn.protocol.ws_stream import ASGIWebsocketState, WSStream
from hypercorn.typing import AppWrapper, ASGISendCallable, ASGISendEvent
from quart_trio.asgi import TrioASGIWebsocketConnection
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection, Message, Ping, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError

MAX_MESSAGE_BYTES = 2**20
PING_SECONDS = 20.0
SILENCE_SECONDS = 60.0
"""A client that has sent nothing for so long, no answer to a ping either, is gone."""

_NOT_OURS = {b"sec-websocket-extensions"}
"""Compression: each socket would hold its window, and a few bytes could become gigabytes. Declined by not seeing it."""


def is_upgrade(request: h11.Request) -> bool:
    """Whether the request asks for a WebSocket."""
    headers = {name: value.lower() for name, value in request.headers}
    tokens = [token.strip() for token in headers.get(b"connection", b"").split(b",")]
    return request.method == b"GET" and b"upgrade" in tokens and headers.get(b"upgrade", b"").strip() == b"websocket"


def handshake_headers(request: h11.Request) -> list[tuple[bytes, bytes]] | None:
    """The headers without what we decline; None if what is read of them is no ASCII."""
    headers = [(name, value) for name, value in request.headers if name not in _NOT_OURS]
    read = [value for name, value in headers if name == b"connection" or name.startswith(b"sec-websocket-")]
    return headers if all(map(bytes.isascii, read)) else None


class JoiningConnection(TrioASGIWebsocketConnection):
    """Quart-Trio's side of a WebSocket, on which a list of texts is that many messages in one write."""

    async def send_data(self, send: ASGISendCallable, data: Any) -> None:
        """Pass on one message, or a list of them as ASGI does not know it: ``GuardedWSStream`` does."""
        if isinstance(data, list):
            await send(cast(ASGISendEvent, {"type": "websocket.send", "texts": data}))
        else:
            await super().send_data(send, data)


class GuardedWSStream(WSStream):
    """One WebSocket. Its app is cancelled when the client is gone, whatever else is under way."""

    def __init__(self, app: AppWrapper, *args: Any) -> None:
        self._life = trio.CancelScope()
        self._heard_at = trio.current_time()
        self._message_bytes = 0

        async def mortal(*call: Any) -> None:
            with self._life:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._beat)
                    await app(*call)
                    nursery.cancel_scope.cancel(reason="the app has ended")

        super().__init__(cast(AppWrapper, mortal), *args)

    async def handle(self, event: Event) -> None:
        """Take what comes from the client."""
        match event:
            case StreamClosed():
                self.closed = True
                self._life.cancel(reason="the socket is closed")
            case Data() | Body() | Request():
                self._heard_at = trio.current_time()
                await super().handle(event)
            case _:
                await super().handle(event)

    async def app_send(self, message: ASGISendEvent | None) -> None:
        """Take what comes from the app; a checkpoint, also when the client is gone."""
        if self.closed:
            await trio.lowlevel.checkpoint()
        elif message is not None and "texts" in message and self.state is ASGIWebsocketState.CONNECTED:
            await self._send_texts(cast(Any, message)["texts"])
        else:
            await super().app_send(message)

    async def _send_texts(self, texts: list[str]) -> None:
        """Send these messages in one write; none of them to a client that has said goodbye."""
        with suppress(LocalProtocolError):
            data = b"".join([self.connection.send(TextMessage(data=text)) for text in texts])
            await self.send(Data(stream_id=self.stream_id, data=data))

    async def _handle_events(self) -> None:
        for event in self.connection.events():
            match event:
                case Message(data):
                    self._message_bytes += len(data.encode() if isinstance(data, str) else data)
                    if self._message_bytes > MAX_MESSAGE_BYTES:
                        await self._end(CloseReason.MESSAGE_TOO_BIG)
                        return
                    self.buffer.extend(event)
                    if event.message_finished and self.app_put is not None:
                        await self.app_put(self.buffer.to_message())
                        self.buffer.clear()
                        self._message_bytes = 0
                case Ping():
                    await self._send_wsproto_event(event.response())
                case CloseConnection(code) if self.connection.state is ConnectionState.OPEN:
                    await self._end(code)  # what came is no WebSocket frame
                    return
                case CloseConnection():
                    if self.connection.state is ConnectionState.REMOTE_CLOSING:
                        await self._send_wsproto_event(event.response())
                    await self.send(StreamClosed(stream_id=self.stream_id))
                    return

    async def _end(self, code: int) -> None:
        await self._send_wsproto_event(CloseConnection(code=code))
        await self.send(StreamClosed(stream_id=self.stream_id))

    async def _beat(self) -> None:
        """Ping the client, and drop it when it has been silent for too long."""
        ping_at = trio.current_time() + PING_SECONDS
        while not self.closed:
            await trio.sleep_until(min(ping_at, self._heard_at + SILENCE_SECONDS))
            if trio.current_time() >= self._heard_at + SILENCE_SECONDS:
                await self.send(StreamClosed(stream_id=self.stream_id))
            elif trio.current_time() >= ping_at:
                ping_at += PING_SECONDS
                if self.handshake.accepted:
                    await self._send_wsproto_event(Ping())
