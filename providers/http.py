"""The seam to httpx: one client for all vendors, and one way to stream an answer through a vendor's decoder.

httpx is no longer released (its maintainers' words in encode/httpcore#1094), so nothing else under ``providers/``
touches its client; a successor is a change of this module and the transport.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from functools import lru_cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Protocol

import httpx
import msgspec
import trio

from engine.errors import ProviderError, ProviderErrorCode
from engine.pieces import Emit, Piece, RequestSentPiece

from .connection import ResponseBody
from .network import Connect, TcpConnect, Trust
from .proxy import ProxyConnect
from .transport import TrioTransport
from .vendor_errors import error_from_response

DRAIN_SECONDS = 0.5
DRAIN_BYTES = 2
"""What may follow the end mark: the rest of its line end. A server that says more is not asked again on this
connection."""

ERROR_BODY_SECONDS = 2.0
ERROR_BODY_BYTES = 65_536

_logger = logging.getLogger(__name__)
_httpx_logger = logging.getLogger("httpx")

_PROXY_STATUS = re.compile(r"HTTP [0-9]{3}")

_TRANSPORT_ERRORS: tuple[tuple[type[httpx.TransportError], ProviderErrorCode, str], ...] = (
    (httpx.UnsupportedProtocol, "upstream.invalid_request", "the model's URL is neither http nor https"),
    (httpx.LocalProtocolError, "upstream.invalid_request", "the request cannot be sent as HTTP"),
    (httpx.ConnectError, "upstream.connection", "no connection to the model"),
    (httpx.RemoteProtocolError, "upstream.protocol", "the model's server does not speak HTTP"),
    (httpx.TransportError, "upstream.connection", "the connection to the model broke"),
)


class Decoder(Protocol):
    """Turns one answer's bytes into pieces; holds the state of that answer.

    ``content_type`` is what the answer's media type begins with, in lower case.
    """

    content_type: str

    @property
    def done(self) -> bool:
        """Whether the vendor's own end mark was seen: what follows is not part of the answer."""
        ...

    @property
    def overrun(self) -> bool:
        """Whether more of the format followed the end mark in the same chunk. It is ignored."""
        ...

    @property
    def may_end(self) -> bool:
        """Whether the end of the body, now, would be the vendor's own end (vendors without an end mark)."""
        ...

    def feed(self, chunk: bytes, pieces: list[Piece]) -> None:
        """Append the pieces that this chunk completed, also those that came before what raises.

        Raises:
            ProviderError: the vendor reported an error in the stream, what came is not its format, or an event or a
                line is over the bound.
        """
        ...


class VendorRequest(msgspec.Struct, frozen=True):
    """One POST to a vendor. Its ``repr`` leaves out the headers and the URL's query: the key is in one of them."""

    url: str
    headers: Mapping[str, str]
    content: bytes

    def __repr__(self) -> str:
        return f"VendorRequest(url={self.url.partition('?')[0]!r}, {len(self.content)} bytes)"


