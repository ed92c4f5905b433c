"""Chat v2 streams as Cohere's documentation and SDK show them (wire-formats.md, section 2f)."""

from __future__ import annotations

from collections.abc import Sequence
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
from providers.cohere import CohereWire

from . import WireCase

WIRE = CohereWire()


def event(kind: str, **fields: Any) -> bytes:
    """One event, named as its data is."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode({"type": kind} | fields))


def start() -> bytes:
    """The beginning of the message."""
    message = {"role": "assistant", "content": [], "tool_plan": "", "tool_calls": [], "citations": []}
    return event("message-start", id="c14c80c3-18eb-4519-9460-6c92edd8cfb4", delta={"message": message})


def content(kind: str, *parts: str, index: int = 0) -> list[bytes]:
    """A block of text or thinking, a delta for each part."""
    return [
        event("content-start", index=index, delta={"message": {"content": {"type": kind, kind: ""}}}),
        *(event("content-delta", index=index, delta={"message": {"content": {kind: part}}}) for part in parts),
        event("content-end", index=index),
    ]


def said(*texts: str, index: int = 0) -> list[bytes]:
    """A block of text."""
    return content("text", *texts, index=index)


def plan(*parts: str) -> list[bytes]:
    """The plan that comes before tool calls."""
    return [event("tool-plan-delta", delta={"message": {"tool_plan": part}}) for part in parts]


def call_start(index: int | None, call_id: str, name: str, arguments: str = "") -> bytes:
    """The beginning of a tool call."""
    function = {"name": name, "arguments": arguments}
    return tool_event("tool-call-start", index, {"id": call_id, "type": "function", "function": function})


def call_delta(index: int | None, arguments: str) -> bytes:
    """A fragment of a tool call's arguments."""
    return tool_event("tool-call-delta", index, {"function": {"arguments": arguments}})


def call_end(index: int | None) -> bytes:
    """The end of a tool call."""
    return event("tool-call-end") if index is None else event("tool-call-end", index=index)


def tool_event(kind: str, index: int | None, tool_calls: Any) -> bytes:
    """An event of a tool call; an index of None is left out."""
    place = {} if index is None else {"index": index}
    return event(kind, **place, delta={"message": {"tool_calls": tool_calls}})


def called(
    *fragments: str, index: int | None = 0, call_id: str = "weather_nsz5zm3w56q3", name: str = "weather"
) -> list[bytes]:
    """A whole tool call."""
    return [
        call_start(index, call_id, name),
        *(call_delta(index, fragment) for fragment in fragments),
        call_end(index),
    ]


USAGE = {
    "billed_units": {"input_tokens": 17, "output_tokens": 12},
    "tokens": {"input_tokens": 215, "output_tokens": 12.0},
}


def end(reason: str = "COMPLETE", **more: Any) -> bytes:
    """The end mark with its reason and the counts."""
    return event("message-end", id="c14c80c3", delta={"finish_reason": reason, "usage": USAGE} | more)


def frames(*parts: bytes | Sequence[bytes]) -> list[bytes]:
    """The parts, one after the other."""
    return [frame for part in parts for frame in ([part] if isinstance(part, bytes) else part)]


COUNTED = UsagePiece(215, 12)
STOP = FinishPiece("stop")


def answer(*parts: bytes | Sequence[bytes], reason: str = "COMPLETE") -> list[bytes]:
    """A whole answer: the parts between its beginning and its end."""
    return frames(start(), *parts, end(reason))


def meant(*pieces: Piece, finish: FinishReason = "stop", tool_plan: str = "") -> list[Piece]:
    """What ``answer`` means: the pieces, the counts, the plan that goes back, and the end."""
    back = [ContinuationPiece({"tool_plan": tool_plan})] if tool_plan else []
    return [*pieces, COUNTED, *back, FinishPiece(finish)]


NOISE = (
    start(),
    event("citation-start", index=0, delta={"message": {"citations": {"start": 0, "end": 2, "text": "so"}}}),
    event("citation-end", index=0),
    event("content-start", index=0, delta={"message": {"content": {"type": "text", "text": ""}}}),
    event("content-start", index=0, delta={"message": {"content": {"type": "thinking", "thinking": ""}}}),
    event("content-delta", index=0, delta={"message": {"content": {"text": "", "thinking": None}}}, logprobs=None),
    event("content-delta", index=0, delta={"message": None}),
    event("content-delta", delta=None),
    event("content-delta"),
    event("content-end", index=0),
    event("tool-plan-delta", delta={"message": {"tool_plan": ""}}),
    event("tool-plan-delta"),
    call_delta(98, '{"of a call": "that never began"}'),
    call_end(99),
    event("debug", prompt="<|START|>", delta=[1]),
    event("lumos-unknown", index="x", delta="y"),
    b"event: ping\ndata: not JSON at all\n\n",
    b'data: {"type":"keep-alive"}\n\n',
)

