"""Cohere's Chat API v2: request and stream decoder.

Source: Cohere's API reference ("Chat with streaming", "Streaming responses", "Tool use") and the types of its Python
SDK.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.errors import ProviderError
from engine.pieces import (
    ContinuationPiece,
    FinishPiece,
    FinishReason,
    Piece,
    ReasoningPiece,
    TextPiece,
    ToolCallPiece,
    UsagePiece,
)
from engine.provider import Message, ModelRequest, NamedTool

from .conversation import with_extra
from .http import VendorRequest
from .sse import ServerSentEvent
from .vendor_errors import error_from_object
from .wire import Endpoint, EventStreamDecoder, decode_json, encode_json, event_type

NAME = "cohere"

FINISH_REASONS: dict[str, FinishReason] = {
    "COMPLETE": "stop",
    "STOP_SEQUENCE": "stop",
    "MAX_TOKENS": "length",
    "TOOL_CALL": "tool_calls",
}
FAILURES = frozenset({"ERROR", "TIMEOUT"})

_EVENTS = frozenset(
    {
        "content-start",
        "content-delta",
        "tool-plan-delta",
        "tool-call-start",
        "tool-call-delta",
        "tool-call-end",
        "message-end",
    }
)
_TOOL_CHOICES = {"auto": None, "none": "NONE", "required": "REQUIRED"}


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct, gc=False):
    id: str | None = None
    function: _Function | None = None


class _Content(msgspec.Struct, gc=False):
    text: str | None = None
    thinking: str | None = None


class _Message(msgspec.Struct, gc=False):
    content: _Content | None = None
    tool_plan: str | None = None
    tool_calls: _ToolCall | None = None


class _Tokens(msgspec.Struct, gc=False):
    input_tokens: float | None = None
    output_tokens: float | None = None


class _Usage(msgspec.Struct, gc=False):
    tokens: _Tokens | None = None
    billed_units: _Tokens | None = None
    cached_tokens: float | None = None


class _Delta(msgspec.Struct, gc=False):
    message: _Message | None = None
    finish_reason: str | None = None
    error: str | None = None
    usage: _Usage | None = None


class _Event(msgspec.Struct, gc=False):
    index: int | None = None
    delta: _Delta | None = None


_event_decoder = msgspec.json.Decoder(_Event)


class _Call(msgspec.Struct):
    """A tool call of the answer; ``held`` is the beginning of arguments that may still turn out to be ``null``."""

    index: int
    vendor_index: int | None
    held: str = ""
    arguments_began: bool = False


class CohereDecoder(EventStreamDecoder):
    """Decodes one chat stream: typed events, closed by ``message-end``."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Call] = []
        self._tool_plan: list[str] = []

    def decode_event(self, event: ServerSentEvent, pieces: list[Piece]) -> None:
        """Append the pieces of one event; unknown ones mean nothing. Raises ``ProviderError``."""
        kind = event_type(event)
        if kind not in _EVENTS:
            return
        decoded = decode_json(_event_decoder, event.data)
        delta = decoded.delta or _Delta()
        message = delta.message or _Message()
        match kind:
            case "content-start" | "content-delta":
                _add_content(message.content or _Content(), pieces)
            case "tool-plan-delta" if message.tool_plan:
                self._tool_plan.append(message.tool_plan)
                pieces.append(ReasoningPiece(message.tool_plan))
            case "tool-call-start":
                self._start_call(decoded.index, message.tool_calls or _ToolCall(), pieces)
            case "tool-call-delta" if call := self._find_call(decoded.index):
                function = (message.tool_calls and message.tool_calls.function) or _Function()
                _add_arguments(call, function.arguments or "", pieces)
            case "tool-call-end" if call := self._find_call(decoded.index):
                _close_call(call, pieces)
            case "message-end":
                self._end(delta, pieces)

    def _start_call(self, index: int | None, tool_call: _ToolCall, pieces: list[Piece]) -> None:
        function = tool_call.function or _Function()
        call = _Call(len(self._calls), index)
        self._calls.append(call)
        pieces.append(ToolCallPiece(call.index, tool_call.id, function.name))
        _add_arguments(call, function.arguments or "", pieces)

    def _find_call(self, index: int | None) -> _Call | None:
        """The latest call with this index; the SDK's types let an event leave it out, which means the latest of all."""
        return next((call for call in reversed(self._calls) if index in (None, call.vendor_index)), None)

    def _end(self, delta: _Delta, pieces: list[Piece]) -> None:
        if delta.usage is not None:
            pieces.append(_usage_piece(delta.usage))
        if delta.error or delta.finish_reason in FAILURES:
            raise error_from_object(delta.error or f"the answer ended in {delta.finish_reason}")
        for call in self._calls:
            _close_call(call, pieces)
        if self._tool_plan:
            pieces.append(ContinuationPiece({"tool_plan": "".join(self._tool_plan)}))
        pieces.append(FinishPiece(FINISH_REASONS.get(delta.finish_reason or "", "stop")))
        self.done = True


