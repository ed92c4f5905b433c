"""Baidu's first ERNIE API: what a request says and where it goes, its errors, and where its access token never is."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from engine.errors import ProviderError
from engine.provider import Message, ModelRequest, NamedTool, ToolCall
from providers.baidu_v1 import BaiduV1Wire, ernie_request_body
from providers.http import open_client
from providers.vendor_errors import error_from_response
from providers.wire import Endpoint, HttpProvider
from server.testing.memory_network import MemoryNetwork

from .conversations import NOW, PICTURE, SCHEMA, WEATHER, conversation, request
from .scripted_network import ServerEnd, chunk, chunked_head
from .wire_cases.baidu_v1 import end, said

TOKEN = "24.f9ba9c5341b67688ab4added8bc91dec.2592000.1485570332.282335-8574074"
ENDPOINT = Endpoint("http://aip.baidubce.com", TOKEN)
CHAT = "https://h/rpc/2.0/ai_custom/v1/wenxinworkshop/chat"


def body_of(*messages: Message, **options: Any) -> Any:
    return msgspec.json.decode(ernie_request_body(request(*messages, **options)))


def without_images(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation without what this API cannot see."""
    return tuple(msgspec.structs.replace(message, images=()) for message in messages)


def test_a_conversation_with_everything_in_it() -> None:
    body = body_of(
        *without_images(conversation({"of": "another"}, "anthropic")),
        tools=(WEATHER, NOW),
        tool_choice=NamedTool("now"),
        temperature=0.5,
        max_tokens=100,
        stop=("END",),
    )
    assert body == {
        "system": "Be brief.\n\nAnswer in German.",
        "messages": [
            {"role": "user", "content": "What sky is this?"},
            {
                "role": "assistant",
                "content": "I look.",
                "function_call": {"name": "weather", "arguments": '{"city": "上海", "days": 1.0}'},
            },
            {"role": "function", "name": "weather", "content": "18 °C"},
            {"role": "assistant", "content": "", "function_call": {"name": "now", "arguments": "{}"}},
            {"role": "function", "name": "now", "content": "timed out after 30 s"},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Blau."},
            {"role": "user", "content": "Danke 👍"},
        ],
        "functions": [
            {"name": "weather", "description": "The weather in a city.", "parameters": SCHEMA},
            {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
        ],
        "tool_choice": {"type": "function", "function": {"name": "now"}},
        "temperature": 0.5,
        "max_output_tokens": 100,
        "stop": ["END"],
        "stream": True,
    }


def test_a_bare_request_says_no_more_than_it_must() -> None:
    assert body_of() == {"messages": [{"role": "user", "content": "hi"}], "stream": True}


def test_a_call_without_a_result_stands_alone() -> None:
    turn = Message("assistant", "", tool_calls=(ToolCall("call_1", "now", "{}"),))
    assert [part["role"] for part in body_of(turn)["messages"]] == ["assistant"]


def test_extra_is_joined_with_what_we_say_and_wins() -> None:
    body = body_of(temperature=1.0, extra={"disable_search": True, "temperature": 0.1})
    assert (body["disable_search"], body["temperature"]) == (True, 0.1)


@pytest.mark.parametrize(("choice", "offered"), [(None, True), ("auto", True), ("none", False)])
def test_functions_are_offered_unless_none_may_be_called(choice: Any, offered: bool) -> None:
    body = body_of(tools=(NOW,), tool_choice=choice)
    assert ("functions" in body) == offered
    assert "tool_choice" not in body


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (request(tools=(NOW,), tool_choice="required"), "a function of its choice"),
        (request(response_schema=SCHEMA), "no schema"),
        (request(Message("user", "look", images=(PICTURE,))), "no images"),
    ],
)
def test_what_the_api_cannot_be_asked_is_refused(asked: ModelRequest, text: str) -> None:
    with pytest.raises(ProviderError, match=text) as caught:
        ernie_request_body(asked)
    assert caught.value.code == "upstream.invalid_request"


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("ernie-4.0-8k", "completions_pro"),
        ("ERNIE-4.0-8K", "completions_pro"),
        ("ERNIE-Bot-turbo", "eb-instant"),
        ("ERNIE-Speed-8K", "ernie_speed"),
        ("ERNIE-4.0-Turbo-8K", "ernie-4.0-turbo-8k"),
        ("my_own_deployment", "my_own_deployment"),
        ("../../oauth?x=1#y", "..%2F..%2Foauth%3Fx%3D1%23y"),
    ],
)
def test_the_model_is_a_part_of_the_path(model: str, path: str) -> None:
    asked = msgspec.structs.replace(request(), model=model)
    assert BaiduV1Wire().request(asked, Endpoint("https://h")).url == f"{CHAT}/{path}"


