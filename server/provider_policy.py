"""Where secrets may go: what an agent record that comes through the API may say about hosts and keys.

``base_url`` says to which host a key is sent, ``api_key_env`` says which. The local user and the agents file are the
operator's own word and may set both freely. With keys, only an admin may, and only to what the operator allows:

* hosts are compared exactly, port included, and with https unless the host is this machine: a record cannot make the
  server ask any other address, in the private network or elsewhere;
* a variable in which a vendor's own key is looked for (``OPENAI_API_KEY``) goes to that vendor's own host and to no
  other, whatever is allowed. The own host is the operator's ``LUMOS_<PROVIDER>_BASE_URL``, else the vendor's.

Whether a variable is set is never looked at: it may be set tomorrow, and a refusal would tell. Redirects are not
followed (``providers.http.open_client``), so a host that is allowed cannot hand a key on to one that is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import httpx
import msgspec

from providers.registry import ModelConfig, base_url_variable, find_vendor, url_fault
from providers.vendors import VENDORS

from .errors import ApiError
from .guard import is_loopback_host
from .principal import Principal
from .records import AgentRecord

Origin: TypeAlias = tuple[str, str, int]
"""Scheme, host and port."""

_PORTS = {"https": 443, "http": 80}
_ALLOWED_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s/\\?#@:%*\[\]]+)(:[0-9]{1,5})?")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class ProviderPolicy(msgspec.Struct, frozen=True):
    """What the operator allows to the admins of all tenants. Any allowed key may go to any allowed host.

    Attributes:
        origins: where ``base_url`` may lead.
        key_variables: what ``api_key_env`` may name.
    """

    origins: frozenset[Origin] = frozenset()
    key_variables: frozenset[str] = frozenset()

    @classmethod
    def allowing(cls, hosts: Iterable[str] = (), key_variables: Iterable[str] = ()) -> ProviderPolicy:
        """The policy of ``--allow-provider-host`` (``host`` or ``host:port``) and ``--allow-key-variable``.

        Raises:
            ValueError: what is no host or no variable's name; the text says which.
        """
        variables = frozenset(key_variables)
        for variable in variables:
            if not _VARIABLE_NAME.fullmatch(variable):
                raise ValueError(f"{variable[:100]!r} is not the name of an environment variable")
        return cls(frozenset(origin for host in hosts for origin in _allowed_origins(host)), variables)


def check_record(
    record: AgentRecord, principal: Principal, policy: ProviderPolicy, environment: Mapping[str, str]
) -> None:
    """Refuse a record that would send a secret where this principal may not send it.

    Raises:
        ApiError: 403, or 422 for a ``base_url`` that is none; both name the field.
    """
    check_llm_config(record.llm_config, principal, policy, environment)
    if record.memory.embeddings is not None:
        check_llm_config(record.memory.embeddings, principal, policy, environment, "memory.embeddings")


def check_llm_config(
    config: ModelConfig,
    principal: Principal,
    policy: ProviderPolicy,
    environment: Mapping[str, str],
    field: str = "llm_config",
) -> None:
    """``check_record`` for one configuration, its fallbacks included; ``field`` is what errors call it."""
    if principal.operator:
        return
    for link, name in _links(config, field):
        _check_link(link, principal, policy, environment, name)


def _links(config: ModelConfig, field: str) -> Iterator[tuple[ModelConfig, str]]:
    yield config, field
    for number, fallback in enumerate(config.fallbacks):
        yield from _links(fallback, f"{field}.fallbacks[{number}]")


def _check_link(
    config: ModelConfig, principal: Principal, policy: ProviderPolicy, environment: Mapping[str, str], field: str
) -> None:
    """Empty means not set here, as it does to the registry."""
    if not config.base_url and not config.api_key_env:
        return
    if not principal.admin:
        name = "base_url" if config.base_url else "api_key_env"
        raise _forbidden(f"{field}.{name}", "only an admin may set it: it decides where a key goes")
    own = _own_origin(config.provider, environment)
    target = own
    if config.base_url:
        fault = url_fault(config.base_url)
        if fault:
            raise ApiError(422, "VALIDATION_ERROR", f"the base_url {fault}", {"field": f"{field}.base_url"})
        target = _origin(config.base_url)
        if target != own:
            _check_host(target, policy, f"{field}.base_url")
    _check_key(config, target, policy, environment, f"{field}.api_key_env")


def _check_host(target: Origin, policy: ProviderPolicy, field: str) -> None:
    scheme, host, _ = target
    if scheme != "https" and not is_loopback_host(_in_header(host)):
        raise _forbidden(field, "it is to be https: a key would cross the network in the clear")
    if target not in policy.origins:
        raise _forbidden(field, "the operator does not allow this host (lumos serve --allow-provider-host)")


def _check_key(
    config: ModelConfig,
    target: Origin | None,
    policy: ProviderPolicy,
    environment: Mapping[str, str],
    field: str,
) -> None:
    vendor = find_vendor(config.provider)
    variables = (config.api_key_env,) if config.api_key_env else vendor.key_variables if vendor else ()
    for variable in variables:
        owners = [name for name, other in VENDORS.items() if variable in other.key_variables]
        if owners:
            if target is None or all(_own_origin(name, environment) != target for name in owners):
                raise _forbidden(field, f"the key in {variable} goes to its vendor's own host only; name another one")
        elif variable not in policy.key_variables:
            raise _forbidden(field, "the operator does not allow this variable (lumos serve --allow-key-variable)")


def _own_origin(provider: str, environment: Mapping[str, str]) -> Origin | None:
    """Where the provider's requests go by themselves; None if nowhere."""
    vendor = find_vendor(provider)
    if vendor is None:
        return None
    base_url = environment.get(base_url_variable(provider)) or vendor.base_url
    return None if base_url is None or url_fault(base_url) else _origin(base_url)


def _origin(base_url: str) -> Origin:
    """Read by the library that will connect, so that both mean the same host."""
    url = httpx.URL(base_url)
    return url.scheme, url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme]


def _allowed_origins(text: str) -> Iterator[Origin]:
    """A host's origins: https, and for this machine http too; without a port, at the scheme's own."""
    match = _ALLOWED_HOST.fullmatch(text)
    if not match or url_fault(f"https://{text}"):
        raise ValueError(f"{text[:100]!r} is not a host or host:port, as api.example.org or localhost:11434")
    yield _origin(f"https://{text}")
    if is_loopback_host(match[1]):
        yield _origin(f"http://{text}")


def _in_header(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _forbidden(field: str, reason: str) -> ApiError:
    return ApiError(403, "FORBIDDEN", f"{field}: {reason}", {"field": field})
