"""A client of raw bytes: it sends what no HTTP library would, and takes apart what comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from providers.chunked import chunked
from server.testing.memory_connection import MemoryStream
from tests.harness.world import LUMOS, World

CHAT_PATH = "/api/v1/agents/demo/chat/lumosai/stream"
HEAD_END = b"\r\n\r\n"


def request_bytes(method: str, path: str, body: bytes = b"", headers: Sequence[str] = ()) -> bytes:
    """A whole HTTP/1.1 request; a body goes as JSON unless the headers name another type."""
    lines = [f"{method} {path} HTTP/1.1", "Host: lumos", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
        if not any(line.lower().startswith("content-type:") for line in headers):
            lines.append("Content-Type: application/json")
    return "\r\n".join(lines).encode("latin-1") + HEAD_END + body


def chat_request(**body: Any) -> bytes:
    """A request that streams an answer of agent ``demo``."""
    return request_bytes("POST", CHAT_PATH, msgspec.json.encode({"message": "hi"} | body))


def chunks(*parts: bytes) -> bytes:
    """The parts as chunks of a chunked body, without its end."""
    return b"".join(map(chunked, parts))


@dataclass(frozen=True)
class RawAnswer:
    """One response: header names in lower case, the body without its framing."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return msgspec.json.decode(self.body)


class RawClient:
    """One connection; closing the stream is the caller's."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._unread = bytearray()

    async def ask(self, request: bytes) -> RawAnswer:
        """Send the bytes, read one answer."""
        await self.stream.send_all(request)
        return await self.answer()

    async def answer(self) -> RawAnswer:
        """Read one answer whose length its head tells (``Content-Length`` or chunks)."""
        head = await self._read_until(HEAD_END)
        status_line, *lines = head[: -len(HEAD_END)].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body = b"".join([chunk async for chunk in self.body_chunks()])
        else:
            body = await self._read_exactly(int(headers.get("content-length", 0)))
        return RawAnswer(int(status_line.split(" ")[1]), headers, body)

    async def body_chunks(self) -> AsyncIterator[bytes]:
        """The chunks of a chunked body up to its end mark, after its head was read."""
        while size := int(await self._read_until(b"\r\n"), 16):
            yield (await self._read_exactly(size + 2))[:-2]
        await self._read_exactly(2)

    async def read_head(self) -> bytes:
        """Read up to the end of the answer's head."""
        return await self._read_until(HEAD_END)

    async def read_to_end(self) -> bytes:
        """All that comes until the server closes the connection, or resets it."""
        try:
            while data := await self.stream.receive_some():
                self._unread += data
        except trio.BrokenResourceError:
            pass
        return self._take(len(self._unread))

    async def _read_until(self, mark: bytes) -> bytes:
        while mark not in self._unread:
            await self._read_more()
        return self._take(self._unread.index(mark) + len(mark))

    async def _read_exactly(self, count: int) -> bytes:
        while len(self._unread) < count:
            await self._read_more()
        return self._take(count)

    async def _read_more(self) -> None:
        data = await self.stream.receive_some()
        if not data:
            raise EOFError(f"the server closed after {bytes(self._unread)!r}")
        self._unread += data

    def _take(self, count: int) -> bytes:
        taken = bytes(self._unread[:count])
        del self._unread[:count]
        return taken


@asynccontextmanager
async def raw_client(world: World) -> AsyncIterator[RawClient]:
    """A connection to Lumos in the world, closed after the block."""
    stream: MemoryStream = await world.network.connect(*LUMOS)
    async with stream:
        yield RawClient(stream)
