"""``streamGenerateContent`` streams as Google's documentation and SDK show them (wire-formats.md, section 2d)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

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
from providers.gemini import GeminiWire

from . import WireCase

WIRE = GeminiWire()
SIGNATURE = "CiIBVKhc7gL5u2Zx+0cQnSg/aw=="
ENVELOPE = {"modelVersion": "gemini-3.8-flash", "responseId": "Il0taoSYJ5Cez7IP"}


def frame(chunk: Any) -> bytes:
    """One event with this JSON, with the line ends that Google writes."""
    return b"data: " + msgspec.json.encode(chunk) + b"\r\n\r\n"


def chunk(*parts: Any, finish: str | None = None, usage: Any = None, **more: Any) -> bytes:
    """A chunk with one candidate."""
    candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"}, "index": 0}
    if finish:
        candidate["finishReason"] = finish
    counts = {} if usage is None else {"usageMetadata": usage}
    return frame({"candidates": [candidate], **counts, **ENVELOPE, **more})


def text(said: str, **more: Any) -> Any:
    """A part of text."""
    return {"text": said, **more}


def thought(said: str, **more: Any) -> Any:
    """A part that tells what the model thought."""
    return {"text": said, "thought": True, **more}


def call(name: str, args: Any = None, call_id: str | None = None, **more: Any) -> Any:
    """A part that calls a function."""
    function_call = {"name": name, "args": args, "id": call_id}
    return {"functionCall": {key: value for key, value in function_call.items() if value is not None}, **more}


def meant(*pieces: Piece, finish: FinishReason = "stop", outline: Sequence[Any] = ()) -> list[Piece]:
    """The pieces, the outline that goes back, and the end."""
    back = [ContinuationPiece([SPANS[type(span)](*span) for span in outline])] if outline else []
    return [*pieces, *back, FinishPiece(finish)]


class Text(tuple[Any, ...]):
    """So many characters of the turn's text, and the part's own fields."""


class Call(tuple[Any, ...]):
    """A call by its id, and the part's own fields."""


class Block(tuple[Any, ...]):
    """A part that goes back whole."""


SPANS: dict[type, Callable[..., Any]] = {
    Text: lambda chars, extra=None: {"kind": "text", "chars": chars} | ({"extra": extra} if extra else {}),
    Call: lambda call_id, extra=None: {"kind": "call", "call_id": call_id} | ({"extra": extra} if extra else {}),
    Block: lambda block: {"kind": "block", "block": block},
}

STOP = FinishPiece("stop")
CALLS = FinishPiece("tool_calls")
SIGNED = {"thoughtSignature": SIGNATURE}

NOISE = (
    frame({}),
    frame(ENVELOPE),
    frame({"candidates": []}),
    frame({"candidates": None, "usageMetadata": None, "promptFeedback": None, "error": None}),
    frame({"promptFeedback": {"safetyRatings": [{"category": "HARM_CATEGORY_HARASSMENT", "probability": "LOW"}]}}),
    frame({"candidates": [{"index": 0, "safetyRatings": [], "citationMetadata": {"citationSources": []}}]}),
    frame({"candidates": [{"groundingMetadata": {"webSearchQueries": ["weather"]}, "urlContextMetadata": {}}]}),
    frame({"candidates": [{"index": 1, "content": {"parts": [{"text": "another"}]}, "finishReason": "STOP"}]}),
    chunk(),
    chunk(text("")),
    chunk(thought("")),
    chunk({"executableCode": {"language": "PYTHON", "code": "1"}}, {"codeExecutionResult": {"outcome": "OUTCOME_OK"}}),
    chunk({"inlineData": {"mimeType": "image/png", "data": "iVBORw0KGgo="}}, {"lumosUnknown": {"x": [1]}}),
    frame({"candidates": [{"content": {"role": "model"}, "index": 0, "tokenCount": 1, "avgLogprobs": -0.1}]}),
)

