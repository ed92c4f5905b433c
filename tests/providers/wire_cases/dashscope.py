"""DashScope's native stream as Alibaba sends it, incremental and not (wire-formats.md, section 2g).

Recorded frames: cnblogs/dashscope-sdk, ``single-generation-text-sse``, and the tests of the dashscope SDK 2.0.
"""

from __future__ import annotations

from typing import Any

import msgspec

from engine.errors import ProviderErrorCode
from engine.pieces import FinishPiece, FinishReason, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from providers.dashscope import DashScopeWire

from . import WireCase

WIRE = DashScopeWire()
CUMULATIVE = DashScopeWire(cumulative=True)
STOP = FinishPiece("stop")
CALLS = FinishPiece("tool_calls")


def frame(chunk: Any, event: str = "result", status: int = 200) -> bytes:
    """One event as DashScope writes it: no space after a colon."""
    return b"id:1\nevent:%s\n:HTTP_STATUS/%d\ndata:%s\n\n" % (event.encode(), status, msgspec.json.encode(chunk))


def chunk(message: Any, finish_reason: str | None = "null", output_tokens: int | None = 1, **more: Any) -> bytes:
    """An event with one choice."""
    choice = {"message": {"role": "assistant"} | message, "finish_reason": finish_reason}
    usage = {"total_tokens": 16 + (output_tokens or 0), "input_tokens": 16, "output_tokens": output_tokens}
    whole: dict[str, Any] = {"output": {"choices": [choice]}, "usage": usage, "request_id": "5b441aa7-0b9c"}
    return frame(whole | more)


def said(*texts: str) -> list[bytes]:
    """An event for each text."""
    return [chunk({"content": text}, output_tokens=count) for count, text in enumerate(texts, 1)]


def thought(*texts: str) -> list[bytes]:
    """An event for each thought."""
    return [chunk({"content": "", "reasoning_content": text}) for text in texts]


def end(finish_reason: str = "stop", message: Any = None, output_tokens: int = 6) -> bytes:
    """The event that says why."""
    return chunk(message or {"content": ""}, finish_reason, output_tokens)


