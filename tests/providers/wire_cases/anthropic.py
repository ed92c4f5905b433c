"""Messages streams as Anthropic's documentation and SDK show them (wire-formats.md, section 2c)."""

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
from providers.anthropic import AnthropicWire

from . import WireCase

WIRE = AnthropicWire()
SIGNATURE = "EqQBCgIYAhIM1gbcDa9GJwZA2b3hGgxBdjrkzLoky3dl1pkiMOYds+/="


def event(kind: str, **fields: Any) -> bytes:
    """One event, named as its data is."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode({"type": kind} | fields))


def start(**usage: Any) -> bytes:
    """The beginning of the message, with these counts."""
    message = {"id": "msg_01K2JbSUMYhez5RHoK9ZCj9U", "type": "message", "role": "assistant", "model": "claude-sonnet-5"}
    empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
    counts = {"input_tokens": 25, "output_tokens": 1} | usage
    return event("message_start", message={**message, **empty, "usage": counts})


def block(index: int, kind: str, *deltas: Any, **fields: Any) -> list[bytes]:
    """A whole content block."""
    return [open_block(index, kind, **fields), *(delta(index, **each) for each in deltas), close_block(index)]


def open_block(index: int, kind: str, **fields: Any) -> bytes:
    """The beginning of a content block."""
    return event("content_block_start", index=index, content_block={"type": kind} | fields)


def delta(index: int, **fields: Any) -> bytes:
    """The next part of a content block."""
    return event("content_block_delta", index=index, delta=fields)


def close_block(index: int) -> bytes:
    """The end of a content block."""
    return event("content_block_stop", index=index)


def text(said: str) -> Any:
    """A delta of text."""
    return {"type": "text_delta", "text": said}


def thinking(thought: str) -> Any:
    """A delta of thinking."""
    return {"type": "thinking_delta", "thinking": thought}


def signature() -> Any:
    """The delta that signs a thinking block."""
    return {"type": "signature_delta", "signature": SIGNATURE}


def arguments(partial_json: str) -> Any:
    """A delta of a tool call's arguments."""
    return {"type": "input_json_delta", "partial_json": partial_json}


def said(*texts: str, index: int = 0) -> list[bytes]:
    """A block of text, a delta for each."""
    return block(index, "text", *map(text, texts), text="")


def thought(*deltas: Any, index: int = 0) -> list[bytes]:
    """A block of thinking."""
    return block(index, "thinking", *deltas, thinking="", signature="")


def called(*partial_json: str, index: int = 0, call_id: str = "toolu_1", name: str = "weather") -> list[bytes]:
    """A block that calls a tool."""
    return block(index, "tool_use", *map(arguments, partial_json), id=call_id, name=name, input={})


def end(stop_reason: str | None = "end_turn", **usage: Any) -> list[bytes]:
    """The reason, the final count, and the end mark."""
    reason = {"stop_reason": stop_reason, "stop_sequence": None}
    return [event("message_delta", delta=reason, usage={"output_tokens": 15} | usage), event("message_stop")]


def frames(*parts: bytes | Sequence[bytes]) -> list[bytes]:
    """The parts, one after the other."""
    return [frame for part in parts for frame in ([part] if isinstance(part, bytes) else part)]


def answer(*parts: bytes | Sequence[bytes], reason: str = "end_turn") -> list[bytes]:
    """A whole answer: the parts between its beginning and its end."""
    return frames(start(), *parts, end(reason))


STARTED = UsagePiece(25, 1)
COUNTED = UsagePiece(25, 15)
STOP = FinishPiece("stop")
CALLS = FinishPiece("tool_calls")
PING = event("ping")


def meant(*pieces: Piece, finish: FinishReason = "stop", outline: Sequence[Any] = ()) -> list[Piece]:
    """What ``answer`` means: the counts around the pieces, the outline that goes back, and the end."""
    back = [ContinuationPiece([SPANS[type(span)](span) for span in outline])] if outline else []
    return [STARTED, *pieces, COUNTED, *back, FinishPiece(finish)]


