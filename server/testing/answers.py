"""What an in-memory model server answers a request with, good or bad: as data, turned into a vendor's bytes here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, Literal, TypeAlias

import msgspec

from engine.errors import ProviderErrorCode
from providers.chunked import LAST_CHUNK, chunked
from providers.encoders import Encoder, Format, answer_facts, encoded_reads, raw_reads, speaks
from providers.recording import Recording
from providers.replay import ReplayProvider

from .vendor_bytes import Act, Until, answer

Ending: TypeAlias = Literal["whole", "hang", "cut", "reset"]
"""How an answer's body ends: as HTTP ends one, not at all, or in the middle by a FIN or an RST."""

CODES: dict[int, ProviderErrorCode] = {
    400: "upstream.invalid_request",
    401: "upstream.auth",
    403: "upstream.auth",
    413: "upstream.context_length",
    429: "upstream.rate_limit",
    503: "upstream.overloaded",
    529: "upstream.overloaded",
}
"""What the body of a refusal says; ``upstream.server`` for other statuses."""


class Answer(msgspec.Struct, frozen=True):
    """One answer of a model, in the recording's timing; made by the fixtures ``replay`` and ``faults``.

    Attributes:
        recording: what it says and when; with a failure in its header it ends in that.
        ending: how its body ends after the last read.
    """

    recording: Recording
    ending: Ending = "whole"

    @property
    def text(self) -> str:
        """The whole text of it."""
        return self.recording.text

    def provider(self, *further: Answer, speed: float = 1.0) -> ReplayProvider:
        """A provider that answers with it, without any HTTP; the steps of a turn get ``further`` ones in order.

        Raises:
            ValueError: one of them ends as only a connection can.
        """
        if any(answer.ending != "whole" for answer in (self, *further)):
            raise ValueError("a connection that breaks or hangs needs a model server: give the answer to add_agent")
        return ReplayProvider(self.recording, *(answer.recording for answer in further), speed=speed)


class Refusal(msgspec.Struct, frozen=True):
    """An HTTP error instead of an answer. ``retry_after`` is seconds; None sends no such header."""

    status: int
    message: str = "refused by a test"
    retry_after: float | None = None


class Unreachable(msgspec.Struct, frozen=True):
    """No connection: it is refused, or never established."""

    how: Literal["refuse", "black hole"]


class RawAnswer(msgspec.Struct, frozen=True):
    """Any bytes, see ``vendor_bytes.Act``; silence too."""

    acts: tuple[Act, ...]


ModelAnswer: TypeAlias = Answer | Refusal | Unreachable | RawAnswer


def acts_of(given: ModelAnswer, wire: Format, asked: Mapping[str, Any], answer_id: str) -> Iterator[Act]:
    """The answer as a vendor's server gives it, head and all, to the request with this body."""
    match given:
        case Answer():
            yield from _stream(given, wire, asked, answer_id)
        case Refusal(status, message, retry_after):
            body = msgspec.json.encode(wire.error_body(CODES.get(status, "upstream.server"), message))
            headers = [] if retry_after is None else [f"Retry-After: {retry_after:g}"]
            reason = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Refused"
            yield answer(body, "Content-Type: application/json", *headers, status=f"{status} {reason}")
        case RawAnswer(acts):
            yield from acts
        case Unreachable():
            yield "reset"  # on a connection that is there already


def _stream(given: Answer, wire: Format, asked: Mapping[str, Any], answer_id: str) -> Iterator[Act]:
    encoder = _encoder(given.recording, wire, asked, answer_id)
    yield (f"HTTP/1.1 200 OK\r\nContent-Type: {encoder.content_type}\r\nTransfer-Encoding: chunked\r\n\r\n").encode()
    raw = given.recording.has_raw and speaks(given.recording.header.provider, wire)
    for at_ns, part in raw_reads(given.recording) if raw else encoded_reads(encoder, given.recording):
        yield Until(at_ns / 1e9)
        if part:
            yield chunked(part)
    match given.ending:
        case "whole":
            yield LAST_CHUNK
        case "cut":
            yield "close"
        case "reset":
            yield "break"
        case "hang":
            yield "hang"


def _encoder(recording: Recording, wire: Format, asked: Mapping[str, Any], answer_id: str) -> Encoder:
    pieces = [piece for read in recording.reads for piece in read.pieces]
    told = {"answer_id": answer_id, "model": str(asked.get("model") or "test"), **wire.facts(asked)}
    return wire.encoder(answer_facts(pieces, **told))
