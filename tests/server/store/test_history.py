"""The history that a model is shown: ended turns, whole where they fit."""

from __future__ import annotations

import pytest

from engine.provider import Message
from server.store.database import Database
from server.store.history import history
from server.store.interrupted import interrupt_runs
from server.store.turns import begin_turn, save_turn

from .scene import SCOPE, answer, at, called, gave, have_turn, said, turn


async def shown(database: Database, messages: int) -> list[str]:
    found = await database.read(history, SCOPE, "session", messages)
    return [f"{message.role}: {message.content}" for message in found]


async def test_turns_come_whole_newest_first_and_are_told_oldest_first(database: Database) -> None:
    for number in range(3):
        await have_turn(database, f"run-{number}", f"q{number}", [answer(f"a{number}")])
    whole = ["user: q0", "assistant: a0", "user: q1", "assistant: a1", "user: q2", "assistant: a2"]
    for messages in range(8):
        assert await shown(database, messages) == (whole[-(messages // 2 * 2) :] if messages >= 2 else [])


async def test_tool_calls_and_results_come_with_their_turn_as_they_were(database: Database) -> None:
    messages = (called("c1", "c2", text="let me see"), gave("c1"), gave("c2", "boom"), answer("2"))
    await have_turn(database, "run", "1+1?", messages)
    assert await database.read(history, SCOPE, "session", 5) == [said("1+1?"), *messages]


async def test_a_turn_that_does_not_fit_whole_is_reduced_and_is_the_last(database: Database) -> None:
    await have_turn(database, "oldest", "q0", [answer("a0")])
    await have_turn(
        database, "tools", "q1", [called("c1", text="hm"), gave("c1"), called("c2"), gave("c2"), answer("a1")]
    )
    await have_turn(database, "newest", "q2", [answer("a2")])
    newest = ["user: q2", "assistant: a2"]
    reduced = ["user: q1", "assistant: hm", "assistant: a1"]
    assert await shown(database, 10) == [
        *("user: q0", "assistant: a0"),
        *("user: q1", "assistant: hm", "tool: 2", "assistant: ", "tool: 2", "assistant: a1"),
        *newest,
    ]
    assert await shown(database, 9) == (await shown(database, 10))[2:]
    assert await shown(database, 7) == [*reduced, *newest]
    assert await shown(database, 5) == [*reduced, *newest]
    assert await shown(database, 4) == newest
    found = await database.read(history, SCOPE, "session", 5)
    assert not any(message.tool_calls for message in found)


async def test_turns_under_way_are_left_out(database: Database) -> None:
    await have_turn(database, "ended", "q0", [answer("a0")])
    await database.write(begin_turn, SCOPE, "session", "under way", None, said("q1"), at(2))
    assert await shown(database, 10) == ["user: q0", "assistant: a0"]
    await database.write(interrupt_runs, at(4))
    assert await shown(database, 10) == ["user: q0", "assistant: a0", "user: q1"]


async def test_turns_at_the_same_time_do_not_mix(database: Database) -> None:
    for name in ("a", "b"):
        await database.write(begin_turn, SCOPE, "session", name, None, said(f"q {name}"), at(1))
    for name in ("b", "a"):
        await database.write(save_turn, turn(name, answer(f"a {name}")), at(2))
    assert await shown(database, 10) == ["user: q a", "assistant: a a", "user: q b", "assistant: a b"]


@pytest.mark.parametrize(
    "broken",
    [
        (called("c1", text="hm"),),
        (called("c1", "c2", text="hm"), gave("c1")),
        (called("c1", text="hm"), gave("c2")),
        (called("c1", text="hm"), answer("so"), gave("c1")),
        (called("c1", text="hm"), answer("so")),
    ],
)
async def test_a_turn_with_a_call_without_result_is_reduced_and_older_ones_still_come(
    database: Database, broken: tuple[Message, ...]
) -> None:
    await have_turn(database, "older", "q0", [answer("a0")])
    await have_turn(database, "broken", "q1", broken, status="stop")
    texts = [f"assistant: {message.content}" for message in broken if message.role == "assistant"]
    assert await shown(database, 10) == ["user: q0", "assistant: a0", "user: q1", *texts]


async def test_sessions_do_not_mix(database: Database) -> None:
    await have_turn(database, "here", "q0", [answer("a0")])
    await have_turn(database, "there", "q1", [answer("a1")], session_id="second")
    assert await shown(database, 10) == ["user: q0", "assistant: a0"]
