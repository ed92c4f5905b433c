"""The composition root: the one place where settings become listeners, agents, store, supervisor and app."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from providers.http import open_client

from .agents import AgentsFile, read_whole_agents_file
from .composition import (
    CLEANUP_SECONDS,
    HURRY_SECONDS,
    Composition,
    Foundations,
    LeaveWithin,
    end_runs_of_the_dead,
    serve_until_signal,
)
from .garbage import collect_seldom
from .guard import check_binding
from .logs import flush_log
from .mcp_tools import McpServers
from .otel import exporting_traces
from .services import Services
from .settings import DEFAULT_DATABASE_URL, ServerSettings, SettingsError
from .sockets import SocketListener, listen_tcp, raise_descriptor_limit
from .store.database import Database
from .store.keys import any_keys
from .tool_registry import ToolRegistry

if TYPE_CHECKING:
    from .shared_log import SharedLog

__all__ = [
    "CLEANUP_SECONDS",
    "DEFAULT_DATABASE_URL",
    "HURRY_SECONDS",
    "ServerSettings",
    "SettingsError",
    "base_url",
    "run_server",
]

_logger = structlog.get_logger("lumos")

LEAST_LEASE_SECONDS = 0.5


async def run_server(settings: ServerSettings) -> None:
    """Serve until SIGTERM (streams may finish for ``drain`` seconds) or SIGINT (they end at once).

    A second signal ends everything without waiting.

    Raises:
        AgentsFileError: the agents file cannot be used, or an agent of it cannot be built (its key is missing, say).
        McpConfigError: an MCP server of it cannot be used.
        BindingRefusedError: others could reach a server without keys.
        DatabaseError: the database cannot be opened.
        NetworkConfigError: the environment names no usable proxy or certificates.
        OSError: the address cannot be bound.
        SettingsError: what should be an origin, a host, a variable or a tool is none.
    """
    raise_descriptor_limit()
    shared = _shared_log(settings)
    declared = read_whole_agents_file(settings.agents_file) if settings.agents_file else AgentsFile()
    with (
        ExitStack() as leaving,
        closing(Database.open(settings.database_url)) as database,
        exporting_traces() if settings.otel else nullcontext() as exported,
    ):
        keyed = await database.read(any_keys)
        check_binding(settings.host, keyed)
        async with open_client(environment=os.environ) as client:
            servers = McpServers(declared.mcp_server, os.environ)
            base = Foundations(
                database=database,
                client=client,
                environment=os.environ,
                servers=servers,
                tools=_tools(servers),
                declared=declared,
                shared=shared,
                collector=exported,
            )
            composition = Composition(settings, base, keyed=keyed)
            listeners = _listen(settings, keyed)
            leaving.enter_context(database.present(end_runs_of_the_dead))  # from here on this is a server
            leave_within = partial(_leave_within, leaving)
            await composition.run(partial(_serve_until_end, settings, listeners, leave_within), leave_within)
    _logger.info("server.ended")


async def _serve_until_end(
    settings: ServerSettings, listeners: list[SocketListener], leave_within: LeaveWithin, services: Services
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        collect_seldom()
        _tell_started(services, listeners)
        await serve_until_signal(services, listeners, settings, signals, leave_within)


def _tools(servers: McpServers) -> ToolRegistry:
    tools = ToolRegistry(servers.by_name)
    for plugin, reason in tools.plugin_errors().items():
        _logger.warning("tools.not_loaded", entry_point=plugin, reason=reason)
    return tools


def _listen(settings: ServerSettings, keyed: bool) -> list[SocketListener]:
    listeners = listen_tcp(settings.host, settings.port, beside_others=bool(settings.worker))
    for listener in listeners:  # the name may have had another address when it was checked
        check_binding(listener.address[0], keyed)
    return listeners


def _shared_log(settings: ServerSettings) -> SharedLog | None:
    if settings.redis_url is None:
        return None
    if settings.lease < LEAST_LEASE_SECONDS:
        raise SettingsError(f"--lease must be at least {LEAST_LEASE_SECONDS:g} s: workers speak every third of it")
    try:
        from .run_uploads import SharedLimits  # noqa: PLC0415 - coredis is an extra
        from .shared_log import SharedLog  # noqa: PLC0415

        limits = SharedLimits(lease=settings.lease, retention=settings.retention)
        return SharedLog(settings.redis_url, settings.worker or str(os.getpid()), limits)
    except ImportError as error:
        raise SettingsError("--redis-url needs coredis: pip install 'lumos-stream[redis]'") from error
    except ValueError as error:
        raise SettingsError(f"--redis-url: {error}") from error


def _tell_started(services: Services, listeners: list[SocketListener]) -> None:
    agents = [record.id for record in services.directory.operators()] if services.directory else []
    database = services.database.name if services.database else None
    links = "lasting" if services.share_links and services.share_links.lasting else "until this process ends"
    _logger.info(
        "server.started", url=base_url(listeners[0]), agents=sorted(agents), database=database, share_links=links
    )


def base_url(listener: SocketListener) -> str:
    """The listener's address as a URL."""
    host, port = listener.address
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _leave_within(leaving: ExitStack, seconds: float) -> None:
    leaving.enter_context(_leave_after(seconds))


@contextmanager
def _leave_after(seconds: float) -> Iterator[None]:
    """End the process if leaving the block takes longer: a tool that does not let itself be cancelled must not hold it.

    A thread does it, because such a task may be the only one that still gets to run.
    """

    def leave() -> None:
        _logger.error("server.left", reason="tasks do not let themselves be cancelled", waited_seconds=seconds)
        flush_log()
        os._exit(0)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
