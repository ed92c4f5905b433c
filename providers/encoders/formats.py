"""The formats and the vendors that speak them: what a mock of a vendor's API needs to know, in two tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import msgspec

from engine.errors import ProviderErrorCode

from . import anthropic, baidu_v1, cohere, dashscope, gemini, ollama, openai_chat, openai_responses, whole
from .base import AnswerFacts, Encoder

KeyPlace: TypeAlias = Literal["bearer token", "x-api-key", "api-key", "x-goog-api-key", "?key", "?access_token"]

STATUSES: dict[ProviderErrorCode, int] = {
    "upstream.auth": 401,
    "upstream.rate_limit": 429,
    "upstream.overloaded": 503,
    "upstream.context_length": 400,
    "upstream.content_policy": 400,
    "upstream.invalid_request": 400,
}
"""The HTTP status of an error; 500 for the others."""


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """A wire format from the vendor's side.

    Attributes:
        error_body: an error as JSON.
        statuses: HTTP statuses where they are not those of ``STATUSES``.
        whole: the answer that is not streamed; None where only streams are served.
        streams: whether a request's body asks for a stream.
        facts: what a request's body says that the answer depends on, as fields of ``AnswerFacts``.
    """

    encoder: type[Encoder]
    error_body: Callable[[ProviderErrorCode, str], Any]
    statuses: Mapping[ProviderErrorCode, int] = {}
    whole: Callable[[whole.WholeAnswer, AnswerFacts], dict[str, Any]] | None = None
    streams: Callable[[Mapping[str, Any]], bool] = lambda body: body.get("stream") is True
    facts: Callable[[Mapping[str, Any]], dict[str, bool]] = lambda _: {}

    def status(self, code: ProviderErrorCode) -> int:
        """The HTTP status of an error."""
        return self.statuses.get(code, STATUSES.get(code, 500))


def _object(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name)
    return value if isinstance(value, dict) else {}


CHAT = Format(
    encoder=openai_chat.ChatEncoder,
    error_body=openai_chat.error_body,
    whole=whole.chat_completion,
    facts=lambda body: {"asks_usage": _object(body, "stream_options").get("include_usage") is True},
)
CHAT_WITH_USAGE = msgspec.structs.replace(CHAT, facts=lambda _: {})
"""As some vendors have it: usage comes unasked."""

RESPONSES = Format(encoder=openai_responses.ResponsesEncoder, error_body=openai_chat.error_body)
ANTHROPIC = Format(
    encoder=anthropic.MessagesEncoder,
    error_body=anthropic.error_body,
    statuses={"upstream.overloaded": 529, "upstream.context_length": 413},
    whole=whole.anthropic_message,
)
GEMINI = Format(encoder=gemini.GenerateContentEncoder, error_body=gemini.error_body, streams=lambda _: True)
COHERE = Format(encoder=cohere.CohereEncoder, error_body=cohere.error_body, statuses={"upstream.context_length": 413})
OLLAMA = Format(
    encoder=ollama.OllamaEncoder,
    error_body=ollama.error_body,
    statuses={"upstream.context_length": 413},
    streams=lambda body: body.get("stream") is not False,
)
DASHSCOPE = Format(
    encoder=dashscope.DashScopeEncoder,
    error_body=dashscope.error_body,
    streams=lambda _: True,
    facts=lambda body: {"cumulative": _object(body, "parameters").get("incremental_output") is not True},
)
BAIDU_V1 = Format(
    encoder=baidu_v1.ErnieEncoder,
    error_body=baidu_v1.error_body,
    statuses=dict.fromkeys([*STATUSES, "upstream.server"], 200),
)


class MockedVendor(msgspec.Struct, frozen=True, kw_only=True):
    """Where a vendor's API is, from its host on, and what opens it.

    Attributes:
        paths: of the requests; ``<model>`` is the model's name where the path has it.
        base_path: what the vendor's SDKs have in their base URL beyond the host.
        key_places: where a key may be; none where no key is asked for.
    """

    format: Format
    paths: tuple[str, ...]
    base_path: str = ""
    key_places: tuple[KeyPlace, ...] = ("bearer token",)


def _chat(
    base_path: str, dialect: Format = CHAT, *, key_places: tuple[KeyPlace, ...] = ("bearer token",)
) -> MockedVendor:
    paths = (f"{base_path}/chat/completions",)
    return MockedVendor(format=dialect, paths=paths, base_path=base_path, key_places=key_places)


MOCKED_VENDORS: dict[str, MockedVendor] = {
    "openai": _chat("/v1"),
    "openai_responses": MockedVendor(format=RESPONSES, paths=("/v1/responses",), base_path="/v1"),
    "azure": MockedVendor(
        format=CHAT,
        paths=("/openai/deployments/<model>/chat/completions", "/openai/v1/chat/completions"),
        key_places=("api-key", "bearer token"),
    ),
    "anthropic": MockedVendor(format=ANTHROPIC, paths=("/v1/messages",), key_places=("x-api-key", "bearer token")),
    "gemini": MockedVendor(
        format=GEMINI,
        paths=("/v1beta/<path:model>:streamGenerateContent",),
        base_path="/v1beta",
        key_places=("x-goog-api-key", "?key"),
    ),
    "cohere": MockedVendor(format=COHERE, paths=("/v2/chat",)),
    "mistral": _chat("/v1", CHAT_WITH_USAGE),
    "groq": _chat("/openai/v1"),
    "together": _chat("/v1"),
    "deepseek": _chat(""),
    "qwen": _chat("/compatible-mode/v1"),
    "dashscope": MockedVendor(format=DASHSCOPE, paths=("/api/v1/services/aigc/<service>/generation",)),
    "zhipu": _chat("/api/paas/v4", CHAT_WITH_USAGE),
    "baidu": _chat("/v2"),
    "baidu_v1": MockedVendor(
        format=BAIDU_V1,
        paths=("/rpc/2.0/ai_custom/v1/wenxinworkshop/chat/<model>",),
        key_places=("?access_token",),
    ),
    "huawei_maas": _chat("/v2"),
    "ollama": MockedVendor(format=OLLAMA, paths=("/api/chat",), key_places=()),
    "openai_compatible": _chat("/v1", key_places=()),
}
"""By the names of the registry. Where several share a path, the first that is served answers there."""


def speaks(provider: str, wire: Format) -> bool:
    """Whether a provider's own bytes are in this format, whatever its dialect."""
    vendor = MOCKED_VENDORS.get(provider)
    return vendor is not None and vendor.format.encoder is wire.encoder
