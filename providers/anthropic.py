"""Anthropic's Messages API: request and stream decoder.

Source: Anthropic's API reference ("Messages", "Streaming messages", "Errors") and the types of its Python SDK.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import msgspec

from engine.pieces import FinishPiece, FinishReason, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from engine.provider import Message, ModelRequest, NamedTool, ToolChoice

from .conversation import (
    CallPart,
    CallSpan,
    Span,
    TextPart,
    TextSpan,
    VendorBlock,
    arguments_object,
    data_url,
    outline_piece,
    turn_parts,
    with_extra,
)
from .http import VendorRequest
from .sse import ServerSentEvent
from .vendor_errors import error_from_object
from .wire import Endpoint, EventStreamDecoder, decode_json, encode_json, event_type

NAME = "anthropic"
API_VERSION = "2023-06-01"

DEFAULT_MAX_TOKENS = 8192
"""The API demands a bound. Every model since Claude 3.5 takes this one; a longer answer ends in ``length``."""

STOP_REASONS: dict[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "pause_turn": "length",  # a server tool ran long: the answer is not at its end
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}

_TOOL_CHOICES = {"auto": "auto", "none": "none", "required": "any"}

_EVENTS = frozenset(
    {
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    }
)


class _OutputDetails(msgspec.Struct, gc=False):
    thinking_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens_details: _OutputDetails | None = None


class _Message(msgspec.Struct, gc=False):
    usage: _Usage | None = None


class _Delta(msgspec.Struct, gc=False):
    type: str = ""
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    signature: str | None = None
    stop_reason: str | None = None


class _Start(msgspec.Struct, gc=False):
    """A content block as it begins: of most kinds all but empty."""

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None
    data: Any = None


class _Event(msgspec.Struct, gc=False):
    index: int = 0
    message: _Message | None = None
    content_block: _Start | None = None
    delta: _Delta | None = None
    usage: _Usage | None = None
    error: Any = None


_event_decoder = msgspec.json.Decoder(_Event)


class _Block(msgspec.Struct):
    """A content block of the answer as far as it came; ``call`` is its number among the tool calls, if it is one."""

    start: _Start
    call: int | None = None
    chars: int = 0
    thinking: list[str] = []
    signature: str | None = None
    arguments_began: bool = False


class MessagesDecoder(EventStreamDecoder):
    """Decodes one Messages stream: typed events for numbered content blocks, closed by ``message_stop``.

    The finish piece waits for the end mark: ``message_delta`` may come several times.
    """

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[int, _Block] = {}
        self._calls = 0
        self._usage = _Usage()
        self._finish: FinishReason | None = None

    def decode_event(self, event: ServerSentEvent, pieces: list[Piece]) -> None:
        """Append the pieces of one event; unknown ones mean nothing. Raises ``ProviderError``."""
        kind = event_type(event)
        if kind not in _EVENTS:
            return
        decoded = decode_json(_event_decoder, event.data)
        match kind:
            case "content_block_delta" if decoded.delta is not None and decoded.index in self._blocks:
                self._continue_block(self._blocks[decoded.index], decoded.delta, pieces)
            case "content_block_start" if decoded.content_block is not None:
                self._start_block(decoded.index, decoded.content_block, pieces)
            case "content_block_stop" if decoded.index in self._blocks:
                _close_block(self._blocks[decoded.index], pieces)
            case "message_start" if decoded.message is not None:
                self._add_usage(decoded.message.usage, pieces)
            case "message_delta":
                if decoded.delta is not None and decoded.delta.stop_reason:
                    self._finish = STOP_REASONS.get(decoded.delta.stop_reason, "stop")
                self._add_usage(decoded.usage, pieces)
            case "message_stop":
                self._end(pieces)
            case "error":
                raise error_from_object(decoded.error)

    def _start_block(self, index: int, start: _Start, pieces: list[Piece]) -> None:
        block = self._blocks[index] = _Block(start)
        if start.type == "tool_use":
            block.call, self._calls = self._calls, self._calls + 1
            pieces.append(ToolCallPiece(block.call, start.id, start.name))
        _add_text(block, start.text, pieces)
        _add_thinking(block, start.thinking, pieces)
        block.signature = start.signature

    def _continue_block(self, block: _Block, delta: _Delta, pieces: list[Piece]) -> None:
        match delta.type:
            case "text_delta":
                _add_text(block, delta.text, pieces)
            case "input_json_delta" if delta.partial_json and block.call is not None:
                block.arguments_began = True
                pieces.append(ToolCallPiece(block.call, arguments_fragment=delta.partial_json))
            case "thinking_delta":
                _add_thinking(block, delta.thinking, pieces)
            case "signature_delta":
                block.signature = delta.signature

    def _add_usage(self, usage: _Usage | None, pieces: list[Piece]) -> None:
        """The counts are cumulative, and an event may leave out those that did not change."""
        if usage is not None:
            told = {name: value for name, value in msgspec.structs.asdict(usage).items() if value is not None}
            self._usage = msgspec.structs.replace(self._usage, **told)
            pieces.append(_usage_piece(self._usage))

    def _end(self, pieces: list[Piece]) -> None:
        for block in self._blocks.values():
            _close_block(block, pieces)
        outline = outline_piece([span for block in self._blocks.values() for span in _spans(block)])
        if outline is not None:
            pieces.append(outline)
        pieces.append(FinishPiece(self._finish or ("tool_calls" if self._calls else "stop")))
        self.done = True


def _add_text(block: _Block, text: str | None, pieces: list[Piece]) -> None:
    if text:
        block.chars += len(text)
        pieces.append(TextPiece(text))


def _add_thinking(block: _Block, thinking: str | None, pieces: list[Piece]) -> None:
    if thinking:
        block.thinking.append(thinking)
        pieces.append(ReasoningPiece(thinking))


def _close_block(block: _Block, pieces: list[Piece]) -> None:
    """Arguments without a fragment are those that the block began with, which for most tools is an empty object."""
    if block.call is not None and not block.arguments_began:
        block.arguments_began = True
        whole = msgspec.json.encode(block.start.input or {}).decode()
        pieces.append(ToolCallPiece(block.call, arguments_fragment=whole))


def _usage_piece(usage: _Usage) -> UsagePiece:
    """Input that was read from the cache, or written to it, is not among ``input_tokens`` (Messages API, "Usage")."""
    cached = (usage.cache_creation_input_tokens or 0) + (usage.cache_read_input_tokens or 0)
    details = usage.output_tokens_details
    return UsagePiece(
        (usage.input_tokens or 0) + cached,
        usage.output_tokens or 0,
        reasoning_tokens=details.thinking_tokens if details else None,
        cached_tokens=usage.cache_read_input_tokens,
    )


def _spans(block: _Block) -> Iterator[Span]:
    """The block in the turn's outline. Thinking that was cut before its signature would be refused: it stays out."""
    match block.start.type:
        case "tool_use":
            yield CallSpan(block.start.id or "")
        case "thinking" if block.signature:
            thinking = "".join(block.thinking)
            yield VendorBlock({"type": "thinking", "thinking": thinking, "signature": block.signature})
        case "redacted_thinking":
            yield VendorBlock({"type": "redacted_thinking", "data": block.start.data})
        case _ if block.chars:
            yield TextSpan(block.chars)


