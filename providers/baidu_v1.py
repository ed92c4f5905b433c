"""Baidu's first ERNIE API (``wenxinworkshop``): request and stream decoder. Newer models are at ``baidu``, version 2.

Source: Baidu's API reference of the ERNIE models, its list of error codes, and the qianfan SDK 0.4.12. There is one
function call an answer, without an id; the model is a part of the URL's path, and the access token a part of its query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from engine.errors import ProviderError
from engine.pieces import FinishPiece, FinishReason, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from engine.provider import Message, ModelRequest, NamedTool, ToolChoice

from .conversation import with_extra
from .http import VendorRequest
from .sse import ServerSentEvent
from .vendor_errors import error_from_object
from .wire import Endpoint, EventStreamDecoder, decode_json, encode_json

MODEL_PATHS: dict[str, str] = {
    "ernie-bot": "completions",
    "ernie-bot-4": "completions_pro",
    "ernie-bot-turbo": "eb-instant",
    "ernie-3.5-8k": "completions",
    "ernie-4.0-8k": "completions_pro",
    "ernie-lite-8k-0922": "eb-instant",
    "ernie-lite-8k-0308": "ernie-lite-8k",
    "ernie-speed-8k": "ernie_speed",
    "ernie-character-8k": "ernie-char-8k",
    "ernie-function-8k": "ernie-func-8k",
}
"""Models whose path is not their name in small letters, as that of most is, and of whatever a user deploys."""

FINISH_REASONS: dict[str | None, FinishReason] = {
    "normal": "stop",
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
    "function_call": "tool_calls",
}


class _FunctionCall(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None
    thoughts: str | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct, gc=False):
    id: str | None = None
    result: str | None = None
    function_call: _FunctionCall | None = None
    is_end: bool = False
    is_truncated: bool | None = None
    need_clear_history: bool | None = None
    finish_reason: str | None = None
    usage: _Usage | None = None
    error_code: Any = None
    error_msg: Any = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)


class BaiduV1Decoder(EventStreamDecoder):
    """Decodes one answer: events with a piece of the result each, closed by the one with ``is_end``, its text included.

    Every event has a usage, but its figures are right in the last one alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._call: _FunctionCall | None = None

    def decode_event(self, event: ServerSentEvent, pieces: list[Piece]) -> None:
        """Append the pieces of one event. Raises ``ProviderError``."""
        chunk = decode_json(_chunk_decoder, event.data)
        if chunk.error_code:
            raise error_from_object({"error_code": chunk.error_code, "error_msg": chunk.error_msg})
        if chunk.result:
            pieces.append(TextPiece(chunk.result))
        if chunk.function_call is not None and self._call is None:
            self._call = chunk.function_call
            pieces.extend(_call_pieces(chunk.function_call, f"{chunk.id or 'call'}_0"))
        if chunk.is_end:
            self._end(chunk, pieces)

    def _end(self, chunk: _Chunk, pieces: list[Piece]) -> None:
        if chunk.usage is not None:
            pieces.append(UsagePiece(chunk.usage.prompt_tokens or 0, chunk.usage.completion_tokens or 0))
        pieces.append(FinishPiece(self._reason(chunk)))
        self.done = True

    def _reason(self, chunk: _Chunk) -> FinishReason:
        """Early models have no ``finish_reason``; ``need_clear_history`` says that the text is a refusal of theirs."""
        reason = FINISH_REASONS.get(chunk.finish_reason, "stop")
        if chunk.need_clear_history:
            return "content_filter"
        if chunk.is_truncated:
            return "length"
        return "tool_calls" if self._call is not None and reason == "stop" else reason


def _call_pieces(call: _FunctionCall, call_id: str) -> list[Piece]:
    """The call, and before it why the model makes it; the answer's id makes the call's differ from other answers'."""
    thoughts: list[Piece] = [ReasoningPiece(call.thoughts)] if call.thoughts else []
    return [*thoughts, ToolCallPiece(0, call_id, call.name, call.arguments or "")]


def ernie_request_body(request: ModelRequest) -> bytes:
    """The JSON body of a streaming request; ``request.extra`` goes in last and may override anything.

    Raises:
        ProviderError: ``upstream.invalid_request``: no images, no schema of the answer, no "some tool, whichever", and
            nothing that JSON cannot say.
    """
    _check(request)
    system = [message.content for message in request.messages if message.role == "system"]
    functions = () if request.tool_choice == "none" else request.tools
    body: dict[str, Any] = {"messages": list(_turns(request.messages)), "stream": True}
    optional: dict[str, Any] = {
        "system": "\n\n".join(system) or None,
        "temperature": request.temperature,
        "max_output_tokens": request.max_tokens,
        "stop": request.stop or None,
        "functions": functions or None,
        "tool_choice": _tool_choice(request.tool_choice),
    }
    body |= {name: value for name, value in optional.items() if value is not None}
    return encode_json(with_extra(body, request.extra))


def _check(request: ModelRequest) -> None:
    unspeakable = {
        "sees no images": any(message.images for message in request.messages),
        "takes no schema for its answer": request.response_schema is not None,
        "cannot be made to call a function of its choice": request.tool_choice == "required",
    }
    for fault, is_asked in unspeakable.items():
        if is_asked:
            raise ProviderError("upstream.invalid_request", f"Baidu's first API {fault}")


def _turns(messages: tuple[Message, ...]) -> Iterator[dict[str, Any]]:
    """The turns but the system's. A turn of this API calls one function: several calls become several such turns.

    Each call is followed by its result, for the API demands that they alternate; a result of no call is left out.
    """
    results = {message.tool_call_id: message for message in messages if message.role == "tool"}
    for message in messages:
        match message.role:
            case "user":
                yield {"role": "user", "content": message.content}
            case "assistant" if not message.tool_calls:
                yield {"role": "assistant", "content": message.content}
            case "assistant":
                for number, call in enumerate(message.tool_calls):
                    function_call = {"name": call.name, "arguments": call.arguments or "{}"}
                    content = "" if number else message.content
                    yield {"role": "assistant", "content": content, "function_call": function_call}
                    if result := results.get(call.call_id):
                        yield {"role": "function", "name": call.name, "content": result.content}


def _tool_choice(choice: ToolChoice | None) -> dict[str, Any] | None:
    return {"type": "function", "function": {"name": choice.name}} if isinstance(choice, NamedTool) else None


class BaiduV1Wire:
    """Chat at ``{base_url}/rpc/2.0/ai_custom/v1/wenxinworkshop/chat/{path of the model}``.

    The key is an access token, which Baidu's OAuth gives out for thirty days. It goes into the URL's query, as there is
    no other place for it: nothing may show the URL with its query.
    """

    def request(self, request: ModelRequest, endpoint: Endpoint) -> VendorRequest:
        """The HTTP request for a streamed answer. Raises ``ProviderError``."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", **endpoint.headers}
        model = request.model.lower()
        path = quote(MODEL_PATHS.get(model, model), safe="")
        query = f"?{urlencode({'access_token': endpoint.api_key})}" if endpoint.api_key else ""
        url = f"{endpoint.base_url}/rpc/2.0/ai_custom/v1/wenxinworkshop/chat/{path}{query}"
        return VendorRequest(url, headers, ernie_request_body(request))

    def decoder(self) -> BaiduV1Decoder:
        """A decoder for one answer."""
        return BaiduV1Decoder()
