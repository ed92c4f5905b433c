"""Where secrets may go: every way in which a record could send a key somewhere else, and who may."""

from __future__ import annotations

import httpx
import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from engine import BasicAgent, Error, StreamingAgent
from providers.http import open_client
from providers.registry import ModelConfig, ProviderConfigError, create_single_provider
from providers.vendors import ALIASES, VENDORS
from server.errors import ApiError
from server.principal import LOCAL_USER, Principal
from server.provider_policy import ProviderPolicy, check_llm_config, check_record
from server.records import AgentRecord, MemorySettings
from server.testing.memory_network import MemoryNetwork

ADMIN = Principal(tenant_id="t", user_id="root", key_id="k", admin=True)
USER = Principal(tenant_id="t", user_id="ada", key_id="k")

HOST = "models.example"
VARIABLE = "GATEWAY_KEY"
POLICY = ProviderPolicy.allowing([HOST, "models.example:8443", "localhost:9000"], [VARIABLE])
NOTHING = ProviderPolicy()

VENDOR_VARIABLES = sorted({variable for vendor in VENDORS.values() for variable in vendor.key_variables})


def config(provider: str = "openai_compatible", **settings: object) -> ModelConfig:
    return ModelConfig(provider=provider, model="m", **settings)  # type: ignore[arg-type]


def refused_field(
    model: ModelConfig,
    principal: Principal = ADMIN,
    policy: ProviderPolicy = POLICY,
    environment: dict[str, str] | None = None,
) -> str | None:
    """The field that is refused with 403; None if all is allowed."""
    refusal = None
    try:
        check_llm_config(model, principal, policy, environment or {})
    except ApiError as error:
        refusal = error
    if refusal is None:
        return None
    assert (refusal.status, refusal.code) == (403, "FORBIDDEN")
    field: str = refusal.details["field"]
    assert refusal.message.startswith(f"{field}: ")
    return field


# Who


@pytest.mark.parametrize("provider", [*VENDORS, *ALIASES, "replay", "unknown"])
@pytest.mark.parametrize("principal", [LOCAL_USER, ADMIN, USER], ids=["local", "admin", "user"])
def test_everybody_may_use_a_provider_as_the_operator_set_it_up(principal: Principal, provider: str) -> None:
    assert refused_field(config(provider), principal, NOTHING) is None
    assert refused_field(config(provider, base_url="", api_key_env=""), principal, NOTHING) is None


def test_the_local_user_may_set_anything() -> None:
    anything = config("openai", base_url="http://10.0.0.1", api_key_env="HOME")
    assert refused_field(msgspec.structs.replace(anything, fallbacks=(anything,)), LOCAL_USER, NOTHING) is None


@pytest.mark.parametrize("provider", ["openai_compatible", "openai", "ollama", "replay"])
def test_a_user_may_set_neither_even_to_what_is_allowed(provider: str) -> None:
    assert refused_field(config(provider, base_url=f"https://{HOST}"), USER) == "llm_config.base_url"
    assert refused_field(config(provider, api_key_env=VARIABLE), USER) == "llm_config.api_key_env"


def test_a_user_may_not_even_repeat_the_default() -> None:
    assert refused_field(config("openai", base_url="https://api.openai.com/v1"), USER) == "llm_config.base_url"
    assert refused_field(config("openai", api_key_env="OPENAI_API_KEY"), USER) == "llm_config.api_key_env"


# To which host


@pytest.mark.parametrize(
    "base_url",
    [
        f"https://{HOST}",
        f"https://{HOST}/v1/",
        f"https://{HOST}:443/v1",
        f"HTTPS://{HOST.upper()}/v1",
        f"https://{HOST}:8443",
        "http://localhost:9000/v1",
        "https://localhost:9000/v1",
    ],
)
def test_an_admin_may_name_an_allowed_host(base_url: str) -> None:
    assert refused_field(config(base_url=base_url)) is None
    assert refused_field(config(base_url=base_url, api_key_env=VARIABLE)) is None
    assert refused_field(config("openai", base_url=base_url, api_key_env=VARIABLE)) is None
    assert refused_field(config(base_url=base_url), policy=NOTHING) == "llm_config.base_url"


@pytest.mark.parametrize(
    "base_url",
    [
        "https://evil.example",
        f"http://{HOST}",
        f"http://{HOST}:443",
        f"https://{HOST}:444",
        f"https://{HOST}.",
        f"https://{HOST}.evil.example",
        f"https://evil{HOST}",
        f"https://sub.{HOST}",
        f"https://evil.example/{HOST}",
        f"https://evil.example/@{HOST}",
        "https://127.0.0.1:9000",
        "http://localhost",
        "http://localhost:9001",
        "http://[::1]:9000",
        "http://localhost.:9000",
        "http://169.254.169.254/latest",
        "https://10.0.0.1",
        "https://0x7f000001:9000",
        "https://api.openai.com/v1",
    ],
)
def test_every_other_host_is_refused(base_url: str) -> None:
    assert refused_field(config(base_url=base_url, api_key_env=VARIABLE)) == "llm_config.base_url"


