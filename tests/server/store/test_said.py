"""What the user says becomes a memory when the run ends, whoever ends it, and once."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import update

from server.store.agents import create_agent, delete_agent
from server.store.database import Database
from server.store.history import delete_session
from server.store.interrupted import end_run, interrupt_runs
from server.store.memories import clear_memories, delete_memory, list_memories
from server.store.run_events import NewEvents, add_events, forget_events
from server.store.schema import runs
from server.store.turns import begin_run, begin_turn, save_turn

from .scene import SCOPE, answer, at, have_turn, record, said, turn


async def begin(database: Database, run_id: str = "run", text: str = "My dog is Rex") -> None:
    await database.write(begin_turn, SCOPE, "session", run_id, None, said(text), at(1))


async def remembered(database: Database) -> list[str]:
    return [memory.text for memory in await database.read(list_memories, SCOPE, None, 10, 0)]


async def test_it_is_of_the_time_and_the_session_that_it_was_said_in(database: Database) -> None:
    await begin(database)
    assert await remembered(database) == []
    assert await database.write(save_turn, turn("run", answer("ok")), at(9))
    (memory,) = await database.read(list_memories, SCOPE, "said", 10, 0)
    assert (memory.id, memory.text, memory.kind, memory.session_id) == ("run", "My dog is Rex", "said", "session")
    assert (memory.created_at, memory.updated_at, memory.metadata) == (at(1), at(1), {})


@pytest.mark.parametrize("status", ["error", "stop"])
async def test_a_run_that_broke_off_loses_none_of_it(database: Database, status: Any) -> None:
    await begin(database)
    assert await database.write(save_turn, turn("run", status=status, response=""), at(2))
    assert await remembered(database) == ["My dog is Rex"]


async def test_one_that_was_deleted_does_not_come_back_when_the_turn_is_kept_again(database: Database) -> None:
    await have_turn(database, "run", "hello")
    assert await database.write(delete_memory, SCOPE, "run")
    assert not await database.write(save_turn, turn("run", answer("ok")), at(3))
    await begin(database)
    assert not await database.write(save_turn, turn("run", answer("ok")), at(4))
    await database.write(interrupt_runs, at(5))
    assert await remembered(database) == []


async def test_what_no_database_takes_is_replaced_and_found(database: Database) -> None:
    await begin(database, text="a\0b\ud83dc")
    await database.write(save_turn, turn("run"), at(2))
    assert await remembered(database) == ["a\N{REPLACEMENT CHARACTER}b?c"]


class TestInAnothersStead:
    async def test_of_a_run_that_was_under_way(self, database: Database) -> None:
        await begin(database)
        assert await database.write(interrupt_runs, at(2)) == 1
        assert await remembered(database) == ["My dog is Rex"]

    async def test_of_one_whose_events_are_kept_no_more(self, database: Database) -> None:
        await begin(database)
        await database.write(forget_events, "run")
        assert await database.write(interrupt_runs, at(2)) == 1
        assert await remembered(database) == ["My dog is Rex"]

    async def test_of_one_whose_turn_was_lost_and_whose_last_event_was_not(self, database: Database) -> None:
        await begin(database)
        end = '{"chunk_type":"error","code":"internal","content":"broken","response":""}'
        await database.write(add_events, [NewEvents("run", [(1, end)], 1)])
        assert await database.write(interrupt_runs, at(2)) == 1
        assert await remembered(database) == ["My dog is Rex"]

    async def test_of_a_worker_that_is_lost(self, database: Database) -> None:
        await begin(database)
        assert await database.write(end_run, "run", "worker_lost", at(2)) is not None
        assert await remembered(database) == ["My dog is Rex"]

    async def test_of_a_run_that_an_older_lumos_began(self, database: Database) -> None:
        await have_turn(database, "run", "hello")  # it kept the memory at once
        await database.write(lambda c: c.execute(update(runs).values(status="running", ended_at=None)))
        assert await database.write(interrupt_runs, at(2)) == 1
        assert await remembered(database) == ["hello"]


class TestForgottenMeanwhile:
    async def test_all_is_all_that_was_said_by_then(self, database: Database) -> None:
        await have_turn(database, "before", "before")
        await begin(database)
        assert await database.write(clear_memories, SCOPE) == 1
        await begin(database, "later", "later")
        for run_id in ("run", "later"):
            assert await database.write(save_turn, turn(run_id, answer("ok")), at(3))
        assert await remembered(database) == ["later"]

    async def test_also_for_who_ends_it_in_its_stead(self, database: Database) -> None:
        for run_id in ("run", "without events"):
            await begin(database, run_id)
        await database.write(forget_events, "without events")
        assert await database.write(clear_memories, SCOPE) == 0
        assert await database.write(interrupt_runs, at(2)) == 2
        assert await remembered(database) == []

    async def test_with_its_session(self, database: Database) -> None:
        for run_id in ("run", "other"):
            await begin(database, run_id)
        assert await database.write(delete_session, SCOPE, "session")
        assert await database.write(save_turn, turn("run", answer("ok")), at(3))
        assert await database.write(interrupt_runs, at(4)) == 1
        assert await remembered(database) == []

    async def test_with_its_agent(self, database: Database) -> None:
        await database.write(create_agent, "tenant", None, record(), at(0))
        await begin(database)
        assert await database.write(delete_agent, "tenant", "agent")
        assert await database.write(save_turn, turn("run", answer("ok")), at(3))
        assert await remembered(database) == []

    async def test_an_agent_without_memory_keeps_none(self, database: Database) -> None:
        assert await database.write(begin_run, SCOPE, "session", "run", None, at(1))
        assert await database.write(save_turn, turn("run", answer("ok")), at(3))
        assert await remembered(database) == []
