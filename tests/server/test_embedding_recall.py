"""Recall by meaning beside recall by words: what it adds, and what becomes of it when the vendor is slow or gone."""

from __future__ import annotations

import builtins
import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from sqlalchemy import Connection, select
from trio.testing import MockClock

from engine import Message, ProviderError
from providers.registry import ProviderConfigError
from server.embedding_backlog import MAX_WAITING, EmbeddingBacklog
from server.embedding_recall import BREAKER_LIMITS, EMBED_SECONDS, EmbeddingRecall, fused, load_numpy
from server.memory import StoredMemory
from server.records import MemorySettings
from server.store import memories, rows, schema
from server.store.database import Database
from server.store.errors import StoreUnavailableError
from server.store.rows import Scope
from tests.server.memory_scene import ANN, FakeEmbedder, Scene, inline_scene, turn

BOB = Scope("acme", "bob", "helper")
PETS = {"dog", "Rex", "animal", "pet", "犬"}
MUSIC = {"jazz", "music", "song"}
DOWN = ProviderError("upstream.connection", "nobody there")
WAIT = MemorySettings().wait


class Meaning:
    """A scene with vectors, where ``settle`` waits until those of what was said are made."""

    def __init__(self, scene: Scene, embedder: FakeEmbedder) -> None:
        self.scene = scene
        self.embedder = embedder
        self.recall = EmbeddingRecall(scene.database, embedder)

    def memory(self, session_id: str = "tuesday", scope: Scope = ANN) -> StoredMemory:
        return self.scene.memory(session_id, scope, meaning=self.recall)

    async def say(self, text: str, session_id: str = "monday", scope: Scope = ANN) -> str:
        return await self.scene.say(text, session_id=session_id, scope=scope, meaning=self.recall)

    async def settle(self) -> None:
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(EMBED_SECONDS)
        assert len(self.scene.store.backlog) == 0

    async def embedded(self, scope: Scope = ANN) -> dict[str, bytes]:
        """The vectors by text."""
        return await self.scene.database.read(_embedded, scope, self.embedder.model)


def _embedded(c: Connection, scope: Scope, model: str) -> dict[str, bytes]:
    table = schema.memories
    found = select(table.c.text, table.c.embedding).where(schema.owned(table, scope), table.c.embedding_model == model)
    return {text: bytes(vector) for text, vector in c.execute(found)}


@asynccontextmanager
async def meaning(*, working: bool = True, **options: Any) -> AsyncIterator[Meaning]:
    """Vectors of pets, music and the rest; ``working`` runs the task that makes them."""
    with inline_scene() as scene:
        async with trio.open_nursery() as nursery:
            if working:
                nursery.start_soon(scene.store.backlog.work)
            yield Meaning(scene, FakeEmbedder(PETS, MUSIC, {"weather"}, **options))
            nursery.cancel_scope.cancel()


async def texts(memory: StoredMemory, query: str, limit: int = 5) -> list[str]:
    return [entry.text for entry in await memory.recall(query, limit)]


