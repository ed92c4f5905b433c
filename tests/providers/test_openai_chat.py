"""Chat completions: what a request says, and what every kind of stream means, however its bytes are cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ProviderError, ProviderErrorCode
from engine.pieces import FinishPiece, Piece, TextPiece
from engine.provider import Message, ModelRequest, NamedTool, ToolCall, ToolSpec
from providers.openai_chat import ChatDecoder, ChatWire, OpenAIChatProvider, chat_request_body
from providers.wire import Endpoint

from .wire_cases import WireCase
from .wire_cases.openai_chat import CASES, said

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def decode(reads: Iterable[bytes]) -> tuple[list[Piece], ProviderErrorCode | None]:
    """What the reads mean, and the code of the error that they end in."""
    decoder, pieces = ChatDecoder(), list[Piece]()
    try:
        for read in reads:
            decoder.feed(read, pieces)
            if decoder.done:
                break
    except ProviderError as error:
        return pieces, error.code
    return pieces, None


def meant(case: WireCase) -> tuple[list[Piece], ProviderErrorCode | None]:
    return list(case.pieces), case.error


def cut(data: bytes, at: Sequence[int]) -> list[bytes]:
    """The data, cut at these positions."""
    return [data[start:end] for start, end in itertools.pairwise([0, *at, len(data)])]


@by_case
def test_a_stream_means_its_pieces(case: WireCase) -> None:
    assert decode([b"".join(case.frames)]) == meant(case)
    assert decode(case.frames) == meant(case)


@by_case
def test_a_stream_cut_at_any_byte_means_the_same(case: WireCase) -> None:
    data = b"".join(case.frames)
    for position in range(len(data) + 1):
        assert decode(cut(data, [position])) == meant(case), position
    assert decode(cut(data, range(1, len(data)))) == meant(case)


@pytest.mark.parametrize("line_end", [b"\r\n", b"\r"])
@by_case
def test_lines_may_end_as_the_standard_allows(case: WireCase, line_end: bytes) -> None:
    data = b"".join(case.frames).replace(b"\n", line_end)
    assert decode([data]) == meant(case)
    assert decode(cut(data, range(1, len(data)))) == meant(case)


@given(data=st.data(), case=st.sampled_from(CASES))
def test_random_cuts_and_noise_change_nothing(data: st.DataObject, case: WireCase) -> None:
    noise = st.lists(st.sampled_from(case.noise), max_size=2).map(b"".join)
    body = b"".join(frame + data.draw(noise, label="noise") for frame in case.frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=12), label="cuts"))
    assert decode(cut(body, cuts)) == meant(case)


@by_case
def test_noise_alone_says_nothing(case: WireCase) -> None:
    assert decode(case.noise) == ([], None)


def test_the_end_mark_ends_the_answer_inside_a_read() -> None:
    decoder, pieces = ChatDecoder(), list[Piece]()
    decoder.feed(b"".join([*said("a"), b"data: [DONE]\n\n", *said("b")]), pieces)
    assert (decoder.done, decoder.may_end, pieces) == (True, False, [TextPiece("a"), FinishPiece("stop")])


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["endless line", "long line"])
def test_too_much_at_once_is_refused_after_what_was_said(end: bytes) -> None:
    kib = b"x" * 1024
    reads = [*said("a"), *said("b") * 2, b"data: ", *[kib] * 1024, kib + end]
    said_before: list[Piece] = [TextPiece("a"), TextPiece("b"), TextPiece("b")]
    assert decode(reads) == (said_before, "upstream.protocol")
    assert decode([b"".join(reads)]) == (said_before, "upstream.protocol")


def test_an_event_of_many_lines_is_bounded() -> None:
    line = b"data: " + b"x" * 1000 + b"\n"
    assert decode([*said("a"), *[line] * 1100]) == ([TextPiece("a")], "upstream.protocol")


@given(
    reads=st.lists(st.binary(max_size=60) | st.sampled_from([b"data: ", b"\n\n", b'{"choices":[', b"}]}"]), max_size=9)
)
def test_no_bytes_raise_anything_but_a_provider_error(reads: list[bytes]) -> None:
    decode(reads)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**20) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "delta",
                    "content",
                    "tool_calls",
                    "function",
                    "index",
                    "id",
                    "usage",
                    "error",
                    "code",
                    "message",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(chunks=st.lists(st.fixed_dictionaries({}, optional={"choices": JSON, "usage": JSON, "error": JSON}), max_size=3))
def test_no_json_raises_anything_but_a_provider_error(chunks: list[Any]) -> None:
    decode([b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks])


def body_of(request: ModelRequest) -> Any:
    return msgspec.json.decode(chat_request_body(request))


HI = Message("user", "hi")


def test_the_least_that_a_request_says() -> None:
    assert body_of(ModelRequest((HI,), "gpt-4o")) == {
        "model": "gpt-4o",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_conversation_with_tools_keeps_roles_calls_and_results() -> None:
    conversation = (
        Message("system", "Be brief."),
        Message("user", "上海的天气怎么样"),
        Message("assistant", "", tool_calls=(ToolCall("c1", "weather", '{"city": "上海"}'),)),
        Message("tool", "timed out", tool_call_id="c1", tool_failed=True),
        Message("assistant", "I do not know.", continuation={"thinking": "x"}, continued_by="anthropic"),
        Message("user", "And here?", images=("https://a/b.png", "data:image/png;base64,AA==")),
    )
    function = {"name": "weather", "arguments": '{"city": "上海"}'}
    assert body_of(ModelRequest(conversation, "m"))["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "上海的天气怎么样"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "timed out", "tool_call_id": "c1"},
        {"role": "assistant", "content": "I do not know."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And here?"},
                {"type": "image_url", "image_url": {"url": "https://a/b.png"}},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
            ],
        },
    ]


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = ToolSpec("weather", "The weather in a city.", SCHEMA)


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ({"temperature": 0.0}, "temperature", 0.0),
        ({"max_tokens": 7}, "max_tokens", 7),
        ({"stop": ("a", "b")}, "stop", ["a", "b"]),
        (
            {"tools": (WEATHER,)},
            "tools",
            [
                {
                    "type": "function",
                    "function": {"name": "weather", "description": "The weather in a city.", "parameters": SCHEMA},
                }
            ],
        ),
        (
            {"tools": (ToolSpec("long", "é" * 2000, SCHEMA),)},
            "tools",
            [{"type": "function", "function": {"name": "long", "description": "é" * 1024, "parameters": SCHEMA}}],
        ),
        ({"tool_choice": "required"}, "tool_choice", "required"),
        (
            {"tool_choice": NamedTool("weather")},
            "tool_choice",
            {"type": "function", "function": {"name": "weather"}},
        ),
        (
            {"response_schema": SCHEMA},
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}},
        ),
        ({"extra": {"seed": 3, "thinking": {"type": "enabled"}}}, "seed", 3),
        ({"extra": {"stream_options": None}}, "stream_options", None),
        ({"temperature": 1.0, "extra": {"temperature": 2}}, "temperature", 2),
    ],
)
def test_an_option_becomes_a_field_and_extra_wins(option: dict[str, Any], field: str, value: Any) -> None:
    bare = body_of(ModelRequest((HI,), "m"))
    body = body_of(ModelRequest((HI,), "m", **option))
    assert body[field] == value
    assert {name for name in bare if bare[name] != body[name]} <= {field}


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize("value", [object(), "\ud800", ENDLESS], ids=["object", "surrogate", "cycle"])
def test_what_json_cannot_say_is_the_callers_fault(value: Any) -> None:
    with pytest.raises(ProviderError) as raised:
        chat_request_body(ModelRequest((HI,), "m", extra={"x": value}))
    assert raised.value.code == "upstream.invalid_request"


def test_the_request_goes_to_the_endpoint_with_the_key() -> None:
    request = ModelRequest((HI,), "m")
    vendor_request = ChatWire().request(request, Endpoint("http://h/v1", "sk-key", {"X-Title": "t"}))
    assert vendor_request.url == "http://h/v1/chat/completions"
    assert vendor_request.headers == {
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "X-Title": "t",
        "Authorization": "Bearer sk-key",
    }
    assert vendor_request.content == chat_request_body(request)
    assert "Authorization" not in ChatWire().request(request, Endpoint("http://h/v1")).headers


async def test_nothing_that_people_see_holds_the_key() -> None:
    provider = OpenAIChatProvider(api_key="sk-secret", base_url="http://h/v1/")
    request = ChatWire().request(ModelRequest((HI,), "m"), Endpoint("http://h/v1", "sk-secret"))
    assert "http://h/v1/chat/completions" in repr(request)
    assert "'http://h/v1'" in repr(provider)
    assert "sk-secret" not in f"{provider!r} {provider} {request!r} {request}"
    await provider.aclose()
