"""Ollama's chat as it streams it, and as gateways pass it on (wire-formats.md, section 2e)."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.errors import ProviderErrorCode
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
from providers.ollama import OllamaWire

from . import WireCase

WIRE = OllamaWire()
STOP = FinishPiece("stop")
CALLS = FinishPiece("tool_calls")
COUNTS = {
    "total_duration": 4648158584,
    "load_duration": 4071084,
    "prompt_eval_count": 36,
    "prompt_eval_duration": 439038000,
    "eval_count": 180,
    "eval_duration": 4196918000,
}
SPENT = UsagePiece(36, 180)


def line(message: Any, done: bool = False, **more: Any) -> bytes:
    """One line as Ollama writes it."""
    envelope = {"model": "qwen3", "created_at": "2025-10-26T17:15:24.097767Z", "message": message, "done": done}
    return msgspec.json.encode(envelope | more) + b"\n"


def said(*texts: str) -> list[bytes]:
    """A line for each text."""
    return [line({"role": "assistant", "content": text}) for text in texts]


def thought(*texts: str) -> list[bytes]:
    """A line for each thought."""
    return [line({"role": "assistant", "content": "", "thinking": text}) for text in texts]


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    """A tool call, whole as they all are."""
    return more | {"function": {"name": name, "arguments": arguments}}


def called(*calls: dict[str, Any], **more: Any) -> bytes:
    """A line with these calls."""
    return line({"role": "assistant", "content": "", "tool_calls": calls}, **more)


def end(done_reason: str | None = "stop", **more: Any) -> bytes:
    """The last line."""
    return line({"role": "assistant", "content": ""}, done=True, done_reason=done_reason, **(COUNTS | more))


NOISE = (
    b"\n",
    b" \t\n",
    line({"role": "assistant", "content": ""}),
    line({"role": "assistant", "content": None, "thinking": None, "tool_calls": None, "images": None}),
    line({"role": "assistant", "content": "", "thinking": "", "tool_calls": []}),
    line(None, logprobs=[{"token": "a", "logprob": -0.5}]),
    b"{}\n",
    b'{"done":false,"error":null,"later_field":[{"deep":null}]}\n',
)

ANSWERS: dict[str, tuple[list[bytes], list[Piece]]] = {
    "a plain answer": ([*said("Hel", "lo"), end()], [TextPiece("Hel"), TextPiece("lo"), SPENT, STOP]),
    "several bytes a character": (
        [*said("你好、", "世界🌍", "👩‍👩‍👧 é\u2028\x85"), end()],
        [TextPiece("你好、"), TextPiece("世界🌍"), TextPiece("👩‍👩‍👧 é\u2028\x85"), SPENT, STOP],
    ),
    "line ends, quotes and braces in the text": (
        [*said('a\r\n"}', "{}\n", "}"), end()],
        [TextPiece('a\r\n"}'), TextPiece("{}\n"), TextPiece("}"), SPENT, STOP],
    ),
    "text on the last line": (
        [*said("a"), line({"role": "assistant", "content": "z"}, done=True, done_reason="stop")],
        [TextPiece("a"), TextPiece("z"), STOP],
    ),
    "thinking, then the answer": (
        [*thought("先想", "一想"), *said("so"), end()],
        [ReasoningPiece("先想"), ReasoningPiece("一想"), TextPiece("so"), SPENT, STOP],
    ),
    "thinking and answer on one line": (
        [line({"role": "assistant", "content": "so", "thinking": "hm"}), end()],
        [ReasoningPiece("hm"), TextPiece("so"), SPENT, STOP],
    ),
    "usage of half the counts": (
        [*said("a"), line(None, done=True, done_reason="stop", eval_count=3)],
        [TextPiece("a"), UsagePiece(0, 3), STOP],
    ),
    "one call with an id": (
        [called(call("weather", {"city": "上海", "days": 2}, id="call_ab12")), end()],
        [ToolCallPiece(0, "call_ab12", "weather", '{"city":"上海","days":2}'), SPENT, CALLS],
    ),
    "calls without ids, on two lines": (
        [called(call("a", {"x": 1}), call("b", {"y": [None]})), called(call("a", {"x": 2})), end()],
        [
            ToolCallPiece(0, "call_2025_10_26_17_15_24_097767_0", "a", '{"x":1}'),
            ToolCallPiece(1, "call_2025_10_26_17_15_24_097767_1", "b", '{"y":[null]}'),
            ToolCallPiece(2, "call_2025_10_26_17_15_24_097767_2", "a", '{"x":2}'),
            SPENT,
            CALLS,
        ],
    ),
    "a call at no time": (
        [called(call("a", {}), created_at=None), end()],
        [ToolCallPiece(0, "call_0", "a", "{}"), SPENT, CALLS],
    ),
    "empty arguments": ([called(call("now", {}, id="c")), end()], [ToolCallPiece(0, "c", "now", "{}"), SPENT, CALLS]),
    "no arguments": ([called(call("now", None, id="c")), end()], [ToolCallPiece(0, "c", "now", "{}"), SPENT, CALLS]),
    "arguments as text": (
        [called(call("f", '{"x": 1}', id="c")), end()],
        [ToolCallPiece(0, "c", "f", '{"x": 1}'), SPENT, CALLS],
    ),
    "thinking, a comment and a call on the last line": (
        [
            *thought("hm, ", "the weather"),
            *said("I look."),
            called(call("weather", {"city": "X"}, id="c"), done=True, done_reason="stop"),
        ],
        [
            ReasoningPiece("hm, "),
            ReasoningPiece("the weather"),
            TextPiece("I look."),
            ToolCallPiece(0, "c", "weather", '{"city":"X"}'),
            ContinuationPiece({"thinking": "hm, the weather"}),
            CALLS,
        ],
    ),
    "a call, and the bound met": (
        [called(call("f", {}, id="c")), end("length")],
        [ToolCallPiece(0, "c", "f", "{}"), SPENT, FinishPiece("length")],
    ),
}

REASONS: dict[str | None, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "load": "error",
    "unload": "error",
    "a reason of next year": "stop",
    None: "stop",
}

FAILURES: dict[str, tuple[Any, ProviderErrorCode]] = {
    "a text": ("llama runner process has terminated: exit status 2", "upstream.server"),
    "an object": ({"message": "slow down", "code": "rate_limit_exceeded"}, "upstream.rate_limit"),
}


def error_line(error: Any) -> bytes:
    """A failure under HTTP 200."""
    return msgspec.json.encode({"error": error}) + b"\n"


CASES = [
    *(WireCase(f"ollama: {name}", WIRE, *case, noise=NOISE) for name, case in ANSWERS.items()),
    *(
        WireCase(
            f"ollama: done for {reason}",
            WIRE,
            [*said("a"), end(reason)],
            [TextPiece("a"), SPENT, FinishPiece(finish)],
            noise=NOISE,
        )
        for reason, finish in REASONS.items()
    ),
    *(
        WireCase(
            f"ollama: an error after text, {name}", WIRE, [*said("a"), error_line(error)], [TextPiece("a")], code, NOISE
        )
        for name, (error, code) in FAILURES.items()
    ),
    WireCase("ollama: an error, nothing else", WIRE, [error_line("out of memory")], [], "upstream.server", NOISE),
    WireCase("ollama: cut off", WIRE, said("a"), [TextPiece("a")], "upstream.truncated", NOISE),
]
