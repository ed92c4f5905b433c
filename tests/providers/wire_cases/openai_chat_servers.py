"""Whole chat-completions answers as servers send them, with all that they put around it; the rules are in openai_chat.

Sources: OpenAI's API reference and the streams quoted in its SDKs' issues; Microsoft Learn, "Content streaming" and
"Content filtering" (Azure); OpenRouter's and DeepSeek's API documentation; ollama#7881 and openai-python#2806 (calls
without an index); goose#8031 (how vLLM and SGLang tell of errors).
"""

from __future__ import annotations

from typing import Any

import msgspec

from engine.pieces import FinishPiece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from providers.openai_chat import ChatWire

from . import WireCase

WIRE = ChatWire()
DONE = b"data: [DONE]\n\n"


def frame(chunk: Any) -> bytes:
    """One event with this JSON."""
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def openai(choices: Any, **more: Any) -> bytes:
    """A chunk of OpenAI itself."""
    head = {
        "id": "chatcmpl-D0q8CZXN1uEzngZGkU7FuV92lnXWq",
        "object": "chat.completion.chunk",
        "created": 1769092764,
        "model": "gpt-4o-mini-2024-07-18",
        "service_tier": "default",
        "system_fingerprint": "fp_29330a9688",
    }
    return frame(head | {"choices": choices, "usage": None} | more)


