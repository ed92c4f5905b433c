"""Vectors of memories in the store, without the memories: thousands are compared for the few that are then read."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, select

from .memories import find_memory
from .rows import Scope, StoredMemory
from .schema import memories, owned, page_size


def read_vectors(c: Connection, scope: Scope, model: str, size: int, limit: int) -> list[tuple[str, bytes]]:
    """Ids of memories and their vectors of that model and that many bytes, newest first."""
    query = (
        select(memories.c.memory_id, memories.c.embedding)
        .where(owned(memories, scope), memories.c.embedding.is_not(None), memories.c.embedding_model == model)
        .order_by(memories.c.number.desc())
        .limit(page_size(limit))
    )
    return [(memory_id, bytes(vector)) for memory_id, vector in c.execute(query) if len(vector) == size]


def find_memories(c: Connection, scope: Scope, ids: Sequence[str]) -> list[StoredMemory]:
    """The memories of these ids that are there, in their order."""
    found = (find_memory(c, scope, memory_id) for memory_id in ids)
    return [memory for memory in found if memory is not None]
