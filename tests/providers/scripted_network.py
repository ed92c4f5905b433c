"""An in-memory network whose servers follow a script byte by byte: what a transport meets at its worst."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

import h11
import httpx
import trio
from trio.testing import memory_stream_pair

from providers.connection import ResponseBody

URL = "http://model.test/v1/chat"
NOT_MODIFIED = b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n"


def with_length(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """A whole response framed by Content-Length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def chunked_head(*headers: str) -> bytes:
    """The head of a response whose body comes in chunks."""
    return "\r\n".join(["HTTP/1.1 200 OK", "Transfer-Encoding: chunked", *headers, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    """One chunk; an empty one ends the body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def body_of(response: httpx.Response) -> ResponseBody:
    """The response's own body, past httpx's generators."""
    body = response.extensions["body"]
    assert isinstance(body, ResponseBody)
    return body


async def receive_all(response: httpx.Response) -> list[bytes]:
    """The chunks of the body to its end, which ``receive`` then repeats."""
    body, chunks = body_of(response), []
    while data := await body.receive():
        chunks.append(data)
    assert await body.receive() == b""
    return chunks


@dataclass
class Received:
    """A request as the server got it."""

    head: h11.Request
    body: bytes


class ServerEnd:
    """The server's end of one connection. ``client_closed_at`` is when a read of the server found the end.

    ``address`` is the host, the port and whether TLS was asked for; ``stream`` is what it reads and writes.
    """

    def __init__(self, stream: trio.abc.Stream, address: tuple[str, int, bool]) -> None:
        self.stream = stream
        self.address = address
        self.requests: list[Received] = []
        self.closed = False
        self.client_closed_at = math.inf

    async def request(self) -> Received | None:
        """Read one request to its end; None once the client has closed."""
        parser, body = h11.Connection(h11.SERVER), b""
        head: h11.Request | None = None
        while data := await self.stream.receive_some():
            parser.receive_data(bytes(data))
            while (event := parser.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Request):
                    head = event
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    assert head is not None
                    self.requests.append(Received(head, body))
                    return self.requests[-1]
        self.client_closed_at = trio.current_time()
        return None

    async def say(self, *parts: bytes, every: float = 1.0) -> None:
        """Send the parts ``every`` so many seconds, so that each one is one read of the client."""
        for part in parts:
            await self.stream.send_all(part)
            await trio.sleep(every)

    async def wait_client_closed(self) -> None:
        """Wait until the client closes its end."""
        while self.client_closed_at == math.inf:
            await self.request()

    async def aclose(self) -> None:
        """Close the server's end."""
        self.closed = True
        await self.stream.aclose()


class ClientEnd(trio.abc.Stream):
    """The client's end; ``closed`` tells whether the transport closed it, ``writes`` how often it sent."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.closed = False
        self.writes = 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.writes += 1
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        self.closed = True
        await self._stream.aclose()


class WatchingClientEnd(ClientEnd):
    """A client's end that notices when the server has closed, as a real socket does."""

    def __init__(self, stream: trio.abc.Stream, server: ServerEnd) -> None:
        super().__init__(stream)
        self._server = server

    def is_readable(self) -> bool:
        return self._server.closed


Script: TypeAlias = Callable[[ServerEnd], Awaitable[None]]


def answering(*answers: bytes) -> Script:
    """Answer the requests of each connection in turn, the last answer for ever, until the client closes."""

    async def script(server: ServerEnd) -> None:
        while await server.request():
            await server.say(answers[min(len(server.requests), len(answers)) - 1], every=0)

    return script


def saying(*parts: bytes, then_close: bool = False) -> Script:
    """Answer the first request by these parts, a second apart, each one read; then close, or wait for the client."""

    async def script(server: ServerEnd) -> None:
        await server.request()
        await server.say(*parts)
        if then_close:
            await server.aclose()
        else:
            await server.wait_client_closed()

    return script


class ScriptedNetwork:
    """A ``Connect`` whose every connection is served by ``script`` in a task of ``nursery``.

    ``watching`` gives client ends that notice a server's close while idle; ``delay`` is what connecting takes, seconds.
    """

    def __init__(self, nursery: trio.Nursery, script: Script, *, watching: bool = False, delay: float = 0) -> None:
        self.script = script
        self.delay = delay
        self.watching = watching
        self.servers: list[ServerEnd] = []
        self.clients: list[ClientEnd] = []
        self._nursery = nursery

    async def __call__(self, host: str, port: int, tls: bool) -> trio.abc.Stream:
        """Connect."""
        await trio.sleep(self.delay)
        client_stream, server_stream = memory_stream_pair()
        server = ServerEnd(server_stream, (host, port, tls))
        client = WatchingClientEnd(client_stream, server) if self.watching else ClientEnd(client_stream)
        self.servers.append(server)
        self.clients.append(client)
        self._nursery.start_soon(self._serve, server)
        return client

    @property
    def open(self) -> int:
        """How many connections the transport has not closed."""
        return sum(not client.closed for client in self.clients)

    async def _serve(self, server: ServerEnd) -> None:
        # A client that has gone ends its server's script, nothing else.
        try:
            await self.script(server)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            server.client_closed_at = min(server.client_closed_at, trio.current_time())
