"""The composition root: the one place where settings become listeners, agents, store, supervisor and app."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog
import trio
from sqlalchemy import Connection

from engine import RetentionLimits, RunSupervisor
from engine.run import utc_now
from engine.trace import EachOf, InMemoryTraces
from providers.http import open_client

from .admission import Admission, AdmissionLimits
from .agents import AgentsFile, AgentsFileError, read_whole_agents_file
from .app import create_app
from .auth import Gatekeeper
from .cors import Cors
from .directory import AgentDirectory
from .factory import AgentConfigError, AgentFactory
from .guard import RequestGuard, check_binding
from .journal import Journal
from .journal_log import JournalSource
from .log_followers import LogFollowers
from .logs import RunLogger, flush_log
from .mcp_tools import McpServers
from .otel import exporting_traces
from .provider_policy import ProviderPolicy
from .records import AgentRecord
from .services import Services
from .serving import ServingLimits, serve
from .share_links import BadSecretError, ShareLinks
from .sockets import SocketListener, listen_tcp, raise_descriptor_limit
from .store.database import Database
from .store.errors import StoreUnavailableError
from .store.interrupted import end_run, interrupt_runs
from .store.keys import any_keys
from .store.times import time_text
from .tool_policy import ToolPolicy
from .tool_registry import ToolRegistry
from .unsaved_turns import UnsavedTurns

if TYPE_CHECKING:
    from .shared_log import SharedLog

_logger = structlog.get_logger("lumos")

DEFAULT_DATABASE_URL = "sqlite:///lumos.db"

CLEANUP_SECONDS = 5.0
"""What tasks that do not let themselves be cancelled (a tool of somebody's) get before the process leaves them."""

FLUSH_SECONDS = 3.0
"""What the store gets to take the last turns and events, when the server ends."""

LEAVE_SECONDS = 1.0
"""What Redis gets to hear that this worker has gone; with the above within ``CLEANUP_SECONDS``."""

HURRY_SECONDS = 1.0
"""What everything together gets from the second signal on, whatever hangs."""

LEAST_LEASE_SECONDS = 0.5


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What ``lumos serve`` takes. Times in seconds.

    Attributes:
        database_url: where agents, sessions, memories and keys are.
        agents_file: TOML with ``[[agent]]`` and ``[[mcp_server]]`` tables, beside the built-in agents.
        resume_grace: how long a run goes on after its last reader has left.
        retention: how long ended runs stay in memory; after that they are read from the store.
        keep_runs_days: how long the store keeps runs' events.
        drain: how long running streams may go on after SIGTERM.
        cors_origins: whose pages may use the server from a browser.
        allowed_provider_hosts, allowed_key_variables: what tenants' admins may name in agents.
        allowed_tools: what agents made through the API may name beside the built-in tools, once there are keys.
        redis_url: where workers and hosts share their runs; None for a server that is alone.
        lease: how long a worker may be silent before the others end its runs.
        workers: how many processes.
        worker: which of them this is; empty without others.
        traces: how many runs' traces are kept in memory.
        otel: whether they are sent out by OTLP too.
        admission: how many runs this worker takes.
        share_secret: signs share links; empty for a random one of this process.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    database_url: str = DEFAULT_DATABASE_URL
    agents_file: Path | None = None
    resume_grace: float = 5.0
    retention: float = 600.0
    keep_runs_days: float = 30.0
    drain: float = 30.0
    cors_origins: tuple[str, ...] = ()
    allowed_provider_hosts: tuple[str, ...] = ()
    allowed_key_variables: tuple[str, ...] = ()
    allowed_tools: tuple[str, ...] = ()
    traces: int = 200
    otel: bool = False
    admission: AdmissionLimits = AdmissionLimits()
    share_secret: str = ""
    redis_url: str | None = None
    lease: float = 10.0
    workers: int = 1
    worker: str = ""
    limits: ServingLimits = ServingLimits()


class SettingsError(ValueError):
    """A setting cannot be used; the text says which and why."""


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
    shares = () if shared is None else (shared,)
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
            traces = InMemoryTraces(settings.traces)
            collector = EachOf(traces, exported) if exported else traces
            tools = _tools(servers)
            factory = AgentFactory(database, os.environ, client, tools, traces=collector)
            journal = Journal(database)
            make_services = _services(
                settings, declared, database, factory, tools, traces, journal, shared, keyed=keyed
            )
            listeners = _listen(settings, keyed)
            memories = factory.memories
            assert memories is not None, "there is a database"
            leaving.enter_context(database.present(_end_runs_of_the_dead))  # from here on this is a server
            async with trio.open_nursery() as keeping:
                keeping.start_soon(memories.unsaved.work)
                keeping.start_soon(journal.work)
                keeping.start_soon(journal.sweep, settings.keep_runs_days)
                async with trio.open_nursery() as background, trio.open_nursery() as runs:
                    await background.start(servers.run)
                    background.start_soon(memories.backlog.work)
                    services = make_services(runs)
                    for share in shares:
                        share.tell_lost(partial(_end_lost_run, database))
                        background.start_soon(share.run, services.supervisor)
                    await _serve_until_signal(services, listeners, settings, leaving)
                    leaving.enter_context(_leave_after(CLEANUP_SECONDS))
                    for share in shares:
                        with trio.move_on_after(LEAVE_SECONDS):
                            await share.leave()
                    background.cancel_scope.cancel(reason="the server has ended")  # and the runs with it
                await _flush(memories.unsaved, journal)  # what the last runs left behind too
                keeping.cancel_scope.cancel(reason="the server has ended")
    _logger.info("server.ended")


def _services(
    settings: ServerSettings,
    declared: AgentsFile,
    database: Database,
    factory: AgentFactory,
    tools: ToolRegistry,
    traces: InMemoryTraces,
    journal: Journal,
    shared: SharedLog | None,
    *,
    keyed: bool,
) -> Callable[[trio.Nursery], Services]:
    """What the routes work on, but for the nursery of the runs: what cannot be had is known before a run can be."""
    shares = () if shared is None else (shared,)
    cors, policy, tool_policy = _allowed(settings, keyed)
    _check_agents(declared.agent, factory)
    gatekeeper = Gatekeeper(database, keyed=keyed)
    links = _share_links(settings)

    def make(runs: trio.Nursery) -> Services:
        followers = LogFollowers(journal, *shares, observer=RunLogger())
        supervisor = RunSupervisor(runs, followers, RetentionLimits(seconds=settings.retention))
        return Services(
            agents={},
            supervisor=supervisor,
            sources=(*shares, JournalSource(database, supervisor, journal)),
            shared_log=shared,
            admission=Admission(settings.admission),
            share_links=links,
            resume_grace=settings.resume_grace,
            directory=AgentDirectory(declared.agent, database),
            factory=factory,
            database=database,
            gatekeeper=gatekeeper,
            guard=RequestGuard(gatekeeper.is_keyed, cors),
            traces=traces,
            tools=tools,
            policy=policy,
            tool_policy=tool_policy,
            environment=os.environ,
        )

    return make


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


async def _flush(unsaved: UnsavedTurns, journal: Journal) -> None:
    """Give the store a last, bounded chance to take the turns and events that it has not taken."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(unsaved.flush, FLUSH_SECONDS)
        nursery.start_soon(journal.flush, FLUSH_SECONDS)


def _end_runs_of_the_dead(c: Connection) -> None:
    """Runs that a server left under way when it died: no other is there, so nobody goes on with them."""
    now = time_text(utc_now())
    if interrupted := interrupt_runs(c, now):
        _logger.warning("runs.interrupted", runs=interrupted)


async def _end_lost_run(database: Database, run_id: str) -> None:
    """What the store has of a run whose worker died gets its end too."""
    now = time_text(utc_now())
    try:
        await database.write(end_run, run_id, "worker_lost", now)
    except StoreUnavailableError as error:
        _logger.error("run.end_not_kept", run_id=run_id, reason=str(error))


def _share_links(settings: ServerSettings) -> ShareLinks:
    try:
        return ShareLinks(settings.share_secret)
    except BadSecretError as error:
        raise SettingsError(str(error)) from error


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


def _allowed(settings: ServerSettings, keyed: bool) -> tuple[Cors, ProviderPolicy, ToolPolicy]:
    try:
        policy = ProviderPolicy.allowing(settings.allowed_provider_hosts, settings.allowed_key_variables)
        return Cors(settings.cors_origins, keyed=keyed), policy, ToolPolicy.allowing(settings.allowed_tools)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _check_agents(records: list[AgentRecord], factory: AgentFactory) -> None:
    """Refuse a file with an agent that cannot be built. MCP servers' tools are not asked for: they come and go."""
    for record in records:
        own_tools = tuple(name for name in record.tools if "." not in name)
        try:
            factory.check(msgspec.structs.replace(record, tools=own_tools))
        except AgentConfigError as error:
            raise AgentsFileError(str(error)) from error


async def _serve_until_signal(
    services: Services, listeners: list[SocketListener], settings: ServerSettings, leaving: ExitStack
) -> None:
    """``leaving`` gets what ends the process if it takes too long; its maker closes it at the very end."""
    stopping = trio.Event()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        _tune_garbage_collector()
        agents = [record.id for record in services.directory.operators()] if services.directory else []
        database = services.database.name if services.database else None
        links = "lasting" if services.share_links and services.share_links.lasting else "until this process ends"
        _logger.info(
            "server.started", url=base_url(listeners[0]), agents=sorted(agents), database=database, share_links=links
        )
        async with trio.open_nursery() as watching:
            hurry = partial(_hurry_at_signal, signals, leaving)
            watching.start_soon(_drain_at_signal, signals, services, settings.drain, stopping, hurry)
            await serve(create_app(services), listeners, stopping, settings.limits)
            watching.cancel_scope.cancel(reason="serving has ended")


async def _drain_at_signal(
    signals: AsyncIterator[int],
    services: Services,
    drain: float,
    stopping: trio.Event,
    hurry: Callable[[trio.CancelScope], Awaitable[None]],
) -> None:
    """At the first signal drain, then let serving stop; at a second one drain no longer, and wait for nobody."""
    signum = await anext(signals)
    seconds = drain if signum == signal.SIGTERM else 0.0
    supervisor = services.supervisor
    if services.admission is not None:
        services.admission.close()
    _logger.info("server.draining", active_runs=supervisor.active_runs, drain_seconds=seconds)
    draining = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hurry, draining)
        with draining:
            await supervisor.drain(seconds)
        supervisor.end_all()
        stopping.set()


async def _hurry_at_signal(signals: AsyncIterator[int], leaving: ExitStack, draining: trio.CancelScope) -> None:
    await anext(signals)
    leaving.enter_context(_leave_after(HURRY_SECONDS))
    draining.cancel(reason="a second signal")


def base_url(listener: SocketListener) -> str:
    """The listener's address as a URL."""
    host, port = listener.address
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _tune_garbage_collector() -> None:
    """What start-up made stays; collect seldom (with 1,000 tasks alive a wake-up took 50 µs before, 18 after)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


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
