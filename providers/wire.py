"""What the wire formats share: the adapter's shape, the provider around it, decoders for event streams and lines.

A vendor's adapter is two pure things: how a request becomes bytes (``Wire.request``) and how the answer's bytes become
pieces (``Decoder``). Neither touches a connection, so both are tested on bytes alone.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import httpx
import msgspec

from engine.errors import ProviderError
from engine.pieces import Emit, Piece
from engine.provider import ModelRequest

from .http import Decoder, VendorRequest, open_client, stream_answer
from .sse import EventTooLargeError, ServerSentEvent, SSEParser

MAX_LINE_BYTES = 2**20

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

T = TypeVar("T")


def is_usable_key(key: str) -> bool:
    """Whether an HTTP header can hold the key."""
    return key.isascii() and key.isprintable()


def _is_usable_header(name: str, value: str) -> bool:
    """Whether it can be sent: a name is a token of RFC 9110, section 5.6.2, a value visible ASCII, spaces and tabs."""
    return _TOKEN.fullmatch(name) is not None and is_usable_key(value.replace("\t", " ")) and value == value.strip()


class Endpoint(msgspec.Struct, frozen=True):
    """Where a vendor's API is and what opens it. Its ``repr`` leaves the key out.

    Attributes:
        base_url: without a slash at its end.
        api_key: None where the server wants none.
        headers: further headers that every request carries.

    Raises:
        ValueError: ``api_key`` or one of ``headers`` has characters that no header takes.
    """

    base_url: str
    api_key: str | None = None
    headers: Mapping[str, str] = {}

    def __post_init__(self) -> None:
        if self.api_key is not None and not is_usable_key(self.api_key):
            raise ValueError("the API key has characters that no key has")
        for name, value in self.headers.items():
            if not _is_usable_header(name, value):
                raise ValueError(f"the header {name!r} has characters that no header has")

    def __repr__(self) -> str:
        return f"Endpoint(base_url={self.base_url!r})"


class Wire(Protocol):
    """One wire format, with a vendor's differences: makes requests and decoders; has no state of its own."""

    def request(self, request: ModelRequest, endpoint: Endpoint) -> VendorRequest:
        """The HTTP request, authentication included.

        Raises:
            ProviderError: ``upstream.invalid_request`` if the format cannot say what is asked.
        """
        ...

    def decoder(self) -> Decoder:
        """A decoder for one answer."""
        ...


class HttpProvider:
    """A model behind a wire format over HTTP. Closes its client only if it opened it itself."""

    def __init__(self, name: str, wire: Wire, endpoint: Endpoint, client: httpx.AsyncClient | None = None) -> None:
        self.name = name
        self._wire = wire
        self._endpoint = endpoint
        self._own_client = client is None
        self._client = client or open_client()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self._endpoint!r})"

    def tapped(self, tap: Callable[[Wire], Wire]) -> HttpProvider:
        """The same provider with its wire inside another one, which may listen (the recorder). Owns no client."""
        return HttpProvider(self.name, tap(self._wire), self._endpoint, self._client)

    def stream(self, request: ModelRequest, emit: Emit) -> Coroutine[Any, Any, None]:
        """Answer the request; see ``engine.provider.Provider``."""
        endpoint = self._endpoint
        vendor_request = self._wire.request(_without_foreign_continuations(request, self.name), endpoint)
        return stream_answer(self._client, vendor_request, self._wire.decoder(), emit, key=endpoint.api_key)

    async def aclose(self) -> None:
        """Close the connections, unless the client was handed in."""
        if self._own_client:
            await self._client.aclose()


def _without_foreign_continuations(request: ModelRequest, provider: str) -> ModelRequest:
    """The request as this provider may see it: what another one wants back is none of its business."""
    for message in request.messages:
        if message.continued_by is not None and message.continued_by != provider:
            break
    else:
        return request
    messages = tuple(
        message
        if message.continued_by in (None, provider)
        else msgspec.structs.replace(message, continuation=None, continued_by=None)
        for message in request.messages
    )
    return msgspec.structs.replace(request, messages=messages)


class EventStreamDecoder:
    """Base of decoders for server-sent events: subclasses decode one event at a time and set ``done``."""

    content_type = "text/event-stream"

    def __init__(self) -> None:
        self._events = SSEParser()
        self.done = self.may_end = self.overrun = False

    def feed(self, chunk: bytes, pieces: list[Piece]) -> None:
        """Append the pieces that these bytes completed; see ``Decoder``."""
        too_large = None
        try:
            events: Sequence[ServerSentEvent] = self._events.feed(chunk)
        except EventTooLargeError as error:
            events, too_large = error.events, error
        for event in events:
            if self.done:
                self.overrun = True
                break
            self.decode_event(event, pieces)
        if too_large is not None:
            raise ProviderError("upstream.protocol", f"the model sent too much at once: {too_large}") from too_large

    @abstractmethod
    def decode_event(self, event: ServerSentEvent, pieces: list[Piece]) -> None:
        """Append the pieces of one event."""


class LineDecoder:
    """Base of decoders for one JSON object a line (NDJSON): subclasses decode one line at a time and set ``done``."""

    content_type = "application/x-ndjson"

    def __init__(self) -> None:
        self._unfinished = bytearray()
        self.done = self.may_end = self.overrun = False

    def feed(self, chunk: bytes, pieces: list[Piece]) -> None:
        """Append the pieces that these bytes completed; see ``Decoder``."""
        first, *more = chunk.split(b"\n")
        self._unfinished += first
        for rest in more:
            line = bytes(self._unfinished)
            self._unfinished[:] = rest
            _check_line(line)
            if line.strip():
                if self.done:
                    self.overrun = True
                    return
                self.decode_line(line, pieces)
        _check_line(self._unfinished)

    @abstractmethod
    def decode_line(self, line: bytes, pieces: list[Piece]) -> None:
        """Append the pieces of one line, which is not blank."""


def _check_line(line: bytes | bytearray) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise ProviderError("upstream.protocol", f"the model sent a line of over {MAX_LINE_BYTES} bytes")


class _Typed(msgspec.Struct, gc=False):
    type: str = ""


_typed_decoder = msgspec.json.Decoder(_Typed)


def event_type(event: ServerSentEvent) -> str:
    """The type of an event that has its ``type`` in its data too, for proxies that leave the events' names out.

    Raises:
        ProviderError: ``upstream.protocol`` if an event without a name is no JSON.
    """
    return decode_json(_typed_decoder, event.data).type if event.event == "message" else event.event


def decode_json(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    """The JSON, strictly.

    Raises:
        ProviderError: ``upstream.protocol`` if it is malformed, of another shape, too deep or no UTF-8.
    """
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProviderError("upstream.protocol", f"the model sent JSON that cannot be used: {error}") from error


def encode_json(body: Any) -> bytes:
    """The body of a request.

    Raises:
        ProviderError: ``upstream.invalid_request`` if it holds what JSON cannot say (a lone surrogate, an object).
    """
    try:
        return msgspec.json.encode(body)
    except (TypeError, ValueError, RecursionError) as error:
        raise ProviderError("upstream.invalid_request", f"the request cannot be written as JSON: {error}") from error
