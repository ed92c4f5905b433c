"""Encoder of Cohere's Chat API v2."""

from __future__ import annotations

from typing import Any

from engine.errors import ProviderErrorCode
from engine.pieces import ToolCallPiece, UsagePiece
from providers.cohere import FINISH_REASONS

from .base import AnswerFacts, Encoder, OpenCalls, event, inverted

REASONS = inverted(FINISH_REASONS)


def error_body(_: ProviderErrorCode, message: str) -> dict[str, Any]:
    """The body of an HTTP error: the status says which."""
    return {"message": message}


def usage_object(usage: UsagePiece) -> dict[str, Any]:
    """The counts in Cohere's words."""
    tokens = {"input_tokens": float(usage.input_tokens), "output_tokens": float(usage.output_tokens)}
    cached = {} if usage.cached_tokens is None else {"cached_tokens": float(usage.cached_tokens)}
    return {"billed_units": tokens, "tokens": tokens, **cached}


class CohereEncoder(Encoder):
    """Typed events for numbered contents and calls, closed by ``message-end``.

    Does not tell of reasoning tokens; a failure in the stream has no kind; finish reasons ``content_filter`` and
    ``error`` are failures. Reasoning is thinking, never a tool plan.
    """

    reasons = REASONS

    def __init__(self, facts: AnswerFacts) -> None:
        super().__init__(facts)
        self._contents = 0
        self._open: str | None = None
        self._calls = OpenCalls(facts)
        self._numbers: dict[int, int] = {}

    def start(self) -> bytes:
        """The event that names the role."""
        message = {"role": "assistant", "content": [], "tool_plan": "", "tool_calls": [], "citations": []}
        return event(
            {"type": "message-start", "id": self.facts.answer_id, "delta": {"message": message}}, "message-start"
        )

    def add_text(self, text: str) -> bytes:
        """A delta of a text content."""
        return self._content("text", text)

    def add_reasoning(self, text: str) -> bytes:
        """A delta of a thinking content."""
        return self._content("thinking", text)

    def add_call(self, piece: ToolCallPiece) -> bytes:
        """A fragment; the last one closes its call."""
        frames = b""
        if piece.index not in self._numbers:
            self._numbers[piece.index] = len(self._numbers)
            function = {"name": piece.name or "", "arguments": ""}
            call = {"id": piece.call_id or f"call_{piece.index}", "type": "function", "function": function}
            frames = self._close_content() + self._call_event("tool-call-start", piece, call)
        if piece.arguments_fragment:
            arguments = {"function": {"arguments": piece.arguments_fragment}}
            frames += self._call_event("tool-call-delta", piece, arguments)
        if self._calls.is_last(piece):
            frames += _event("tool-call-end", index=self._numbers[piece.index])
        return frames

    def last_frames(self, reason: str) -> bytes:
        """The last content's end, and the event with the reason and the counts."""
        usage = {"usage": usage_object(self.counted)} if self.counted else {}
        return self._close_content() + _event("message-end", delta={"finish_reason": reason, **usage})

    def failure_frames(self, _code: ProviderErrorCode, message: str) -> bytes:
        """The end of the message, with an error."""
        return self._close_content() + _event("message-end", delta={"finish_reason": "ERROR", "error": message})

    def _content(self, kind: str, text: str) -> bytes:
        frames = b""
        if self._open != kind:
            frames = self._close_content()
            self._open = kind
            frames += self._content_event("content-start", {"type": kind, kind: ""})
        return frames + self._content_event("content-delta", {kind: text})

    def _close_content(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        self._contents += 1
        return _event("content-end", index=self._contents - 1)

    def _content_event(self, kind: str, content: dict[str, Any]) -> bytes:
        return _event(kind, index=self._contents, delta={"message": {"content": content}})

    def _call_event(self, kind: str, piece: ToolCallPiece, call: dict[str, Any]) -> bytes:
        return _event(kind, index=self._numbers[piece.index], delta={"message": {"tool_calls": call}})


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind} | fields, kind)
