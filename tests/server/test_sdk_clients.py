"""The vendors' official Python SDKs as clients of the mock, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from engine.pieces import FinishPiece, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from providers.recording import RecordedFailure, RecordedRead, Recording, RecordingHeader
from server.vendor_server import create_vendor_app
from tests.harness.background import served
from tests.harness.recordings import steady_recording

QUICK = steady_recording(first=0.02, gap=0.02, last=0.1)
MS = 10**6


def recording(*reads: tuple[Piece, ...], failure: RecordedFailure | None = None) -> Recording:
    """An answer with a read every 10 ms."""
    fields = {name: getattr(QUICK.header, name) for name in QUICK.header.__struct_fields__} | {"failure": failure}
    timed = (RecordedRead(number * 10 * MS, read) for number, read in enumerate(reads, 1))
    return Recording(RecordingHeader(**fields), tuple(timed))


CALLING = recording(
    (ReasoningPiece("Two cities."),),
    (TextPiece("I look. "), TextPiece("流👀")),
    (ToolCallPiece(0, "call_1", "weather"), ToolCallPiece(0, arguments_fragment='{"city":')),
    (ToolCallPiece(0, arguments_fragment='"上海"}'),),
    (ToolCallPiece(1, "call_2", "weather", '{"city":"Bern"}'),),
    (UsagePiece(21, 8), FinishPiece("tool_calls")),
)
OVERLOADED = recording(
    (TextPiece("Half"),),
    failure=RecordedFailure(20 * MS, "upstream.overloaded", "the model's server reported an error"),
)
REFUSED = recording(failure=RecordedFailure(10 * MS, "upstream.rate_limit", "slow down"))

ASKED: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def mocked(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a mock that answers with the test's parameter."""
    with served(lambda _: create_vendor_app(request.param)) as url:
        yield url


def answering(answer: Recording) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mocked", [answer], indirect=True, ids=[""])


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def anthropic_client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="any", max_retries=0)


