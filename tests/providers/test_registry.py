"""From a configuration to a provider: what is refused, and that no text ever holds a key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from providers.failover import FailoverProvider
from providers.http import open_client
from providers.recording import load
from providers.registry import (
    PROVIDER_NAMES,
    ModelConfig,
    ProviderConfigError,
    create_provider,
    create_single_provider,
    default_model,
)
from providers.replay import ReplayProvider
from providers.vendors import ALIASES, VENDORS
from providers.wire import Endpoint, HttpProvider

KEY = "sk-secret-0123456789"
CLIENT = open_client()  # asks nobody here
LOCAL = {"provider": "openai_compatible", "model": "m", "base_url": "http://localhost:8000/v1"}


def refusal(config: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> str:
    """The text with which the configuration is refused."""
    with pytest.raises(ProviderConfigError) as raised:
        create_provider(ModelConfig(**config), environment or {}, CLIENT)
    return str(raised.value)


def endpoint_of(config: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Endpoint:
    """Where the configuration's provider would ask, and with which key."""
    provider = create_single_provider(ModelConfig(**config), environment or {}, CLIENT)
    assert isinstance(provider, HttpProvider)
    assert provider.name == ALIASES.get(config["provider"], config["provider"])
    assert KEY not in f"{provider!r} {provider}"
    return provider._endpoint


def test_openai_needs_nothing_but_its_key() -> None:
    endpoint = endpoint_of({"provider": "openai"}, {"OPENAI_API_KEY": KEY})
    assert (endpoint.base_url, endpoint.api_key) == ("https://api.openai.com/v1", KEY)
    assert default_model(ModelConfig(provider="openai")) == "gpt-4o-mini"
    assert default_model(ModelConfig(provider="openai", model="gpt-4o")) == "gpt-4o"


def test_a_compatible_server_needs_a_model_and_a_url_and_perhaps_a_key() -> None:
    endpoint = endpoint_of(LOCAL)
    assert (endpoint.base_url, endpoint.api_key) == ("http://localhost:8000/v1", None)
    assert endpoint_of(LOCAL | {"api_key_env": "MINE"}, {"MINE": f" {KEY}\n"}).api_key == KEY
    assert endpoint_of(LOCAL | {"base_url": "https://[::1]:8443/v1/"}).base_url == "https://[::1]:8443/v1"


def test_replay_needs_the_name_of_a_recording_and_no_more() -> None:
    assert isinstance(create_provider(ModelConfig(provider="replay", model="gpt4o-short"), {}, CLIENT), ReplayProvider)
    assert default_model(ModelConfig(provider="replay", model="demo-93s")) == "demo-93s"
    assert "gpt4o-short" in refusal({"provider": "replay", "model": "./pyproject.toml"})
    assert "gpt4o-short" in refusal({"provider": "replay"})


def test_an_unknown_provider_is_told_the_known_ones() -> None:
    text = refusal({"provider": "openia", "model": "m"})
    assert "'openia'" in text
    assert all(name in text for name in PROVIDER_NAMES)


@pytest.mark.parametrize(
    ("config", "environment", "what"),
    [
        ({"provider": "openai_compatible", "base_url": "http://h/v1"}, {}, "needs a model"),
        ({"provider": "openai_compatible", "model": "m"}, {}, "needs a base_url"),
        ({"provider": "openai"}, {}, "OPENAI_API_KEY"),
        ({"provider": "openai"}, {"OPENAI_API_KEY": " \n"}, "OPENAI_API_KEY"),
        ({"provider": "openai", "api_key_env": "MINE"}, {"OPENAI_API_KEY": KEY}, "MINE"),
        (LOCAL | {"api_key_env": "MINE"}, {}, "MINE"),
    ],
)
def test_what_is_missing_is_named(config: dict[str, Any], environment: dict[str, str], what: str) -> None:
    assert what in refusal(config, environment)


