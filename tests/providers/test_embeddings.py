"""Texts as vectors over HTTP: what each vendor is asked, what is made of its answer, and what is refused."""

from __future__ import annotations

import base64
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from engine.errors import ProviderError
from providers.embeddings import EMBEDDING_VENDORS, MAX_ANSWER_BYTES, MAX_BATCH, MAX_TEXT_CHARS, EmbeddingClient
from providers.http import open_client
from providers.registry import ModelConfig, ProviderConfigError
from providers.vendors import VENDORS
from server.testing.memory_network import MemoryNetwork
from tests.harness.raw_vendor import RawVendor, answer
from tests.harness.vendor import Act

KEY = "sk-secret-0123456789"
JSON = "Content-Type: application/json"
KEYS = {name: KEY for vendor in VENDORS.values() for name in vendor.key_variables}
LOCAL = ModelConfig(provider="openai_compatible", model="m", base_url="http://vendor/v1", api_key_env="LOCAL_KEY")


def packed(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


def vectors(*rows: Any, **more: Any) -> bytes:
    """An answer with these vectors, in this order."""
    data = [{"object": "embedding", "index": n, "embedding": row} for n, row in enumerate(rows)]
    return answer(msgspec.json.encode({"object": "list", "data": data, "usage": {"total_tokens": 3}} | more), JSON)


class Scene:
    """A client of embeddings and a server that follows scripts."""

    def __init__(self, network: MemoryNetwork, vendor: RawVendor, client: httpx.AsyncClient) -> None:
        self.network, self.vendor, self.client = network, vendor, client

    async def embed(self, texts: Sequence[str], config: ModelConfig = LOCAL) -> list[bytes]:
        return await EmbeddingClient(config, {"LOCAL_KEY": KEY}, self.client).embed(texts)

    async def fail(self, texts: Sequence[str] = ("a",)) -> ProviderError:
        with pytest.raises(ProviderError) as raised:
            await self.embed(texts)
        return raised.value

    def bodies(self) -> list[Any]:
        return [msgspec.json.decode(request.partition(b"\r\n\r\n")[2]) for request in self.vendor.requests]

    def open(self) -> int:
        return sum(connection.client.closed_at is None for connection in self.network.connections)


@asynccontextmanager
async def scene(*scripts: Iterable[Act]) -> AsyncIterator[Scene]:
    network, vendor = MemoryNetwork(), RawVendor(*scripts)
    async with trio.open_nursery() as nursery:
        vendor.start(nursery, network.listen("vendor", 80))
        async with open_client(network.connect) as client:
            yield Scene(network, vendor, client)
        nursery.cancel_scope.cancel()


class TestAsking:
    async def test_vectors_are_little_endian_floats_in_the_order_of_the_texts(self, autojump_clock: MockClock) -> None:
        data = [{"index": 1, "embedding": [0, 2]}, {"index": 0, "embedding": [0.5, -1.25]}]
        async with scene([answer(msgspec.json.encode({"data": data}), JSON)]) as s:
            assert await s.embed(["a", "b"]) == [packed(0.5, -1.25), packed(0, 2)]
            head = s.vendor.requests[0]
            assert head.startswith(b"POST /v1/embeddings HTTP/1.1\r\n")
            assert f"Bearer {KEY}".encode() in head
            assert s.bodies() == [{"model": "m", "input": ["a", "b"]}]

    async def test_a_server_that_leaves_the_index_out_means_the_order(self, autojump_clock: MockClock) -> None:
        data = [{"embedding": [1.0]}, {"embedding": [2.0]}]
        async with scene([answer(msgspec.json.encode({"data": data}), JSON)]) as s:
            assert await s.embed(["a", "b"]) == [packed(1), packed(2)]

    async def test_base64_is_taken_too(self, autojump_clock: MockClock) -> None:
        async with scene([vectors(base64.b64encode(packed(0.5, 3)).decode())]) as s:
            assert await s.embed(["a"]) == [packed(0.5, 3)]

    async def test_openai_is_asked_for_base64(self, autojump_clock: MockClock) -> None:
        config = ModelConfig(provider="openai", base_url="http://vendor/v1", api_key_env="LOCAL_KEY")
        async with scene([vectors([1.0])]) as s:
            await s.embed(["a"], config)
            assert s.bodies() == [{"model": "text-embedding-3-small", "input": ["a"], "encoding_format": "base64"}]

    async def test_many_texts_go_in_batches(self, autojump_clock: MockClock) -> None:
        texts = [str(n) for n in range(MAX_BATCH + 1)]
        async with scene([vectors(*[[float(n)] for n in range(MAX_BATCH)])], [vectors([64.0])]) as s:
            assert await s.embed(texts) == [packed(n) for n in range(MAX_BATCH + 1)]
            assert [len(body["input"]) for body in s.bodies()] == [MAX_BATCH, 1]
            assert len(s.network.connections) == 1

    async def test_qwen_takes_ten_texts(self, autojump_clock: MockClock) -> None:
        config = ModelConfig(provider="qwen", base_url="http://vendor/v1", api_key_env="LOCAL_KEY")
        async with scene([vectors(*[[1.0]] * 10)], [vectors([1.0])]) as s:
            await s.embed(["a"] * 11, config)
            assert [len(body["input"]) for body in s.bodies()] == [10, 1]

    async def test_nothing_to_embed_asks_nobody(self, autojump_clock: MockClock) -> None:
        async with scene() as s:
            assert await s.embed([]) == []
            assert s.vendor.requests == []

    async def test_a_long_text_is_cut_at_a_code_point(self, autojump_clock: MockClock) -> None:
        async with scene([vectors([1.0])]) as s:
            await s.embed(["語" * (MAX_TEXT_CHARS + 1)])
            assert s.bodies()[0]["input"] == ["語" * MAX_TEXT_CHARS]

    async def test_a_cancelled_request_closes_its_connection(self, autojump_clock: MockClock) -> None:
        async with scene(["hang"]) as s:
            with trio.move_on_after(0.15):
                await s.embed(["a"])
            assert trio.current_time() == 0.15
            assert s.open() == 0


class TestRefusing:
    @pytest.mark.parametrize(
        ("body", "said"),
        [
            (b'{"data": [', "cannot be used"),
            (b'{"data": []}', "one vector for each of 1"),
            (b'{"data": [{"index": 1, "embedding": [1]}]}', "one vector for each of 1"),
            (b'{"data": [{"embedding": [1]}, {"embedding": [1]}]}', "one vector for each of 1"),
            (b'{"data": [{"embedding": []}]}', "empty vectors"),
            (b'{"data": [{"embedding": ""}]}', "empty vectors"),
            (b'{"data": [{"embedding": "AAAA"}]}', "a vector that is none"),
            (b'{"data": [{"embedding": "?"}]}', "a vector that is none"),
            (b'{"data": [{"embedding": "\xc3\xa9"}]}', "a vector that is none"),
            (b'{"data": [{"embedding": [1e300]}]}', "a vector that is none"),
            (b'{"data": [{"embedding": "AADAfw=="}]}', "not of finite numbers"),
            (b'{"data": [{"embedding": [null]}]}', "cannot be used"),
        ],
    )
    async def test_what_is_no_vector(self, autojump_clock: MockClock, body: bytes, said: str) -> None:
        async with scene([answer(body, JSON)]) as s:
            error = await s.fail()
        assert error.code == "upstream.protocol"
        assert said in str(error)

    async def test_vectors_of_two_lengths(self, autojump_clock: MockClock) -> None:
        async with scene([vectors([1.0], [1.0, 2.0])]) as s:
            assert "several lengths" in str(await s.fail(["a", "b"]))

    async def test_an_answer_without_end(self, autojump_clock: MockClock) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {MAX_ANSWER_BYTES + 2}\r\n{JSON}\r\n\r\n".encode()
        async with scene([head + b" " * (MAX_ANSWER_BYTES + 1), "hang"]) as s:
            error = await s.fail()
            assert (error.code, str(MAX_ANSWER_BYTES) in str(error)) == ("upstream.protocol", True)
            assert s.open() == 0

    @pytest.mark.parametrize(
        ("script", "code"),
        [
            ([answer(b'{"error": {"code": "invalid_api_key"}}', JSON, status="401 No")], "upstream.auth"),
            ([answer(b'{"error": {"message": "slow down"}}', JSON, status="429 No")], "upstream.rate_limit"),
            ([answer(b'{"error": {"message": "no such model"}}', JSON, status="404 No")], "upstream.invalid_request"),
            ([answer(b'{"error": {"code": "context_length_exceeded"}}', JSON)], "upstream.context_length"),
            ([answer(b"<html>", "Content-Type: text/html")], "upstream.protocol"),
            ([answer(b"...", JSON, "Content-Encoding: gzip")], "upstream.protocol"),
            (["close"], "upstream.connection"),
            (
                [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n" + JSON.encode() + b"\r\n\r\n{", "close"],
                "upstream.connection",
            ),
            ([b"what?\r\n\r\n", "close"], "upstream.protocol"),
        ],
    )
    async def test_failures_have_the_codes_of_chats(
        self, autojump_clock: MockClock, script: list[Act], code: str
    ) -> None:
        async with scene(script) as s:
            assert (await s.fail()).code == code
            assert s.open() <= 1

    async def test_the_key_is_in_no_error_and_no_repr(self, autojump_clock: MockClock) -> None:
        async with scene([answer(b'{"error": {"message": "bad %s"}}' % KEY.encode(), JSON, status="400 No")]) as s:
            error = await s.fail()
            assert KEY not in str(error)
            assert KEY not in repr(EmbeddingClient(LOCAL, {"LOCAL_KEY": KEY}, s.client))

    async def test_not_even_a_key_that_looks_like_none(self, autojump_clock: MockClock) -> None:
        async with scene([answer(b'{"error": {"message": "bad sesame"}}', JSON, status="400 No")]) as s:
            with pytest.raises(ProviderError, match=r"bad \[removed\]"):
                await EmbeddingClient(LOCAL, {"LOCAL_KEY": "sesame"}, s.client).embed(["a"])

    async def test_nobody_there(self, autojump_clock: MockClock) -> None:
        async with open_client(MemoryNetwork().connect) as client:
            with pytest.raises(ProviderError) as raised:
                await EmbeddingClient(LOCAL, {"LOCAL_KEY": KEY}, client).embed(["a"])
        assert raised.value.code == "upstream.connection"


class TestVendors:
    @pytest.mark.parametrize(
        ("provider", "model", "url"),
        [
            ("openai", "text-embedding-3-small", "https://api.openai.com/v1/embeddings"),
            ("mistral", "mistral-embed", "https://api.mistral.ai/v1/embeddings"),
            (
                "gemini",
                "gemini-embedding-001",
                "https://generativelanguage.googleapis.com/v1beta/openai/embeddings",
            ),
            ("together", "intfloat/multilingual-e5-large-instruct", "https://api.together.xyz/v1/embeddings"),
            ("qwen", "text-embedding-v4", "https://dashscope.aliyuncs.com/compatible-mode/v1/embeddings"),
            ("zhipu", "embedding-3", "https://open.bigmodel.cn/api/paas/v4/embeddings"),
            ("ollama", "nomic-embed-text", "http://localhost:11434/v1/embeddings"),
        ],
    )
    async def test_where_they_are_asked(self, provider: str, model: str, url: str) -> None:
        asked: list[httpx.Request] = []
        async with httpx.AsyncClient(transport=Refusing(asked)) as client:
            embeddings = EmbeddingClient(ModelConfig(provider=provider), KEYS, client)
            with pytest.raises(ProviderError):
                await embeddings.embed(["a"])
        assert (embeddings.model, str(asked[0].url)) == (f"{provider}/{model}", url)
        assert asked[0].headers["Authorization"] == f"Bearer {KEY}"

    @pytest.mark.parametrize(
        ("base_url", "path"),
        [
            ("https://mine.openai.azure.com", "/openai/deployments/my%20one/embeddings"),
            ("https://mine.openai.azure.com/openai/v1", "/openai/v1/embeddings"),
        ],
    )
    async def test_azure_has_a_header_and_a_path_of_its_own(self, base_url: str, path: str) -> None:
        asked: list[httpx.Request] = []
        async with httpx.AsyncClient(transport=Refusing(asked)) as client:
            config = ModelConfig(provider="azure", model="my one", base_url=base_url)
            with pytest.raises(ProviderError):
                await EmbeddingClient(config, KEYS, client).embed(["a"])
        assert asked[0].url.raw_path.decode().partition("?")[0] == path
        assert asked[0].headers["api-key"] == KEY
        assert "Authorization" not in asked[0].headers

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            (ModelConfig(provider="anthropic"), "'anthropic' gives no embeddings here; these do: openai"),
            (ModelConfig(provider="nobody"), "'nobody' gives no embeddings"),
            (ModelConfig(provider="openai_compatible", base_url="http://x"), "needs a model for embeddings"),
            (ModelConfig(provider="openai_compatible", model="m"), "needs a base_url"),
            (ModelConfig(provider="openai"), "OPENAI_API_KEY"),
            (ModelConfig(provider="ollama", fallbacks=(ModelConfig(provider="openai"),)), "no fallbacks"),
        ],
    )
    async def test_what_cannot_be_asked_is_said_at_once(self, config: ModelConfig, said: str) -> None:
        async with open_client(MemoryNetwork().connect) as client:
            with pytest.raises(ProviderConfigError, match=said):
                EmbeddingClient(config, {}, client)

    def test_every_one_is_a_vendor_and_takes_a_batch(self) -> None:
        assert EMBEDDING_VENDORS.keys() <= VENDORS.keys()
        assert all(0 < vendor.batch <= MAX_BATCH for vendor in EMBEDDING_VENDORS.values())


class Refusing(httpx.AsyncBaseTransport):
    """Keeps the requests and connects to nobody."""

    def __init__(self, asked: list[httpx.Request]) -> None:
        self.asked = asked

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        raise httpx.ConnectError("nobody")


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
async def test_numbers_and_base64_say_the_same(row: list[float]) -> None:
    async with scene([vectors(row)], [vectors(base64.b64encode(packed(*row)).decode())]) as s:
        assert await s.embed(["a"]) == await s.embed(["a"]) == [packed(*row)]
