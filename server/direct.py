"""Requests that are answered on their own connection: no ASGI, no Quart, no Hypercorn, no h11 on the way.

A plain request for a run's events (``Route.direct``) needs nothing of what these do for others: a head as every client
writes it, a body whose length it tells, nothing behind it. Its handler is the same, and so is its answer. What is not
plain, by one byte, goes their way.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from time import time
from typing import Any, Protocol, TypeAlias
from wsgiref.handlers import format_date_time

import trio
from quart import Response
from werkzeug.datastructures import Headers, ImmutableMultiDict

from providers.chunked import LAST_CHUNK, chunked

from .asked import Asked
from .errors import bare_answer
from .requests import JSON_MEDIA_TYPE
from .sse import DirectWriter, EventStreamBody, reading

DIRECT = "lumos.direct"
"""The key of an app's ``DirectRoutes`` among its extensions."""

CLEANUP_SECONDS = 5.0
_END_OF_HEAD = b"\r\n\r\n"

_HEAD = re.compile(rb"POST (/[!-~]*) HTTP/1\.1\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~]*\r\n)+)\r\n")
_FIELD = re.compile(rb"([^:\r\n]+):[\t ]*([^\r\n]*?)[\t ]*\r\n")
_HOST = re.compile(r"[\w.-]+(:\d{1,5})?", re.ASCII)
_LENGTH = re.compile(r"\d{1,6}", re.ASCII)
_NOT_PLAIN = frozenset({"transfer-encoding", "expect", "upgrade", "content-encoding", "trailer", "te"})
_NO_ARGS: ImmutableMultiDict[str, str] = ImmutableMultiDict()
_CUT_OFF = bare_answer("the server is shutting down")

_logger = logging.getLogger("lumos.serving")


Respond: TypeAlias = Callable[[Asked, Mapping[str, str]], Awaitable[Response]]
"""From a request, and the ids in its path, to its answer, a refusal too. Raises only what cancels it."""


Found: TypeAlias = tuple[Callable[[], Awaitable[Response]] | None, bytes]
"""What answers, None if others have to; and all of the bytes that came."""


class DirectRequest:
    """A plain request: a POST of JSON, whose path has no query.

    Attributes:
        missing: how many bytes of its body are still to come.
    """

    method = "POST"
    args = _NO_ARGS
    mimetype = JSON_MEDIA_TYPE

    def __init__(self, target: bytes, headers: Headers, body: bytes, missing: int) -> None:
        self.target = target
        self.headers = headers
        self.missing = missing
        self._body = body

    async def get_data(self, cache: bool = False) -> bytes:  # noqa: ARG002, ASYNC910 - it is all there
        """The body."""
        return self._body


def plain_request(data: bytes) -> DirectRequest | None:
    """The request that these bytes are, or begin; None if it is not as plain as can be, or something comes behind."""
    head = _HEAD.match(data)
    if head is None:
        return None
    fields = [(name.decode(), value.decode()) for name, value in _FIELD.findall(head[2])]
    values = {name.lower(): value for name, value in fields}
    if len(values) < len(fields) or not _NOT_PLAIN.isdisjoint(values):
        return None
    length, body = values.get("content-length", ""), data[head.end() :]
    if not _LENGTH.fullmatch(length) or int(length) < len(body):
        return None
    if values.get("content-type") != JSON_MEDIA_TYPE or not _HOST.fullmatch(values.get("host", "")):
        return None
    if values.get("connection", "keep-alive").lower() != "keep-alive":
        return None
    return DirectRequest(head[1], Headers(fields), body, int(length) - len(body))


@dataclass(frozen=True)
class DirectRoute:
    """The paths of one route, ids as named groups, and who answers."""

    path: re.Pattern[bytes]
    respond: Respond


class DirectRoutes:
    """Finds who answers a request directly."""

    def __init__(self, routes: list[DirectRoute]) -> None:
        self._routes = routes

    async def find(self, data: bytes, receive_rest: Callable[[], Awaitable[bytes]]) -> Found:
        """What answers the request that these bytes are, and they with the body that had not come with its head."""
        asked = plain_request(data) if data.startswith(b"POST ") else None
        if asked is None:
            return None, data
        for route in self._routes:
            if match := route.path.fullmatch(asked.target):
                if asked.missing and data.endswith(_END_OF_HEAD):
                    data += await receive_rest()
                    asked = plain_request(data)
                if asked is None or asked.missing:
                    return None, data
                ids = {name: text.decode() for name, text in match.groupdict().items()}
                return partial(route.respond, asked, ids), data
        return None, data


class DirectConnection(DirectWriter, Protocol):
    """The connection that an answer is for."""

    async def write(self, data: bytes) -> None:
        """Write, waiting for the client as long as serving allows; one that is gone is no error. A checkpoint."""
        ...

    def answered(self, *, whole: bool) -> None:
        """The answer is over: the next request may be read, or the connection is good for nothing any more."""
        ...


class DirectAnswer:
    """One such request's answer, in a task of its own: ``run``.

    Attributes:
        is_wanted: whether the client is still there.
        over: set at its end; for who has something to do then.
    """

    def __init__(self, respond: Callable[[], Awaitable[Response]], connection: DirectConnection) -> None:
        self.is_wanted = True
        self.over: trio.Event | None = None
        self._respond = respond
        self._connection = connection
        self._head_sent = self._whole = False

    async def run(self) -> None:
        """Answer. A client that still waits when this is cancelled is told so: serving ends."""
        try:
            await self._send()
        except* Exception:
            _logger.exception("an answer broke off")
        finally:
            if self.is_wanted and not self._head_sent:
                with trio.move_on_after(CLEANUP_SECONDS, shield=True):
                    await self._connection.write(_CUT_OFF)
            if self.over is not None:
                self.over.set()
            self._connection.answered(whole=self._whole)

    async def _send(self) -> None:
        """Send it. Of a request and a response nothing stays in memory while their events come."""
        response = await self._respond()
        del self._respond
        body: Any = response.response
        in_chunks = isinstance(body, EventStreamBody)
        head = _head(response, b"transfer-encoding: chunked\r\n" if in_chunks else b"")
        del response
        with reading(body):
            if in_chunks:
                await self._send_events(head, body)
            else:
                async with body as pieces:
                    content = b"".join([piece async for piece in pieces])
                self._head_sent = True
                await self._connection.write(head + content)
            self._whole = True

    async def _send_events(self, held: bytes, stream: EventStreamBody) -> None:
        """What is there already goes out in one write with the head, the last part in one with the end."""
        stream.writer = self._connection
        self._head_sent = True
        if not stream.is_ready:
            await self._connection.write(held)
            held = b""
        async with stream as pieces:
            async for piece in pieces:
                held += chunked(piece)
                if not stream.is_at_end:
                    await self._connection.write(held)
                    held = b""
        await self._connection.write(held + LAST_CHUNK)


def _head(response: Response, line: bytes = b"") -> bytes:
    """The head of an answer, with one more line; without what is not true of a 204 (RFC 9110, section 8.6)."""
    untrue = ("content-length", "content-type") if response.status_code == HTTPStatus.NO_CONTENT else ()
    fields = [(name.lower(), value) for name, value in response.headers.items()]
    own = "".join([f"{name}: {value}\r\n" for name, value in fields if name not in untrue])
    date = format_date_time(time()).encode()
    return b"HTTP/1.1 %d \r\n%bdate: %b\r\n%b\r\n" % (response.status_code, own.encode(), date, line)
