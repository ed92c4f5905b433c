"""OpenAI's Responses API: what a request says, what goes back of a turn, and what its errors mean."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.errors import ProviderError
from engine.pieces import ContinuationPiece, Piece, TextPiece, ToolCallPiece
from engine.provider import Message, NamedTool, ToolCall
from providers.openai_responses import NAME, ResponsesWire, responses_request_body
from providers.vendor_errors import error_from_response
from providers.wire import Endpoint, HttpProvider

from .conversations import INLINE_PICTURE, NOW, PICTURE, SCHEMA, WEATHER, conversation, request
from .wire_cases.openai_responses import REASONED

KEY = "sk-proj-secret1234"
RESTED = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAA"}


def body_of(*messages: Message, **options: Any) -> Any:
    return msgspec.json.decode(responses_request_body(request(*messages, **options)))


def test_a_conversation_with_everything_in_it() -> None:
    outline = [
        {"kind": "block", "block": RESTED},
        {"kind": "text", "chars": 7, "extra": {"id": "msg_1", "phase": "commentary"}},
        {"kind": "call", "call_id": "call_1", "extra": {"id": "fc_1"}},
    ]
    body = body_of(
        *conversation(outline, NAME),
        tools=(WEATHER, NOW),
        tool_choice="auto",
        temperature=0.5,
        max_tokens=100,
        response_schema=SCHEMA,
    )
    assert body == {
        "model": "m",
        "instructions": "Be brief.",
        "input": [
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "What sky is this?"},
                    {"type": "input_image", "image_url": PICTURE, "detail": "auto"},
                    {"type": "input_image", "image_url": INLINE_PICTURE, "detail": "auto"},
                ],
            },
            RESTED,
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "phase": "commentary",
                "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
            },
            {
                "type": "function_call",
                "id": "fc_1",
                "call_id": "call_1",
                "name": "weather",
                "arguments": '{"city": "上海", "days": 1.0}',
            },
            {"type": "function_call", "call_id": "call_2", "name": "now", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "18 °C"},
            {"type": "function_call_output", "call_id": "call_2", "output": "timed out after 30 s"},
            {"role": "system", "content": "Answer in German."},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Blau."},
            {"role": "user", "content": "Danke 👍"},
        ],
        "tools": [
            {
                "type": "function",
                "name": "weather",
                "description": "The weather in a city.",
                "parameters": SCHEMA,
                "strict": False,
            },
            {
                "type": "function",
                "name": "now",
                "description": "The time.",
                "parameters": {"type": "object", "properties": {}},
                "strict": False,
            },
        ],
        "tool_choice": "auto",
        "temperature": 0.5,
        "max_output_tokens": 100,
        "text": {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}},
        "include": ["reasoning.encrypted_content"],
        "stream": True,
        "store": False,
    }


def test_a_bare_request_says_no_more_than_it_must() -> None:
    assert body_of() == {
        "model": "m",
        "input": [{"role": "user", "content": "hi"}],
        "include": ["reasoning.encrypted_content"],
        "stream": True,
        "store": False,
    }


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        ("gpt-4o-mini", False),
        ("gpt-4.1-2025-04-14", False),
        ("chatgpt-4o-latest", False),
        ("ft:gpt-4o-mini-2024-07-18:acme::x", False),
        ("gpt-5-chat-latest", False),
        ("gpt-5.3-chat-latest", False),
        ("gpt-5", True),
        ("gpt-5.4-mini", True),
        ("gpt-6-sol", True),
        ("o4-mini", True),
        ("of-another-vendor", True),
    ],
)
def test_encrypted_reasoning_is_asked_only_of_models_that_reason(model: str, reasons: bool) -> None:
    body = msgspec.json.decode(responses_request_body(msgspec.structs.replace(request(), model=model)))
    assert ("include" in body) == reasons


@pytest.mark.parametrize(
    ("choice", "value"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        (NamedTool("now"), {"type": "function", "name": "now"}),
    ],
)
def test_the_choice_of_tool_in_their_words(choice: Any, value: Any) -> None:
    assert body_of(tools=(NOW,), tool_choice=choice)["tool_choice"] == value


def test_extra_is_joined_with_what_we_say_and_wins() -> None:
    extra = {"reasoning": {"effort": "low", "summary": "auto"}, "text": {"verbosity": "low"}, "include": []}
    body = body_of(response_schema=SCHEMA, extra=extra)
    assert body["reasoning"] == {"effort": "low", "summary": "auto"}
    assert body["text"].keys() == {"format", "verbosity"}
    assert body["include"] == []


def test_stop_sequences_are_refused_and_not_dropped() -> None:
    with pytest.raises(ProviderError, match="no stop sequences") as caught:
        body_of(stop=("END",))
    assert caught.value.code == "upstream.invalid_request"


def answered(pieces: list[Piece]) -> Message:
    """The turn that these pieces make, as it stands in the conversation."""
    calls = [piece for piece in pieces if isinstance(piece, ToolCallPiece) and piece.call_id]
    [state] = [piece.state for piece in pieces if isinstance(piece, ContinuationPiece)]
    return Message(
        "assistant",
        "".join(piece.text for piece in pieces if isinstance(piece, TextPiece)),
        tool_calls=tuple(ToolCall(str(call.call_id), str(call.name), "{}") for call in calls),
        continuation=msgspec.json.decode(msgspec.json.encode(state)),  # it may have been stored
        continued_by=NAME,
    )


def test_a_turn_goes_back_in_the_order_it_came_in_with_its_ids() -> None:
    _, pieces = REASONED["reasoning, a comment, a call"]
    items = body_of(answered(pieces))["input"]
    assert [(item["type"], item["id"]) for item in items] == [
        ("reasoning", "reasoning_0"),
        ("message", "message_1"),
        ("function_call", "function_call_2"),
    ]
    assert items[0]["encrypted_content"] == "gAAAAABo数"
    assert "status" not in items[0]
    assert items[1]["content"][0]["text"] == "I look it up."
    assert items[1]["phase"] == "commentary"


def test_a_phase_goes_back_without_an_id() -> None:
    _, pieces = REASONED["a comment and the answer, without reasoning"]
    assert body_of(answered(pieces))["input"] == [
        {"role": "assistant", "content": "One moment.", "phase": "commentary"},
        {"role": "assistant", "content": "42", "phase": "final_answer"},
    ]


def test_the_continuation_of_another_provider_is_ignored() -> None:
    outline = [{"kind": "block", "block": RESTED}]
    items = body_of(Message("assistant", "a", continuation=outline, continued_by="anthropic"))["input"]
    assert items == [{"role": "assistant", "content": "a"}]


def test_the_request_goes_to_the_endpoint_with_the_key() -> None:
    vendor_request = ResponsesWire().request(request(), Endpoint("https://h/v1", KEY, {"OpenAI-Project": "p"}))
    assert vendor_request.url == "https://h/v1/responses"
    assert vendor_request.headers == {
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "OpenAI-Project": "p",
        "Authorization": f"Bearer {KEY}",
    }
    assert vendor_request.content == responses_request_body(request())
    assert "Authorization" not in ResponsesWire().request(request(), Endpoint("https://h/v1")).headers


async def test_nothing_that_people_see_holds_the_key() -> None:
    provider = HttpProvider(NAME, ResponsesWire(), Endpoint("https://h/v1", KEY))
    vendor_request = ResponsesWire().request(request(), Endpoint("https://h/v1", KEY))
    assert KEY not in f"{provider!r} {vendor_request!r} {vendor_request.url}"
    await provider.aclose()


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        (400, {"type": "invalid_request_error", "code": "context_length_exceeded"}, "upstream.context_length"),
        (400, {"type": "invalid_request_error", "code": "invalid_prompt"}, "upstream.content_policy"),
        (400, {"type": "invalid_request_error", "code": None, "param": "include"}, "upstream.invalid_request"),
        (401, {"type": "invalid_request_error", "code": "invalid_api_key"}, "upstream.auth"),
        (404, {"type": "invalid_request_error", "code": "model_not_found"}, "upstream.invalid_request"),
        (429, {"type": "insufficient_quota", "code": "insufficient_quota"}, "upstream.rate_limit"),
        (429, {"type": "requests", "code": "rate_limit_exceeded"}, "upstream.rate_limit"),
        (500, {"type": "server_error", "code": "server_error"}, "upstream.server"),
        (503, {"type": "server_error", "code": None}, "upstream.overloaded"),
    ],
)
def test_an_error_body_has_a_code(status: int, error: dict[str, Any], code: str) -> None:
    body = msgspec.json.encode({"error": {"message": "what happened"} | error})
    assert error_from_response(status, {}, body).code == code
