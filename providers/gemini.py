"""Google's Gemini API (``streamGenerateContent``): request and stream decoder.

Source: Google's API reference ("generateContent", "Function calling", "Thought signatures") and the types of its Python
SDK (python-genai); deviations as noted where they are handled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any
from urllib.parse import quote, urlsplit

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
    arguments_object,
    data_url,
    outline_piece,
    turn_parts,
    with_extra,
)
from .http import VendorRequest
from .sse import ServerSentEvent
from .vendor_errors import error_from_object
from .wire import Endpoint, EventStreamDecoder, decode_json, encode_json

NAME = "gemini"

FINISH_REASONS: dict[str, FinishReason] = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    "SAFETY": "content_filter",
    "RECITATION": "content_filter",
    "BLOCKLIST": "content_filter",
    "PROHIBITED_CONTENT": "content_filter",
    "SPII": "content_filter",
    "IMAGE_SAFETY": "content_filter",
    "IMAGE_PROHIBITED_CONTENT": "content_filter",
    "IMAGE_RECITATION": "content_filter",
    "LANGUAGE": "error",
    "MALFORMED_FUNCTION_CALL": "error",
    "UNEXPECTED_TOOL_CALL": "error",
    "TOO_MANY_TOOL_CALLS": "error",
    "MISSING_THOUGHT_SIGNATURE": "error",
    "MALFORMED_RESPONSE": "error",
    "NO_IMAGE": "error",
    "IMAGE_OTHER": "error",
    "OTHER": "error",
}

NO_SIGNATURE = "skip_thought_signature_validator"
"""Stands for the signature of a call that Gemini did not make; without one Gemini 3 refuses the conversation
(ai.google.dev/gemini-api/docs/thought-signatures, "FAQs")."""

MAX_STRAY_BYTES = 16_384

_ROLES = {"user": "user", "tool": "user", "assistant": "model"}
_TOOL_MODES = {"auto": "AUTO", "none": "NONE", "required": "ANY"}
_IMAGE_TYPES = {
    "png": "image/png",
    "webp": "image/webp",
    "gif": "image/gif",
    "heic": "image/heic",
    "heif": "image/heif",
}


class _FunctionCall(msgspec.Struct, gc=False):
    name: str
    id: str | None = None
    args: dict[str, Any] | None = None


class _Part(msgspec.Struct, rename="camel", gc=False):
    text: str | None = None
    thought: bool | None = None
    thought_signature: str | None = None
    function_call: _FunctionCall | None = None


class _Content(msgspec.Struct, gc=False):
    parts: list[_Part] | None = None


class _Candidate(msgspec.Struct, rename="camel", gc=False):
    index: int | None = None
    content: _Content | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct, rename="camel", gc=False):
    prompt_token_count: int | None = None
    tool_use_prompt_token_count: int | None = None
    candidates_token_count: int | None = None
    thoughts_token_count: int | None = None
    cached_content_token_count: int | None = None


class _PromptFeedback(msgspec.Struct, rename="camel", gc=False):
    block_reason: str | None = None


class _Chunk(msgspec.Struct, rename="camel", gc=False):
    candidates: list[_Candidate] | None = None
    usage_metadata: _Usage | None = None
    prompt_feedback: _PromptFeedback | None = None
    response_id: str | None = None
    error: Any = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)
_error_decoder = msgspec.json.Decoder(dict[str, Any])


class GenerateContentDecoder(EventStreamDecoder):
    """Decodes one ``streamGenerateContent`` stream: untyped events, no end mark but the end of the body.

    Usage comes with every chunk and counts all so far; it is passed on whenever it changed, so that an answer that is
    stopped or cut off has the figures of what was said. An end of the body counts once a finish reason came.
    """

    def __init__(self) -> None:
        super().__init__()
        self._spans: list[Span] = []
        self._calls = 0
        self._usage: UsagePiece | None = None
        self._stray = _StrayError()

    def feed(self, chunk: bytes, pieces: list[Piece]) -> None:
        """Append the pieces that these bytes completed; see ``Decoder``."""
        super().feed(chunk, pieces)
        error = self._stray.feed(chunk)
        if error is not None:
            raise error_from_object(error)

    def decode_event(self, event: ServerSentEvent, pieces: list[Piece]) -> None:
        """Append the pieces of one chunk. Raises ``ProviderError``."""
        chunk = decode_json(_chunk_decoder, event.data)
        if chunk.error is not None:
            raise error_from_object(chunk.error)
        answers = [candidate for candidate in chunk.candidates or () if not candidate.index]
        for candidate in answers:
            for part in (candidate.content and candidate.content.parts) or ():
                self._decode_part(part, chunk.response_id, pieces)
        if chunk.usage_metadata is not None:
            self._add_usage(_usage_piece(chunk.usage_metadata), pieces)
        if chunk.prompt_feedback is not None and chunk.prompt_feedback.block_reason:
            reason = chunk.prompt_feedback.block_reason
            raise ProviderError("upstream.content_policy", f"the model's server blocked the prompt: {reason[:80]}")
        for candidate in answers:
            if candidate.finish_reason:
                self._finish(candidate.finish_reason, pieces)

    def _decode_part(self, part: _Part, response_id: str | None, pieces: list[Piece]) -> None:
        signature = {"thoughtSignature": part.thought_signature} if part.thought_signature else {}
        if part.function_call is not None:
            self._decode_call(part.function_call, signature, response_id, pieces)
        elif part.thought:
            if signature:
                self._spans.append(VendorBlock({"text": part.text or "", "thought": True, **signature}))
            if part.text:
                pieces.append(ReasoningPiece(part.text))
        elif part.text or signature:
            self._add_text(part.text or "", signature, pieces)

    def _decode_call(
        self, call: _FunctionCall, signature: dict[str, Any], response_id: str | None, pieces: list[Piece]
    ) -> None:
        """A call comes whole. Older models give it no id: the response's own and its number make one."""
        call_id = call.id or "_".join(filter(None, ("call", response_id, str(self._calls))))
        arguments = msgspec.json.encode(call.args or {}).decode()
        pieces.append(ToolCallPiece(self._calls, call_id, call.name, arguments))
        self._spans.append(CallSpan(call_id, signature))
        self._calls += 1

    def _add_text(self, text: str, signature: dict[str, Any], pieces: list[Piece]) -> None:
        """Text without a signature is one part however it was cut; a signed part must not be joined with another."""
        last = self._spans[-1] if self._spans else None
        if isinstance(last, TextSpan) and not last.extra and not signature:
            last.chars += len(text)
        else:
            self._spans.append(TextSpan(len(text), signature))
        if text:
            pieces.append(TextPiece(text))

    def _add_usage(self, usage: UsagePiece, pieces: list[Piece]) -> None:
        if usage != self._usage:
            self._usage = usage
            pieces.append(usage)

    def _finish(self, reason: str, pieces: list[Piece]) -> None:
        """The first reason counts: proxies have been seen to put one on every chunk."""
        if self.may_end:
            return
        self.may_end = True
        finish = FINISH_REASONS.get(reason, "stop")
        outline = outline_piece(self._spans)
        if outline is not None:
            pieces.append(outline)
        pieces.append(FinishPiece("tool_calls" if finish == "stop" and self._calls else finish))


