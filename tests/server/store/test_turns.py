"""Turns in the store: begun once, ended once."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

import pytest
import trio

from engine.events import Usage
from engine.provider import Message
from server.store import history as history_module
from server.store import turns as turns_module
from server.store.database import Database
from server.store.history import count_messages, count_sessions, delete_session, history, list_messages, list_sessions
from server.store.memories import list_memories
from server.store.run_texts import drop_response, drop_responses
from server.store.turns import begin_turn, find_run, save_turn, tokens_used_since

from .scene import FOREIGN_SCOPES, SCOPE, answer, at, called, gave, have_turn, said, turn


async def test_a_begun_turn_is_a_running_run_a_message_and_a_session(database: Database) -> None:
    await database.write(begin_turn, SCOPE, "session", "run", "key", said("My dog is Rex"), at(1))
    run = await database.read(find_run, "run")
    assert run is not None
    assert (run.tenant_id, run.user_id, run.agent_id, run.session_id) == ("tenant", "user", "agent", "session")
    assert (run.key_id, run.status, run.created_at, run.ended_at, run.response) == ("key", "running", at(1), None, None)
    (message,) = await database.read(list_messages, SCOPE, "session", 10, 0)
    assert (message.role, message.content, message.run_id, message.status) == (
        "user",
        "My dog is Rex",
        "run",
        "running",
    )
    (session,) = await database.read(list_sessions, SCOPE, 10, 0)
    assert (session.session_id, session.created_at, session.message_count) == ("session", at(1), 1)
    assert await database.read(list_memories, SCOPE, None, 10, 0) == []
    assert await database.read(find_run, "unknown") is None


async def test_a_turn_begins_once(database: Database) -> None:
    for second in (1, 2):
        await database.write(begin_turn, SCOPE, "session", "run", None, said("hello"), at(second))
    for scope in FOREIGN_SCOPES:
        await database.write(begin_turn, scope, "session", "run", None, said("hello"), at(3))
        assert await database.read(count_sessions, scope) == 0
    (message,) = await database.read(list_messages, SCOPE, None, 10, 0)
    assert message.created_at == at(1)


async def test_a_turn_begins_though_its_session_is_being_deleted(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite has one writer: there, nobody is in the midst of deleting."""
    locked, begins = threading.Event(), threading.Event()
    really_note = turns_module._NOTE_USE.run

    def drop_once_it_begins(*args: Any) -> None:
        locked.set()
        assert begins.wait(60)
        drop_responses(*args)

    def note_use(*args: Any) -> int:
        begins.set()
        return really_note(*args)

    with closing(Database.open(postgres_url)) as database:
        await have_turn(database, "first", "hello")
        monkeypatch.setattr(history_module, "drop_responses", drop_once_it_begins)
        monkeypatch.setattr(turns_module._NOTE_USE, "run", note_use)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(database.write, delete_session, SCOPE, "session")
            await trio.to_thread.run_sync(locked.wait, 60)
            nursery.start_soon(database.write, begin_turn, SCOPE, "session", "second", None, said("again"), at(3))
        (message,) = await database.read(list_messages, SCOPE, "session", 10, 0)
    assert message.content == "again"


async def test_a_picture_without_words_is_a_message_but_no_memory(database: Database) -> None:
    picture = Message("user", " ", images=("data:image/png;base64,AAAA",))
    await database.write(begin_turn, SCOPE, "session", "run", None, picture, at(1))
    assert await database.write(save_turn, turn("run"), at(2))
    assert await database.read(history, SCOPE, "session", 5) == [picture]
    assert await database.read(list_memories, SCOPE, None, 10, 0) == []


async def test_an_ended_turn_has_its_messages_and_its_run_what_it_cost(database: Database) -> None:
    messages = (called("c1", text="let me see"), gave("c1"), answer("It is 2."))
    await have_turn(database, "run", "1+1?", messages, key_id="key", total_steps=2)
    run = await database.read(find_run, "run")
    assert run is not None
    assert (run.status, run.ended_at, run.response, run.total_steps) == ("done", at(1), "let me seeIt is 2.", 2)
    assert (run.elapsed_ms, run.ttfb_ms, run.input_tokens, run.output_tokens) == (120.5, 20.25, 10, 5)
    shown = await database.read(list_messages, SCOPE, "session", 10, 0, ("user", "assistant", "tool"))
    assert [(message.role, message.content, message.partial) for message in shown] == [
        ("user", "1+1?", False),
        ("assistant", "let me see", False),
        ("tool", "2", False),
        ("assistant", "It is 2.", False),
    ]
    assert shown[1].tool_calls == ({"call_id": "c1", "name": "calculator", "arguments": '{"expression":"1+1"}'},)
    assert shown[2].tool_call_id == "c1"
    assert [message.id for message in shown] == sorted({message.id for message in shown})
    (session,) = await database.read(list_sessions, SCOPE, 10, 0)
    assert (session.updated_at, session.message_count) == (at(1), 3)


