"""What all encoders share: the facts of an answer, which piece becomes which bytes, and the order of reads.

An encoder is the inverse of a wire format's decoder: one answer's pieces become the vendor's bytes, read by read, with
the frames around them that the pieces do not tell of. What a format cannot say is left out, or ends the answer as the
vendor would end it; each encoder's docstring names it.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from engine.errors import ProviderErrorCode
from engine.pieces import FinishPiece, FinishReason, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from providers.recording import RecordedRead, Recording

REPORTED_CODES: frozenset[ProviderErrorCode] = frozenset(
    {
        "upstream.auth",
        "upstream.rate_limit",
        "upstream.overloaded",
        "upstream.context_length",
        "upstream.content_policy",
        "upstream.invalid_request",
        "upstream.server",
    }
)
"""What a vendor says of itself. Of the others (cut off, broken, too late) there is nothing to see but a body's end."""

UNSAID_REASONS: dict[FinishReason, ProviderErrorCode] = {"content_filter": "upstream.content_policy"}
"""What an answer ends in whose finish reason its format has no word for; ``upstream.server`` for the others."""

_OURS = re.compile(r"the model's server (?:reported an error|answered HTTP \d+)(?:: )?")

Name = TypeVar("Name")
Meaning = TypeVar("Meaning")


class AnswerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer's frames tell beside its pieces.

    Attributes:
        answer_id: letters and digits; a format puts its own prefix before it.
        model: as the client named it.
        created: seconds since 1970.
        counted: the last usage of the answer, which some formats tell of in advance.
        fragments: how many fragments each tool call has, by its index: the last one closes it.
        asks_usage: whether the client wants usage, where it has to ask for it.
        cumulative: whether each event is to hold the whole text so far, where that can be chosen.
    """

    answer_id: str
    model: str
    created: int = 0
    counted: UsagePiece | None = None
    fragments: Mapping[int, int] = {}
    asks_usage: bool = True
    cumulative: bool = False


def answer_facts(pieces: Iterable[Piece], **told: Any) -> AnswerFacts:
    """The facts of an answer with these pieces; ``told`` are those that the pieces do not tell."""
    counted = None
    fragments: Counter[int] = Counter()
    for piece in pieces:
        match piece:
            case UsagePiece():
                counted = piece
            case ToolCallPiece(index):
                fragments[index] += 1
    return AnswerFacts(counted=counted, fragments=fragments, **told)


class Encoder:
    """Base of the encoders: one answer, from ``start`` over ``encode`` for each read to ``end`` or ``failure``.

    Usage and finish reason are kept for ``end``, as most formats tell of them last; a subclass whose format tells of
    them where they come overrides ``add_usage`` and ``add_finish``.

    Attributes:
        content_type: the media type of the answer.
        whole_calls: whether a tool call must come in one piece, see ``with_whole_calls``.
        reasons: the format's words for finish reasons.
    """

    content_type = "text/event-stream"
    whole_calls = False
    reasons: Mapping[FinishReason, str] = {}

    def __init__(self, facts: AnswerFacts) -> None:
        self.facts = facts
        self.counted: UsagePiece | None = None
        self.reason: FinishReason = "stop"

    def start(self) -> bytes:
        """What comes before the first piece."""
        return b""

    def encode(self, pieces: Iterable[Piece]) -> bytes:
        """The bytes of what one read brought."""
        return b"".join(map(self._encode, pieces))

    def _encode(self, piece: Piece) -> bytes:
        match piece:
            case TextPiece(text) if text:
                return self.add_text(text)
            case ReasoningPiece(text) if text:
                return self.add_reasoning(text)
            case ToolCallPiece():
                return self.add_call(piece)
            case UsagePiece():
                return self.add_usage(piece)
            case FinishPiece(reason):
                return self.add_finish(reason)
        return b""

    def end(self) -> bytes:
        """What comes after the last piece. An end that the format has no word for is a failure."""
        word = self.reasons.get(self.reason)
        if word is None:
            code = UNSAID_REASONS.get(self.reason, "upstream.server")
            return self.failure(code, f"the answer ended in {self.reason}")
        return self.last_frames(word)

    def failure(self, code: ProviderErrorCode, message: str) -> bytes:
        """How the vendor reports, in the stream, that the answer failed; nothing if it would just break off."""
        return self.failure_frames(code, vendor_message(message)) if code in REPORTED_CODES else b""

    @abstractmethod
    def add_text(self, text: str) -> bytes:
        """A part of the answer's text, not empty."""

    @abstractmethod
    def add_reasoning(self, text: str) -> bytes:
        """A part of the reasoning, not empty."""

    @abstractmethod
    def add_call(self, piece: ToolCallPiece) -> bytes:
        """A fragment of a tool call."""

    def add_usage(self, usage: UsagePiece) -> bytes:
        """The counts so far."""
        self.counted = usage
        return b""

    def add_finish(self, reason: FinishReason) -> bytes:
        """Why the model stopped."""
        self.reason = reason
        return b""

    @abstractmethod
    def last_frames(self, reason: str) -> bytes:
        """The end of a whole answer, with the format's word for its reason."""

    @abstractmethod
    def failure_frames(self, code: ProviderErrorCode, message: str) -> bytes:
        """An error in the stream, for one of the codes in ``REPORTED_CODES``."""


