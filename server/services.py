"""What the routes work on: all that the composition root made, handed over as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Protocol, TypeVar, TypeVarTuple

from sqlalchemy import Connection

from engine import BasicAgent, RunSupervisor
from engine.run import utc_now
from engine.trace import InMemoryTraces

from .admission import Admission
from .auth import Gatekeeper
from .availability import StoreProbe, or_unavailable
from .batches import BatchDirectory, SharedBatches
from .directory import AgentDirectory
from .errors import ApiError
from .factory import AgentFactory
from .guard import RequestGuard
from .idempotency import IdempotencyKeys
from .provider_policy import ProviderPolicy
from .run_directory import RunDirectory, RunSource
from .share_links import ShareLinks
from .store.database import Database
from .store.times import time_text
from .tool_policy import ToolPolicy
from .tool_registry import ToolRegistry

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class SharedRuns(SharedBatches, Protocol):
    """What health, starts and batches ask of ``shared_log.SharedLog``, which needs coredis."""

    @property
    def available(self) -> bool:
        """Whether other workers' runs can be had now."""
        ...

    async def wait_known(self, run_id: str) -> None:
        """Until the others know of this run, or batch, of this worker's, or for as long as that may take."""
        ...


@dataclass(frozen=True)
class Services:
    """What the routes work on. Closing any of it is its maker's.

    Attributes:
        agents: by id, for everyone: agents that are made already, of a program that keeps no records of them.
        supervisor: of this worker's runs.
        resume_grace: the default, in seconds.
        directory: agents that are records; None for a server that has none.
        factory: makes those agents; goes with ``directory``.
        database: where agents, sessions and memories are; None for a server that keeps nothing.
        gatekeeper: says who asks; None takes everybody for the local user.
        admission: says whether this worker has room for a run; None takes any number.
        share_links: signs links to runs; None makes none.
        guard: refuses what a web page elsewhere may have sent; None refuses nothing.
        tools: what agents may name; None for a server that tells of none.
        policy, environment: where the agents that come through the API may send which secrets.
        tool_policy: which tools they may name.
        sources: where runs are that are not in memory here, in the order in which they are asked.
        traces: kept of runs; None for a server that keeps none.
        shared_log: where workers have each other's runs; None for a server that is alone.
        clock: the wall clock.
        store_probe: says whether the database answers, for health checks.
    """

    agents: Mapping[str, BasicAgent]
    supervisor: RunSupervisor
    resume_grace: float = 5.0
    directory: AgentDirectory | None = None
    factory: AgentFactory | None = None
    database: Database | None = None
    gatekeeper: Gatekeeper | None = None
    admission: Admission | None = None
    share_links: ShareLinks | None = None
    guard: RequestGuard | None = None
    tools: ToolRegistry | None = None
    policy: ProviderPolicy = field(default_factory=ProviderPolicy)
    tool_policy: ToolPolicy = field(default_factory=ToolPolicy)
    environment: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[RunSource, ...] = ()
    traces: InMemoryTraces | None = None
    shared_log: SharedRuns | None = None
    clock: Callable[[], datetime] = utc_now
    store_probe: StoreProbe = field(default_factory=StoreProbe)

    @cached_property
    def batches(self) -> BatchDirectory:
        """Every batch that can be found from here."""
        return BatchDirectory(self.supervisor, self.shared_log)

    @cached_property
    def runs(self) -> RunDirectory:
        """Every run that can be found from here."""
        return RunDirectory(self.supervisor, self.sources)

    @cached_property
    def idempotency(self) -> IdempotencyKeys:
        """Which repeated requests stand for which runs."""
        return IdempotencyKeys(self.database, self.clock)

    async def wait_known(self, run_id: str) -> None:
        """Before the id of a run, or a batch, is told: until any worker can be asked for it."""
        if self.shared_log is not None:
            await self.shared_log.wait_known(run_id)

    def now(self) -> str:
        """The time as the store keeps it."""
        return time_text(self.clock())

    async def read(self, query: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        """What the query finds in the store.

        Raises:
            ApiError: 503, the store does not answer, or there is none.
        """
        database = self._store()

        async def ask() -> T:
            return await database.read(query, *args)

        return await or_unavailable(ask)

    async def write(self, change: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        """Make the change in the store. Raises as ``read``."""
        database = self._store()

        async def ask() -> T:
            return await database.write(change, *args)

        return await or_unavailable(ask)

    def _store(self) -> Database:
        if self.database is None:
            raise ApiError(503, "SERVICE_UNAVAILABLE", "this server keeps nothing: it has no database")
        return self.database