class _StrayError:
    """Finds an error that is no event: bare JSON after the last one, on several lines, up to the end of the body.

    Google's API ends a stream so when a model is overloaded in the middle (theopenco/llmgateway#3616).
    """

    def __init__(self) -> None:
        self._last = b"\n"
        self._found = bytearray()

    def feed(self, chunk: bytes) -> Any:
        """The error, once all of it came; else None."""
        if not chunk or len(self._found) > MAX_STRAY_BYTES:
            return None
        if self._found:
            self._found += chunk
        else:
            body = self._last + chunk
            starts = [at for at in (body.find(b"\n{"), body.find(b"\r{")) if at >= 0]
            self._found += body[min(starts) + 1 :] if starts else b""
        self._last = chunk[-1:]
        if not self._found or not chunk.rstrip().endswith(b"}"):
            return None
        try:
            return _error_decoder.decode(self._found).get("error")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None  # not all of it, or something else


def _usage_piece(usage: _Usage) -> UsagePiece:
    """``candidatesTokenCount`` is without the thoughts, and both are billed as output."""
    return UsagePiece(
        (usage.prompt_token_count or 0) + (usage.tool_use_prompt_token_count or 0),
        (usage.candidates_token_count or 0) + (usage.thoughts_token_count or 0),
        reasoning_tokens=usage.thoughts_token_count,
        cached_tokens=usage.cached_content_token_count,
    )