Expected: TypeAlias = dict[str, tuple[list[bytes], list[Piece]]]

SPOKEN: Expected = {
    "text": (answer(said("Hel", "lo")), meant(TextPiece("Hel"), TextPiece("lo"))),
    "several bytes a character": (
        answer(said("流式输出", "👩‍👩‍👧", "e\u0301", "\u2028\x85")),
        meant(TextPiece("流式输出"), TextPiece("👩‍👩‍👧"), TextPiece("e\u0301"), TextPiece("\u2028\x85")),
    ),
    "characters escaped in the JSON": (
        answer([frame.replace(b'"?"', b'"\\ud83d\\ude00\\n"') for frame in said("?")]),
        meant(TextPiece("😀\n")),
    ),
    "text in the beginning of its block": (
        answer(event("content-start", index=0, delta={"message": {"content": {"text": "Hi"}}}), said(" you")[1:]),
        meant(TextPiece("Hi"), TextPiece(" you")),
    ),
    "thinking, then text": (
        answer(content("thinking", "Let me", " see."), said("Yes.", index=1)),
        meant(ReasoningPiece("Let me"), ReasoningPiece(" see."), TextPiece("Yes.")),
    ),
    "text with citations": (
        answer(said("a")[:2], NOISE[1], NOISE[2], said("b")[1:]),
        meant(TextPiece("a"), TextPiece("b")),
    ),
    "events without names": (
        [frame.split(b"\n", 1)[1] for frame in answer(said("a"))],
        meant(TextPiece("a")),
    ),
    "nothing said": (answer(), meant()),
    "no usage": (
        frames(start(), said("a"), event("message-end", delta={"finish_reason": "COMPLETE", "usage": None})),
        [TextPiece("a"), STOP],
    ),
    "billed units alone": (
        frames(start(), said("a"), end(usage={"billed_units": {"input_tokens": 17, "output_tokens": 12.0}})),
        [TextPiece("a"), UsagePiece(17, 12), STOP],
    ),
    "usage with the cache": (
        frames(start(), said("a"), end(usage=USAGE | {"cached_tokens": 128.0})),
        [TextPiece("a"), UsagePiece(215, 12, cached_tokens=128), STOP],
    ),
    "a reason of a later version": (answer(said("a"), reason="TIRED"), meant(TextPiece("a"))),
    "an end without anything": (frames(start(), said("a"), event("message-end")), [TextPiece("a"), STOP]),
    "events after the end mark": (frames(answer(said("a")), said("b"), end()), meant(TextPiece("a"))),
}

FINISH_REASONS: dict[str, FinishReason] = {
    "COMPLETE": "stop",
    "STOP_SEQUENCE": "stop",
    "MAX_TOKENS": "length",
    "TOOL_CALL": "tool_calls",
}

REASONS: Expected = {
    f"stopped by {reason}": (answer(said("a"), reason=reason), meant(TextPiece("a"), finish=finish))
    for reason, finish in FINISH_REASONS.items()
}

WEATHER = ToolCallPiece(0, "weather_nsz5zm3w56q3", "weather")