def call(index: int | None, call_id: str | None, name: str | None, arguments: str | None) -> dict[str, Any]:
    """A fragment of a tool call; what is None is left out."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    head = {key: value for key, value in (("index", index), ("id", call_id)) if value is not None}
    return head | {"type": "function", "function": function}


def calls(*fragments: dict[str, Any], finish_reason: str = "null") -> bytes:
    """An event with these fragments of tool calls."""
    return chunk({"content": "", "tool_calls": fragments}, finish_reason)


SPENT = UsagePiece(16, 6)

NOISE = (
    b":HTTP_STATUS/200\n\n",
    b"event:result\n\n",
    b"id:7\n\n",
    chunk({"content": ""}, usage=None),
    chunk({"content": None, "reasoning_content": None, "tool_calls": None}, usage=None),
    chunk({"content": []}, None, usage=None),
    chunk({"content": [{"image_hw": [[480, 640]]}], "reasoning_content": "", "tool_calls": []}, "", usage=None),
    frame({"output": {"choices": []}, "usage": None, "request_id": "r"}),
    frame({"output": {"text": "", "finish_reason": "null", "choices": None}}),
    frame({"output": {"choices": [{"message": None, "finish_reason": None}], "later_field": [{"deep": None}]}}),
    frame({"output": {"choices": [{"index": 1, "message": {"content": "another"}, "finish_reason": "length"}]}}),
    frame({"output": None, "code": "", "message": "", "status_code": 200}),
    frame({}),
)

ANSWERS: dict[str, tuple[list[bytes], list[Piece]]] = {
    "a plain answer": (
        [*said("1+", "1", "等于", "2。"), end()],
        [*map(TextPiece, ("1+", "1", "等于", "2。")), SPENT, STOP],
    ),
    "several bytes a character": (
        [*said("你好、", "世界🌍", "👩‍👩‍👧 é\u2028"), end()],
        [TextPiece("你好、"), TextPiece("世界🌍"), TextPiece("👩‍👩‍👧 é\u2028"), SPENT, STOP],
    ),
    "a space after each colon": (
        [b"event: result\ndata: " + part.partition(b"data:")[2] for part in [*said("a"), end()]],
        [TextPiece("a"), SPENT, STOP],
    ),
    "text on the last event": (
        [*said("a"), end(message={"content": "z"})],
        [TextPiece("a"), TextPiece("z"), SPENT, STOP],
    ),
    "reasoning, then the answer": (
        [*thought("先想", "一想"), *said("so"), end()],
        [ReasoningPiece("先想"), ReasoningPiece("一想"), TextPiece("so"), SPENT, STOP],
    ),
    "content in parts, from a model that sees": (
        [
            chunk({"content": [], "reasoning_content": "hm"}),
            chunk({"content": [{"text": "Hel"}]}),
            chunk({"content": [{"text": "l"}, {"text": "o"}]}),
            end(message={"content": []}),
        ],
        [ReasoningPiece("hm"), TextPiece("Hel"), TextPiece("l"), TextPiece("o"), SPENT, STOP],
    ),
    "the format of old models": (
        [
            frame(
                {"output": {"finish_reason": "null", "text": "等于"}, "usage": {"input_tokens": 16, "output_tokens": 4}}
            ),
            frame({"output": {"finish_reason": "stop", "text": ""}, "usage": {"input_tokens": 16, "output_tokens": 6}}),
        ],
        [TextPiece("等于"), SPENT, STOP],
    ),
    "usage in detail": (
        [
            *said("a"),
            frame(
                {
                    "output": {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]},
                    "usage": {
                        "input_tokens": 62,
                        "output_tokens": 28,
                        "total_tokens": 90,
                        "output_tokens_details": {"text_tokens": 8, "reasoning_tokens": 20},
                        "prompt_tokens_details": {"cached_tokens": 5, "cache_type": "ephemeral"},
                    },
                }
            ),
        ],
        [TextPiece("a"), UsagePiece(62, 28, reasoning_tokens=20, cached_tokens=5), STOP],
    ),
    "usage after the reason, unchanged and changed": (
        [*said("a"), end(), end(), end(output_tokens=7)],
        [TextPiece("a"), SPENT, STOP, UsagePiece(16, 7)],
    ),
    "no usage": (
        [chunk({"content": "a"}, usage=None), chunk({"content": ""}, "stop", usage=None)],
        [TextPiece("a"), STOP],
    ),
    "one call": (
        [
            calls(call(0, "call_a", "weather", "")),
            calls(call(0, "", None, '{"city":')),
            calls(call(0, "", "", '"上海"}')),
            end("tool_calls"),
        ],
        [
            ToolCallPiece(0, "call_a", "weather"),
            ToolCallPiece(0, arguments_fragment='{"city":'),
            ToolCallPiece(0, arguments_fragment='"上海"}'),
            SPENT,
            CALLS,
        ],
    ),
    "two calls, interleaved": (
        [
            calls(call(0, "call_a", "weather", '{"city"')),
            calls(call(1, "call_b", "time", "{")),
            calls(call(0, "", None, ':"上海"}'), call(1, "", None, '"zone":8}')),
            end("tool_calls"),
        ],
        [
            ToolCallPiece(0, "call_a", "weather", '{"city"'),
            ToolCallPiece(1, "call_b", "time", "{"),
            ToolCallPiece(0, arguments_fragment=':"上海"}'),
            ToolCallPiece(1, arguments_fragment='"zone":8}'),
            SPENT,
            CALLS,
        ],
    ),
    "whole calls without index, the first without an id": (
        [calls(call(None, "", "a", "{}"), call(None, "call_b", "b", '{"x":1}'), finish_reason="tool_calls")],
        [ToolCallPiece(0, None, "a", "{}"), ToolCallPiece(1, "call_b", "b", '{"x":1}'), UsagePiece(16, 1), CALLS],
    ),
    "id and name in every fragment": (
        [calls(call(0, "call_a", "f", "{")), calls(call(0, "call_a", "f", "}")), end("tool_calls")],
        [ToolCallPiece(0, "call_a", "f", "{"), ToolCallPiece(0, arguments_fragment="}"), SPENT, CALLS],
    ),
    "no arguments": (
        [calls(call(0, "call_a", "now", None)), calls(call(0, "", "", "")), end("tool_calls")],
        [ToolCallPiece(0, "call_a", "now"), SPENT, CALLS],
    ),
}

GROWING: dict[str, tuple[list[bytes], list[Piece]]] = {
    "the whole text each time": (
        [*said("ha", "haha", "haha", "haha 世界"), end(message={"content": "haha 世界!"})],
        [TextPiece("ha"), TextPiece("ha"), TextPiece(" 世界"), TextPiece("!"), SPENT, STOP],
    ),
    "whole reasoning, then the whole text, then nothing": (
        [
            *thought("先", "先想"),
            chunk({"content": "so", "reasoning_content": "先想"}),
            chunk({"content": "so it is", "reasoning_content": ""}),
            end(),
        ],
        [ReasoningPiece("先"), ReasoningPiece("想"), TextPiece("so"), TextPiece(" it is"), SPENT, STOP],
    ),
    "whole calls each time": (
        [
            calls(call(0, "call_a", "f", '{"x"')),
            calls(call(0, "call_a", "f", '{"x":1}'), call(1, "call_b", "g", "{")),
            calls(call(0, "call_a", "f", '{"x":1}'), call(1, "call_b", "g", "{}"), finish_reason="tool_calls"),
        ],
        [
            ToolCallPiece(0, "call_a", "f", '{"x"'),
            ToolCallPiece(0, arguments_fragment=":1}"),
            ToolCallPiece(1, "call_b", "g", "{"),
            ToolCallPiece(1, arguments_fragment="}"),
            UsagePiece(16, 1),
            CALLS,
        ],
    ),
}

REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
    "a reason of next year": "stop",
}

FAILURES: dict[str, ProviderErrorCode] = {
    "Throttling": "upstream.rate_limit",
    "Throttling.RateQuota": "upstream.rate_limit",
    "Throttling.AllocationQuota": "upstream.rate_limit",
    "Arrearage": "upstream.rate_limit",
    "InvalidApiKey": "upstream.auth",
    "AccessDenied.Unpurchased": "upstream.auth",
    "Model.AccessDenied": "upstream.auth",
    "DataInspectionFailed": "upstream.content_policy",
    "data_inspection_failed": "upstream.content_policy",
    "InvalidParameter": "upstream.invalid_request",
    "InvalidParameter.DataInspection": "upstream.invalid_request",
    "ModelNotFound": "upstream.invalid_request",
    "RequestTimeOut": "upstream.overloaded",
    "ModelUnavailable": "upstream.overloaded",
    "InternalError": "upstream.server",
    "InternalError.Algo": "upstream.server",
    "An error of next year": "upstream.server",
}


def failed(code: str, event: str = "error", message: str = "what happened") -> bytes:
    """A failure, in the stream."""
    return frame({"code": code, "message": message, "request_id": "r"}, event, 400)


def case(name: str, frames: list[bytes], pieces: list[Piece], error: ProviderErrorCode | None = None) -> WireCase:
    """A case of an incremental stream."""
    return WireCase(f"dashscope: {name}", WIRE, frames, pieces, error, NOISE)


CASES = [
    *(case(name, *answer) for name, answer in ANSWERS.items()),
    *(WireCase(f"dashscope: {name}", CUMULATIVE, *answer, noise=NOISE) for name, answer in GROWING.items()),
    *(
        case(f"finish reason {reason}", [*said("a"), end(reason)], [TextPiece("a"), SPENT, FinishPiece(finish)])
        for reason, finish in REASONS.items()
    ),
    *(
        case(f"{code} after text", [*said("a"), failed(code)], [TextPiece("a")], meant)
        for code, meant in FAILURES.items()
    ),
    case(
        "an error that is called a result",
        [*said("a"), failed("Throttling", "result")],
        [TextPiece("a")],
        "upstream.rate_limit",
    ),
    case("an error without a code", [frame({"message": "what happened"}, "error", 500)], [], "upstream.server"),
    case(
        "too long, said in words",
        [failed("InvalidParameter", message="<400> Range of input length should be [1, 129024]")],
        [],
        "upstream.context_length",
    ),
    case("cut off", said("a"), [TextPiece("a")], "upstream.truncated"),
    WireCase(
        "dashscope: a text that is taken back",
        CUMULATIVE,
        said("haha", "ho"),
        [TextPiece("haha")],
        "upstream.protocol",
        NOISE,
    ),
]
