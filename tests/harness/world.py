"""A whole world in memory: Lumos's real server over a real connection class, model servers, and httpx clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import trio

from engine import BasicAgent, Provider, RetentionLimits, RunSupervisor
from engine.run import Run, utc_now
from engine.trace import InMemoryTraces
from providers.failover import FailoverProvider, Link
from providers.http import open_client
from providers.openai_chat import OpenAIChatProvider
from providers.recording import Recording
from server.admission import Admission
from server.app import Services, create_app
from server.auth import Gatekeeper
from server.directory import AgentDirectory
from server.factory import AgentFactory
from server.guard import RequestGuard
from server.journal import Journal
from server.journal_log import JournalSource
from server.keys import make_key
from server.log_followers import LogFollowers
from server.principal import KeyLimits
from server.records import AgentRecord
from server.serving import ServingLimits, serve
from server.share_links import ShareLinks
from server.store import keys as key_rows
from server.store.database import Database
from server.testing.memory_network import MemoryNetwork
from server.testing.streamed_events import StreamedEvents
from server.tool_registry import ToolRegistry
from tests.harness.vendor import Act, VendorServer, play_script

LUMOS = ("lumos", 80)
VENDOR = ("vendor", 80)
EPOCH = datetime(2026, 11, 22, 12, tzinfo=UTC)
"""What share links' wall clock says when trio's begins."""

STREAM_URL = "http://lumos/api/v1/agents/demo/chat/lumosai/stream"


class RunNotes:
    """A run observer that keeps what it hears, in order."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, float]] = []
        self.bugs: list[BaseException] = []

    def _note(self, what: str, run: Run) -> None:
        self.entries.append((what, run.id, trio.current_time()))

    def run_started(self, run: Run) -> None:
        self._note("started", run)

    def run_first_token(self, run: Run) -> None:
        self._note("first_token", run)

    def run_ended(self, run: Run) -> None:
        self._note("ended", run)

    def run_crashed(self, run: Run, bug: BaseException) -> None:
        self._note("crashed", run)
        self.bugs.append(bug)


