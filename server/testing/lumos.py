"""Lumos's real server in memory on a virtual clock, and the models it asks: the fixture ``virtual_lumos``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import httpx
import msgspec
import trio
from trio.testing import MockClock

from engine import BasicAgent, Deadlines
from engine.tools import Tool
from providers.encoders import MOCKED_VENDORS
from providers.http import open_client
from providers.registry import ModelConfig, create_provider
from providers.vendors import VENDORS
from server.agents import AgentsFile, read_whole_agents_file
from server.app import create_app
from server.composition import Composition, Foundations
from server.mcp_tools import McpServers
from server.records import AgentRecord
from server.services import Services
from server.serving import serve
from server.settings import ServerSettings
from server.store.database import Database

from .answers import ModelAnswer
from .chat import ChatRun
from .client_network import ClientLine, ClientNetwork
from .memory_connection import Address
from .memory_network import MemoryNetwork
from .model_server import ModelServer
from .tools import InlineToolRegistry, as_tool

LUMOS = ("localhost", 8080)
URL = "http://localhost:8080"

NOT_TRIO = (
    "virtual_lumos runs on trio, and this test does not. With pytest-trio mark the test @pytest.mark.trio (or set "
    "trio_mode = true); with anyio's plugin mark it @pytest.mark.anyio and put this line into conftest.py: "
    "from server.testing.for_anyio import anyio_backend"
)
REAL_CLOCK = (
    "virtual_lumos needs a clock that jumps, and this test runs on the real one. With anyio's plugin put this line "
    "into conftest.py: from server.testing.for_anyio import anyio_backend"
)
NOT_OPEN = "virtual_lumos is there while the test itself runs: add agents in a fixture, but chat in the test"
TOO_LATE = "the server runs already: add files, records, tools and settings before the first request"


class VirtualLumos:
    """The world: ``async with VirtualLumos() as lumos`` on a ``MockClock``; all of it is gone after the block.

    The server starts with the first request; agents' files, records, ``tools``, ``environment`` and ``settings`` are to
    be there by then. Agents that are made already, and model servers, may be added at any time.

    Attributes:
        settings: as for ``lumos serve``; what is about sockets and processes is not used.
        environment: where keys come from; has one for every vendor. The process's own environment is not read.
        network: on which everything is.
        model_client: give it to providers of your own: its requests go to the model servers of ``add_vendor``.
        models: by address.
    """

    def __init__(self, settings: ServerSettings | None = None) -> None:
        self.settings = settings or ServerSettings()
        self.environment = {vendor.key_variables[0]: "test-key" for vendor in VENDORS.values() if vendor.key_variables}
        self.network = MemoryNetwork()
        self.models: dict[Address, ModelServer] = {}
        self.model_client = open_client(self._connect_model)
        self._client = open_client(self._connect_client)
        self._client.base_url = httpx.URL(URL)
        self._agents: dict[str, BasicAgent] = {}
        self._declared = AgentsFile()
        self._tools: dict[str, _Source] = {}
        self._services: Services | None = None
        self._nursery: trio.Nursery | None = None
        self._stack = AsyncExitStack()
        self._starting = trio.Lock()

    async def __aenter__(self) -> VirtualLumos:
        """Open the world.

        Raises:
            RuntimeError: this is not trio, or its clock is a real one.
        """
        if not trio.lowlevel.in_trio_task():
            raise RuntimeError(NOT_TRIO)
        if not isinstance(trio.lowlevel.current_clock(), MockClock):
            raise RuntimeError(REAL_CLOCK)
        self._stack.push_async_callback(self.model_client.aclose)
        self._stack.push_async_callback(self._client.aclose)
        self._nursery = await self._stack.enter_async_context(trio.open_nursery())
        self._stack.callback(self._nursery.cancel_scope.cancel, reason="the test is over")
        for model in self.models.values():
            self._serve_model(model)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The stack is closed as if without error, so that the nursery does not wrap the test's own exception.
        try:
            await self._stack.aclose()
        except* trio.Cancelled:  # noqa: ASYNC103 - the exception that left the block goes on, and is not lost for it
            if error is None:
                raise
        finally:
            self._nursery = None

    # --- What there is

    @overload
    def add_agent(self, agent: BasicAgent) -> None: ...

    @overload
    def add_agent(
        self,
        agent: str,
        *answers: ModelAnswer,
        tools: Sequence[Tool | Callable[..., Any]] = (),
        deadlines: Deadlines | Mapping[str, float] | None = None,
        provider: str = "openai",
        retries: int = 0,
        **settings: Any,
    ) -> ModelServer: ...

    def add_agent(
        self,
        agent: str | BasicAgent,
        *answers: ModelAnswer,
        tools: Sequence[Tool | Callable[..., Any]] = (),
        deadlines: Deadlines | Mapping[str, float] | None = None,
        provider: str = "openai",
        retries: int = 0,
        **settings: Any,
    ) -> ModelServer | None:
        """Add an agent: one of your own, or one of that id whose model gives these answers, one for each request.

        Args:
            agent: its id; or an agent, which keeps its own provider, and to which nothing below applies.
            answers: of ``replay`` and ``faults``; the last is given to all further requests.
            tools: functions or tools.
            deadlines: seconds, what is left out keeps its default.
            provider: whose wire format the model speaks.
            retries: how often the model is asked again after a failure that may pass.
            settings: further fields of ``BasicAgent`` (``instructions``, ``max_run_bytes`` ...).

        Returns:
            The model's server, with ``calls``; None for an agent of your own.
        """
        if isinstance(agent, BasicAgent):
            tool_use = msgspec.structs.replace(agent.tool_use, tools=tuple(map(as_tool, agent.tool_use.tools)))
            self._agents[agent.agent_id] = msgspec.structs.replace(agent, tool_use=tool_use)
            return None
        url = f"http://model-{len(self.models) + 1}{MOCKED_VENDORS[provider].base_path}"
        model = self.add_vendor(provider, *answers, url=url)
        config = ModelConfig(provider=provider, model="test-model", base_url=url, retries=retries)
        template = BasicAgent(
            agent_id=agent,
            provider=create_provider(config, self.environment, self.model_client),
            model="test-model",
            deadlines=deadlines if isinstance(deadlines, Deadlines) else Deadlines(**deadlines or {}),
        )
        tool_use = msgspec.structs.replace(template.tool_use, tools=tuple(map(as_tool, tools)))
        self._agents[agent] = msgspec.structs.replace(template, **{"tool_use": tool_use, **settings})
        return model

    def add_record(self, *records: AgentRecord) -> None:
        """Add agents as they are written down, with memory and sessions; ``add_vendor`` is whom they ask.

        Raises:
            RuntimeError: the server runs already.
        """
        self._check_not_running()
        self._declared = msgspec.structs.replace(self._declared, agent=[*self._declared.agent, *records])

    def add_agents_file(self, path: str | os.PathLike[str]) -> None:
        """Add the agents of a file as for ``lumos serve --agents``; its MCP servers are not started (``add_tools``).

        Raises:
            AgentsFileError: the file cannot be used.
            RuntimeError: the server runs already.
        """
        self.add_record(*read_whole_agents_file(Path(path)).agent)

    def add_tools(self, source: str, *tools: Tool | Callable[..., Any]) -> None:
        """Add tools that records name as ``source.name``: what an MCP server of that name would have.

        Raises:
            RuntimeError: the server runs already.
        """
        self._check_not_running()
        made = map(as_tool, tools)
        self._tools[source] = _Source({tool.spec.name: tool for tool in made})

    def add_vendor(self, provider: str, *answers: ModelAnswer, url: str | None = None) -> ModelServer:
        """Start a vendor's server on the vendor's own address, or at ``url``; the n-th request gets the n-th answer.

        Raises:
            ValueError: there is no such provider, or no answer.
            OSError: there is a server at that address.
        """
        model = ModelServer(provider, answers, url)
        if model.address in self.models:
            host, port = model.address
            raise OSError(f"there is a model server at {host}:{port} already")
        self.models[model.address] = model
        if self._nursery is not None:
            self._serve_model(model)
        return model

    # --- Clients

    @property
    def client(self) -> httpx.AsyncClient:
        """For the rest of the HTTP surface: ``await virtual_lumos.client.get("/health/ready")``."""
        return self._client

    async def chat(
        self, agent_id: str, message: str = "Hi", *, network: ClientNetwork | None = None, **body: Any
    ) -> ChatRun:
        """Ask the agent and read its answer to the end; arguments as for ``open_chat``."""
        async with self.open_chat(agent_id, message, network=network, **body) as run:
            await run.read()
            return run

    def open_chat(
        self,
        agent_id: str,
        message: str = "Hi",
        *,
        network: ClientNetwork | None = None,
        headers: Mapping[str, str] | None = None,
        **body: Any,
    ) -> ChatRun:
        """Ask the agent, to read the answer step by step: ``async with virtual_lumos.open_chat(...) as run``.

        Args:
            agent_id: of an agent that was added, or a built-in one.
            message: the user's.
            network: the client's, of ``faults``.
            headers: of the request.
            body: further fields of the request: ``session_id``, ``deadlines``, ``on_disconnect``, ``stream`` ...
        """
        path = f"/api/v1/agents/{agent_id}/chat/lumosai/stream"
        request = self._client.build_request("POST", path, json={"message": message} | body, headers=headers)
        return ChatRun(request, ClientLine(self.network, network), self._start)

    # --- What is left

    def active_runs(self) -> int:
        """How many runs are under way."""
        return 0 if self._services is None else self._services.supervisor.active_runs

    # --- How it is made

    def _check_not_running(self) -> None:
        if self._services is not None:
            raise RuntimeError(TOO_LATE)

    async def _connect_client(self, host: str, port: int, tls: bool) -> trio.abc.Stream:
        await self._start()
        return await self.network.connect(host, port, tls)

    async def _connect_model(self, host: str, port: int, tls: bool) -> trio.abc.Stream:
        model = self.models.get((host, port))
        if model is not None:
            await model.admit()
        return await self.network.connect(host, port, tls)

    def _serve_model(self, model: ModelServer) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(model.serve, self.network.listen(*model.address), name=f"model at {model.url}")

    async def _start(self) -> None:
        """Start the server unless it runs."""
        if self._nursery is None:
            raise RuntimeError(NOT_OPEN)
        async with self._starting:
            if self._services is None:
                self._services = await self._nursery.start(self._run_server)

    async def _run_server(self, *, task_status: trio.TaskStatus[Services]) -> None:  # noqa: ASYNC114 - started here alone
        async def serve_until_end(services: Services) -> None:
            services = replace(services, agents=self._agents)
            listeners = [self.network.listen(*LUMOS)]
            async with trio.open_nursery() as nursery:
                await nursery.start(serve, create_app(services), listeners, trio.Event(), self.settings.limits)
                task_status.started(services)

        with closing(Database.open("sqlite://", inline=True)) as database:
            foundations = Foundations(
                database=database,
                client=self.model_client,
                environment=self.environment,
                servers=McpServers([], self.environment),
                tools=InlineToolRegistry(self._tools),
                declared=self._declared,
            )
            await Composition(self.settings, foundations, keyed=False).run(serve_until_end, lambda _: None)


class _Source:
    """Tools of a name, as an MCP server's."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self._tools = tools

    def tools(self) -> Mapping[str, Tool]:
        """All of them."""
        return self._tools
