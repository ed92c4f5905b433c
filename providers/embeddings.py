"""Texts as vectors: OpenAI's embeddings API, as most vendors speak it, for recall by meaning.

A vector leaves here as 32-bit floats, little-endian, so that it can be stored as it is; nothing here does arithmetic.
"""

from __future__ import annotations

import binascii
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from engine.errors import ProviderError

from .http import VendorRequest, fetch_json
from .openai_chat import AZURE_API_VERSION
from .registry import ModelConfig, ProviderConfigError, find_endpoint, find_vendor
from .vendor_errors import error_from_object
from .wire import Endpoint, decode_json, encode_json

MAX_BATCH = 64
MAX_TEXT_CHARS = 4000
"""Of each text; the rest is left out. Most models take 8192 tokens, and in Chinese a character can be two."""

MAX_ANSWER_BYTES = 16 * 2**20
"""64 vectors of 4096 numbers in JSON are 6 MB."""

FLOAT_BYTES = 4


class EmbeddingVendor(msgspec.Struct, frozen=True, kw_only=True):
    """What a vendor's embeddings API has of its own.

    Attributes:
        default_model: empty where the configuration has to name one.
        path: what follows the vendor's base URL.
        batch: texts that one request may hold.
        base64: whether vectors may be asked for in base64, which is a quarter of their size as JSON numbers.
    """

    default_model: str = ""
    path: str = "/embeddings"
    batch: int = MAX_BATCH
    base64: bool = False


EMBEDDING_VENDORS: dict[str, EmbeddingVendor] = {
    "openai": EmbeddingVendor(default_model="text-embedding-3-small", base64=True),
    "azure": EmbeddingVendor(base64=True),
    "gemini": EmbeddingVendor(default_model="gemini-embedding-001", path="/openai/embeddings"),
    "mistral": EmbeddingVendor(default_model="mistral-embed"),
    "together": EmbeddingVendor(default_model="intfloat/multilingual-e5-large-instruct"),
    "qwen": EmbeddingVendor(default_model="text-embedding-v4", batch=10),
    "zhipu": EmbeddingVendor(default_model="embedding-3"),
    "ollama": EmbeddingVendor(default_model="nomic-embed-text", path="/v1/embeddings"),
    "openai_compatible": EmbeddingVendor(),
}
"""By the names of ``providers.vendors``. Gemini and Ollama speak OpenAI's format beside their own."""


class _Vector(msgspec.Struct):
    embedding: list[float] | str
    index: int | None = None


class _Answer(msgspec.Struct):
    data: list[_Vector] = []
    error: Any = None


_decoder = msgspec.json.Decoder(_Answer)


class EmbeddingClient:
    """Asks one model for the vectors of texts. ``client`` stays the caller's to close; no deadline is set here.

    Attributes:
        model: provider and model in one name: vectors of two models have nothing to do with each other.
        batch: texts that one request holds at most.
    """

    def __init__(self, config: ModelConfig, environment: Mapping[str, str], client: httpx.AsyncClient) -> None:
        """Read the key from the environment.

        Raises:
            ProviderConfigError: a provider without embeddings, or without its model, URL or key.
        """
        offer, vendor = EMBEDDING_VENDORS.get(config.provider), find_vendor(config.provider)
        if offer is None or vendor is None:
            known = ", ".join(EMBEDDING_VENDORS)
            raise ProviderConfigError(f"provider {config.provider!r} gives no embeddings here; these do: {known}")
        if config.fallbacks:
            raise ProviderConfigError("embeddings have no fallbacks: vectors of two models cannot be compared")
        model = config.model or offer.default_model
        if not model:
            raise ProviderConfigError(f"provider {config.provider!r} needs a model for embeddings")
        self.model = f"{config.provider}/{model}"
        self.batch = offer.batch
        self._name = model
        self._offer = offer
        self._endpoint = find_endpoint(config, vendor, environment)
        self._headers = _headers(config.provider, self._endpoint)
        self._url = _url(config.provider, offer, self._endpoint, model)
        self._client = client

    def __repr__(self) -> str:
        return f"EmbeddingClient({self.model!r}, {self._endpoint!r})"

    async def embed(self, texts: Sequence[str]) -> list[bytes]:
        """The vector of each text, in their order; in batches, one request after the other.

        Raises:
            ProviderError: a batch failed; none of the vectors is returned.
        """
        vectors: list[bytes] = []
        for start in range(0, len(texts), self.batch):
            vectors += await self._embed_batch(texts[start : start + self.batch])
        return vectors

    async def _embed_batch(self, texts: Sequence[str]) -> list[bytes]:
        body: dict[str, Any] = {"model": self._name, "input": [text[:MAX_TEXT_CHARS] for text in texts]}
        if self._offer.base64:
            body["encoding_format"] = "base64"
        request = VendorRequest(self._url, self._headers, encode_json(body))
        try:
            answer = decode_json(_decoder, await fetch_json(self._client, request, MAX_ANSWER_BYTES))
            if answer.error is not None:
                raise error_from_object(answer.error)
            return _vectors_in_order(answer.data, len(texts))
        except ProviderError as error:  # its text is for logs, and some vendors quote the key
            if key := self._endpoint.api_key:
                error.args = (str(error).replace(key, "[removed]"),)
            raise


def _url(provider: str, offer: EmbeddingVendor, endpoint: Endpoint, model: str) -> str:
    if provider == "azure" and not endpoint.base_url.endswith("/v1"):
        deployment = quote(model, safe="")
        return f"{endpoint.base_url}/openai/deployments/{deployment}/embeddings?api-version={AZURE_API_VERSION}"
    return endpoint.base_url + offer.path


def _headers(provider: str, endpoint: Endpoint) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept": "application/json", **endpoint.headers}
    if endpoint.api_key:
        name, value = ("api-key", "{}") if provider == "azure" else ("Authorization", "Bearer {}")
        headers[name] = value.format(endpoint.api_key)
    return headers


def _vectors_in_order(data: list[_Vector], count: int) -> list[bytes]:
    """The vectors by their index; a server that leaves it out means their order."""
    by_index = {n if vector.index is None else vector.index: vector.embedding for n, vector in enumerate(data)}
    if len(data) != count or by_index.keys() != set(range(count)):
        raise ProviderError(
            "upstream.protocol", f"the model's server did not send one vector for each of {count} texts"
        )
    vectors = [_packed(by_index[n]) for n in range(count)]
    if not vectors[0] or len({len(vector) for vector in vectors}) > 1:
        raise ProviderError("upstream.protocol", "the model's server sent empty vectors or vectors of several lengths")
    return vectors


def _packed(embedding: list[float] | str) -> bytes:
    """The vector as 32-bit floats, little-endian, each of them a finite number."""
    try:
        if isinstance(embedding, str):
            packed = binascii.a2b_base64(embedding, strict_mode=True)
            numbers: Sequence[float] = struct.unpack(f"<{len(packed) // FLOAT_BYTES}f", packed)
        else:
            packed, numbers = struct.pack(f"<{len(embedding)}f", *embedding), embedding
    except (binascii.Error, ValueError, struct.error, OverflowError) as error:
        raise ProviderError("upstream.protocol", "the model's server sent a vector that is none") from error
    if not all(map(math.isfinite, numbers)):
        raise ProviderError("upstream.protocol", "the model's server sent a vector that is not of finite numbers")
    return packed