def generate_content_body(request: ModelRequest) -> bytes:
    """The JSON body; ``request.extra`` goes in last and may override anything.

    Raises:
        ProviderError: ``upstream.invalid_request`` if a tool's result answers no call, or something in the request
            cannot be written as JSON.
    """
    system = [{"text": message.content} for message in request.messages if message.role == "system"]
    optional: dict[str, Any] = {
        "systemInstruction": {"parts": system} if system else None,
        "tools": [{"functionDeclarations": [_declaration(tool) for tool in request.tools]}] if request.tools else None,
        "toolConfig": _tool_config(request.tool_choice),
        "generationConfig": _generation_config(request),
    }
    body: dict[str, Any] = {"contents": _contents(request.messages)}
    body.update({name: value for name, value in optional.items() if value})
    return encode_json(with_extra(body, request.extra))


def _contents(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation, all results of a turn's calls in one content."""
    names = {call.call_id: call.name for message in messages for call in message.tool_calls}
    contents = []
    for role, turn in groupby((message for message in messages if message.role != "system"), key=lambda m: m.role):
        if parts := [part for message in turn for part in _parts(message, names)]:
            contents.append({"role": _ROLES[role], "parts": parts})
    return contents


def _parts(message: Message, names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    match message.role:
        case "tool":
            yield _function_response(message, names)
        case "assistant":
            yield from _model_parts(message)
        case _:
            yield from map(_image_part, message.images)
            if message.content:
                yield {"text": message.content}


def _model_parts(message: Message) -> Iterator[dict[str, Any]]:
    """An assistant turn. Of several calls the first is signed ("Thought signatures", "Parallel function calls")."""
    first_call = True
    for part in turn_parts(message, NAME):
        match part:
            case TextPart(text, signature):
                yield {"text": text, **signature}
            case CallPart(call, signature):
                function_call = {"id": call.call_id, "name": call.name, "args": arguments_object(call)}
                unsigned = {"thoughtSignature": NO_SIGNATURE} if first_call else {}
                yield {"functionCall": function_call, **(signature or unsigned)}
                first_call = False
            case VendorBlock(block):
                yield block


def _function_response(message: Message, names: Mapping[str, str]) -> dict[str, Any]:
    call_id = message.tool_call_id or ""
    if call_id not in names:
        raise ProviderError("upstream.invalid_request", f"the tool result {call_id!r} answers no call before it")
    response = {"error" if message.tool_failed else "result": message.content}
    return {"functionResponse": {"id": call_id, "name": names[call_id], "response": response}}


def _image_part(url: str) -> dict[str, Any]:
    """An image by its URL. The type is asked for, and what the path does not tell is taken for the commonest."""
    if inline := data_url(url):
        return {"inlineData": {"mimeType": inline[0], "data": inline[1]}}
    suffix = urlsplit(url).path.rpartition(".")[2].lower()
    return {"fileData": {"mimeType": _IMAGE_TYPES.get(suffix, "image/jpeg"), "fileUri": url}}


def _declaration(tool: ToolSpec) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parametersJsonSchema": tool.parameters}


def _tool_config(choice: ToolChoice | None) -> dict[str, Any] | None:
    match choice:
        case None:
            return None
        case NamedTool(name):
            calling: dict[str, Any] = {"mode": "ANY", "allowedFunctionNames": [name]}
        case _:
            calling = {"mode": _TOOL_MODES[choice]}
    return {"functionCallingConfig": calling}


def _generation_config(request: ModelRequest) -> dict[str, Any]:
    schema = request.response_schema
    config: dict[str, Any] = {
        "temperature": request.temperature,
        "maxOutputTokens": request.max_tokens,
        "stopSequences": request.stop or None,
        "responseMimeType": None if schema is None else "application/json",
        "responseJsonSchema": schema,
    }
    return {name: value for name, value in config.items() if value is not None}


class GeminiWire:
    """``{base_url}/models/{model}:streamGenerateContent``; a model with a slash is a resource name as it is."""

    def request(self, request: ModelRequest, endpoint: Endpoint) -> VendorRequest:
        """The HTTP request for a streamed answer, with the key in a header. Raises ``ProviderError``."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", **endpoint.headers}
        if endpoint.api_key:
            headers["x-goog-api-key"] = endpoint.api_key
        model = request.model if "/" in request.model else f"models/{request.model}"
        url = f"{endpoint.base_url}/{quote(model)}:streamGenerateContent?alt=sse"
        return VendorRequest(url, headers, generate_content_body(request))

    def decoder(self) -> GenerateContentDecoder:
        """A decoder for one answer."""
        return GenerateContentDecoder()
