"""The floor: a relay of bare trio sockets, which knows where a message ends and nothing more.

A connection to the upstream goes back into the pool after an answer that ends as a chunked body does; every GET is
answered with 200 here. UPSTREAM and PORT come from the environment.
"""

from __future__ import annotations

import os
import socket
from contextlib import closing, suppress
from urllib.parse import urlsplit

import trio

READ_BYTES = 65_536
LAST_CHUNK = b"0\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
BACKLOG = 2048

Socket = trio.socket.SocketType


class Relay:
    """Its upstream connections, open between two requests, the last used first."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._idle: list[Socket] = []

    async def serve(self, client: Socket) -> None:
        """One client's connection, to its end."""
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client, suppress(OSError):
            while request := await read_request(client):
                if request.startswith(b"GET "):
                    await send_all(client, OK)
                elif not await self._relay(client, request):
                    return

    def close(self) -> None:
        """Close the idle upstream connections; nothing is being served any more."""
        for upstream in self._idle:
            upstream.close()

    async def _relay(self, client: Socket, request: bytes) -> bool:
        """Whether the answer came whole."""
        upstream = self._idle.pop() if self._idle else await self._connect()
        whole = False
        try:
            await send_all(upstream, request)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, client, nursery.cancel_scope)
                whole = await copy_answer(upstream, client)
                nursery.cancel_scope.cancel()
        finally:
            if whole:
                self._idle.append(upstream)
            else:
                upstream.close()
        return whole

    async def _connect(self) -> Socket:
        upstream = trio.socket.socket()
        try:
            await upstream.connect(self._address)
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            upstream.close()
            raise
        return upstream


async def copy_answer(upstream: Socket, client: Socket) -> bool:
    """Until the end of a chunked body, or of either side; whether it was the former."""
    with suppress(OSError):
        while data := await upstream.recv(READ_BYTES):
            await send_all(client, data)
            if data.endswith(LAST_CHUNK):
                return True
    return False


async def watch(client: Socket, relaying: trio.CancelScope) -> None:
    """End the relaying when the client leaves. What it sends before its answer has come is left for later."""
    with suppress(OSError):
        await trio.lowlevel.wait_readable(client)
        if await client.recv(1, socket.MSG_PEEK):
            await trio.sleep_forever()
    relaying.cancel()


async def read_request(client: Socket) -> bytes:
    """One request, head and body; b"" once the client has closed."""
    request = b""
    while data := await client.recv(READ_BYTES):
        request += data
        head, end, body = request.partition(b"\r\n\r\n")
        if end and len(body) >= content_length(head):
            return request
    return b""


def content_length(head: bytes) -> int:
    """What the head says of its body; 0 if nothing."""
    found = head.lower().partition(b"\r\ncontent-length:")[2]
    return int(found.partition(b"\r\n")[0] or 0)


async def send_all(stream: Socket, data: bytes) -> None:
    """All of it, mostly by one call."""
    sent = await stream.send(data)
    while sent < len(data):
        sent += await stream.send(memoryview(data)[sent:])


async def main() -> None:
    """Serve until the process ends."""
    upstream = urlsplit(os.environ["UPSTREAM"])
    relay = Relay(upstream.hostname or "127.0.0.1", upstream.port or 80)
    with closing(relay), trio.socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await listener.bind(("127.0.0.1", int(os.environ["PORT"])))
        listener.listen(BACKLOG)
        async with trio.open_nursery() as nursery:
            while True:
                client, _ = await listener.accept()
                nursery.start_soon(relay.serve, client)


if __name__ == "__main__":
    trio.run(main)
