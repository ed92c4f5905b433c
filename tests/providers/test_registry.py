"""From a configuration to a provider: what is refused, and that no text ever holds a key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from providers.http import open_client
from providers.registry import PROVIDER_NAMES, ModelConfig, ProviderConfigError, create_provider, default_model
from providers.replay import ReplayProvider
from providers.wire import Endpoint, HttpProvider

KEY = "sk-secret-0123456789"
LOCAL = {"provider": "openai_compatible", "model": "m", "base_url": "http://localhost:8000/v1"}


def refusal(config: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> str:
    """The text with which the configuration is refused."""
    with pytest.raises(ProviderConfigError) as raised:
        create_provider(ModelConfig(**config), environment or {}, open_client())
    return str(raised.value)


def endpoint_of(config: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Endpoint:
    """Where the configuration's provider would ask, and with which key."""
    provider = create_provider(ModelConfig(**config), environment or {}, open_client())
    assert isinstance(provider, HttpProvider)
    assert provider.name == config["provider"]
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
    assert isinstance(
        create_provider(ModelConfig(provider="replay", model="gpt4o-short"), {}, open_client()), ReplayProvider
    )
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


def test_an_endpoint_does_not_show_its_key_or_headers() -> None:
    assert repr(Endpoint("http://h/v1", KEY, {"X-Api-Key": KEY})) == "Endpoint(base_url='http://h/v1')"


def test_a_configuration_has_no_place_for_a_key() -> None:
    for field in ("api_key", "key", "token"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(LOCAL | {field: KEY}, ModelConfig)