def openai_delta(obfuscation: str, finish_reason: str | None = None, /, **delta: Any) -> bytes:
    """A chunk with one choice and the padding that hides how long it is."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return openai([choice], obfuscation=obfuscation)


def openai_call(obfuscation: str, index: int, arguments: str, **head: Any) -> bytes:
    """A fragment of a call; ``head`` is what only its first fragment has."""
    name = {"name": head.pop("name")} if "name" in head else {}
    return openai_delta(obfuscation, tool_calls=[{"index": index, **head, "function": name | {"arguments": arguments}}])


OPENAI_USAGE = {
    "prompt_tokens": 21,
    "completion_tokens": 35,
    "total_tokens": 56,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 0,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}

OPENAI = (
    WireCase(
        "openai: text with obfuscation and usage",
        WIRE,
        (
            openai_delta("ZGF", role="assistant", content="", refusal=None),
            openai_delta("lRK2aBv", content="Hello"),
            openai_delta("kJ", content=", 世界"),
            openai_delta("0wmdEAC", content=" 👋🏽"),
            openai_delta("", "stop"),
            openai([], usage=OPENAI_USAGE, obfuscation="yt3Rk"),
            DONE,
        ),
        (
            TextPiece("Hello"),
            TextPiece(", 世界"),
            TextPiece(" 👋🏽"),
            UsagePiece(21, 35, reasoning_tokens=0, cached_tokens=0),
            FinishPiece("stop"),
        ),
        noise=(
            openai_delta("dAr7FcZlLkO"),
            openai_delta("x", content=""),
            b"event: response.later\n" + openai([]),
            frame({"object": "chat.completion.later", "data": [1, 2, None]}),
        ),
    ),
    WireCase(
        "openai: two calls in fragments that interleave, one without arguments",
        WIRE,
        (
            openai_delta("a1", role="assistant", content=None),
            openai_call("b", 0, "", id="call_Pz1xq6", type="function", name="get_weather"),
            openai_call("c", 0, '{"city'),
            openai_call("d", 1, "", id="call_n7Tq", type="function", name="get_time"),
            openai_call("e", 0, '": "上海", "unit": "°C'),
            openai_call("f", 1, ""),
            openai_call("g", 0, '"}'),
            openai_delta("h", "tool_calls"),
            openai([], usage=OPENAI_USAGE),
            DONE,
        ),
        (
            ToolCallPiece(0, "call_Pz1xq6", "get_weather"),
            ToolCallPiece(0, arguments_fragment='{"city'),
            ToolCallPiece(1, "call_n7Tq", "get_time"),
            ToolCallPiece(0, arguments_fragment='": "上海", "unit": "°C'),
            ToolCallPiece(1),
            ToolCallPiece(0, arguments_fragment='"}'),
            UsagePiece(21, 35, reasoning_tokens=0, cached_tokens=0),
            FinishPiece("tool_calls"),
        ),
    ),
    WireCase(
        "openai: an error after text",
        WIRE,
        (
            openai_delta("q", role="assistant", content=""),
            openai_delta("r", content="The answer"),
            frame(
                {
                    "error": {
                        "message": "The server had an error while processing your request. Sorry about that!",
                        "type": "server_error",
                        "param": None,
                        "code": None,
                    }
                }
            ),
        ),
        (TextPiece("The answer"),),
        error="upstream.server",
    ),
    WireCase(
        "openai: the stream breaks off before the end mark",
        WIRE,
        (
            openai_delta("q", role="assistant", content=""),
            openai_delta("r", content="The answer"),
            openai_delta("s", "stop"),
        ),
        (TextPiece("The answer"),),
        error="upstream.truncated",
    ),
)


SAFE = {name: {"filtered": False, "severity": "safe"} for name in ("hate", "self_harm", "sexual", "violence")}


def azure(choices: Any, **more: Any) -> bytes:
    """A chunk of an Azure deployment."""
    head = {
        "choices": choices,
        "created": 1757600000,
        "id": "chatcmpl-7rAJvsS1QQCDuZYDDdQuMJVMV3x3N",
        "model": "gpt-4o-2024-11-20",
        "object": "chat.completion.chunk",
        "system_fingerprint": "fp_ee1d74bde0",
    }
    return frame(head | more)


def azure_text(text: str, finish_reason: str | None = None, filtered: Any = None) -> bytes:
    """A chunk with text; without text one that says why it ended."""
    delta = {"content": text} if text else {}
    choice = {"delta": delta, "finish_reason": finish_reason, "index": 0, "logprobs": None}
    return azure([choice | {"content_filter_results": filtered or {}}])


def azure_annotation(start: int, end: int, finish_reason: str | None = None, **results: Any) -> bytes:
    """What the asynchronous filter thinks of a part of the text: a choice without a delta."""
    offsets = {"check_offset": start, "start_offset": start, "end_offset": end}
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "content_filter_results": results or SAFE,
        "content_filter_offsets": offsets,
    }
    return frame({"id": "", "object": "", "created": 0, "model": "", "choices": [choice], "usage": None})


AZURE_PROMPT = azure(
    [],
    id="",
    created=0,
    model="",
    object="",
    prompt_filter_results=[
        {"prompt_index": 0, "content_filter_results": SAFE | {"jailbreak": {"filtered": False, "detected": False}}}
    ],
)

AZURE = (
    WireCase(
        "azure: text in blocks with filter results",
        WIRE,
        (
            AZURE_PROMPT,
            azure([{"delta": {"content": "", "role": "assistant"}, "finish_reason": None, "index": 0}]),
            azure_text("Color is how the brain reads ", filtered=SAFE),
            azure_text("the light — 颜色。", filtered=SAFE),
            azure_text("", "stop"),
            azure([], usage={"completion_tokens": 12, "prompt_tokens": 8, "total_tokens": 20}),
            DONE,
        ),
        (
            TextPiece("Color is how the brain reads "),
            TextPiece("the light — 颜色。"),
            UsagePiece(8, 12),
            FinishPiece("stop"),
        ),
        noise=(AZURE_PROMPT, azure_annotation(44, 198), azure([])),
    ),
    WireCase(
        "azure: the asynchronous filter objects after the reason",
        WIRE,
        (
            AZURE_PROMPT,
            azure([{"delta": {"role": "assistant"}, "finish_reason": None, "index": 0}]),
            azure_text("How "),
            azure_annotation(0, 4),
            azure_text("to"),
            azure_text("", "stop"),
            azure_annotation(4, 6, "content_filter", protected_material_text={"detected": True, "filtered": True}),
            DONE,
        ),
        (TextPiece("How "), TextPiece("to"), FinishPiece("content_filter")),
        noise=(azure_annotation(0, 2),),
    ),
)


def openrouter(delta: Any, finish_reason: str | None = None, **more: Any) -> bytes:
    """A chunk of OpenRouter."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "native_finish_reason": finish_reason}
    head = {
        "id": "gen-1757600000-Wd2iVJmTQlAbrz9sHMYw",
        "provider": "DeepInfra",
        "model": "deepseek/deepseek-r1",
        "object": "chat.completion.chunk",
        "created": 1757600000,
    }
    return frame(head | {"choices": [choice | {"logprobs": None}]} | more)


PROCESSING = b": OPENROUTER PROCESSING\n\n"

