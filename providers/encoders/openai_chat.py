"""Encoder of OpenAI's chat completions, of which many vendors speak a dialect."""

from __future__ import annotations

from typing import Any

from engine.errors import ProviderErrorCode
from engine.pieces import FinishReason, ToolCallPiece, UsagePiece
from providers.openai_chat import END_MARK, FINISH_REASONS

from .base import AnswerFacts, Encoder, event, inverted

REASONS = inverted(FINISH_REASONS)

_ERRORS: dict[ProviderErrorCode, tuple[str, str | None]] = {
    "upstream.auth": ("invalid_request_error", "invalid_api_key"),
    "upstream.rate_limit": ("requests", "rate_limit_exceeded"),
    "upstream.overloaded": ("server_error", "engine_overloaded"),
    "upstream.context_length": ("invalid_request_error", "context_length_exceeded"),
    "upstream.content_policy": ("invalid_request_error", "content_policy_violation"),
    "upstream.invalid_request": ("invalid_request_error", None),
}
_SERVER_ERROR = ("server_error", None)


def error_body(code: ProviderErrorCode, message: str) -> dict[str, Any]:
    """The body of an HTTP error, and the chunk that ends a stream in one."""
    kind, name = _ERRORS.get(code, _SERVER_ERROR)
    return {"error": {"message": message, "type": kind, "param": None, "code": name}}


def usage_object(usage: UsagePiece) -> dict[str, Any]:
    """The counts in OpenAI's words."""
    counts: dict[str, Any] = {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
    if usage.cached_tokens is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    if usage.reasoning_tokens is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return counts


class ChatEncoder(Encoder):
    """Chunks with one delta each, closed by ``[DONE]``. Usage only for clients that ask for it, as OpenAI does."""

    reasons = REASONS

    def start(self) -> bytes:
        """The chunk that names the role."""
        return self._chunk({"role": "assistant", "content": ""})

    def add_text(self, text: str) -> bytes:
        """A chunk of text."""
        return self._chunk({"content": text})

    def add_reasoning(self, text: str) -> bytes:
        """A chunk of reasoning, in the field that most vendors have it in."""
        return self._chunk({"reasoning_content": text})

    def add_call(self, piece: ToolCallPiece) -> bytes:
        """A chunk with the fragment; id and name are in the first of a call alone."""
        function = {"name": piece.name} if piece.name is not None else {}
        head = {"id": piece.call_id} if piece.call_id is not None else {}
        kind = {"type": "function"} if head or function else {}
        fragment = {"index": piece.index, **head, **kind}
        return self._chunk(
            {"tool_calls": [fragment | {"function": function | {"arguments": piece.arguments_fragment}}]}
        )

    def add_usage(self, usage: UsagePiece) -> bytes:
        """A chunk without choices."""
        return event(self._envelope([]) | {"usage": usage_object(usage)}) if self.facts.asks_usage else b""

    def add_finish(self, reason: FinishReason) -> bytes:
        """The chunk with the reason, which a usage may still follow."""
        return self._chunk({}, REASONS[reason])

    def last_frames(self, _reason: str) -> bytes:
        """The end mark."""
        return b"data: " + END_MARK + b"\n\n"

    def failure_frames(self, code: ProviderErrorCode, message: str) -> bytes:
        """A chunk that is an error."""
        return event(error_body(code, message))

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event(self._envelope([choice]))

    def _envelope(self, choices: list[Any]) -> dict[str, Any]:
        usage = {"usage": None} if self.facts.asks_usage else {}
        return envelope(self.facts, "chat.completion.chunk") | {"choices": choices} | usage


def envelope(facts: AnswerFacts, kind: str) -> dict[str, Any]:
    """What every chunk of an answer says, and the whole answer too."""
    return {"id": f"chatcmpl-{facts.answer_id}", "object": kind, "created": facts.created, "model": facts.model}
