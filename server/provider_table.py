"""``lumos providers``: what the registry knows and what of it is configured here; and one tiny real call to try one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import click
import msgspec
import trio

from engine import BasicAgent, Deadlines, Error, GenerationComplete, RunOptions, StreamingAgent
from providers.http import open_client
from providers.registry import (
    ModelConfig,
    base_url_variable,
    create_single_provider,
    default_model,
    key_variable,
    url_fault,
)
from providers.vendors import ALIASES, VENDORS, Vendor

CHECK_PROMPT = "Answer with the one word: ready"
CHECK_DEADLINES = Deadlines(total=60, first_token=45)
CHECK_MAX_TOKENS = 256
"""Room for models that think first."""

_HEADINGS = ("provider", "key", "default model", "offers besides text", "base URL")


class ProviderRow(msgspec.Struct, frozen=True):
    """One line of the table; never holds a key, only whether there is one, nor a URL with a password."""

    provider: str
    key: str
    model: str
    offers: str
    base_url: str


def provider_rows(environment: Mapping[str, str]) -> Iterator[ProviderRow]:
    """The table's lines, vendors in the registry's order."""
    aliases = {vendor: alias for alias, vendor in ALIASES.items()}
    for name, vendor in VENDORS.items():
        yield ProviderRow(
            provider=f"{name} ({aliases[name]})" if name in aliases else name,
            key=_key_state(vendor, environment),
            model=vendor.default_model or "(name one)",
            offers=" ".join(sorted(vendor.capabilities)),
            base_url=_shown_url(environment.get(base_url_variable(name)) or vendor.base_url),
        )
    yield ProviderRow("replay", "not needed", "(a recording)", "its timing", "")


def show_providers(environment: Mapping[str, str]) -> None:
    """Print the table."""
    rows = [_HEADINGS, *(msgspec.structs.astuple(row) for row in provider_rows(environment))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for number, row in enumerate(rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        click.secho(line, bold=number == 0)


def _key_state(vendor: Vendor, environment: Mapping[str, str]) -> str:
    variable = key_variable(vendor, environment)
    if variable is None:
        return "optional"
    if environment.get(variable, "").strip():
        return f"{variable} is set"
    return f"{variable} is missing" if vendor.key_required else f"{variable}, optional"


def _shown_url(base_url: str | None) -> str:
    if base_url is None:
        return "(give one)"
    return "(not usable)" if url_fault(base_url) else base_url


async def check_provider(config: ModelConfig, environment: Mapping[str, str]) -> bool:
    """Ask the provider one short question and print how it went. False if it failed.

    Raises:
        ProviderConfigError: unknown provider, missing model, URL or key.
    """
    async with open_client(environment=environment) as client:
        provider = create_single_provider(config, environment, client)
        model = default_model(config)
        agent = BasicAgent(agent_id="check", provider=provider, model=model, instructions="", deadlines=CHECK_DEADLINES)
        options = RunOptions(max_tokens=CHECK_MAX_TOKENS)
        started_at = trio.current_time()
        async with StreamingAgent.with_config(agent, agent.streaming).execute_streaming(
            CHECK_PROMPT, options
        ) as events:
            async for event in events:
                match event:
                    case Error(code, content):
                        click.secho(f"{provider.name}: {code}: {content}", fg="red", err=True)
                        return False
                    case GenerationComplete(response, ttfb_ms=ttfb_ms, usage=usage):
                        elapsed = trio.current_time() - started_at
                        tokens = f", {usage.output_tokens} tokens" if usage else ""
                        said = " ".join(response.split())[:60]
                        click.echo(f"{provider.name} {model}: {said!r}, TTFB {ttfb_ms} ms, {elapsed:.2f} s{tokens}")
    return True
