"""Memories in the store: what users said and what was put down on purpose, found by words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Insert, RowMapping, delete, func, or_, select, update

from engine.memory import MemoryKind

from .errors import AlreadyThereError
from .prepared import InsertInto, Prepared, Row, constant, given, rows_of_text
from .rows import Scope, StoredMemory
from .schema import json_text, memories, messages, owned, owner_values, page_size, runs, storable_values
from .search import rank, select_candidates
from .search_terms import index_terms, owner_term, query_terms

FEW_MEMORIES = 300
FEW_TERMS = 8
"""What is searched within 0.3 ms, short texts, or 1.2 ms, long ones."""

_OWNER = ("tenant_id", "user_id", "agent_id")
_KEPT = tuple(column.name for column in memories.c if column.name != "number")
_SHOWN = ("memory_id", "text", "kind", "created_at", "updated_at", "session_id", "metadata")

_ADD = Prepared(
    lambda insert: insert(memories).values({name: given(memories.c[name]) for name in _KEPT}).on_conflict_do_nothing()
)
_COUNT = Prepared(
    lambda _: select(func.count()).select_from(memories).where(*(memories.c[name] == given(name) for name in _OWNER))
)
_COUNT_FEW = Prepared(
    lambda _: select(func.count()).select_from(
        select(memories.c.number)
        .where(*(memories.c[name] == given(name) for name in _OWNER))
        .limit(constant(FEW_MEMORIES + 1))
        .offset(constant(0))
        .subquery()
    )
)


def _insert_said(insert: InsertInto) -> Insert:
    """The user's message of a run, unless its row says that it is to be no memory."""
    said = {name: messages.c[name] for name in (*_OWNER, "session_id", "run_id", "created_at")} | {
        "memory_id": messages.c.run_id,
        "kind": constant("said"),
        "text": messages.c.content,
        "metadata": constant("{}"),
        "updated_at": messages.c.created_at,
        "owner": given(memories.c.owner),
        "terms": given(memories.c.terms),
    }
    chosen = (
        select(*said.values())
        .join(runs, runs.c.run_id == messages.c.run_id)
        .where(messages.c.run_id == given("run_id"), messages.c.role == constant("user"))
        .where(runs.c.unremembered.is_(None))
    )
    adding: Insert = insert(memories).from_select(list(said), chosen).on_conflict_do_nothing()
    return adding


_ADD_SAID = Prepared(_insert_said)


def remember_said(c: Connection, run_id: str, scope: Scope, text: str) -> None:
    """Keep the user's message of a run as a memory, once; a blank one, or one that was forgotten meanwhile, not.

    ``text`` is what it says.
    """
    if text.strip():
        _ADD_SAID.run(c, {"run_id": run_id, "owner": owner_term(scope), "terms": " ".join(index_terms(text))})


def add_memory(
    c: Connection, scope: Scope, memory_id: str, text: str, kind: MemoryKind, now: str, **more: Any
) -> StoredMemory:
    """Keep a new memory, as ``keep_memory``, and give it back as it was stored."""
    keep_memory(c, scope, memory_id, text, kind, now, **more)
    kept = find_memory(c, scope, memory_id)
    assert kept is not None
    return kept


def keep_memory(
    c: Connection,
    scope: Scope,
    memory_id: str,
    text: str,
    kind: MemoryKind,
    now: str,
    *,
    session_id: str | None = None,
    run_id: str | None = None,
    metadata: Mapping[str, Any] = {},
    embedding: bytes | None = None,
    embedding_model: str | None = None,
) -> None:
    """Keep a new memory.

    Raises:
        AlreadyThereError: the scope has a memory of that id.
    """
    row = {
        **owner_values(scope),
        "memory_id": memory_id,
        "kind": kind,
        "text": text,
        "metadata": json_text(dict(metadata)),
        "session_id": session_id,
        "run_id": run_id,
        "created_at": now,
        "updated_at": now,
        "embedding": embedding,
        "embedding_model": embedding_model,
        "owner": owner_term(scope),
        "terms": " ".join(index_terms(text)),
    }
    if not _ADD.run(c, storable_values(row)):
        raise AlreadyThereError(f"there is a memory {memory_id!r} already")


def find_memory(c: Connection, scope: Scope, memory_id: str) -> StoredMemory | None:
    """The memory of that id."""
    query = select(memories).where(owned(memories, scope), memories.c.memory_id == memory_id)
    row = c.execute(query).mappings().one_or_none()
    return None if row is None else _stored(row)


def list_memories(c: Connection, scope: Scope, kind: MemoryKind | None, limit: int, offset: int) -> list[StoredMemory]:
    """The memories of one kind or of all, newest first."""
    query = select(memories).where(owned(memories, scope)).order_by(memories.c.number.desc())
    if kind is not None:
        query = query.where(memories.c.kind == kind)
    rows = c.execute(query.limit(page_size(limit)).offset(page_size(offset))).mappings()
    return [_stored(row) for row in rows]