def test_the_request_goes_to_the_endpoint_with_the_token_in_its_query() -> None:
    asked = msgspec.structs.replace(request(), model="ernie-3.5-8k")
    vendor_request = BaiduV1Wire().request(asked, Endpoint("https://h", "24.a&b c", {"X-A": "b"}))
    assert vendor_request.url == f"{CHAT}/completions?access_token=24.a%26b+c"
    assert vendor_request.headers == {"Content-Type": "application/json", "Accept": "text/event-stream", "X-A": "b"}
    assert vendor_request.content == ernie_request_body(asked)


async def test_the_token_is_seen_by_the_server_alone(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """httpx logs every request's URL: with its query the token would be in every log."""
    caplog.set_level(logging.DEBUG)
    network = MemoryNetwork()
    ends: list[ServerEnd] = []
    targets: list[bytes] = []

    async def serve(stream: trio.abc.Stream) -> None:
        ends.append(ServerEnd(stream, ("aip.baidubce.com", 80, False)))
        while asked := await ends[-1].request():
            targets.append(asked.head.target)
            body = chunk(b"".join([*said("a"), end()])) + chunk(b"")
            await stream.send_all(chunked_head("Content-Type: text/event-stream") + body)
        await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery, open_client(network.connect) as client:
        await nursery.start(trio.serve_listeners, serve, [network.listen("aip.baidubce.com", 80)])
        provider = HttpProvider("baidu_v1", BaiduV1Wire(), ENDPOINT, client)
        await provider.stream(request(), lambda _: None)
        assert TOKEN not in repr(provider)
        nursery.cancel_scope.cancel()
    assert TOKEN.encode() in targets[0]
    assert any("HTTP Request: POST http://aip.baidubce.com/rpc/2.0/" in line for line in caplog.messages)
    assert not any("access_token" in line for line in caplog.messages)
    assert TOKEN not in caplog.text


async def test_nothing_that_people_see_holds_the_token(autojump_clock: MockClock) -> None:
    vendor_request = BaiduV1Wire().request(request(), ENDPOINT)
    assert TOKEN in vendor_request.url
    assert "access_token" not in f"{vendor_request!r} {vendor_request}"
    async with open_client(MemoryNetwork().connect) as client:
        provider = HttpProvider("baidu_v1", BaiduV1Wire(), ENDPOINT, client)
        with pytest.raises(ProviderError) as caught:
            await provider.stream(request(), lambda _: None)
    fault: BaseException | None = caught.value
    while fault is not None:
        assert "access_token" not in f"{fault} {fault!r} {vars(fault)!r}"
        fault = fault.__cause__


@pytest.mark.parametrize(
    ("error_code", "code"),
    [
        (2, "upstream.overloaded"),
        (4, "upstream.rate_limit"),
        (6, "upstream.auth"),
        (17, "upstream.rate_limit"),
        (110, "upstream.auth"),
        (336003, "upstream.invalid_request"),
        (336007, "upstream.context_length"),
        (336100, "upstream.overloaded"),
        (336501, "upstream.rate_limit"),
        (987654, "upstream.server"),
    ],
)
def test_an_error_under_http_200_has_a_code(error_code: int, code: str) -> None:
    body = msgspec.json.encode({"error_code": error_code, "error_msg": "what happened", "id": "as-1"})
    error = error_from_response(200, {"content-type": "application/json"}, body)
    assert error.code == code
    assert ("what happened" in str(error)) == (code != "upstream.auth")
