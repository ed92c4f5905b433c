"""Memories in the store, without searching."""

from __future__ import annotations

import pytest

from engine.memory import MemoryKind
from server.store.database import AlreadyThereError, Database
from server.store.memories import (
    add_memory,
    clear_memories,
    count_memories,
    delete_memory,
    find_memory,
    list_memories,
    memories_to_embed,
    search_memories,
    set_embedding,
    update_memory,
)
from server.store.rows import Scope
from server.store.vectors import read_vectors

from .scene import FOREIGN_SCOPES, SCOPE, at, have_turn


async def remember(database: Database, memory_id: str, text: str, scope: Scope = SCOPE) -> None:
    await database.write(add_memory, scope, memory_id, text, "fact", at(1))


async def test_a_memory_comes_back_as_it_was_kept(database: Database) -> None:
    metadata = {"source": "Zoë \0", "n": [1, None]}
    added = await database.write(
        lambda c: add_memory(c, SCOPE, "id", "a\0b\ud800 猫", "fact", at(1), session_id="s", metadata=metadata)
    )
    assert added == await database.read(find_memory, SCOPE, "id")
    assert (added.id, added.kind, added.session_id, added.metadata) == ("id", "fact", "s", metadata)
    assert (added.text, added.score) == ("a\N{REPLACEMENT CHARACTER}b? 猫", None)
    assert await database.read(find_memory, SCOPE, "ID") is None


async def test_an_id_is_taken_once_in_each_scope(database: Database) -> None:
    for scope in (SCOPE, *FOREIGN_SCOPES):
        await remember(database, "id", "dog", scope)
    with pytest.raises(AlreadyThereError, match="'id'"):
        await remember(database, "id", "cat")
    assert await database.read(search_memories, SCOPE, "cat", 5) == []


async def test_lists_have_pages_newest_first(database: Database) -> None:
    for memory_id in ("a", "b", "c"):
        await remember(database, memory_id, "text")
    await have_turn(database, "said", "hello")
    pages: list[tuple[MemoryKind | None, int, int, list[str]]] = [
        (None, 10, 0, ["said", "c", "b", "a"]),
        ("fact", 10, 0, ["c", "b", "a"]),
        ("said", 10, 0, ["said"]),
        (None, 2, 1, ["c", "b"]),
        (None, 2, 4, []),
    ]
    for kind, limit, offset, expected in pages:
        listed = await database.read(list_memories, SCOPE, kind, limit, offset)
        assert [memory.id for memory in listed] == expected
    assert await database.read(count_memories, SCOPE, None) == 4
    assert await database.read(count_memories, SCOPE, "said") == 1


async def test_a_changed_memory_is_found_by_its_new_words_only(database: Database) -> None:
    await database.write(
        lambda c: add_memory(
            c, SCOPE, "id", "a dog", "fact", at(1), metadata={"n": 1}, embedding=b"1234", embedding_model="m"
        )
    )
    changed = await database.write(update_memory, SCOPE, "id", "a cat", None, at(2))
    assert changed is not None
    assert changed == await database.read(find_memory, SCOPE, "id")
    assert (changed.text, changed.metadata, changed.created_at, changed.updated_at) == ("a cat", {"n": 1}, at(1), at(2))
    assert await database.read(search_memories, SCOPE, "dog", 5) == []
    assert [memory.id for memory in await database.read(search_memories, SCOPE, "cat", 5)] == ["id"]
    assert await database.read(read_vectors, SCOPE, "m", 2, 5) == []
    again = await database.write(update_memory, SCOPE, "id", "a cat", {}, at(3))
    assert again is not None
    assert again.metadata == {}
    assert await database.write(update_memory, SCOPE, "unknown", "a cat", None, at(3)) is None


async def test_deleted_memories_are_found_no_more(database: Database) -> None:
    for memory_id in ("a", "b", "c"):
        await remember(database, memory_id, f"dog {memory_id}")
    assert await database.write(delete_memory, SCOPE, "b")
    assert not await database.write(delete_memory, SCOPE, "b")
    assert [memory.id for memory in await database.read(search_memories, SCOPE, "dog", 5)] == ["c", "a"]
    assert await database.write(clear_memories, SCOPE) == 2
    assert await database.write(clear_memories, SCOPE) == 0
    assert await database.read(search_memories, SCOPE, "dog", 5) == []
    await remember(database, "b", "dog again")
    assert [memory.id for memory in await database.read(search_memories, SCOPE, "dog", 5)] == ["b"]


async def test_embeddings_are_of_one_model(database: Database) -> None:
    for memory_id in ("a", "b", "c"):
        await remember(database, memory_id, "text")
    assert await database.write(set_embedding, SCOPE, "a", b"\0\1", "m1")
    assert await database.write(set_embedding, SCOPE, "b", b"\2\3", "m2")
    assert not await database.write(set_embedding, SCOPE, "unknown", b"\2\3", "m2")
    assert [memory.id for memory in await database.read(memories_to_embed, SCOPE, "m1", 5)] == ["c", "b"]
    assert [memory.id for memory in await database.read(memories_to_embed, SCOPE, "m1", 1)] == ["c"]
    assert await database.read(read_vectors, SCOPE, "m1", 2, 5) == [("a", b"\0\1")]


async def test_nothing_of_another_scope_is_seen_or_touched(database: Database) -> None:
    await remember(database, "id", "my dog")
    for scope in FOREIGN_SCOPES:
        assert await database.read(find_memory, scope, "id") is None
        assert await database.read(list_memories, scope, None, 5, 0) == []
        assert await database.read(count_memories, scope, None) == 0
        assert await database.read(search_memories, scope, "dog", 5) == []
        assert await database.read(memories_to_embed, scope, "m", 5) == []
        assert await database.write(update_memory, scope, "id", "cat", None, at(2)) is None
        assert not await database.write(set_embedding, scope, "id", b"", "m")
        assert not await database.write(delete_memory, scope, "id")
        assert await database.write(clear_memories, scope) == 0
    found = await database.read(find_memory, SCOPE, "id")
    assert found is not None
    assert found.text == "my dog"
