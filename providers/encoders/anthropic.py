"""Encoder of Anthropic's Messages."""

from __future__ import annotations

from typing import Any

from engine.errors import ProviderErrorCode
from engine.pieces import ToolCallPiece, UsagePiece
from providers.anthropic import STOP_REASONS

from .base import AnswerFacts, Encoder, OpenCalls, event, inverted

REASONS = inverted(STOP_REASONS)
NO_USAGE = UsagePiece(0, 0)

_ERRORS: dict[ProviderErrorCode, str] = {
    "upstream.auth": "authentication_error",
    "upstream.rate_limit": "rate_limit_error",
    "upstream.overloaded": "overloaded_error",
    "upstream.context_length": "request_too_large",
    "upstream.content_policy": "invalid_request_error",
    "upstream.invalid_request": "invalid_request_error",
}
_REFUSED = "Output blocked by content filtering policy"
"""The API has no type of its own for that, only these words."""


def error_body(code: ProviderErrorCode, message: str) -> dict[str, Any]:
    """The body of an HTTP error, and the data of the event that ends a stream in one."""
    if code == "upstream.content_policy" and _REFUSED not in message:
        message = f"{_REFUSED}: {message}"
    return {"type": "error", "error": {"type": _ERRORS.get(code, "api_error"), "message": message}}


def usage_object(usage: UsagePiece) -> dict[str, Any]:
    """The counts in Anthropic's words: what was read from the cache is not among the input."""
    counts: dict[str, Any] = {
        "input_tokens": usage.input_tokens - (usage.cached_tokens or 0),
        "output_tokens": usage.output_tokens,
    }
    if usage.cached_tokens is not None:
        counts["cache_read_input_tokens"] = usage.cached_tokens
    if usage.reasoning_tokens is not None:
        counts["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return counts


def empty_message(facts: AnswerFacts, usage: UsagePiece) -> dict[str, Any]:
    """The message as it begins."""
    head = {"id": f"msg_{facts.answer_id}", "type": "message", "role": "assistant", "model": facts.model}
    return head | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage_object(usage)}


class MessagesEncoder(Encoder):
    """Typed events for numbered blocks, closed by ``message_stop``.

    The beginning always has a usage: an answer whose first piece is none gets one with the final input and no output.
    A finish reason ``error`` is an error in the stream.
    """

    reasons = REASONS

    def __init__(self, facts: AnswerFacts) -> None:
        super().__init__(facts)
        self._started = False
        self._blocks = 0
        self._open: tuple[str, int] | None = None
        self._call_blocks: dict[int, int] = {}
        self._calls = OpenCalls(facts)

    def add_text(self, text: str) -> bytes:
        """A delta of a text block."""
        block = {"type": "text", "text": ""}
        return self._delta(block, {"type": "text_delta", "text": text})

    def add_reasoning(self, text: str) -> bytes:
        """A delta of a thinking block. It has no signature: nobody can sign it."""
        block = {"type": "thinking", "thinking": "", "signature": ""}
        return self._delta(block, {"type": "thinking_delta", "thinking": text})

    def add_call(self, piece: ToolCallPiece) -> bytes:
        """A fragment in the call's own block, which closes with its last one."""
        frames = b"" if piece.index in self._call_blocks else self._open_call(piece)
        at = self._call_blocks[piece.index]
        if piece.arguments_fragment:
            delta = {"type": "input_json_delta", "partial_json": piece.arguments_fragment}
            frames += _event("content_block_delta", index=at, delta=delta)
        if self._calls.is_last(piece):
            frames += _event("content_block_stop", index=at)
        return frames

    def add_usage(self, usage: UsagePiece) -> bytes:
        """In the beginning, if it comes before all else; otherwise with the reason, or before the next one."""
        if not self._started:
            return self._begin(usage)
        before, self.counted = self.counted, usage
        return b"" if before is None else self._message_delta(None, before)

    def last_frames(self, reason: str) -> bytes:
        """The last block's end, the reason with the final counts, and the end mark."""
        frames = self._begin() + self._close_block()
        counted = self.counted or self.facts.counted or NO_USAGE
        return frames + self._message_delta(reason, counted) + _event("message_stop")

    def failure_frames(self, code: ProviderErrorCode, message: str) -> bytes:
        """The event that is an error."""
        return event(error_body(code, message), "error")

    def _begin(self, usage: UsagePiece | None = None) -> bytes:
        if self._started:
            return b""
        self._started = True
        counted = self.facts.counted or NO_USAGE
        told = usage or UsagePiece(counted.input_tokens, 0, cached_tokens=counted.cached_tokens)
        return _event("message_start", message=empty_message(self.facts, told))

    def _delta(self, block: dict[str, Any], delta: dict[str, Any]) -> bytes:
        kind = block["type"]
        frames = self._begin()
        if self._open is None or self._open[0] != kind:
            frames += self._close_block()
            self._open = (kind, self._blocks)
            frames += self._open_block(block)
        return frames + _event("content_block_delta", index=self._open[1], delta=delta)

    def _open_call(self, piece: ToolCallPiece) -> bytes:
        frames = self._begin() + self._close_block()
        self._call_blocks[piece.index] = self._blocks
        call_id = f"toolu_{self.facts.answer_id}{piece.index}" if piece.call_id is None else piece.call_id
        return frames + self._open_block({"type": "tool_use", "id": call_id, "name": piece.name or "", "input": {}})

    def _open_block(self, block: dict[str, Any]) -> bytes:
        index, self._blocks = self._blocks, self._blocks + 1
        return _event("content_block_start", index=index, content_block=block)

    def _close_block(self) -> bytes:
        opened, self._open = self._open, None
        return b"" if opened is None else _event("content_block_stop", index=opened[1])

    def _message_delta(self, reason: str | None, usage: UsagePiece) -> bytes:
        delta = {"stop_reason": reason, "stop_sequence": None}
        return _event("message_delta", delta=delta, usage=usage_object(usage))


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind} | fields, kind)