Expected: TypeAlias = dict[str, tuple[list[bytes], list[Piece]]]

SPOKEN: Expected = {
    "text": (
        [chunk(text("Hel")), chunk(text("lo"), finish="STOP")],
        meant(TextPiece("Hel"), TextPiece("lo")),
    ),
    "the reason in a chunk of its own": (
        [chunk(text("a")), frame({"candidates": [{"finishReason": "STOP", "index": 0}]})],
        meant(TextPiece("a")),
    ),
    "several parts in a chunk": (
        [chunk(text("a"), text("b"), finish="STOP")],
        meant(TextPiece("a"), TextPiece("b")),
    ),
    "several bytes a character": (
        [chunk(text("流式输出")), chunk(text("👩‍👩‍👧e\u0301")), chunk(text("\u2028\x85"), finish="STOP")],
        meant(TextPiece("流式输出"), TextPiece("👩‍👩‍👧e\u0301"), TextPiece("\u2028\x85")),
    ),
    "characters escaped in the JSON": (
        [chunk(text("?"), finish="STOP").replace(b'"?"', b'"\\ud83d\\ude00\\u003c"')],
        meant(TextPiece("😀<")),
    ),
    "line ends of LF": (
        [chunk(text("a")).replace(b"\r", b""), chunk(text("b"), finish="STOP").replace(b"\r", b"")],
        meant(TextPiece("a"), TextPiece("b")),
    ),
    "nothing said": ([chunk(finish="STOP")], meant()),
    "a reason of a later version": ([chunk(text("a"), finish="TIRED")], meant(TextPiece("a"))),
    "the reason again in a chunk without content": (
        [chunk(text("a"), finish="MAX_TOKENS"), frame({"candidates": [{"finishReason": "STOP"}]})],
        meant(TextPiece("a"), finish="length"),
    ),
    "an index left out": (
        [frame({"candidates": [{"content": {"parts": [text("a")]}, "finishReason": "STOP"}]})],
        meant(TextPiece("a")),
    ),
}

FINISH_REASONS: dict[FinishReason, str] = {
    "stop": "STOP",
    "length": "MAX_TOKENS",
    "content_filter": "SAFETY RECITATION BLOCKLIST PROHIBITED_CONTENT SPII IMAGE_SAFETY IMAGE_PROHIBITED_CONTENT"
    " IMAGE_RECITATION",
    "error": "LANGUAGE MALFORMED_FUNCTION_CALL UNEXPECTED_TOOL_CALL TOO_MANY_TOOL_CALLS MISSING_THOUGHT_SIGNATURE"
    " MALFORMED_RESPONSE NO_IMAGE IMAGE_OTHER OTHER",
}

REASONS: Expected = {
    f"stopped by {reason}": ([chunk(text("a"), finish=reason)], meant(TextPiece("a"), finish=finish))
    for finish, reasons in FINISH_REASONS.items()
    for reason in reasons.split()
}

USED: Expected = {
    "usage on every chunk, of which the new ones count": (
        [
            chunk(text("a"), usage={"promptTokenCount": 10, "totalTokenCount": 10}),
            chunk(text("b"), usage={"promptTokenCount": 10, "totalTokenCount": 10}),
            chunk(text("c"), usage={"promptTokenCount": 10, "candidatesTokenCount": 3}, finish="STOP"),
        ],
        [TextPiece("a"), UsagePiece(10, 0), TextPiece("b"), TextPiece("c"), UsagePiece(10, 3), STOP],
    ),
    "usage with thoughts, cache and tools": (
        [
            chunk(
                text("a"),
                finish="STOP",
                usage={
                    "promptTokenCount": 1000,
                    "toolUsePromptTokenCount": 50,
                    "candidatesTokenCount": 20,
                    "thoughtsTokenCount": 300,
                    "cachedContentTokenCount": 900,
                    "totalTokenCount": 1370,
                    "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 1000}],
                    "serviceTier": "standard",
                },
            )
        ],
        [TextPiece("a"), UsagePiece(1050, 320, reasoning_tokens=300, cached_tokens=900), STOP],
    ),
    "usage after the reason": (
        [chunk(text("a"), finish="STOP"), frame({"usageMetadata": {"promptTokenCount": 1, "candidatesTokenCount": 2}})],
        [TextPiece("a"), STOP, UsagePiece(1, 2)],
    ),
}

