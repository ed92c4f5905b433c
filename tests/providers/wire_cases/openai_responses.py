"""Responses as OpenAI streams them, and as servers deviate that speak the same (wire-formats.md, section 2b)."""

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
from providers.openai_responses import ResponsesWire

from . import WireCase

WIRE = ResponsesWire()
STOP = FinishPiece("stop")
CALLS = FinishPiece("tool_calls")

USAGE = {
    "input_tokens": 31,
    "input_tokens_details": {"cached_tokens": 16, "cache_write_tokens": 0},
    "output_tokens": 12,
    "output_tokens_details": {"reasoning_tokens": 5},
    "total_tokens": 43,
}
SPENT = UsagePiece(31, 12, reasoning_tokens=5, cached_tokens=16)


def event(kind: str, **fields: Any) -> bytes:
    """One event as OpenAI writes it, its name on a line of its own and in the data."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), data(kind, fields))


def data(kind: str, fields: dict[str, Any]) -> bytes:
    """The JSON of one event."""
    return msgspec.json.encode({"type": kind, "sequence_number": 4} | fields)


def response(status: str, **fields: Any) -> bytes:
    """An event that carries the response as a whole."""
    whole = {"id": "resp_1", "object": "response", "created_at": 1763800000, "model": "gpt-5-mini", "status": status}
    rest: dict[str, Any] = {
        "error": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
        "parallel_tool_calls": True,
    }
    return event(f"response.{status}", response=whole | rest | fields)


def said(*texts: str, index: int = 0) -> list[bytes]:
    """A text delta for each text."""
    where = {"item_id": f"msg_{index}", "output_index": index, "content_index": 0, "logprobs": []}
    return [event("response.output_text.delta", **where, delta=text, obfuscation="dAr7") for text in texts]


def item(kind: str, index: int, when: str, **fields: Any) -> bytes:
    """An output item that begins (``added``) or ends (``done``)."""
    return event(
        f"response.output_item.{when}", output_index=index, item={"id": f"{kind}_{index}", "type": kind} | fields
    )


def message(*texts: str, index: int = 0, **fields: Any) -> list[bytes]:
    """A message from its beginning to its end."""
    part = {"type": "output_text", "text": "".join(texts), "annotations": [], "logprobs": []}
    where = {"item_id": f"msg_{index}", "output_index": index, "content_index": 0}
    return [
        item("message", index, "added", status="in_progress", role="assistant", content=[], **fields),
        event("response.content_part.added", **where, part={"type": "output_text", "text": "", "annotations": []}),
        *said(*texts, index=index),
        event("response.output_text.done", **where, text="".join(texts)),
        event("response.content_part.done", **where, part=part),
        item("message", index, "done", status="completed", role="assistant", content=[part], **fields),
    ]


def thought(*texts: str, index: int = 0, **fields: Any) -> list[bytes]:
    """A reasoning item with a summary of these fragments."""
    where = {"item_id": f"rs_{index}", "output_index": index, "summary_index": 0}
    summary = [{"type": "summary_text", "text": "".join(texts)}]
    return [
        item("reasoning", index, "added", summary=[], encrypted_content="gAA"),
        event("response.reasoning_summary_part.added", **where, part={"type": "summary_text", "text": ""}),
        *(event("response.reasoning_summary_text.delta", **where, delta=text) for text in texts),
        event("response.reasoning_summary_text.done", **where, text="".join(texts)),
        event("response.reasoning_summary_part.done", **where, part=summary[0]),
        item("reasoning", index, "done", summary=summary, **fields),
    ]


def begun(index: int, call_id: str, name: str) -> bytes:
    """The beginning of a function call."""
    fields = {"status": "in_progress", "arguments": "", "call_id": call_id, "name": name}
    return item("function_call", index, "added", **fields)


def argued(index: int, *fragments: str) -> list[bytes]:
    """The arguments of a function call in fragments."""
    where = {"item_id": f"fc_{index}", "output_index": index}
    return [event("response.function_call_arguments.delta", **where, delta=fragment) for fragment in fragments]


def argued_whole(index: int, arguments: str) -> bytes:
    """The arguments of a function call, whole."""
    return event(
        "response.function_call_arguments.done", item_id=f"fc_{index}", output_index=index, arguments=arguments
    )


def ended(index: int, call_id: str, name: str, arguments: str) -> bytes:
    """The end of a function call."""
    fields = {"status": "completed", "arguments": arguments, "call_id": call_id, "name": name}
    return item("function_call", index, "done", **fields)


def called(index: int, call_id: str, name: str, *fragments: str) -> list[bytes]:
    """A function call from its beginning to its end."""
    arguments = "".join(fragments)
    return [
        begun(index, call_id, name),
        *argued(index, *fragments),
        argued_whole(index, arguments),
        ended(index, call_id, name, arguments),
    ]


BEGIN = [response("created"), response("in_progress")]
END = [response("completed", usage=USAGE)]

NOISE = (
    b": keep-alive\n\n",
    b"event: keepalive\ndata: {}\n\n",
    response("created"),
    response("in_progress"),
    response("queued"),
    event("response.content_part.added", output_index=0, content_index=0, part={"type": "output_text", "text": ""}),
    event(
        "response.output_text.annotation.added", output_index=0, annotation={"type": "url_citation", "url": "https://a"}
    ),
    event("response.web_search_call.searching", output_index=97, item_id="ws_1"),
    event("response.audio.delta", delta="UklGRg=="),
    event("response.shell_call_output_content.delta", output_index=96, delta={"stdout": "a", "stderr": ""}),
    event("response.compaction.compacting", later_field=[{"deep": None}]),
    event("response.steer.accepted", item="an id, not an item", response=7),
    event("response.output_text.delta", output_index=0, delta=""),
    event("response.reasoning_summary_text.delta", output_index=0, delta=""),
    event("response.function_call_arguments.delta", output_index=95, delta='{"of a call": "that never began"}'),
    item("web_search_call", 97, "added", status="in_progress"),
    b"data: " + data("response.unheard_of", {"delta": 5}) + b"\n\n",
)

ENCRYPTED: dict[str, Any] = {"encrypted_content": "gAAAAABo数", "content": None, "status": None}


def kept(*spans: dict[str, Any]) -> ContinuationPiece:
    """What the next turn sends back."""
    return ContinuationPiece(list(spans))


def reasoning_span(index: int, text: str) -> dict[str, Any]:
    """A reasoning item that is kept whole."""
    whole = {"id": f"reasoning_{index}", "type": "reasoning", "summary": [{"type": "summary_text", "text": text}]}
    return {"kind": "block", "block": whole | {"encrypted_content": "gAAAAABo数"}}


def text_span(chars: int, **extra: str) -> dict[str, Any]:
    """The place of a text among the turn's items."""
    return {"kind": "text", "chars": chars, "extra": extra} if extra else {"kind": "text", "chars": chars}


