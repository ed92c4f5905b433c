"""OpenAI chat completions, and every server that speaks them: request, stream decoder, provider.

Source: OpenAI's API reference, "Chat Completions streaming"; deviations of compatible servers as noted where they are
handled (``reasoning_content`` of DeepSeek and others, ``reasoning`` of OpenRouter and vLLM).
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import httpx
import msgspec

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
from engine.provider import Message, ModelRequest, NamedTool, ToolChoice, ToolSpec

from .http import VendorRequest
from .sse import ServerSentEvent
from .vendor_errors import error_from_object
from .wire import Endpoint, EventStreamDecoder, HttpProvider, decode_json, encode_json

DEFAULT_BASE_URL = "https://api.openai.com/v1"
END_MARK = b"[DONE]"

FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",  # Together
    "length": "length",
    "model_length": "length",  # Mistral
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


class _ContentPart(msgspec.Struct, gc=False):
    """Mistral's content may be a list: text, references, and thinking, which is a list of texts again."""

    type: str = "text"
    text: str = ""
    thinking: list[_ContentPart] = []


class _Delta(msgspec.Struct, gc=False):
    content: str | list[_ContentPart] | None = None
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


class _GroqDetails(msgspec.Struct, gc=False):
    usage: _Usage | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    x_groq: _GroqDetails | None = None
    error: Any = None
    kind: Any = msgspec.field(default=None, name="object")


_chunk_decoder = msgspec.json.Decoder(_Chunk)
_any_decoder = msgspec.json.Decoder()


class ChatDecoder(EventStreamDecoder):
    """Decodes one chat-completions stream: server-sent events with a JSON chunk each, closed by ``[DONE]``.

    Of several choices (``n`` in the request) the first one is the answer. The finish piece waits for the end mark:
    some servers repeat ``finish_reason``, or correct it when a filter has looked at the text.
    """

    def __init__(self, *, keep_reasoning: bool = False) -> None:
        super().__init__()
        self._calls: _ToolCalls | None = None
        self._finish: FinishReason | None = None
        self._reasoning: list[str] | None = [] if keep_reasoning else None

    def decode_event(self, event: ServerSentEvent, pieces: list[Piece]) -> None:
        """Append the pieces of one chunk. Raises ``ProviderError``."""
        if event.data == END_MARK:
            self._end(pieces)
            return
        chunk = decode_json(_chunk_decoder, event.data)
        if chunk.error is not None:
            raise error_from_object(chunk.error)
        if chunk.kind == "error":  # older vLLM: the error is the whole chunk, and the end mark follows
            raise error_from_object(decode_json(_any_decoder, event.data))
        for choice in chunk.choices or ():  # none in usage and content-filter frames
            if not choice.index:
                self._decode_choice(choice, pieces)
        usage = chunk.usage or (chunk.x_groq and chunk.x_groq.usage)
        if usage:
            pieces.append(_usage_piece(usage))

    def _end(self, pieces: list[Piece]) -> None:
        self.done = True
        if self._reasoning and self._calls:
            pieces.append(ContinuationPiece({"reasoning_content": "".join(self._reasoning)}))
        pieces.append(FinishPiece(self._finish or ("tool_calls" if self._calls else "stop")))

    def _decode_choice(self, choice: _Choice, pieces: list[Piece]) -> None:
        delta = choice.delta
        if delta is not None:
            if reasoning := delta.reasoning_content or delta.reasoning:
                self._add_reasoning(reasoning, pieces)
            if isinstance(delta.content, list):
                self._add_parts(delta.content, pieces)
            elif text := delta.content or delta.refusal:
                pieces.append(TextPiece(text))
            if delta.tool_calls:
                self._add_calls(delta.tool_calls, pieces)
            if delta.function_call is not None:  # how calls came before there were tools; at most one an answer
                self._add_calls([_ToolCall(index=0, function=delta.function_call)], pieces)
        if choice.finish_reason:
            self._finish = FINISH_REASONS.get(choice.finish_reason, "stop")

    def _add_reasoning(self, reasoning: str, pieces: list[Piece]) -> None:
        pieces.append(ReasoningPiece(reasoning))
        if self._reasoning is not None:
            self._reasoning.append(reasoning)

    def _add_calls(self, fragments: list[_ToolCall], pieces: list[Piece]) -> None:
        if self._calls is None:
            self._calls = _ToolCalls()
        pieces += map(self._calls.piece, fragments)

    def _add_parts(self, parts: list[_ContentPart], pieces: list[Piece]) -> None:
        for part in parts:
            if reasoning := "".join(thought.text for thought in part.thinking):
                self._add_reasoning(reasoning, pieces)
            if part.text:
                pieces.append(TextPiece(part.text))


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