class TestMeaning:
    async def test_finds_what_no_word_finds(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            await m.say("Rex barks at night")
            await m.say("Nice weather today")
            await m.settle()
            assert (await texts(m.memory(), "my pet"))[0] == "Rex barks at night"
            assert await texts(m.scene.memory("tuesday"), "my pet") == []

    async def test_words_and_meaning_together_come_first(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            await m.say("Rex barks at night")
            await m.say("the night train")
            await m.say("a dog in the night")
            await m.settle()
            assert (await texts(m.memory(), "dog night"))[0] == "a dog in the night"

    async def test_in_every_script(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            await m.say("私の犬はポチです")
            await m.settle()
            assert await texts(m.memory(), "pet") == ["私の犬はポチです"]

    async def test_facts_too_with_the_next_turn(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            await m.memory("monday").remember("Rex barks")
            await m.say("Good night")
            await m.settle()
            assert (await texts(m.memory(), "my pet"))[0] == "Rex barks"

    async def test_what_the_history_shows_is_left_out(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            await m.say("Rex barks at night")
            await m.settle()
            assert await texts(m.memory("monday"), "my pet") == []

    async def test_is_nobody_elses(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            await m.say("Rex barks at night")
            await m.settle()
            assert await texts(m.memory(scope=BOB), "my pet") == []
            assert await m.memory(scope=BOB).search("my pet", 5) == ()

    async def test_other_models_vectors_are_ignored_and_made_anew(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            await m.say("Rex barks at night")
            await m.settle()
            other = Meaning(m.scene, FakeEmbedder({"bark"}, {"pet"}, model="other/m"))
            assert await texts(other.memory(), "my pet") == []
            await other.say("weather")
            await m.settle()
            assert (await other.embedded()).keys() == {"Rex barks at night", "weather"}
            assert await m.embedded() == {}

    async def test_vectors_of_another_length_are_ignored(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            await m.say("Rex barks at night")
            await m.settle()
            m.embedder.axes = (PETS,)
            assert await texts(m.memory(), "my pet") == []

    async def test_vectors_without_direction_come_last(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            run_id = await m.say("nothing")
            await m.say("Rex barks")
            await m.settle()
            await m.scene.database.write(memories.set_embedding, ANN, run_id, bytes(12), m.embedder.model)
            assert await texts(m.memory(), "my pet") == ["Rex barks", "nothing"]

    def test_numpy_is_an_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def without_numpy(name: str, *args: Any) -> Any:
            if name.partition(".")[0] == "numpy":
                raise ImportError(name)
            return real(name, *args)

        monkeypatch.setattr(importlib, "import_module", without_numpy)
        monkeypatch.setattr("server.embedding_recall.import_module", without_numpy)
        with pytest.raises(ProviderConfigError, match=r"pip install 'lumos-stream\[embeddings\]'"):
            load_numpy()


class TestVendorsThatFail:
    """The memory is there, words find it, and the model's request waits no longer than it was allowed to."""

    async def test_down(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            m.embedder.failure = DOWN
            await m.say("a dog barks")
            await m.settle()
            started = trio.current_time()
            assert await texts(m.memory(), "my dog") == ["a dog barks"]
            assert trio.current_time() == started
            m.embedder.failure = None
            await m.say("weather")
            await m.settle()
            assert (await m.embedded()).keys() == {"a dog barks", "weather"}

    @pytest.mark.parametrize("delay", [0.16, 3600.0])
    async def test_slow_or_hanging(self, autojump_clock: MockClock, delay: float) -> None:
        async with meaning() as m:
            await m.say("a dog barks")
            await m.say("Rex")
            await m.settle()
            m.embedder.delay = delay
            started = trio.current_time()
            assert await texts(m.memory(), "my dog") == ["a dog barks"]
            waited = trio.current_time() - started
            assert waited == pytest.approx(0.15)
            assert waited < WAIT

    async def test_just_in_time(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            await m.say("Rex")
            await m.settle()
            m.embedder.delay = 0.14
            assert await texts(m.memory(), "my pet") == ["Rex"]

    async def test_a_search_has_more_time(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            await m.say("Rex")
            await m.settle()
            m.embedder.delay = 2.0
            assert [entry.text for entry in await m.memory().search("my pet", 5)] == ["Rex"]

    async def test_after_three_failures_nobody_waits_for_a_while(self, autojump_clock: MockClock) -> None:
        async with meaning(working=False) as m:
            m.embedder.delay = 3600.0
            for waits in (True, True, True, False, False):
                started = trio.current_time()
                await m.memory().recall("my pet", 5)
                assert (trio.current_time() > started) == waits
            assert len(m.embedder.asked) == BREAKER_LIMITS.failures
            m.embedder.delay = 0.0
            await trio.sleep(BREAKER_LIMITS.open_seconds)
            await m.memory().recall("my pet", 5)
            assert len(m.embedder.asked) == BREAKER_LIMITS.failures + 1

    async def test_a_probe_that_is_cancelled_is_made_again(self, autojump_clock: MockClock) -> None:
        async with meaning(working=False) as m:
            m.embedder.delay = 3600.0
            for _ in range(BREAKER_LIMITS.failures):
                await m.memory().recall("my pet", 5)
            await trio.sleep(BREAKER_LIMITS.open_seconds)
            for _ in range(2):
                with trio.move_on_after(0.1):
                    await m.memory().recall("my pet", 5)
            assert len(m.embedder.asked) == BREAKER_LIMITS.failures + 2

    async def test_a_recall_that_is_cancelled_counts_for_nothing(self, autojump_clock: MockClock) -> None:
        async with meaning(working=False) as m:
            m.embedder.delay = 3600.0
            for _ in range(10):
                with trio.move_on_after(0.1):
                    await m.memory().recall("my pet", 5)
            assert len(m.embedder.asked) == 10

    async def test_no_time_for_vectors_asks_nobody(self, autojump_clock: MockClock) -> None:
        async with meaning(working=False) as m:
            memory = m.scene.memory(meaning=m.recall, settings=MemorySettings(wait=0))
            assert await memory.recall("my pet", 5) == ()
            assert m.embedder.asked == []

    async def test_a_blank_question_asks_nobody(self, autojump_clock: MockClock) -> None:
        async with meaning(working=False) as m:
            assert await m.memory().recall(" ", 5) == ()
            assert m.embedder.asked == []


class TestMakingVectors:
    async def test_no_run_waits_for_them(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            m.embedder.delay = 10.0
            await m.say("Rex")
            assert trio.current_time() == 0
            await m.settle()
            assert (await m.embedded()).keys() == {"Rex"}

    async def test_each_once(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            await m.say("Rex")
            await m.settle()
            await m.say("jazz")
            await m.settle()
            assert m.embedder.asked == [["Rex"], ["jazz"]]

    async def test_many_in_batches(self, autojump_clock: MockClock) -> None:
        async with meaning(batch=4) as m:
            for number in range(9):
                await m.memory().remember(f"fact {number}")
            await m.say("Rex")
            await m.settle()
            assert [len(asked) for asked in m.embedder.asked] == [4, 4, 2]

    @pytest.mark.parametrize("code", ["upstream.invalid_request", "upstream.content_policy", "upstream.context_length"])
    async def test_a_text_that_is_refused_holds_up_no_other(self, autojump_clock: MockClock, code: Any) -> None:
        async with meaning() as m:
            m.embedder.refused = {"forbidden": ProviderError(code, "no")}
            for text in ("Rex", "forbidden", "jazz"):
                await m.memory().remember(text)
            await m.say("weather")
            await m.settle()
            assert {text for text, vector in (await m.embedded()).items() if vector} == {"Rex", "jazz", "weather"}
            m.embedder.asked.clear()
            await m.say("music")
            await m.settle()
            assert m.embedder.asked == [["music"]]
            assert "forbidden" not in await texts(m.memory(), "my pet")
            assert (await texts(m.memory(), "what is forbidden?"))[0] == "forbidden"

    async def test_a_model_that_is_not_there_takes_nothing_away(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            m.embedder.failure = ProviderError("upstream.invalid_request", "no such model")
            await m.memory().remember("Rex")
            await m.say("jazz")
            await m.settle()
            assert await m.embedded() == {}
            m.embedder.failure = None
            await m.say("weather")
            await m.settle()
            assert (await m.embedded()).keys() == {"Rex", "jazz", "weather"}

    async def test_a_memory_that_changes_meanwhile_gets_its_vector_later(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            m.embedder.delay = 5.0
            run_id = await m.say("Rex")
            await trio.sleep(1)
            await m.scene.database.write(memories.update_memory, ANN, run_id, "jazz", None, "now")
            await trio.sleep(5)
            assert await m.embedded() == {}

    async def test_one_that_hangs_is_left_after_its_time(self, autojump_clock: MockClock) -> None:
        async with meaning() as m:
            m.embedder.delay = 3600.0
            await m.say("Rex")
            await trio.sleep(EMBED_SECONDS + 1)
            m.embedder.delay = 0.0
            await m.say("jazz")
            await m.settle()
            assert (await m.embedded()).keys() == {"Rex", "jazz"}

    @pytest.mark.parametrize("error", [StoreUnavailableError("locked"), RuntimeError("a bug")])
    async def test_what_fails_otherwise_ends_no_worker(self, autojump_clock: MockClock, error: Exception) -> None:
        class Failing:
            async def embed_new(self, scope: Scope) -> None:
                done.append(scope)
                raise error

        done: list[Scope] = []
        failing: Any = Failing()
        backlog = EmbeddingBacklog()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backlog.work)
            for number in range(10):
                backlog.add(Scope("t", str(number), "a"), failing)
            await trio.testing.wait_all_tasks_blocked()
            assert len(done) == 10
            nursery.cancel_scope.cancel()

    def test_the_backlog_is_bounded(self) -> None:
        with inline_scene() as scene:
            some = EmbeddingRecall(scene.database, FakeEmbedder(PETS))
            for number in range(MAX_WAITING + 5):
                scene.store.backlog.add(Scope("t", str(number), "a"), some)
                scene.store.backlog.add(Scope("t", str(number), "a"), some)
            assert len(scene.store.backlog) == MAX_WAITING

    async def test_a_turn_of_an_agent_without_vectors_adds_nothing(self, autojump_clock: MockClock) -> None:
        with inline_scene() as scene:
            await scene.say("Rex")
            assert len(scene.store.backlog) == 0


class TestOnBothDatabases:
    async def test_vectors_are_kept_and_found(self, database: Database) -> None:
        scene = Scene(database)
        m = Meaning(scene, FakeEmbedder(PETS, MUSIC))
        await m.say("Rex barks")
        await m.say("jazz")
        await m.recall.embed_new(ANN)
        found = await m.recall.nearest(ANN, "pet", 2, 5.0)
        assert [memory.text for memory in found] == ["Rex barks", "jazz"]
        assert found[0].score == pytest.approx(1.0)
        memory = m.memory("monday")
        await memory.begin_turn("r", Message("user", "Who barks?"))
        await memory.save_turn(turn("r"))
        assert (await m.memory().recall("pet", 1))[0].text == "Rex barks"


class TestFusing:
    def ranking(self, *ids: str) -> list[rows.StoredMemory]:
        return [rows.StoredMemory(id=i, text=i, kind="fact", created_at="", updated_at="") for i in ids]

    def fused(self, *rankings: str) -> str:
        return "".join(memory.id for memory in fused(*(self.ranking(*ranking) for ranking in rankings)))

    @pytest.mark.parametrize(
        ("rankings", "result"),
        [
            ((), ""),
            (("abc",), "abc"),
            (("abc", ""), "abc"),
            (("ab", "ba"), "ab"),
            (("abc", "xyc"), "caxby"),
            (("abc", "cab"), "acb"),
        ],
    )
    def test_what_several_find_comes_first(self, rankings: tuple[str, ...], result: str) -> None:
        assert self.fused(*rankings) == result