THOUGHT: Expected = {
    "thoughts before the text": (
        [chunk(thought("**Plan**\n")), chunk(thought("First.")), chunk(text("Yes."), finish="STOP")],
        meant(ReasoningPiece("**Plan**\n"), ReasoningPiece("First."), TextPiece("Yes.")),
    ),
    "a signature in a last part without text": (
        [chunk(text("Ye")), chunk(text("s.")), chunk(text("", **SIGNED), finish="STOP")],
        meant(TextPiece("Ye"), TextPiece("s."), outline=[Text([4]), Text([0, SIGNED])]),
    ),
    "a signature on a text, between others": (
        [chunk(text("流")), chunk(text("👍!", **SIGNED)), chunk(text("a")), chunk(text("b"), finish="STOP")],
        meant(
            TextPiece("流"),
            TextPiece("👍!"),
            TextPiece("a"),
            TextPiece("b"),
            outline=[Text([1]), Text([2, SIGNED]), Text([2])],
        ),
    ),
    "a part that is nothing but a signature": (
        [chunk(text("a")), chunk(SIGNED, finish="STOP")],
        meant(TextPiece("a"), outline=[Text([1]), Text([0, SIGNED])]),
    ),
    "a signature on a thought": (
        [chunk(thought("So")), chunk(thought("", **SIGNED)), chunk(text("a"), finish="STOP")],
        meant(
            ReasoningPiece("So"),
            TextPiece("a"),
            outline=[Block([{"text": "", "thought": True, **SIGNED}]), Text([1])],
        ),
    ),
}

CALLED: Expected = {
    "a call": (
        [chunk(text("Let me see.")), chunk(call("weather", {"city": "上海"}, "fc_1"), finish="STOP")],
        meant(TextPiece("Let me see."), ToolCallPiece(0, "fc_1", "weather", '{"city":"上海"}'), finish="tool_calls"),
    ),
    "a call, and the reason later": (
        [chunk(call("weather", {"city": "上海"}, "fc_1")), chunk(text(""), finish="STOP")],
        meant(ToolCallPiece(0, "fc_1", "weather", '{"city":"上海"}'), finish="tool_calls"),
    ),
    "calls side by side, the first one signed": (
        [
            chunk(call("weather", {"days": [1, 2.5, None]}, "fc_1", **SIGNED), call("time", {"zone": "UTC"}, "fc_2")),
            chunk(text(""), finish="STOP"),
        ],
        meant(
            ToolCallPiece(0, "fc_1", "weather", '{"days":[1,2.5,null]}'),
            ToolCallPiece(1, "fc_2", "time", '{"zone":"UTC"}'),
            finish="tool_calls",
            outline=[Call(["fc_1", SIGNED]), Call(["fc_2"])],
        ),
    ),
    "calls without ids": (
        [chunk(call("weather", {"city": "x"})), chunk(call("weather", {"city": "y"}), finish="STOP")],
        meant(
            ToolCallPiece(0, "call_Il0taoSYJ5Cez7IP_0", "weather", '{"city":"x"}'),
            ToolCallPiece(1, "call_Il0taoSYJ5Cez7IP_1", "weather", '{"city":"y"}'),
            finish="tool_calls",
        ),
    ),
    "a call in an answer without an id": (
        [frame({"candidates": [{"content": {"parts": [call("now", {})]}, "finishReason": "STOP"}]})],
        meant(ToolCallPiece(0, "call_0", "now", "{}"), finish="tool_calls"),
    ),
    "calls without arguments": (
        [chunk(call("now", call_id="fc_1"), call("here", {}, "fc_2"), finish="STOP")],
        meant(ToolCallPiece(0, "fc_1", "now", "{}"), ToolCallPiece(1, "fc_2", "here", "{}"), finish="tool_calls"),
    ),
    "thoughts, text and a call, in this order": (
        [
            chunk(thought("Hm.")),
            chunk(text("I look.")),
            chunk(call("weather", {"city": "x"}, "fc_1", **SIGNED), finish="STOP"),
        ],
        meant(
            ReasoningPiece("Hm."),
            TextPiece("I look."),
            ToolCallPiece(0, "fc_1", "weather", '{"city":"x"}'),
            finish="tool_calls",
            outline=[Text([7]), Call(["fc_1", SIGNED])],
        ),
    ),
    "a call that the length cut": (
        [chunk(call("weather", {"city": "x"}, "fc_1"), finish="MAX_TOKENS")],
        meant(ToolCallPiece(0, "fc_1", "weather", '{"city":"x"}'), finish="length"),
    ),
}