def count_memories(c: Connection, scope: Scope, kind: MemoryKind | None) -> int:
    """How many ``list_memories`` has."""
    query = select(func.count()).select_from(memories).where(owned(memories, scope))
    if kind is not None:
        query = query.where(memories.c.kind == kind)
    return c.execute(query).scalar_one()


def update_memory(
    c: Connection, scope: Scope, memory_id: str, text: str, metadata: Mapping[str, Any] | None, now: str
) -> StoredMemory | None:
    """Change a memory's text, and its metadata unless that is None. Its embedding is gone. None if there is none."""
    values: dict[str, Any] = {
        "text": text,
        "terms": " ".join(index_terms(text)),
        "updated_at": now,
        "embedding": None,
        "embedding_model": None,
    }
    if metadata is not None:
        values["metadata"] = dict(metadata)
    where = (owned(memories, scope), memories.c.memory_id == memory_id)
    row = c.execute(update(memories).where(*where).values(values).returning(memories)).mappings().one_or_none()
    return None if row is None else _stored(row)


def delete_memory(c: Connection, scope: Scope, memory_id: str) -> bool:
    """Delete one memory; False if there is none of that id."""
    return c.execute(delete(memories).where(owned(memories, scope), memories.c.memory_id == memory_id)).rowcount > 0


def clear_memories(c: Connection, scope: Scope) -> int:
    """Delete all memories of the scope, how many those were; nor does what was said by now become one later."""
    said = select(messages.c.run_id).where(owned(messages, scope), messages.c.role == "user")
    under_way = update(runs).where(runs.c.run_id.in_(said), runs.c.status == "running")
    c.execute(under_way.values(unremembered=True))
    return c.execute(delete(memories).where(owned(memories, scope))).rowcount


def search_memories(c: Connection, scope: Scope, query: str, limit: int) -> list[StoredMemory]:
    """What has one of the query's words or more, best first, with scores; the same in both databases.

    Any text is a query; one without words finds nothing.
    """
    return _search(c, scope, query_terms(query), limit)


def count_few(c: Connection, scope: Scope) -> int:
    """How many memories there are, counted no further than ``FEW_MEMORIES`` and one more."""
    ((total,),) = _COUNT_FEW.rows(c, storable_values(owner_values(scope)))
    return int(total)


def search_few(c: Connection, scope: Scope, query: str, limit: int, total: int) -> list[StoredMemory] | None:
    """As ``search_memories``, if that takes so little that writers can wait for it; None if there is more to search.

    ``total`` is what ``count_few`` says.
    """
    terms = query_terms(query)
    if total > FEW_MEMORIES or len(terms) > FEW_TERMS:
        return None
    return _search(c, scope, terms, limit, total)


def _search(
    c: Connection, scope: Scope, terms: Sequence[str], limit: int, total: int | None = None
) -> list[StoredMemory]:
    """``total`` is how many memories there are, from who knows."""
    found = select_candidates(c, scope, terms) if terms and limit > 0 else None
    if not found:
        return []
    if total is None:
        ((total,),) = _COUNT.rows(c, storable_values(owner_values(scope)))
    scores = rank(terms, found, total)[:limit]
    numbers = ", ".join([str(number) for number, _ in scores])
    chosen = rows_of_text(c, f"SELECT {', '.join(('number', *_SHOWN))} FROM memories WHERE number IN ({numbers})", {})
    rows = {row[0]: row for row in chosen}
    # On PostgreSQL a memory may have been deleted since it was found.
    return [_found(rows[number], score) for number, score in scores if number in rows]


def _found(row: Row, score: float) -> StoredMemory:
    _, memory_id, text, kind, created_at, updated_at, session_id, metadata = row
    return StoredMemory(
        id=memory_id,
        text=text,
        kind=kind,
        created_at=created_at,
        updated_at=updated_at,
        session_id=session_id,
        metadata={} if metadata == "{}" else json.loads(metadata),
        score=score,
    )


def memories_to_embed(c: Connection, scope: Scope, model: str, limit: int) -> list[StoredMemory]:
    """Memories without an embedding of that model, newest first."""
    other = or_(memories.c.embedding.is_(None), memories.c.embedding_model.is_distinct_from(model))
    query = select(memories).where(owned(memories, scope), other).order_by(memories.c.number.desc())
    return [_stored(row) for row in c.execute(query.limit(page_size(limit))).mappings()]


def set_embedding(c: Connection, scope: Scope, memory_id: str, embedding: bytes, model: str) -> bool:
    """Keep a memory's embedding; False if there is no such memory."""
    change = update(memories).where(owned(memories, scope), memories.c.memory_id == memory_id)
    return c.execute(change.values(embedding=embedding, embedding_model=model)).rowcount > 0


def _stored(row: RowMapping) -> StoredMemory:
    fields = {name: row[name] for name in _SHOWN if name != "memory_id"}
    return StoredMemory(id=row["memory_id"], **fields)
