"""What all commands share: options that are variables too, and failures that end a command in one line."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import click

T = TypeVar("T")


def option(
    name: str, *names: str, prefix: str = "LUMOS_", **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option that is also the variable ``LUMOS_NAME``, and says so in the help."""
    variable = prefix + name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, *names, envvar=variable, show_envvar=True, **settings)


database_option = option(
    "--database-url",
    default="sqlite:///lumos.db",
    show_default=True,
    help="Where agents, conversations, memories and keys are: sqlite:///FILE or postgresql://...",
)


def run(function: Callable[..., Awaitable[T]], *arguments: object) -> T:
    """Run a command's work. What its user can mend ends the command in one line."""
    import trio

    try:
        return trio.run(function, *arguments)
    except _faults_of_users() as error:
        give_up(str(error))
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt):  # out of a nursery, before the command minded Ctrl-C itself
            raise click.Abort from group
        raise


def _faults_of_users() -> tuple[type[Exception], ...]:
    from providers.network import NetworkConfigError
    from providers.registry import ProviderConfigError

    from .agents import AgentsFileError, UnknownAgentError
    from .compose import SettingsError
    from .guard import BindingRefusedError
    from .mcp_tools import McpConfigError
    from .otel import OpenTelemetryMissingError
    from .remote import RemoteError
    from .store.errors import DatabaseError, StoreUnavailableError

    return (
        AgentsFileError,
        BindingRefusedError,
        DatabaseError,
        McpConfigError,
        NetworkConfigError,
        OpenTelemetryMissingError,
        ProviderConfigError,
        RemoteError,
        SettingsError,
        StoreUnavailableError,
        UnknownAgentError,
    )


def give_up(message: str) -> NoReturn:
    """End the command: the message in red, status 1."""
    click.secho(f"lumos: {message}", fg="red", err=True)
    sys.exit(1)
