"""The bytes of a simulated vendor's answer and when each is due, with the one fault that the plan wants in them."""

from __future__ import annotations

import functools
import gzip
import itertools
import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import msgspec

from engine.errors import ProviderErrorCode
from providers.chunked import LAST_CHUNK, chunked
from providers.encoders import MOCKED_VENDORS, Format, answer_facts, encoded_reads, raw_reads, speaks

from .plan import AnswerPlan, UpstreamFault, Wire
from .replies import Asked, reply_recording

Timed: TypeAlias = tuple[float, bytes]
"""Bytes, and how many seconds after the request they are due."""

SPLIT_SECONDS = 0.001
"""Between two reads that one send was cut into."""

DRIP_BYTES = 2000
"""What drips of an answer at most, so that no world is long in real time; the rest comes at once behind it."""

ENDLESS_BYTES = 65_536
ENDLESS_SECONDS = 0.01

_PING: dict[Wire, bytes] = {
    "openai": b": keep-alive\n\n",
    "anthropic": b'event: ping\ndata: {"type":"ping"}\n\n',
    "gemini": b'data: {"candidates":[{"content":{"parts":[{"text":""}],"role":"model"},"index":0}]}\n\n',
}
_CONTENT: dict[Wire, tuple[bytes, bytes]] = {
    "openai": (b'data: {"choices":[{"index":0,"delta":{"content":"', b'"},"finish_reason":null}]}\n\n'),
    "anthropic": (
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"',
        b'"}}\n\n',
    ),
    "gemini": (b'data: {"candidates":[{"content":{"parts":[{"text":"', b'"}],"role":"model"},"index":0}]}\n\n'),
}
"""An event with content, before and behind its text."""

_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 429: "Too Many Requests"}
_STATUSES: dict[UpstreamFault, tuple[int, ProviderErrorCode, str]] = {
    "status_400": (400, "upstream.invalid_request", "that is no request"),
    "status_401": (401, "upstream.auth", "Incorrect API key provided: {key}."),
    "status_429": (429, "upstream.rate_limit", "Rate limit reached"),
    "status_500": (500, "upstream.server", "The server had an error"),
    "status_503": (503, "upstream.overloaded", "The engine is overloaded"),
    "status_529": (529, "upstream.overloaded", "Overloaded"),
}


@dataclass(frozen=True)
class Script:
    """An answer as it goes over the connection.

    Attributes:
        sends: in their order; may be endless.
        content_ends: how many bytes must have been sent for each piece of content to be whole, rising.
        end: what becomes of the connection behind them; ``hang`` sends nothing more, for ever.
        answer_bytes: how many of the bytes are the answer, if more follow that nobody asked for.
    """

    sends: Iterable[Timed]
    content_ends: Sequence[int] = ()
    end: Literal["keep", "close", "reset", "hang"] = "keep"
    answer_bytes: int | None = None