class _QuietURL(httpx.URL):
    """A URL whose text leaves the query out: httpx logs every one, and Baidu's first API has its key there."""

    def __str__(self) -> str:
        return super().__str__().partition("?")[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


@lru_cache(maxsize=1024)
def _url(text: str) -> _QuietURL:
    """The URL, taken apart once. Raises ``httpx.InvalidURL``."""
    return _QuietURL(text)


class _ModelClient(httpx.AsyncClient):
    """A client that hands requests straight to its transport: 0.3 ms less for each.

    What httpx would do besides is off here: cookies, redirects, hooks.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport, **options: Any) -> None:
        super().__init__(transport=transport, **options)
        self._straight = transport

    async def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        """As httpx's, but for what the class leaves out; a URL with a name and a password takes httpx's own way."""
        if self.is_closed or not stream or options or request.url.userinfo:
            return await super().send(request, stream=stream, **options)
        try:
            response = await self._straight.handle_async_request(request)
        except httpx.RequestError as error:
            error.request = request
            raise
        response.request = request
        _httpx_logger.info('HTTP Request: %s %s "%d"', request.method, request.url, response.status_code)
        return response


def open_client(connect: Connect | None = None, environment: Mapping[str, str] | None = None) -> httpx.AsyncClient:
    """A client for any number of vendors and requests at once; whoever opens it closes it.

    It goes through the proxies that ``environment`` names, which is read here and never again; see ``providers.proxy``.
    No timeouts (the run's scopes set deadlines), no redirects (a key must not follow one), no compression (it would
    hold tokens back), no cookies (all users' requests share the client). The trusted certificates are read for the
    first https server; see ``network.Trust``.

    Raises:
        NetworkConfigError: the environment names no usable proxy, or ``SSL_CERT_FILE`` no certificates.
    """
    trust = Trust()
    connect = connect or TcpConnect(trust)
    if environment is not None:
        connect = ProxyConnect(environment, connect, trust)
    return _ModelClient(
        TrioTransport(connect),
        timeout=None,
        trust_env=False,
        follow_redirects=False,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        headers={"Accept-Encoding": "identity", "User-Agent": "lumos-stream"},
    )


async def stream_answer(client: httpx.AsyncClient, request: VendorRequest, decoder: Decoder, emit: Emit) -> None:
    """Send the request and push what its answer holds, one call of ``emit`` for each read that brought something.

    Reads on to the end after the vendor's end mark, so that the connection is used again; every other way out closes
    it.

    Raises:
        ProviderError: in the closed list of codes; ``upstream.truncated`` is an end without the vendor's end mark.
    """
    try:
        response = await client.send(_quiet_request(client, request, emit), stream=True)
        async with aclosing(response):
            await _decode_answer(response, decoder, emit)
    except httpx.InvalidURL as error:
        raise ProviderError("upstream.invalid_request", "the model's URL is not valid") from error
    except httpx.TransportError as error:
        raise _meaning_of(error) from error


async def fetch_json(client: httpx.AsyncClient, request: VendorRequest, max_bytes: int) -> bytes:
    """Send the request and return the body of its answer, which says that it is JSON. Sets no deadline.

    Raises:
        ProviderError: in the closed list of codes; ``upstream.protocol`` also for a body over ``max_bytes``.
    """
    try:
        response = await client.send(_quiet_request(client, request, _ignore), stream=True)
        async with aclosing(response):
            return await _read_json(response, max_bytes)
    except httpx.InvalidURL as error:
        raise ProviderError("upstream.invalid_request", "the model's URL is not valid") from error
    except httpx.TransportError as error:
        raise _meaning_of(error) from error


async def _read_json(response: httpx.Response, max_bytes: int) -> bytes:
    body: ResponseBody = response.extensions["body"]
    if response.status_code != httpx.codes.OK or _media_type(response) != "application/json":
        raise error_from_response(response.status_code, response.headers, await _read_error(body))
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise ProviderError("upstream.protocol", "the model's server compressed its answer, which it was asked not to")
    read = bytearray()
    while chunk := await body.receive():
        read += chunk
        if len(read) > max_bytes:
            raise ProviderError("upstream.protocol", f"the model's server sent an answer of over {max_bytes} bytes")
    return bytes(read)


def _ignore(_pieces: Sequence[Piece]) -> None:
    """Nobody watches how far a request that is answered whole has come."""


def _quiet_request(client: httpx.AsyncClient, request: VendorRequest, emit: Emit) -> httpx.Request:
    headers = client.headers.copy()
    headers.update(request.headers)
    extensions = {"request_sent": lambda: emit([RequestSentPiece()])}
    url = _url(request.url)
    quiet = httpx.Request("POST", url, content=request.content, headers=headers, extensions=extensions)
    quiet.url = url  # it had made a plain one of it
    return quiet


def _meaning_of(error: httpx.TransportError) -> ProviderError:
    """The error by the table. Texts are not quoted: they may hold the key, the server's bytes, or a host's name."""
    code, text = next((code, text) for kind, code, text in _TRANSPORT_ERRORS if isinstance(error, kind))
    if isinstance(error, httpx.ConnectError):
        _logger.info("no connection to a model: %s", error)
        text = f"{text} ({_reason(error)})"
    return ProviderError(code, text)


def _reason(error: httpx.ConnectError) -> str:
    """Why there is no connection, without names of hosts and proxies: whoever hears it need not know the network."""
    if status := _PROXY_STATUS.search(str(error)):
        return f"the proxy on the way answers {status[0]}"
    cause: BaseException | None = error
    reason = "nobody answers there"
    while cause is not None:
        match cause:
            case ssl.SSLError():
                return "TLS failed: is its certificate a trusted one of this host?"
            case socket.gaierror():
                return "its name has no address"
            case OSError(errno=int(number)):
                reason = os.strerror(number)
        cause = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause.__cause__
    return reason


async def _decode_answer(response: httpx.Response, decoder: Decoder, emit: Emit) -> None:
    body: ResponseBody = response.extensions["body"]
    if response.status_code != httpx.codes.OK or not _media_type(response).startswith(decoder.content_type):
        raise error_from_response(response.status_code, response.headers, await _read_error(body))
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise ProviderError("upstream.protocol", "the model's server compressed its answer, which it was asked not to")
    while not decoder.done:
        chunk = await body.receive()
        if not chunk:
            if decoder.may_end:
                break
            raise ProviderError("upstream.truncated", "the model's answer ended without its end mark")
        pieces: list[Piece] = []
        try:
            decoder.feed(chunk, pieces)
        finally:  # what came before an error was said
            if pieces:
                emit(pieces)
    if decoder.overrun:
        await body.discard()
    else:
        await body.drain(_seconds_up_to(DRAIN_SECONDS), DRAIN_BYTES)


def _media_type(response: httpx.Response) -> str:
    value: str = response.headers.get("content-type", "")
    return value.partition(";")[0].strip().lower()


async def _read_error(body: ResponseBody) -> bytes:
    """The beginning of an error's body. The status is known already, so a body that breaks or hangs is let go."""
    read = bytearray()
    with trio.move_on_after(_seconds_up_to(ERROR_BODY_SECONDS)), suppress(httpx.TransportError):
        while chunk := await body.receive():
            read += chunk
            if len(read) >= ERROR_BODY_BYTES:
                break
    return bytes(read[:ERROR_BODY_BYTES])


def _seconds_up_to(limit: float) -> float:
    """So many seconds, but at most half of what the run's deadlines leave: what is known already is no timeout."""
    return min(limit, max(0.0, trio.current_effective_deadline() - trio.current_time()) / 2)
