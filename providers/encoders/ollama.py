"""Encoder of Ollama's own chat API."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from engine.errors import ProviderErrorCode
from engine.pieces import ToolCallPiece
from engine.provider import ToolCall
from providers.conversation import arguments_object
from providers.ollama import DONE_REASONS

from .base import Encoder, inverted

_DONE_WORDS = inverted(DONE_REASONS)
REASONS = {reason: word for reason, word in _DONE_WORDS.items() if word is not None} | {"tool_calls": "stop"}


def error_body(_: ProviderErrorCode, message: str) -> dict[str, Any]:
    """The body of an HTTP error, and the line that ends a stream in one: neither has a kind."""
    return {"error": message}


class OllamaEncoder(Encoder):
    """A line of JSON for each piece, closed by the one with ``done``. Tool calls are whole.

    Does not tell of cached or reasoning tokens; the finish reason ``content_filter`` is a failure.
    """

    content_type = "application/x-ndjson"
    whole_calls = True
    reasons = REASONS

    def add_text(self, text: str) -> bytes:
        """A line of text."""
        return self._line({"content": text})

    def add_reasoning(self, text: str) -> bytes:
        """A line of thinking."""
        return self._line({"content": "", "thinking": text})

    def add_call(self, piece: ToolCallPiece) -> bytes:
        """A line with the call, its arguments an object."""
        name = piece.name or ""
        arguments = arguments_object(ToolCall(piece.call_id or "", name, piece.arguments_fragment))
        call = {"id": piece.call_id} if piece.call_id is not None else {}
        function = {"index": piece.index, "name": name, "arguments": arguments}
        return self._line({"content": "", "tool_calls": [{**call, "function": function}]})

    def last_frames(self, reason: str) -> bytes:
        """The line that says it is done, with the counts."""
        usage = self.counted
        counts = {"prompt_eval_count": usage.input_tokens, "eval_count": usage.output_tokens} if usage else {}
        durations = {"total_duration": 0, "load_duration": 0, "prompt_eval_duration": 0, "eval_duration": 0}
        return self._line({"content": ""}, {"done": True, "done_reason": reason, **durations, **counts})

    def failure_frames(self, code: ProviderErrorCode, message: str) -> bytes:
        """A line that is an error."""
        return msgspec.json.encode(error_body(code, message)) + b"\n"

    def _line(self, message: dict[str, Any], end: dict[str, Any] | None = None) -> bytes:
        created = datetime.fromtimestamp(self.facts.created, UTC).isoformat().replace("+00:00", "Z")
        head = {"model": self.facts.model, "created_at": created, "message": {"role": "assistant", **message}}
        return msgspec.json.encode(head | (end or {"done": False})) + b"\n"
