"""Google's Gemini API: what a request says, what goes back of a turn, and what its errors mean."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.errors import ProviderError
from engine.pieces import ContinuationPiece, Piece, TextPiece, ToolCallPiece
from engine.provider import Message, ModelRequest, NamedTool, ToolCall
from providers.gemini import (
    MAX_STRAY_BYTES,
    NO_SIGNATURE,
    GeminiWire,
    GenerateContentDecoder,
    generate_content_body,
)
from providers.vendor_errors import error_from_object, error_from_response
from providers.wire import Endpoint, HttpProvider

from .conversations import CALLS, INLINE_PICTURE, NOW, PICTURE, SCHEMA, WEATHER, conversation, request
from .wire_cases.gemini import BARE_ERROR, CALLED, SIGNED, THOUGHT, chunk
from .wire_cases.gemini import text as text_part

KEY = "AIzaSyD-secret"


def body_of(*messages: Message, **options: Any) -> Any:
    return msgspec.json.decode(generate_content_body(request(*messages, **options)))


def test_a_conversation_with_everything_in_it() -> None:
    outline = [{"kind": "text", "chars": 7}, {"kind": "call", "call_id": "call_1", "extra": SIGNED}]
    body = body_of(
        *conversation(outline, "gemini"),
        tools=(WEATHER, NOW),
        tool_choice="auto",
        temperature=0.5,
        max_tokens=100,
        stop=("END",),
        response_schema=SCHEMA,
    )
    assert body == {
        "systemInstruction": {"parts": [{"text": "Be brief."}, {"text": "Answer in German."}]},
        "contents": [
            {
                "role": "user",
                "parts": [
                    {"fileData": {"mimeType": "image/png", "fileUri": PICTURE}},
                    {"inlineData": {"mimeType": "image/gif", "data": INLINE_PICTURE.partition(",")[2]}},
                    {"text": "What sky is this?"},
                ],
            },
            {
                "role": "model",
                "parts": [
                    {"text": "I look."},
                    {
                        "functionCall": {"id": "call_1", "name": "weather", "args": {"city": "上海", "days": 1.0}},
                        **SIGNED,
                    },
                    {"functionCall": {"id": "call_2", "name": "now", "args": {}}},
                ],
            },
            {
                "role": "user",
                "parts": [
                    {"functionResponse": {"id": "call_1", "name": "weather", "response": {"result": "18 °C"}}},
                    {
                        "functionResponse": {
                            "id": "call_2",
                            "name": "now",
                            "response": {"error": "timed out after 30 s"},
                        }
                    },
                ],
            },
            {"role": "user", "parts": [{"text": "And?"}]},
            {"role": "model", "parts": [{"text": "Blau."}]},
            {"role": "user", "parts": [{"text": "Danke 👍"}]},
        ],
        "tools": [
            {
                "functionDeclarations": [
                    {"name": "weather", "description": "The weather in a city.", "parametersJsonSchema": SCHEMA},
                    {
                        "name": "now",
                        "description": "The time.",
                        "parametersJsonSchema": {"type": "object", "properties": {}},
                    },
                ]
            }
        ],
        "toolConfig": {"functionCallingConfig": {"mode": "AUTO"}},
        "generationConfig": {
            "temperature": 0.5,
            "maxOutputTokens": 100,
            "stopSequences": ["END"],
            "responseMimeType": "application/json",
            "responseJsonSchema": SCHEMA,
        },
    }


def test_a_bare_request_says_no_more_than_it_must() -> None:
    assert body_of() == {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}


@pytest.mark.parametrize(
    ("choice", "value"),
    [
        ("auto", {"mode": "AUTO"}),
        ("none", {"mode": "NONE"}),
        ("required", {"mode": "ANY"}),
        (NamedTool("now"), {"mode": "ANY", "allowedFunctionNames": ["now"]}),
    ],
)
def test_the_choice_of_tool_in_their_words(choice: Any, value: Any) -> None:
    assert body_of(tools=(NOW,), tool_choice=choice)["toolConfig"] == {"functionCallingConfig": value}


def test_extra_is_joined_with_what_we_say_and_wins() -> None:
    thinking = {"thinkingConfig": {"includeThoughts": True}, "temperature": 1}
    body = body_of(temperature=0.5, max_tokens=9, extra={"generationConfig": thinking, "cachedContent": "c"})
    assert body["generationConfig"] == {"temperature": 1, "maxOutputTokens": 9, **thinking}
    assert body["cachedContent"] == "c"


@pytest.mark.parametrize(
    ("url", "media_type"),
    [
        ("https://h/a.webp", "image/webp"),
        ("https://h/a.b/c.HEIC#x", "image/heic"),
        ("https://h/a.jpg", "image/jpeg"),
        ("https://h/picture", "image/jpeg"),
        ("gs://bucket/a.png", "image/png"),
    ],
)
def test_an_image_has_a_type(url: str, media_type: str) -> None:
    [content] = body_of(Message("user", "", images=(url,)))["contents"]
    assert content["parts"] == [{"fileData": {"mimeType": media_type, "fileUri": url}}]


def test_a_call_of_another_model_is_marked_as_one_without_a_signature() -> None:
    """Gemini 3 refuses a call without a signature, of several calls the first one."""
    [content] = body_of(Message("assistant", "", tool_calls=CALLS))["contents"]
    first, second = content["parts"]
    assert first["thoughtSignature"] == NO_SIGNATURE
    assert "thoughtSignature" not in second


def test_a_result_without_its_call_cannot_be_said() -> None:
    with pytest.raises(ProviderError, match="'call_9'") as raised:
        generate_content_body(request(Message("tool", "18 °C", tool_call_id="call_9")))
    assert raised.value.code == "upstream.invalid_request"


def answered(pieces: list[Piece]) -> Message:
    """The turn that these pieces make, as it stands in the conversation."""
    calls = [piece for piece in pieces if isinstance(piece, ToolCallPiece)]
    [state] = [piece.state for piece in pieces if isinstance(piece, ContinuationPiece)]
    return Message(
        "assistant",
        "".join(piece.text for piece in pieces if isinstance(piece, TextPiece)),
        tool_calls=tuple(ToolCall(str(call.call_id), str(call.name), call.arguments_fragment) for call in calls),
        continuation=msgspec.json.decode(msgspec.json.encode(state)),  # it may have been stored
        continued_by="gemini",
    )


@pytest.mark.parametrize(
    ("pieces", "parts"),
    [
        (
            THOUGHT["a signature in a last part without text"][1],
            [{"text": "Yes."}, {"text": "", **SIGNED}],
        ),
        (
            THOUGHT["a signature on a text, between others"][1],
            [{"text": "流"}, {"text": "👍!", **SIGNED}, {"text": "ab"}],
        ),
        (
            THOUGHT["a signature on a thought"][1],
            [{"text": "", "thought": True, **SIGNED}, {"text": "a"}],
        ),
        (
            CALLED["calls side by side, the first one signed"][1],
            [
                {"functionCall": {"id": "fc_1", "name": "weather", "args": {"days": [1, 2.5, None]}}, **SIGNED},
                {"functionCall": {"id": "fc_2", "name": "time", "args": {"zone": "UTC"}}},
            ],
        ),
        (
            CALLED["thoughts, text and a call, in this order"][1],
            [
                {"text": "I look."},
                {"functionCall": {"id": "fc_1", "name": "weather", "args": {"city": "x"}}, **SIGNED},
            ],
        ),
    ],
)
def test_each_signature_goes_back_on_the_part_it_came_with(pieces: list[Piece], parts: Any) -> None:
    assert body_of(answered(pieces))["contents"] == [{"role": "model", "parts": parts}]


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("gemini-3.8-flash", "models/gemini-3.8-flash"),
        ("tunedModels/mine", "tunedModels/mine"),
        ("m?key=1#x y", "models/m%3Fkey%3D1%23x%20y"),
    ],
)
def test_the_model_is_in_the_path_and_the_key_in_a_header(model: str, path: str) -> None:
    messages = request().messages
    vendor_request = GeminiWire().request(ModelRequest(messages, model), Endpoint("https://h/v1beta", KEY, {"a": "b"}))
    assert vendor_request.url == f"https://h/v1beta/{path}:streamGenerateContent?alt=sse"
    assert vendor_request.headers == {
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "a": "b",
        "x-goog-api-key": KEY,
    }
    assert vendor_request.content == generate_content_body(request())
    assert "x-goog-api-key" not in GeminiWire().request(request(), Endpoint("https://h/v1beta")).headers


async def test_nothing_that_people_see_holds_the_key() -> None:
    provider = HttpProvider("gemini", GeminiWire(), Endpoint("https://h", KEY))
    vendor_request = GeminiWire().request(request(), Endpoint("https://h", KEY))
    assert KEY not in f"{provider!r} {vendor_request!r} {vendor_request.url}"
    await provider.aclose()


def test_what_is_too_long_for_an_error_is_not_kept() -> None:
    decoder, pieces = GenerateContentDecoder(), list[Piece]()
    decoder.feed(b'{\n"error": "' + b"x" * MAX_STRAY_BYTES, pieces)
    decoder.feed(b'"}', pieces)
    decoder.feed(b"\n\n" + chunk(text_part("a"), finish="STOP"), pieces)
    assert [type(piece).__name__ for piece in pieces] == ["TextPiece", "FinishPiece"]


def test_an_error_that_is_no_event_is_told_like_one() -> None:
    decoder = GenerateContentDecoder()
    with pytest.raises(ProviderError, match="high demand"):
        decoder.feed(BARE_ERROR, [])


API_KEY_INVALID = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]
TOO_LONG = "The input token count (2551556) exceeds the maximum number of tokens allowed (1048576)."


@pytest.mark.parametrize(
    ("status", "name", "message", "details", "code"),
    [
        (400, "INVALID_ARGUMENT", "Invalid value at 'contents'", None, "upstream.invalid_request"),
        (400, "INVALID_ARGUMENT", TOO_LONG, None, "upstream.context_length"),
        (400, "INVALID_ARGUMENT", "API key not valid.", API_KEY_INVALID, "upstream.auth"),
        (400, "FAILED_PRECONDITION", "User location is not supported", None, "upstream.invalid_request"),
        (403, "PERMISSION_DENIED", "denied", None, "upstream.auth"),
        (404, "NOT_FOUND", "models/x is not found", None, "upstream.invalid_request"),
        (429, "RESOURCE_EXHAUSTED", "You exceeded your current quota", None, "upstream.rate_limit"),
        (500, "INTERNAL", "An internal error has occurred", None, "upstream.server"),
        (503, "UNAVAILABLE", "The model is overloaded", None, "upstream.overloaded"),
        (504, "DEADLINE_EXCEEDED", "The service ran out of time", None, "upstream.server"),
    ],
)
def test_an_error_body_has_a_code(status: int, name: str, message: str, details: Any, code: str) -> None:
    error = {"code": status, "message": message, "status": name, "details": details}
    body = msgspec.json.encode({"error": error})
    for found in (
        error_from_response(status, {}, body),
        error_from_response(status, {}, b"[" + body + b"]"),
        error_from_object(error),
    ):
        assert found.code == code
        assert (message in str(found)) == (code != "upstream.auth")


@pytest.mark.parametrize(
    ("delay", "headers", "seconds"),
    [("34.074824224s", {}, 34.074824224), ("27s", {"retry-after": "3"}, 3), ("soon", {}, None), (None, {}, None)],
)
def test_the_wish_to_wait_is_in_the_details(delay: Any, headers: dict[str, str], seconds: float | None) -> None:
    details = ["?", {"@type": "type.googleapis.com/google.rpc.Help"}, {"retryDelay": delay}]
    body = {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "slow down", "details": details}}
    assert error_from_response(429, headers, msgspec.json.encode(body)).retry_after == seconds
