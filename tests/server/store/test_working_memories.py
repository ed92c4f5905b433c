"""Working memories in the store."""

from __future__ import annotations

from typing import Any

import trio
from sqlalchemy import Connection

from server.store.database import Database
from server.store.working_memories import clear_document, lock_document, read_document, write_document

from .scene import FOREIGN_SCOPES, SCOPE, at


async def test_a_document_is_of_one_user_and_agent(database: Database) -> None:
    document: dict[str, Any] = {"name": "Zoë 猫 \0 \ud800", "n": 2**70, "deep": {"list": [1.5, None, True]}}
    assert await database.read(read_document, SCOPE) is None
    await database.write(write_document, SCOPE, {"first": 1}, at(1))
    await database.write(write_document, SCOPE, document, at(2))
    assert await database.read(read_document, SCOPE) == document
    for scope in FOREIGN_SCOPES:
        assert await database.read(read_document, scope) is None
        assert not await database.write(clear_document, scope)
    assert await database.write(clear_document, SCOPE)
    assert await database.read(read_document, SCOPE) is None
    assert not await database.write(clear_document, SCOPE)


async def test_changes_that_read_first_lose_nothing_under_a_lock(database: Database) -> None:
    def count_up(c: Connection) -> None:
        lock_document(c, SCOPE)
        document = read_document(c, SCOPE) or {"n": 0}
        write_document(c, SCOPE, {"n": document["n"] + 1}, at(1))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(database.write, count_up)
    assert await database.read(read_document, SCOPE) == {"n": 20}
