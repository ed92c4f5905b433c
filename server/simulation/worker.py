"""A worker of a simulated world: the real composition on the world's network, store and shared log, life after life."""

from __future__ import annotations

import signal
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import structlog
import trio

from engine import Run
from engine.log import RunLog
from providers.http import open_client
from providers.transport import TrioTransport
from server.agents import AgentsFile
from server.composition import Composition, Foundations, end_runs_of_the_dead, serve_until_signal
from server.logs import RunLogger
from server.mcp_tools import McpServers
from server.records import AgentRecord
from server.services import Services
from server.settings import ServerSettings
from server.shared_log import SharedLog
from server.store.errors import StoreUnavailableError
from server.testing.memory_network import MemoryNetwork
from server.tool_registry import ToolRegistry

from .determinism import living_tasks
from .memory_link import WorkerLinks
from .observations import LoggedEvent, Observations, ObservedRun
from .trace import Trace
from .worker_store import SimulatedStore

RESTART_SECONDS = 1.0
"""How long after a start that failed (the store was away) the next one comes, as a process manager would have it."""


class Surroundings(Protocol):
    """What a worker has of its world."""

    network: MemoryNetwork
    trace: Trace
    observations: Observations
    store: SimulatedStore
    settings: ServerSettings
    environment: dict[str, str]
    agents: list[AgentRecord]
    tools: ToolRegistry
    keyed: bool

    def address(self, worker: int) -> tuple[str, int]:
        """Where it listens."""
        ...

    def open_shared_log(self, life: Life) -> SharedLog | None:
        """Its side of the shared log; None in a world without one."""
        ...

    async def connect_upstream(self, life: Life, host: str, port: int, tls: bool) -> trio.abc.Stream:
        """A connection to a vendor."""
        ...


