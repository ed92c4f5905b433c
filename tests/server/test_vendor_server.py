"""The mock of the vendors' APIs, in memory on the virtual clock: every vendor's own adapter is its client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest
import trio
from trio.testing import MockClock

from engine.errors import ProviderError, ProviderErrorCode
from engine.pieces import (
    ContinuationPiece,
    FinishPiece,
    Piece,
    ReasoningPiece,
    RequestSentPiece,
    TextPiece,
    ToolCallPiece,
    UsagePiece,
)
from engine.provider import Message, ModelRequest
from providers.encoders import MOCKED_VENDORS
from providers.http import open_client
from providers.openai_chat import ChatWire
from providers.recorder import Recorder
from providers.recording import RecordedFailure, RecordedRead, Recording, load, names
from providers.vendors import VENDORS
from providers.wire import Endpoint, HttpProvider
from server.serving import serve
from server.testing.memory_network import MemoryNetwork
from server.vendor_server import create_vendor_app
from tests.harness.recordings import steady_recording

BASE = "http://vendors"
STEADY = steady_recording(first=1.5, gap=0.5, last=5.0)
QUESTION = ModelRequest((Message("user", "Hi"),), "some-model")
CHAT_BODY = {"model": "some-model", "stream": True, "messages": []}

by_vendor = pytest.mark.parametrize("name", VENDORS)


def base_url(name: str) -> str:
    """Where the provider's adapter finds its vendor on the mock."""
    return BASE + MOCKED_VENDORS[name].base_path


def remade(recording: Recording, *reads: RecordedRead, **header: Any) -> Recording:
    return Recording(msgspec.structs.replace(recording.header, **header), reads or recording.reads)


SPOKEN = remade(
    STEADY,
    RecordedRead(10**9, (ReasoningPiece("Hm."),)),
    RecordedRead(2 * 10**9, (TextPiece("Ich "), TextPiece("schaue 👀."))),
    RecordedRead(3 * 10**9, (ToolCallPiece(0, "call_1", "weather"), ToolCallPiece(0, arguments_fragment='{"city"'))),
    RecordedRead(3 * 10**9 + 1, (ToolCallPiece(0, arguments_fragment=':"上海"}'),)),
    RecordedRead(4 * 10**9, (UsagePiece(9, 7), FinishPiece("tool_calls"))),
)


@dataclass
class Mock:
    """The mock on a network in memory, and a client of it."""

    network: MemoryNetwork
    client: httpx.AsyncClient
    nursery: trio.Nursery

    def provider(self, name: str, key: str | None = "k-123") -> HttpProvider:
        """Lumos's own adapter of that vendor, as a client of the mock."""
        return HttpProvider(name, VENDORS[name].wire, Endpoint(base_url(name), key), self.client)

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """One request, answered whole."""
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return await self.client.post(BASE + path, content=content, headers=headers)


@asynccontextmanager
async def open_mock(
    recording: Recording | None = STEADY, providers: Collection[str] = tuple(MOCKED_VENDORS)
) -> AsyncIterator[Mock]:
    network = MemoryNetwork()
    client = open_client(network.connect)
    app = create_vendor_app(recording, providers)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, app, [network.listen("vendors", 80)], trio.Event())
        yield Mock(network, client, nursery)
        nursery.cancel_scope.cancel()
    await client.aclose()


class Heard:
    """What an adapter said, each call of ``emit`` with its time since the request."""

    def __init__(self) -> None:
        self.started_at = trio.current_time()
        self.calls: list[tuple[float, list[Piece]]] = []

    def emit(self, pieces: Sequence[Piece]) -> None:
        kept: list[Piece] = [piece for piece in pieces if not isinstance(piece, RequestSentPiece | ContinuationPiece)]
        if kept:
            self.calls.append((trio.current_time() - self.started_at, kept))

    @property
    def pieces(self) -> list[Piece]:
        return [piece for _, pieces in self.calls for piece in pieces]

    def texts(self) -> list[tuple[float, str]]:
        """The texts, and when they came."""
        return [
            (round(at, 9), piece.text) for at, pieces in self.calls for piece in pieces if isinstance(piece, TextPiece)
        ]


async def listen(provider: HttpProvider, request: ModelRequest = QUESTION) -> Heard:
    heard = Heard()
    await provider.stream(request, heard.emit)
    return heard


def text_times(recording: Recording) -> list[tuple[float, str]]:
    return [
        (read.at_ns / 1e9, piece.text)
        for read in recording.reads
        for piece in read.pieces
        if isinstance(piece, TextPiece)
    ]


