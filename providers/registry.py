"""From a provider's name in a configuration to the provider: one table."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
import msgspec

from engine.provider import Provider

from .openai_chat import DEFAULT_BASE_URL, OpenAIChatProvider
from .recording import load, names
from .replay import ReplayProvider
from .wire import is_usable_key


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ``llm_config`` of an agent.

    Attributes:
        provider: a name from the registry.
        model: the vendor's model name; for ``replay`` a recording's name. Empty takes the provider's default.
        base_url: where the vendor's API is, without the last part of the path.
        api_key_env: the environment variable that holds the key; never the key itself.
    """

    provider: str
    model: str = ""
    base_url: str | None = None
    api_key_env: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None


class Vendor(msgspec.Struct, frozen=True):
    """What the registry knows of a vendor: the defaults for what a configuration leaves out."""

    default_model: str
    base_url: str | None
    api_key_env: str | None
    key_required: bool


VENDORS: dict[str, Vendor] = {
    "openai": Vendor("gpt-4o-mini", DEFAULT_BASE_URL, "OPENAI_API_KEY", key_required=True),
    "openai_compatible": Vendor("", None, None, key_required=False),
}
REPLAY = "replay"
PROVIDER_NAMES = (*VENDORS, REPLAY)


class ProviderConfigError(ValueError):
    """A provider cannot be made from its configuration; the text says what to change, and holds no key."""


def default_model(config: ModelConfig) -> str:
    """The model that the configuration means."""
    if config.model or config.provider not in VENDORS:
        return config.model
    return VENDORS[config.provider].default_model


def create_provider(config: ModelConfig, environment: Mapping[str, str], client: httpx.AsyncClient) -> Provider:
    """The provider for a configuration. ``client`` is shared and stays the caller's to close.

    Raises:
        ProviderConfigError: unknown provider or recording, missing model, URL or key.
    """
    if config.provider == REPLAY:
        return _replay_provider(config)
    vendor = VENDORS.get(config.provider)
    if vendor is None:
        raise ProviderConfigError(f"unknown provider {config.provider!r}; known are {', '.join(PROVIDER_NAMES)}")
    if not default_model(config):
        raise ProviderConfigError(f"provider {config.provider!r} needs a model")
    return OpenAIChatProvider(
        name=config.provider,
        base_url=_base_url(config, vendor),
        api_key=_api_key(config, vendor, environment),
        client=client,
    )


def _replay_provider(config: ModelConfig) -> ReplayProvider:
    """Only of a packaged recording: a configuration must not be a way to read files."""
    if config.model not in names():
        raise ProviderConfigError(f"no recording is named {config.model!r}; there are: {', '.join(names())}")
    return ReplayProvider(load(config.model))


def _base_url(config: ModelConfig, vendor: Vendor) -> str:
    base_url = config.base_url or vendor.base_url
    if base_url is None:
        raise ProviderConfigError(f"provider {config.provider!r} needs a base_url")
    fault = _url_fault(base_url)
    if fault:
        raise ProviderConfigError(f"provider {config.provider!r}: the base_url {fault}")  # it may hold a secret
    return base_url


def _url_fault(text: str) -> str | None:
    """What is wrong with a base URL; None if it can be asked."""
    try:
        url = httpx.URL(text)
        host = url.host
    except (httpx.InvalidURL, UnicodeError):  # idna's errors are UnicodeErrors
        return "is not a valid URL"
    if url.scheme not in ("http", "https") or not host or "%" in host:
        return "is not an http or https URL with a host"
    if not 0 < (url.port or 443) < 65_536:
        return "has a port that there is not"
    if url.userinfo or url.query or url.fragment:
        return "may have no user name, no password, no query and no fragment: a key goes into the environment"
    return None


def _api_key(config: ModelConfig, vendor: Vendor, environment: Mapping[str, str]) -> str | None:
    variable = config.api_key_env or vendor.api_key_env
    if variable is None:
        return None
    key = environment.get(variable, "").strip()
    if not key and (vendor.key_required or config.api_key_env):
        raise ProviderConfigError(f"provider {config.provider!r} needs its key in the environment variable {variable}")
    if not is_usable_key(key):
        raise ProviderConfigError(f"the key in {variable} has characters that no key has")
    return key or None