def make_script(wire: Wire, plan: AnswerPlan, asked: Asked, answer_id: str, key: str) -> Script:
    """The answer to a request. ``answer_id`` is letters and digits; ``key`` is what the request came with."""
    at = plan.reply.first_after
    match plan.fault:
        case "no_headers":
            script = Script((), end="hang")
        case "close_before_headers":
            script = Script([(at, b"")], end="close")
        case "close_in_headers":
            head = _stream_head()
            script = Script([(at, head[: len(head) // 2])], end="close")
        case "not_sse":
            script = Script([(at, _whole(200, "text/html", b"<!doctype html><h1>Please sign in</h1>"))])
        case fault if fault in _STATUSES:
            script = Script([(at, _refusal(wire, plan, key))])
        case _:
            script = _stream_script(wire, plan, asked, answer_id)
    return _cut_into_reads(script, plan.reply.splits)


def _cut_into_reads(script: Script, splits: int) -> Script:
    if not splits:
        return script

    def cut() -> Iterator[Timed]:
        draw = random.Random(splits)
        for at, data in script.sends:
            count = draw.randint(0, min(3, max(0, len(data) - 1)))
            places = [0, *sorted(draw.sample(range(1, len(data)), count)), len(data)] if count else [0, len(data)]
            for number, (start, end) in enumerate(itertools.pairwise(places)):
                yield at + number * SPLIT_SECONDS, data[start:end]

    return replace(script, sends=cut())


def _refusal(wire: Wire, plan: AnswerPlan, key: str) -> bytes:
    assert plan.fault is not None
    status, code, message = _STATUSES[plan.fault]
    body = msgspec.json.encode(_format(wire).error_body(code, message.format(key=key)))
    headers = [f"Retry-After: {plan.seconds:g}"] if plan.fault == "status_429" else []
    return _whole(status, "application/json", body, *headers)


def _whole(status: int, kind: str, body: bytes, *headers: str) -> bytes:
    first = f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}"
    lines = [first, f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def _stream_head(*, close_delimited: bool = False, compressed: bool = False) -> bytes:
    framing = "Connection: close" if close_delimited else "Transfer-Encoding: chunked"
    lines = ["HTTP/1.1 200 OK", "Content-Type: text/event-stream; charset=utf-8", framing]
    lines += ["Content-Encoding: gzip"] if compressed else []
    return "\r\n".join([*lines, "", ""]).encode()


def _format(wire: Wire) -> Format:
    return MOCKED_VENDORS[wire].format


def _stream_script(wire: Wire, plan: AnswerPlan, asked: Asked, answer_id: str) -> Script:
    """A streamed answer: events are put in and left out first, then it is framed, then its bytes are held or cut."""
    parts = _whole_body(wire, plan, asked, answer_id)
    tail: Iterable[Timed] = ()
    behind = b""
    if plan.fault in _EVENT_FAULTS:
        parts, tail = _with_event_fault(wire, plan, parts)
    elif plan.fault == "no_end_mark":
        parts = _before(parts, _end_mark_at(wire, parts))
    elif plan.fault == "more_after_end":
        parts, behind = _with_more(wire, parts)
    compressed = plan.fault == "compressed"
    content_ends = [] if compressed else _content_ends(wire, parts)
    parts = [(at, gzip.compress(data, mtime=0)) for at, data in parts] if compressed else parts
    head = _stream_head(close_delimited=plan.close_delimited, compressed=compressed)
    return _framed(plan, head, parts, content_ends, tail, behind)


def _whole_body(wire: Wire, plan: AnswerPlan, asked: Asked, answer_id: str) -> list[Timed]:
    """The body as the vendor would send it, without HTTP's framing."""
    recording = reply_recording(plan.reply, asked)
    wanted = _format(wire)
    if recording.has_raw and speaks(recording.header.provider, wanted):
        reads = raw_reads(recording)
    else:
        pieces = [piece for read in recording.reads for piece in read.pieces]
        facts = answer_facts(pieces, answer_id=answer_id, model="simulated", **wanted.facts(asked.body))
        reads = encoded_reads(wanted.encoder(facts), recording)
    return [(at_ns / 1e9, data) for at_ns, data in reads]


_EVENT_FAULTS = ("pings_only", "error_event", "bad_json", "bad_utf8", "endless_line")


def _with_event_fault(wire: Wire, plan: AnswerPlan, parts: list[Timed]) -> tuple[list[Timed], Iterable[Timed]]:
    """The body with what is put between two events, and what follows it for ever."""
    wanted = round(plan.where * sum(len(data) for _, data in parts))
    ends = [0, *(end for end, _ in _events(parts))]
    place = ends[min(bisect_left(ends, wanted), len(ends) - 1)]
    before = _before(parts, place)
    at = before[-1][0] if before else parts[0][0]
    opening, closing = _CONTENT[wire]
    match plan.fault:
        case "pings_only":
            return before, ((at + plan.seconds * number, _PING[wire]) for number in itertools.count(1))
        case "endless_line":
            portions = ((at + ENDLESS_SECONDS * number, b"x" * ENDLESS_BYTES) for number in itertools.count(1))
            return [*before, (at, opening)], portions
        case "error_event":
            error = (
                _format(wire)
                .encoder(answer_facts((), answer_id="", model=""))
                .failure("upstream.overloaded", "Overloaded")
            )
            return [*before, (at, error)], ()
        case "bad_json":
            event = opening + b"half of it\n\n"
        case _:
            event = opening + b"\xff\xfe\xc3" + closing
    return [*before, (at, event), *_from(parts, place)], ()


def _with_more(wire: Wire, parts: list[Timed]) -> tuple[list[Timed], bytes]:
    """The body with more behind its end mark; where its end is the mark, what comes behind it in the connection."""
    if wire == "gemini":
        return parts, _whole(200, "application/json", b"{}")
    at, last = parts[-1]
    return [*parts[:-1], (at, last + b"more".join(_CONTENT[wire]))], b""


def _before(parts: Iterable[Timed], place: int) -> list[Timed]:
    """The first ``place`` bytes."""
    kept: list[Timed] = []
    for at, data in parts:
        if place <= 0:
            break
        kept.append((at, data[:place]))
        place -= len(data)
    return kept


def _from(parts: Iterable[Timed], place: int) -> list[Timed]:
    """All but the first ``place`` bytes."""
    kept: list[Timed] = []
    for at, data in parts:
        if place < len(data):
            kept.append((at, data[max(0, place) :]))
        place -= len(data)
    return kept


def _framed(
    plan: AnswerPlan,
    head: bytes,
    parts: Sequence[Timed],
    content_ends: Sequence[int],
    tail: Iterable[Timed],
    behind: bytes,
) -> Script:
    """The body behind its head, in chunks or up to the connection's end, its bytes held back or cut as planned."""
    chunk = _as_it_is if plan.close_delimited else chunked
    framed = [(at, chunk(data)) for at, data in parts if data]
    ends = [len(head) + place for place in _framed_places(parts, content_ends, chunk)]
    sends, end, held = _held_or_cut(plan, framed)
    last_chunk = b"" if plan.close_delimited else LAST_CHUNK
    if tail:
        held = ((at, chunk(data)) for at, data in tail)
    elif held:
        held = _dripping(held, plan.seconds, last_chunk)
    elif end == "keep":
        last = sends[-1][0] if sends else plan.reply.first_after
        sends.append((last, last_chunk + behind))
    end = "close" if end == "keep" and plan.close_delimited else end
    answer_bytes = len(head) + sum(len(data) for _, data in sends) - len(behind) if behind else None
    return Script(itertools.chain([(0.0, head)], sends, held), ends, end, answer_bytes)


def _held_or_cut(
    plan: AnswerPlan, framed: Sequence[Timed]
) -> tuple[list[Timed], Literal["keep", "close", "reset", "hang"], Iterable[Timed]]:
    """What is sent of the framed body, how it ends, and what is sent of it byte by byte, after its time."""
    if plan.fault not in ("cut", "reset", "stall", "stall_for_ever", "drip"):
        return list(framed), "keep", ()
    place = round(plan.where * sum(len(data) for _, data in framed))
    before, rest = _before(framed, place), _from(framed, place)
    match plan.fault:
        case "cut":
            return before, "close", ()
        case "reset":
            return before, "reset", ()
        case "stall":
            return [*before, *((at + plan.seconds, data) for at, data in rest)], "keep", ()
        case "stall_for_ever":
            return before, "hang", ()
    start = before[-1][0] if before else plan.reply.first_after
    return before, "keep", [(start, b"".join(data for _, data in rest))]


def _dripping(held: Iterable[Timed], seconds: float, last_chunk: bytes) -> Iterator[Timed]:
    for start, data in held:
        rest = data + last_chunk
        for number, byte in enumerate(rest[:DRIP_BYTES], 1):
            yield start + seconds * number, bytes([byte])
        if len(rest) > DRIP_BYTES:
            yield start + seconds * (DRIP_BYTES + 1), rest[DRIP_BYTES:]


def _as_it_is(data: bytes) -> bytes:
    return data


def _framed_places(parts: Iterable[Timed], places: Iterable[int], chunk: Any) -> Iterator[int]:
    """Places in the body as places behind the head."""
    waiting = iter(places)
    place = next(waiting, None)
    body = framed = 0
    for _, data in parts:
        start = chunk(data).find(data)
        while place is not None and place <= body + len(data):
            yield framed + start + place - body
            place = next(waiting, None)
        body += len(data)
        framed += len(chunk(data)) if data else 0


def _events(parts: Iterable[Timed]) -> Iterator[tuple[int, bytes]]:
    """The body's events, and where each ends. A blank line is nowhere but behind one: JSON has none."""
    place = 0
    *events, _ = b"".join(data for _, data in parts).split(b"\n\n")
    for event in events:
        place += len(event) + 2
        yield place, event


def _content_ends(wire: Wire, parts: Sequence[Timed]) -> list[int]:
    return [end for end, event in _events(parts) if _is_content(wire, event)]


@functools.lru_cache(4096)
def _is_content(wire: Wire, event: bytes) -> bool:
    """Whether it says something: text, reasoning, a part of a tool call."""
    try:
        data = msgspec.json.decode(event.partition(b"data: ")[2])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    match wire:
        case "openai":
            deltas = [choice["delta"] for choice in data.get("choices", ())]
            return any(delta.get(name) for delta in deltas for name in ("content", "reasoning_content", "tool_calls"))
        case "anthropic":
            delta = data.get("delta", {})
            says = any(delta.get(name) for name in ("text", "thinking", "partial_json"))
            return says or data.get("content_block", {}).get("type") == "tool_use"
        case "gemini":
            contents = [candidate.get("content", {}) for candidate in data.get("candidates", ())]
            parts = [part for content in contents for part in content.get("parts", ())]
            return any(part.get("text") or "functionCall" in part for part in parts)


def _end_mark_at(wire: Wire, parts: Sequence[Timed]) -> int:
    """Where the event begins that makes the answer's end a good one."""
    mark = {"openai": b"[DONE]", "anthropic": b'"message_stop"', "gemini": b'"finishReason"'}[wire]
    start = 0
    for end, event in _events(parts):
        if mark in event:
            return start
        start = end
    return start