SPANS: dict[type, Callable[[Any], Any]] = {
    dict: lambda whole_block: {"kind": "block", "block": whole_block},
    int: lambda chars: {"kind": "text", "chars": chars},
    str: lambda call_id: {"kind": "call", "call_id": call_id},
}


def signed(thinking_text: str) -> Any:
    """A thinking block as it goes back."""
    return {"type": "thinking", "thinking": thinking_text, "signature": SIGNATURE}


NOISE = (
    PING,
    b'event: ping\ndata: {"type": "ping"}\n\n',
    b"event: ping\ndata: not JSON at all\n\n",
    b'data: {"type": "ping"}\n\n',
    event("message_delta", delta={"stop_reason": None, "stop_sequence": None}),
    event("message_delta", delta={}, usage=None),
    event("content_block_delta", index=97, delta=text("of a block that never began")),
    event("content_block_stop", index=98),
    event("message_paused", delta=[1, 2], index="x", usage="none"),
    open_block(99, "server_tool_use", id="srvtoolu_1", name="web_search", input={}),
    delta(99, **arguments('{"query": "weather"}')),
    open_block(96, "web_search_tool_result", tool_use_id="srvtoolu_1", content=[{"type": "web_search_result"}]),
    open_block(95, "lumos_unknown", data={"x": 1}, input="free text"),
    open_block(94, "text", text="", citations=None),
    delta(94, type="citations_delta", citation={"type": "char_location", "cited_text": "so"}),
    delta(94, type="lumos_delta", text="of an unknown kind"),
    delta(94, type="text_delta", text=""),
    delta(94, type="thinking_delta", thinking=""),
    close_block(94),
)

Expected: TypeAlias = dict[str, tuple[list[bytes], list[Piece]]]

SPOKEN: Expected = {
    "text": (
        answer(open_block(0, "text", text=""), PING, delta(0, **text("Hel")), delta(0, **text("lo")), close_block(0)),
        meant(TextPiece("Hel"), TextPiece("lo")),
    ),
    "several bytes a character": (
        answer(said("流式输出", "👩‍👩‍👧", "e\u0301", "\u2028\x85")),
        meant(TextPiece("流式输出"), TextPiece("👩‍👩‍👧"), TextPiece("e\u0301"), TextPiece("\u2028\x85")),
    ),
    "characters escaped in the JSON": (
        answer(said("?")[0], said("?")[1].replace(b'"?"', b'"\\ud83d\\ude00\\n"')),
        meant(TextPiece("😀\n")),
    ),
    "two blocks of text": (
        answer(said("One.", index=0), said("Two.", index=1)),
        meant(TextPiece("One."), TextPiece("Two.")),
    ),
    "text in the beginning of its block": (
        answer(block(0, "text", text(" there"), text="Hi")),
        meant(TextPiece("Hi"), TextPiece(" there")),
    ),
    "events without names": (
        [frame.split(b"\n", 1)[1] for frame in answer(said("a"))],
        meant(TextPiece("a")),
    ),
    "nothing said": (answer(), meant()),
    "no reason at all": (frames(start(), said("a"), event("message_stop")), [STARTED, TextPiece("a"), STOP]),
    "a reason of a later version": (answer(said("a"), reason="compaction"), meant(TextPiece("a"))),
    "a reason in one event, the counts in the next": (
        frames(start(), said("a"), event("message_delta", delta={"stop_reason": "max_tokens"}), end(None)),
        meant(TextPiece("a"), finish="length"),
    ),
    "blocks of a server's tool between the text": (
        answer(
            said("I look.", index=0),
            block(1, "server_tool_use", arguments('{"query":"x"}'), id="srvtoolu_1", name="web_search", input={}),
            block(2, "web_search_tool_result", tool_use_id="srvtoolu_1", content=[{"type": "web_search_result"}]),
            said("Found.", index=3),
        ),
        meant(TextPiece("I look."), TextPiece("Found.")),
    ),
    "events after the end mark": (frames(answer(said("a")), said("b"), end()), meant(TextPiece("a"))),
}

