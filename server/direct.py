"""Requests that are answered on their own connection: no ASGI, no Quart, no Hypercorn, no h11 on the way.

A plain request for a run's events (``Route.direct``) needs nothing of what these do for others: a head as every client
writes it, a body whose length it tells, nothing behind it. Its handler is the same, and so is its answer. What is not
plain, by one byte, goes their way.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from time import time
from typing import Protocol, TypeAlias
from wsgiref.handlers import format_date_time

import trio
from quart import Response
from werkzeug.datastructures import ImmutableMultiDict

from .asked import Asked, PlainHeaders
from .errors import bare_answer
from .requests import JSON_MEDIA_TYPE
from .sse import STREAM_HEADERS, DirectWriter, EventStreamBody, reading

DIRECT = "lumos.direct"
"""The key of an app's ``DirectRoutes`` among its extensions."""

CLEANUP_SECONDS = 5.0
_END_OF_HEAD = b"\r\n\r\n"

_HEAD = re.compile(rb"POST (/[!-~]*) HTTP/1\.1\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~]*\r\n)+)\r\n")
_FIELD = re.compile(r"([^:\r\n]+):[\t ]*([^\r\n]*?)[\t ]*\r\n")
_HOST = re.compile(r"[\w.-]+(:\d{1,5})?", re.ASCII)
_LENGTH = re.compile(r"\d{1,6}", re.ASCII)
_NOT_PLAIN = frozenset({"transfer-encoding", "expect", "upgrade", "content-encoding", "trailer", "te"})
_NO_ARGS: ImmutableMultiDict[str, str] = ImmutableMultiDict()
_CUT_OFF = bare_answer("the server is shutting down")

_logger = logging.getLogger("lumos.serving")


class DirectRequest:
    """A plain request: a POST of JSON, whose path has no query.

    Attributes:
        ids: in its path, once it is known whose it is.
        missing: how many bytes of its body are still to come.
    """

    __slots__ = ("_body", "headers", "ids", "missing", "target")

    method = "POST"
    args = _NO_ARGS
    mimetype = JSON_MEDIA_TYPE

    def __init__(self, target: bytes, headers: PlainHeaders, body: bytes, missing: int) -> None:
        self.target = target
        self.ids: Mapping[str, str] = {}
        self.headers = headers
        self.missing = missing
        self._body = body

    async def get_data(self, cache: bool = False) -> bytes:  # noqa: ARG002, ASYNC910 - it is all there
        """The body."""
        return self._body


Respond: TypeAlias = Callable[[Asked, Mapping[str, str]], Awaitable[Response | EventStreamBody]]
"""From a request, and the ids in its path, to its answer, a refusal too. Raises only what cancels it."""


def plain_request(data: bytes) -> DirectRequest | None:
    """The request that these bytes are, or begin; None if it is not as plain as can be, or something comes behind."""
    head = _HEAD.match(data)
    if head is None:
        return None
    fields = _FIELD.findall(head[2].decode())
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
    return DirectRequest(head[1], PlainHeaders(values), body, int(length) - len(body))


Found: TypeAlias = "tuple[DirectAnswer | None, bytes]"


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
        """The answer to the request that these bytes are, None if others have to give it; and all bytes that came.

        These are more than before where a body had not come with its head.
        """
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
                asked.ids = {name: text.decode() for name, text in match.groupdict().items()}
                return DirectAnswer(route.respond, asked), data
        return None, data


class DirectConnection(DirectWriter, Protocol):
    """The connection that an answer is for.

    Attributes:
        client_left: while it was being answered.
    """

    client_left: bool


class DirectAnswer:
    """The answer to one plain request.

    Attributes:
        is_whole: whether it was sent to its end; else the connection is good for nothing any more.
    """

    __slots__ = ("_asked", "_head_sent", "_respond", "is_whole")

    def __init__(self, respond: Respond, asked: DirectRequest) -> None:
        self.is_whole = False
        self._respond = respond
        self._asked = asked
        self._head_sent = False

    async def send_to(self, connection: DirectConnection) -> None:
        """Send it. A client that still waits when this is cancelled is told so: serving ends.

        Of a request nothing stays in memory while its events come.
        """
        try:
            answer = await self._respond(self._asked, self._asked.ids)
            del self._asked
            if isinstance(answer, EventStreamBody):
                with reading(answer):  # from before its head
                    self._head_sent = True
                    await answer.send(connection, _stream_head(answer.take_headers()))
                    self.is_whole = True
            else:
                content = await answer.get_data(as_text=False)
                self._head_sent = True
                await connection.write(_head(answer.status_code, answer.headers.items()) + content)
                self.is_whole = True
        except* Exception:
            _logger.exception("an answer broke off")
        finally:
            if not (self._head_sent or connection.client_left):
                with trio.move_on_after(CLEANUP_SECONDS, shield=True):
                    await connection.write(_CUT_OFF)


def _head(status: int, headers: Iterable[tuple[str, str]]) -> bytes:
    """The head of an answer, without what is not true of a 204 (RFC 9110, section 8.6)."""
    untrue = ("content-length", "content-type") if status == HTTPStatus.NO_CONTENT else ()
    own = [(name, value) for name, value in headers if name.lower() not in untrue]
    return b"HTTP/1.1 %d \r\n%bdate: %b\r\n\r\n" % (status, _lines(own), _date(int(time())))


def _stream_head(headers: Iterable[tuple[str, str]]) -> bytes:
    """The head of a stream, which has these headers beside those of every stream."""
    return b"%b%bdate: %b\r\n\r\n" % (_STREAM, _lines(headers), _date(int(time())))


def _lines(headers: Iterable[tuple[str, str]]) -> bytes:
    return "".join([f"{name.lower()}: {value}\r\n" for name, value in headers]).encode()


@lru_cache(maxsize=1)
def _date(seconds: int) -> bytes:
    return format_date_time(seconds).encode()


_STREAM = b"HTTP/1.1 200 \r\ntransfer-encoding: chunked\r\n" + _lines(STREAM_HEADERS.items())
