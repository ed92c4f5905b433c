"""Baidu's first ERNIE stream (wire-formats.md, section 2g); the frames are after those in qianfan4j's README."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.errors import ProviderErrorCode
from engine.pieces import FinishPiece, FinishReason, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from providers.baidu_v1 import BaiduV1Wire

from . import WireCase

WIRE = BaiduV1Wire()
STOP = FinishPiece("stop")
CALLS = FinishPiece("tool_calls")
SPENT = UsagePiece(812, 36)


def frame(chunk: Any) -> bytes:
    """One event with this JSON."""
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def chunk(result: str | None, is_end: bool = False, **more: Any) -> bytes:
    """An event with a part of the result."""
    envelope = {"id": "as-mghmq7fq8e", "object": "chat.completion", "created": 1710064968, "sentence_id": 0}
    state = {"is_end": is_end, "is_truncated": False, "need_clear_history": False, "finish_reason": "normal"}
    usage = {"prompt_tokens": 812, "completion_tokens": 36 if is_end else 0, "total_tokens": 848}
    return frame(envelope | state | {"result": result, "usage": usage} | more)


def said(*texts: str) -> list[bytes]:
    """An event for each text."""
    return [chunk(text) for text in texts]


def end(result: str = "", **more: Any) -> bytes:
    """The last event."""
    return chunk(result, is_end=True, **more)


def called(name: str, arguments: str, is_end: bool = True, **more: Any) -> bytes:
    """An event that calls a function."""
    call = {"name": name, "arguments": arguments} | more
    return chunk("", is_end, function_call=call, finish_reason="function_call")


def failed(code: Any) -> bytes:
    """A failure in the stream."""
    return frame({"error_code": code, "error_msg": "what happened", "id": "as-mghmq7fq8e"})


NOISE = (
    b": keep-alive\n\n",
    b"event: message\n\n",
    chunk(""),
    chunk(None, function_call=None, usage=None, finish_reason=None, flag=0, ban_round=0),
    chunk("", search_info={"search_results": []}, is_truncated=None, need_clear_history=None),
    frame({"error_code": 0, "error_msg": ""}),
    frame({"later_field": [{"deep": None}]}),
    frame({}),
)

ANSWERS: dict[str, tuple[list[bytes], list[Piece]]] = {
    "a plain answer": (
        [*said("李四", "的语文成绩是80分。"), end()],
        [TextPiece("李四"), TextPiece("的语文成绩是80分。"), SPENT, STOP],
    ),
    "text in the last event": ([*said("a"), end("z")], [TextPiece("a"), TextPiece("z"), SPENT, STOP]),
    "all of it in one event": ([end("你好")], [TextPiece("你好"), SPENT, STOP]),
    "several bytes a character": (
        [*said("世界🌍", "👩‍👩‍👧 é\u2028"), end()],
        [TextPiece("世界🌍"), TextPiece("👩‍👩‍👧 é\u2028"), SPENT, STOP],
    ),
    "no usage": ([*said("a"), end(usage=None)], [TextPiece("a"), STOP]),
    "half a usage": ([*said("a"), end(usage={"prompt_tokens": 5})], [TextPiece("a"), UsagePiece(5, 0), STOP]),
    "a call": (
        [called("weather", '{"city":"上海"}')],
        [ToolCallPiece(0, "as-mghmq7fq8e_0", "weather", '{"city":"上海"}'), SPENT, CALLS],
    ),
    "a call with its reason, after text, said twice": (
        [
            *said("I look."),
            called("f", '{"x":1}', is_end=False, thoughts="先查成绩"),
            called("f", '{"x":1}', thoughts="先查成绩"),
        ],
        [
            TextPiece("I look."),
            ReasoningPiece("先查成绩"),
            ToolCallPiece(0, "as-mghmq7fq8e_0", "f", '{"x":1}'),
            SPENT,
            CALLS,
        ],
    ),
    "a call that ends as if it were none": (
        [called("f", "{}", is_end=False), end()],
        [ToolCallPiece(0, "as-mghmq7fq8e_0", "f", "{}"), SPENT, CALLS],
    ),
    "a call without arguments, in an answer without an id": (
        [chunk("", id=None, function_call={"name": "now"}), end()],
        [ToolCallPiece(0, "call_0", "now"), SPENT, CALLS],
    ),
}

REASONS: dict[str, tuple[dict[str, Any], FinishReason]] = {
    "normal": ({}, "stop"),
    "stop": ({"finish_reason": "stop"}, "stop"),
    "length": ({"finish_reason": "length"}, "length"),
    "content_filter": ({"finish_reason": "content_filter"}, "content_filter"),
    "none, as of early models": ({"finish_reason": None}, "stop"),
    "none, but truncated": ({"finish_reason": None, "is_truncated": True}, "length"),
    "normal, but the history is to be cleared": ({"need_clear_history": True, "ban_round": -1}, "content_filter"),
    "one of next year": ({"finish_reason": "tired"}, "stop"),
}

FAILURES: dict[Any, ProviderErrorCode] = {
    1: "upstream.server",
    2: "upstream.overloaded",
    4: "upstream.rate_limit",
    6: "upstream.auth",
    17: "upstream.rate_limit",
    18: "upstream.rate_limit",
    110: "upstream.auth",
    111: "upstream.auth",
    336000: "upstream.server",
    336003: "upstream.invalid_request",
    336007: "upstream.context_length",
    336100: "upstream.overloaded",
    336103: "upstream.context_length",
    336501: "upstream.rate_limit",
    999999: "upstream.server",
}


def case(name: str, frames: list[bytes], pieces: list[Piece], error: ProviderErrorCode | None = None) -> WireCase:
    """A case of this format."""
    return WireCase(f"baidu_v1: {name}", WIRE, frames, pieces, error, NOISE)


CASES = [
    *(case(name, *answer) for name, answer in ANSWERS.items()),
    *(
        case(f"finish reason {name}", [*said("a"), end(**fields)], [TextPiece("a"), SPENT, FinishPiece(finish)])
        for name, (fields, finish) in REASONS.items()
    ),
    *(
        case(f"{code} after text", [*said("a"), failed(code)], [TextPiece("a")], meant)
        for code, meant in FAILURES.items()
    ),
    case("an error, nothing else", [failed(336100)], [], "upstream.overloaded"),
    case("cut off", said("a"), [TextPiece("a")], "upstream.truncated"),
]