def call_span(call_id: str, **extra: str) -> dict[str, Any]:
    """The place of a call among the turn's items."""
    return {"kind": "call", "call_id": call_id, "extra": extra}


TEXTS: dict[str, tuple[list[bytes], list[Piece]]] = {
    "a plain answer": ([*BEGIN, *message("Hel", "lo"), *END], [TextPiece("Hel"), TextPiece("lo"), SPENT, STOP]),
    "several bytes a character": (
        [*BEGIN, *message("你好、", "世界🌍", "👩‍👩‍👧 é\u2028\x7f"), *END],
        [TextPiece("你好、"), TextPiece("世界🌍"), TextPiece("👩‍👩‍👧 é\u2028\x7f"), SPENT, STOP],
    ),
    "line ends and quotes in the text": (
        [*said('a\r\n\n"data: x"\\', "\n\n"), *END],
        [TextPiece('a\r\n\n"data: x"\\'), TextPiece("\n\n"), SPENT, STOP],
    ),
    "a refusal": (
        [*BEGIN, event("response.refusal.delta", output_index=0, content_index=0, delta="I cannot."), *END],
        [TextPiece("I cannot."), SPENT, STOP],
    ),
    "no usage": ([*message("a"), response("completed")], [TextPiece("a"), STOP]),
    "usage without details": (
        [*message("a"), response("completed", usage={"input_tokens": 3, "output_tokens": None})],
        [TextPiece("a"), UsagePiece(3, 0), STOP],
    ),
    "nothing but the end": ([*BEGIN, *END], [SPENT, STOP]),
    "events without names": (
        [b"data: " + frame.partition(b"data: ")[2] for frame in [*BEGIN, *message("a"), *END]],
        [TextPiece("a"), SPENT, STOP],
    ),
    "text without an item around it": ([*said("a", index=3), *END], [TextPiece("a"), SPENT, STOP]),
}