def _add_content(content: _Content, pieces: list[Piece]) -> None:
    if content.thinking:
        pieces.append(ReasoningPiece(content.thinking))
    if content.text:
        pieces.append(TextPiece(content.text))


def _add_arguments(call: _Call, fragment: str, pieces: list[Piece]) -> None:
    """Arguments of a tool without parameters may be ``null``, or nothing at all (vercel/ai, cohere provider)."""
    if not call.arguments_began:
        call.held += fragment
        if "null".startswith(call.held.strip()):
            return
        fragment, call.held, call.arguments_began = call.held, "", True
    if fragment:
        pieces.append(ToolCallPiece(call.index, arguments_fragment=fragment))


def _close_call(call: _Call, pieces: list[Piece]) -> None:
    if not call.arguments_began:
        call.arguments_began = True
        pieces.append(ToolCallPiece(call.index, arguments_fragment="{}"))


def _usage_piece(usage: _Usage) -> UsagePiece:
    """Cohere's figures are floats. What the model read and wrote stands before what is billed of it."""
    tokens = usage.tokens or usage.billed_units or _Tokens()
    return UsagePiece(
        int(tokens.input_tokens or 0),
        int(tokens.output_tokens or 0),
        cached_tokens=None if usage.cached_tokens is None else int(usage.cached_tokens),
    )


def chat_request_body(request: ModelRequest) -> bytes:
    """The JSON body of a streaming request; ``request.extra`` goes in last and may override anything.

    Raises:
        ProviderError: ``upstream.invalid_request`` if the tool that must be called is not offered, or something in the
            request cannot be written as JSON.
    """
    tools, tool_choice = _tools(request)
    body: dict[str, Any] = {"model": request.model, "messages": _messages(request.messages), "stream": True}
    optional: dict[str, Any] = {
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "stop_sequences": request.stop or None,
        "tools": tools or None,
        "tool_choice": tool_choice,
        "response_format": _response_format(request.response_schema),
    }
    body.update({name: value for name, value in optional.items() if value is not None})
    return encode_json(with_extra(body, request.extra))


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation; the system's turn must be one, and the first ("Errors", HTTP 400)."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    chat = [_chat_message(message) for message in messages if message.role != "system"]
    return [{"role": "system", "content": system}, *chat] if system else chat


def _chat_message(message: Message) -> dict[str, Any]:
    match message.role:
        case "tool":
            return {"role": "tool", "tool_call_id": message.tool_call_id, "content": message.content}
        case "assistant" if message.tool_calls:
            return _calling_message(message)
        case _ if message.images:
            images = [{"type": "image_url", "image_url": {"url": url}} for url in message.images]
            text = [{"type": "text", "text": message.content}] if message.content else []
            return {"role": message.role, "content": [*text, *images]}
        case _:
            return {"role": message.role, "content": message.content}


def _calling_message(message: Message) -> dict[str, Any]:
    """An assistant turn that calls tools. Its plan goes back with it ("Tool use", step 2)."""
    chat: dict[str, Any] = {
        "role": "assistant",
        "tool_calls": [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments or "{}"},
            }
            for call in message.tool_calls
        ],
    }
    if message.content:
        chat["content"] = message.content
    if message.continued_by == NAME and isinstance(message.continuation, dict):
        chat["tool_plan"] = message.continuation.get("tool_plan")
    return chat


def _tools(request: ModelRequest) -> tuple[list[dict[str, Any]], str | None]:
    """The tools and the choice among them. Cohere cannot name one: it is then the only one that is offered."""
    choice, tools = request.tool_choice, request.tools
    if isinstance(choice, NamedTool):
        tools = tuple(tool for tool in tools if tool.name == choice.name)
        if not tools:
            raise ProviderError(
                "upstream.invalid_request", f"the tool {choice.name!r} that must be called is not offered"
            )
        choice = "required"
    functions = [{"type": "function", "function": tool} for tool in tools]
    return functions, None if choice is None else _TOOL_CHOICES[choice]


def _response_format(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if schema is None else {"type": "json_object", "json_schema": schema}


class CohereWire:
    """Chat at ``{base_url}/v2/chat`` with a bearer key; a base URL that ends in ``/v2`` will do."""

    def request(self, request: ModelRequest, endpoint: Endpoint) -> VendorRequest:
        """The HTTP request for a streamed answer. Raises ``ProviderError``."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", **endpoint.headers}
        if endpoint.api_key:
            headers["Authorization"] = f"Bearer {endpoint.api_key}"
        url = f"{endpoint.base_url.removesuffix('/v2')}/v2/chat"
        return VendorRequest(url, headers, chat_request_body(request))

    def decoder(self) -> CohereDecoder:
        """A decoder for one answer."""
        return CohereDecoder()
