"""The store's tables as SQLAlchemy Core sees them; ``migrations`` is what makes them.

Every text that is bound to a statement passes ``CleanText``: PostgreSQL refuses NUL, and neither database takes half
of a surrogate pair. JSON is text too, ASCII only, so that it needs no cleaning and both databases keep it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Dialect,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    MetaData,
    RowMapping,
    Table,
    Text,
    TypeDecorator,
    and_,
)
from sqlalchemy.dialects import sqlite

from .rows import Scope

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_PAGE = 1_000_000_000


def storable(text: str) -> str:
    """The text with what a database does not take (NUL, lone surrogates) replaced."""
    if text.isascii():
        return text.replace("\0", REPLACEMENT)
    return text.replace("\0", REPLACEMENT).encode("utf-8", "replace").decode()


def _storable_or_none(text: str | None) -> str | None:
    if text is None or (text.isascii() and "\0" not in text):
        return text
    return storable(text)


def storable_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with every text as ``storable`` leaves it."""
    return {
        name: storable(value) if isinstance(value, str) and not (value.isascii() and "\0" not in value) else value
        for name, value in values.items()
    }


_encode = json.JSONEncoder(separators=(",", ":")).encode


def json_text(value: Any) -> str:
    """The JSON of a value, in ASCII."""
    return _encode(value)


def _json_or_none(value: Any) -> str | None:
    return None if value is None else _encode(value)


def _value_or_none(text: str | None) -> Any:
    if text == "[]":
        return []
    return None if text is None else json.loads(text)


class CleanText(TypeDecorator[str]):
    """Text as ``storable`` leaves it."""

    impl = Text
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Callable[[str | None], str | None]:  # noqa: ARG002
        """Clean what is stored or compared. Not by ``process_bind_param``: that is two calls more for each value."""
        return _storable_or_none


class JsonText(TypeDecorator[Any]):
    """A JSON value, kept as ASCII text: exact in both databases, whatever characters its strings hold."""

    impl = Text
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], str | None]:  # noqa: ARG002
        """Encode; None is NULL."""
        return _json_or_none

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[str | None], Any]:  # noqa: ARG002
        """Decode; NULL is None."""
        return _value_or_none


_metadata = MetaData()
_number = BigInteger().with_variant(Integer(), "sqlite")


def _owner_columns(**options: Any) -> list[Column[str]]:
    return [Column(name, CleanText, nullable=False, **options) for name in ("tenant_id", "user_id", "agent_id")]


schema_version = Table(
    "schema_version",
    _metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("migrated_at", CleanText, nullable=False),
)