REASONED: dict[str, tuple[list[bytes], list[Piece]]] = {
    "an encrypted reasoning item with a summary": (
        [*BEGIN, *thought("先想", "一想", **ENCRYPTED), *message("so", index=1), *END],
        [
            ReasoningPiece("先想"),
            ReasoningPiece("一想"),
            TextPiece("so"),
            kept(reasoning_span(0, "先想一想"), text_span(2, id="message_1")),
            SPENT,
            STOP,
        ],
    ),
    "reasoning in the clear": (
        [
            event("response.reasoning_text.delta", output_index=0, content_index=0, delta="hm"),
            item("reasoning", 0, "done", summary=[], content=[{"type": "reasoning_text", "text": "hm"}]),
            *message("so", index=1),
            *END,
        ],
        [
            ReasoningPiece("hm"),
            TextPiece("so"),
            kept(
                {
                    "kind": "block",
                    "block": {
                        "id": "reasoning_0",
                        "type": "reasoning",
                        "summary": [],
                        "content": [{"type": "reasoning_text", "text": "hm"}],
                    },
                },
                text_span(2, id="message_1"),
            ),
            SPENT,
            STOP,
        ],
    ),
    "reasoning that cannot go back": (
        [*thought("hm"), *message("so", index=1), *END],
        [ReasoningPiece("hm"), TextPiece("so"), SPENT, STOP],
    ),
    "reasoning, a comment, a call": (
        [
            *thought("hm", **ENCRYPTED),
            *message("I look", " it up.", index=1, phase="commentary"),
            *called(2, "call_a", "search", '{"q":', '"流"}'),
            *END,
        ],
        [
            ReasoningPiece("hm"),
            TextPiece("I look"),
            TextPiece(" it up."),
            ToolCallPiece(0, "call_a", "search"),
            ToolCallPiece(0, arguments_fragment='{"q":'),
            ToolCallPiece(0, arguments_fragment='"流"}'),
            kept(
                reasoning_span(0, "hm"),
                text_span(13, id="message_1", phase="commentary"),
                call_span("call_a", id="function_call_2"),
            ),
            SPENT,
            CALLS,
        ],
    ),
    "a comment and the answer, without reasoning": (
        [*message("One moment.", phase="commentary"), *message("42", index=1, phase="final_answer"), *END],
        [
            TextPiece("One moment."),
            TextPiece("42"),
            kept(text_span(11, phase="commentary"), text_span(2, phase="final_answer")),
            SPENT,
            STOP,
        ],
    ),
}

CALLED: dict[str, tuple[list[bytes], list[Piece]]] = {
    "one call": (
        [*BEGIN, *called(0, "call_a", "weather", '{"city":', '"上海"}'), *END],
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
            begun(1, "call_a", "weather"),
            begun(2, "call_b", "time"),
            *argued(1, '{"city":'),
            *argued(2, '{"zone"'),
            *argued(1, '"上海"}'),
            *argued(2, ':"Asia"}'),
            argued_whole(2, '{"zone":"Asia"}'),
            argued_whole(1, '{"city":"上海"}'),
            ended(1, "call_a", "weather", '{"city":"上海"}'),
            ended(2, "call_b", "time", '{"zone":"Asia"}'),
            *END,
        ],
        [
            ToolCallPiece(0, "call_a", "weather"),
            ToolCallPiece(1, "call_b", "time"),
            ToolCallPiece(0, arguments_fragment='{"city":'),
            ToolCallPiece(1, arguments_fragment='{"zone"'),
            ToolCallPiece(0, arguments_fragment='"上海"}'),
            ToolCallPiece(1, arguments_fragment=':"Asia"}'),
            SPENT,
            CALLS,
        ],
    ),
    "arguments without fragments": (
        [begun(0, "call_a", "f"), argued_whole(0, '{"x":1}'), ended(0, "call_a", "f", '{"x":1}'), *END],
        [ToolCallPiece(0, "call_a", "f"), ToolCallPiece(0, arguments_fragment='{"x":1}'), SPENT, CALLS],
    ),
    "arguments at the item's end only": (
        [begun(0, "call_a", "f"), ended(0, "call_a", "f", '{"x":1}'), *END],
        [ToolCallPiece(0, "call_a", "f"), ToolCallPiece(0, arguments_fragment='{"x":1}'), SPENT, CALLS],
    ),
    "an item's end without its beginning": (
        [ended(0, "call_a", "f", '{"x":1}'), *END],
        [ToolCallPiece(0, "call_a", "f"), ToolCallPiece(0, arguments_fragment='{"x":1}'), SPENT, CALLS],
    ),
    "empty arguments": (
        [*called(0, "call_a", "now", "{}"), *END],
        [ToolCallPiece(0, "call_a", "now"), ToolCallPiece(0, arguments_fragment="{}"), SPENT, CALLS],
    ),
    "no arguments at all": ([*called(0, "call_a", "now"), *END], [ToolCallPiece(0, "call_a", "now"), SPENT, CALLS]),
    "a tool of the vendor's before a call": (
        [
            item("web_search_call", 0, "done", action={"type": "search", "query": "q"}),
            *called(1, "call_a", "now", "{}"),
            *END,
        ],
        [
            ToolCallPiece(0, "call_a", "now"),
            ToolCallPiece(0, arguments_fragment="{}"),
            kept(
                {
                    "kind": "block",
                    "block": {
                        "id": "web_search_call_0",
                        "type": "web_search_call",
                        "action": {"type": "search", "query": "q"},
                    },
                },
                call_span("call_a", id="function_call_1"),
            ),
            SPENT,
            CALLS,
        ],
    ),
}

