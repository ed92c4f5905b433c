"""A turn put together again from its outline, also after it was edited or stored by another version."""

from __future__ import annotations

from typing import Any

import pytest

from engine.pieces import ContinuationPiece
from engine.provider import Message, ToolCall
from providers.conversation import (
    CallPart,
    CallSpan,
    Span,
    TextPart,
    TextSpan,
    TurnPart,
    VendorBlock,
    data_url,
    outline_piece,
    turn_parts,
    with_extra,
)

FIRST, SECOND = ToolCall("c1", "weather", "{}"), ToolCall("c2", "time", "{}")
BLOCK = VendorBlock({"type": "thinking"})
SPANS: list[Span] = [TextSpan(2), BLOCK, TextSpan(1, {"s": 1}), CallSpan("c1", {"s": 2}), CallSpan("c2")]


def parts(message: Message) -> list[TurnPart]:
    return list(turn_parts(message, "v"))


def turn(text: str, *calls: ToolCall, state: Any = None, by: str | None = "v") -> Message:
    """A turn whose outline is that of ``SPANS``, unless another one is given."""
    outline = outline_piece(SPANS)
    assert outline is not None
    return Message("assistant", text, tool_calls=calls, continuation=state or outline.state, continued_by=by)


def test_a_turn_is_whole_and_in_its_order() -> None:
    assert parts(turn("流👍!", FIRST, SECOND)) == [
        TextPart("流👍", {}),
        BLOCK,
        TextPart("!", {"s": 1}),
        CallPart(FIRST, {"s": 2}),
        CallPart(SECOND, {}),
    ]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            turn("abcde", FIRST, SECOND),
            [
                TextPart("ab", {}),
                BLOCK,
                TextPart("c", {"s": 1}),
                CallPart(FIRST, {"s": 2}),
                CallPart(SECOND, {}),
                TextPart("de", {}),
            ],
        ),
        (turn("a", SECOND), [TextPart("a", {}), BLOCK, TextPart("", {"s": 1}), CallPart(SECOND, {})]),
        (
            turn("abc", ToolCall("c3", "now", "{}")),
            [TextPart("ab", {}), BLOCK, TextPart("c", {"s": 1}), CallPart(ToolCall("c3", "now", "{}"), {})],
        ),
        (turn("", state=[{"kind": "text", "chars": 3}]), []),
    ],
    ids=["text grew", "text and a call went", "another call", "all went"],
)
def test_an_edited_turn_goes_out_as_it_is_now(message: Message, expected: list[TurnPart]) -> None:
    assert parts(message) == expected


@pytest.mark.parametrize(
    "message",
    [
        turn("ab", FIRST, by="w"),
        turn("ab", FIRST, by=None),
        turn("ab", FIRST, state=[{"kind": "later"}]),
        turn("ab", FIRST, state={"tool_plan": "x"}),
        turn("ab", FIRST, state=[{"kind": "text", "chars": "2"}]),
    ],
    ids=["of another provider", "of none", "a later version", "another shape", "a wrong type"],
)
def test_an_outline_that_is_not_ours_is_ignored(message: Message) -> None:
    assert parts(message) == [TextPart("ab", {}), CallPart(FIRST, {})]


def test_a_turn_of_text_and_calls_alone_needs_no_outline() -> None:
    assert outline_piece([TextSpan(2), CallSpan("c1")]) is None
    assert outline_piece([]) is None
    assert outline_piece([TextSpan(0, {"s": 1})]) == ContinuationPiece(
        [{"kind": "text", "chars": 0, "extra": {"s": 1}}]
    )


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("data:image/png;base64,iVBORw0=", ("image/png", "iVBORw0=")),
        ("data:image/svg+xml;base64,", ("image/svg+xml", "")),
        ("data:image/png,raw", None),
        ("data:;base64,AA==", None),
        ("https://h/data:image/png;base64,AA==", None),
    ],
)
def test_data_urls(url: str, expected: tuple[str, str] | None) -> None:
    assert data_url(url) == expected


def test_extra_joins_objects_one_level_deep_and_replaces_the_rest() -> None:
    body = {"config": {"a": 1, "deep": {"x": 1}}, "list": [1], "object": {}}
    extra = {"config": {"b": 2, "deep": {"y": 2}}, "list": [2], "object": 1, "new": {}}
    expected = {"config": {"a": 1, "b": 2, "deep": {"y": 2}}, "list": [2], "object": 1, "new": {}}
    assert with_extra(body, extra) == expected
    assert body["config"] == {"a": 1, "deep": {"x": 1}}
