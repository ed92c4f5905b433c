"""``lumos replay --serve``: the mock of the vendors' APIs on a socket, and how to talk to it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Iterator

import click
import trio

from engine.provider import Message, ModelRequest
from providers.encoders import MOCKED_VENDORS
from providers.recording import Recording, names
from providers.registry import base_url_variable
from providers.vendors import ALIASES, VENDORS
from providers.wire import Endpoint

from .compose import base_url
from .garbage import collect_seldom
from .serving import ServingLimits, serve
from .sockets import listen_tcp
from .terminal import interruptible
from .vendor_server import create_vendor_app

SDK_LINES = {
    "openai": 'OpenAI(base_url="{url}/v1", api_key="any")',
    "openai_responses": 'OpenAI(base_url="{url}/v1", api_key="any")',
    "anthropic": 'Anthropic(base_url="{url}", api_key="any")',
}

_AT_ONCE = ServingLimits(closing=0)


def mocked_providers(wanted: Collection[str]) -> tuple[str, ...]:
    """The providers to mock by the names or aliases that are wanted; all of them if none is.

    Raises:
        ValueError: a name that no mocked provider has.
    """
    providers = tuple(ALIASES.get(name, name) for name in wanted) or tuple(MOCKED_VENDORS)
    for name in providers:
        if name not in MOCKED_VENDORS:
            raise ValueError(f"there is no mock of {name!r}; there are: {', '.join(MOCKED_VENDORS)}")
    return providers


async def serve_vendors(recording: Recording | None, providers: Collection[str], host: str, port: int) -> None:
    """Serve the mock until Ctrl-C, which ends it at once.

    The URL goes to standard output; on a terminal, how to talk to it is shown too.

    Raises:
        OSError: the address cannot be bound.
    """
    listeners = listen_tcp(host, port)
    app = create_vendor_app(recording, providers)
    collect_seldom()  # 40 ms of a collection are 40 ms that every stream's events are late
    with interruptible():
        _announce(base_url(listeners[0]), next(iter(providers)), recording)
        await serve(app, listeners, trio.Event(), _AT_ONCE)


def _announce(url: str, provider: str, recording: Recording | None) -> None:
    click.echo(url)
    if sys.stderr.isatty():
        model = recording.header.name if recording else names()[0]
        for line in hints(provider, url, model):
            click.secho(line, dim=True, err=True)


def hints(provider: str, url: str, model: str) -> Iterator[str]:
    """How to talk to the mock: a command for the shell, the SDK's client, and the variable that Lumos itself reads."""
    vendor_url = url + MOCKED_VENDORS[provider].base_path
    question = ModelRequest((Message("user", "Hi"),), model)
    asked = VENDORS[provider].wire.request(question, Endpoint(vendor_url, "any"))
    headers = [word for name, value in asked.headers.items() for word in ("-H", f"{name}: {value}")]
    yield shlex.join(["curl", "-N", asked.url, *headers, "-d", asked.content.decode()])
    if provider in SDK_LINES:
        yield SDK_LINES[provider].format(url=url)
    yield f"{base_url_variable(provider)}={vendor_url}"
