"""What the formats that are not OpenAI's share: a turn in the order it came in, arguments, images, extras.

A message keeps a turn's text and its tool calls apart. Vendors that sign what their model thought want all of the turn
back in its order, so a decoder keeps an outline of it as ``ContinuationPiece.state`` - how many characters of text,
which call, and in between the vendor's own blocks whole - and ``turn_parts`` puts the turn together again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import msgspec

from engine.pieces import ContinuationPiece
from engine.provider import Message, ToolCall

MALFORMED_ARGUMENTS = "malformed_arguments"
"""The key under which arguments go back that are no JSON object, to vendors that take nothing but objects."""

_DATA_URL = re.compile(r"data:([\w.+/-]+);base64,([\w+/=\s-]*)", re.ASCII)


class TextSpan(msgspec.Struct, tag_field="kind", tag="text", omit_defaults=True):
    """The next ``chars`` code points of the turn's text; ``extra`` are the vendor's own fields of that part."""

    chars: int
    extra: dict[str, Any] = {}


class CallSpan(msgspec.Struct, tag_field="kind", tag="call", omit_defaults=True):
    """One of the turn's tool calls; ``extra`` are the vendor's own fields of that part."""

    call_id: str
    extra: dict[str, Any] = {}


class VendorBlock(msgspec.Struct, tag_field="kind", tag="block"):
    """A part of the turn that only the vendor reads, whole."""

    block: dict[str, Any]


Span: TypeAlias = TextSpan | CallSpan | VendorBlock


class TextPart(msgspec.Struct):
    """A part of a turn's text, with the vendor's own fields."""

    text: str
    extra: dict[str, Any]


class CallPart(msgspec.Struct):
    """A tool call of a turn, with the vendor's own fields."""

    call: ToolCall
    extra: dict[str, Any]


TurnPart: TypeAlias = TextPart | CallPart | VendorBlock


def outline_piece(spans: Sequence[Span]) -> ContinuationPiece | None:
    """What keeps the outline; None if the vendor wants nothing back but text and calls."""
    if any(isinstance(span, VendorBlock) or span.extra for span in spans):
        return ContinuationPiece(msgspec.to_builtins(spans))
    return None


def turn_parts(message: Message, provider: str) -> Iterator[TurnPart]:
    """An assistant turn in the order that ``provider`` sent it in.

    A turn of another provider, and what an outline does not mention, is text before calls. Text and calls are the
    message's own: a turn that was edited since goes out as it is now.
    """
    said = 0
    calls = {call.call_id: call for call in message.tool_calls}
    for span in _outline(message, provider):
        match span:
            case TextSpan(chars, extra):
                text, said = message.content[said : said + chars], said + chars
                if text or extra:
                    yield TextPart(text, extra)
            case CallSpan(call_id, extra) if call_id in calls:
                yield CallPart(calls.pop(call_id), extra)
            case VendorBlock():
                yield span
    if message.content[said:]:
        yield TextPart(message.content[said:], {})
    for call in calls.values():
        yield CallPart(call, {})


def _outline(message: Message, provider: str) -> list[Span]:
    if message.continued_by != provider:
        return []
    try:
        return msgspec.convert(message.continuation, list[Span])
    except msgspec.ValidationError:
        return []  # stored by another version of ours


def arguments_object(call: ToolCall) -> msgspec.Raw | dict[str, str]:
    """The call's arguments as a JSON object, in the model's own writing; what is none goes under a key of ours."""
    arguments = call.arguments or "{}"
    try:
        msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return {MALFORMED_ARGUMENTS: arguments}
    return msgspec.Raw(arguments.encode())


def data_url(url: str) -> tuple[str, str] | None:
    """Media type and base64 text of a ``data:`` URL; None if the URL is another one."""
    match = _DATA_URL.fullmatch(url)
    return match and (match[1], match[2])


def with_extra(body: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """The body with the vendor options on top: objects that both have are joined, anything else is replaced."""
    joined = {
        name: body[name] | value
        for name, value in extra.items()
        if isinstance(value, dict) and isinstance(body.get(name), dict)
    }
    return body | extra | joined
