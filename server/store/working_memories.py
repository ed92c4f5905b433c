"""Working memories in the store: one JSON object for each user of an agent."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, select, text

from .rows import Scope
from .schema import insert_into, owned, owner_values, working_memories
from .search_terms import owner_term


def read_document(c: Connection, scope: Scope) -> dict[str, Any] | None:
    """The document; None if none was ever written."""
    document: dict[str, Any] | None = c.execute(
        select(working_memories.c.document).where(owned(working_memories, scope))
    ).scalar_one_or_none()
    return document


def lock_document(c: Connection, scope: Scope) -> None:
    """Until the transaction ends, let nobody else change the document: for a change that reads before it writes.

    SQLite has one writer at a time anyway.
    """
    if c.dialect.name == "postgresql":
        number = int.from_bytes(bytes.fromhex(owner_term(scope))[:8], "big", signed=True)
        c.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})


def write_document(c: Connection, scope: Scope, document: dict[str, Any], now: str) -> None:
    """Put the document in place of the one that may be there."""
    new = {"document": document, "updated_at": now}
    c.execute(
        insert_into(c, working_memories)
        .values({**owner_values(scope), **new})
        .on_conflict_do_update(index_elements=["tenant_id", "user_id", "agent_id"], set_=new)
    )


def clear_document(c: Connection, scope: Scope) -> bool:
    """Delete the document; False if there was none."""
    return c.execute(delete(working_memories).where(owned(working_memories, scope))).rowcount > 0
