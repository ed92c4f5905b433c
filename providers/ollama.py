"""Ollama's own chat API: request and decoder of its lines of JSON.

Source: Ollama's API reference ("Generate a chat completion", "Streaming", "Errors") and the types of its Python client
0.6. The answer names no end but ``done``; the first one may be long in coming, for the model is loaded then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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
from engine.provider import Message, ModelRequest, NamedTool, ToolChoice

from .conversation import arguments_object, data_url, with_extra
from .http import VendorRequest
from .vendor_errors import error_from_object
from .wire import Endpoint, LineDecoder, decode_json, encode_json

NAME = "ollama"

DONE_REASONS: dict[str | None, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "load": "error",  # nothing was generated: the model was only loaded, or unloaded
    "unload": "error",
}


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: Any = None


class _ToolCall(msgspec.Struct, gc=False):
    function: _Function | None = None
    id: str | None = None


class _Answer(msgspec.Struct, gc=False):
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Line(msgspec.Struct, gc=False):
    created_at: str | None = None
    message: _Answer | None = None
    done: bool = False
    done_reason: str | None = None
    prompt_eval_count: int | None = None
    eval_count: int | None = None
    error: Any = None


_line_decoder = msgspec.json.Decoder(_Line)
_any_decoder = msgspec.json.Decoder(msgspec.Raw)


class OllamaDecoder(LineDecoder):
    """Decodes one chat: a line of JSON for each token, closed by the one with ``done``."""

    content_type = "application/"  # x-ndjson; behind some gateways json

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0
        self._thinking: list[str] = []

    def feed(self, chunk: bytes, pieces: list[Piece]) -> None:
        """Append the pieces that these bytes completed, also of a last line that lacks its newline."""
        super().feed(chunk, pieces)
        if not self.done and _is_whole(self._unfinished):
            line = bytes(self._unfinished)
            self._unfinished.clear()
            self.decode_line(line, pieces)

    def decode_line(self, line: bytes, pieces: list[Piece]) -> None:
        """Append the pieces of one line. Raises ``ProviderError``."""
        decoded = decode_json(_line_decoder, line)
        if decoded.error is not None:
            raise error_from_object(decoded.error)
        if decoded.message is not None:
            self._decode_message(decoded.message, decoded.created_at or "", pieces)
        if decoded.done:
            self._end(decoded, pieces)

    def _decode_message(self, message: _Answer, created_at: str, pieces: list[Piece]) -> None:
        if message.thinking:
            self._thinking.append(message.thinking)
            pieces.append(ReasoningPiece(message.thinking))
        if message.content:
            pieces.append(TextPiece(message.content))
        for call in message.tool_calls or ():
            function = call.function or _Function()
            # Most models give a call no id: the time makes ours differ from those of the turns before.
            call_id = call.id or "_".join(["call", *re.findall(r"\d+", created_at), str(self._calls)])
            arguments = function.arguments if isinstance(function.arguments, str) else _as_text(function.arguments)
            pieces.append(ToolCallPiece(self._calls, call_id, function.name, arguments))
            self._calls += 1

    def _end(self, line: _Line, pieces: list[Piece]) -> None:
        if self._calls and self._thinking:
            pieces.append(ContinuationPiece({"thinking": "".join(self._thinking)}))
        if line.prompt_eval_count is not None or line.eval_count is not None:
            pieces.append(UsagePiece(line.prompt_eval_count or 0, line.eval_count or 0))
        reason = DONE_REASONS.get(line.done_reason, "stop")
        pieces.append(FinishPiece("tool_calls" if self._calls and reason == "stop" else reason))
        self.done = True


def _is_whole(line: bytearray) -> bool:
    if not line.endswith(b"}"):
        return False
    try:
        _any_decoder.decode(line)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _as_text(arguments: Any) -> str:
    return msgspec.json.encode(arguments or {}).decode()


def chat_request_body(request: ModelRequest) -> bytes:
    """The JSON body of a streaming request; ``request.extra`` goes in last, ``think`` and ``keep_alive`` among it.

    Raises:
        ProviderError: ``upstream.invalid_request``: a tool that must be called, an image by its URL, or what JSON
            cannot say.
    """
    _check_tool_choice(request.tool_choice)
    options = {"temperature": request.temperature, "num_predict": request.max_tokens, "stop": request.stop or None}
    tools = () if request.tool_choice == "none" else request.tools
    body: dict[str, Any] = {
        "model": request.model,
        "messages": list(_messages(request.messages)),
        "stream": True,
    }
    optional: dict[str, Any] = {
        "tools": [{"type": "function", "function": tool} for tool in tools],
        "format": request.response_schema,
        "options": {name: value for name, value in options.items() if value is not None},
    }
    body |= {name: value for name, value in optional.items() if value}
    return encode_json(with_extra(body, request.extra))


def _check_tool_choice(choice: ToolChoice | None) -> None:
    if choice == "required" or isinstance(choice, NamedTool):
        raise ProviderError("upstream.invalid_request", "Ollama cannot be made to call a tool")


def _messages(messages: tuple[Message, ...]) -> Iterator[dict[str, Any]]:
    """The turns; a tool's result also names its tool, for older servers know calls by name alone."""
    names: dict[str | None, str] = {}
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.images:
            turn["images"] = [_image(url) for url in message.images]
        if message.tool_calls:
            names |= {call.call_id: call.name for call in message.tool_calls}
            turn["tool_calls"] = [
                {"id": call.call_id, "function": {"name": call.name, "arguments": arguments_object(call)}}
                for call in message.tool_calls
            ]
        if message.role == "tool":
            turn |= {"tool_name": names.get(message.tool_call_id), "tool_call_id": message.tool_call_id}
        if message.continued_by == NAME and isinstance(message.continuation, dict):
            turn |= {"thinking": message.continuation.get("thinking")}
        yield {name: value for name, value in turn.items() if value is not None}


def _image(url: str) -> str:
    inline = data_url(url)
    if inline is None:
        raise ProviderError("upstream.invalid_request", "Ollama loads no images from URLs: give a data: URL")
    return inline[1]


class OllamaWire:
    """Chat at ``{base_url}/api/chat``; a bearer key only for servers that want one."""

    def request(self, request: ModelRequest, endpoint: Endpoint) -> VendorRequest:
        """The HTTP request for a streamed answer. Raises ``ProviderError``."""
        headers = {"Content-Type": "application/json", "Accept": "application/x-ndjson", **endpoint.headers}
        if endpoint.api_key:
            headers["Authorization"] = f"Bearer {endpoint.api_key}"
        return VendorRequest(f"{endpoint.base_url}/api/chat", headers, chat_request_body(request))

    def decoder(self) -> OllamaDecoder:
        """A decoder for one answer."""
        return OllamaDecoder()
