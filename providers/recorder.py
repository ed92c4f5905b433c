"""The recorder: a provider around another one that notes what each read brought, and when.

Of a provider over HTTP it notes the bytes too, with their read boundaries, and the request's body: it asks through the
same provider with a wire that listens.

Recordings are made to be passed on, so none holds the API key: where the bytes or the request quote it, the recording
goes without both, and where the answer itself does, there is none.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import trio

from engine.errors import ProviderError
from engine.pieces import Emit, FinishPiece, Piece, ReasoningPiece, RequestSentPiece, TextPiece, ToolCallPiece
from engine.provider import ModelRequest, Provider

from .http import Decoder, VendorRequest
from .recording import FORMAT, RecordedFailure, RecordedRead, Recording, RecordingError, RecordingHeader
from .wire import Endpoint, HttpProvider, Wire

SHORTEST_SECRET_CHARS = 8
"""A shorter key is no secret but what local servers are given in place of one: "k", "EMPTY", "ollama". Such words are
in any answer."""


class Recorder:
    """Passes ``inner``'s answers on unchanged and keeps each of them, in memory, for as long as it lives itself.

    Closing it closes ``inner``.
    """

    def __init__(self, inner: Provider) -> None:
        self.name = inner.name
        self._inner = inner
        self._answers: list[_Answer] = []

    async def stream(self, request: ModelRequest, emit: Emit) -> None:
        """Ask ``inner``; raises what it raises. The answer is then there for `recording`, also after a failure."""
        answer = _Answer(request)
        self._answers.append(answer)

        def note_and_emit(pieces: Sequence[Piece]) -> None:
            answer.note(pieces)
            emit(pieces)

        inner = self._inner
        if isinstance(inner, HttpProvider):
            inner = inner.tapped(lambda wire: _TappedWire(wire, answer))
        try:
            await inner.stream(request, note_and_emit)
        except ProviderError as error:
            answer.end(RecordedFailure(answer.elapsed_ns(), error.code, str(error)))
            raise
        except BaseException as error:
            answer.end(answer.cut(f"cut off by {type(error).__name__}"))
            raise
        answer.end(None if answer.finished else answer.cut("the stream ended without a finish piece"))

    async def aclose(self) -> None:
        """Close ``inner``."""
        await self._inner.aclose()

    def recording(
        self,
        *,
        name: str,
        title: str,
        recorded: datetime.date,
        source: str,
        licence: str,
        note: str = "",
        answer: int = -1,
    ) -> Recording:
        """Make a recording of an answer: the last one, or the one of that index in the order of the requests.

        The header's provider, model and prompt (the last user message) come from the request, the rest from the
        arguments (see `RecordingHeader`). An answer that failed or was cut has its ``failure`` in the header, and its
        ``note`` says so, as it does where bytes and request were left out because they quote the API key.
        ``RequestSentPiece`` is left out: whoever replays emits its own.

        Raises:
            RecordingError: there is no such answer, it has not ended yet, its pieces quote the API key or are in no
                valid order.
        """
        try:
            chosen = self._answers[answer]
        except IndexError:
            raise RecordingError(f"there is no answer {answer}; {len(self._answers)} were recorded") from None
        if not chosen.ended:
            raise RecordingError("the answer has not ended yet")
        chosen.forget_key()
        if chosen.tells_the_key:
            raise RecordingError("the answer quotes the API key, so nothing of it was kept")
        header = RecordingHeader(
            format=FORMAT,
            name=name,
            title=title,
            provider=self.name,
            model=chosen.model,
            recorded=recorded,
            source=source,
            licence=licence,
            prompt=chosen.prompt,
            note=_joined(note, chosen.left_out, _failure_note(chosen.failure)),
            request=chosen.request_body,
            failure=chosen.failure,
        )
        return Recording(header, tuple(chosen.reads))


class _Answer:
    """What one request brought so far."""

    def __init__(self, request: ModelRequest) -> None:
        self.model = request.model
        self.prompt = _last_user_message(request)
        self.reads: list[RecordedRead] = []
        self.request_body: Any = None
        self.key: str | None = None
        self.left_out = ""
        self.tells_the_key = False
        self.finished = False
        self.ended = False
        self.failure: RecordedFailure | None = None
        self._start = trio.current_time()

    def elapsed_ns(self) -> int:
        """Nanoseconds since the request; rounded, for a float of seconds is off by less than half a nanosecond."""
        return round((trio.current_time() - self._start) * 1e9)

    def note_raw(self, chunk: bytes) -> None:
        """Keep the bytes of one read, with the time. Its pieces, if it has any, come right after."""
        self.reads.append(RecordedRead(self.elapsed_ns(), raw=chunk))

    def note(self, pieces: Sequence[Piece]) -> None:
        """Keep a copy of what one read brought, with the time."""
        kept = tuple(piece for piece in pieces if not isinstance(piece, RequestSentPiece))
        if not kept:
            return
        latest = self.reads[-1] if self.reads else None
        if latest is not None and latest.raw is not None and not latest.pieces:
            self.reads[-1] = RecordedRead(latest.at_ns, kept, latest.raw)
        else:
            self.reads.append(RecordedRead(self.elapsed_ns(), kept))
        self.finished = self.finished or any(isinstance(piece, FinishPiece) for piece in kept)

    def cut(self, message: str) -> RecordedFailure:
        """An end that is not the vendor's doing, or of which the vendor said nothing."""
        return RecordedFailure(self.elapsed_ns(), "upstream.truncated", message)

    def end(self, failure: RecordedFailure | None) -> None:
        """Close the books; None if the answer is complete."""
        self.failure = failure
        self.ended = True

    def forget_key(self) -> None:
        """Keep nothing that quotes the key, which may be split over any number of reads."""
        key = self.key
        if key is None or len(key) < SHORTEST_SECRET_CHARS:
            return
        raw = b"".join(read.raw or b"" for read in self.reads)
        if _quotes(raw, key) or _quotes(msgspec.json.encode(self.request_body), key):
            self.reads = [RecordedRead(read.at_ns, read.pieces) for read in self.reads if read.pieces]
            self.request_body = None
            self.prompt = self.prompt.replace(key, "[removed]")
            self.left_out = "Without bytes and request, which quote the API key."
        pieces = [piece for read in self.reads for piece in read.pieces]
        if _quotes(msgspec.json.encode(pieces), key) or any(_quotes(text, key) for text in _texts(pieces)):
            self.reads.clear()
            self.tells_the_key = True


