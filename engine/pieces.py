"""What a provider yields while a model answers: one closed union of small frozen types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter", "error"]


class _Piece(msgspec.Struct, frozen=True, tag_field="type", omit_defaults=True, gc=False):
    """Common settings: immutable, tagged by ``type`` in recordings, never part of a reference cycle."""


class RequestSentPiece(_Piece, frozen=True, tag="request_sent"):
    """The request is on its way: the connect phase is over, the wait for the first token begins, and it costs tokens.

    After ``AttemptsPiece`` it is only told that it costs.
    """


class AttemptsPiece(_Piece, frozen=True, tag="attempts"):
    """The provider makes several attempts and keeps connect and first-token deadlines for each of them.

    Comes before the first attempt that it keeps them for: the run's own deadline for these phases is then off until
    the first content.
    """


class AnsweredByPiece(_Piece, frozen=True, tag="answered_by"):
    """Which of several providers and models the answer comes from; before its first content."""

    provider: str
    model: str


class TextPiece(_Piece, frozen=True, tag="text"):
    """Answer text as it came, whole code points, any length. An empty one is no progress."""

    text: str


class ReasoningPiece(_Piece, frozen=True, tag="reasoning"):
    """Reasoning ("thinking") text, where the vendor shows it."""

    text: str


class ToolCallPiece(_Piece, frozen=True, tag="tool_call"):
    """A fragment of a tool call; fragments with the same ``index`` belong together, several may interleave.

    ``call_id`` and ``name`` come with the first fragment of an index; ``arguments_fragment`` is a part of the
    arguments' JSON text.
    """

    index: int
    call_id: str | None = None
    name: str | None = None
    arguments_fragment: str = ""


class ContinuationPiece(_Piece, frozen=True, tag="continuation"):
    """What the vendor wants back, unchanged, with this assistant turn when the conversation goes on.

    Thinking blocks with their signatures, encrypted reasoning, item ids: opaque JSON that only the adapter which
    yielded it reads. Comes once, before ``FinishPiece``; the engine keeps it as ``Message.continuation``.
    """

    state: Any


class UsagePiece(_Piece, frozen=True, tag="usage"):
    """Token counts as the vendor reports them: cumulative for the request, a later piece replaces an earlier."""

    input_tokens: int
    output_tokens: int
    reasoning_tokens: int | None = None
    cached_tokens: int | None = None


class FinishPiece(_Piece, frozen=True, tag="finish"):
    """Why the model stopped. Comes once, after the last content piece; a usage piece may still follow."""

    reason: FinishReason


Piece: TypeAlias = (
    RequestSentPiece
    | AttemptsPiece
    | AnsweredByPiece
    | TextPiece
    | ReasoningPiece
    | ToolCallPiece
    | ContinuationPiece
    | UsagePiece
    | FinishPiece
)

Emit: TypeAlias = Callable[[Sequence[Piece]], None]
"""How a provider pushes pieces into the run: synchronous, never blocks, one call for all that one read brought."""
