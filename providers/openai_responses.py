"""OpenAI's Responses API: request and stream decoder.

Source: OpenAI's API reference ("Responses", "Streaming events", "Conversation state") and the types of the openai SDK
3.54. Nothing is stored at OpenAI (``store: false``): the conversation goes out whole, encrypted reasoning among it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any

import msgspec

from engine.errors import ProviderError
from engine.pieces import FinishPiece, FinishReason, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from engine.provider import Message, ModelRequest, NamedTool, ToolChoice, ToolSpec

from .conversation import (
    CallPart,
    CallSpan,
    Span,
    TextPart,
    TextSpan,
    VendorBlock,
    outline_piece,
    turn_parts,
    with_extra,
)
from .http import VendorRequest
from .sse import ServerSentEvent
from .vendor_errors import error_from_object
from .wire import Endpoint, EventStreamDecoder, decode_json, encode_json

NAME = "openai_responses"

MODELS_WITHOUT_REASONING = ("gpt-3.5*", "gpt-4*", "ft:gpt-[34]*", "chatgpt-4o*", "gpt-5*-chat-*")
"""Those refuse to be asked for it: "Encrypted content is not supported with this model" (HTTP 400)."""

INCOMPLETE_REASONS: dict[str | None, FinishReason] = {
    "max_output_tokens": "length",
    "max_messages": "length",
    "content_filter": "content_filter",
}
"""An answer that is incomplete for another reason was cut too: ``length``."""


class _InputDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _OutputDetails(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _InputDetails | None = None
    output_tokens_details: _OutputDetails | None = None


class _IncompleteDetails(msgspec.Struct, gc=False):
    reason: str | None = None


class _Response(msgspec.Struct, gc=False):
    usage: _Usage | None = None
    incomplete_details: _IncompleteDetails | None = None
    error: Any = None


class _Item(msgspec.Struct, gc=False):
    type: str = ""
    id: str | None = None
    phase: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class _Event(msgspec.Struct):
    output_index: int = 0
    delta: str = ""
    arguments: str = ""
    item: msgspec.Raw = msgspec.Raw(b"{}")
    response: _Response | None = None
    code: Any = None
    message: Any = None
    error: Any = None


class _Named(msgspec.Struct, gc=False):
    type: str = ""


_named_decoder = msgspec.json.Decoder(_Named)
_event_decoder = msgspec.json.Decoder(_Event)
_item_decoder = msgspec.json.Decoder(_Item)
_whole_decoder = msgspec.json.Decoder(dict[str, Any])


class _Output(msgspec.Struct):
    """An output item as far as it came; ``call`` counts the function calls, ``whole`` is the item at its end."""

    item: _Item
    call: int | None = None
    has_arguments: bool = False
    chars: int = 0
    whole: dict[str, Any] = {}


class ResponsesDecoder(EventStreamDecoder):
    """Decodes one response: typed events for numbered output items, closed by completed, incomplete or failed."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: dict[int, _Output] = {}
        self._calls = 0

    def decode_event(self, event: ServerSentEvent, pieces: list[Piece]) -> None:
        """Append the pieces of one event. Raises ``ProviderError``."""
        name = event.event
        if name == "message":  # some proxies leave the events' names out
            name = decode_json(_named_decoder, event.data).type
        if name in _HANDLERS:
            _HANDLERS[name](self, decode_json(_event_decoder, event.data), pieces)

    def _say(self, event: _Event, pieces: list[Piece]) -> None:
        if event.delta:
            self._outputs.setdefault(event.output_index, _Output(_Item("message"))).chars += len(event.delta)
            pieces.append(TextPiece(event.delta))

    def _reason(self, event: _Event, pieces: list[Piece]) -> None:
        if event.delta:
            pieces.append(ReasoningPiece(event.delta))

    def _add_arguments(self, event: _Event, pieces: list[Piece]) -> None:
        self._call_with(event.output_index, event.delta, pieces)

    def _end_arguments(self, event: _Event, pieces: list[Piece]) -> None:
        """What the whole says is new only if there were no fragments: some servers send none."""
        output = self._outputs.get(event.output_index)
        if output is not None and not output.has_arguments:
            self._call_with(event.output_index, event.arguments, pieces)

    def _call_with(self, index: int, arguments: str, pieces: list[Piece]) -> None:
        output = self._outputs.get(index)
        if arguments and output is not None and output.call is not None:
            output.has_arguments = True
            pieces.append(ToolCallPiece(output.call, arguments_fragment=arguments))

    def _add_item(self, event: _Event, pieces: list[Piece]) -> None:
        item = decode_json(_item_decoder, bytes(event.item))
        output = self._outputs[event.output_index] = _Output(item)
        if item.type == "function_call":
            output.call, self._calls = self._calls, self._calls + 1
            pieces.append(ToolCallPiece(output.call, item.call_id, item.name))

    def _end_item(self, event: _Event, pieces: list[Piece]) -> None:
        if event.output_index not in self._outputs:
            self._add_item(event, pieces)
        output = self._outputs[event.output_index]
        output.item = item = decode_json(_item_decoder, bytes(event.item))
        output.whole = decode_json(_whole_decoder, bytes(event.item))
        self._end_arguments(_Event(event.output_index, arguments=item.arguments or ""), pieces)

    def _complete(self, event: _Event, pieces: list[Piece]) -> None:
        if continuation := outline_piece(self._outline()):
            pieces.append(continuation)
        self._end(event.response, "tool_calls" if self._calls else "stop", pieces)

    def _cut_short(self, event: _Event, pieces: list[Piece]) -> None:
        details = event.response.incomplete_details if event.response else None
        self._end(event.response, INCOMPLETE_REASONS.get(details.reason if details else None, "length"), pieces)

    def _fail(self, event: _Event, pieces: list[Piece]) -> None:
        pieces.extend(_usage_pieces(event.response))
        raise error_from_object(event.response and event.response.error)

    def _report_error(self, event: _Event, _: list[Piece]) -> None:
        raise error_from_object(event.error or {"code": event.code, "message": event.message})

    def _end(self, response: _Response | None, reason: FinishReason, pieces: list[Piece]) -> None:
        pieces.extend(_usage_pieces(response))
        pieces.append(FinishPiece(reason))
        self.done = True

    def _outline(self) -> list[Span]:
        """What is wanted back. Ids are of use only beside the reasoning that belongs to them."""
        outputs = [output for _, output in sorted(self._outputs.items())]
        wanted = ("id", "phase") if any(map(_vendor_block, outputs)) else ("phase",)
        spans: list[Span] = []
        for output in outputs:
            item = output.item
            extra = {name: value for name in wanted if (value := getattr(item, name)) is not None}
            if item.type == "message":
                spans.append(TextSpan(output.chars, extra))
            elif item.type == "function_call":
                spans.append(CallSpan(item.call_id or "", extra))
            elif block := _vendor_block(output):
                spans.append(VendorBlock(block))
        return spans


