"""Ollama's chat: what a request says, what goes back of a turn, the ids it makes up, and what its errors mean."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.errors import ProviderError
from engine.pieces import ContinuationPiece, FinishPiece, Piece, TextPiece, ToolCallPiece
from engine.provider import Message, NamedTool, ToolCall
from providers.ollama import NAME, OllamaDecoder, OllamaWire, chat_request_body
from providers.vendor_errors import error_from_response
from providers.wire import Endpoint, HttpProvider

from .conversations import CALLS, INLINE_PICTURE, NOW, PICTURE, SCHEMA, WEATHER, conversation, request
from .wire_cases.ollama import ANSWERS, call, called, end, error_line, said

KEY = "ollama-secret-1234"


def body_of(*messages: Message, **options: Any) -> Any:
    return msgspec.json.decode(chat_request_body(request(*messages, **options)))


def without_urls(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation with none but inline images."""
    return tuple(
        msgspec.structs.replace(message, images=tuple(url for url in message.images if url != PICTURE))
        for message in messages
    )


def test_a_conversation_with_everything_in_it() -> None:
    body = body_of(
        *without_urls(conversation({"thinking": "Hm."}, NAME)),
        tools=(WEATHER, NOW),
        tool_choice="auto",
        temperature=0.5,
        max_tokens=100,
        stop=("END",),
        response_schema=SCHEMA,
    )
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What sky is this?", "images": [INLINE_PICTURE.partition(",")[2]]},
            {
                "role": "assistant",
                "content": "I look.",
                "thinking": "Hm.",
                "tool_calls": [
                    {"id": "call_1", "function": {"name": "weather", "arguments": {"city": "上海", "days": 1.0}}},
                    {"id": "call_2", "function": {"name": "now", "arguments": {}}},
                ],
            },
            {"role": "tool", "content": "18 °C", "tool_name": "weather", "tool_call_id": "call_1"},
            {"role": "tool", "content": "timed out after 30 s", "tool_name": "now", "tool_call_id": "call_2"},
            {"role": "system", "content": "Answer in German."},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Blau."},
            {"role": "user", "content": "Danke 👍"},
        ],
        "stream": True,
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
        "format": SCHEMA,
        "options": {"temperature": 0.5, "num_predict": 100, "stop": ["END"]},
    }


def test_a_bare_request_says_no_more_than_it_must() -> None:
    assert body_of() == {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def test_extra_is_joined_with_what_we_say_and_wins() -> None:
    extra = {"think": "low", "keep_alive": "1h", "options": {"top_k": 3, "temperature": 0}}
    body = body_of(temperature=1.0, max_tokens=5, extra=extra)
    assert body["think"] == "low"
    assert body["keep_alive"] == "1h"
    assert body["options"] == {"top_k": 3, "temperature": 0, "num_predict": 5}


def test_a_temperature_of_nought_is_one() -> None:
    assert body_of(temperature=0.0)["options"] == {"temperature": 0.0}


def test_no_tools_are_offered_where_none_may_be_called() -> None:
    assert "tools" not in body_of(tools=(NOW,), tool_choice="none")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tool_choice": "required"}, "made to call a tool"),
        ({"tool_choice": NamedTool("now")}, "made to call a tool"),
    ],
)
def test_what_ollama_cannot_be_asked_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ProviderError, match=text) as caught:
        body_of(tools=(NOW,), **options)
    assert caught.value.code == "upstream.invalid_request"


def test_an_image_by_its_url_is_refused_in_words_that_help() -> None:
    with pytest.raises(ProviderError, match="give a data: URL") as caught:
        body_of(Message("user", "look", images=(PICTURE,)))
    assert caught.value.code == "upstream.invalid_request"


def answered(pieces: list[Piece]) -> Message:
    """The turn that these pieces make, as it stands in the conversation."""
    calls = [piece for piece in pieces if isinstance(piece, ToolCallPiece)]
    states = [piece.state for piece in pieces if isinstance(piece, ContinuationPiece)]
    return Message(
        "assistant",
        "".join(piece.text for piece in pieces if isinstance(piece, TextPiece)),
        tool_calls=tuple(ToolCall(str(call.call_id), str(call.name), call.arguments_fragment) for call in calls),
        continuation=states[0] if states else None,
        continued_by=NAME if states else None,
    )


def test_thinking_goes_back_with_the_call_it_led_to() -> None:
    _, pieces = ANSWERS["thinking, a comment and a call on the last line"]
    [turn] = body_of(answered(pieces))["messages"]
    assert turn == {
        "role": "assistant",
        "content": "I look.",
        "thinking": "hm, the weather",
        "tool_calls": [{"id": "c", "function": {"name": "weather", "arguments": {"city": "X"}}}],
    }


