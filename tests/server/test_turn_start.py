"""What the beginning of a turn reads along: the history, and what is recalled from few memories."""

from __future__ import annotations

from typing import cast

import pytest
import trio
from sqlalchemy import Connection

from engine import Message
from engine.memory import AtHand
from providers.embeddings import EmbeddingClient
from server.embedding_recall import EmbeddingRecall
from server.records import MemorySettings
from server.store import memories
from server.store.database import Database
from server.store.prepared import rows_of_text
from tests.server.memory_scene import ANN, Scene, turn


@pytest.fixture
def scene(database: Database) -> Scene:
    return Scene(database)


async def test_a_turn_recalls_what_was_said_in_another_session(scene: Scene) -> None:
    await scene.say("My dog is called Rex", session_id="other")
    memory = scene.memory()
    await memory.begin_turn(scene.next_run(), Message("user", "What is my dog called?"))
    assert [entry.text for entry in await memory.recall("What is my dog called?", 5)] == ["My dog is called Rex"]


async def test_reads_history_and_recalls_a_few_along(scene: Scene) -> None:
    question = "What is my dog called?"
    await scene.say("My dog is called Rex", session_id="other")
    await scene.say("I have a dog")
    memory = scene.memory()
    await memory.begin_turn(scene.next_run(), Message("user", question))
    known = memory.at_hand()
    assert known.history == await memory.history(10)
    assert known.memories is not None
    assert known.memories == await memory.recall(question, 5)
    assert [entry.text for entry in known.memories] == ["My dog is called Rex"], "the history shows the other"


async def test_the_history_is_read_of_a_session_that_has_one(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def history(_: Connection, __: object, session_id: str, ___: int) -> list[Message]:
        asked.append(session_id)
        return []

    monkeypatch.setattr("server.memory.history.history", history)
    for session_id in ("one", "another", "one"):
        await scene.memory(session_id).begin_turn(scene.next_run(), Message("user", "Hello"))
    assert asked == ["one"]


async def test_of_a_user_with_no_other_memory_nothing_is_left_to_be_read(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = scene.memory()
    await memory.begin_turn(scene.next_run(), Message("user", "Hello"))
    monkeypatch.setattr(scene.database, "read", None)
    assert not await memory.history(10)
    assert memory.at_hand() == AtHand([], ())


async def test_among_many_memories_it_is_recalled_while_others_write(scene: Scene) -> None:
    def remember_many(c: Connection) -> None:
        for number in range(memories.FEW_MEMORIES + 1):
            memories.keep_memory(c, ANN, f"m{number}", f"My dog has {number} fleas", "fact", "2026-11-23")

    await scene.database.write(remember_many)
    memory = scene.memory()
    await memory.begin_turn(scene.next_run(), Message("user", "My dog?"))
    assert memory.at_hand().memories is None


async def test_and_so_is_a_question_of_many_words(scene: Scene) -> None:
    await scene.say("My dog is called Rex", session_id="other")
    memory = scene.memory()
    question = " ".join(f"word{number}" for number in range(memories.FEW_TERMS + 1))
    await memory.begin_turn(scene.next_run(), Message("user", question))
    assert memory.at_hand().memories is None


async def test_and_what_is_found_by_its_meaning(scene: Scene) -> None:
    await scene.say("My dog is called Rex", session_id="other")
    meaning = EmbeddingRecall(scene.database, cast("EmbeddingClient", None))
    memory = scene.memory(meaning=meaning)
    await memory.begin_turn(scene.next_run(), Message("user", "Hound?"))
    assert memory.at_hand().memories is None


async def test_an_agent_that_recalls_nothing(scene: Scene) -> None:
    await scene.say("My dog is called Rex", session_id="other")
    memory = scene.memory(settings=MemorySettings(recall_limit=0))
    await memory.begin_turn(scene.next_run(), Message("user", "My dog?"))
    assert memory.at_hand().memories == ()


class TestASearchThatFails:
    """The transaction that begins a turn searches along; the turn does not depend on it."""

    @pytest.fixture
    def no_search(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(connection: Connection, *_: object) -> None:
            rows_of_text(connection, "SELECT what FROM nowhere", {})

        monkeypatch.setattr(memories, "select_candidates", fail)

    async def test_begins_the_turn_all_the_same(self, scene: Scene, no_search: None) -> None:
        await scene.say("My dog is called Rex")
        memory = scene.memory()
        await memory.begin_turn(scene.next_run(), Message("user", "My dog?"))
        known = memory.at_hand()
        assert known.memories is None
        assert [message.content for message in known.history or ()] == ["My dog is called Rex", "Yes."]
        await memory.save_turn(turn("run-2"))
        assert [message.content for message in await scene.memory().history(2)] == ["My dog?", "Yes."]

    async def test_and_leaves_others_alone_that_begin_with_it(self, scene: Scene, no_search: None) -> None:
        await scene.say("My dog is called Rex")

        async def begin(session_id: str, text: str) -> None:
            await scene.memory(session_id).begin_turn(scene.next_run(), Message("user", text))

        async with trio.open_nursery() as nursery:
            for number, text in enumerate(["Hello", "My dog?", "...", "Dogs?", "!"]):
                nursery.start_soon(begin, f"s{number}", text)
