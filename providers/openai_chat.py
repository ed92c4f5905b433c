"""OpenAI chat completions, and every server that speaks them: request, stream decoder, provider.

Source: OpenAI's API reference, "Chat Completions streaming"; deviations of compatible servers as noted where they are
handled (``reasoning_content`` of DeepSeek and others, ``reasoning`` of OpenRouter and vLLM).
"""

from __future__ import annotations

from typing import Any

import httpx
import msgspec

from engine.pieces import FinishPiece, FinishReason, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from engine.provider import Message, ModelRequest

from .http import VendorRequest
from .sse import ServerSentEvent
from .vendor_errors import error_from_object
from .wire import Endpoint, EventStreamDecoder, HttpProvider, decode_json

DEFAULT_BASE_URL = "https://api.openai.com/v1"
END_MARK = b"[DONE]"

FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
    "error": "error",
}


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct, gc=False):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)


class ChatDecoder(EventStreamDecoder):
    """Decodes one chat-completions stream: server-sent events with a JSON chunk each, closed by ``[DONE]``."""

    def decode_event(self, event: ServerSentEvent, pieces: list[Piece]) -> None:
        """Append the pieces of one chunk. Raises ``ProviderError``."""
        if event.data == END_MARK:
            self.done = True
            return
        chunk = decode_json(_chunk_decoder, event.data)
        if chunk.error is not None:
            raise error_from_object(chunk.error)
        if chunk.choices:  # empty in usage and content-filter frames
            self._decode_choice(chunk.choices[0], pieces)
        if chunk.usage is not None:
            pieces.append(_usage_piece(chunk.usage))

    def _decode_choice(self, choice: _Choice, pieces: list[Piece]) -> None:
        delta = choice.delta
        if delta is not None:
            if reasoning := delta.reasoning_content or delta.reasoning:
                pieces.append(ReasoningPiece(reasoning))
            if text := delta.content or delta.refusal:
                pieces.append(TextPiece(text))
            for position, call in enumerate(delta.tool_calls or ()):
                pieces.append(_tool_call_piece(position, call))
        if choice.finish_reason:
            pieces.append(FinishPiece(FINISH_REASONS.get(choice.finish_reason, "stop")))


def _tool_call_piece(position: int, call: _ToolCall) -> ToolCallPiece:
    """Some servers leave the index out when they send whole calls: the position in the list stands for it."""
    function = call.function or _Function()
    index = position if call.index is None else call.index
    return ToolCallPiece(index, call.id or None, function.name or None, function.arguments or "")


def _usage_piece(usage: _Usage) -> UsagePiece:
    return UsagePiece(
        usage.prompt_tokens,
        usage.completion_tokens,
        reasoning_tokens=usage.completion_tokens_details.reasoning_tokens if usage.completion_tokens_details else None,
        cached_tokens=usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None,
    )


def chat_request_body(request: ModelRequest) -> bytes:
    """The JSON body of a streaming request; ``request.extra`` goes in last and may override anything."""
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [_chat_message(message) for message in request.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    optional: dict[str, Any] = {
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "stop": list(request.stop) or None,
        "tools": [{"type": "function", "function": tool} for tool in request.tools] or None,
    }
    body.update({name: value for name, value in optional.items() if value is not None})
    return msgspec.json.encode(body | request.extra)


def _chat_message(message: Message) -> dict[str, Any]:
    chat: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        chat["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        chat["tool_call_id"] = message.tool_call_id
    return chat


class ChatWire:
    """Chat completions at ``{base_url}/chat/completions`` with a bearer key."""

    def request(self, request: ModelRequest, endpoint: Endpoint) -> VendorRequest:
        """The HTTP request for a streamed answer."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", **endpoint.headers}
        if endpoint.api_key:
            headers["Authorization"] = f"Bearer {endpoint.api_key}"
        return VendorRequest(f"{endpoint.base_url}/chat/completions", headers, chat_request_body(request))

    def decoder(self) -> ChatDecoder:
        """A decoder for one answer."""
        return ChatDecoder()


class OpenAIChatProvider(HttpProvider):
    """OpenAI, or any server that speaks its chat completions at ``base_url``."""

    def __init__(
        self,
        *,
        api_key: str | None = None,
        base_url: str = DEFAULT_BASE_URL,
        name: str = "openai",
        client: httpx.AsyncClient | None = None,
    ) -> None:
        super().__init__(name, ChatWire(), Endpoint(base_url.rstrip("/"), api_key), client)