@pytest.mark.parametrize(
    "base_url",
    [
        f"https://{HOST}@evil.example",
        f"https://user:password@{HOST}",
        f"https://{HOST}\\@evil.example",
        f"https://{HOST}?x=1",
        f"https://{HOST}#x",
        f"ftp://{HOST}",
        f"//{HOST}",
        HOST,
        f"https://{HOST}%2eevil.example",
        f"https://{HOST}:99999",
        f"https://{HOST}\n.evil.example",
        "https://",
    ],
)
def test_what_is_no_plain_url_is_422_or_403(base_url: str) -> None:
    with pytest.raises(ApiError) as refused:
        check_llm_config(config(base_url=base_url), ADMIN, POLICY, {})
    assert refused.value.status in {403, 422}
    assert refused.value.details == {"field": "llm_config.base_url"}
    assert "password" not in refused.value.message or "may have no" in refused.value.message


@given(
    st.from_regex(r"https?://[a-z.@:\\/%\[\]#?\-]{0,12}models\.example[a-z.@:\\/%\[\]#?0-9\-]{0,12}", fullmatch=True)
)
def test_what_passes_is_asked_at_the_allowed_host_and_nowhere_else(base_url: str) -> None:
    try:
        check_llm_config(config(base_url=base_url), ADMIN, POLICY, {})
    except ApiError:
        return
    for path in ("/chat/completions", "/models/x:y?alt=sse"):
        asked = httpx.URL(base_url.rstrip("/") + path)
        assert (asked.scheme, asked.host) == ("https", HOST)
        assert asked.port in {None, 8443}
        assert asked.userinfo == b""


# With which key


@pytest.mark.parametrize("variable", ["HOME", "LUMOS_DATABASE_URL", "gateway_key", "GATEWAY_KEY_2", "", "GATEWAY_KEY "])
def test_only_allowed_variables_may_be_named(variable: str) -> None:
    expected = "llm_config.api_key_env" if variable else None
    assert refused_field(config(base_url=f"https://{HOST}", api_key_env=variable)) == expected


@pytest.mark.parametrize("variable", VENDOR_VARIABLES)
@pytest.mark.parametrize("provider", list(VENDORS))
def test_a_vendors_own_key_never_goes_to_another_host(provider: str, variable: str) -> None:
    """Named or left out, allowed or not, set or not."""
    everything = ProviderPolicy.allowing([HOST], [VARIABLE, *VENDOR_VARIABLES])
    for environment in ({}, {variable: "secret"}):
        named = config(provider, base_url=f"https://{HOST}", api_key_env=variable)
        assert refused_field(named, ADMIN, everything, environment) == "llm_config.api_key_env"
        left_out = config(provider, base_url=f"https://{HOST}")
        expected = "llm_config.api_key_env" if VENDORS[provider].key_variables else None
        assert refused_field(left_out, ADMIN, everything, environment) == expected


@pytest.mark.parametrize("variable", VENDOR_VARIABLES)
@pytest.mark.parametrize("provider", list(VENDORS))
def test_a_vendors_own_key_goes_to_the_vendors_own_host_alone(provider: str, variable: str) -> None:
    """Without a base_url: OpenAI's key may not go to Groq either."""
    everything = ProviderPolicy.allowing([HOST], VENDOR_VARIABLES)
    vendor = VENDORS[provider]
    same_host = {
        owned
        for other in VENDORS.values()
        for owned in other.key_variables
        if other.base_url and vendor.base_url and httpx.URL(other.base_url).host == httpx.URL(vendor.base_url).host
    }
    expected = None if variable in same_host else "llm_config.api_key_env"
    assert refused_field(config(provider, api_key_env=variable), ADMIN, everything) == expected


def test_an_allowed_key_may_go_to_a_vendors_own_host() -> None:
    assert refused_field(config("openai", api_key_env=VARIABLE)) is None


