"""httpx's transport to model servers: HTTP/1.1 on trio, with a pool in which nobody ever waits.

httpcore's pool leaks slots when a request is cancelled (encode/httpcore#1093), makes requests queue and slows down
with every idle connection. Here a connection belongs to a request, or is idle, or is closed. How many may be open is
decided before a run starts, so there is no queue, no lock and no task: nothing that a cancellation could leave behind.
HTTP/2 is left out on purpose: a cancelled request would go on at the server, and be paid for (encode/httpcore#1022).
"""

from __future__ import annotations

import math
import ssl
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import NamedTuple

import h11
import httpx
import trio

from .connection import CONNECTING, WRITING, Connection, ResponseBody
from .heads import AnswerHead, PreparedHead
from .network import Connect, TcpConnect

__all__ = ["Connect", "Prepared", "ResponseBody", "TrioTransport"]

EXPIRED_AT_ONCE = 4
"""How many expired connections a request closes when it takes and when it releases its own: 70 µs each."""

_PORTS = {"http": 80, "https": 443}


class _Origin(NamedTuple):
    scheme: str
    host: str
    port: int


class Prepared(NamedTuple):
    """A request but for its body: where it goes, and its head."""

    origin: _Origin
    head: PreparedHead | h11.Request

    @classmethod
    def of(cls, request: httpx.Request) -> Prepared:
        """Taken from a request without a body.

        Raises:
            httpx.LocalProtocolError, httpx.UnsupportedProtocol: it cannot be sent as it is.
        """
        headers = [(name, value) for name, value in request.headers.raw if name.lower() != b"content-length"]
        with WRITING:
            head = PreparedHead(h11.Request(method=request.method, target=request.url.raw_path, headers=headers))
        return cls(_origin_of(request.url), head)


class _Idle(NamedTuple):
    origin: _Origin
    expires_at: float


_NO_IDLE = _Idle(_Origin("", "", 0), math.inf)