async def test_a_turn_ends_once_and_only_if_it_began(database: Database) -> None:
    await have_turn(database, "run", "hello", [answer("hi")])
    assert not await database.write(save_turn, turn("run", answer("again"), status="error"), at(5))
    assert not await database.write(save_turn, turn("unknown", answer("hi")), at(5))
    run = await database.read(find_run, "run")
    assert run is not None
    assert (run.status, run.ended_at) == ("done", at(1))
    assert await database.read(count_messages, SCOPE, None) == 2


@pytest.mark.parametrize("status", ["stop", "error"])
async def test_an_answer_that_broke_off_is_kept_and_marked(database: Database, status: str) -> None:
    messages = (called("c1", text="let me see"), gave("c1"), answer("It is"))
    await have_turn(database, "run", "1+1?", messages, status=status, error_code="timeout.total", reason="user")
    shown = await database.read(list_messages, SCOPE, "session", 10, 0)
    assert [(message.content, message.partial, message.status) for message in shown] == [
        ("1+1?", False, status),
        ("let me see", False, status),
        ("It is", True, status),
    ]


async def test_an_empty_answer_is_no_message(database: Database) -> None:
    await have_turn(database, "run", "hello", [answer("")], status="error", error_code="upstream.auth", usage=None)
    assert [message.role for message in await database.read(list_messages, SCOPE, None, 10, 0)] == ["user"]
    run = await database.read(find_run, "run")
    assert run is not None
    assert (run.error_code, run.response, run.input_tokens) == ("upstream.auth", "", None)


async def test_what_was_said_is_kept_even_where_no_message_has_it(database: Database) -> None:
    await have_turn(database, "run", "hello", [], status="stop", response="I was about")
    shown = await database.read(list_messages, SCOPE, None, 10, 0)
    assert [(message.content, message.partial) for message in shown] == [("hello", False), ("I was about", True)]


async def test_what_no_database_takes_is_replaced_in_the_answer_too(database: Database) -> None:
    await have_turn(database, "odd", "hi", (answer("a\0b\ud83dc"),))
    run = await database.read(find_run, "odd")
    assert run is not None
    assert (run.status, run.response) == ("done", "a\N{REPLACEMENT CHARACTER}b?c")
    (_, said) = await database.read(list_messages, SCOPE, "session", 10, 0)
    assert said.content == run.response


async def test_tokens_are_counted_by_key_and_end(database: Database) -> None:
    big = Usage(input_tokens=3_000_000_000, output_tokens=1)
    await have_turn(database, "a", "x", key_id="key", second=1, usage=big)
    await have_turn(database, "b", "x", key_id="key", second=4)
    await have_turn(database, "c", "x", key_id="key", second=4, usage=None)
    await have_turn(database, "d", "x", key_id="other", second=4)
    await have_turn(database, "e", "x", second=4)
    await database.write(begin_turn, SCOPE, "session", "f", "key", said("x"), at(4))
    assert await database.read(tokens_used_since, "key", at(0)) == 3_000_000_016
    assert await database.read(tokens_used_since, "key", at(5)) == 15
    assert await database.read(tokens_used_since, "key", at(6)) == 0
    assert await database.read(tokens_used_since, "nobody", at(0)) == 0


async def test_messages_have_pages_counted_from_the_newest(database: Database) -> None:
    for number in range(3):
        await have_turn(database, f"run-{number}", f"q{number}", [answer(f"a{number}")], second=number)
    await have_turn(database, "elsewhere", "q9", [answer("a9")], session_id="second")

    async def page(session_id: str | None, limit: int, offset: int) -> list[str]:
        return [m.content for m in await database.read(list_messages, SCOPE, session_id, limit, offset)]

    assert await page("session", 10, 0) == ["q0", "a0", "q1", "a1", "q2", "a2"]
    assert await page("session", 2, 0) == ["q2", "a2"]
    assert await page("session", 3, 2) == ["a0", "q1", "a1"]
    assert await page("session", 3, 5) == ["q0"]
    assert await page("session", 3, 6) == []
    assert await page(None, 3, 0) == ["a2", "q9", "a9"]
    assert await page("unknown", 3, 0) == []
    assert await database.read(count_messages, SCOPE, "session") == 6
    assert await database.read(count_messages, SCOPE, None) == 8
    assert await database.read(count_messages, SCOPE, None, ("user",)) == 4


async def test_sessions_have_pages_the_last_used_first(database: Database) -> None:
    for number, name in enumerate(("one", "two", "three")):
        await have_turn(database, f"run-{name}", "hello", session_id=name, second=number)
    await have_turn(database, "again", "hello", session_id="one", second=9)
    for limit, offset, expected in ((10, 0, ["one", "three", "two"]), (1, 1, ["three"]), (5, 3, [])):
        sessions = await database.read(list_sessions, SCOPE, limit, offset)
        assert [session.session_id for session in sessions] == expected
    assert await database.read(count_sessions, SCOPE) == 3
    (first, *_) = await database.read(list_sessions, SCOPE, 1, 0)
    assert (first.message_count, first.created_at, first.updated_at) == (4, at(0), at(10))


