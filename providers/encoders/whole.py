"""Answers that are not streamed: a recording's pieces as one body, for the formats whose clients ask for it most."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.pieces import FinishPiece, FinishReason, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from engine.provider import ToolCall
from providers.conversation import arguments_object
from providers.recording import Recording

from . import anthropic, openai_chat
from .base import AnswerFacts, with_whole_calls


class WholeAnswer(msgspec.Struct):
    """What an answer came to."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCallPiece] = []
    usage: UsagePiece = UsagePiece(0, 0)
    reason: FinishReason = "stop"


def whole_answer(recording: Recording) -> WholeAnswer:
    """The recording's pieces put together."""
    answer = WholeAnswer()
    for read in with_whole_calls(recording.reads):
        for piece in read.pieces:
            match piece:
                case TextPiece(text):
                    answer.text += text
                case ReasoningPiece(text):
                    answer.reasoning += text
                case ToolCallPiece():
                    answer.calls.append(piece)
                case UsagePiece():
                    answer.usage = piece
                case FinishPiece(reason):
                    answer.reason = reason
    return answer


def chat_completion(answer: WholeAnswer, facts: AnswerFacts) -> dict[str, Any]:
    """OpenAI's ``chat.completion``."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            {
                "id": call.call_id or f"call_{call.index}",
                "type": "function",
                "function": {"name": call.name or "", "arguments": call.arguments_fragment},
            }
            for call in answer.calls
        ]
    reason = openai_chat.REASONS[answer.reason]
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    usage = openai_chat.usage_object(answer.usage)
    return openai_chat.envelope(facts, "chat.completion") | {"choices": [choice], "usage": usage}


def anthropic_message(answer: WholeAnswer, facts: AnswerFacts) -> dict[str, Any]:
    """Anthropic's ``message``."""
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.text:
        content.append({"type": "text", "text": answer.text})
    content += [
        {
            "type": "tool_use",
            "id": call.call_id or f"toolu_{call.index}",
            "name": call.name or "",
            "input": arguments_object(ToolCall("", "", call.arguments_fragment)),
        }
        for call in answer.calls
    ]
    reason = anthropic.REASONS.get(answer.reason, "end_turn")
    return anthropic.empty_message(facts, answer.usage) | {"content": content, "stop_reason": reason}
