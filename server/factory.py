"""From an agent's record to the agent: provider, tools and memory, built once for a record and bound to each user."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import TypeAlias

import httpx
import msgspec

from engine import BasicAgent
from engine.memory import MemoryUse, Owner
from engine.run import utc_now
from engine.tools import ToolUse
from engine.trace import TraceCollector
from providers.embeddings import EmbeddingClient
from providers.registry import ProviderConfigError, create_provider, default_model

from .agents import AgentsFileError
from .embedding_recall import EmbeddingRecall
from .memory import MemoryStore, StoredMemory
from .principal import LOCAL
from .records import AgentRecord
from .store.database import Database
from .store.rows import Scope, StoredAgent
from .tool_registry import ToolNameError, ToolRegistry, ToolSource, UnknownToolError

CACHED_AGENTS = 1024

WORKING_MEMORY_TOOL = "update_working_memory"
MEMORY_TOOLS = frozenset({"remember", "search_memory", "forget", WORKING_MEMORY_TOOL})

_Key: TypeAlias = tuple[str | None, str]
"""Whose agent (None: the operator's, for all tenants) and its id."""


class AgentConfigError(ValueError):
    """An agent cannot be built from its record; the text names the agent and what to change, and holds no key.

    Attributes:
        field: of the record, which is at fault.
    """

    def __init__(self, text: str, field: str) -> None:
        super().__init__(text)
        self.field = field


class _Built(msgspec.Struct, frozen=True):
    """What is built once for a record. ``agent`` is nobody's yet; ``meaning`` is None for recall by words alone."""

    record: AgentRecord
    agent: BasicAgent
    meaning: EmbeddingRecall | None


class AgentFactory:
    """Builds agents for users, each record's costly part once.

    Providers with their breakers and tools are kept until the record changes, for at most ``capacity`` records, and
    shared by a record's users. It closes nothing: all providers send through ``client``, and whoever opened that, or
    the database, closes it. So a provider that is no longer kept serves its last runs as before.

    Attributes:
        memories: what its agents' memories share; None without a database, and then its agents have no memory. A
            server runs its ``backlog.work()`` in a task, else nothing is recalled by meaning, and ``unsaved.work()``,
            else what the store does not take at once is never kept.
    """

    def __init__(
        self,
        database: Database | None,
        environment: Mapping[str, str],
        client: httpx.AsyncClient,
        tools: ToolSource,
        *,
        traces: TraceCollector | None = None,
        capacity: int = CACHED_AGENTS,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """Build nothing yet.

        Args:
            database: where memories and sessions are.
            environment: where keys are.
            client: what all requests to models go through.
            tools: where the tools that records name come from.
            traces: hears of the spans of every run.
            capacity: how many records' agents are kept.
            clock: the wall clock, for what is stored.
        """
        self.memories = None if database is None else MemoryStore(database, clock=clock)
        self._environment = environment
        self._client = client
        self._tools = tools
        self._traces = traces
        self._capacity = capacity
        self._cache: OrderedDict[_Key, _Built] = OrderedDict()

    def create_chat_agent(
        self,
        agent_record: AgentRecord | StoredAgent,
        user_id: str,
        tenant_id: str | None = None,
        *,
        key_id: str | None = None,
    ) -> BasicAgent:
        """The agent of the record for this user, whose memory is nobody else's. Cheap but for a record's first time.

        ``tenant_id`` is the user's, left out that of a stored agent, or the local one. ``key_id`` is the API key that
        the agent's runs are counted for.

        Raises:
            AgentConfigError: its provider, its tools or its embeddings cannot be had.
            ValueError: the agent is another tenant's.
        """
        record, home = _record_of(agent_record)
        if home is not None and tenant_id not in (None, home):
            raise ValueError(f"agent {record.id!r} is another tenant's")
        built = self._find_or_build(home, record)
        return msgspec.structs.replace(
            self._with_current_tools(built),
            owner=Owner(tenant_id=tenant_id or home or LOCAL, user_id=user_id),
            memories=self._memories_of(built, key_id),
        )

    create_chat_agent_arc = create_chat_agent
    """The same, under the name that callers of the system which Lumos re-creates know."""

    def check(self, record: AgentRecord) -> None:
        """Build the record's agent for nobody, to see whether it can be; keeps nothing.

        Raises:
            AgentConfigError: its provider, its tools or its embeddings cannot be had.
        """
        self._build(record)

    def _find_or_build(self, home: str | None, record: AgentRecord) -> _Built:
        key = (home, record.id)
        built = self._cache.get(key)
        if built is None or (built.record is not record and built.record != record):
            built = self._cache[key] = self._build(record)
        self._cache.move_to_end(key)
        if len(self._cache) > self._capacity:
            self._cache.popitem(last=False)
        return built

    def _with_current_tools(self, built: _Built) -> BasicAgent:
        """A source's tools come and go (``files.*``), so they are looked up each time."""
        if not any("." in name for name in built.record.tools):
            return built.agent
        with _faults_of(built.record, "tools"):
            return msgspec.structs.replace(built.agent, tool_use=self._tool_use(built.record))

    def _build(self, record: AgentRecord) -> _Built:
        with _faults_of(record, "llm_config"):
            agent = self._build_agent(record)
        with _faults_of(record, "memory.embeddings"):
            return _Built(record, agent, self._meaning_of(record))

    def _build_agent(self, record: AgentRecord) -> BasicAgent:
        return BasicAgent(
            agent_id=record.id,
            name=record.name,
            instructions=record.system,
            provider=create_provider(record.llm_config, self._environment, self._client),
            model=default_model(record.llm_config),
            temperature=record.llm_config.temperature,
            max_tokens=record.llm_config.max_tokens,
            deadlines=record.deadlines,
            streaming=record.stream,
            tool_use=self._tool_use(record),
            trace=self._traces,
        )

    def _tool_use(self, record: AgentRecord) -> ToolUse:
        names = list(record.tools)
        useless = sorted(MEMORY_TOOLS.intersection(names))
        if useless and not record.memory.enabled:
            raise AgentConfigError(f"its memory is not enabled, so it has no use for {', '.join(useless)}", "tools")
        if WORKING_MEMORY_TOOL in names and record.working_memory is None:
            raise AgentConfigError(f"{WORKING_MEMORY_TOOL} is of no use without a working_memory", "tools")
        if record.working_memory is not None and WORKING_MEMORY_TOOL not in names and self.memories is not None:
            names.append(WORKING_MEMORY_TOOL)
        tools = tuple(self._tools.find(names))
        return ToolUse(tools=tools, max_steps=record.max_steps, max_tool_calls=record.max_tool_calls)

    def _meaning_of(self, record: AgentRecord) -> EmbeddingRecall | None:
        config = record.memory.embeddings
        if config is None or self.memories is None or not record.memory.enabled:
            return None
        embedder = EmbeddingClient(config, self._environment, self._client)
        return EmbeddingRecall(self.memories.database, embedder)

    def _memories_of(self, built: _Built, key_id: str | None) -> Callable[[Owner], MemoryUse] | None:
        store, record = self.memories, built.record
        if store is None or not record.memory.enabled:
            return None

        def memory_of(owner: Owner) -> MemoryUse:
            memory = StoredMemory(
                store,
                Scope(owner.tenant_id, owner.user_id, record.id),
                owner.session_id,
                settings=record.memory,
                working=record.working_memory,
                meaning=built.meaning,
                key_id=key_id,
            )
            settings = record.memory
            return MemoryUse(
                memory=memory,
                context_window=settings.context_window,
                recall_limit=settings.recall_limit,
                wait=settings.wait,
                has_document=record.working_memory is not None,
                at_hand=memory.at_hand,
                is_prompt=True,
            )

        return memory_of


def build_agent(record: AgentRecord, environment: Mapping[str, str], client: httpx.AsyncClient) -> BasicAgent:
    """The agent of one record of a file, without memory, for this program's user.

    Raises:
        AgentsFileError: it cannot be built; the text names it and what is missing.
    """
    try:
        return AgentFactory(None, environment, client, ToolRegistry()).create_chat_agent(record, LOCAL)
    except AgentConfigError as error:
        raise AgentsFileError(str(error)) from error


def _record_of(agent: AgentRecord | StoredAgent) -> tuple[AgentRecord, str | None]:
    """The record, and the tenant whose it is: None for the operator's."""
    return (agent.record, agent.tenant_id) if isinstance(agent, StoredAgent) else (agent, None)


@contextmanager
def _faults_of(record: AgentRecord, field: str) -> Iterator[None]:
    """What cannot be had for the record, with the agent's name; ``field`` is where, unless the error says better."""
    try:
        yield
    except AgentConfigError as error:
        raise AgentConfigError(f"agent {record.id!r}: {error}", error.field) from error
    except (UnknownToolError, ToolNameError) as error:
        raise AgentConfigError(f"agent {record.id!r}: {error}", "tools") from error
    except ProviderConfigError as error:
        raise AgentConfigError(f"agent {record.id!r}: {error}", field) from error
