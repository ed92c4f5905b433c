"""Encoder of Baidu's first ERNIE API."""

from __future__ import annotations

from typing import Any

from engine.errors import ProviderErrorCode
from engine.pieces import ToolCallPiece
from providers.baidu_v1 import FINISH_REASONS

from .base import AnswerFacts, Encoder, event, inverted

_WORDS = inverted(FINISH_REASONS)
REASONS = {reason: word for reason, word in _WORDS.items() if word is not None}

_ERRORS: dict[ProviderErrorCode, int] = {
    "upstream.auth": 110,
    "upstream.rate_limit": 18,
    "upstream.overloaded": 336100,
    "upstream.context_length": 336103,
    "upstream.invalid_request": 336003,
}
_SERVER_ERROR = 336000


def error_body(code: ProviderErrorCode, message: str) -> dict[str, Any]:
    """The body of an error, under HTTP 200, and the event that ends a stream in one."""
    return {"error_code": _ERRORS.get(code, _SERVER_ERROR), "error_msg": message}


class ErnieEncoder(Encoder):
    """Events with a piece of the result each, closed by the one with ``is_end``.

    One whole tool call, whose id is the answer's; reasoning only as that call's ``thoughts``; counts without details;
    no content policy among the errors and no finish reason ``error``. What is beyond that is left out.
    """

    whole_calls = True
    reasons = REASONS

    def __init__(self, facts: AnswerFacts) -> None:
        super().__init__(facts)
        self._events = 0
        self._thoughts = ""
        self._called = False

    def add_text(self, text: str) -> bytes:
        """An event with text."""
        return self._chunk({"result": text})

    def add_reasoning(self, text: str) -> bytes:
        """Kept for the call."""
        self._thoughts += text
        return b""

    def add_call(self, piece: ToolCallPiece) -> bytes:
        """An event with the call; there is room for one."""
        if self._called:
            return b""
        self._called = True
        call = {"name": piece.name or "", "arguments": piece.arguments_fragment}
        thoughts = {"thoughts": self._thoughts} if self._thoughts else {}
        return self._chunk({"result": "", "function_call": call | thoughts, "finish_reason": "function_call"})

    def last_frames(self, reason: str) -> bytes:
        """The event that is the end."""
        return self._chunk({"result": "", "is_end": True, "finish_reason": reason})

    def failure_frames(self, code: ProviderErrorCode, message: str) -> bytes:
        """An event that is an error."""
        return event({**error_body(code, message), "id": self._id()})

    def _id(self) -> str:
        return f"as-{self.facts.answer_id}"

    def _chunk(self, fields: dict[str, Any]) -> bytes:
        number, self._events = self._events, self._events + 1
        head = {"id": self._id(), "object": "chat.completion", "created": self.facts.created, "sentence_id": number}
        state = {"is_end": False, "is_truncated": False, "need_clear_history": False, "finish_reason": "normal"}
        return event({**head, **state, **self._counts(), **fields})

    def _counts(self) -> dict[str, Any]:
        usage = self.counted
        if usage is None:
            return {}
        total = usage.input_tokens + usage.output_tokens
        counts = {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens, "total_tokens": total}
        return {"usage": counts}