@pytest.mark.parametrize(
    "base_url",
    [
        "localhost:8000/v1",
        "ftp://h/v1",
        "//h/v1",
        "http:///v1",
        "https://",
        "http://[::1/v1",
        "http://h:port/v1",
        "http://h:99999/v1",
        "http://h\n/v1",
        "http://a b/v1",
        "http://xn--/v1",
        f"http://{KEY}:x@h/v1",
        f"http://user:{KEY}@h/v1",
        f"http://h/v1?key={KEY}",
        f"http://h/v1#{KEY}",
        f"http://h:{KEY}/v1",
    ],
)
def test_a_url_that_cannot_be_asked_is_refused(base_url: str) -> None:
    text = refusal(LOCAL | {"base_url": base_url})
    assert "base_url" in text
    assert KEY not in text


@pytest.mark.parametrize("key", [f"{KEY}\nX-Evil: 1", f"{KEY}\x00", f"{KEY}\u00e9", f"密钥{KEY}"])
def test_a_key_with_characters_that_no_key_has_is_refused_unseen(key: str) -> None:
    text = refusal({"provider": "openai"}, {"OPENAI_API_KEY": key})
    assert "OPENAI_API_KEY" in text
    assert KEY not in text
    with pytest.raises(ValueError, match="key") as raised:
        Endpoint("http://h/v1", key)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Title", f"{KEY}\u00e9"),
        ("X-Title", f"{KEY}\r\nX-Evil: 1"),
        ("X-Title", f" {KEY}"),
        ("X-Tïtle", KEY),
        ("", KEY),
    ],
)
def test_a_header_that_cannot_be_sent_is_refused_unseen(name: str, value: str) -> None:
    with pytest.raises(ValueError, match="header") as raised:
        Endpoint("http://h/v1", headers={name: value})
    assert KEY not in str(raised.value)


def test_a_header_of_several_words_is_taken() -> None:
    assert Endpoint("http://h/v1", headers={"X-Title": "two words\t(and more)"}).headers["X-Title"].startswith("two")


def test_an_endpoint_does_not_show_its_key_or_headers() -> None:
    assert repr(Endpoint("http://h/v1", KEY, {"X-Api-Key": KEY})) == "Endpoint(base_url='http://h/v1')"


