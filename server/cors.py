"""CORS: which pages of other origins may read answers. None, unless the operator names them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Protocol

from quart import Request, Response

from .asked import Asked

ANY_ORIGIN = "*"
PREFLIGHT_SECONDS = 600
METHODS = "GET, POST, PUT, PATCH, DELETE"
REQUEST_HEADERS = "Authorization, X-API-Key, Content-Type, Last-Event-ID, Idempotency-Key, If-Match"
ANSWER_HEADERS = "X-Run-Id, X-Session-Id, X-Batch-Id, Location, Retry-After, ETag"

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")


class Marked(Protocol):
    """An answer, or a stream that is one."""

    @property
    def headers(self) -> Any:
        """Of the answer; may be set."""
        ...


class Cors:
    """The origins that may read answers; ``*`` is every one. Credentials (cookies) are never asked for: there are none.

    Raises:
        ValueError: an origin that no browser sends, or ``*`` for a server without keys.
    """

    def __init__(self, origins: Iterable[str] = (), *, keyed: bool = False) -> None:
        self._origins = frozenset(map(parse_origin, origins))
        self._any = ANY_ORIGIN in self._origins
        if self._any and not keyed:
            raise ValueError("without API keys every page on the web could use this server: name the origins, not *")

    def allows(self, origin: str) -> bool:
        """Whether pages of that origin may read answers."""
        return self._any or origin in self._origins

    def answer_preflight(self, request: Request) -> Response | None:
        """The answer to a browser that asks before it sends; None if this is no such question or the answer is no."""
        asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if not asks or not self.allows(request.headers.get("Origin", "")):
            return None
        headers = {
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": REQUEST_HEADERS,
            "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
        }
        return Response(b"", status=204, headers=headers)

    def mark(self, request: Asked, response: Marked) -> None:
        """Let the browser hand the answer to its page, if that is of an allowed origin."""
        if not self._origins:
            return
        vary = response.headers.get("Vary")
        response.headers["Vary"] = f"{vary}, Origin" if vary else "Origin"
        origin = request.headers.get("Origin")
        if origin and self.allows(origin):
            response.headers["Access-Control-Allow-Origin"] = ANY_ORIGIN if self._any else origin
            response.headers["Access-Control-Expose-Headers"] = ANSWER_HEADERS


def parse_origin(text: str) -> str:
    """The origin as browsers send it.

    Raises:
        ValueError: it is none: with a path or without a scheme, or ``null``, which is many.
    """
    origin = text.strip().lower()
    if origin != ANY_ORIGIN and not _ORIGIN.fullmatch(origin):
        raise ValueError(f"{text!r} is not an origin, as https://example.org or http://localhost:3000")
    return origin
