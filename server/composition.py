"""A server below its sockets, signals and threads: the same on a real clock and in a simulated world."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx
import msgspec
import structlog
import trio
from quart_trio import QuartTrio
from sqlalchemy import Connection

from engine import RetentionLimits, RunSupervisor
from engine.observer import RunObserver
from engine.run import utc_now
from engine.trace import EachOf, InMemoryTraces, TraceCollector

from .admission import Admission
from .agents import AgentsFile, AgentsFileError
from .app import create_app
from .auth import Gatekeeper
from .cors import Cors
from .directory import AgentDirectory
from .factory import AgentConfigError, AgentFactory
from .guard import RequestGuard
from .journal import Journal
from .journal_log import JournalSource
from .log_followers import LogFollower, LogFollowers
from .logs import RunLogger
from .mcp_tools import McpServers
from .memory import MemoryStore
from .provider_policy import ProviderPolicy
from .records import AgentRecord
from .services import Services
from .serving import serve
from .settings import ServerSettings, SettingsError
from .share_links import BadSecretError, ShareLinks
from .store.database import Database
from .store.interrupted import Ending, end_run, interrupt_runs
from .store.times import time_text
from .tool_policy import ToolPolicy
from .tool_registry import ToolRegistry
from .unsaved_turns import UnsavedTurns

if TYPE_CHECKING:
    from .leases import KnownEvents
    from .shared_log import SharedLog

CLEANUP_SECONDS = 5.0
"""What tasks that do not let themselves be cancelled (a tool of somebody's) get before the process leaves them."""

FLUSH_SECONDS = 3.0
"""What the store gets to take the last turns and events, when the server ends."""

JOIN_SECONDS = 1.0
"""What Redis gets to know this worker before it serves: a run that is told before would be its alone."""

LEAVE_SECONDS = 1.0
"""What Redis gets to hear that this worker has gone; with the above within ``CLEANUP_SECONDS``."""

HURRY_SECONDS = 1.0
"""What everything together gets from the second signal on, whatever hangs."""

LeaveWithin: TypeAlias = Callable[[float], object]
"""Has the process end after so many seconds, whatever is still under way then. May be called again with less."""

_logger = structlog.get_logger("lumos")


@dataclass(frozen=True, kw_only=True)
class Foundations:
    """What a composition stands on; closing any of it is its maker's.

    Attributes:
        client: what all requests to models go through.
        environment: where keys are.
        servers, tools: what agents may call.
        collector: hears of the spans of runs beside what is kept in memory.
        followers: copy runs' events elsewhere, beside the journal and the shared log.
        observer: hears of runs' turning points.
    """

    database: Database
    client: httpx.AsyncClient
    environment: Mapping[str, str]
    servers: McpServers
    tools: ToolRegistry
    declared: AgentsFile
    shared: SharedLog | None = None
    collector: TraceCollector | None = None
    followers: tuple[LogFollower, ...] = ()
    observer: RunObserver | None = None


class Composition:
    """All that serves, but for the listeners. What cannot be had is known once this is made, before a run can be.

    Attributes:
        journal, memories, admission, gatekeeper: the parts that have a state to look at.
    """

    def __init__(self, settings: ServerSettings, base: Foundations, *, keyed: bool) -> None:
        """Start nothing yet.

        Raises:
            AgentsFileError: an agent of the file cannot be built.
            SettingsError: what should be an origin, a host, a variable, a tool or a secret is none.
        """
        self._settings = settings
        self._base = base
        self._traces = InMemoryTraces(settings.traces)
        collector = EachOf(self._traces, base.collector) if base.collector else self._traces
        self._factory = AgentFactory(base.database, base.environment, base.client, base.tools, traces=collector)
        assert self._factory.memories is not None, "there is a database"
        self.memories: MemoryStore = self._factory.memories
        self.journal = Journal(base.database)
        self.admission = Admission(settings.admission)
        self._cors, self._policy, self._tool_policy = _allowed(settings, keyed)
        _check_agents(base.declared.agent, self._factory)
        self.gatekeeper = Gatekeeper(base.database, keyed=keyed)
        self._links = _share_links(settings)
        self._shares = () if base.shared is None else (base.shared,)

    async def run(self, serve_until_end: Callable[[Services], Awaitable[None]], leave_within: LeaveWithin) -> None:
        """Do all that a server does beside serving for as long as ``serve_until_end`` serves, then end it in order."""
        base, memories, shares = self._base, self.memories, self._shares
        async with trio.open_nursery() as keeping:
            keeping.start_soon(memories.unsaved.work)
            keeping.start_soon(self.journal.work)
            keeping.start_soon(self.journal.sweep, self._settings.keep_runs_days)
            async with trio.open_nursery() as background, trio.open_nursery() as runs:
                await background.start(base.servers.run)
                background.start_soon(memories.backlog.work)
                background.start_soon(base.database.keep_tidy)
                services = self._services(runs)
                for share in shares:
                    share.settle_with(partial(_settle, base.database))
                    background.start_soon(share.run, services.supervisor)
                    with trio.move_on_after(JOIN_SECONDS):  # without Redis it serves too, later
                        await share.wait_available()
                await serve_until_end(services)
                leave_within(CLEANUP_SECONDS)
                for share in shares:
                    with trio.move_on_after(LEAVE_SECONDS):
                        await share.leave()
                background.cancel_scope.cancel(reason="the server has ended")  # and the runs with it
            await _flush(memories.unsaved, self.journal)  # what the last runs left behind too
            keeping.cancel_scope.cancel(reason="the server has ended")

    def _services(self, runs: trio.Nursery) -> Services:
        """What the routes work on; runs live in the nursery."""
        settings, base, shares = self._settings, self._base, self._shares
        followers = LogFollowers(*base.followers, self.journal, *shares, observer=base.observer or RunLogger())
        supervisor = RunSupervisor(runs, followers, RetentionLimits(seconds=settings.retention))
        return Services(
            agents={},
            supervisor=supervisor,
            sources=(*shares, JournalSource(base.database, supervisor, self.journal)),
            shared_log=base.shared,
            admission=self.admission,
            share_links=self._links,
            resume_grace=settings.resume_grace,
            directory=AgentDirectory(base.declared.agent, base.database),
            factory=self._factory,
            database=base.database,
            gatekeeper=self.gatekeeper,
            guard=RequestGuard(self.gatekeeper.is_keyed, self._cors),
            traces=self._traces,
            tools=base.tools,
            policy=self._policy,
            tool_policy=self._tool_policy,
            environment=base.environment,
        )


async def serve_until_signal(
    services: Services,
    listeners: Sequence[trio.abc.Listener[Any]],
    settings: ServerSettings,
    signals: AsyncIterator[int],
    leave_within: LeaveWithin,
    make_app: Callable[[Services], QuartTrio] = create_app,
) -> None:
    """Serve until a signal came and all is drained; a second one hurries that. Closes the listeners."""
    stopping = trio.Event()
    async with trio.open_nursery() as watching:
        hurry = partial(_hurry_at_signal, signals, leave_within)
        watching.start_soon(_drain_at_signal, signals, services, settings.drain, stopping, hurry)
        await serve(make_app(services), listeners, stopping, settings.limits)
        watching.cancel_scope.cancel(reason="serving has ended")


def end_runs_of_the_dead(c: Connection) -> None:
    """Runs that a server left under way when it died: no other is there, so nobody goes on with them."""
    now = time_text(utc_now())
    if interrupted := interrupt_runs(c, now):
        _logger.warning("runs.interrupted", runs=interrupted)


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


async def _hurry_at_signal(signals: AsyncIterator[int], leave_within: LeaveWithin, draining: trio.CancelScope) -> None:
    await anext(signals)
    leave_within(HURRY_SECONDS)
    draining.cancel(reason="a second signal")


async def _flush(unsaved: UnsavedTurns, journal: Journal) -> None:
    """Give the store a last, bounded chance to take the turns and events that it has not taken."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(unsaved.flush, FLUSH_SECONDS)
        nursery.start_soon(journal.flush, FLUSH_SECONDS)


async def _settle(database: Database, run_id: str, known: KnownEvents) -> Ending | None:
    """Have the store keep how a run ended whose worker died, and all that is known of it. Raises as ``write``."""
    return await database.write(end_run, run_id, "worker_lost", time_text(utc_now()), known)


def _share_links(settings: ServerSettings) -> ShareLinks:
    try:
        return ShareLinks(settings.share_secret, lasting=settings.share_secret_lasts)
    except BadSecretError as error:
        raise SettingsError(str(error)) from error


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
