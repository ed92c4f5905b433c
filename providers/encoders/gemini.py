"""Encoder of Google's ``streamGenerateContent``."""

from __future__ import annotations

from typing import Any

from engine.errors import ProviderErrorCode
from engine.pieces import FinishReason, ToolCallPiece, UsagePiece
from engine.provider import ToolCall
from providers.conversation import arguments_object
from providers.gemini import FINISH_REASONS

from .base import Encoder, event, inverted

REASONS: dict[FinishReason, str] = {**inverted(FINISH_REASONS), "tool_calls": "STOP", "error": "OTHER"}

_ERRORS: dict[ProviderErrorCode, tuple[int, str]] = {
    "upstream.auth": (401, "UNAUTHENTICATED"),
    "upstream.rate_limit": (429, "RESOURCE_EXHAUSTED"),
    "upstream.overloaded": (503, "UNAVAILABLE"),
    "upstream.context_length": (400, "INVALID_ARGUMENT"),
    "upstream.content_policy": (400, "INVALID_ARGUMENT"),
    "upstream.invalid_request": (400, "INVALID_ARGUMENT"),
}
_SERVER_ERROR = (500, "INTERNAL")
_TOO_LONG = "The input token count exceeds the maximum number of tokens allowed"
"""What tells this from any other bad argument are the words alone."""


def error_body(code: ProviderErrorCode, message: str) -> dict[str, Any]:
    """The body of an HTTP error, and the chunk that ends a stream in one."""
    number, status = _ERRORS.get(code, _SERVER_ERROR)
    if code == "upstream.context_length":
        message = f"{_TOO_LONG}: {message}"
    return {"error": {"code": number, "message": message, "status": status}}


def usage_object(usage: UsagePiece) -> dict[str, Any]:
    """The counts in Google's words: thoughts are not among the candidates' tokens."""
    counts = {
        "promptTokenCount": usage.input_tokens,
        "candidatesTokenCount": usage.output_tokens - (usage.reasoning_tokens or 0),
        "totalTokenCount": usage.input_tokens + usage.output_tokens,
    }
    if usage.reasoning_tokens is not None:
        counts["thoughtsTokenCount"] = usage.reasoning_tokens
    if usage.cached_tokens is not None:
        counts["cachedContentTokenCount"] = usage.cached_tokens
    return counts


class GenerateContentEncoder(Encoder):
    """Chunks with one part each; no end mark. Tool calls are whole, with arguments as an object."""

    whole_calls = True
    reasons = REASONS

    def add_text(self, text: str) -> bytes:
        """A part of text."""
        return self._part({"text": text})

    def add_reasoning(self, text: str) -> bytes:
        """A part that is a thought."""
        return self._part({"text": text, "thought": True})

    def add_call(self, piece: ToolCallPiece) -> bytes:
        """A part that calls."""
        name = piece.name or ""
        arguments = arguments_object(ToolCall(piece.call_id or "", name, piece.arguments_fragment))
        call = {"id": piece.call_id} if piece.call_id is not None else {}
        return self._part({"functionCall": {**call, "name": name, "args": arguments}})

    def add_usage(self, usage: UsagePiece) -> bytes:
        """A chunk without candidates."""
        return self._chunk({"usageMetadata": usage_object(usage)})

    def add_finish(self, reason: FinishReason) -> bytes:
        """The chunk with the reason: what comes after it are counts."""
        return self._chunk({"candidates": [{"finishReason": REASONS[reason], "index": 0}]})

    def last_frames(self, _reason: str) -> bytes:
        """Nothing: the body ends."""
        return b""

    def failure_frames(self, code: ProviderErrorCode, message: str) -> bytes:
        """A chunk that is an error; a prompt that is blocked is no error but a feedback."""
        if code == "upstream.content_policy":
            return self._chunk({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}})
        return event(error_body(code, message))

    def _part(self, part: dict[str, Any]) -> bytes:
        content = {"parts": [part], "role": "model"}
        return self._chunk({"candidates": [{"content": content, "index": 0}]})

    def _chunk(self, fields: dict[str, Any]) -> bytes:
        return event({**fields, "modelVersion": self.facts.model, "responseId": self.facts.answer_id})
