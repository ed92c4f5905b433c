"""Agents as clients see them: whole for who may change them, a summary for who may only use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec

from engine import Deadlines, StreamingConfig

from .directory import ListedAgent, may_change
from .principal import Principal
from .records import AgentRecord, WorkingMemorySettings

BelongsTo: TypeAlias = Literal["server", "tenant", "user"]


class AgentView(AgentRecord, frozen=True, kw_only=True, tag_field="view", tag="whole"):
    """An agent as it is shown to who may change it: its record, and whose it is.

    Attributes:
        belongs_to: ``server`` is the operator's, for everybody and never changed here; ``tenant`` is for all of the
            tenant's users, and its admins change it; ``user`` is one user's.
        user_id: that user.
        revision: counts the changes, from 1; the number in the ``ETag``. Null for one of the server's.
        created_at, updated_at: UTC, ISO 8601.
    """

    belongs_to: BelongsTo
    user_id: str | None = None
    revision: int | None = None
    created_at: str | None = None
    updated_at: str | None = None


class ModelSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Which model answers, and not where or with whose key."""

    provider: str
    model: str


class MemorySummary(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent remembers; as in the record, without whom it asks for embeddings."""

    enabled: bool
    context_window: int
    recall_limit: int
    wait: float


class AgentSummary(msgspec.Struct, frozen=True, kw_only=True, tag_field="view", tag="summary"):
    """An agent as it is shown to who may use and not change it: without its system prompt and metadata.

    Attributes:
        tools: those that an agent of yours could name too.
        belongs_to, user_id, revision, created_at, updated_at: as in the whole view.
    """

    id: str
    llm_config: ModelSummary
    name: str
    description: str
    tools: tuple[str, ...]
    max_steps: int
    max_tool_calls: int
    deadlines: Deadlines
    stream: StreamingConfig
    memory: MemorySummary
    working_memory: WorkingMemorySettings | None
    belongs_to: BelongsTo
    user_id: str | None = None
    revision: int | None = None
    created_at: str | None = None
    updated_at: str | None = None


def may_see_whole(caller: Principal, agent: ListedAgent) -> bool:
    """Whether the record is the caller's to read: the local user's all, the server's nobody else's."""
    return caller.operator or (not isinstance(agent, AgentRecord) and may_change(caller, agent))


def agent_view(
    agent: ListedAgent, caller: Principal, refused_tools: Callable[[Principal, tuple[str, ...]], list[str]]
) -> AgentView | AgentSummary:
    """The agent as this caller sees it. Records name the variables that hold keys, never a key."""
    record, owned = _owned(agent)
    if may_see_whole(caller, agent):
        return AgentView(**fields_of(record), **owned)
    hidden = refused_tools(caller, record.tools)
    summary = fields_of(record) | {
        "llm_config": ModelSummary(provider=record.llm_config.provider, model=record.llm_config.model),
        "memory": MemorySummary(
            **{name: getattr(record.memory, name) for name in MemorySummary.__struct_fields__},
        ),
        "tools": tuple(name for name in record.tools if name not in hidden),
    }
    del summary["system"], summary["metadata"]
    return AgentSummary(**summary, **owned)


def fields_of(record: AgentRecord) -> dict[str, Any]:
    """What an agent's record says, by field."""
    return {name: getattr(record, name) for name in AgentRecord.__struct_fields__}


def _owned(agent: ListedAgent) -> tuple[AgentRecord, dict[str, Any]]:
    """The record, and whose it is."""
    if isinstance(agent, AgentRecord):
        return agent, {"belongs_to": "server"}
    return agent.record, {
        "belongs_to": "tenant" if agent.user_id is None else "user",
        "user_id": agent.user_id,
        "revision": agent.revision,
        "created_at": agent.created_at,
        "updated_at": agent.updated_at,
    }