class _TappedWire:
    """A wire that notes the request's body and gives decoders that note every read."""

    def __init__(self, wire: Wire, answer: _Answer) -> None:
        self._wire = wire
        self._answer = answer

    def request(self, request: ModelRequest, endpoint: Endpoint) -> VendorRequest:
        """The wire's request; its headers, which hold the key, are not noted."""
        vendor_request = self._wire.request(request, endpoint)
        self._answer.key = endpoint.api_key
        self._answer.request_body = msgspec.json.decode(vendor_request.content)
        return vendor_request

    def decoder(self) -> Decoder:
        """The wire's decoder, listened to."""
        return _TappedDecoder(self._wire.decoder(), self._answer)


class _TappedDecoder:
    """A decoder that notes every read before it decodes it."""

    def __init__(self, decoder: Decoder, answer: _Answer) -> None:
        self._decoder = decoder
        self._answer = answer
        self.content_type = decoder.content_type

    @property
    def done(self) -> bool:
        """As the decoder's."""
        return self._decoder.done

    @property
    def may_end(self) -> bool:
        """As the decoder's."""
        return self._decoder.may_end

    @property
    def overrun(self) -> bool:
        """As the decoder's."""
        return self._decoder.overrun

    def feed(self, chunk: bytes, pieces: list[Piece]) -> None:
        """As the decoder's."""
        self._answer.note_raw(chunk)
        self._decoder.feed(chunk, pieces)


def _last_user_message(request: ModelRequest) -> str:
    return next((message.content for message in reversed(request.messages) if message.role == "user"), "")


def _quotes(data: bytes, key: str) -> bool:
    """Whether the bytes hold the key, as it is or with JSON's escapes."""
    pattern = "".join(rf"(?:\\?{re.escape(char)}|(?i:\\u{ord(char):04x}))" for char in key)
    return re.search(pattern.encode(), data) is not None


def _texts(pieces: Sequence[Piece]) -> Iterator[bytes]:
    """The texts that came in parts, put together."""
    for kind in (TextPiece, ReasoningPiece):
        yield "".join(piece.text for piece in pieces if isinstance(piece, kind)).encode(errors="replace")
    calls = [piece for piece in pieces if isinstance(piece, ToolCallPiece)]
    for index in {call.index for call in calls}:
        yield "".join(call.arguments_fragment for call in calls if call.index == index).encode(errors="replace")


def _failure_note(failure: RecordedFailure | None) -> str:
    if failure is None:
        return ""
    return f"Incomplete: after {failure.at_ns / 1e9:.3f} s, {failure.code}: {failure.message}."


def _joined(*sentences: str) -> str:
    return " ".join(filter(None, sentences))
