"""Chat completions as OpenAI sends them, and as other servers deviate (wire-formats.md, section 2a)."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.pieces import FinishPiece, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from providers.openai_chat import ChatWire

from . import WireCase

WIRE = ChatWire()
DONE = b"data: [DONE]\n\n"
STOP = FinishPiece("stop")
CALLS = FinishPiece("tool_calls")
SHANGHAI = '{"city":"上海"}'

ENVELOPE = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1763800000,
    "model": "gpt-4o-mini-2024-07-18",
    "service_tier": "default",
    "system_fingerprint": "fp_1",
}


def frame(chunk: Any) -> bytes:
    """One event with this JSON, written as OpenAI does: not escaped, so that characters are several bytes."""
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def chunk(delta: Any, finish_reason: str | None = None, **more: Any) -> bytes:
    """A chunk with one choice."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return frame(ENVELOPE | {"choices": [choice], "usage": None} | more)


def said(*texts: str) -> list[bytes]:
    """A chunk for each text."""
    return [chunk({"content": text}) for text in texts]


def end(finish_reason: str = "stop") -> list[bytes]:
    """The chunk that says why, and the end mark."""
    return [chunk({}, finish_reason), DONE]


def usage(tokens: Any, choices: Any = ()) -> bytes:
    """The chunk that reports usage: by default one without a choice."""
    return frame(ENVELOPE | {"choices": choices, "usage": tokens})


