"""From an agent's ``llm_config`` to its provider: the vendors' table, keys from the environment, fallbacks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, TypeAlias

import httpx
import msgspec
from msgspec import Meta

from engine.provider import Provider

from .failover import FailoverPolicy, FailoverProvider, Link
from .recording import load, names
from .replay import ReplayProvider, step_names
from .vendors import ALIASES, VENDORS, Vendor
from .wire import Endpoint, HttpProvider, is_usable_key

REPLAY = "replay"
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PROVIDER_NAMES = (*VENDORS, *ALIASES, REPLAY)


Name: TypeAlias = Annotated[str, Meta(max_length=200)]
Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=3600)]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ``llm_config`` of an agent.

    Attributes:
        provider: a name from the registry.
        model: the vendor's model name; for ``replay`` a recording's name. Empty takes the provider's default.
        base_url: where the vendor's API is, without the last part of the path; else ``LUMOS_<PROVIDER>_BASE_URL`` or
            the vendor's own.
        api_key_env: the environment variable that holds the key; never the key itself.
        retries: how often the provider is asked again before the first content, after a failure that may pass.
        connect, first_token: seconds for each attempt at this provider; None takes the run's, which rule where shorter.
        fallbacks: who is asked instead when this provider fails before its first content.
        hedge_after: seconds without content after which the first fallback is asked as well.
    """

    provider: Name
    model: Name = ""
    base_url: Annotated[str, Meta(max_length=2000)] | None = None
    api_key_env: Name | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    retries: Annotated[int, Meta(ge=0, le=10)] = 2
    connect: Seconds | None = None
    first_token: Seconds | None = None
    fallbacks: Annotated[tuple[ModelConfig, ...], Meta(max_length=8)] = ()
    hedge_after: Seconds | None = None

    def __post_init__(self) -> None:
        if any(fallback.fallbacks for fallback in self.fallbacks):
            raise ValueError("a fallback has no fallbacks of its own: list them one after the other")


class ProviderConfigError(ValueError):
    """A provider cannot be made from its configuration; the text says what to change, and holds no key."""


def default_model(config: ModelConfig) -> str:
    """The model that the configuration means."""
    vendor = find_vendor(config.provider)
    return config.model or (vendor.default_model if vendor else "")


def find_vendor(name: str) -> Vendor | None:
    """The vendor of that name or alias."""
    return VENDORS.get(ALIASES.get(name, name))


def create_provider(config: ModelConfig, environment: Mapping[str, str], client: httpx.AsyncClient) -> Provider:
    """The provider for a configuration, with its retries and fallbacks. ``client`` stays the caller's to close.

    Raises:
        ProviderConfigError: unknown provider or recording, missing model, URL or key.
    """
    if config.provider == REPLAY and not config.fallbacks:
        return _replay_provider(config)
    chain = (config, *config.fallbacks)
    links = [
        Link(
            provider=create_single_provider(link, environment, client),
            model=default_model(link),
            connect=link.connect,
            first_token=link.first_token,
            retries=link.retries,
        )
        for link in chain
    ]
    return FailoverProvider(links, FailoverPolicy(hedge_after=config.hedge_after))


def create_single_provider(config: ModelConfig, environment: Mapping[str, str], client: httpx.AsyncClient) -> Provider:
    """The provider without retries and fallbacks. Raises as ``create_provider``."""
    if config.provider == REPLAY:
        return _replay_provider(config)
    vendor = find_vendor(config.provider)
    if vendor is None:
        raise ProviderConfigError(f"unknown provider {config.provider!r}; known are {', '.join(PROVIDER_NAMES)}")
    if not default_model(config):
        raise ProviderConfigError(f"provider {config.provider!r} needs a model")
    endpoint = find_endpoint(config, vendor, environment)
    return HttpProvider(ALIASES.get(config.provider, config.provider), vendor.wire, endpoint, client)


def find_endpoint(config: ModelConfig, vendor: Vendor, environment: Mapping[str, str]) -> Endpoint:
    """Where the vendor is to be asked, and with which key.

    Raises:
        ProviderConfigError: no usable URL, or no usable key in the variable that is to hold it.
    """
    return Endpoint(_base_url(config, vendor, environment), _api_key(config, vendor, environment))


def _replay_provider(config: ModelConfig) -> ReplayProvider:
    """Only of a packaged recording: a configuration must not be a way to read files."""
    if config.model not in names():
        raise ProviderConfigError(f"no recording is named {config.model!r}; there are: {', '.join(names())}")
    return ReplayProvider(*(load(name) for name in step_names(config.model, names())))


def base_url_variable(provider: str) -> str:
    """The environment variable that overrides the provider's base URL."""
    return f"LUMOS_{ALIASES.get(provider, provider).upper()}_BASE_URL"


def key_variable(vendor: Vendor, environment: Mapping[str, str]) -> str | None:
    """Which variable the vendor's key comes from: the first that is set, else the first; None if it has none."""
    set_ones = (name for name in vendor.key_variables if environment.get(name, "").strip())
    return next(set_ones, vendor.key_variables[0] if vendor.key_variables else None)


def _base_url(config: ModelConfig, vendor: Vendor, environment: Mapping[str, str]) -> str:
    variable = base_url_variable(config.provider)
    base_url = config.base_url or environment.get(variable) or vendor.base_url
    if base_url is None:
        raise ProviderConfigError(f"provider {config.provider!r} needs a base_url, or {variable} in the environment")
    fault = url_fault(base_url)
    if fault:
        raise ProviderConfigError(f"provider {config.provider!r}: the base_url {fault}")  # it may hold a secret
    return base_url.rstrip("/")


def url_fault(text: str) -> str | None:
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
    variable = config.api_key_env or key_variable(vendor, environment)
    if variable is None:
        return None
    if not _VARIABLE_NAME.fullmatch(variable):  # not shown: it may be the key itself
        raise ProviderConfigError(
            f"provider {config.provider!r}: api_key_env is to name an environment variable, not to hold the key"
        )
    key = environment.get(variable, "").strip()
    if not key and (vendor.key_required or config.api_key_env):
        names = config.api_key_env or " or ".join(vendor.key_variables)
        raise ProviderConfigError(f"provider {config.provider!r} needs its key in the environment variable {names}")
    if not is_usable_key(key):
        raise ProviderConfigError(f"the key in {variable} has characters that no key has")
    return key or None
