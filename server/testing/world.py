"""What every world in memory is made of: Lumos's real server and its connections, an httpx client, a store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import httpx
import msgspec
import trio

from engine import BasicAgent, Event, RetentionLimits, RunSupervisor
from engine.run import Run
from engine.trace import InMemoryTraces
from providers.http import open_client
from providers.sse import SSEParser
from server.app import create_app
from server.auth import Gatekeeper
from server.directory import AgentDirectory
from server.factory import AgentFactory
from server.journal import Journal
from server.journal_log import JournalSource
from server.log_followers import LogFollowers
from server.records import AgentRecord
from server.services import Services
from server.serving import ServingLimits, serve
from server.share_links import ShareLinks
from server.store.database import Database
from server.tool_registry import ToolRegistry, ToolSource

from .memory_network import MemoryNetwork

LUMOS = ("lumos", 80)
EPOCH = datetime(2026, 11, 22, 12, tzinfo=UTC)
"""What the wall clock says when trio's begins."""

_decode_event = msgspec.json.Decoder(Event).decode


class RunNotes:
    """A run observer that keeps what it hears, in order."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, float]] = []
        self.bugs: list[BaseException] = []

    def _note(self, what: str, run: Run) -> None:
        self.entries.append((what, run.id, trio.current_time()))

    def run_started(self, run: Run) -> None:
        """Note it."""
        self._note("started", run)

    def run_first_token(self, run: Run) -> None:
        """Note it."""
        self._note("first_token", run)

    def run_ended(self, run: Run) -> None:
        """Note it."""
        self._note("ended", run)

    def run_crashed(self, run: Run, bug: BaseException) -> None:
        """Note it, and the bug."""
        self._note("crashed", run)
        self.bugs.append(bug)


class BaseWorld:
    """The pieces of a world, made by ``open_pieces``.

    Attributes:
        network: on which everything is.
        nursery: of servers, ``runs`` that of the runs.
        agents: by id, served to everybody; more may be added at any time.
        model_client: through which the model is asked; ``client`` is somebody who uses the server.
        database: of a world that keeps things: agents that are records, sessions, memories, keys.
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

    def services(
        self,
        declared: Sequence[AgentRecord],
        environment: Mapping[str, str],
        *,
        tool_source: Callable[[ToolRegistry], ToolSource] = lambda registry: registry,
        resume_grace: float = 5.0,
    ) -> Services:
        """Of a server that keeps things, in ``database``. ``tool_source`` may put itself before the agents' tools."""
        assert self.database is not None
        tools, traces = ToolRegistry(), InMemoryTraces()
        return Services(
            self.agents,
            self.supervisor,
            resume_grace=resume_grace,
            directory=AgentDirectory(declared, self.database),
            factory=AgentFactory(self.database, environment, self.model_client, tool_source(tools), traces=traces),
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

    async def serve_lumos(self, services: Services, limits: ServingLimits | None = None) -> None:
        """Serve at ``LUMOS`` until the world ends; a world that keeps things writes its runs down too."""
        app, listeners = create_app(services), [self.network.listen(*LUMOS)]
        await self.nursery.start(serve, app, listeners, self.stopping, limits or ServingLimits())
        if self.run_journal is not None:
            self.nursery.start_soon(self.run_journal.work)


@asynccontextmanager
async def open_pieces(
    make: Callable[[MemoryNetwork, trio.Nursery, trio.Nursery], BaseWorld], window: int = 65_536
) -> AsyncIterator[BaseWorld]:
    """The pieces, nothing served yet; after the block the runs are gone, then the servers."""
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as runs:
            world = make(MemoryNetwork(window), nursery, runs)
            yield world
            runs.cancel_scope.cancel()
        await world.client.aclose()
        await world.model_client.aclose()
        nursery.cancel_scope.cancel()


class StreamedEvents:
    """The events of a streamed response with ids and arrival times (on trio's clock), while they come."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.events: list[Event] = []
        self.ids: list[str] = []
        self.arrivals: list[float] = []
        self._body = response.extensions["body"]
        self._parser = SSEParser()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while chunk := await self._body.receive():
            for frame in self._parser.feed(chunk):
                event: Event = _decode_event(frame.data)
                self.events.append(event)
                self.ids.append(frame.id)
                self.arrivals.append(trio.current_time())
                yield event

    @property
    def run_id(self) -> str:
        """The run's id, from the header."""
        return str(self.response.headers["X-Run-Id"])
