"""The vendors: one table from a provider's name to its wire format, its defaults and what it offers.

Vendors that share a wire format share its code; what one does otherwise is an entry here. Base URLs, variables and
default models are from the vendors' documentation of late 2026. Vendors rename their models more often than we
release, so an agent can override every default.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from .anthropic import AnthropicWire
from .baidu_v1 import BaiduV1Wire
from .cohere import CohereWire
from .dashscope import DashScopeWire
from .gemini import GeminiWire
from .ollama import OllamaWire
from .openai_chat import AzureWire, ChatDialect, ChatWire
from .openai_responses import ResponsesWire
from .wire import Wire

Capability: TypeAlias = Literal["tools", "reasoning", "usage", "schema", "images"]


class Vendor(msgspec.Struct, frozen=True, kw_only=True):
    """What the registry knows of a vendor.

    Attributes:
        default_model: empty where an agent has to name one.
        base_url: None where an agent has to give one.
        key_variables: environment variables that may hold the key, the first that is set counts.
        key_required: whether a request without a key makes no sense.
        capabilities: what streams or can be asked for, each shown by a test.
    """

    wire: Wire
    default_model: str = ""
    base_url: str | None = None
    key_variables: tuple[str, ...] = ()
    key_required: bool = True
    capabilities: frozenset[Capability]


ALL: frozenset[Capability] = frozenset({"tools", "reasoning", "usage", "schema", "images"})

VENDORS: dict[str, Vendor] = {
    "openai": Vendor(
        wire=ChatWire(ChatDialect(max_tokens_field="max_completion_tokens")),
        default_model="gpt-4o-mini",
        base_url="https://api.openai.com/v1",
        key_variables=("OPENAI_API_KEY",),
        capabilities=ALL - {"reasoning"},
    ),
    "openai_responses": Vendor(
        wire=ResponsesWire(),
        default_model="gpt-4o-mini",
        base_url="https://api.openai.com/v1",
        key_variables=("OPENAI_API_KEY",),
        capabilities=ALL,
    ),
    "azure": Vendor(
        wire=AzureWire(),
        key_variables=("AZURE_OPENAI_API_KEY", "AZURE_API_KEY"),
        capabilities=ALL - {"reasoning"},
    ),
    "anthropic": Vendor(
        wire=AnthropicWire(),
        default_model="claude-sonnet-5",
        base_url="https://api.anthropic.com",
        key_variables=("ANTHROPIC_API_KEY", "CLAUDE_API_KEY"),
        capabilities=ALL,
    ),
    "gemini": Vendor(
        wire=GeminiWire(),
        default_model="gemini-flash-latest",
        base_url="https://generativelanguage.googleapis.com/v1beta",
        key_variables=("GEMINI_API_KEY", "GOOGLE_API_KEY"),
        capabilities=ALL,
    ),
    "cohere": Vendor(
        wire=CohereWire(),
        default_model="command-a-03-2025",
        base_url="https://api.cohere.com",
        key_variables=("COHERE_API_KEY", "CO_API_KEY"),
        capabilities=ALL,
    ),
    "mistral": Vendor(
        wire=ChatWire(ChatDialect(usage_option=False, required_choice="any")),
        default_model="mistral-small-latest",
        base_url="https://api.mistral.ai/v1",
        key_variables=("MISTRAL_API_KEY",),
        capabilities=ALL,
    ),
    "groq": Vendor(
        wire=ChatWire(ChatDialect(max_tokens_field="max_completion_tokens")),
        default_model="llama-3.3-70b-versatile",
        base_url="https://api.groq.com/openai/v1",
        key_variables=("GROQ_API_KEY",),
        capabilities=ALL,
    ),
    "together": Vendor(
        wire=ChatWire(),
        default_model="meta-llama/Llama-3.3-70B-Instruct-Turbo",
        base_url="https://api.together.xyz/v1",
        key_variables=("TOGETHER_API_KEY",),
        capabilities=ALL,
    ),
    "deepseek": Vendor(
        wire=ChatWire(ChatDialect(json_schema=False, sends_reasoning_back=True)),
        default_model="deepseek-chat",
        base_url="https://api.deepseek.com",
        key_variables=("DEEPSEEK_API_KEY",),
        capabilities=frozenset({"tools", "reasoning", "usage"}),
    ),
    "qwen": Vendor(
        wire=ChatWire(ChatDialect(json_schema=False)),
        default_model="qwen-plus",
        base_url="https://dashscope.aliyuncs.com/compatible-mode/v1",
        key_variables=("DASHSCOPE_API_KEY", "QWEN_API_KEY"),
        capabilities=ALL - {"schema"},
    ),
    "dashscope": Vendor(
        wire=DashScopeWire(),
        default_model="qwen-plus",
        base_url="https://dashscope.aliyuncs.com",
        key_variables=("DASHSCOPE_API_KEY", "QWEN_API_KEY"),
        capabilities=ALL,
    ),
    "zhipu": Vendor(
        wire=ChatWire(
            ChatDialect(
                usage_option=False, json_schema=False, sends_reasoning_back=True, with_tools={"tool_stream": True}
            )
        ),
        default_model="glm-4.6",
        base_url="https://open.bigmodel.cn/api/paas/v4",
        key_variables=("ZHIPU_API_KEY", "ZHIPUAI_API_KEY"),
        capabilities=ALL - {"schema"},
    ),
    "baidu": Vendor(
        wire=ChatWire(ChatDialect(json_schema=False)),
        default_model="ernie-4.5-turbo-128k",
        base_url="https://qianfan.baidubce.com/v2",
        key_variables=("QIANFAN_API_KEY", "BAIDU_API_KEY"),
        capabilities=ALL - {"schema"},
    ),
    "baidu_v1": Vendor(
        wire=BaiduV1Wire(),
        default_model="ernie-4.0-8k",
        base_url="https://aip.baidubce.com",
        key_variables=("BAIDU_ACCESS_TOKEN",),
        capabilities=frozenset({"tools", "usage"}),
    ),
    "huawei_maas": Vendor(
        wire=ChatWire(ChatDialect(json_schema=False)),
        default_model="deepseek-v3.2-exp",
        base_url="https://api.modelarts-maas.com/v2",
        key_variables=("MAAS_API_KEY", "HUAWEI_MAAS_API_KEY"),
        capabilities=frozenset({"tools", "reasoning", "usage"}),
    ),
    "ollama": Vendor(
        wire=OllamaWire(),
        default_model="llama3.2",
        base_url="http://localhost:11434",
        key_variables=("OLLAMA_API_KEY",),
        key_required=False,
        capabilities=ALL - {"images"},
    ),
    "openai_compatible": Vendor(wire=ChatWire(), key_required=False, capabilities=ALL),
}

ALIASES = {"claude": "anthropic", "maas": "huawei_maas"}
