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
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Protocol

import httpx
import msgspec
import trio

from engine.errors import ProviderError, ProviderErrorCode
from engine.pieces import Emit, Piece, RequestSentPiece

from .connection import ResponseBody
from .heads import AnswerHead
from .network import Connect, TcpConnect, Trust
from .proxy import ProxyConnect
from .transport import Prepared, TrioTransport
from .vendor_errors import error_from_response

DRAIN_SECONDS = 0.5
DRAIN_BYTES = 2
"""What may follow the end mark: the rest of its line end. A server that says more is not asked again on this
connection."""

ERROR_BODY_SECONDS = 2.0
ERROR_BODY_BYTES = 65_536

_SENT = (RequestSentPiece(),)

_logger = logging.getLogger(__name__)
_httpx_logger = logging.getLogger("httpx")

_PROXY_STATUS = re.compile(r"HTTP [0-9]{3}")

_TRANSPORT_ERRORS: tuple[tuple[type[httpx.InvalidURL | httpx.TransportError], ProviderErrorCode, str], ...] = (
    (httpx.InvalidURL, "upstream.invalid_request", "the model's URL is not valid"),
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

    def __init__(self, transport: TrioTransport, **options: Any) -> None:
        super().__init__(transport=transport, **options)
        self.transport = transport
        self._prepare = lru_cache(maxsize=1024)(partial(_prepare, self.headers.copy()))

    def prepared(self, request: VendorRequest) -> Prepared | None:
        """What it has in common with others, for ``transport``; None if it has to be httpx's own way.

        Raises:
            httpx.InvalidURL, httpx.TransportError: as ``send``.
        """
        return None if self.is_closed else self._prepare(request.url, tuple(request.headers.items()))

    async def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        """As httpx's, but for what the class leaves out; a URL with a name and a password takes httpx's own way."""
        if self.is_closed or not stream or options or request.url.userinfo:
            return await super().send(request, stream=stream, **options)
        try:
            response = await self.transport.handle_async_request(request)
        except httpx.RequestError as error:
            error.request = request
            raise
        response.request = request
        _httpx_logger.info('HTTP Request: %s %s "%d"', request.method, request.url, response.status_code)
        return response


def _prepare(base: httpx.Headers, text: str, headers: tuple[tuple[str, str], ...]) -> Prepared | None:
    """What all requests to that URL have in common; None if httpx has to see to its name and password."""
    every = base.copy()
    every.update(headers)
    url = _url(text)
    return None if url.userinfo else Prepared.of(httpx.Request("POST", url, headers=every))


def open_client(connect: Connect | None = None, environment: Mapping[str, str] | None = None) -> httpx.AsyncClient:
    """A client for any number of vendors and requests at once; whoever opens it closes it.

    It goes through the proxies that ``environment`` names, which is read here and never again; see ``providers.proxy``.
    No timeouts (the run's scopes set deadlines), no redirects (a key must not follow one), no compression (it would
    hold tokens back), no cookies (all users' requests share the client). The trusted certificates are read for the
    first https server; see ``network.Trust``.

    Raises:
        NetworkConfigError: the environment names no usable proxy, or ``SSL_CERT_FILE`` no certificates.
    """
    trust = Trust(at_once=connect is None)
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


async def stream_answer(
    client: httpx.AsyncClient, request: VendorRequest, decoder: Decoder, emit: Emit, *, key: str | None = None
) -> None:
    """Send the request and push what its answer holds, one call of ``emit`` for each read that brought something.

    Reads on to the end after the vendor's end mark, so that the connection is used again; every other way out closes
    it. While the answer comes, neither request nor head nor what was read is kept. ``key`` is taken out of what errors
    say: they are for clients, and some vendors quote it.

    Raises:
        ProviderError: in the closed list of codes; ``upstream.truncated`` is an end without the vendor's end mark.
    """
    try:
        head, body = await _send(client, request, partial(emit, _SENT))
        del request
        try:
            if head.status_code != httpx.codes.OK or not head.media_type.startswith(decoder.content_type):
                raise await _error_of(head, body)
            if head.coding != "identity":
                raise _compressed()
            del head
            take = partial(_decode, decoder, emit)
            while not decoder.done and (chunk := await body.receive(take)):
                take(chunk)
                del chunk
            if not (decoder.done or decoder.may_end):
                raise ProviderError("upstream.truncated", "the model's answer ended without its end mark")
            if decoder.overrun:
                await body.discard()
            elif not body.finished:
                await body.drain(_seconds_up_to(DRAIN_SECONDS), DRAIN_BYTES)
        finally:
            await body.aclose()
    except (httpx.InvalidURL, httpx.TransportError) as error:
        raise _meaning_of(error) from error
    except ProviderError as error:
        if key:
            error.args = (str(error).replace(key, "[removed]"),)
        elif error.code == "upstream.auth":
            error.args = (f"{error}; no key was sent, api_key_env names the variable that holds one",)
        raise


def _decode(decoder: Decoder, emit: Emit, chunk: bytes) -> bool:
    """Push what the chunk holds; whether the answer goes on after it."""
    pieces: list[Piece] = []
    try:
        decoder.feed(chunk, pieces)
    finally:  # what came before an error was said
        if pieces:
            emit(pieces)
    return not decoder.done


async def fetch_json(client: httpx.AsyncClient, request: VendorRequest, max_bytes: int) -> bytes:
    """Send the request and return the body of its answer, which says that it is JSON. Sets no deadline.

    Raises:
        ProviderError: in the closed list of codes; ``upstream.protocol`` also for a body over ``max_bytes``.
    """
    try:
        head, body = await _send(client, request, _ignore)
        try:
            return await _read_json(head, body, max_bytes)
        finally:
            await body.aclose()
    except (httpx.InvalidURL, httpx.TransportError) as error:
        raise _meaning_of(error) from error


async def _read_json(head: AnswerHead, body: ResponseBody, max_bytes: int) -> bytes:
    if head.status_code != httpx.codes.OK or head.media_type != "application/json":
        raise await _error_of(head, body)
    if head.coding != "identity":
        raise _compressed()
    read = bytearray()
    while chunk := await body.receive():
        read += chunk
        if len(read) > max_bytes:
            raise ProviderError("upstream.protocol", f"the model's server sent an answer of over {max_bytes} bytes")
    return bytes(read)


def _ignore() -> None:
    """Nobody watches how far a request that is answered whole has come."""


async def _send(
    client: httpx.AsyncClient, request: VendorRequest, on_written: Callable[[], object]
) -> tuple[AnswerHead, ResponseBody]:
    """The answer, whose body the caller closes; by the short way, where the client is ours."""
    if isinstance(client, _ModelClient) and (prepared := client.prepared(request)) is not None:
        head, body = await client.transport.post(prepared, request.content, on_written)
        if _httpx_logger.isEnabledFor(logging.INFO):
            _httpx_logger.info('HTTP Request: POST %s "%d"', _url(request.url), head.status_code)
        return head, body
    headers = client.headers.copy()
    headers.update(request.headers)
    url = _url(request.url)
    extensions = {"request_sent": on_written}
    quiet = httpx.Request("POST", url, content=request.content, headers=headers, extensions=extensions)
    quiet.url = url  # it had made a plain one of it
    response = await client.send(quiet, stream=True)
    head = AnswerHead.of(response.status_code, response.headers.raw, b"", b"")
    return head, response.extensions["body"]


def _meaning_of(error: httpx.InvalidURL | httpx.TransportError) -> ProviderError:
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


def _compressed() -> ProviderError:
    return ProviderError("upstream.protocol", "the model's server compressed its answer, which it was asked not to")


async def _error_of(head: AnswerHead, body: ResponseBody) -> ProviderError:
    headers = httpx.Headers(head.headers)
    return error_from_response(head.status_code, headers, await _read_error(body))


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
