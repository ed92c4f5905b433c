"""A whole world in memory: Lumos's real server over a real connection class, model servers, and httpx clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import trio

from engine import BasicAgent, Provider, RetentionLimits
from engine.run import utc_now
from providers.failover import FailoverProvider, Link
from providers.openai_chat import OpenAIChatProvider
from providers.recording import Recording
from server.admission import Admission
from server.app import Services
from server.keys import make_key
from server.principal import KeyLimits
from server.records import AgentRecord
from server.serving import ServingLimits, serve
from server.store import keys as key_rows
from server.store.database import Database
from server.testing.world import EPOCH, LUMOS, BaseWorld, RunNotes, StreamedEvents, open_pieces
from tests.harness.vendor import Act, VendorServer, play_script

__all__ = [
    "EPOCH",
    "LUMOS",
    "STREAM_URL",
    "VENDOR",
    "Answer",
    "RunNotes",
    "World",
    "open_keeping_world",
    "open_world",
]

VENDOR = ("vendor", 80)
STREAM_URL = "http://lumos/api/v1/agents/demo/chat/lumosai/stream"


class World(BaseWorld):
    """The pieces of the world, for a test to look at, and its model servers. Made by ``open_world``."""

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
    limits: ServingLimits | None = None, *, window: int = 65_536, admission: Admission | None = None
) -> AsyncIterator[World]:
    """A world with Lumos serving at ``LUMOS``; its agents are added by the test. All is gone after the block."""
    async with _open_world(window) as world:
        services = Services(world.agents, world.supervisor, resume_grace=5.0, admission=admission)
        await world.serve_lumos(services, limits)
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
        await world.serve_lumos(world.services(declared, environment or {}))
        yield world
        if database is None and world.database is not None:
            world.database.close()


@asynccontextmanager
async def _open_world(window: int = 65_536) -> AsyncIterator[World]:
    async with open_pieces(World, window) as world:
        assert isinstance(world, World)
        yield world