class OpenCalls:
    """Tells when a tool call has had its last fragment."""

    def __init__(self, facts: AnswerFacts) -> None:
        self._left = dict(facts.fragments)

    def is_last(self, piece: ToolCallPiece) -> bool:
        """Whether this fragment, which is counted hereby, is the last one of its call."""
        self._left[piece.index] = self._left.get(piece.index, 1) - 1
        return self._left[piece.index] <= 0


def encoded_reads(encoder: Encoder, recording: Recording) -> Iterator[tuple[int, bytes]]:
    """The answer's body, and when each part of it is due in nanoseconds from the request.

    One part for each read that says something in this format: the start comes with the first, the end with the last.
    """
    reads = with_whole_calls(recording.reads) if encoder.whole_calls else recording.reads
    failure = recording.header.failure
    before = encoder.start()
    for number, read in enumerate(reads, 1):
        chunk = before + encoder.encode(read.pieces)
        if number == len(reads) and failure is None:
            chunk += encoder.end()
        if chunk and (read.pieces or number == len(reads)):
            before = b""
            yield read.at_ns, chunk
    if failure is not None:
        yield failure.at_ns, before + encoder.failure(failure.code, failure.message)


def raw_reads(recording: Recording) -> Iterator[tuple[int, bytes]]:
    """The recorded bytes, and when each read of them is due; a failure is in them, or is the body's end."""
    yield from ((read.at_ns, read.raw) for read in recording.reads if read.raw)
    if recording.header.failure is not None:
        yield recording.header.failure.at_ns, b""


def with_whole_calls(reads: Sequence[RecordedRead]) -> tuple[RecordedRead, ...]:
    """The reads with each tool call in one piece, where its last fragment was."""
    pieces = [piece for read in reads for piece in read.pieces]
    left = Counter(piece.index for piece in pieces if isinstance(piece, ToolCallPiece))
    said: dict[int, ToolCallPiece] = {}

    def joined(piece: Piece) -> Iterator[Piece]:
        if not isinstance(piece, ToolCallPiece):
            yield piece
            return
        before = said.get(piece.index, ToolCallPiece(piece.index))
        said[piece.index] = whole = ToolCallPiece(
            piece.index,
            before.call_id or piece.call_id,
            before.name or piece.name,
            before.arguments_fragment + piece.arguments_fragment,
        )
        left[piece.index] -= 1
        if not left[piece.index]:
            yield whole

    return tuple(
        msgspec.structs.replace(read, pieces=tuple(whole for piece in read.pieces for whole in joined(piece)))
        for read in reads
    )


def inverted(table: Mapping[Name, Meaning]) -> dict[Meaning, Name]:
    """A decoder's table the other way round: of several names for one meaning the first."""
    return {meaning: name for name, meaning in reversed(list(table.items()))}


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event with this JSON."""
    named = b"event: %s\n" % name.encode() if name else b""
    return named + b"data: " + msgspec.json.encode(data) + b"\n\n"


def vendor_message(message: str) -> str:
    """A recorded failure's text without what we put before the vendor's own."""
    return _OURS.sub("", message, count=1) or "the request failed"