@pytest.mark.parametrize("stored", [{"thinking": "secret"}, "of another version", None])
def test_the_continuation_of_another_provider_is_ignored(stored: Any) -> None:
    [turn] = body_of(Message("assistant", "a", continuation=stored, continued_by="anthropic"))["messages"]
    assert turn == {"role": "assistant", "content": "a"}
    assert body_of(Message("assistant", "a", continuation="?", continued_by=NAME))["messages"] == [turn]


def decode(*lines: bytes) -> list[Piece]:
    decoder, pieces = OllamaDecoder(), list[Piece]()
    decoder.feed(b"".join(lines), pieces)
    return pieces


def test_made_up_ids_are_those_of_one_answer_alone() -> None:
    """The same bytes give the same ids, and another answer gives others: a tool's result names its call by it."""
    first, second = (
        [called(call("f", {}), call("f", {}), created_at=time)]
        for time in ("2025-05-27T22:54:57Z", "2025-05-27T22:55:01Z")
    )
    ids = [piece.call_id for piece in decode(*first) + decode(*second) if isinstance(piece, ToolCallPiece)]
    assert len(set(ids)) == 4
    assert decode(*first) == decode(*first)


def test_a_result_names_the_tool_of_the_latest_call_with_its_id() -> None:
    turns = [
        Message("assistant", "", tool_calls=(ToolCall("call_0", "old", "{}"),)),
        Message("assistant", "", tool_calls=(ToolCall("call_0", "new", "{}"),)),
        Message("tool", "x", tool_call_id="call_0"),
    ]
    assert body_of(*turns)["messages"][-1]["tool_name"] == "new"
    assert "tool_name" not in body_of(Message("tool", "x", tool_call_id="of no call"))["messages"][0]


@pytest.mark.parametrize("cut", [1, 5, 80, 10_000])
def test_the_last_line_may_lack_its_newline(cut: int) -> None:
    body = b"".join([*said('{"a":"}"}'), end()])[:-1]
    decoder, pieces = OllamaDecoder(), list[Piece]()
    for start in range(0, len(body), cut):
        decoder.feed(body[start : start + cut], pieces)
    assert decoder.done
    assert pieces[0] == TextPiece('{"a":"}"}')
    assert pieces[-1] == FinishPiece("stop")


def test_an_error_that_lacks_its_newline_is_told() -> None:
    with pytest.raises(ProviderError, match="out of memory"):
        decode(error_line("out of memory").rstrip())


def test_the_request_goes_to_the_endpoint_and_needs_no_key() -> None:
    vendor_request = OllamaWire().request(request(), Endpoint("http://localhost:11434", headers={"X-A": "b"}))
    assert vendor_request.url == "http://localhost:11434/api/chat"
    assert vendor_request.headers == {
        "Content-Type": "application/json",
        "Accept": "application/x-ndjson",
        "X-A": "b",
    }
    assert vendor_request.content == chat_request_body(request())
    with_key = OllamaWire().request(request(), Endpoint("https://ollama.com", KEY))
    assert with_key.headers["Authorization"] == f"Bearer {KEY}"


async def test_nothing_that_people_see_holds_the_key() -> None:
    provider = HttpProvider(NAME, OllamaWire(), Endpoint("http://h", KEY))
    vendor_request = OllamaWire().request(request(), Endpoint("http://h", KEY))
    assert KEY not in f"{provider!r} {vendor_request!r} {vendor_request.url}"
    await provider.aclose()


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        (400, "registry.ollama.ai/library/gemma:2b does not support tools", "upstream.invalid_request"),
        (400, "the input length exceeds the context length", "upstream.context_length"),
        (401, "unauthorized", "upstream.auth"),
        (404, "model 'llama9' not found", "upstream.invalid_request"),
        (500, "llama runner process has terminated: exit status 2", "upstream.server"),
        (503, "server busy, please try again.  maximum pending requests exceeded", "upstream.overloaded"),
    ],
)
def test_an_error_body_has_a_code(status: int, message: str, code: str) -> None:
    error = error_from_response(status, {}, msgspec.json.encode({"error": message}))
    assert error.code == code
    assert (" ".join(message.split()) in str(error)) == (code != "upstream.auth")


def test_arguments_keep_the_models_own_writing() -> None:
    message = Message("assistant", "", tool_calls=CALLS)
    assert '"arguments":{"city": "上海", "days": 1.0}'.encode() in chat_request_body(request(message))