class TestOpenAI:
    @answering(QUICK)
    def test_text_and_usage(self, mocked: str) -> None:
        with openai_client(mocked) as client:
            stream = client.chat.completions.create(
                model="m", messages=ASKED, stream=True, stream_options={"include_usage": True}
            )
            chunks = list(stream)
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(texts) == QUICK.text
        assert chunks[-1].usage is not None
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (7, 5)
        assert {chunk.id for chunk in chunks} == {"chatcmpl-lumos00000001"}
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"

    @answering(CALLING)
    def test_tool_calls_put_together_by_the_sdk(self, mocked: str) -> None:
        with openai_client(mocked) as client, client.chat.completions.stream(model="m", messages=ASKED) as stream:
            (choice,) = stream.get_final_completion().choices
        assert choice.message.content == "I look. 流👀"
        calls = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
        assert calls == [("call_1", "weather", '{"city":"上海"}'), ("call_2", "weather", '{"city":"Bern"}')]
        assert choice.finish_reason == "tool_calls"

    @answering(CALLING)
    def test_an_answer_that_is_not_streamed(self, mocked: str) -> None:
        with openai_client(mocked) as client:
            completion = client.chat.completions.create(model="m", messages=ASKED)
        assert completion.choices[0].message.content == "I look. 流👀"
        assert completion.usage is not None
        assert completion.usage.total_tokens == 29

    @answering(CALLING)
    def test_responses(self, mocked: str) -> None:
        with openai_client(mocked) as client, client.responses.stream(model="m", input="Hi") as stream:
            kinds = [event.type for event in stream]
            response = stream.get_final_response()
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        assert response.output_text == "I look. 流👀"
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
        calls = [(item.call_id, item.arguments) for item in response.output if item.type == "function_call"]
        assert calls == [("call_1", '{"city":"上海"}'), ("call_2", '{"city":"Bern"}')]
        assert response.usage is not None
        assert response.usage.output_tokens == 8

    @answering(OVERLOADED)
    def test_a_failure_in_the_stream(self, mocked: str) -> None:
        said = ""
        with openai_client(mocked) as client:
            stream = client.chat.completions.create(model="m", messages=ASKED, stream=True)
            with pytest.raises(openai.APIError) as caught:  # noqa: PT012 - what came before it counts too
                for chunk in stream:
                    said += chunk.choices[0].delta.content or ""
        assert said == "Half"
        assert caught.value.code == "engine_overloaded"

    @answering(REFUSED)
    def test_a_failure_before_it(self, mocked: str) -> None:
        with openai_client(mocked) as client, pytest.raises(openai.RateLimitError, match="slow down"):
            client.chat.completions.create(model="m", messages=ASKED, stream=True)

    @answering(QUICK)
    def test_without_a_key(self, mocked: str) -> None:
        keyless = {"Authorization": openai.Omit()}
        with openai_client(mocked) as client, pytest.raises(openai.AuthenticationError, match="no key"):
            client.chat.completions.create(model="m", messages=ASKED, stream=True, extra_headers=keyless)

    @answering(QUICK)
    def test_models(self, mocked: str) -> None:
        with openai_client(mocked) as client:
            assert "gpt4o-demo" in [model.id for model in client.models.list()]

    @answering(QUICK)
    def test_azure(self, mocked: str) -> None:
        client = openai.AzureOpenAI(azure_endpoint=mocked, api_key="any", api_version="2024-10-21", max_retries=0)
        with client:
            stream = client.chat.completions.create(model="m", messages=ASKED, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == QUICK.text

    # The SDK lets go of its own generators at the end mark; on trio that is a warning.
    @pytest.mark.filterwarnings("ignore:Async generator '(httpx2|openai):ResourceWarning")
    @answering(QUICK)
    async def test_the_async_client_on_trio(self, mocked: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{mocked}/v1", api_key="any", max_retries=0) as client:
            stream = await client.chat.completions.create(model="m", messages=ASKED, stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == QUICK.text


class TestAnthropic:
    @answering(QUICK)
    def test_text_and_usage(self, mocked: str) -> None:
        with (
            anthropic_client(mocked) as client,
            client.messages.stream(model="m", max_tokens=9, messages=ASKED) as stream,
        ):
            assert "".join(stream.text_stream) == QUICK.text
            message = stream.get_final_message()
        assert (message.usage.input_tokens, message.usage.output_tokens) == (7, 5)
        assert message.stop_reason == "end_turn"

    @answering(CALLING)
    def test_tool_calls_put_together_by_the_sdk(self, mocked: str) -> None:
        with (
            anthropic_client(mocked) as client,
            client.messages.stream(model="m", max_tokens=9, messages=ASKED) as stream,
        ):
            message = stream.get_final_message()
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
        calls = [(block.id, block.name, block.input) for block in message.content if block.type == "tool_use"]
        assert calls == [("call_1", "weather", {"city": "上海"}), ("call_2", "weather", {"city": "Bern"})]
        assert message.stop_reason == "tool_use"

    @answering(CALLING)
    def test_an_answer_that_is_not_streamed(self, mocked: str) -> None:
        with anthropic_client(mocked) as client:
            message = client.messages.create(model="m", max_tokens=9, messages=ASKED)
        assert [block.text for block in message.content if block.type == "text"] == ["I look. 流👀"]
        assert message.usage.output_tokens == 8

    @answering(OVERLOADED)
    def test_a_failure_in_the_stream(self, mocked: str) -> None:
        with (
            anthropic_client(mocked) as client,
            client.messages.stream(model="m", max_tokens=9, messages=ASKED) as stream,
            pytest.raises(anthropic.APIStatusError, match="overloaded_error"),
        ):
            stream.get_final_message()

    @answering(REFUSED)
    def test_a_failure_before_it(self, mocked: str) -> None:
        with anthropic_client(mocked) as client, pytest.raises(anthropic.RateLimitError, match="slow down"):
            client.messages.create(model="m", max_tokens=9, messages=ASKED)

    @answering(QUICK)
    def test_without_a_key(self, mocked: str) -> None:
        keyless = {"X-Api-Key": anthropic.Omit(), "Authorization": anthropic.Omit()}
        with anthropic_client(mocked) as client, pytest.raises(anthropic.AuthenticationError, match="no key"):
            client.messages.create(model="m", max_tokens=9, messages=ASKED, extra_headers=keyless)

    @answering(QUICK)
    async def test_the_async_client_on_trio(self, mocked: str) -> None:
        async with (
            anthropic.AsyncAnthropic(base_url=mocked, api_key="any", max_retries=0) as client,
            client.messages.stream(model="m", max_tokens=9, messages=ASKED) as stream,
        ):
            assert "".join([text async for text in stream.text_stream]) == QUICK.text