_HANDLERS: dict[str, Callable[[ResponsesDecoder, _Event, list[Piece]], None]] = {
    "response.output_text.delta": ResponsesDecoder._say,
    "response.refusal.delta": ResponsesDecoder._say,
    "response.reasoning_summary_text.delta": ResponsesDecoder._reason,
    "response.reasoning_text.delta": ResponsesDecoder._reason,
    "response.function_call_arguments.delta": ResponsesDecoder._add_arguments,
    "response.function_call_arguments.done": ResponsesDecoder._end_arguments,
    "response.output_item.added": ResponsesDecoder._add_item,
    "response.output_item.done": ResponsesDecoder._end_item,
    "response.completed": ResponsesDecoder._complete,
    "response.incomplete": ResponsesDecoder._cut_short,
    "response.failed": ResponsesDecoder._fail,
    "error": ResponsesDecoder._report_error,
}
"""The events that mean something to us; there are some fifty others, and more to come."""


def _vendor_block(output: _Output) -> dict[str, Any] | None:
    """The item if it goes back whole. Reasoning that is neither encrypted nor in the clear cannot.

    The API would look it up by its id: "Items are not persisted when `store` is set to false" (HTTP 400).
    """
    block = {name: value for name, value in output.whole.items() if value is not None}
    match output.item.type:
        case "message" | "function_call":
            return None
        case "reasoning" if not (block.get("encrypted_content") or block.get("content")):
            return None
    return block or None


