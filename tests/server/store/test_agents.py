"""Agents in the store."""

from __future__ import annotations

import pytest

from server.records import WorkingMemorySettings
from server.store.agents import count_agents, create_agent, delete_agent, find_agent, list_agents, replace_agent
from server.store.database import AlreadyThereError, Database
from server.store.history import count_messages, count_sessions
from server.store.memories import count_memories
from server.store.turns import begin_turn, find_run, save_turn
from server.store.working_memories import read_document, write_document

from .scene import FOREIGN_SCOPES, SCOPE, answer, at, have_turn, record, said, turn


async def test_an_agent_comes_back_as_it_was_kept(database: Database) -> None:
    kept = record(
        name="Ägent 猫",
        system="Say \0 and \ud800.",
        working_memory=WorkingMemorySettings(template={"name": None, "n": 2**70}),
        metadata={"deep": [{"a": 1.5}], "": "\x1f"},
    )
    created = await database.write(create_agent, "tenant", "user", kept, at(1))
    assert created == await database.read(find_agent, "tenant", "agent")
    assert created.record == kept
    assert (created.user_id, created.revision, created.created_at, created.updated_at) == ("user", 1, at(1), at(1))


async def test_an_id_is_taken_once_in_each_tenant(database: Database) -> None:
    await database.write(create_agent, "tenant", None, record(), at(1))
    with pytest.raises(AlreadyThereError, match="'agent'"):
        await database.write(create_agent, "tenant", "user", record(), at(2))
    await database.write(create_agent, "other", None, record(), at(3))
    found = await database.read(find_agent, "other", "agent")
    assert found is not None
    assert found.created_at == at(3)


async def test_a_replaced_agent_is_one_revision_on(database: Database) -> None:
    await database.write(create_agent, "tenant", "user", record(), at(1))
    await database.write(create_agent, "other", None, record(), at(1))
    replaced = await database.write(replace_agent, "tenant", record(name="new"), at(2))
    assert replaced is not None
    assert (replaced.record.name, replaced.revision, replaced.created_at, replaced.updated_at, replaced.user_id) == (
        "new",
        2,
        at(1),
        at(2),
        "user",
    )
    assert await database.read(find_agent, "tenant", "agent") == replaced
    other = await database.read(find_agent, "other", "agent")
    assert other is not None
    assert other.revision == 1
    assert await database.write(replace_agent, "tenant", record("unknown"), at(3)) is None


async def test_lists_have_pages_and_show_what_a_user_may_see(database: Database) -> None:
    owners = {"b": None, "a": "user", "c": "other", "d": "user"}
    for second, (agent_id, user_id) in enumerate(owners.items()):
        await database.write(create_agent, "tenant", user_id, record(agent_id), at(second))
    await database.write(create_agent, "other", None, record("e"), at(9))

    async def listed(user_id: str | None, limit: int, offset: int) -> list[str]:
        agents = await database.read(list_agents, "tenant", user_id, limit, offset)
        return [agent.record.id for agent in agents]

    assert await listed(None, 10, 0) == ["b", "a", "c", "d"]
    assert await listed("user", 10, 0) == ["b", "a", "d"]
    assert await listed("user", 2, 1) == ["a", "d"]
    assert await listed("user", 2, 3) == []
    assert await listed("user", 0, 0) == []
    assert await listed("user", 10**30, 10**30) == []
    assert await database.read(count_agents, "tenant", None) == 4
    assert await database.read(count_agents, "tenant", "user") == 3
    assert await database.read(count_agents, "nobody", None) == 0


async def test_agents_made_at_the_same_time_are_in_the_order_of_their_ids_by_code_point(database: Database) -> None:
    for agent_id in ("b", "a", "B"):
        await database.write(create_agent, "tenant", None, record(agent_id), at(1))
    listed = await database.read(list_agents, "tenant", None, 10, 0)
    assert [agent.record.id for agent in listed] == ["B", "a", "b"]


async def test_deleting_an_agent_deletes_what_its_users_told_it_and_nothing_else(database: Database) -> None:
    for tenant in ("tenant", "other"):
        await database.write(create_agent, tenant, None, record(), at(0))
    for number, scope in enumerate((SCOPE, *FOREIGN_SCOPES)):
        await have_turn(database, f"run-{number}", "hello", scope=scope)
        await database.write(write_document, scope, {"n": number}, at(1))
    assert await database.write(delete_agent, "tenant", "agent")
    left = []
    for scope in (SCOPE, *FOREIGN_SCOPES):
        counts = (
            await database.read(count_messages, scope, None),
            await database.read(count_sessions, scope),
            await database.read(count_memories, scope, None),
            await database.read(read_document, scope) is not None,
        )
        left.append(counts)
    assert left == [(0, 0, 0, False), (2, 1, 1, True), (0, 0, 0, False), (2, 1, 1, True)]
    runs = [await database.read(find_run, f"run-{number}") for number in range(4)]
    assert [run and run.response for run in runs] == [None, "ok", None, "ok"]
    assert all(run is not None and run.status == "done" and run.total_steps == 1 for run in runs)
    assert await database.read(find_agent, "tenant", "agent") is None
    assert await database.read(find_agent, "other", "agent") is not None
    assert not await database.write(delete_agent, "tenant", "agent")


async def test_a_run_under_way_when_its_agent_is_deleted_ends_without_messages(database: Database) -> None:
    await database.write(create_agent, "tenant", None, record(), at(0))
    await database.write(begin_turn, SCOPE, "session", "run", None, said("hello"), at(1))
    await database.write(delete_agent, "tenant", "agent")
    assert await database.write(save_turn, turn("run", answer("hi")), at(2))
    assert await database.read(count_messages, SCOPE, None) == 0
    run = await database.read(find_run, "run")
    assert run is not None
    assert (run.status, run.response) == ("done", None)