class ChatDialect(msgspec.Struct, frozen=True, kw_only=True):
    """What a vendor does otherwise than OpenAI in chat completions.

    Attributes:
        usage_option: whether usage must be asked for (``stream_options``); else it comes unasked.
        max_tokens_field: OpenAI's newer models refuse the old name, the other vendors do not know the new one.
        required_choice: the word for "call some tool".
        json_schema: whether the answer's schema can be asked for; else JSON alone is, and the schema is not told.
        sends_reasoning_back: whether the reasoning that led to tool calls must come back with them.
        with_tools: body fields that go along when tools are offered.
    """

    usage_option: bool = True
    max_tokens_field: str = "max_tokens"
    required_choice: str = "required"
    json_schema: bool = True
    sends_reasoning_back: bool = False
    with_tools: dict[str, Any] = {}


PLAIN_DIALECT = ChatDialect()

MAX_DESCRIPTION_CHARS = 1024
"""Of a tool: OpenAI and Azure answer 400 to more ("string too long"), and a run is worth more than the rest of it."""


def chat_request_body(request: ModelRequest, dialect: ChatDialect = PLAIN_DIALECT) -> bytes:
    """The JSON body of a streaming request; ``request.extra`` goes in last and may override anything.

    Raises:
        ProviderError: ``upstream.invalid_request`` if something in the request cannot be written as JSON.
    """
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [_chat_message(message, dialect) for message in request.messages],
        "stream": True,
    }
    if dialect.usage_option:
        body["stream_options"] = {"include_usage": True}
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.max_tokens is not None:
        body[dialect.max_tokens_field] = request.max_tokens
    if request.stop:
        body["stop"] = request.stop
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    if request.tool_choice is not None:
        body["tool_choice"] = _tool_choice(request.tool_choice, dialect)
    if request.response_schema is not None:
        body["response_format"] = _response_format(request.response_schema, dialect)
    if request.tools:
        body.update(dialect.with_tools)
    return encode_json(body | request.extra)


def _tool(tool: ToolSpec) -> dict[str, Any]:
    description = tool.description[:MAX_DESCRIPTION_CHARS]
    return {"type": "function", "function": msgspec.structs.replace(tool, description=description)}


def _chat_message(message: Message, dialect: ChatDialect) -> dict[str, Any]:
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
    if dialect.sends_reasoning_back and isinstance(message.continuation, dict):
        chat["reasoning_content"] = message.continuation.get("reasoning_content", "")
    return chat


def _tool_choice(choice: ToolChoice, dialect: ChatDialect) -> Any:
    if isinstance(choice, NamedTool):
        return {"type": "function", "function": {"name": choice.name}}
    return dialect.required_choice if choice == "required" else choice


def _response_format(schema: dict[str, Any], dialect: ChatDialect) -> dict[str, Any]:
    if not dialect.json_schema:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


class ChatWire:
    """Chat completions at ``{base_url}/chat/completions`` with a bearer key, in a vendor's dialect."""

    def __init__(self, dialect: ChatDialect = PLAIN_DIALECT) -> None:
        self._dialect = dialect

    def request(self, request: ModelRequest, endpoint: Endpoint) -> VendorRequest:
        """The HTTP request for a streamed answer."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", **endpoint.headers}
        if endpoint.api_key:
            headers.update(self._authentication(endpoint.api_key))
        return VendorRequest(self._url(endpoint, request.model), headers, chat_request_body(request, self._dialect))

    def decoder(self) -> ChatDecoder:
        """A decoder for one answer."""
        return ChatDecoder(keep_reasoning=self._dialect.sends_reasoning_back)

    def _url(self, endpoint: Endpoint, _model: str) -> str:
        return f"{endpoint.base_url}/chat/completions"

    def _authentication(self, api_key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {api_key}"}


AZURE_API_VERSION = "2024-10-21"


class AzureWire(ChatWire):
    """Azure OpenAI: the key in a header of its own; the model names a deployment, in the path of the older API.

    ``base_url`` is the resource's (``https://NAME.openai.azure.com``), or ends in ``/openai/v1`` for the newer API.
    """

    def _url(self, endpoint: Endpoint, model: str) -> str:
        if endpoint.base_url.endswith("/v1"):
            return super()._url(endpoint, model)
        deployment = quote(model, safe="")
        path = f"/openai/deployments/{deployment}/chat/completions?api-version={AZURE_API_VERSION}"
        return endpoint.base_url + path

    def _authentication(self, api_key: str) -> dict[str, str]:
        return {"api-key": api_key}


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