def test_a_configuration_has_no_place_for_a_key() -> None:
    for field in ("api_key", "key", "token"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(LOCAL | {field: KEY}, ModelConfig)


FOURTEEN = [
    *("openai", "openai_responses", "azure", "anthropic", "claude", "gemini", "cohere", "mistral", "groq", "together"),
    *("deepseek", "qwen", "dashscope", "zhipu", "baidu", "baidu_v1", "huawei_maas", "maas", "ollama"),
    *("openai_compatible", "replay"),
]

KEYS = {
    "openai": ["OPENAI_API_KEY"],
    "anthropic": ["ANTHROPIC_API_KEY", "CLAUDE_API_KEY"],
    "claude": ["ANTHROPIC_API_KEY", "CLAUDE_API_KEY"],
    "gemini": ["GEMINI_API_KEY"],
    "cohere": ["COHERE_API_KEY"],
    "together": ["TOGETHER_API_KEY"],
    "deepseek": ["DEEPSEEK_API_KEY"],
    "qwen": ["DASHSCOPE_API_KEY", "QWEN_API_KEY"],
    "dashscope": ["DASHSCOPE_API_KEY", "QWEN_API_KEY"],
    "zhipu": ["ZHIPU_API_KEY"],
    "baidu": ["BAIDU_API_KEY"],
    "maas": ["MAAS_API_KEY", "HUAWEI_MAAS_API_KEY"],
}


def test_every_promised_name_is_there_and_no_other() -> None:
    assert sorted(PROVIDER_NAMES) == sorted(FOURTEEN)


@pytest.mark.parametrize(("provider", "variable"), [(name, key) for name, keys in KEYS.items() for key in keys])
def test_each_of_a_vendors_key_variables_counts(provider: str, variable: str) -> None:
    assert endpoint_of({"provider": provider}, {variable: KEY}).api_key == KEY


@pytest.mark.parametrize("provider", [name for name, vendor in VENDORS.items() if vendor.key_required])
def test_a_missing_key_names_every_variable_that_may_hold_it(provider: str) -> None:
    text = refusal({"provider": provider, "model": "m", "base_url": "https://h"})
    assert all(variable in text for variable in VENDORS[provider].key_variables)


@pytest.mark.parametrize("provider", [*VENDORS, *ALIASES])
def test_a_base_url_comes_from_the_agent_then_the_environment_then_the_vendor(provider: str) -> None:
    vendor = VENDORS[ALIASES.get(provider, provider)]
    environment = dict.fromkeys(vendor.key_variables, KEY)
    override = {f"LUMOS_{ALIASES.get(provider, provider).upper()}_BASE_URL": "https://proxy/x/"}
    config = {"provider": provider, "model": "m"}
    assert endpoint_of(config, environment | override).base_url == "https://proxy/x"
    assert endpoint_of(config | {"base_url": "https://own/y"}, environment | override).base_url == "https://own/y"
    if vendor.base_url is not None:
        assert endpoint_of(config, environment).base_url == vendor.base_url


def test_fallbacks_become_one_chain_in_their_order() -> None:
    fallbacks = (ModelConfig(provider="claude"), ModelConfig(provider="ollama", model="qwen3"))
    config = ModelConfig(provider="openai", fallbacks=fallbacks)
    environment = {"OPENAI_API_KEY": KEY, "CLAUDE_API_KEY": KEY}
    provider = create_provider(config, environment, CLIENT)
    assert isinstance(provider, FailoverProvider)
    assert provider.name == "openai+anthropic+ollama"


def test_a_fallback_has_no_fallbacks_of_its_own() -> None:
    nested = ModelConfig(provider="ollama", fallbacks=(ModelConfig(provider="ollama"),))
    with pytest.raises(ValueError, match="no fallbacks of its own"):
        ModelConfig(provider="ollama", fallbacks=(nested,))


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"max_tokens": 0},
        {"max_tokens": 1_000_001},
        {"retries": -1},
        {"retries": 11},
        {"connect": 0},
        {"first_token": 3600.5},
        {"hedge_after": 0},
        {"hedge_after": 1e9},
        {"fallbacks": [{"provider": "ollama"}] * 9},
        {"model": "m" * 201},
        {"provider": "p" * 201},
        {"base_url": "https://" + "h" * 2000},
        {"api_key_env": "K" * 201},
    ],
    ids=repr,
)
def test_every_setting_has_bounds_and_a_refusal_names_it(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(msgspec.ValidationError, match=rf"\$\.{name}"):
        msgspec.convert({"provider": "ollama", **setting}, ModelConfig)


def test_the_bounds_themselves_may_be_set() -> None:
    whole = {
        "provider": "ollama",
        "temperature": 2,
        "max_tokens": 1_000_000,
        "retries": 10,
        "connect": 3600,
        "first_token": 0.001,
        "hedge_after": 3600,
        "fallbacks": [{"provider": "ollama"}] * 8,
    }
    assert msgspec.convert(whole, ModelConfig).retries == 10


def test_a_broken_fallback_is_refused_when_the_agent_is_made() -> None:
    assert "GEMINI_API_KEY" in refusal({"provider": "ollama", "fallbacks": (ModelConfig(provider="gemini"),)})


def test_a_key_in_the_place_of_its_variable_is_not_echoed() -> None:
    text = refusal(LOCAL | {"api_key_env": KEY})
    assert "api_key_env" in text
    assert KEY not in text


async def test_replay_has_all_steps_of_its_recording() -> None:
    provider = create_single_provider(ModelConfig(provider="replay", model="demo-tools"), {}, CLIENT)
    assert isinstance(provider, ReplayProvider)
    assert provider.recordings == (load("demo-tools"), load("demo-tools-step-2"))
