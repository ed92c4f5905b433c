"""Alibaba's DashScope, Qwen's native API: request and stream decoder.

Source: Alibaba Cloud Model Studio, "DashScope API reference" and "Error codes", and the dashscope SDK 2.0. Qwen's
compatible mode is ``openai_chat``; this one has every option and the models that the other lacks.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import msgspec

from engine.errors import ProviderError
from engine.pieces import FinishPiece, FinishReason, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from engine.provider import Message, ModelRequest, NamedTool, ToolChoice

from .conversation import with_extra
from .http import VendorRequest
from .sse import ServerSentEvent
from .vendor_errors import error_from_object
from .wire import Endpoint, EventStreamDecoder, decode_json, encode_json

MULTIMODAL_MODELS = (
    "qvq*",
    "*-vl*",
    "*-omni*",
    "qwen3.5*",
    "qwen3.6-[!m]*",
    "qwen3.7-[!m]*",
    "qwen3.8*",
    "kimi-k2.[56]*",
)
"""Models that answer under ``multimodal-generation`` alone, also to mere text; ``max`` of 3.6 and 3.7 is none of them.

Under the other path the answer is "url error, please check url" (agentscope#1295, langchain4j-community#585).
"""

FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
}
UNFINISHED = (None, "", "null")
"""While the model writes, the reason is the text "null"."""


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct, gc=False):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Part(msgspec.Struct, gc=False):
    text: str | None = None


class _Message(msgspec.Struct, gc=False):
    content: str | list[_Part] | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int | None = None
    message: _Message | None = None
    finish_reason: str | None = None


class _Output(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    text: str | None = None
    finish_reason: str | None = None


class _InputDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _OutputDetails(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _InputDetails | None = None
    output_tokens_details: _OutputDetails | None = None


class _Chunk(msgspec.Struct, gc=False):
    output: _Output | None = None
    usage: _Usage | None = None
    code: Any = None
    message: Any = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)


class _Unsaid:
    """What a stream that repeats itself says anew; each ``key`` names a text that grows."""

    def __init__(self) -> None:
        self._said: dict[object, str] = {}

    def part(self, key: object, text: str) -> str:
        """The end of the text that was not there before.

        Raises:
            ProviderError: ``upstream.protocol`` if its beginning is another one now: what was said stays said.
        """
        said = self._said.get(key, "")
        if not text.startswith(said):
            raise ProviderError("upstream.protocol", "the model took back what it had said")
        self._said[key] = text
        return text[len(said) :]


class DashScopeDecoder(EventStreamDecoder):
    """Decodes one generation: events with a JSON chunk each; the end of the body is the end, once there is a reason.

    Every event counts the tokens so far: they are reported with the reason, and again if they change after it.
    """

    def __init__(self, *, cumulative: bool = False) -> None:
        super().__init__()
        self._unsaid = _Unsaid() if cumulative else None
        self._named: set[tuple[int, str]] = set()
        self._reported: UsagePiece | None = None

    def decode_event(self, event: ServerSentEvent, pieces: list[Piece]) -> None:
        """Append the pieces of one event. Raises ``ProviderError``."""
        chunk = decode_json(_chunk_decoder, event.data)
        if event.event == "error" or chunk.code:
            raise error_from_object({"code": chunk.code, "message": chunk.message})
        output = chunk.output or _Output()
        reason = output.finish_reason
        self._say(TextPiece, output.text, pieces)  # the format of old models, whatever is asked for
        for choice in output.choices or ():
            if not choice.index:
                self._decode_message(choice.message or _Message(), pieces)
                reason = choice.finish_reason
        self._end(reason, chunk.usage, pieces)

    def _decode_message(self, message: _Message, pieces: list[Piece]) -> None:
        self._say(ReasoningPiece, message.reasoning_content, pieces)
        content = message.content if isinstance(message.content, list) else [_Part(message.content)]
        for position, part in enumerate(content):
            self._say(TextPiece, part.text, pieces, position)
        for position, fragment in enumerate(message.tool_calls or ()):
            self._call(position, fragment, pieces)

    def _say(
        self, kind: type[TextPiece | ReasoningPiece], text: str | None, pieces: list[Piece], position: int = 0
    ) -> None:
        if new := self._new_part((kind, position), text):
            pieces.append(kind(new))

    def _call(self, position: int, fragment: _ToolCall, pieces: list[Piece]) -> None:
        """A fragment, with id and name where they come for the first time: empty ones follow, or the same again."""
        index = position if fragment.index is None else fragment.index
        function = fragment.function or _Function()
        call_id = self._once(index, "id", fragment.id)
        name = self._once(index, "name", function.name)
        arguments = self._new_part(index, function.arguments)
        if call_id or name or arguments:
            pieces.append(ToolCallPiece(index, call_id, name, arguments))

    def _once(self, index: int, field: str, value: str | None) -> str | None:
        if not value or (index, field) in self._named:
            return None
        self._named.add((index, field))
        return value

    def _new_part(self, key: object, text: str | None) -> str:
        return self._unsaid.part(key, text) if self._unsaid and text else text or ""

    def _end(self, reason: str | None, usage: _Usage | None, pieces: list[Piece]) -> None:
        ends = reason not in UNFINISHED and not self.may_end
        if usage is not None and (ends or self.may_end):
            counted = _usage_piece(usage)
            if counted != self._reported:
                self._reported = counted
                pieces.append(counted)
        if ends:
            self.may_end = True
            pieces.append(FinishPiece(FINISH_REASONS.get(reason or "", "stop")))


def _usage_piece(usage: _Usage) -> UsagePiece:
    return UsagePiece(
        usage.input_tokens or 0,
        usage.output_tokens or 0,
        reasoning_tokens=usage.output_tokens_details.reasoning_tokens if usage.output_tokens_details else None,
        cached_tokens=usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None,
    )


def generation_request_body(request: ModelRequest, *, incremental: bool = True) -> bytes:
    """The JSON body of a streaming request; the vendor's options are fields of ``extra["parameters"]``.

    Raises:
        ProviderError: ``upstream.invalid_request``: "some tool, whichever" cannot be asked for, nor what JSON cannot
            say.
    """
    parameters: dict[str, Any] = {
        "result_format": "message",
        "incremental_output": incremental,
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "stop": request.stop or None,
        "tools": [{"type": "function", "function": tool} for tool in request.tools] or None,
        "tool_choice": _tool_choice(request.tool_choice),
        "response_format": _response_format(request.response_schema),
    }
    body = {
        "model": request.model,
        "input": {"messages": [_turn(message) for message in request.messages]},
        "parameters": {name: value for name, value in parameters.items() if value is not None},
    }
    return encode_json(with_extra(body, request.extra))


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        turn["content"] = [*({"image": url} for url in message.images), {"text": message.content}]
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _tool_choice(choice: ToolChoice | None) -> Any:
    match choice:
        case NamedTool(name):
            return {"type": "function", "function": {"name": name}}
        case "required":
            raise ProviderError("upstream.invalid_request", "DashScope cannot be made to call a tool of its choice")
    return choice


def _response_format(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    if schema is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


class DashScopeWire:
    """Generation at ``{base_url}/api/v1/services/aigc/…`` with a bearer key; a base URL ending in ``/api/v1`` will do.

    Args:
        cumulative: whether each event holds the whole text so far, as qwen-mt-plus and servers without incremental
            output send it. Not guessed from the stream: "ha", then "haha" may be either.
        multimodal: whether the model answers under ``multimodal-generation``; None goes by its name and the images.
    """

    def __init__(self, *, cumulative: bool = False, multimodal: bool | None = None) -> None:
        self._cumulative = cumulative
        self._multimodal = multimodal

    def request(self, request: ModelRequest, endpoint: Endpoint) -> VendorRequest:
        """The HTTP request for a streamed answer. Raises ``ProviderError``."""
        headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "X-DashScope-SSE": "enable",
            **endpoint.headers,
        }
        if endpoint.api_key:
            headers["Authorization"] = f"Bearer {endpoint.api_key}"
        service = "multimodal-generation" if self._is_multimodal(request) else "text-generation"
        url = f"{endpoint.base_url.removesuffix('/api/v1')}/api/v1/services/aigc/{service}/generation"
        return VendorRequest(url, headers, generation_request_body(request, incremental=not self._cumulative))

    def decoder(self) -> DashScopeDecoder:
        """A decoder for one answer."""
        return DashScopeDecoder(cumulative=self._cumulative)

    def _is_multimodal(self, request: ModelRequest) -> bool:
        if self._multimodal is not None:
            return self._multimodal
        return any(message.images for message in request.messages) or any(
            fnmatchcase(request.model, pattern) for pattern in MULTIMODAL_MODELS
        )