def _usage_pieces(response: _Response | None) -> list[Piece]:
    usage = response and response.usage
    if not usage:
        return []
    reasoning = usage.output_tokens_details.reasoning_tokens if usage.output_tokens_details else None
    cached = usage.input_tokens_details.cached_tokens if usage.input_tokens_details else None
    return [UsagePiece(usage.input_tokens or 0, usage.output_tokens or 0, reasoning, cached)]


def responses_request_body(request: ModelRequest) -> bytes:
    """The JSON body of a streaming request; ``request.extra`` goes in last and may override anything.

    Raises:
        ProviderError: ``upstream.invalid_request``: the API takes no stop sequences, and nothing that JSON cannot say.
    """
    if request.stop:
        raise ProviderError("upstream.invalid_request", "the Responses API takes no stop sequences")
    system = [message.content for message in takewhile(lambda message: message.role == "system", request.messages)]
    body: dict[str, Any] = {
        "model": request.model,
        "input": [item for message in request.messages[len(system) :] for item in _input_items(message)],
        "stream": True,
        "store": False,
    }
    optional: dict[str, Any] = {
        "include": None if _is_without_reasoning(request.model) else ["reasoning.encrypted_content"],
        "instructions": "\n\n".join(system) or None,
        "tools": [_tool(tool) for tool in request.tools] or None,
        "tool_choice": _tool_choice(request.tool_choice),
        "temperature": request.temperature,
        "max_output_tokens": request.max_tokens,
        "text": _text_format(request.response_schema),
    }
    body |= {name: value for name, value in optional.items() if value is not None}
    return encode_json(with_extra(body, request.extra))


def _is_without_reasoning(model: str) -> bool:
    return any(fnmatchcase(model, pattern) for pattern in MODELS_WITHOUT_REASONING)


def _input_items(message: Message) -> Iterator[dict[str, Any]]:
    match message.role:
        case "assistant":
            yield from _assistant_items(message)
        case "tool":
            yield {"type": "function_call_output", "call_id": message.tool_call_id, "output": message.content}
        case role:
            yield {"role": role, "content": _content(message)}


def _content(message: Message) -> Any:
    if not message.images:
        return message.content
    images = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in message.images]
    return [{"type": "input_text", "text": message.content}, *images]


def _assistant_items(message: Message) -> Iterator[dict[str, Any]]:
    """The turn's items in their order; a message has parts and a status only where it has an id."""
    for part in turn_parts(message, NAME):
        match part:
            case TextPart(text, {"id": _} as extra):
                content = [{"type": "output_text", "text": text, "annotations": []}]
                yield {"type": "message", "role": "assistant", "status": "completed", "content": content, **extra}
            case TextPart(text, extra):
                yield {"role": "assistant", "content": text, **extra}
            case CallPart(call, extra):
                arguments = call.arguments or "{}"
                yield {
                    "type": "function_call",
                    "call_id": call.call_id,
                    "name": call.name,
                    "arguments": arguments,
                    **extra,
                }
            case VendorBlock(block):
                yield block


def _tool(tool: ToolSpec) -> dict[str, Any]:
    """Strict is this API's default and takes but a part of JSON Schema: an agent's schema may be any."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", **function, "strict": False}


def _tool_choice(choice: ToolChoice | None) -> Any:
    return {"type": "function", "name": choice.name} if isinstance(choice, NamedTool) else choice


def _text_format(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    if schema is None:
        return None
    return {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}


class ResponsesWire:
    """Responses at ``{base_url}/responses`` with a bearer key."""

    def request(self, request: ModelRequest, endpoint: Endpoint) -> VendorRequest:
        """The HTTP request for a streamed answer. Raises ``ProviderError``."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", **endpoint.headers}
        if endpoint.api_key:
            headers["Authorization"] = f"Bearer {endpoint.api_key}"
        return VendorRequest(f"{endpoint.base_url}/responses", headers, responses_request_body(request))

    def decoder(self) -> ResponsesDecoder:
        """A decoder for one answer."""
        return ResponsesDecoder()