CALLED: Expected = {
    "a plan and a call in fragments": (
        answer(plan("I will", " look."), called('{\n    "', "city", '": "上海"}'), reason="TOOL_CALL"),
        meant(
            ReasoningPiece("I will"),
            ReasoningPiece(" look."),
            WEATHER,
            ToolCallPiece(0, arguments_fragment='{\n    "'),
            ToolCallPiece(0, arguments_fragment="city"),
            ToolCallPiece(0, arguments_fragment='": "上海"}'),
            finish="tool_calls",
            tool_plan="I will look.",
        ),
    ),
    "two calls that interleave": (
        answer(
            [call_start(0, "weather_nsz5zm3w56q3", "weather"), call_delta(0, "{")],
            [call_start(1, "time_x2", "time"), call_delta(1, '{"zone":'), call_delta(0, "}"), call_end(0)],
            [call_delta(1, ' "UTC"}'), call_end(1)],
            reason="TOOL_CALL",
        ),
        meant(
            WEATHER,
            ToolCallPiece(0, arguments_fragment="{"),
            ToolCallPiece(1, "time_x2", "time"),
            ToolCallPiece(1, arguments_fragment='{"zone":'),
            ToolCallPiece(0, arguments_fragment="}"),
            ToolCallPiece(1, arguments_fragment=' "UTC"}'),
            finish="tool_calls",
        ),
    ),
    "indices that count content too": (
        answer(
            said("a"), called("{}", index=1), called("{}", index=4, call_id="time_x2", name="time"), reason="TOOL_CALL"
        ),
        meant(
            TextPiece("a"),
            WEATHER,
            ToolCallPiece(0, arguments_fragment="{}"),
            ToolCallPiece(1, "time_x2", "time"),
            ToolCallPiece(1, arguments_fragment="{}"),
            finish="tool_calls",
        ),
    ),
    "calls without an index": (
        answer(
            called("{", "}", index=None),
            called("{}", index=None, call_id="time_x2", name="time"),
            called("{}", index=None, call_id="here_x3", name="here"),
            reason="TOOL_CALL",
        ),
        meant(
            WEATHER,
            ToolCallPiece(0, arguments_fragment="{"),
            ToolCallPiece(0, arguments_fragment="}"),
            ToolCallPiece(1, "time_x2", "time"),
            ToolCallPiece(1, arguments_fragment="{}"),
            ToolCallPiece(2, "here_x3", "here"),
            ToolCallPiece(2, arguments_fragment="{}"),
            finish="tool_calls",
        ),
    ),
    "one index for all calls": (
        answer(called("{}"), called('{"zone":1}', call_id="time_x2", name="time"), reason="TOOL_CALL"),
        meant(
            WEATHER,
            ToolCallPiece(0, arguments_fragment="{}"),
            ToolCallPiece(1, "time_x2", "time"),
            ToolCallPiece(1, arguments_fragment='{"zone":1}'),
            finish="tool_calls",
        ),
    ),
    "calls without arguments": (
        answer(
            called(),
            called("", index=1, call_id="now_x2", name="now"),
            called("null", index=2, call_id="here_x3", name="here"),
            called("nu", "ll", index=3, call_id="who_x4", name="who"),
            reason="TOOL_CALL",
        ),
        meant(
            WEATHER,
            ToolCallPiece(0, arguments_fragment="{}"),
            ToolCallPiece(1, "now_x2", "now"),
            ToolCallPiece(1, arguments_fragment="{}"),
            ToolCallPiece(2, "here_x3", "here"),
            ToolCallPiece(2, arguments_fragment="{}"),
            ToolCallPiece(3, "who_x4", "who"),
            ToolCallPiece(3, arguments_fragment="{}"),
            finish="tool_calls",
        ),
    ),
    "a call that was never closed": (
        answer(called()[:1], reason="TOOL_CALL"),
        [WEATHER, COUNTED, ToolCallPiece(0, arguments_fragment="{}"), FinishPiece("tool_calls")],
    ),
    "arguments in the beginning of the call": (
        answer([call_start(0, "weather_nsz5zm3w56q3", "weather", '{"co'), call_delta(0, 'de":1}')], reason="TOOL_CALL"),
        meant(
            WEATHER,
            ToolCallPiece(0, arguments_fragment='{"co'),
            ToolCallPiece(0, arguments_fragment='de":1}'),
            finish="tool_calls",
        ),
    ),
}

FAILED: dict[str, tuple[list[bytes], list[Piece], ProviderErrorCode]] = {
    "an error in the end": (
        frames(start(), said("a"), end("ERROR", error="internal server error")),
        [TextPiece("a"), COUNTED],
        "upstream.server",
    ),
    "an error without its text": (
        frames(start(), said("a"), end("ERROR")),
        [TextPiece("a"), COUNTED],
        "upstream.server",
    ),
    "an end in time": (
        frames(start(), said("a"), event("message-end", delta={"finish_reason": "TIMEOUT"})),
        [TextPiece("a")],
        "upstream.server",
    ),
    "an error under a good reason": (
        frames(start(), said("a"), end(error="lost a worker")),
        [TextPiece("a"), COUNTED],
        "upstream.server",
    ),
    "an end without the end mark": (frames(start(), said("a")), [TextPiece("a")], "upstream.truncated"),
    "no JSON": (frames(start(), b"event: message-end\ndata: {nope\n\n"), [], "upstream.protocol"),
    "a text that is a number": (
        frames(start(), event("content-delta", index=0, delta={"message": {"content": {"text": 7}}})),
        [],
        "upstream.protocol",
    ),
    "half a surrogate pair": (
        frames(start(), [frame.replace(b'"?"', b'"\\ud83d"') for frame in said("?")[:2]]),
        [],
        "upstream.protocol",
    ),
}

CASES = [
    *(
        WireCase(f"cohere: {name}", WIRE, sent, pieces, noise=NOISE)
        for name, (sent, pieces) in (SPOKEN | REASONS | CALLED).items()
    ),
    *(
        WireCase(f"cohere: {name}", WIRE, sent, pieces, error=code, noise=NOISE)
        for name, (sent, pieces, code) in FAILED.items()
    ),
]