INCOMPLETE: dict[str, FinishReason] = {
    "max_output_tokens": "length",
    "max_messages": "length",
    "content_filter": "content_filter",
    "a reason of next year": "length",
}

FAILURES: dict[str, ProviderErrorCode] = {
    "server_error": "upstream.server",
    "rate_limit_exceeded": "upstream.rate_limit",
    "insufficient_quota": "upstream.rate_limit",
    "context_length_exceeded": "upstream.context_length",
    "invalid_prompt": "upstream.content_policy",
    "image_content_policy_violation": "upstream.content_policy",
    "image_too_large": "upstream.invalid_request",
    "an error of next year": "upstream.server",
}


def failed(code: str) -> bytes:
    """The end of a response that failed."""
    return response("failed", error={"code": code, "message": "what happened"})


CASES = [
    *(WireCase(f"openai_responses: {name}", WIRE, *case, noise=NOISE) for name, case in TEXTS.items()),
    *(WireCase(f"openai_responses: {name}", WIRE, *case, noise=NOISE) for name, case in REASONED.items()),
    *(WireCase(f"openai_responses: {name}", WIRE, *case, noise=NOISE) for name, case in CALLED.items()),
    *(
        WireCase(
            f"openai_responses: incomplete for {reason}",
            WIRE,
            [*BEGIN, *said("a"), response("incomplete", incomplete_details={"reason": reason}, usage=USAGE)],
            [TextPiece("a"), SPENT, FinishPiece(finish)],
            noise=NOISE,
        )
        for reason, finish in INCOMPLETE.items()
    ),
    *(
        WireCase(
            f"openai_responses: {code} after text", WIRE, [*said("a"), failed(code)], [TextPiece("a")], meant, NOISE
        )
        for code, meant in FAILURES.items()
    ),
    WireCase(
        "openai_responses: failed before anything was said, with usage",
        WIRE,
        [*BEGIN, response("failed", error={"code": "insufficient_quota", "message": "quota"}, usage=USAGE)],
        [SPENT],
        "upstream.rate_limit",
        NOISE,
    ),
    WireCase(
        "openai_responses: failed without an error",
        WIRE,
        [*said("a"), response("failed")],
        [TextPiece("a")],
        "upstream.server",
        NOISE,
    ),
    WireCase(
        "openai_responses: an error event after text",
        WIRE,
        [*said("a"), event("error", code="rate_limit_exceeded", message="slow down", param=None)],
        [TextPiece("a")],
        "upstream.rate_limit",
        NOISE,
    ),
    WireCase(
        "openai_responses: an error event with the error inside",
        WIRE,
        [event("error", error={"type": "invalid_request_error", "code": "context_length_exceeded", "message": "long"})],
        [],
        "upstream.context_length",
        NOISE,
    ),
    WireCase("openai_responses: cut off", WIRE, [*BEGIN, *said("a")], [TextPiece("a")], "upstream.truncated", NOISE),
]