STOP_REASONS: dict[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "pause_turn": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}

REASONS: Expected = {
    f"stopped by {reason}": (answer(said("a"), reason=reason), meant(TextPiece("a"), finish=finish))
    for reason, finish in STOP_REASONS.items()
}

USED: Expected = {
    "usage with cache and thinking": (
        frames(
            start(
                input_tokens=5, cache_creation_input_tokens=200, cache_read_input_tokens=1000, service_tier="standard"
            ),
            said("a"),
            end(output_tokens=40, output_tokens_details={"thinking_tokens": 30}, server_tool_use=None),
        ),
        [
            UsagePiece(1205, 1, cached_tokens=1000),
            TextPiece("a"),
            UsagePiece(1205, 40, reasoning_tokens=30, cached_tokens=1000),
            STOP,
        ],
    ),
    "input counted again at the end": (
        frames(start(), said("a"), end(input_tokens=30, cache_read_input_tokens=0)),
        [STARTED, TextPiece("a"), UsagePiece(30, 15, cached_tokens=0), STOP],
    ),
    "no usage": (
        frames(event("message_start", message={"id": "msg_1", "usage": None}), said("a"), event("message_stop")),
        [TextPiece("a"), STOP],
    ),
}

THOUGHT: Expected = {
    "thinking with its signature": (
        answer(thought(thinking("Let me"), thinking(" see."), signature()), said("Yes.", index=1)),
        meant(
            ReasoningPiece("Let me"),
            ReasoningPiece(" see."),
            TextPiece("Yes."),
            outline=[signed("Let me see."), 4],
        ),
    ),
    "thinking that is not shown": (
        answer(thought(signature()), said("Yes.", index=1)),
        meant(TextPiece("Yes."), outline=[signed(""), 4]),
    ),
    "thinking that was cut before its signature": (
        answer(thought(thinking("So")), reason="max_tokens"),
        meant(ReasoningPiece("So"), finish="length"),
    ),
    "redacted thinking, text, thinking and a call, in this order": (
        answer(
            block(0, "redacted_thinking", data="EmwKAhgBEgy3va3pzix/"),
            said("流👍", index=1),
            thought(thinking("hm"), signature(), index=2),
            called("{}", index=3),
            reason="tool_use",
        ),
        meant(
            TextPiece("流👍"),
            ReasoningPiece("hm"),
            ToolCallPiece(0, "toolu_1", "weather"),
            ToolCallPiece(0, arguments_fragment="{}"),
            finish="tool_calls",
            outline=[{"type": "redacted_thinking", "data": "EmwKAhgBEgy3va3pzix/"}, 2, signed("hm"), "toolu_1"],
        ),
    ),
}

