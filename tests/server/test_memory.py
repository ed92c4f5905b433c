"""Memory over a real database: what is kept, for whom, in which order, and what is found again."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from engine import Message
from engine.memory import Memory, MemoryRefusedError, MemoryUse
from engine.provider import ToolCall
from server.memory import MAX_FACT_CHARS, MAX_RECALLED_CHARS, StoredMemory
from server.pending import PENDING_SECONDS
from server.records import MemorySettings, WorkingMemorySettings
from server.store import history, memories, turns
from server.store.database import Database
from server.store.rows import Scope
from tests.server.memory_scene import ANN, Scene, inline_scene, turn

BOB = Scope("acme", "bob", "helper")
NAMESAKE = Scope("rival", "ann", "helper")
OTHER_AGENT = Scope("acme", "ann", "poet")
NOBODY = MemorySettings(context_window=0)


@pytest.fixture
def scene(database: Database) -> Scene:
    return Scene(database)


async def recalled(memory: StoredMemory, text: str, limit: int = 5) -> list[str]:
    return [entry.text for entry in await memory.recall(text, limit)]


async def searched(memory: StoredMemory, text: str, limit: int = 5) -> list[str]:
    return [entry.text for entry in await memory.search(text, limit)]


def test_it_is_what_the_engine_asks_for() -> None:
    with inline_scene() as scene:
        memory: Memory = scene.memory()
        assert MemoryUse(memory=memory).memory is memory


class TestHistory:
    async def test_of_a_session_oldest_first(self, scene: Scene) -> None:
        await scene.say("Hi", "Hello.")
        await scene.say("And?", "That is all.")
        assert await scene.memory().history(10) == [
            Message("user", "Hi"),
            Message("assistant", "Hello."),
            Message("user", "And?"),
            Message("assistant", "That is all."),
        ]
        assert await scene.memory().history(2) == [Message("user", "And?"), Message("assistant", "That is all.")]
        assert await scene.memory().history(0) == ()

    async def test_is_without_the_turn_under_way(self, scene: Scene) -> None:
        await scene.say("Hi", "Hello.")
        memory = scene.memory()
        await memory.begin_turn(scene.next_run(), Message("user", "And?"))
        assert [message.content for message in await memory.history(10)] == ["Hi", "Hello."]

    async def test_tool_calls_and_results_come_back(self, scene: Scene) -> None:
        memory = scene.memory()
        await memory.begin_turn("r", Message("user", "2+2?"))
        messages = (
            Message("assistant", "", tool_calls=(ToolCall("c1", "calculator", '{"expression": "2+2"}'),)),
            Message("tool", "4", tool_call_id="c1"),
            Message("assistant", "Four."),
        )
        await memory.save_turn(turn("r", "Four.", messages=messages, total_steps=2))
        assert await scene.memory().history(10) == [Message("user", "2+2?"), *messages]

    async def test_a_partial_answer_is_kept_and_marked(self, scene: Scene) -> None:
        memory = scene.memory()
        await memory.begin_turn("r", Message("user", "Tell me"))
        await memory.save_turn(turn("r", "Once upon", status="stop", reason="requested"))
        assert [message.content for message in await scene.memory().history(10)] == ["Tell me", "Once upon"]
        stored = await scene.database.read(history.list_messages, ANN, "s", 10, 0)
        assert [(message.content, message.partial) for message in stored] == [("Tell me", False), ("Once upon", True)]

    @pytest.mark.parametrize("scope", [BOB, NAMESAKE, OTHER_AGENT])
    async def test_is_nobody_elses(self, scene: Scene, scope: Scope) -> None:
        await scene.say("Hi")
        assert await scene.memory(scope=scope).history(10) == []
        assert await scene.memory("another session").history(10) == []

    async def test_a_turn_is_kept_once(self, scene: Scene) -> None:
        memory = scene.memory()
        for _ in range(2):
            await memory.begin_turn("r", Message("user", "Hi"))
        for answer in ("Hello.", "Again."):
            await memory.save_turn(turn("r", answer))
        assert [message.content for message in await scene.memory().history(10)] == ["Hi", "Hello."]

    async def test_a_run_counts_for_its_key(self, scene: Scene) -> None:
        run_id = await scene.say("Hi", key_id="k1")
        run = await scene.database.read(turns.find_run, run_id)
        assert run is not None
        assert (run.key_id, run.status, run.created_at) == ("k1", "done", "2026-11-22T00:00:00.000000+00:00")


class TestRecall:
    async def test_finds_what_was_said_in_another_session(self, scene: Scene) -> None:
        run_id = await scene.say("My dog is called Rex", session_id="monday")
        await scene.say("I like jazz", session_id="monday")
        (entry,) = await scene.memory("tuesday").recall("What is my dog called?", 5)
        assert (entry.id, entry.text, entry.kind) == (run_id, "My dog is called Rex", "said")
        assert entry.created_at == "2026-11-22T00:00:00.000000+00:00"

    async def test_leaves_out_what_the_history_shows(self, scene: Scene) -> None:
        await scene.say("My dog is called Rex")
        assert await recalled(scene.memory(), "my dog") == []
        assert await recalled(scene.memory(settings=NOBODY), "my dog") == ["My dog is called Rex"]

    async def test_and_the_same_text_from_another_session(self, scene: Scene) -> None:
        await scene.say("My dog is called Rex", session_id="monday")
        await scene.say("My dog is called Rex", session_id="tuesday")
        assert await recalled(scene.memory("tuesday"), "my dog") == []

    async def test_finds_what_this_session_no_longer_shows(self, scene: Scene) -> None:
        await scene.say("My dog is called Rex")
        await scene.say("I like jazz")
        shows_one_turn = MemorySettings(context_window=2)
        assert await recalled(scene.memory(settings=shows_one_turn), "my dog and jazz") == ["My dog is called Rex"]

    async def test_leaves_out_the_message_itself_and_its_like(self, scene: Scene) -> None:
        question = "What is my dog called?"
        await scene.say(question, session_id="monday")
        memory = scene.memory("tuesday")
        await memory.begin_turn(scene.next_run(), Message("user", question))
        assert await recalled(memory, question) == []
        assert await searched(memory, question) == [question]

    async def test_says_the_same_text_once(self, scene: Scene) -> None:
        for session_id in ("a", "b", "c"):
            await scene.say("My dog is called Rex", session_id=session_id)
        await scene.memory("d").remember("My dog is called Rex")
        await scene.say("A dog is an animal", session_id="a")
        found = await recalled(scene.memory("e"), "dog Rex", limit=2)
        assert found == ["My dog is called Rex", "A dog is an animal"]

    async def test_facts_of_this_session_are_found(self, scene: Scene) -> None:
        await scene.memory().remember("The dog is called Rex")
        assert await recalled(scene.memory(), "dog") == ["The dog is called Rex"]

    @pytest.mark.parametrize(
        ("said", "asked"),
        [
            ("我的狗叫小黑", "狗叫什么名字?"),
            ("私の犬の名前はポチです", "犬の名前は?"),
            ("우리 강아지 이름은 초코예요", "강아지 이름이 뭐였지?"),
        ],
    )
    async def test_without_spaces_between_words(self, scene: Scene, said: str, asked: str) -> None:
        await scene.say(said, session_id="monday")
        await scene.say("今天天气很好", session_id="monday")
        assert await recalled(scene.memory("tuesday"), asked) == [said]

    async def test_long_ones_are_cut_at_a_code_point(self, scene: Scene) -> None:
        await scene.say("dog " + "🐶" * 3000, session_id="monday")
        (found,) = await recalled(scene.memory("tuesday"), "dog")
        assert found == "dog " + "🐶" * (MAX_RECALLED_CHARS - 4)

    @pytest.mark.parametrize("text", ["", "   ", "?!", '"', "dog OR *", "a:b NEAR(c)", "\0", "'; DROP TABLE memories"])
    async def test_any_text_can_be_asked(self, scene: Scene, text: str) -> None:
        await scene.say("My cat sleeps")
        assert await recalled(scene.memory("tuesday"), text) == []

    async def test_no_more_than_wanted(self, scene: Scene) -> None:
        for number in range(5):
            await scene.say(f"dog {number}", session_id="monday")
        assert len(await recalled(scene.memory("tuesday"), "dog", limit=3)) == 3
        assert await scene.memory("tuesday").recall("dog", 0) == ()

    @pytest.mark.parametrize("scope", [BOB, NAMESAKE, OTHER_AGENT])
    async def test_is_nobody_elses(self, scene: Scene, scope: Scope) -> None:
        await scene.say("My dog is called Rex", session_id="monday")
        await scene.memory().remember("The dog is old")
        theirs = scene.memory("monday", scope, settings=NOBODY)
        assert await recalled(theirs, "dog") == await searched(theirs, "dog") == []


class TestFacts:
    async def test_are_remembered_searched_and_forgotten(self, scene: Scene) -> None:
        memory = scene.memory()
        await memory.begin_turn("r", Message("user", "Remember that"))
        entry = await memory.remember("  Likes jazz ")
        assert (entry.id, entry.text, entry.kind) == ("fact-1", "Likes jazz", "fact")
        assert await scene.memory("other").search("jazz", 5) == (entry,)
        assert await memory.forget("fact-1") is True
        assert await memory.forget("fact-1") is False
        assert await memory.search("jazz", 5) == ()

    @pytest.mark.parametrize(("text", "said"), [("", "blank"), (" \n", "blank"), ("x" * (MAX_FACT_CHARS + 1), "4001")])
    async def test_blank_and_long_ones_are_refused(self, scene: Scene, text: str, said: str) -> None:
        with pytest.raises(MemoryRefusedError, match=said):
            await scene.memory().remember(text)
        assert await scene.database.read(memories.count_memories, ANN, None) == 0

    async def test_the_longest(self, scene: Scene) -> None:
        text = "語" * MAX_FACT_CHARS
        await scene.memory().remember(text)
        assert [memory.text for memory in await scene.database.read(memories.list_memories, ANN, None, 9, 0)] == [text]

    @pytest.mark.parametrize("scope", [BOB, NAMESAKE, OTHER_AGENT])
    async def test_nobody_else_can_forget_them(self, scene: Scene, scope: Scope) -> None:
        await scene.memory().remember("Likes jazz")
        assert await scene.memory(scope=scope).forget("fact-1") is False
        assert await searched(scene.memory(), "jazz") == ["Likes jazz"]

    async def test_a_search_finds_this_sessions_messages_but_not_the_one_under_way(self, scene: Scene) -> None:
        await scene.say("My dog is called Rex")
        memory = scene.memory()
        await memory.begin_turn(scene.next_run(), Message("user", "Search for my dog"))
        assert await searched(memory, "dog") == ["My dog is called Rex"]


class TestWorkingMemory:
    SETTINGS = WorkingMemorySettings(template={"name": "", "likes": []}, max_bytes=100)

    async def test_begins_with_the_template(self, scene: Scene) -> None:
        assert await scene.memory(working=self.SETTINGS).working_memory() == {"name": "", "likes": []}

    async def test_is_patched_and_kept(self, scene: Scene) -> None:
        change = await scene.memory(working=self.SETTINGS).patch_working_memory({"name": "Ann", "likes": None})
        assert (change.document, change.set_keys, change.deleted_keys) == ({"name": "Ann"}, ("name",), ("likes",))
        assert await scene.memory("other", working=self.SETTINGS).working_memory() == {"name": "Ann"}

    @pytest.mark.parametrize("scope", [BOB, NAMESAKE, OTHER_AGENT])
    async def test_is_nobody_elses(self, scene: Scene, scope: Scope) -> None:
        await scene.memory(working=self.SETTINGS).patch_working_memory({"name": "Ann"})
        assert await scene.memory(scope=scope, working=self.SETTINGS).working_memory() == self.SETTINGS.template

    async def test_an_agent_without_one(self, scene: Scene) -> None:
        assert await scene.memory().working_memory() is None
        with pytest.raises(MemoryRefusedError, match="has no working memory"):
            await scene.memory().patch_working_memory({})

    async def test_over_its_capacity_nothing_is_changed(self, scene: Scene) -> None:
        memory = scene.memory(working=self.SETTINGS)
        await memory.patch_working_memory({"name": "Ann"})
        with pytest.raises(MemoryRefusedError, match="would be 128 bytes of JSON, and may be 100"):
            await memory.patch_working_memory({"bio": "語" * 30 + "more"})
        assert await memory.working_memory() == {"name": "Ann", "likes": []}

    async def test_patches_at_the_same_time_lose_nothing(self, scene: Scene) -> None:
        settings = WorkingMemorySettings()

        async def patch(number: int) -> None:
            change = await scene.memory(working=settings).patch_working_memory({f"key {number}": number})
            assert change.set_keys == (f"key {number}",)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(patch, number)
        document = await scene.memory(working=settings).working_memory()
        assert document == {f"key {number}": number for number in range(20)}


class SlowWrites:
    """A database whose next write of a turn takes so long, in virtual time."""

    def __init__(self, database: Database, seconds: float) -> None:
        self._database = database
        self._seconds = seconds

    async def write(self, change: Any, *args: Any) -> Any:
        if change is turns.save_turn:
            await trio.sleep(self._seconds)
        return await self._database.write(change, *args)

    keep = write

    async def read(self, query: Any, *args: Any) -> Any:
        return await self._database.read(query, *args)


class TestPendingSaves:
    """The client that posts right after ``done`` sees the last answer, however slow the store is."""

    async def posts_again(self, scene: Scene, seconds: float, session_id: str = "s") -> tuple[float, list[str]]:
        """When a turn that begins during a slow save has begun, and what its history is then."""
        slow: Any = SlowWrites(scene.database, seconds)
        object.__setattr__(scene.store, "database", slow)
        memory = scene.memory()
        await memory.begin_turn("slow", Message("user", "Hi"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(memory.save_turn, turn("slow", "Hello."))
            await trio.testing.wait_all_tasks_blocked()
            assert len(scene.store.pending) == 1
            started = trio.current_time()
            follower = scene.memory(session_id)
            await follower.begin_turn("next", Message("user", "And?"))
            waited = trio.current_time() - started
            texts = [message.content for message in await follower.history(10)]
            nursery.cancel_scope.cancel()
        assert len(scene.store.pending) == len(scene.store.unsaved), "a save that was cut off is still to come"
        return waited, texts

    async def test_the_next_turn_waits_for_the_last_one(self, autojump_clock: MockClock) -> None:
        with inline_scene() as scene:
            assert await self.posts_again(scene, 3.0) == (3.0, ["Hi", "Hello."])

    async def test_but_not_for_ever(self, autojump_clock: MockClock) -> None:
        with inline_scene() as scene:
            waited, texts = await self.posts_again(scene, 3600.0)
            assert (waited, texts) == (PENDING_SECONDS, [])

    async def test_another_session_does_not_wait(self, autojump_clock: MockClock) -> None:
        with inline_scene() as scene:
            assert await self.posts_again(scene, 3.0, "another") == (0.0, [])

    async def test_a_history_waits_too(self, autojump_clock: MockClock) -> None:
        with inline_scene() as scene:
            slow: Any = SlowWrites(scene.database, 3.0)
            object.__setattr__(scene.store, "database", slow)
            memory = scene.memory()
            await memory.begin_turn("slow", Message("user", "Hi"))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(memory.save_turn, turn("slow", "Hello."))
                await trio.testing.wait_all_tasks_blocked()
                assert len(await scene.memory().history(10)) == 2
            assert trio.current_time() == 3.0

    async def test_two_saves_of_a_session_are_both_waited_for(self, autojump_clock: MockClock) -> None:
        with inline_scene() as scene:
            pending = scene.store.pending

            async def save(seconds: float) -> None:
                pending.hold("s")
                await trio.sleep(seconds)
                pending.release("s")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(save, 1.0)
                nursery.start_soon(save, 2.0)
                await trio.testing.wait_all_tasks_blocked()
                assert await pending.wait_saved("s") is True
                assert trio.current_time() == 2.0
            assert len(pending) == 0

    async def test_a_save_that_fails_leaves_nothing_behind(self, autojump_clock: MockClock) -> None:
        with inline_scene() as scene:
            memory = scene.memory()
            await memory.begin_turn("r", Message("user", "Hi"))
            object.__setattr__(scene.store, "clock", None)
            with pytest.raises(TypeError):
                await memory.save_turn(turn("r"))
            assert len(scene.store.pending) == 0

    async def test_cancelled_while_it_waits(self, autojump_clock: MockClock) -> None:
        with inline_scene() as scene:
            scene.store.pending.hold("s")
            with trio.move_on_after(1) as limit:
                await scene.store.pending.wait_saved("s")
            assert limit.cancelled_caught
            assert trio.current_time() == 1.0