OVERLOADED = {"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}}
BARE_ERROR = (
    b'{\r\n  "error": {\r\n    "code": 503,\r\n    "message": "high demand",\r\n    "status": "UNAVAILABLE"\r\n  }\r\n}'
)

FAILED: dict[str, tuple[list[bytes], list[Piece], ProviderErrorCode]] = {
    "an error after text": ([chunk(text("a")), frame(OVERLOADED)], [TextPiece("a")], "upstream.overloaded"),
    "an error first": (
        [frame({"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED"}})],
        [],
        "upstream.rate_limit",
    ),
    "an error that is no event": ([chunk(text("a")), BARE_ERROR], [TextPiece("a")], "upstream.overloaded"),
    "an error that is no event, and a line end": (
        [chunk(text("a")), BARE_ERROR + b"\r\n"],
        [TextPiece("a")],
        "upstream.overloaded",
    ),
    "JSON after the text that is no error": (
        [chunk(text("a")), b'{\r\n  "answer": {}\r\n}\r\n'],
        [TextPiece("a")],
        "upstream.truncated",
    ),
    "a prompt that was blocked": (
        [
            frame(
                {
                    "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
                    "usageMetadata": {"promptTokenCount": 12, "totalTokenCount": 12},
                    **ENVELOPE,
                }
            )
        ],
        [UsagePiece(12, 0)],
        "upstream.content_policy",
    ),
    "an end without a reason": (
        [chunk(text("a")), chunk(text("b"))],
        [TextPiece("a"), TextPiece("b")],
        "upstream.truncated",
    ),
    "no JSON": ([chunk(text("a")), b"data: {nope\r\n\r\n"], [TextPiece("a")], "upstream.protocol"),
    "a text that is a number": ([chunk(text("a")), chunk({"text": 7})], [TextPiece("a")], "upstream.protocol"),
    "arguments that are a list": ([chunk(call("weather", [1]))], [], "upstream.protocol"),
    "a call without a name": ([chunk({"functionCall": {"args": {}}})], [], "upstream.protocol"),
    "half a surrogate pair": (
        [chunk(text("a")), chunk(text("?")).replace(b'"?"', b'"\\ud83d"')],
        [TextPiece("a")],
        "upstream.protocol",
    ),
}

CASES = [
    *(
        WireCase(f"gemini: {name}", WIRE, sent, pieces, noise=NOISE)
        for name, (sent, pieces) in (SPOKEN | REASONS | USED | THOUGHT | CALLED).items()
    ),
    *(
        WireCase(f"gemini: {name}", WIRE, sent, pieces, error=code, noise=NOISE)
        for name, (sent, pieces, code) in FAILED.items()
    ),
]
