"""Cohere's Chat API v2: what a request says, what goes back of a turn, and what its errors mean."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.errors import ProviderError
from engine.provider import Message, NamedTool
from providers.cohere import CohereDecoder, CohereWire, chat_request_body
from providers.vendor_errors import error_from_response
from providers.wire import Endpoint, HttpProvider

from .conversations import CALLS, INLINE_PICTURE, NOW, PICTURE, SCHEMA, WEATHER, conversation, request
from .wire_cases.cohere import end

KEY = "co-secret-0123456789"


def body_of(*messages: Message, **options: Any) -> Any:
    return msgspec.json.decode(chat_request_body(request(*messages, **options)))


def function(name: str, arguments: str, call_id: str) -> Any:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_conversation_with_everything_in_it() -> None:
    body = body_of(
        *conversation({"tool_plan": "I will look."}, "cohere"),
        tools=(WEATHER, NOW),
        tool_choice="required",
        temperature=0.5,
        max_tokens=100,
        stop=("END",),
        response_schema=SCHEMA,
    )
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief.\n\nAnswer in German."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What sky is this?"},
                    {"type": "image_url", "image_url": {"url": PICTURE}},
                    {"type": "image_url", "image_url": {"url": INLINE_PICTURE}},
                ],
            },
            {
                "role": "assistant",
                "content": "I look.",
                "tool_plan": "I will look.",
                "tool_calls": [function("weather", CALLS[0].arguments, "call_1"), function("now", "{}", "call_2")],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "18 °C"},
            {"role": "tool", "tool_call_id": "call_2", "content": "timed out after 30 s"},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Blau."},
            {"role": "user", "content": "Danke 👍"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {"name": "weather", "description": "The weather in a city.", "parameters": SCHEMA},
            },
            {
                "type": "function",
                "function": {
                    "name": "now",
                    "description": "The time.",
                    "parameters": {"type": "object", "properties": {}},
                },
            },
        ],
        "tool_choice": "REQUIRED",
        "temperature": 0.5,
        "max_tokens": 100,
        "stop_sequences": ["END"],
        "response_format": {"type": "json_object", "json_schema": SCHEMA},
        "stream": True,
    }


def test_a_bare_request_says_no_more_than_it_must() -> None:
    assert body_of() == {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


@pytest.mark.parametrize(
    ("choice", "value", "offered"),
    [
        ("auto", None, ["weather", "now"]),
        ("none", "NONE", ["weather", "now"]),
        ("required", "REQUIRED", ["weather", "now"]),
        (NamedTool("now"), "REQUIRED", ["now"]),
    ],
)
def test_the_choice_of_tool_in_their_words(choice: Any, value: str | None, offered: list[str]) -> None:
    body = body_of(tools=(WEATHER, NOW), tool_choice=choice)
    assert body.get("tool_choice") == value
    assert [tool["function"]["name"] for tool in body["tools"]] == offered


def test_a_tool_that_is_not_offered_cannot_be_chosen() -> None:
    with pytest.raises(ProviderError, match="'now'") as raised:
        chat_request_body(request(tools=(WEATHER,), tool_choice=NamedTool("now")))
    assert raised.value.code == "upstream.invalid_request"


def test_extra_is_joined_with_what_we_say_and_wins() -> None:
    extra = {"thinking": {"type": "disabled"}, "response_format": {"strict": True}, "temperature": 1}
    body = body_of(response_schema=SCHEMA, temperature=0.5, extra=extra)
    assert body["thinking"] == {"type": "disabled"}
    assert body["response_format"] == {"type": "json_object", "json_schema": SCHEMA, "strict": True}
    assert body["temperature"] == 1


@pytest.mark.parametrize(
    ("message", "chat"),
    [
        (
            Message("assistant", "", tool_calls=CALLS[1:]),
            {"role": "assistant", "tool_calls": [function("now", "{}", "call_2")]},
        ),
        (
            Message("user", "", images=(PICTURE,)),
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}]},
        ),
        (
            Message("assistant", "", tool_calls=CALLS[1:], continuation={"tool_plan": "x"}, continued_by="gemini"),
            {"role": "assistant", "tool_calls": [function("now", "{}", "call_2")]},
        ),
    ],
    ids=["calls alone", "an image alone", "the plan of another provider"],
)
def test_what_is_not_there_is_not_said(message: Message, chat: Any) -> None:
    assert body_of(message)["messages"] == [chat]


@pytest.mark.parametrize("base_url", ["https://h", "https://h/v2"])
def test_the_request_goes_to_the_endpoint_with_the_key(base_url: str) -> None:
    vendor_request = CohereWire().request(request(), Endpoint(base_url, KEY, {"X-Client-Name": "t"}))
    assert vendor_request.url == "https://h/v2/chat"
    assert vendor_request.headers == {
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "X-Client-Name": "t",
        "Authorization": f"Bearer {KEY}",
    }
    assert vendor_request.content == chat_request_body(request())
    assert "Authorization" not in CohereWire().request(request(), Endpoint(base_url)).headers


async def test_nothing_that_people_see_holds_the_key() -> None:
    provider = HttpProvider("cohere", CohereWire(), Endpoint("https://h", KEY))
    vendor_request = CohereWire().request(request(), Endpoint("https://h", KEY))
    assert KEY not in f"{provider!r} {vendor_request!r} {vendor_request.url}"
    await provider.aclose()


def test_an_error_in_the_end_is_told_in_their_words() -> None:
    with pytest.raises(ProviderError, match="lost a worker"):
        CohereDecoder().feed(end("ERROR", error="lost a worker"), [])
    with pytest.raises(ProviderError, match="TIMEOUT"):
        CohereDecoder().feed(end("TIMEOUT"), [])


TOO_LONG = "too many tokens: total number of tokens in the prompt cannot exceed 4081 - received 4292."
TOO_MANY = "too many tokens: max tokens must be less than or equal to 4096 - received 8192."


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        (400, "invalid request: message must be at least 1 token long", "upstream.invalid_request"),
        (400, TOO_LONG, "upstream.context_length"),
        (400, TOO_MANY, "upstream.invalid_request"),
        (401, "invalid api token", "upstream.auth"),
        (402, "Please add or update your payment method", "upstream.rate_limit"),
        (404, "model 'x' not found", "upstream.invalid_request"),
        (422, "unknown field: parameter 'x' is not a valid field", "upstream.invalid_request"),
        (429, "You are using a Trial key, which is limited to 40 API calls / minute.", "upstream.rate_limit"),
        (499, "request cancelled by user", "upstream.invalid_request"),
        (500, "internal server error", "upstream.server"),
        (503, "service unavailable", "upstream.overloaded"),
        (504, "gateway timeout", "upstream.server"),
    ],
)
def test_an_error_body_has_a_code(status: int, message: str, code: str) -> None:
    body = msgspec.json.encode({"id": "5a50", "message": message})
    error = error_from_response(status, {}, body)
    assert error.code == code
    assert (message in str(error)) == (code != "upstream.auth")