def messages_request_body(request: ModelRequest) -> bytes:
    """The JSON body of a streaming request; ``request.extra`` goes in last and may override anything.

    Raises:
        ProviderError: ``upstream.invalid_request`` if something in the request cannot be written as JSON.
    """
    system = [_text_block(message.content) for message in request.messages if message.role == "system"]
    body: dict[str, Any] = {
        "model": request.model,
        "max_tokens": DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
        "messages": _turns(request.messages),
        "stream": True,
    }
    optional: dict[str, Any] = {
        "system": system or None,
        "temperature": request.temperature,
        "stop_sequences": request.stop or None,
        "tools": [
            {"name": tool.name, "description": tool.description, "input_schema": tool.parameters}
            for tool in request.tools
        ]
        or None,
        "tool_choice": _tool_choice(request.tool_choice),
        "output_config": _output_config(request.response_schema),
    }
    body.update({name: value for name, value in optional.items() if value is not None})
    return encode_json(with_extra(body, request.extra))


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation as turns of two roles: all results of a turn's calls must be in the one turn after it."""
    blocks = [
        ("assistant" if message.role == "assistant" else "user", block)
        for message in messages
        if message.role != "system"
        for block in _blocks(message)
    ]
    return [
        {"role": role, "content": [block for _, block in turn]}
        for role, turn in groupby(blocks, key=lambda block: block[0])
    ]


def _blocks(message: Message) -> Iterator[dict[str, Any]]:
    """The message's content blocks. A text block must not be empty."""
    match message.role:
        case "tool":
            yield _tool_result(message)
        case "assistant":
            yield from _assistant_blocks(message)
        case _:
            yield from map(_image_block, message.images)
            if message.content:
                yield _text_block(message.content)


def _assistant_blocks(message: Message) -> Iterator[dict[str, Any]]:
    for part in turn_parts(message, NAME):
        match part:
            case TextPart(text):
                yield _text_block(text)
            case CallPart(call):
                yield {"type": "tool_use", "id": call.call_id, "name": call.name, "input": arguments_object(call)}
            case VendorBlock(block):
                yield block


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image_block(url: str) -> dict[str, Any]:
    source: dict[str, Any] = {"type": "url", "url": url}
    if inline := data_url(url):
        source = {"type": "base64", "media_type": inline[0], "data": inline[1]}
    return {"type": "image", "source": source}


def _tool_result(message: Message) -> dict[str, Any]:
    result: dict[str, Any] = {"type": "tool_result", "tool_use_id": message.tool_call_id}
    if message.content:
        result["content"] = message.content
    if message.tool_failed:
        result["is_error"] = True
    return result


def _tool_choice(choice: ToolChoice | None) -> dict[str, Any] | None:
    match choice:
        case None:
            return None
        case NamedTool(name):
            return {"type": "tool", "name": name}
        case _:
            return {"type": _TOOL_CHOICES[choice]}


def _output_config(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if schema is None else {"format": {"type": "json_schema", "schema": schema}}


class AnthropicWire:
    """Messages at ``{base_url}/v1/messages``; a base URL that ends in ``/v1`` will do."""

    def request(self, request: ModelRequest, endpoint: Endpoint) -> VendorRequest:
        """The HTTP request for a streamed answer. Raises ``ProviderError``."""
        headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "anthropic-version": API_VERSION,
            **endpoint.headers,
        }
        if endpoint.api_key:
            headers["x-api-key"] = endpoint.api_key
        url = f"{endpoint.base_url.removesuffix('/v1')}/v1/messages"
        return VendorRequest(url, headers, messages_request_body(request))

    def decoder(self) -> MessagesDecoder:
        """A decoder for one answer."""
        return MessagesDecoder()
