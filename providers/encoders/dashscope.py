"""Encoder of DashScope's native generation."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.errors import ProviderErrorCode
from engine.pieces import FinishReason, ToolCallPiece, UsagePiece
from providers.dashscope import FINISH_REASONS

from .base import AnswerFacts, Encoder, inverted

REASONS = inverted(FINISH_REASONS)

_ERRORS: dict[ProviderErrorCode, str] = {
    "upstream.auth": "InvalidApiKey",
    "upstream.rate_limit": "Throttling.RateQuota",
    "upstream.overloaded": "ServiceUnavailable",
    "upstream.context_length": "BadRequest.TooLarge",
    "upstream.content_policy": "DataInspectionFailed",
    "upstream.invalid_request": "InvalidParameter",
}


def error_body(code: ProviderErrorCode, message: str) -> dict[str, Any]:
    """The body of an HTTP error, and the data of the event that ends a stream in one."""
    return {"code": _ERRORS.get(code, "InternalError"), "message": message, "request_id": "lumos"}


class DashScopeEncoder(Encoder):
    """Events with one message each, incremental or the whole so far; no end mark. No finish reason ``error``."""

    reasons = REASONS

    def __init__(self, facts: AnswerFacts) -> None:
        super().__init__(facts)
        self._events = 0
        self._text = self._thought = ""
        self._calls: dict[int, ToolCallPiece] = {}
        self._ended = False

    def add_text(self, text: str) -> bytes:
        """An event with text."""
        self._text += text
        return self._result(content=text)

    def add_reasoning(self, text: str) -> bytes:
        """An event with reasoning."""
        self._thought += text
        return self._result(reasoning=text)

    def add_call(self, piece: ToolCallPiece) -> bytes:
        """An event with the fragment."""
        before = self._calls.get(piece.index, ToolCallPiece(piece.index))
        self._calls[piece.index] = ToolCallPiece(
            piece.index,
            before.call_id or piece.call_id,
            before.name or piece.name,
            before.arguments_fragment + piece.arguments_fragment,
        )
        return self._result(calls=(piece,))

    def add_usage(self, usage: UsagePiece) -> bytes:
        """With the reason, or in an event of its own after it."""
        self.counted = usage
        return self._result(reason=REASONS.get(self.reason, "stop")) if self._ended else b""

    def add_finish(self, reason: FinishReason) -> bytes:
        """The event with the reason."""
        self.reason = reason
        if reason not in REASONS:
            return b""
        self._ended = True
        return self._result(reason=REASONS[reason])

    def last_frames(self, _reason: str) -> bytes:
        """Nothing: the body ends."""
        return b""

    def failure_frames(self, code: ProviderErrorCode, message: str) -> bytes:
        """The event that is an error."""
        return self._event("error", 400, error_body(code, message))

    def _result(
        self,
        *,
        content: str = "",
        reasoning: str = "",
        calls: tuple[ToolCallPiece, ...] = (),
        reason: str = "null",
    ) -> bytes:
        if self.facts.cumulative:
            content, reasoning, calls = self._text, self._thought, tuple(self._calls.values())
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = list(map(_call_object, calls))
        output = {"choices": [{"message": message, "finish_reason": reason}]}
        usage = {"usage": usage_object(self.counted)} if self.counted and self._ended else {}
        return self._event("result", 200, {"output": output, **usage, "request_id": self.facts.answer_id})

    def _event(self, kind: str, status: int, data: Any) -> bytes:
        """DashScope writes no space after a colon."""
        self._events += 1
        head = f"id:{self._events}\nevent:{kind}\n:HTTP_STATUS/{status}\ndata:"
        return head.encode() + msgspec.json.encode(data) + b"\n\n"


def _call_object(piece: ToolCallPiece) -> dict[str, Any]:
    function = {"arguments": piece.arguments_fragment, "name": piece.name or ""}
    return {"index": piece.index, "id": piece.call_id or "", "type": "function", "function": function}


def usage_object(usage: UsagePiece) -> dict[str, Any]:
    """The counts in DashScope's words."""
    counts: dict[str, Any] = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
    if usage.cached_tokens is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    if usage.reasoning_tokens is not None:
        counts["output_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return counts