def arguments(pieces: Sequence[Piece]) -> list[str]:
    """Each call's arguments, by the order of the calls."""
    calls: dict[int, str] = {}
    for piece in pieces:
        if isinstance(piece, ToolCallPiece):
            calls[piece.index] = calls.get(piece.index, "") + piece.arguments_fragment
    return list(calls.values())


class TestStreams:
    def test_every_vendor_is_mocked(self) -> None:
        assert MOCKED_VENDORS.keys() == VENDORS.keys()

    @by_vendor
    async def test_each_adapter_gets_the_recording_in_its_timing(self, name: str, autojump_clock: MockClock) -> None:
        async with open_mock(providers=[name]) as mock:
            heard = await listen(mock.provider(name))
        assert heard.texts() == text_times(STEADY)
        assert UsagePiece(7, 8) in heard.pieces
        assert FinishPiece("stop") in heard.pieces[-2:]

    @by_vendor
    async def test_each_adapter_gets_reasoning_and_calls(self, name: str, autojump_clock: MockClock) -> None:
        async with open_mock(SPOKEN, [name]) as mock:
            pieces = (await listen(mock.provider(name))).pieces
        assert [piece.text for piece in pieces if isinstance(piece, ReasoningPiece)] == ["Hm."]
        assert arguments(pieces) == ['{"city":"上海"}']
        (call,) = (piece for piece in pieces if isinstance(piece, ToolCallPiece) and piece.name)
        assert call.name == "weather"
        assert name == "baidu_v1" or call.call_id == "call_1"
        assert UsagePiece(9, 7) in pieces
        assert FinishPiece("tool_calls") in pieces

    @pytest.mark.parametrize(
        ("name", "recording"), [("openai", name) for name in names()] + [("gemini", "gpt4o-short")]
    )
    async def test_the_model_picks_a_recording(self, name: str, recording: str, autojump_clock: MockClock) -> None:
        async with open_mock() as mock:
            heard = await listen(mock.provider(name), ModelRequest(QUESTION.messages, recording))
        assert heard.texts() == text_times(load(recording))

    async def test_a_late_read_makes_no_other_late(self, autojump_clock: MockClock) -> None:
        """The body of the request takes a second to come: what is due then comes at once, the rest in its time."""
        async with open_mock() as mock:
            stream = await mock.network.connect("vendors", 80)
            body = msgspec.json.encode(CHAT_BODY)
            lines = "POST /v1/chat/completions HTTP/1.1", "Host: v", "Authorization: Bearer k"
            head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
            asked_at = trio.current_time()
            await stream.send_all(head.encode())
            await trio.sleep(1.75)
            await stream.send_all(body)
            times = {}
            received = b""
            while b"[DONE]" not in received:
                received += await stream.receive_some()
                times[received.count(b"word")] = trio.current_time() - asked_at
            await stream.aclose()
        assert times[1] == pytest.approx(1.75)
        assert times[2] == pytest.approx(2.0)

    async def test_a_client_that_leaves_ends_its_own_answer_alone(self, autojump_clock: MockClock) -> None:
        async with open_mock() as mock:
            heard: list[Heard] = []

            async def stay() -> None:
                heard.append(await listen(mock.provider("anthropic")))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(stay)
                with trio.move_on_after(2.1):
                    await listen(mock.provider("openai"))
                await trio.testing.wait_all_tasks_blocked()
                (kept,) = mock.network.open_connections()
            assert heard[0].texts() == text_times(STEADY)
            assert kept.is_open

    async def test_the_answer_is_told_the_model_that_was_asked(self, autojump_clock: MockClock) -> None:
        async with open_mock() as mock:
            response = await mock.post("/v1/chat/completions", CHAT_BODY, Authorization="Bearer k")
        assert b'"model":"some-model"' in response.content
        assert response.headers["content-type"] == "text/event-stream"

    async def test_two_answers_have_ids_of_their_own(self, autojump_clock: MockClock) -> None:
        async with open_mock() as mock:
            ids = {
                (
                    await mock.post("/v1/chat/completions", CHAT_BODY | {"stream": False}, Authorization="Bearer k")
                ).json()["id"]
                for _ in range(2)
            }
        assert ids == {"chatcmpl-lumos00000001", "chatcmpl-lumos00000002"}

    @pytest.mark.parametrize(("asks", "name"), [(None, "openai"), (True, "openai"), (None, "mistral")])
    async def test_usage_comes_as_the_vendor_has_it(
        self, asks: bool | None, name: str, autojump_clock: MockClock
    ) -> None:
        options = {} if asks is None else {"stream_options": {"include_usage": asks}}
        async with open_mock(providers=[name]) as mock:
            response = await mock.post("/v1/chat/completions", CHAT_BODY | options, Authorization="Bearer k")
        assert (b'"completion_tokens":8' in response.content) == bool(asks or name == "mistral")

    async def test_dashscope_repeats_all_unless_told_not_to(self, autojump_clock: MockClock) -> None:
        body = {"model": "m", "input": {}, "parameters": {}}
        async with open_mock() as mock:
            path = "/api/v1/services/aigc/text-generation/generation"
            response = await mock.post(path, body, Authorization="Bearer k")
        assert b'"content":"word0 word1 word2 "' in response.content