class Life:
    """One life of a worker's process. From its death on, nothing that is left of it reaches anything.

    Attributes:
        alive: until it is killed or has ended.
        crash: what it died of by itself; that is a bug.
    """

    def __init__(self, world: Surroundings, worker: int, number: int) -> None:
        self.worker = worker
        self.number = number
        self.name = f"worker{worker}"
        self.actor = f"{self.name}.{number}"
        self.alive = True
        self.over = False
        self.signalled = False
        self.crash: BaseException | None = None
        self.composition: Composition | None = None
        self.services: Services | None = None
        self.shared: SharedLog | None = None
        self.links: WorkerLinks | None = None
        self.transport: TrioTransport | None = None
        self._world = world
        self._scope = trio.CancelScope()
        self._signals, self._receiver = trio.open_memory_channel[int](10)
        self._nursery: trio.Nursery | None = None

    def signal(self, signum: int = signal.SIGTERM) -> None:
        """Send it a signal."""
        if self.alive:
            self._world.trace.note(self.actor, "signal", number=int(signum))
            self.signalled = True
            with suppress(trio.WouldBlock, trio.BrokenResourceError):  # nobody waits for further ones
                self._signals.send_nowait(signum)

    def kill(self, why: str = "killed") -> None:
        """End it as ``kill -9`` does: its connections are reset, and what its tasks still do comes to nothing."""
        if self.alive:
            self._world.trace.note(self.actor, why)
            self._vanish()
            self._scope.cancel(reason=why)

    async def live(self) -> None:
        """Serve until killed, or until signals have ended it; what tasks do after a death may take some time more."""
        structlog.contextvars.bind_contextvars(worker=self.actor)
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    await self._start()
                    nursery.cancel_scope.cancel(reason="the process has ended")
        except* Exception as crash:  # noqa: BLE001 - whatever ends a worker is to be told
            if self.alive:
                self.crash = crash
                self._world.trace.note(self.actor, "crashed", error=type(crash.exceptions[0]).__name__)
        finally:
            if self.alive:
                self._world.trace.note(self.actor, "ended")
                self._vanish()
            self.over = True

    async def _start(self) -> None:
        world = self._world
        database = world.store.handle(lambda: self.alive)
        while True:
            try:
                with database.present(end_runs_of_the_dead):
                    world.trace.note(self.actor, "started")
                    await self._serve(database)
                return
            except StoreUnavailableError as error:
                world.trace.note(self.actor, "not started", reason=str(error))
                await trio.sleep(RESTART_SECONDS)

    async def _serve(self, database: Any) -> None:
        world = self._world
        servers = McpServers([], world.environment)
        self.shared = world.open_shared_log(self)
        async with open_client(self._connect) as client:
            self.transport = client._transport  # type: ignore[assignment]
            base = Foundations(
                database=database,
                client=client,
                environment=world.environment,
                servers=servers,
                tools=world.tools,
                declared=AgentsFile(agent=world.agents),
                shared=self.shared,
                followers=(RunRecorder(self, world.trace, world.observations),),
                observer=CrashRecorder(self, world),
            )
            self.composition = Composition(world.settings, base, keyed=world.keyed)
            listener = world.network.listen(*world.address(self.worker))
            await self.composition.run(partial(self._serve_until_signal, listener), self._leave_within)

    async def _serve_until_signal(self, listener: trio.abc.Listener[Any], services: Services) -> None:
        self.services = services
        await serve_until_signal(services, [listener], self._world.settings, self._receiver, self._leave_within)

    def _leave_within(self, seconds: float) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._leave, seconds)

    async def _leave(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self.kill("left")

    async def _connect(self, host: str, port: int, tls: bool) -> trio.abc.Stream:
        if not self.alive:
            raise ConnectionRefusedError("this process is dead")
        return await self._world.connect_upstream(self, host, port, tls)

    def _vanish(self) -> None:
        """Nothing of the process is there any more: the kernel closes what it had open."""
        self.alive = False
        if self.links is not None:
            self.links.kill()
        address = self._world.address(self.worker)
        self._world.network.drop_listener(*address)
        for connection in self._world.network.connections:
            ours = [connection.server] if connection.server.socket.local == address else []
            if connection.client.socket.local[0] == self.name:
                ours.append(connection.client)
            for end in ours:
                if end.closed_at is None:
                    connection.reset()
                    end.close()


class RunRecorder:
    """A log follower that puts every event into the trace and the observations, unless its worker is dead."""

    def __init__(self, life: Life, trace: Trace, seen: Observations) -> None:
        self._life = life
        self._trace = trace
        self._seen = seen

    def follow(self, run: Run) -> None:
        """A run has started."""
        if self._life.alive:
            worker, number = self._life.worker, self._life.number
            self._seen.runs[run.id] = ObservedRun(run, worker, number, trio.current_time())
            self.appended(run.log)

    def appended(self, log: RunLog) -> None:
        """There is an event more."""
        if not self._life.alive:
            return
        events = self._seen.runs[log.run_id].events
        for entry in log.entries(len(events)):
            events.append(LoggedEvent(trio.current_time(), entry.seq, entry.event, entry.frame))
            self._trace.note(self._life.actor, "event", frame=entry.frame)


class CrashRecorder(RunLogger):
    """Logs as the server does, and keeps the bugs that ended runs and how much was there at most."""

    def __init__(self, life: Life, world: Surroundings) -> None:
        super().__init__()
        self._life = life
        self._network = world.network
        self._seen = world.observations

    def run_started(self, run: Run) -> None:
        """See ``RunLogger``."""
        super().run_started(run)
        self._measure()

    def run_ended(self, run: Run) -> None:
        """See ``RunLogger``."""
        super().run_ended(run)
        self._measure()
        self._largest("log_bytes", run.log.size_bytes)

    def run_crashed(self, run: Run, bug: BaseException) -> None:
        """See ``RunLogger``."""
        super().run_crashed(run, bug)
        if self._life.alive and run.id in self._seen.runs:
            self._seen.runs[run.id].crashes.append(bug)

    def _measure(self) -> None:
        services, composition = self._life.services, self._life.composition
        if services is not None and composition is not None:
            self._largest("active_runs", services.supervisor.active_runs)
            self._largest("places", composition.admission.taken)
            self._largest("unsaved_turns", len(composition.memories.unsaved))
            self._largest("journal_bytes", composition.journal._ended_bytes)
        self._largest("tasks", living_tasks())
        self._largest("connections", len(self._network.open_connections()))

    def _largest(self, name: str, figure: int) -> None:
        self._seen.bounds[name] = max(figure, self._seen.bounds.get(name, 0))