CALLED: Expected = {
    "a call in fragments": (
        answer(said("Let me see."), called("", '{"city": "', '上海"}', index=1), reason="tool_use"),
        meant(
            TextPiece("Let me see."),
            ToolCallPiece(0, "toolu_1", "weather"),
            ToolCallPiece(0, arguments_fragment='{"city": "'),
            ToolCallPiece(0, arguments_fragment='上海"}'),
            finish="tool_calls",
        ),
    ),
    "two calls that interleave": (
        answer(
            called("{", index=0)[:2],
            called('{"zone":', index=1, call_id="toolu_2", name="time")[:2],
            [delta(0, **arguments("}")), close_block(0)],
            [delta(1, **arguments(' "UTC"}')), close_block(1)],
            reason="tool_use",
        ),
        meant(
            ToolCallPiece(0, "toolu_1", "weather"),
            ToolCallPiece(0, arguments_fragment="{"),
            ToolCallPiece(1, "toolu_2", "time"),
            ToolCallPiece(1, arguments_fragment='{"zone":'),
            ToolCallPiece(0, arguments_fragment="}"),
            ToolCallPiece(1, arguments_fragment=' "UTC"}'),
            finish="tool_calls",
        ),
    ),
    "calls without arguments": (
        answer(called(), called("", index=1, call_id="toolu_2", name="now"), reason="tool_use"),
        meant(
            ToolCallPiece(0, "toolu_1", "weather"),
            ToolCallPiece(0, arguments_fragment="{}"),
            ToolCallPiece(1, "toolu_2", "now"),
            ToolCallPiece(1, arguments_fragment="{}"),
            finish="tool_calls",
        ),
    ),
    "a call that was never closed": (
        answer(called()[:1], reason="tool_use"),
        [STARTED, ToolCallPiece(0, "toolu_1", "weather"), COUNTED, ToolCallPiece(0, arguments_fragment="{}"), CALLS],
    ),
    "a call that came whole": (
        answer(block(0, "tool_use", id="toolu_1", name="weather", input={"city": "上海"}), reason="tool_use"),
        meant(
            ToolCallPiece(0, "toolu_1", "weather"),
            ToolCallPiece(0, arguments_fragment='{"city":"上海"}'),
            finish="tool_calls",
        ),
    ),
    "a call without a reason": (
        frames(start(), called("{}"), event("message_stop")),
        [STARTED, ToolCallPiece(0, "toolu_1", "weather"), ToolCallPiece(0, arguments_fragment="{}"), CALLS],
    ),
    "a call after one of the server's own": (
        answer(
            block(0, "server_tool_use", arguments("{}"), id="srvtoolu_1", name="web_search", input={}),
            called("{}", index=1),
            reason="tool_use",
        ),
        meant(ToolCallPiece(0, "toolu_1", "weather"), ToolCallPiece(0, arguments_fragment="{}"), finish="tool_calls"),
    ),
}


def failed(kind: str, message: str = "Overloaded") -> bytes:
    """The event that ends a stream in an error."""
    return event("error", error={"type": kind, "message": message}, request_id="req_011CSHoEeqs5C35K2UUqR7Fy")


BEGUN = frames(start(), said("a")[:2])

FAILED: dict[str, tuple[list[bytes], list[Piece], ProviderErrorCode]] = {
    "an error after text": (
        frames(BEGUN, failed("overloaded_error")),
        [STARTED, TextPiece("a")],
        "upstream.overloaded",
    ),
    "an error first": ([failed("rate_limit_error", "slow down")], [], "upstream.rate_limit"),
    "an error of the server": ([start(), failed("api_error", "Internal server error")], [STARTED], "upstream.server"),
    "an error in time": ([start(), failed("timeout_error", "Request timed out")], [STARTED], "upstream.server"),
    "an error without its object": ([start(), event("error")], [STARTED], "upstream.server"),
    "no JSON": ([start(), b"event: message_stop\ndata: {nope\n\n"], [STARTED], "upstream.protocol"),
    "a text that is a number": (
        [start(), open_block(0, "text", text=""), delta(0, type="text_delta", text=7)],
        [STARTED],
        "upstream.protocol",
    ),
    "half a surrogate pair": (
        [start(), said("?")[0], said("?")[1].replace(b'"?"', b'"\\ud83d"')],
        [STARTED],
        "upstream.protocol",
    ),
    "an end without the end mark": (
        frames(start(), said("a"), end()[:1]),
        [STARTED, TextPiece("a"), COUNTED],
        "upstream.truncated",
    ),
}

CASES = [
    *(
        WireCase(f"anthropic: {name}", WIRE, sent, pieces, noise=NOISE)
        for name, (sent, pieces) in (SPOKEN | REASONS | USED | THOUGHT | CALLED).items()
    ),
    *(
        WireCase(f"anthropic: {name}", WIRE, sent, pieces, error=code, noise=NOISE)
        for name, (sent, pieces, code) in FAILED.items()
    ),
]
