"""One HTTP/1.1 connection on a trio stream: one request at a time, each read handed on as one chunk.

h11 speaks for it as soon as anything is not plain (``heads``, ``chunked``), and not before.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Protocol, runtime_checkable

import h11
import httpx
import trio

from .chunked import LAST_CHUNK, ChunkedReader
from .heads import PLAIN_HEAD, AnswerHead, PreparedHead, parse_plain_head
from .network import is_readable, read_into
from .tcp import READ_BYTES, Take

MAX_HEAD_BYTES = 65_536
"""A response head that is still incomplete past this many bytes is refused."""

HTTP = b"HTTP/"
"""What the head of a response begins with."""

_END_OF_HEAD = b"\r\n\r\n"
_PLAIN_METHODS = (b"GET", b"POST")

STALE_SECONDS = 1.0
"""A server that had closed a connection says so one round trip after the request; one that closes later had the
request, and may have let the model work on it."""

CLOSE_SECONDS = 1.0
"""Limit of the shield around a forceful close, which by trio's contract does not block at all."""


class ErrorTable:
    """``with TABLE:`` raises httpx's error for what the layers below raise, with the original as its cause."""

    def __init__(self, meanings: dict[type[Exception], type[httpx.TransportError]]) -> None:
        self._meanings = meanings

    def __enter__(self) -> None:
        """Nothing to prepare; the table has no state."""

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Raise the error that the table names for ``exc``; what it does not name passes."""
        if exc is None:
            return
        for raised, meaning in self._meanings.items():
            if isinstance(exc, raised):
                raise meaning(str(exc) or repr(exc)) from exc


CONNECTING = ErrorTable(
    {
        OSError: httpx.ConnectError,  # gaierror and ssl.SSLError are among them
        UnicodeError: httpx.ConnectError,  # a name that DNS cannot hold, as "a..b"
        trio.BrokenResourceError: httpx.ConnectError,
    }
)
WRITING = ErrorTable({h11.LocalProtocolError: httpx.LocalProtocolError})
READING = ErrorTable({h11.RemoteProtocolError: httpx.RemoteProtocolError})
READING_AFTER_THE_END = ErrorTable({h11.RemoteProtocolError: httpx.ReadError})
"""Once the server has closed, what is incomplete was cut: a broken connection, and nothing against its HTTP."""


_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


def _as_read_error(error: Exception) -> httpx.ReadError:
    return httpx.ReadError(str(error) or repr(error))


@runtime_checkable
class Forwarding(Protocol):
    """A stream that ends at a proxy which forwards requests one by one, and so has to be told where each one goes."""

    def forwarded(self, head: h11.Request) -> h11.Request:
        """The head as the proxy wants it."""
        ...


class Connection:
    """A stream and the state of HTTP/1.1 on it. Whoever holds it closes it, or renews it for the next request.

    ``written`` and ``answered`` tell of the latest request: all of it was sent; a first response byte came.
    ``stale`` tells that it failed as on a connection that was closed while idle, so that nobody worked on it: it could
    not be written, or the server closed without a byte at most ``STALE_SECONDS`` later.
    """

    __slots__ = (
        *("_asked", "_chunks", "_closed", "_ended", "_fault", "_forwarding", "_http", "_may_have_body", "_parsed"),
        *("_plain", "_reading", "_stream", "answered", "stale", "written"),
    )

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._forwarding = stream if isinstance(stream, Forwarding) else None
        self._http: h11.Connection | None = None
        self._asked: PreparedHead | None = None
        self._may_have_body = True
        self._plain = False
        self._parsed = b""
        self._chunks: ChunkedReader | None = None
        self._fault: h11.RemoteProtocolError | None = None
        self._reading = READING
        self._ended = self._closed = False
        self.written = False
        self.answered = False
        self.stale = False

    async def request(
        self, head: h11.Request | PreparedHead, content: bytes, on_written: Callable[[], object]
    ) -> AnswerHead:
        """Send a request in one write and read the head of its response, skipping interim (1xx) ones.

        A server may answer and hang up before it has read everything (413): then its answer counts, not the failed
        write. ``on_written`` is called once the request is written.

        Raises:
            httpx.TransportError: as the tables say; the connection is good for nothing but closing.
        """
        self.written = self.answered = self.stale = False
        unwritten: httpx.WriteError | None = None
        try:
            await self._stream.send_all(self._whole(head, content))
        except _BROKEN as exc:
            unwritten = httpx.WriteError(str(exc) or repr(exc))
            unwritten.__cause__ = exc
        else:
            self.written = True
            on_written()
        written_at = trio.current_time()
        try:
            return await self._read_head()
        except httpx.TransportError:
            in_time = trio.current_time() - written_at <= STALE_SECONDS
            self.stale = not self.answered and (unwritten is not None or in_time)
            if unwritten is not None:
                raise unwritten from unwritten.__cause__
            raise

    async def receive(self, take: Take | None = None) -> bytes:
        """All body bytes that one read brought, as one chunk; b"" at the end of the body.

        ``take`` is handed what comes while this waits, where that can be read without waking this task: it goes on
        waiting for what comes after, and returns b"" if ``take`` has enough. A chunk that is returned was not taken.

        An error or a cancellation in here, and what ``take`` raises, closes the connection.

        Raises:
            httpx.ReadError: the connection broke or ended; what came before is returned first.
            httpx.RemoteProtocolError: the body is malformed; what came before is returned first.
        """
        try:
            while not self._parsed and not self._ended:
                if self._fault is not None:
                    with self._reading:
                        raise self._fault
                if take is None:
                    self._take_body(bytes(await self._stream.receive_some(READ_BYTES)))
                elif await self._hand_on(take):
                    break
        except _BROKEN as exc:
            await self.aclose()
            raise _as_read_error(exc) from exc
        except BaseException:
            await self.aclose()
            raise
        chunk, self._parsed = self._parsed, b""
        return chunk

    async def _hand_on(self, take: Take) -> bool:
        """Hand on what comes, up to something that is not plain, which is then there for ``receive``; True: enough."""
        enough = False

        def take_chunks(data: bytes) -> bool:
            nonlocal enough
            self._take_body(data)
            if self._ended or self._fault is not None:
                return False
            if chunk := self._parsed:
                self._parsed = b""
                enough = not take(chunk)
            return not enough

        await read_into(self._stream, take_chunks)
        return enough

    @property
    def finished(self) -> bool:
        """Whether the body was received to its end."""
        return self._ended and not self._parsed

    def renew(self) -> bool:
        """Make ready for another request; False if this connection must be closed instead."""
        if self._closed or not (self.written and self.finished):
            return False
        if self._http is not None:
            leftover, closed = self._http.trailing_data
            kept = self._http.our_state is self._http.their_state is h11.DONE  # else one said "Connection: close"
            if leftover or closed or not kept:
                return False
        self._http, self._asked = None, None
        self._ended = self._plain = False
        return True

    def leftover(self) -> bytes:
        """What came after the head of an answer to CONNECT: the first bytes of the tunnel."""
        return self._h11().trailing_data[0]

    def is_readable(self) -> bool:
        """Whether the server has closed this idle connection or spoken out of turn; False where nothing can tell."""
        return is_readable(self._stream)

    async def aclose(self) -> None:
        """Close at once: does not block and does not raise, also under cancellation. Idempotent."""
        self._closed = True
        with trio.move_on_after(CLOSE_SECONDS, shield=True):
            await trio.aclose_forcefully(self._stream)

    def _whole(self, head: h11.Request | PreparedHead, content: bytes) -> bytes:
        """The request as it is written."""
        if isinstance(head, PreparedHead):
            if self._forwarding is None:
                self._asked = head
                return head.with_content(content)
            head = head.with_length(content)
        with WRITING:
            if self._forwarding is not None:
                head = self._forwarding.forwarded(head)
            self._may_have_body = head.method in _PLAIN_METHODS
            http = self._h11()
            events = (head, h11.Data(data=content), h11.EndOfMessage())
            return b"".join(http.send(event) or b"" for event in events)

    def _h11(self) -> h11.Connection:
        """h11 as it would be by now, had it been there from the beginning of this request."""
        if self._http is None:
            self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
            if self._asked is not None:
                self._http.send(self._asked.head)
                self._http.send(h11.EndOfMessage())
            if self._plain:
                self._http.receive_data(PLAIN_HEAD)
                self._parse_head(self._http)
        return self._http

    async def _read_head(self) -> AnswerHead:
        while True:
            try:
                data = bytes(await self._stream.receive_some(READ_BYTES))
            except _BROKEN as exc:
                raise _as_read_error(exc) from exc
            if not data:
                self._reading = READING_AFTER_THE_END
                if not self.answered:
                    raise httpx.ReadError("the server closed the connection without an answer")
            self.answered = True
            if self._http is None and (plain := parse_plain_head(data)) is not None:
                head, length = plain
                self._plain, self._chunks = True, ChunkedReader()
                if len(data) > length:
                    self._take_body(data[length:])
                return head
            with self._reading:
                answer = self._take_head(self._h11(), data)
            if answer is not None:
                return AnswerHead.of(
                    answer.status_code, answer.headers.raw_items(), answer.http_version, bytes(answer.reason)
                )

    def _take_head(self, http: h11.Connection, data: bytes) -> h11.Response | None:
        """The head, if it is whole with what one read brought; what came behind it is taken too."""
        end_of_head = data.find(_END_OF_HEAD) + len(_END_OF_HEAD)
        if end_of_head < len(_END_OF_HEAD):
            end_of_head = len(data)
        http.receive_data(data[:end_of_head])
        head = self._parse_head(http)
        rest = data[end_of_head:]
        if head is not None:
            self._chunks = ChunkedReader() if self._is_plain(http, head) else None
            if rest:
                self._take_body(rest)
            else:
                self._parse_body()
            return head
        if rest:
            http.receive_data(rest)
            head = self._parse_head(http)
        if head is not None:
            self._parse_body()
        return head

    def _is_plain(self, http: h11.Connection, head: h11.Response) -> bool:
        """Whether the body comes in chunks, of which h11 has seen nothing yet."""
        if not self._may_have_body or head.status_code != httpx.codes.OK or http.trailing_data[0]:
            return False
        return [value for name, value in head.headers if name == b"transfer-encoding"] == [b"chunked"]

    def _parse_head(self, http: h11.Connection) -> h11.Response | None:
        while (event := http.next_event()) is not h11.NEED_DATA:
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError("the server switched to another protocol")
        if not HTTP.startswith(http.trailing_data[0][: len(HTTP)]):
            raise h11.RemoteProtocolError("the server speaks another protocol")  # h11 would wait for a blank line
        return None

    def _take_body(self, data: bytes) -> None:
        """Take what one read brought, up to the body's end or a fault, which ``receive`` raises afterwards."""
        if not data:
            self._reading = READING_AFTER_THE_END
        chunks = self._chunks
        if chunks is None or not data:
            self._h11().receive_data(data)
            self._parse_body()
            return
        self._parsed = chunks.feed(data)
        if chunks.rest is None:
            self._fault = chunks.fault
            return
        self._chunks = None
        if self._http is None and chunks.rest == LAST_CHUNK:
            self._ended = True
            return
        self._h11().receive_data(chunks.rest)
        self._parse_body()

    def _parse_body(self) -> None:
        """Take what the last read brought, up to the body's end or a fault, which ``receive`` raises afterwards."""
        parts: list[bytes] = []
        http = self._h11()
        try:
            while not self._ended:
                event = http.next_event()
                if isinstance(event, h11.Data):
                    parts.append(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    self._ended = True
                else:
                    break
        except h11.RemoteProtocolError as exc:
            self._fault = exc
        self._parsed += b"".join(parts)


class ResponseBody(httpx.AsyncByteStream):
    """The body of a response, owning its connection until it is closed; iterate it or call ``receive``.

    It is its own iterator, not a generator: leaving the loop early leaves nothing behind for the garbage collector.
    """

    def __init__(self, connection: Connection, release: Callable[[Connection], Awaitable[None]]) -> None:
        self._connection: Connection | None = connection
        self._release = release
        self._finished = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        """The chunks that ``receive`` returns."""
        return self

    async def __anext__(self) -> bytes:
        """The next chunk."""
        if chunk := await self.receive():
            return chunk
        raise StopAsyncIteration

    def receive(self, take: Take | None = None) -> Awaitable[bytes]:
        """All that one read brought, as one chunk; b"" at the end of the body, and again after it.

        ``take``, and what closes the connection: as ``Connection.receive``.

        Raises:
            httpx.ReadError, httpx.RemoteProtocolError: as ``Connection.receive``.
            httpx.StreamClosed: the body was closed before its end.
        """
        return _nothing_more(self._finished) if self._connection is None else self._connection.receive(take)

    @property
    def finished(self) -> bool:
        """Whether it was received to its end."""
        return self._finished if self._connection is None else self._connection.finished

    async def drain(self, limit_seconds: float, limit_bytes: int) -> None:
        """Throw the rest away so that the connection can be used again; past a limit close it."""
        try:
            with trio.move_on_after(limit_seconds), contextlib.suppress(httpx.TransportError, httpx.StreamClosed):
                while chunk := await self.receive():
                    limit_bytes -= len(chunk)
                    if limit_bytes < 0:
                        await self.discard()
        finally:
            await self.aclose()

    async def discard(self) -> None:
        """Close the connection, even if the body came to its end: its server sent what makes one doubt it."""
        if self._connection is not None:
            await self._connection.aclose()
        await self.aclose()

    async def aclose(self) -> None:
        """Give a connection whose body was read to its end back, close any other at once. Never blocks; idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._finished = connection.finished
            await self._release(connection)


async def _nothing_more(finished: bool) -> bytes:
    """What a body that was closed has to say."""
    if finished:
        return b""
    raise httpx.StreamClosed