class World:
    """The pieces of the world, for a test to look at. Made by ``open_world``.

    ``database`` is that of a world that keeps things: agents that are records, sessions, memories, keys.
    """

    def __init__(self, network: MemoryNetwork, nursery: trio.Nursery, runs: trio.Nursery) -> None:
        self.network = network
        self.nursery = nursery
        self.runs = runs
        self.journal = RunNotes()
        self.supervisor = RunSupervisor(runs, self.journal, RetentionLimits())
        self.agents: dict[str, BasicAgent] = {}
        self.model_client = open_client(network.connect)
        self.client = open_client(network.connect)
        self.stopping = trio.Event()
        self.database: Database | None = None
        self.run_journal: Journal | None = None
        self.wall_clock: Callable[[], datetime] = lambda: EPOCH + timedelta(seconds=trio.current_time())

    def add_agent(
        self, agent_id: str = "demo", provider: Provider | None = None, *, in_chain: bool = False, **settings: Any
    ) -> None:
        """Declare an agent; without a provider it asks the model server at ``VENDOR``.

        ``in_chain`` puts the provider into a failover chain of its own, without retries, as agents from a file have it.
        """
        provider = provider or OpenAIChatProvider(base_url="http://vendor/v1", api_key="k", client=self.model_client)
        if in_chain:
            provider = FailoverProvider([Link(provider=provider, model="m", retries=0)])
        self.agents[agent_id] = BasicAgent(agent_id=agent_id, provider=provider, model="m", **settings)

    async def add_key(
        self, tenant: str, user: str, *, admin: bool = False, limits: KeyLimits | None = None
    ) -> dict[str, str]:
        """The headers of a new API key. From the first one on (within ``KEY_SECONDS``) nobody is let in without."""
        assert self.database is not None
        key, text = make_key(tenant, user, admin, "", limits or KeyLimits(), utc_now().isoformat())
        await self.database.write(key_rows.create_key, key)
        return {"Authorization": f"Bearer {text}"}

    def services(self, declared: Sequence[AgentRecord], environment: Mapping[str, str]) -> Services:
        """Of a server that keeps things, in ``database``."""
        assert self.database is not None
        tools, traces = ToolRegistry(), InMemoryTraces()
        return Services(
            self.agents,
            self.supervisor,
            directory=AgentDirectory(declared, self.database),
            factory=AgentFactory(self.database, environment, self.model_client, tools, traces=traces),
            database=self.database,
            gatekeeper=Gatekeeper(self.database),
            tools=tools,
            environment=environment,
            traces=traces,
            share_links=ShareLinks("a secret of this test", self.wall_clock),
            sources=(JournalSource(self.database, self.supervisor, self.run_journal),),
        )

    def keep_runs(self, database: Database, retention: RetentionLimits) -> None:
        """Have a store, and a journal of the runs in it; ended ones stay in memory within these limits."""
        self.database = database
        self.run_journal = Journal(database, wall_clock=self.wall_clock)
        followers = LogFollowers(self.run_journal, observer=self.journal)
        self.supervisor = RunSupervisor(self.runs, followers, retention)

    async def add_vendor(self, recording: Recording) -> VendorServer:
        """Start a model server that replays the recording over HTTP."""
        vendor = VendorServer(recording)
        await self.nursery.start(serve, vendor.app(), [self.network.listen(*VENDOR)], trio.Event())
        return vendor

    def add_scripted_vendor(self, script: Sequence[Act]) -> None:
        """Start a model server that sends these bytes."""
        self.nursery.start_soon(play_script, self.network.listen(*VENDOR), script)

    async def chat(self, **body: Any) -> Answer:
        """Stream one answer of agent ``demo`` to its end."""
        async with self.open_chat(**body) as answer:
            async for _ in answer:
                pass
            return answer

    @asynccontextmanager
    async def open_chat(self, **body: Any) -> AsyncIterator[Answer]:
        """Start streaming an answer of agent ``demo``; leaving the block closes the connection."""
        async with self.client.stream("POST", STREAM_URL, json={"message": "hi"} | body) as response:
            yield Answer(response)

    def upstream_open(self) -> int:
        """How many connections to the model server are in use or idle."""
        return len(self.network.open_connections(VENDOR[0]))


class Answer(StreamedEvents):
    """A streamed response; ``asked_at`` is when its head had come."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(response)
        self.asked_at = trio.current_time()


@asynccontextmanager
async def open_world(
    limits: ServingLimits | None = None,
    *,
    window: int = 65_536,
    admission: Admission | None = None,
    guard: RequestGuard | None = None,
) -> AsyncIterator[World]:
    """A world with Lumos serving at ``LUMOS``; its agents are added by the test. All is gone after the block."""
    async with _open_world(window) as world:
        services = Services(world.agents, world.supervisor, resume_grace=5.0, admission=admission, guard=guard)
        await _serve(world, services, limits)
        yield world


@asynccontextmanager
async def open_keeping_world(
    *declared: AgentRecord,
    environment: Mapping[str, str] | None = None,
    database: Database | None = None,
    retention: RetentionLimits | None = None,
) -> AsyncIterator[World]:
    """A world whose Lumos has a store, the built-in agents, and these.

    The store is one in memory that takes no virtual time, or the one given, which stays the caller's to close.
    """
    async with _open_world() as world:
        world.keep_runs(database or Database.open("sqlite://", inline=True), retention or RetentionLimits())
        await _serve(world, world.services(declared, environment or {}))
        assert world.run_journal is not None
        assert world.database is not None
        world.nursery.start_soon(world.run_journal.work)
        yield world
        if database is None:
            world.database.close()


@asynccontextmanager
async def _open_world(window: int = 65_536) -> AsyncIterator[World]:
    network = MemoryNetwork(window)
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as runs:
            world = World(network, nursery, runs)
            yield world
            runs.cancel_scope.cancel()
        await world.client.aclose()
        await world.model_client.aclose()
        nursery.cancel_scope.cancel()


async def _serve(world: World, services: Services, limits: ServingLimits | None = None) -> None:
    app = create_app(services)
    await world.nursery.start(serve, app, [world.network.listen(*LUMOS)], world.stopping, limits or ServingLimits())