def test_the_own_host_is_the_operators_where_there_is_one() -> None:
    gateway = {"LUMOS_OPENAI_BASE_URL": "http://gateway.internal:4000/openai"}
    named = {"api_key_env": "OPENAI_API_KEY"}
    own = config("openai", base_url="http://gateway.internal:4000/v1", **named)
    assert refused_field(own, ADMIN, NOTHING, gateway) is None
    assert refused_field(own, ADMIN, NOTHING) == "llm_config.base_url"
    past_it = config("openai", base_url="https://api.openai.com/v1", **named)
    assert refused_field(past_it, ADMIN, NOTHING, gateway) == "llm_config.base_url"
    assert refused_field(past_it, ADMIN, NOTHING) is None
    broken = {"LUMOS_OPENAI_BASE_URL": "no url"}
    assert refused_field(past_it, ADMIN, NOTHING, broken) == "llm_config.base_url"


def test_a_provider_without_a_host_of_its_own_has_none_for_its_key() -> None:
    allowed = ProviderPolicy.allowing(["r.openai.azure.com"], ["AZURE_OPENAI_API_KEY", VARIABLE])
    base_url = "https://r.openai.azure.com"
    assert refused_field(config("azure", base_url=base_url), ADMIN, allowed) == "llm_config.api_key_env"
    assert refused_field(config("azure", base_url=base_url, api_key_env=VARIABLE), ADMIN, allowed) is None
    own = {"LUMOS_AZURE_BASE_URL": base_url}
    assert refused_field(config("azure", base_url=base_url), ADMIN, NOTHING, own) is None


# In which places of a record


def test_fallbacks_and_embeddings_are_checked_and_named() -> None:
    bad, fine = config(base_url="https://evil.example"), config("openai")
    record = AgentRecord(id="a", llm_config=fine)

    def field_of(changed: AgentRecord) -> str:
        with pytest.raises(ApiError) as refused:
            check_record(changed, ADMIN, POLICY, {})
        field: str = refused.value.details["field"]
        return field

    check_record(record, USER, NOTHING, {})
    replace = msgspec.structs.replace
    chain = replace(fine, fallbacks=(fine, bad))
    assert field_of(replace(record, llm_config=chain)) == "llm_config.fallbacks[1].base_url"
    assert field_of(replace(record, memory=MemorySettings(embeddings=bad))) == "memory.embeddings.base_url"
    check_record(replace(record, memory=MemorySettings(embeddings=chain)), LOCAL_USER, NOTHING, {})


# What the operator writes


@pytest.mark.parametrize(
    "host",
    [
        "",
        "*",
        "*.example",
        "https://models.example",
        "models.example/v1",
        "a@b",
        "models.example:",
        "a:99999",
        "a b",
        "::1",
    ],
)
def test_what_is_no_host_cannot_be_allowed(host: str) -> None:
    with pytest.raises(ValueError, match="is not a host or host:port"):
        ProviderPolicy.allowing([host])


@pytest.mark.parametrize("variable", ["", "A B", "sk-abcdef", "1A", "A=B", "Ä"])
def test_what_is_no_variable_cannot_be_allowed(variable: str) -> None:
    with pytest.raises(ValueError, match="is not the name of an environment variable"):
        ProviderPolicy.allowing([], [variable])


def test_loopback_may_be_http() -> None:
    for host in ("localhost", "127.0.0.1", "[::1]", "app.localhost"):
        policy = ProviderPolicy.allowing([host, f"{host}:1234"])
        for base_url in (f"http://{host}", f"https://{host}", f"http://{host}:1234"):
            assert refused_field(config(base_url=base_url), policy=policy) is None


# What the transport does


async def test_a_redirect_is_not_followed_with_the_key(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    listener, elsewhere = network.listen("models.example", 80), network.listen("evil.example", 80)
    answer = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n"

    async def redirect() -> None:
        async with await listener.accept() as stream:
            while b"\r\n\r\n" not in await stream.receive_some():
                pass
            await stream.send_all(answer)
            await trio.sleep(1)

    async with open_client(network.connect) as client, trio.open_nursery() as nursery:
        nursery.start_soon(redirect)
        redirected = config(base_url="http://models.example/v1", api_key_env=VARIABLE)
        provider = create_single_provider(redirected, {VARIABLE: "secret"}, client)
        agent = BasicAgent(agent_id="a", provider=provider, model="m")
        async with StreamingAgent.with_config(agent, agent.streaming).execute_streaming("hi") as events:
            last = [event async for event in events][-1]
        assert isinstance(last, Error)
        assert network.open_connections("evil.example") == []
        await elsewhere.aclose()
        await listener.aclose()


def test_an_unset_allowed_variable_is_told_when_the_agent_is_built_only() -> None:
    model = config(base_url=f"https://{HOST}", api_key_env=VARIABLE)
    assert refused_field(model) is None
    with pytest.raises(ProviderConfigError, match=VARIABLE):
        create_single_provider(model, {}, httpx.AsyncClient())
