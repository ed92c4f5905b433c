"""Anthropic's Messages API: what a request says, what goes back of a turn, and what its errors mean."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.errors import ProviderError
from engine.pieces import ContinuationPiece, Piece, TextPiece, ToolCallPiece
from engine.provider import Message, NamedTool, ToolCall
from providers.anthropic import DEFAULT_MAX_TOKENS, AnthropicWire, messages_request_body
from providers.vendor_errors import error_from_response
from providers.wire import Endpoint, HttpProvider

from .conversations import CALLS, INLINE_PICTURE, NOW, PICTURE, SCHEMA, WEATHER, conversation, request
from .wire_cases.anthropic import THOUGHT, signed

KEY = "sk-ant-api03-secret"


def body_of(*messages: Message, **options: Any) -> Any:
    return msgspec.json.decode(messages_request_body(request(*messages, **options)))


def text(said: str) -> Any:
    return {"type": "text", "text": said}


def test_a_conversation_with_everything_in_it() -> None:
    outline = [{"kind": "block", "block": signed("Hm.")}, {"kind": "text", "chars": 7}]
    body = body_of(
        *conversation(outline, "anthropic"),
        tools=(WEATHER, NOW),
        tool_choice="auto",
        temperature=0.5,
        max_tokens=100,
        stop=("END",),
        response_schema=SCHEMA,
    )
    assert body == {
        "model": "m",
        "max_tokens": 100,
        "system": [text("Be brief."), text("Answer in German.")],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "source": {"type": "url", "url": PICTURE}},
                    {
                        "type": "image",
                        "source": {
                            "type": "base64",
                            "media_type": "image/gif",
                            "data": INLINE_PICTURE.partition(",")[2],
                        },
                    },
                    text("What sky is this?"),
                ],
            },
            {
                "role": "assistant",
                "content": [
                    signed("Hm."),
                    text("I look."),
                    {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "上海", "days": 1.0}},
                    {"type": "tool_use", "id": "call_2", "name": "now", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "call_1", "content": "18 °C"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_2",
                        "content": "timed out after 30 s",
                        "is_error": True,
                    },
                    text("And?"),
                ],
            },
            {"role": "assistant", "content": [text("Blau.")]},
            {"role": "user", "content": [text("Danke 👍")]},
        ],
        "tools": [
            {"name": "weather", "description": "The weather in a city.", "input_schema": SCHEMA},
            {"name": "now", "description": "The time.", "input_schema": {"type": "object", "properties": {}}},
        ],
        "tool_choice": {"type": "auto"},
        "temperature": 0.5,
        "stop_sequences": ["END"],
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "stream": True,
    }


def test_a_bare_request_says_no_more_than_it_must() -> None:
    assert body_of() == {
        "model": "m",
        "max_tokens": DEFAULT_MAX_TOKENS,
        "messages": [{"role": "user", "content": [text("hi")]}],
        "stream": True,
    }


def test_a_call_keeps_the_models_own_writing() -> None:
    assert b'"input":{"city": "\xe4\xb8\x8a\xe6\xb5\xb7", "days": 1.0}' in messages_request_body(
        request(Message("assistant", "", tool_calls=CALLS))
    )


@pytest.mark.parametrize(
    ("choice", "value"),
    [
        ("auto", {"type": "auto"}),
        ("none", {"type": "none"}),
        ("required", {"type": "any"}),
        (NamedTool("now"), {"type": "tool", "name": "now"}),
    ],
)
def test_the_choice_of_tool_in_their_words(choice: Any, value: Any) -> None:
    assert body_of(tools=(NOW,), tool_choice=choice)["tool_choice"] == value


def test_extra_is_joined_with_what_we_say_and_wins() -> None:
    extra = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}, "max_tokens": 9}
    body = body_of(response_schema=SCHEMA, extra=extra)
    assert body["thinking"] == {"type": "adaptive"}
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"}
    assert body["max_tokens"] == 9


@pytest.mark.parametrize(
    ("message", "content"),
    [
        (Message("assistant", "", tool_calls=CALLS[1:]), [{"type": "tool_use"}]),
        (Message("user", "", images=(PICTURE,)), [{"type": "image"}]),
        (Message("tool", "", tool_call_id="call_1"), [{"type": "tool_result"}]),
    ],
)
def test_no_block_of_text_is_empty(message: Message, content: Any) -> None:
    """Anthropic refuses it: "text content blocks must be non-empty"."""
    [turn] = body_of(message)["messages"]
    assert [{"type": block["type"]} for block in turn["content"]] == content
    assert "content" not in turn["content"][0]


def test_a_turn_of_nothing_is_left_out() -> None:
    assert [turn["role"] for turn in body_of(Message("user", "a"), Message("assistant", ""))["messages"]] == ["user"]


@pytest.mark.parametrize("arguments", ["{", "[1]", "null", '{"x": "\ud800"}', '{"x":' * 3000])
def test_arguments_that_are_no_object_go_back_under_a_key(arguments: str) -> None:
    message = Message("assistant", "", tool_calls=(ToolCall("call_1", "weather", arguments),))
    if "\ud800" in arguments:
        with pytest.raises(ProviderError):
            messages_request_body(request(message))
    else:
        [turn] = body_of(message)["messages"]
        assert turn["content"][0]["input"] == {"malformed_arguments": arguments}


def answered(pieces: list[Piece]) -> Message:
    """The turn that these pieces make, as it stands in the conversation."""
    calls = [piece for piece in pieces if isinstance(piece, ToolCallPiece) and piece.call_id]
    [state] = [piece.state for piece in pieces if isinstance(piece, ContinuationPiece)]
    return Message(
        "assistant",
        "".join(piece.text for piece in pieces if isinstance(piece, TextPiece)),
        tool_calls=tuple(ToolCall(str(call.call_id), str(call.name), "{}") for call in calls),
        continuation=msgspec.json.decode(msgspec.json.encode(state)),  # it may have been stored
        continued_by="anthropic",
    )


def test_a_turn_goes_back_in_the_order_it_came_in() -> None:
    _, pieces = THOUGHT["redacted thinking, text, thinking and a call, in this order"]
    [turn] = body_of(answered(pieces))["messages"]
    assert turn["content"] == [
        {"type": "redacted_thinking", "data": "EmwKAhgBEgy3va3pzix/"},
        text("流👍"),
        signed("hm"),
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
    ]


def test_the_continuation_of_another_provider_is_ignored() -> None:
    outline = [{"kind": "block", "block": signed("Hm.")}]
    [turn] = body_of(Message("assistant", "a", continuation=outline, continued_by="gemini"))["messages"]
    assert turn["content"] == [text("a")]


def test_the_request_goes_to_the_endpoint_with_the_key() -> None:
    vendor_request = AnthropicWire().request(request(), Endpoint("https://h", KEY, {"anthropic-beta": "b"}))
    assert vendor_request.url == "https://h/v1/messages"
    assert vendor_request.headers == {
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "b",
        "x-api-key": KEY,
    }
    assert vendor_request.content == messages_request_body(request())
    without_key = AnthropicWire().request(request(), Endpoint("https://h/v1"))
    assert without_key.url == "https://h/v1/messages"
    assert "x-api-key" not in without_key.headers


async def test_nothing_that_people_see_holds_the_key() -> None:
    provider = HttpProvider("anthropic", AnthropicWire(), Endpoint("https://h", KEY))
    vendor_request = AnthropicWire().request(request(), Endpoint("https://h", KEY))
    assert KEY not in f"{provider!r} {vendor_request!r} {vendor_request.url}"
    await provider.aclose()


@pytest.mark.parametrize(
    ("status", "kind", "message", "code"),
    [
        (400, "invalid_request_error", "max_tokens: 10000 > 4096, which is the maximum", "upstream.invalid_request"),
        (400, "invalid_request_error", "prompt is too long: 208656 tokens > 200000 maximum", "upstream.context_length"),
        (
            400,
            "invalid_request_error",
            "input length and `max_tokens` exceed context limit: 199000 + 8192 > 200000",
            "upstream.context_length",
        ),
        (
            400,
            "invalid_request_error",
            "Output blocked by content filtering policy",
            "upstream.content_policy",
        ),
        (401, "authentication_error", "invalid x-api-key", "upstream.auth"),
        (402, "billing_error", "Your credit balance is too low", "upstream.rate_limit"),
        (403, "permission_error", "not for you", "upstream.auth"),
        (404, "not_found_error", "model: claude-9", "upstream.invalid_request"),
        (413, "request_too_large", "Request exceeds the maximum size", "upstream.context_length"),
        (429, "rate_limit_error", "slow down", "upstream.rate_limit"),
        (500, "api_error", "Internal server error", "upstream.server"),
        (504, "timeout_error", "Request timed out", "upstream.server"),
        (529, "overloaded_error", "Overloaded", "upstream.overloaded"),
    ],
)
def test_an_error_body_has_a_code(status: int, kind: str, message: str, code: str) -> None:
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
    error = error_from_response(status, {"retry-after": "7"}, msgspec.json.encode(body))
    assert error.code == code
    assert error.retry_after == (None if code == "upstream.auth" else 7)
    assert (message in str(error)) == (code != "upstream.auth")
