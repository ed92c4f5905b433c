"""What a simulated model says to a request: its pieces in their timing, and the tools that it calls."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from engine.pieces import FinishPiece, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from providers.recording import RecordedRead, Recording, load, names
from providers.replay import step_name
from server.testing.replay import made_header

from .plan import Alphabet, ReplyPlan, Wire

INPUT_TOKENS = 10
"""What every request to a simulated model is said to hold."""

_UNITS: dict[Alphabet, tuple[str, ...]] = {
    "ascii": ("word", " and", " then", ", so"),
    "cjk": ("结构化", "并发、", "構造化", "並行。", "동시성"),
    "emoji": ("👩‍👩‍👧‍👦", "🇦🇺", "👍🏽", "e\u0301", "🏴‍☠️"),
    "markup": ("data: ", "\r\n\r\n", "\nevent: done\n\n", "\r", "id: 9\n\n", "\u2028\u2029", "<b>&amp;", "\ufeff: "),
    "json": ('{"a": "', "\\n\\u0041", '"}],', "\\ud83d", "\\\\\t", "/*", "null"),
}
"""What texts are made of; numbers between these make every place of a text another one."""

_MADE = made_header("simulated", "made by the simulation", "server/simulation/replies.py")


class Asked(msgspec.Struct, frozen=True):
    """What a request says that the answer depends on.

    Attributes:
        body: all of it.
        tools: the parameters' schema of each tool that may be called, by name.
        after_tools: whether it brings tools' results.
    """

    body: Mapping[str, Any]
    tools: Mapping[str, Any] = {}
    after_tools: bool = False


def read_request(wire: Wire, body: bytes) -> Asked:
    """The request's body, in that wire format."""
    decoded = msgspec.json.decode(body, type=dict[str, Any])
    match wire:
        case "openai":
            tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in decoded.get("tools", ())}
            after_tools = decoded["messages"][-1]["role"] == "tool"
            may_call = decoded.get("tool_choice") != "none"
        case "anthropic":
            tools = {tool["name"]: tool["input_schema"] for tool in decoded.get("tools", ())}
            after_tools = any(block.get("type") == "tool_result" for block in decoded["messages"][-1]["content"])
            may_call = decoded.get("tool_choice") != {"type": "none"}
        case "gemini":
            declared = [one for tool in decoded.get("tools", ()) for one in tool["functionDeclarations"]]
            tools = {one["name"]: one["parametersJsonSchema"] for one in declared}
            after_tools = any("functionResponse" in part for part in decoded["contents"][-1]["parts"])
            may_call = decoded.get("toolConfig", {}).get("functionCallingConfig", {}).get("mode") != "NONE"
    return Asked(decoded, tools if may_call else {}, after_tools)


@functools.lru_cache(256)
def reply_text(reply: ReplyPlan) -> str:
    """The text that the reply says; the same one for the same plan."""
    if reply.recording:
        return load(reply.recording).text
    units = _UNITS[reply.alphabet]
    parts: list[str] = []
    length = number = 0
    while length < reply.characters:
        parts.append(f"{units[number % len(units)]}{number}")
        length += len(parts[-1])
        number += 1
    return "".join(parts)[: reply.characters]


def reply_usage(reply: ReplyPlan) -> UsagePiece:
    """The usage that the reply tells of."""
    return UsagePiece(INPUT_TOKENS, max(1, len(reply_text(reply)) // 4))


def reply_recording(reply: ReplyPlan, asked: Asked) -> Recording:
    """The reply as a recording: tools are called only where the request offers them and brings no results."""
    callable_tools = {} if asked.after_tools else asked.tools
    if reply.recording:
        return _packaged(reply.recording, callable_tools, after_tools=asked.after_tools)
    calls = tuple((name, example_arguments(callable_tools[name])) for name in reply.tools if name in callable_tools)
    return _made(reply, calls)


def _packaged(name: str, tools: Mapping[str, Any], *, after_tools: bool) -> Recording:
    next_step = step_name(name, 1)
    recording = load(next_step if after_tools and next_step in names() else name)
    pieces = [piece for read in recording.reads for piece in read.pieces]
    if all(piece.name in tools for piece in pieces if isinstance(piece, ToolCallPiece) and piece.name is not None):
        return recording
    reads = (RecordedRead(read.at_ns, tuple(_without_calls(read.pieces))) for read in recording.reads if read.pieces)
    return Recording(recording.header, tuple(read for read in reads if read.pieces))


def _without_calls(pieces: Iterable[Piece]) -> Iterator[Piece]:
    for piece in pieces:
        match piece:
            case ToolCallPiece():
                continue
            case FinishPiece("tool_calls"):
                yield FinishPiece("stop")
            case _:
                yield piece


@functools.lru_cache(256)
def _made(reply: ReplyPlan, calls: tuple[tuple[str, str], ...]) -> Recording:
    said: list[Piece] = [ReasoningPiece(f"thought {number} ") for number in range(max(1, reply.pieces // 4))]
    said = said if reply.reasoning else []
    said += [TextPiece(part) for part in _cut(reply_text(reply), reply.pieces) if part]
    said += _call_pieces(calls)
    per_read = max(1, reply.pieces_per_read)
    portions = [tuple(said[at : at + per_read]) for at in range(0, len(said), per_read)] or [()]
    gap = reply.seconds / (len(portions) - 1) if len(portions) > 1 else 0.0
    times = [round((reply.first_after + gap * number) * 1e9) for number in range(len(portions))]
    end = (FinishPiece("tool_calls" if calls else "stop"), reply_usage(reply))
    portions[-1] += end
    return Recording(_MADE, tuple(map(RecordedRead, times, portions)))


def _cut(text: str, count: int) -> Iterator[str]:
    count = max(1, count)
    for number in range(count):
        yield text[len(text) * number // count : len(text) * (number + 1) // count]


def _call_pieces(calls: Sequence[tuple[str, str]]) -> Iterator[Piece]:
    """Each call's name with its first fragment, and its arguments in two."""
    for index, (name, arguments) in enumerate(calls):
        middle = len(arguments) // 2
        yield ToolCallPiece(index, f"call_{index}", name, arguments[:middle])
        yield ToolCallPiece(index, arguments_fragment=arguments[middle:])


def example_arguments(schema: Mapping[str, Any]) -> str:
    """Arguments that fit the schema of a tool's parameters: an example of each that is required."""
    properties = schema.get("properties", {})
    example = {name: _example(properties.get(name, {})) for name in schema.get("required", ())}
    return msgspec.json.encode(example).decode()


def _example(schema: Mapping[str, Any]) -> Any:
    if schema.get("enum"):
        return schema["enum"][0]
    match schema.get("type", "string"):
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
        case "array":
            return []
        case "object":
            return msgspec.json.decode(example_arguments(schema))
    return "6*7"