OPENROUTER = (
    WireCase(
        "openrouter: comments, reasoning, usage beside an empty delta",
        WIRE,
        (
            PROCESSING,
            PROCESSING,
            openrouter({"role": "assistant", "content": "", "reasoning": "The user "}),
            openrouter({"role": "assistant", "content": "", "reasoning": "says 你好."}),
            PROCESSING,
            openrouter({"role": "assistant", "content": "Hi!", "reasoning": None}),
            openrouter({"role": "assistant", "content": ""}, "stop"),
            openrouter(
                {"role": "assistant", "content": ""},
                usage={
                    "prompt_tokens": 6,
                    "completion_tokens": 9,
                    "total_tokens": 15,
                    "cost": 0.0000123,
                    "completion_tokens_details": {"reasoning_tokens": 5},
                },
            ),
            DONE,
        ),
        (
            ReasoningPiece("The user "),
            ReasoningPiece("says 你好."),
            TextPiece("Hi!"),
            UsagePiece(6, 9, reasoning_tokens=5),
            FinishPiece("stop"),
        ),
        noise=(PROCESSING, b":OPENROUTER PROCESSING\n"),
    ),
    WireCase(
        "openrouter: an error in the middle",
        WIRE,
        (
            PROCESSING,
            openrouter({"role": "assistant", "content": "Once upon"}),
            openrouter(
                {"content": ""},
                "error",
                error={"code": 429, "message": "Rate limit exceeded", "metadata": {"error_type": "rate_limit"}},
            ),
        ),
        (TextPiece("Once upon"),),
        error="upstream.rate_limit",
        noise=(PROCESSING,),
    ),
)


def other(delta: Any, finish_reason: str | None = None, **more: Any) -> bytes:
    """A chunk with no more in it than a small server gives."""
    return frame({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]} | more)


OTHERS = (
    WireCase(
        "deepseek: keep-alives while queued, reasoning_content, cache figures",
        WIRE,
        (
            b": keep-alive\n\n",
            b": keep-alive\n\n",
            other({"role": "assistant", "content": None, "reasoning_content": ""}),
            other({"content": None, "reasoning_content": "嗯"}),
            other({"content": None, "reasoning_content": "好。"}),
            other({"content": "你好", "reasoning_content": None}),
            other(
                {"content": "", "reasoning_content": None},
                "stop",
                usage={
                    "prompt_tokens": 7,
                    "completion_tokens": 6,
                    "total_tokens": 13,
                    "prompt_tokens_details": {"cached_tokens": 4},
                    "completion_tokens_details": {"reasoning_tokens": 3},
                    "prompt_cache_hit_tokens": 4,
                    "prompt_cache_miss_tokens": 3,
                },
            ),
            DONE,
        ),
        (
            ReasoningPiece("嗯"),
            ReasoningPiece("好。"),
            TextPiece("你好"),
            UsagePiece(7, 6, reasoning_tokens=3, cached_tokens=4),
            FinishPiece("stop"),
        ),
        noise=(b": keep-alive\n\n",),
    ),
    WireCase(
        "ollama's compatible API: a whole call without an index",
        WIRE,
        (
            other(
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "id": "call_v8q1",
                            "type": "function",
                            "function": {"name": "get_current_weather", "arguments": '{"location":"Boston, MA"}'},
                        }
                    ],
                }
            ),
            other({"role": "assistant", "content": ""}, "stop"),
            DONE,
        ),
        (
            ToolCallPiece(0, "call_v8q1", "get_current_weather", '{"location":"Boston, MA"}'),
            FinishPiece("stop"),
        ),
    ),
    WireCase(
        "sglang: an error object, then the end mark",
        WIRE,
        (
            other({"role": "assistant", "content": "Half an"}),
            frame({"error": {"object": "error", "message": "KV cache is full", "type": "Overloaded", "code": 503}}),
            DONE,
        ),
        (TextPiece("Half an"),),
        error="upstream.overloaded",
    ),
    WireCase(
        "vllm: an error as the whole chunk, then the end mark",
        WIRE,
        (
            other({"role": "assistant", "content": "Half an"}),
            frame({"object": "error", "message": "EngineDeadError", "type": "InternalServerError", "code": 500}),
            DONE,
        ),
        (TextPiece("Half an"),),
        error="upstream.server",
    ),
)

CASES = (*OPENAI, *AZURE, *OPENROUTER, *OTHERS)