def call(index: int | None, call_id: str | None = None, name: str | None = None, arguments: str | None = None) -> Any:
    """A fragment of a tool call; what is None is left out."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    head = {key: value for key, value in (("index", index), ("id", call_id)) if value is not None}
    return head | {"type": "function", "function": function}


def calls(*fragments: Any) -> bytes:
    """A chunk with these fragments of tool calls."""
    return chunk({"tool_calls": fragments})


def called(*chunks: list[Any]) -> list[bytes]:
    """An answer that calls tools; each list is the fragments of one chunk."""
    return [*(calls(*fragments) for fragments in chunks), *end("tool_calls")]


NOISE = (
    b": keep-alive\n\n",
    b": OPENROUTER PROCESSING\n\n",
    b":\n\n",
    b"event: ping\n\n",
    b"id: 7\nretry: 10\n\n",
    chunk({"role": "assistant"}),
    chunk({"role": "assistant", "content": "", "refusal": None}),
    chunk({"content": None, "reasoning_content": "", "reasoning": None, "tool_calls": None, "function_call": None}),
    chunk({"tool_calls": []}),
    chunk(None),
    chunk({}, obfuscation="dAr7", p="0", created=None, later_field={"deep": [1, {"x": None}]}),
    frame(ENVELOPE | {"choices": [], "usage": None}),
    frame({"choices": None}),
    frame({"choices": [{}]}),
    frame({}),
    frame({"choices": [], "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": {}}]}),
    frame({"choices": [{"content_filter_offsets": {"check_offset": 1}, "content_filter_results": {}}]}),
    frame({"choices": [{"index": 1, "delta": {"content": "another choice"}, "finish_reason": "length"}]}),
    frame({"error": None, "choices": []}),
)

FULL_USAGE = {
    "prompt_tokens": 19,
    "completion_tokens": 10,
    "total_tokens": 29,
    "prompt_tokens_details": {"cached_tokens": 7, "cache_write_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 4, "audio_tokens": 0, "accepted_prediction_tokens": 0},
}

SPOKEN: dict[str, tuple[list[bytes], list[Piece]]] = {
    "a plain answer": (
        [chunk({"role": "assistant", "content": "", "refusal": None}), *said("Hel", "lo"), *end()],
        [TextPiece("Hel"), TextPiece("lo"), STOP],
    ),
    "usage in a chunk without choices": (
        [*said("a"), chunk({}, "stop"), usage(FULL_USAGE), DONE],
        [TextPiece("a"), UsagePiece(19, 10, reasoning_tokens=4, cached_tokens=7), STOP],
    ),
    "usage on the last chunk, with nulls": (
        [*said("a"), usage({"prompt_tokens": None}, [{"delta": {"content": ""}, "finish_reason": "stop"}]), DONE],
        [TextPiece("a"), UsagePiece(0, 0), STOP],
    ),
    "usage on every chunk": (
        [usage({"prompt_tokens": 3, "completion_tokens": n, "prompt_tokens_details": None}) for n in (1, 2)] + [DONE],
        [UsagePiece(3, 1), UsagePiece(3, 2), STOP],
    ),
    "several bytes a character": (
        [*said("流式输出", "👩‍👩‍👧", "e\u0301", "\u2028\x85"), *end()],
        [TextPiece("流式输出"), TextPiece("👩‍👩‍👧"), TextPiece("e\u0301"), TextPiece("\u2028\x85"), STOP],
    ),
    "characters escaped in the JSON": (
        [b'data: {"choices":[{"delta":{"content":"\\ud83d\\ude00\\u4e0a\\n"}}]}\n\n', *end()],
        [TextPiece("😀上\n"), STOP],
    ),
    "a refusal": (
        [chunk({"role": "assistant", "content": None, "refusal": ""}), chunk({"refusal": "I can't."}), *end()],
        [TextPiece("I can't."), STOP],
    ),
    "reasoning_content": (
        [
            chunk({"content": None, "reasoning_content": "hm"}),
            chunk({"content": "", "reasoning_content": "m"}),
            *said("yes"),
            *end(),
        ],
        [ReasoningPiece("hm"), ReasoningPiece("m"), TextPiece("yes"), STOP],
    ),
    "reasoning": (
        [chunk({"content": "", "reasoning": "hm", "reasoning_details": [{"text": "hm"}]}), *said("yes"), *end()],
        [ReasoningPiece("hm"), TextPiece("yes"), STOP],
    ),
    "reasoning under both names": (
        [chunk({"reasoning": "hm", "reasoning_content": "hm"}), *end()],
        [ReasoningPiece("hm"), STOP],
    ),
    "reasoning and text in one delta": (
        [chunk({"reasoning_content": "so", "content": "yes"}), *end()],
        [ReasoningPiece("so"), TextPiece("yes"), STOP],
    ),
    "cut by length": ([*said("a"), *end("length")], [TextPiece("a"), FinishPiece("length")]),
    "filtered late": (
        [*said("a"), chunk({}, "stop"), chunk({}, "content_filter"), DONE],
        [TextPiece("a"), FinishPiece("content_filter")],
    ),
    "a reason twice, and text after it": (
        [*said("a"), chunk({"content": "b"}, "stop"), chunk({"content": "c"}, "stop"), DONE],
        [TextPiece("a"), TextPiece("b"), TextPiece("c"), STOP],
    ),
    "a reason of the vendor's own": ([*said("a"), *end("eos")], [TextPiece("a"), STOP]),
    "an error as the reason": ([*said("a"), *end("error")], [TextPiece("a"), FinishPiece("error")]),
    "no reason at all": ([*said("a"), DONE], [TextPiece("a"), STOP]),
    "nothing at all": ([DONE], [STOP]),
    "bytes after the end mark": ([*said("a"), *end(), *said("b"), b"data: {\n\n", DONE], [TextPiece("a"), STOP]),
    "an event over several lines": (
        [b'data: {"choices":\ndata: [{"delta":\ndata: {"content":"a"}}]}\n\n', *end()],
        [TextPiece("a"), STOP],
    ),
    "no space after the colon": (
        [b'data:{"choices":[{"delta":{"content":"a"}}]}\n\n', b"data:[DONE]\n\n"],
        [TextPiece("a"), STOP],
    ),
    "typed events with ids": (
        [b"event: message\nid: 1\n" + said("a")[0], b"event: message\nid: 2\n" + DONE],
        [TextPiece("a"), STOP],
    ),
    "a byte order mark": ([b"\xef\xbb\xbf" + said("a")[0], *end()], [TextPiece("a"), STOP]),
}

CALLED: dict[str, tuple[list[bytes], list[Piece]]] = {
    "a call in fragments": (
        called([call(0, "c1", "weather", "")], [call(0, arguments='{"city":')], [call(0, arguments='"上海"}')]),
        [
            ToolCallPiece(0, "c1", "weather"),
            ToolCallPiece(0, arguments_fragment='{"city":'),
            ToolCallPiece(0, arguments_fragment='"上海"}'),
            CALLS,
        ],
    ),
    "text, then two calls that interleave": (
        [
            *said("Let me see."),
            *called(
                [call(0, "c1", "weather", "")],
                [call(1, "c2", "time", "")],
                [call(1, arguments="{"), call(0, arguments="{")],
                [call(0, arguments="}")],
                [call(1, arguments="}")],
            ),
        ],
        [
            TextPiece("Let me see."),
            ToolCallPiece(0, "c1", "weather"),
            ToolCallPiece(1, "c2", "time"),
            ToolCallPiece(1, arguments_fragment="{"),
            ToolCallPiece(0, arguments_fragment="{"),
            ToolCallPiece(0, arguments_fragment="}"),
            ToolCallPiece(1, arguments_fragment="}"),
            CALLS,
        ],
    ),
    "indices out of order": (
        called([call(3, "c4", "late", "{}")], [call(1, "c2", "early", "{}")]),
        [ToolCallPiece(3, "c4", "late", "{}"), ToolCallPiece(1, "c2", "early", "{}"), CALLS],
    ),
    "whole calls without an index in one chunk": (
        called([call(None, "c1", "weather", SHANGHAI), call(None, "c2", "time", "{}")]),
        [ToolCallPiece(0, "c1", "weather", SHANGHAI), ToolCallPiece(1, "c2", "time", "{}"), CALLS],
    ),
    "whole calls without an index, a chunk each": (
        called([call(None, "c1", "weather", SHANGHAI)], [call(None, "c2", "time", "{}")]),
        [ToolCallPiece(0, "c1", "weather", SHANGHAI), ToolCallPiece(1, "c2", "time", "{}"), CALLS],
    ),
    "whole calls without index and id": (
        called([call(None, None, "weather", SHANGHAI)], [call(None, "", "weather", "{}")]),
        [ToolCallPiece(0, None, "weather", SHANGHAI), ToolCallPiece(1, None, "weather", "{}"), CALLS],
    ),
    "fragments without an index": (
        called(
            [call(None, "c1", "weather", "{")],
            [call(None, arguments="}")],
            [call(None, "c2", "time", "{")],
            [call(None, "", "", "}")],
        ),
        [
            ToolCallPiece(0, "c1", "weather", "{"),
            ToolCallPiece(0, arguments_fragment="}"),
            ToolCallPiece(1, "c2", "time", "{"),
            ToolCallPiece(1, arguments_fragment="}"),
            CALLS,
        ],
    ),
    "fragments told apart by their id alone": (
        called(
            [call(None, "c1", "weather", "{")],
            [call(None, "c2", "time", "{")],
            [call(None, "c1", arguments="}")],
            [call(None, "c2", "time", "}")],
        ),
        [
            ToolCallPiece(0, "c1", "weather", "{"),
            ToolCallPiece(1, "c2", "time", "{"),
            ToolCallPiece(0, arguments_fragment="}"),
            ToolCallPiece(1, arguments_fragment="}"),
            CALLS,
        ],
    ),
    "one index for all calls": (
        called([call(0, "c1", "weather", SHANGHAI)], [call(0, "c2", "time", "{")], [call(0, arguments="}")]),
        [
            ToolCallPiece(0, "c1", "weather", SHANGHAI),
            ToolCallPiece(1, "c2", "time", "{"),
            ToolCallPiece(1, arguments_fragment="}"),
            CALLS,
        ],
    ),
    "one index for all calls, after another": (
        called([call(1, "c1", "a", "{}")], [call(0, "c2", "b", "{}")], [call(0, "c3", "c", "{}")]),
        [
            ToolCallPiece(1, "c1", "a", "{}"),
            ToolCallPiece(0, "c2", "b", "{}"),
            ToolCallPiece(2, "c3", "c", "{}"),
            CALLS,
        ],
    ),
    "id and name in every fragment": (
        called([call(0, "c1", "weather", "{")], [call(0, "c1", "weather", "}")]),
        [ToolCallPiece(0, "c1", "weather", "{"), ToolCallPiece(0, arguments_fragment="}"), CALLS],
    ),
    "an empty id and name in later fragments": (
        called([call(0, "c1", "weather", "{")], [call(0, "", "", "}")]),
        [ToolCallPiece(0, "c1", "weather", "{"), ToolCallPiece(0, arguments_fragment="}"), CALLS],
    ),
    "a new id in every fragment": (
        called([call(0, "r1", "weather", "{")], [call(0, "r2", arguments="}")]),
        [ToolCallPiece(0, "r1", "weather", "{"), ToolCallPiece(0, arguments_fragment="}"), CALLS],
    ),
    "an id that comes late": (
        called([call(0, "", "weather", "{")], [call(0, "c1", "weather", "}")]),
        [ToolCallPiece(0, None, "weather", "{"), ToolCallPiece(0, "c1", None, "}"), CALLS],
    ),
    "nulls in the fragments": (
        called(
            [{"index": 0, "id": "c1", "function": None}], [{"index": 0, "function": {"name": "f", "arguments": None}}]
        ),
        [ToolCallPiece(0, "c1"), ToolCallPiece(0, None, "f"), CALLS],
    ),
    "calls that end without a reason": (
        [calls(call(0, "c1", "weather", "{}")), DONE],
        [ToolCallPiece(0, "c1", "weather", "{}"), CALLS],
    ),
    "the old function_call": (
        [
            chunk({"function_call": {"name": "weather", "arguments": ""}}),
            chunk({"function_call": {"arguments": "{}"}}),
            *end("function_call"),
        ],
        [ToolCallPiece(0, None, "weather"), ToolCallPiece(0, arguments_fragment="{}"), CALLS],
    ),
}

OVERLOADED = {"message": "Overloaded", "type": "overloaded_error", "code": None, "param": None}

FAILED: dict[str, tuple[list[bytes], list[Piece], Any]] = {
    "an error object after tokens": (
        [*said("a"), frame({"error": OVERLOADED})],
        [TextPiece("a")],
        "upstream.overloaded",
    ),
    "an error as a string": ([*said("a"), frame({"error": "boom"})], [TextPiece("a")], "upstream.server"),
    "an error with a numeric code, and choices": (
        [*said("a"), frame({"error": {"code": 429, "message": "slow down"}, "choices": [{"finish_reason": "error"}]})],
        [TextPiece("a")],
        "upstream.rate_limit",
    ),
    "an error with a code in digits": ([frame({"error": {"code": "401"}})], [], "upstream.auth"),
    "an empty error object": ([frame({"error": {}}), DONE], [], "upstream.server"),
    "an error in a typed event": ([b"event: error\n" + frame({"error": OVERLOADED})], [], "upstream.overloaded"),
    "no JSON": ([*said("a"), b"data: {nope\n\n"], [TextPiece("a")], "upstream.protocol"),
    "JSON of another shape": ([*said("a"), b"data: [1]\n\n"], [TextPiece("a")], "upstream.protocol"),
    "a text that is a number": ([*said("a"), chunk({"content": 7})], [TextPiece("a")], "upstream.protocol"),
    "half a surrogate pair": (
        [*said("a"), b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\n'],
        [TextPiece("a")],
        "upstream.protocol",
    ),
    "invalid UTF-8": (
        [*said("a"), b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n'],
        [TextPiece("a")],
        "upstream.protocol",
    ),
    "nesting without end": (
        [*said("a"), b'data: {"x":' + b"[" * 2000 + b"\n\n"],
        [TextPiece("a")],
        "upstream.protocol",
    ),
}

CASES = [
    *(WireCase(f"chat: {name}", WIRE, frames, pieces, noise=NOISE) for name, (frames, pieces) in SPOKEN.items()),
    *(WireCase(f"chat: {name}", WIRE, frames, pieces, noise=NOISE) for name, (frames, pieces) in CALLED.items()),
    *(
        WireCase(f"chat: {name}", WIRE, frames, pieces, error=code, noise=NOISE)
        for name, (frames, pieces, code) in FAILED.items()
    ),
]