agents = Table(
    "agents",
    _metadata,
    Column("tenant_id", CleanText, primary_key=True),
    Column("id", CleanText, primary_key=True),
    Column("user_id", CleanText),
    Column("record", JsonText, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("created_at", CleanText, nullable=False),
    Column("updated_at", CleanText, nullable=False),
)

sessions = Table(
    "sessions",
    _metadata,
    *_owner_columns(primary_key=True),
    Column("session_id", CleanText, primary_key=True),
    Column("created_at", CleanText, nullable=False),
    Column("updated_at", CleanText, nullable=False),
)

runs = Table(
    "runs",
    _metadata,
    Column("run_id", CleanText, primary_key=True),
    *_owner_columns(),
    Column("session_id", CleanText, nullable=False),
    Column("key_id", CleanText),
    Column("status", CleanText, nullable=False),
    Column("created_at", CleanText, nullable=False),
    Column("ended_at", CleanText),
    Column("error_code", CleanText),
    Column("reason", CleanText),
    Column("response", CleanText),
    Column("total_steps", Integer),
    Column("elapsed_ms", Float),
    Column("ttfb_ms", Float),
    Column("input_tokens", BigInteger),
    Column("output_tokens", BigInteger),
    Column("reserved_seq", BigInteger),
    Column("terminal_seq", BigInteger),
    Column("memory_updates", Integer),
    Column("usage_estimated", Boolean),
    Column("unremembered", Boolean),
)
"""``unremembered`` is NULL, or true for a run whose words become no memory: its agent has none, or all was forgotten
while it was under way."""

run_events = Table(
    "run_events",
    _metadata,
    Column("run_id", CleanText, ForeignKey("runs.run_id", ondelete="CASCADE"), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("event", Text, nullable=False),
)
"""``event`` is the JSON of its frame, to the byte: valid UTF-8 without NUL, which JSON escapes. Events that follow
each other may share a row, one a line, under the last one's ``seq``; rows of schema version 2 have one each."""

recent_events = Table(
    "recent_events",
    _metadata,
    Column("writer", CleanText, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("events", LargeBinary, nullable=False),
)
"""What a writer's batch brought of the runs under way: see ``recent_events.py``."""

idempotency_keys = Table(
    "idempotency_keys",
    _metadata,
    *_owner_columns(primary_key=True),
    Column("key", CleanText, primary_key=True),
    Column("run_id", CleanText, nullable=False),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("created_at", CleanText, nullable=False),
)

messages = Table(
    "messages",
    _metadata,
    Column("number", _number, primary_key=True),
    *_owner_columns(),
    Column("session_id", CleanText, nullable=False),
    Column("run_id", CleanText, nullable=False),
    Column("role", CleanText, nullable=False),
    Column("content", CleanText, nullable=False),
    Column("images", JsonText, nullable=False),
    Column("tool_calls", JsonText, nullable=False),
    Column("tool_call_id", CleanText),
    Column("tool_failed", Boolean, nullable=False),
    Column("partial", Boolean, nullable=False),
    Column("created_at", CleanText, nullable=False),
    ForeignKeyConstraint(
        ["tenant_id", "user_id", "agent_id", "session_id"],
        [sessions.c.tenant_id, sessions.c.user_id, sessions.c.agent_id, sessions.c.session_id],
        ondelete="CASCADE",
    ),
    ForeignKeyConstraint(["run_id"], [runs.c.run_id]),
)

memories = Table(
    "memories",
    _metadata,
    Column("number", _number, primary_key=True),
    *_owner_columns(),
    Column("memory_id", CleanText, nullable=False),
    Column("kind", CleanText, nullable=False),
    Column("text", CleanText, nullable=False),
    Column("metadata", JsonText, nullable=False),
    Column("session_id", CleanText),
    Column("run_id", CleanText),
    Column("created_at", CleanText, nullable=False),
    Column("updated_at", CleanText, nullable=False),
    Column("embedding", LargeBinary),
    Column("embedding_model", CleanText),
    Column("owner", CleanText, nullable=False),
    Column("terms", CleanText, nullable=False),
)
"""``owner`` and ``terms`` are what the full-text index sees: see ``search_terms``."""

working_memories = Table(
    "working_memories",
    _metadata,
    *_owner_columns(primary_key=True),
    Column("document", JsonText, nullable=False),
    Column("updated_at", CleanText, nullable=False),
)

api_keys = Table(
    "api_keys",
    _metadata,
    Column("key_id", CleanText, primary_key=True),
    Column("tenant_id", CleanText, nullable=False),
    Column("user_id", CleanText, nullable=False),
    Column("admin", Boolean, nullable=False),
    Column("name", CleanText, nullable=False),
    Column("secret_hash", LargeBinary, nullable=False),
    Column("limits", JsonText, nullable=False),
    Column("created_at", CleanText, nullable=False),
    Column("revoked_at", CleanText),
)

ALL_TABLES = (
    schema_version,
    agents,
    sessions,
    runs,
    run_events,
    recent_events,
    idempotency_keys,
    messages,
    memories,
    working_memories,
    api_keys,
)


def owned(table: Table, scope: Scope) -> ColumnElement[bool]:
    """The rows of one user with one agent."""
    return and_(
        table.c.tenant_id == scope.tenant_id, table.c.user_id == scope.user_id, table.c.agent_id == scope.agent_id
    )


def owner_values(scope: Scope) -> dict[str, Any]:
    """The scope as the columns of a new row."""
    return {"tenant_id": scope.tenant_id, "user_id": scope.user_id, "agent_id": scope.agent_id}


def insert_into(c: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """The database's own INSERT, which has the same ``on_conflict_…`` methods for both."""
    if c.dialect.name == "sqlite":
        return sqlite.insert(table)
    from sqlalchemy.dialects import postgresql  # noqa: PLC0415 - 20 ms that SQLite needs none of

    return postgresql.insert(table)


def add_row(c: Connection, table: Table, values: Mapping[str, Any]) -> RowMapping | None:
    """Insert a row and give it back as it was stored; None, and no change, if its key is taken."""
    # Not by rowcount: SQLAlchemy does not promise one for an INSERT, and has none on PostgreSQL.
    added = c.execute(insert_into(c, table).values(**values).on_conflict_do_nothing().returning(table))
    return added.mappings().one_or_none()


def page_size(wish: int) -> int:
    """A limit or an offset that both databases take, whatever number was asked for."""
    return max(0, min(wish, MAX_PAGE))