class TestRawBytes:
    async def test_a_recording_of_a_recording_is_byte_for_byte_the_same(self, autojump_clock: MockClock) -> None:
        """Recorded from the mock with its raw bytes, then served: the same bytes in the same reads."""
        async with open_mock(SPOKEN) as mock:
            recorder = Recorder(mock.provider("anthropic"))
            await recorder.stream(QUESTION, lambda pieces: None)
            first = recorder.recording(name="first", title="", recorded=STEADY.header.recorded, source="", licence="")
        assert first.has_raw
        assert first.header.request["model"] == "some-model"
        async with open_mock(first) as mock:
            recorder = Recorder(mock.provider("anthropic"))
            await recorder.stream(ModelRequest(QUESTION.messages, "another"), lambda pieces: None)
            second = recorder.recording(name="first", title="", recorded=STEADY.header.recorded, source="", licence="")
        assert [read.raw for read in second.reads] == [read.raw for read in first.reads]
        assert second.reads == first.reads

    async def test_another_vendors_bytes_are_not_sent(self, autojump_clock: MockClock) -> None:
        raw = remade(
            STEADY,
            RecordedRead(10**9, (TextPiece("a"), FinishPiece("stop")), b"data: of Ollama's\n\n"),
            provider="ollama",
        )
        async with open_mock(raw) as mock:
            heard = await listen(mock.provider("openai"))
            assert heard.texts() == [(1.0, "a")]
            response = await mock.post("/api/chat", CHAT_BODY)
        assert response.content == b"data: of Ollama's\n\n"


class TestFailures:
    @by_vendor
    async def test_in_the_stream(self, name: str, autojump_clock: MockClock) -> None:
        failure = RecordedFailure(5 * 10**9, "upstream.rate_limit", "slow down")
        recording = remade(STEADY, RecordedRead(10**9, (TextPiece("Half"),)), failure=failure)
        async with open_mock(recording) as mock:
            started_at = trio.current_time()
            with pytest.raises(ProviderError, match="slow down") as caught:
                await listen(mock.provider(name))
            assert trio.current_time() - started_at == 5.0
        unkindly = name in {"cohere", "ollama"}
        assert caught.value.code == ("upstream.server" if unkindly else "upstream.rate_limit")

    @by_vendor
    @pytest.mark.parametrize("code", ["upstream.auth", "upstream.rate_limit", "upstream.overloaded", "upstream.server"])
    async def test_before_the_stream(self, name: str, code: ProviderErrorCode, autojump_clock: MockClock) -> None:
        header = msgspec.structs.replace(STEADY.header, failure=RecordedFailure(2 * 10**9, code, "no"))
        async with open_mock(Recording(header, ())) as mock:
            started_at = trio.current_time()
            with pytest.raises(ProviderError) as caught:
                await listen(mock.provider(name))
            assert trio.current_time() - started_at == 2.0
        assert caught.value.code == code

    @by_vendor
    async def test_an_answer_that_was_cut_is_cut(self, name: str, autojump_clock: MockClock) -> None:
        failure = RecordedFailure(3 * 10**9, "upstream.truncated", "cut")
        recording = remade(STEADY, RecordedRead(10**9, (TextPiece("Half"),)), failure=failure)
        async with open_mock(recording) as mock:
            with pytest.raises(ProviderError) as caught:
                await listen(mock.provider(name))
        assert caught.value.code == "upstream.truncated"


