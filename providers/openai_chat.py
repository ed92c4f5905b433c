"""OpenAI chat completions, and every server that speaks them: request, stream decoder, provider.

Source: OpenAI's API reference, "Chat Completions streaming"; deviations of compatible servers as noted where they are
handled (``reasoning_content`` of DeepSeek and others, ``reasoning`` of OpenRouter and vLLM).
"""

from __future__ import annotations

from typing import Any

import httpx
import msgspec

from engine.pieces import FinishPiece, FinishReason, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from engine.provider import Message, ModelRequest, NamedTool, ToolChoice

from .http import VendorRequest
from .sse import ServerSentEvent
from .vendor_errors import error_from_object
from .wire import Endpoint, EventStreamDecoder, HttpProvider, decode_json, encode_json

DEFAULT_BASE_URL = "https://api.openai.com/v1"
END_MARK = b"[DONE]"

FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
    "sensitive": "content_filter",  # Zhipu
    "error": "error",
    "network_error": "error",  # Zhipu
    "insufficient_system_resource": "error",  # DeepSeek
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
    function_call: _Function | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    kind: Any = msgspec.field(default=None, name="object")


_chunk_decoder = msgspec.json.Decoder(_Chunk)
_any_decoder = msgspec.json.Decoder()


class ChatDecoder(EventStreamDecoder):
    """Decodes one chat-completions stream: server-sent events with a JSON chunk each, closed by ``[DONE]``.

    Of several choices (``n`` in the request) the first one is the answer. The finish piece waits for the end mark:
    some servers repeat ``finish_reason``, or correct it when a filter has looked at the text.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls = _ToolCalls()
        self._finish: FinishReason | None = None

    def decode_event(self, event: ServerSentEvent, pieces: list[Piece]) -> None:
        """Append the pieces of one chunk. Raises ``ProviderError``."""
        if event.data == END_MARK:
            self.done = True
            pieces.append(FinishPiece(self._finish or ("tool_calls" if self._calls.made else "stop")))
            return
        chunk = decode_json(_chunk_decoder, event.data)
        if chunk.error is not None:
            raise error_from_object(chunk.error)
        if chunk.kind == "error":  # older vLLM: the error is the whole chunk, and the end mark follows
            raise error_from_object(decode_json(_any_decoder, event.data))
        for choice in chunk.choices or ():  # none in usage and content-filter frames
            if not choice.index:
                self._decode_choice(choice, pieces)
        if chunk.usage is not None:
            pieces.append(_usage_piece(chunk.usage))

    def _decode_choice(self, choice: _Choice, pieces: list[Piece]) -> None:
        delta = choice.delta
        if delta is not None:
            if reasoning := delta.reasoning_content or delta.reasoning:
                pieces.append(ReasoningPiece(reasoning))
            if text := delta.content or delta.refusal:
                pieces.append(TextPiece(text))
            pieces += map(self._calls.piece, delta.tool_calls or ())
            if delta.function_call is not None:  # how calls came before there were tools; at most one an answer
                pieces.append(self._calls.piece(_ToolCall(index=0, function=delta.function_call)))
        if choice.finish_reason:
            self._finish = FINISH_REASONS.get(choice.finish_reason, "stop")


class _OpenCall(msgspec.Struct, gc=False):
    """A tool call of the answer: our index, and what was told of it so far."""

    index: int
    call_id: str | None = None
    named: bool = False


class _ToolCalls:
    """Tells an answer's tool calls apart, whatever its server makes of ``index`` and ``id``.

    OpenAI gives each call an index, and its id and name with the first fragment alone. Others leave the index out,
    give it to every call alike, repeat the id in each fragment or make a new one up (vLLM): a call begins where the
    index is new, or where a name comes with an id of its own.
    """

    def __init__(self) -> None:
        self._calls: list[_OpenCall] = []
        self._latest: dict[int | None, _OpenCall] = {}

    @property
    def made(self) -> bool:
        """Whether the answer calls a tool."""
        return bool(self._calls)

    def piece(self, fragment: _ToolCall) -> ToolCallPiece:
        """The fragment as a piece of its call, with id and name where the call did not have them yet."""
        function = fragment.function or _Function()
        call = self._find(fragment, function.name) or self._begin(fragment.index)
        call_id = None if call.call_id else fragment.id or None
        name = None if call.named else function.name or None
        call.call_id = call.call_id or call_id
        call.named = call.named or name is not None
        return ToolCallPiece(call.index, call_id, name, function.arguments or "")

    def _find(self, fragment: _ToolCall, name: str | None) -> _OpenCall | None:
        """The call that the fragment goes on with; None if it begins one."""
        if fragment.index is None:
            same_id = (call for call in self._calls if fragment.id and fragment.id == call.call_id)
            return next(same_id, None if name else self._latest.get(None))
        call = self._latest.get(fragment.index)
        if call is None or not (name and fragment.id):
            return call
        return call if call.call_id in (None, fragment.id) else None

    def _begin(self, index: int | None) -> _OpenCall:
        taken = {call.index for call in self._calls}
        free = max(taken, default=-1) + 1
        call = _OpenCall(free if index is None or index in taken else index)
        self._calls.append(call)
        self._latest[index] = call
        return call


def _usage_piece(usage: _Usage) -> UsagePiece:
    return UsagePiece(
        usage.prompt_tokens or 0,
        usage.completion_tokens or 0,
        reasoning_tokens=usage.completion_tokens_details.reasoning_tokens if usage.completion_tokens_details else None,
        cached_tokens=usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None,
    )


def chat_request_body(request: ModelRequest) -> bytes:
    """The JSON body of a streaming request; ``request.extra`` goes in last and may override anything.

    Raises:
        ProviderError: ``upstream.invalid_request`` if something in the request cannot be written as JSON.
    """
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [_chat_message(message) for message in request.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    optional: dict[str, Any] = {
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "stop": request.stop or None,
        "tools": [{"type": "function", "function": tool} for tool in request.tools] or None,
        "tool_choice": _tool_choice(request.tool_choice),
        "response_format": _response_format(request.response_schema),
    }
    body.update({name: value for name, value in optional.items() if value is not None})
    return encode_json(body | request.extra)


def _chat_message(message: Message) -> dict[str, Any]:
    chat: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        images = [{"type": "image_url", "image_url": {"url": url}} for url in message.images]
        chat["content"] = [{"type": "text", "text": message.content}, *images]
    if message.tool_calls:
        chat["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        chat["tool_call_id"] = message.tool_call_id
    return chat


def _tool_choice(choice: ToolChoice | None) -> Any:
    if isinstance(choice, NamedTool):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def _response_format(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    if schema is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


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