async def test_a_deleted_session_takes_what_was_said_in_it_along(database: Database) -> None:
    await have_turn(database, "run", "hello")
    await have_turn(database, "other", "hello", session_id="second")
    await database.write(begin_turn, SCOPE, "session", "under way", None, said("hello"), at(3))
    assert await database.write(delete_session, SCOPE, "session")
    assert not await database.write(delete_session, SCOPE, "session")
    assert await database.read(count_messages, SCOPE, None) == 2
    assert [memory.id for memory in await database.read(list_memories, SCOPE, None, 10, 0)] == ["other"]
    # Begun again, the session must not get the answer to what is not in it any more.
    await have_turn(database, "anew", "hello again")
    assert await database.write(save_turn, turn("under way", answer("hi")), at(4))
    contents = [message.content for message in await database.read(list_messages, SCOPE, "session", 10, 0)]
    assert contents == ["hello again", "ok"]


async def test_nothing_of_another_scope_is_seen_or_deleted(database: Database) -> None:
    await have_turn(database, "run", "hello")
    for scope in FOREIGN_SCOPES:
        assert await database.read(history, scope, "session", 5) == []
        for session_id in ("session", None):
            assert await database.read(list_messages, scope, session_id, 5, 0) == []
            assert await database.read(count_messages, scope, session_id) == 0
        assert await database.read(list_sessions, scope, 5, 0) == []
        assert await database.read(count_sessions, scope) == 0
        assert not await database.write(delete_session, scope, "session")
    for number, scope in enumerate(FOREIGN_SCOPES):
        await have_turn(database, f"run-{number}", "mine", scope=scope)
    assert [message.content for message in await database.read(history, SCOPE, "session", 9)] == ["hello", "ok"]
    assert await database.read(count_messages, SCOPE, "session") == 2
    assert [session.message_count for session in await database.read(list_sessions, SCOPE, 5, 0)] == [2]
    assert await database.write(delete_session, SCOPE, "session")
    for scope in FOREIGN_SCOPES:
        assert await database.read(count_messages, scope, "session") == 2
        assert [memory.text for memory in await database.read(list_memories, scope, None, 5, 0)] == ["mine"]


async def test_a_deleted_session_leaves_no_answer_behind(database: Database) -> None:
    for number, scope in enumerate((SCOPE, *FOREIGN_SCOPES)):
        await have_turn(database, f"run-{number}", "hello", [answer("hi")], scope=scope)
    await have_turn(database, "elsewhere", "hello", [answer("hi")], session_id="another")
    await database.write(begin_turn, SCOPE, "session", "under way", "key", said("hello"), at(2))
    assert await database.write(delete_session, SCOPE, "session")
    assert await database.write(save_turn, turn("under way", answer("too late")), at(3))
    run_ids = ("run-0", "under way", "run-1", "run-2", "run-3", "elsewhere")
    runs = [await database.read(find_run, run_id) for run_id in run_ids]
    assert [run and run.response for run in runs] == [None, None, "hi", "hi", "hi", "hi"]
    assert await database.read(tokens_used_since, "key", at(3)) == 15


async def test_a_session_that_is_made_again_has_nothing_of_a_run_from_before(database: Database) -> None:
    await database.write(begin_turn, SCOPE, "session", "old", None, said("hello"), at(1))
    await database.write(delete_session, SCOPE, "session")
    await database.write(begin_turn, SCOPE, "session", "new", None, said("again"), at(2))
    assert await database.write(save_turn, turn("old", answer("too late")), at(3))
    assert [message.content for message in await database.read(list_messages, SCOPE, None, 10, 0)] == ["again"]


async def test_an_answer_is_dropped_before_and_after_its_run_ends(database: Database) -> None:
    await have_turn(database, "ended", "hello", [answer("hi")])
    await database.write(begin_turn, SCOPE, "session", "under way", None, said("hello"), at(2))
    for run_id in ("ended", "under way", "unknown"):
        await database.write(drop_response, run_id)
    assert await database.write(save_turn, turn("under way", answer("hi")), at(3))
    for run_id in ("ended", "under way"):
        run = await database.read(find_run, run_id)
        assert run is not None
        assert (run.status, run.response, run.output_tokens) == ("done", None, 5)
    assert await database.read(count_messages, SCOPE, "session") == 4, "what was said stays in the session"


async def test_a_session_that_is_deleted_just_as_its_turns_are_kept(database: Database) -> None:
    for round_ in range(10):
        run_ids = [f"run-{round_}-{number}" for number in range(3)]
        for run_id in run_ids:
            await database.write(begin_turn, SCOPE, "session", run_id, None, said("hello"), at(1))
        async with trio.open_nursery() as nursery:
            for run_id in run_ids:
                nursery.start_soon(database.write, save_turn, turn(run_id, answer("hi")), at(2))
            nursery.start_soon(database.write, delete_session, SCOPE, "session")
        runs = [await database.read(find_run, run_id) for run_id in run_ids]
        assert [run and (run.status, run.response) for run in runs] == [("done", None)] * 3
        assert await database.read(count_messages, SCOPE, None) == 0
