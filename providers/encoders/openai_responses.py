"""Encoder of OpenAI's Responses API."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from engine.errors import ProviderErrorCode
from engine.pieces import FinishReason, ToolCallPiece, UsagePiece

from .base import AnswerFacts, Encoder, OpenCalls, event

REASONS: dict[FinishReason, str] = {
    "stop": "completed",
    "tool_calls": "completed",
    "length": "max_output_tokens",
    "content_filter": "content_filter",
}
"""How a response ends: completed, or the reason why it is incomplete."""

_ERRORS: dict[ProviderErrorCode, str] = {
    "upstream.auth": "invalid_api_key",
    "upstream.rate_limit": "rate_limit_exceeded",
    "upstream.overloaded": "engine_overloaded",
    "upstream.context_length": "context_length_exceeded",
    "upstream.content_policy": "invalid_prompt",
    "upstream.invalid_request": "invalid_request_error",
}

ItemKind: TypeAlias = Literal["message", "reasoning", "function_call"]

_PREFIXES: dict[ItemKind, str] = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


class _OutputItem(msgspec.Struct):
    """An item of the output as far as it was told."""

    kind: ItemKind
    item_id: str
    index: int
    text: str = ""
    call: ToolCallPiece | None = None
    done: bool = False

    def as_object(self) -> dict[str, Any]:
        """The item as the events and the response show it."""
        status = "completed" if self.done else "in_progress"
        head: dict[str, Any] = {"id": self.item_id, "type": self.kind}
        match self.kind:
            case "message":
                content = [self.part()] if self.done else []
                return head | {"status": status, "role": "assistant", "content": content}
            case "reasoning":
                return head | {"summary": [self.part()] if self.done else []}
        call = self.call or ToolCallPiece(0)
        named = {"call_id": call.call_id or f"call_{self.item_id}", "name": call.name or ""}
        return head | {"status": status, **named, "arguments": self.text}

    def part(self) -> dict[str, Any]:
        """The one part of a message or a reasoning."""
        if self.kind == "message":
            return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}
        return {"type": "summary_text", "text": self.text}


class ResponsesEncoder(Encoder):
    """Numbered, typed events for output items, closed by completed, incomplete or failed.

    The end is told with the last read, whenever the reason came, as the usage is told with it. A finish reason
    ``error`` is a failure.
    """

    reasons = REASONS

    def __init__(self, facts: AnswerFacts) -> None:
        super().__init__(facts)
        self._sequence = 0
        self._items: list[_OutputItem] = []
        self._open: _OutputItem | None = None
        self._call_items: dict[int, _OutputItem] = {}
        self._calls = OpenCalls(facts)

    def start(self) -> bytes:
        """The response as it begins, twice."""
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def add_text(self, text: str) -> bytes:
        """A delta of a message."""
        frames = self._opened("message")
        return frames + self._part_event("response.output_text.delta", delta=text, logprobs=[])

    def add_reasoning(self, text: str) -> bytes:
        """A delta of a reasoning's summary."""
        frames = self._opened("reasoning")
        return frames + self._part_event("response.reasoning_summary_text.delta", delta=text)

    def add_call(self, piece: ToolCallPiece) -> bytes:
        """A fragment of the arguments; the last one closes its call."""
        frames = b""
        if piece.index not in self._call_items:
            frames = self._close_part() + self._begin("function_call", piece)
            self._call_items[piece.index] = self._items[-1]
        item = self._call_items[piece.index]
        at = {"item_id": item.item_id, "output_index": item.index}
        if piece.arguments_fragment:
            item.text += piece.arguments_fragment
            frames += self._event("response.function_call_arguments.delta", **at, delta=piece.arguments_fragment)
        if self._calls.is_last(piece):
            name = piece.name or (item.call and item.call.name) or ""
            frames += self._event("response.function_call_arguments.done", **at, name=name, arguments=item.text)
            frames += self._end_item(item)
        return frames

    def last_frames(self, reason: str) -> bytes:
        """The last item's end, and the whole response."""
        frames = self._close_part()
        if reason == "completed":
            return frames + self._event("response.completed", response=self._response("completed"))
        response = self._response("incomplete") | {"incomplete_details": {"reason": reason}}
        return frames + self._event("response.incomplete", response=response)

    def failure_frames(self, code: ProviderErrorCode, message: str) -> bytes:
        """The response, failed."""
        error = {"code": _ERRORS.get(code, "server_error"), "message": message}
        return self._event("response.failed", response=self._response("failed") | {"error": error})

    def _opened(self, kind: ItemKind) -> bytes:
        """What comes before a delta of an item of this kind: nothing, if it is the open one."""
        if self._open is not None and self._open.kind == kind:
            return b""
        frames = self._close_part() + self._begin(kind)
        self._open = item = self._items[-1]
        return frames + self._part_event(_PART_EVENTS[kind][0], part=item.part())

    def _begin(self, kind: ItemKind, call: ToolCallPiece | None = None) -> bytes:
        index = len(self._items)
        item = _OutputItem(kind, f"{_PREFIXES[kind]}_{self.facts.answer_id}{index}", index, call=call)
        self._items.append(item)
        return self._event("response.output_item.added", output_index=index, item=item.as_object())

    def _close_part(self) -> bytes:
        item = self._open
        if item is None:
            return b""
        _, text_done, part_done = _PART_EVENTS[item.kind]
        frames = self._part_event(text_done, text=item.text, **({"logprobs": []} if item.kind == "message" else {}))
        frames += self._part_event(part_done, part=item.part())
        self._open = None
        return frames + self._end_item(item)

    def _end_item(self, item: _OutputItem) -> bytes:
        item.done = True
        return self._event("response.output_item.done", output_index=item.index, item=item.as_object())

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        item = self._open
        assert item is not None
        item.text += fields.get("delta", "")
        part = "summary_index" if item.kind == "reasoning" else "content_index"
        return self._event(kind, item_id=item.item_id, output_index=item.index, **{part: 0}, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._sequence = self._sequence, self._sequence + 1
        return event({"type": kind, "sequence_number": number} | fields, kind)

    def _response(self, status: str) -> dict[str, Any]:
        whole = status != "in_progress"
        return {
            "id": f"resp_{self.facts.answer_id}",
            "object": "response",
            "created_at": self.facts.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.facts.model,
            "output": [item.as_object() for item in self._items] if whole else [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": usage_object(self.counted) if whole and self.counted else None,
        }


_PART_EVENTS: dict[ItemKind, tuple[str, str, str]] = {
    "message": ("response.content_part.added", "response.output_text.done", "response.content_part.done"),
    "reasoning": (
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
    ),
}
"""How the part of an item begins, and how its text and the part itself end."""


def usage_object(usage: UsagePiece) -> dict[str, Any]:
    """The counts in the words of this API, which always has the details."""
    counts: dict[str, Any] = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
    if usage.cached_tokens is not None:
        counts["input_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    if usage.reasoning_tokens is not None:
        counts["output_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return counts