class TrioTransport(httpx.AsyncBaseTransport):
    """Use as ``httpx.AsyncClient(transport=TrioTransport())``; the client closes it.

    ``connect`` opens its streams; without one it is ``TcpConnect(ssl_context)``.

    Keeps up to ``max_idle`` idle connections per origin, each for ``idle_seconds`` on trio's clock; the one used last
    is used next. The default of 60 s stays below what firewalls and load balancers forget without a word (350 s at
    AWS, 240 s at Azure). Expired connections are closed by the next requests, whatever their origin, a few by each.

    Sets no deadlines, and ignores httpx's ``timeout`` extension: put a cancel scope around. A cancellation closes the
    connection. A request body is read whole before anything is sent. Proxies are a matter of ``connect``; no HTTP/2.

    Extensions: the request's ``request_sent``, a callable without arguments, is called exactly once, when the request
    has been written; the response's ``body`` is its ``ResponseBody``, to be read past httpx's chain of generators.
    """

    def __init__(
        self,
        connect: Connect | None = None,
        *,
        ssl_context: ssl.SSLContext | None = None,
        max_idle: int = 100,
        idle_seconds: float = 60.0,
    ) -> None:
        self._connect = connect or TcpConnect(ssl_context)
        self._max_idle = max_idle
        self._idle_seconds = idle_seconds
        self._idle: OrderedDict[Connection, _Idle] = OrderedDict()  # of all origins, the next to expire first
        self._idle_at: defaultdict[_Origin, deque[Connection]] = defaultdict(deque)  # in the same order
        self._first_expires_at = math.inf  # or earlier
        self._in_use: dict[Connection, _Origin] = {}
        self._closed = False

    @property
    def open_connections(self) -> int:
        """How many connections requests and unclosed responses hold."""
        return len(self._in_use)

    @property
    def idle_connections(self) -> int:
        """How many connections wait for a request, expired ones included."""
        return len(self._idle)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send ``request`` and return its response once the head is there; the caller closes the response.

        A reused connection that the server closed before any byte of an answer, and at once, is replaced by a fresh
        one, once: servers close idle connections at any time (RFC 9112, section 9.3.1). One that closes only after
        ``STALE_SECONDS`` of silence is not: the request may have reached the model, which would be paid twice.

        Raises:
            httpx.ConnectError: nobody there, no such name, certificate refused, or a proxy wants credentials.
            httpx.WriteError, httpx.ReadError: the connection broke, or ended before the answer did.
            httpx.RemoteProtocolError: the server's answer is not HTTP.
            httpx.LocalProtocolError, httpx.UnsupportedProtocol: the request cannot be sent as it is.
        """
        origin = _origin_of(request.url)
        content = await request.aread()
        on_written: Callable[[], object] = request.extensions.get("request_sent", _ignore)
        with WRITING:
            head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
        answer, body = await self.post(Prepared(origin, head), content, on_written)
        return httpx.Response(
            answer.status_code,
            headers=answer.headers,
            stream=body,
            extensions={"http_version": b"HTTP/" + answer.http_version, "reason_phrase": answer.reason, "body": body},
        )

    async def post(
        self, prepared: Prepared, content: bytes, on_written: Callable[[], object]
    ) -> tuple[AnswerHead, ResponseBody]:
        """As ``handle_async_request``, without making httpx's objects; the caller closes the body.

        Raises:
            httpx.TransportError: as there; without a ``request``.
        """
        origin, head = prepared
        if connection := await self._take_idle(origin):
            try:
                return await self._exchange(origin, connection, head, content, on_written)
            except httpx.NetworkError:
                if self._closed or not connection.stale:
                    raise
            if connection.written:
                on_written = _ignore
        connection = await self._open(origin)
        return await self._exchange(origin, connection, head, content, on_written)

    async def aclose(self) -> None:
        """Close every connection, also those in use: their requests fail with ``httpx.ReadError``."""
        self._closed = True
        doomed = [*self._in_use, *self._idle]
        self._in_use.clear()
        self._idle.clear()
        for idle in self._idle_at.values():
            idle.clear()
        for connection in doomed:
            await connection.aclose()

    async def _open(self, origin: _Origin) -> Connection:
        with CONNECTING:
            stream = await self._connect(origin.host, origin.port, origin.scheme == "https")
        connection = Connection(stream)
        if self._closed:
            await connection.aclose()
            raise httpx.ConnectError("the transport was closed")
        return connection

    async def _exchange(
        self,
        origin: _Origin,
        connection: Connection,
        head: h11.Request | PreparedHead,
        content: bytes,
        on_written: Callable[[], object],
    ) -> tuple[AnswerHead, ResponseBody]:
        self._in_use[connection] = origin
        body = ResponseBody(connection, self._release)
        try:
            answer = await connection.request(head, content, on_written)
            if answer.status_code == httpx.codes.PROXY_AUTHENTICATION_REQUIRED:
                raise httpx.ConnectError("the proxy on the way wants credentials, or other ones (HTTP 407)")
        except BaseException:
            await body.aclose()
            raise
        return answer, body

    async def _take_idle(self, origin: _Origin) -> Connection | None:
        now = trio.current_time()
        if now >= self._first_expires_at:
            await self._close_expired(now)
        idle = self._idle_at[origin]
        while idle and now < self._idle[idle[-1]].expires_at:
            connection = idle.pop()
            del self._idle[connection]
            if not connection.is_readable():
                return connection
            await connection.aclose()
        return None

    async def _release(self, connection: Connection) -> None:
        origin = self._in_use.pop(connection, None)
        if origin is None or not connection.renew():
            await connection.aclose()
            return
        now = trio.current_time()
        expires_at = now + self._idle_seconds
        idle = self._idle_at[origin]
        idle.append(connection)
        self._idle[connection] = _Idle(origin, expires_at)
        if len(idle) > self._max_idle:
            await self._close_oldest(origin)
        self._first_expires_at = min(self._first_expires_at, expires_at)
        if now >= self._first_expires_at:
            await self._close_expired(now)

    async def _close_expired(self, now: float) -> None:
        for _ in range(EXPIRED_AT_ONCE):
            origin, self._first_expires_at = next(iter(self._idle.values()), _NO_IDLE)
            if now < self._first_expires_at:
                return
            await self._close_oldest(origin)

    async def _close_oldest(self, origin: _Origin) -> None:
        connection = self._idle_at[origin].popleft()
        del self._idle[connection]
        await connection.aclose()


def _origin_of(url: httpx.URL) -> _Origin:
    if url.scheme not in _PORTS:
        raise httpx.UnsupportedProtocol(f"cannot send a request to {url.scheme or 'no scheme'!r}")
    return _Origin(url.scheme, url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme])


def _ignore() -> None:
    """Stands for a callable that nobody gave, or that has been called."""