class TestRefusals:
    @by_vendor
    async def test_without_a_key(self, name: str, autojump_clock: MockClock) -> None:
        vendor = MOCKED_VENDORS[name]
        async with open_mock(providers=[name]) as mock:
            if not vendor.key_places:
                assert (await listen(mock.provider(name, key=None))).texts()
                return
            with pytest.raises(ProviderError) as caught:
                await listen(mock.provider(name, key=None))
        assert caught.value.code == "upstream.auth"

    @by_vendor
    async def test_what_is_no_json(self, name: str, autojump_clock: MockClock) -> None:
        asked = VENDORS[name].wire.request(QUESTION, Endpoint(base_url(name), "key"))
        async with open_mock() as mock:
            for body in (b"{", b"[]", b"\xff", b'"text"'):
                response = await mock.client.post(asked.url, content=body, headers=asked.headers)
                assert response.status_code == (200 if name == "baidu_v1" else 400)
                assert b"no JSON object" in response.content

    async def test_an_unknown_model_without_a_recording_for_it(self, autojump_clock: MockClock) -> None:
        async with open_mock(None) as mock:
            response = await mock.post("/v1/chat/completions", CHAT_BODY, Authorization="Bearer k")
            assert (await listen(mock.provider("openai"), ModelRequest((), "gpt4o-short"))).texts()
        assert response.status_code == 404
        assert "gpt4o-demo" in response.json()["error"]["message"]

    async def test_no_model(self, autojump_clock: MockClock) -> None:
        async with open_mock() as mock:
            response = await mock.post("/v1/messages", {"stream": True}, **{"x-api-key": "k"})
        assert response.status_code == 400
        assert response.json() == {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "the request names no model"},
        }

    async def test_paths_of_vendors_that_are_not_served(self, autojump_clock: MockClock) -> None:
        async with open_mock(providers=["anthropic"]) as mock:
            response = await mock.post("/v1/chat/completions", CHAT_BODY, Authorization="Bearer k")
            assert (await mock.client.get(BASE + "/v1/models")).status_code == 404
        assert response.status_code == 404

    async def test_an_unknown_provider(self) -> None:
        with pytest.raises(KeyError):
            create_vendor_app(STEADY, ["nobody"])


class TestWholeAnswers:
    async def test_openai(self, autojump_clock: MockClock) -> None:
        async with open_mock() as mock:
            started_at = trio.current_time()
            body = CHAT_BODY | {"stream": False}
            response = await mock.post("/v1/chat/completions", body, Authorization="Bearer k")
            assert trio.current_time() - started_at == 5.0
        (choice,) = response.json()["choices"]
        assert choice["message"]["content"] == STEADY.text
        assert response.json()["usage"]["total_tokens"] == 15

    async def test_anthropic(self, autojump_clock: MockClock) -> None:
        async with open_mock(SPOKEN) as mock:
            response = await mock.post("/v1/messages", {"model": "m"}, **{"x-api-key": "k"})
        kinds = [block["type"] for block in response.json()["content"]]
        assert kinds == ["thinking", "text", "tool_use"]
        assert response.json()["stop_reason"] == "tool_use"

    async def test_a_failure(self, autojump_clock: MockClock) -> None:
        failure = RecordedFailure(9 * 10**9, "upstream.overloaded", "too busy")
        recording = remade(STEADY, RecordedRead(10**9, (TextPiece("Half"),)), failure=failure)
        async with open_mock(recording) as mock:
            response = await mock.post("/v1/messages", {"model": "m"}, **{"x-api-key": "k"})
        assert response.status_code == 529
        assert response.json()["error"]["type"] == "overloaded_error"

    @pytest.mark.parametrize("path", ["/v1/responses", "/v2/chat", "/api/chat"])
    async def test_others_serve_streams_alone(self, path: str, autojump_clock: MockClock) -> None:
        async with open_mock() as mock:
            response = await mock.post(path, CHAT_BODY | {"stream": False}, Authorization="Bearer k")
        assert response.status_code == 400
        assert b"streams alone" in response.content


class TestModels:
    async def test_the_list(self, autojump_clock: MockClock) -> None:
        async with open_mock() as mock:
            response = await mock.client.get(BASE + "/v1/models", headers={"Authorization": "Bearer k"})
        assert {model["id"] for model in response.json()["data"]} == {*names(), "steady"}

    async def test_it_wants_a_key(self, autojump_clock: MockClock) -> None:
        async with open_mock() as mock:
            response = await mock.client.get(BASE + "/v1/models")
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"


async def test_the_key_is_in_no_answer(autojump_clock: MockClock) -> None:
    async with open_mock() as mock:
        response = await mock.post("/v1/chat/completions", b"{", Authorization="Bearer sk-secret")
    assert b"sk-secret" not in response.content


def test_the_plain_wire_is_openai_compatible() -> None:
    assert isinstance(VENDORS["openai_compatible"].wire, ChatWire)
