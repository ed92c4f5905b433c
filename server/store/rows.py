"""What the store gives back: one frozen type for each kind of row. Times are UTC, ISO 8601 with microseconds."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from engine.events import Usage
from engine.memory import MemoryKind
from server.principal import KeyLimits
from server.records import AgentRecord

RunStatus: TypeAlias = Literal["running", "done", "error", "stop"]


class Scope(msgspec.Struct, frozen=True):
    """Whose memories: one user's with one agent."""

    tenant_id: str
    user_id: str
    agent_id: str


class StoredAgent(msgspec.Struct, frozen=True, kw_only=True):
    """An agent of a tenant; ``user_id`` is None for one of the whole tenant. ``revision`` counts its changes from 1."""

    record: AgentRecord
    tenant_id: str
    user_id: str | None
    revision: int
    created_at: str
    updated_at: str


class StoredSession(msgspec.Struct, frozen=True, kw_only=True):
    """A session of one user with one agent."""

    session_id: str
    created_at: str
    updated_at: str
    message_count: int


class StoredMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a session, as the history shows it.

    Attributes:
        id: increases in the session.
        status: of the run that the message belongs to.
        partial: an answer that broke off: its run was stopped, failed or was interrupted.
        tool_calls: of an assistant's turn: ``call_id``, ``name``, ``arguments`` (JSON text).
    """

    id: int
    session_id: str
    run_id: str
    role: str
    content: str
    created_at: str
    status: RunStatus
    partial: bool = False
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    tool_failed: bool = False


class StoredMemory(msgspec.Struct, frozen=True, kw_only=True):
    """One memory; ``score`` is how well it matched a search (higher is better), None where nothing was searched."""

    id: str
    text: str
    kind: MemoryKind
    created_at: str
    updated_at: str
    session_id: str | None = None
    metadata: dict[str, Any] = {}
    score: float | None = None


class StoredRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run as the store knows it; what a run under way has not left behind yet is None.

    Attributes:
        reserved_seq: no event of the run has a higher number, but for one that ends it in its process's stead; None if
            its events are not kept.
        terminal_seq: the number of its terminal event, once that is in the store.
    """

    run_id: str
    tenant_id: str
    user_id: str
    agent_id: str
    session_id: str
    key_id: str | None
    status: RunStatus
    created_at: str
    ended_at: str | None
    error_code: str | None
    reason: str | None = None
    response: str | None
    total_steps: int | None
    elapsed_ms: float | None
    ttfb_ms: float | None
    input_tokens: int | None
    output_tokens: int | None
    usage_estimated: bool | None = None
    memory_updates: int | None = None
    reserved_seq: int | None = None
    terminal_seq: int | None = None

    @property
    def usage(self) -> Usage | None:
        """What it used, as far as that was kept."""
        if self.input_tokens is None or self.output_tokens is None:
            return None
        return Usage(self.input_tokens, self.output_tokens, estimated=bool(self.usage_estimated))


class StoredKey(msgspec.Struct, frozen=True, kw_only=True):
    """An API key: everything but the key. ``secret_hash`` is SHA-256 of its secret part."""

    key_id: str
    tenant_id: str
    user_id: str
    admin: bool
    name: str
    secret_hash: bytes
    limits: KeyLimits
    created_at: str
    revoked_at: str | None
