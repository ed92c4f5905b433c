"""DashScope's native API: what a request says, where it goes, and what its errors mean."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.errors import ProviderError
from engine.provider import Message, ModelRequest, NamedTool
from providers.dashscope import DashScopeWire, generation_request_body
from providers.vendor_errors import error_from_response
from providers.wire import Endpoint, HttpProvider

from .conversations import INLINE_PICTURE, NOW, PICTURE, SCHEMA, WEATHER, conversation, request
from .wire_cases.dashscope import failed

KEY = "sk-dashscope-secret"
ENDPOINT = Endpoint("https://dashscope.aliyuncs.com", KEY)
SERVICES = "https://dashscope.aliyuncs.com/api/v1/services/aigc"


def body_of(*messages: Message, **options: Any) -> Any:
    return msgspec.json.decode(generation_request_body(request(*messages, **options)))


def test_a_conversation_with_everything_in_it() -> None:
    body = body_of(
        *conversation({"of": "another"}, "anthropic"),
        tools=(WEATHER, NOW),
        tool_choice="auto",
        temperature=0.5,
        max_tokens=100,
        stop=("END",),
        response_schema=SCHEMA,
    )
    assert body == {
        "model": "m",
        "input": {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"image": PICTURE}, {"image": INLINE_PICTURE}, {"text": "What sky is this?"}],
                },
                {
                    "role": "assistant",
                    "content": "I look.",
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city": "上海", "days": 1.0}'},
                        },
                        {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": ""}},
                    ],
                },
                {"role": "tool", "content": "18 °C", "tool_call_id": "call_1"},
                {"role": "tool", "content": "timed out after 30 s", "tool_call_id": "call_2"},
                {"role": "system", "content": "Answer in German."},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": "Blau."},
                {"role": "user", "content": "Danke 👍"},
            ]
        },
        "parameters": {
            "result_format": "message",
            "incremental_output": True,
            "temperature": 0.5,
            "max_tokens": 100,
            "stop": ["END"],
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
            "tool_choice": "auto",
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
            },
        },
    }


def test_a_bare_request_says_no_more_than_it_must() -> None:
    assert body_of() == {
        "model": "m",
        "input": {"messages": [{"role": "user", "content": "hi"}]},
        "parameters": {"result_format": "message", "incremental_output": True},
    }


@pytest.mark.parametrize(
    ("choice", "value"),
    [
        ("auto", "auto"),
        ("none", "none"),
        (NamedTool("now"), {"type": "function", "function": {"name": "now"}}),
    ],
)
def test_the_choice_of_tool_in_their_words(choice: Any, value: Any) -> None:
    assert body_of(tools=(NOW,), tool_choice=choice)["parameters"]["tool_choice"] == value


def test_some_tool_whichever_cannot_be_asked_for() -> None:
    with pytest.raises(ProviderError, match="a tool of its choice") as caught:
        body_of(tools=(NOW,), tool_choice="required")
    assert caught.value.code == "upstream.invalid_request"


def test_extra_is_joined_with_what_we_say_and_wins() -> None:
    extra = {"parameters": {"enable_thinking": True, "thinking_budget": 50, "temperature": 0}, "workspace": "w"}
    body = body_of(temperature=1.0, extra=extra)
    assert body["parameters"] == {
        "result_format": "message",
        "incremental_output": True,
        "temperature": 0,
        "enable_thinking": True,
        "thinking_budget": 50,
    }
    assert body["workspace"] == "w"


def target(model: str, *messages: Message, multimodal: bool | None = None) -> str:
    """The path under the services where the request goes."""
    asked = ModelRequest(messages or (Message("user", "hi"),), model)
    return DashScopeWire(multimodal=multimodal).request(asked, ENDPOINT).url.removeprefix(f"{SERVICES}/")


TEXT = "text-generation/generation"
MULTIMODAL = "multimodal-generation/generation"


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("qwen-plus", TEXT),
        ("qwen-max-latest", TEXT),
        ("qwen3-max", TEXT),
        ("qwen3-coder-plus", TEXT),
        ("qwq-plus", TEXT),
        ("deepseek-r1", TEXT),
        ("qwen3.6-max-preview", TEXT),
        ("qwen3.7-max", TEXT),
        ("qwen-vl-max", MULTIMODAL),
        ("qwen2.5-vl-72b-instruct", MULTIMODAL),
        ("qwen3-vl-plus", MULTIMODAL),
        ("qvq-max", MULTIMODAL),
        ("qwen3-omni-flash", MULTIMODAL),
        ("qwen3.5-plus", MULTIMODAL),
        ("qwen3.6-plus", MULTIMODAL),
        ("qwen3.6-27b", MULTIMODAL),
        ("qwen3.7-plus", MULTIMODAL),
        ("qwen3.8-max", MULTIMODAL),
        ("kimi-k2.6", MULTIMODAL),
    ],
)
def test_each_model_is_asked_where_it_answers(model: str, path: str) -> None:
    assert target(model) == path
    assert target(model, multimodal=True) == MULTIMODAL
    assert target(model, multimodal=False) == TEXT


def test_what_has_images_goes_where_they_are_seen() -> None:
    assert target("a-model-of-next-year", Message("user", "look", images=(PICTURE,))) == MULTIMODAL


def test_a_server_that_repeats_itself_is_not_asked_for_increments() -> None:
    asked = DashScopeWire(cumulative=True).request(request(), ENDPOINT)
    assert msgspec.json.decode(asked.content)["parameters"]["incremental_output"] is False


def test_the_request_goes_to_the_endpoint_with_the_key() -> None:
    vendor_request = DashScopeWire().request(
        request(), Endpoint("https://dashscope-intl.aliyuncs.com/api/v1", KEY, {"X-DashScope-WorkSpace": "w"})
    )
    assert vendor_request.url == f"https://dashscope-intl.aliyuncs.com/api/v1/services/aigc/{TEXT}"
    assert vendor_request.headers == {
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "X-DashScope-SSE": "enable",
        "X-DashScope-WorkSpace": "w",
        "Authorization": f"Bearer {KEY}",
    }
    assert vendor_request.content == generation_request_body(request())
    assert "Authorization" not in DashScopeWire().request(request(), Endpoint("https://h")).headers


async def test_nothing_that_people_see_holds_the_key() -> None:
    provider = HttpProvider("dashscope", DashScopeWire(), ENDPOINT)
    vendor_request = DashScopeWire().request(request(), ENDPOINT)
    assert KEY not in f"{provider!r} {vendor_request!r} {vendor_request.url}"
    await provider.aclose()


@pytest.mark.parametrize(
    ("status", "name", "message", "code"),
    [
        (400, "InvalidParameter", "url error, please check url", "upstream.invalid_request"),
        (400, "InvalidParameter", "Range of input length should be [1, 129024]", "upstream.context_length"),
        (400, "DataInspectionFailed", "Input data may contain inappropriate content.", "upstream.content_policy"),
        (400, "Arrearage", "Access denied, please make sure your account is in good standing.", "upstream.rate_limit"),
        (401, "InvalidApiKey", "Invalid API-key provided.", "upstream.auth"),
        (403, "AccessDenied.Unpurchased", "Access to model denied.", "upstream.auth"),
        (404, "ModelNotFound", "Model can not be found.", "upstream.invalid_request"),
        (408, "RequestTimeOut", "Request timed out, please try again later.", "upstream.overloaded"),
        (413, "BadRequest.TooLarge", "Payload Too Large", "upstream.context_length"),
        (429, "Throttling.RateQuota", "Requests rate limit exceeded, please try again later.", "upstream.rate_limit"),
        (429, "Throttling.AllocationQuota", "Allocated quota exceeded.", "upstream.rate_limit"),
        (500, "InternalError.Algo", "An internal error has occurred.", "upstream.server"),
        (503, "ModelUnavailable", "Model is unavailable, please try again later.", "upstream.overloaded"),
    ],
)
def test_an_error_body_has_a_code_as_json_and_as_an_event_labelled_as_json(
    status: int, name: str, message: str, code: str
) -> None:
    bodies = (
        msgspec.json.encode({"code": name, "message": message, "request_id": "r"}),
        msgspec.json.encode({"error": {"code": name, "message": message, "type": "invalid_request_error"}}),
        failed(name, message=message),
        failed(name, message=message).rstrip(),
    )
    for body in bodies:
        error = error_from_response(status, {"content-type": "application/json", "retry-after": "7"}, body)
        assert error.code == code
        assert (message in str(error)) == (code != "upstream.auth")
