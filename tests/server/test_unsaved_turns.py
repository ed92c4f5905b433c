"""A turn that the store did not take is kept as soon as it does, and its session waits for it, but not for ever."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from math import inf
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from engine import GenerationComplete, MemoryUse, Message, Run
from engine.run import SAVE_SECONDS
from server.memory import MemoryStore
from server.pending import PENDING_SECONDS, PendingSaves
from server.store import turns
from server.store.database import BUSY_SECONDS, Database
from server.store.errors import StoreUnavailableError
from server.store.history import history
from server.unsaved_turns import LONGEST_PAUSE, MAX_CHARS, UnsavedTurns
from tests.engine.scripted import StepwiseProvider, saying, spec_for
from tests.server.memory_scene import ANN, Scene, inline_scene, turn


class Closed:
    """A database that takes no turn before ``opens_at``, in virtual time: each attempt takes ``seconds`` to fail."""

    def __init__(self, database: Database, opens_at: float, seconds: float = 0.0) -> None:
        self._database = database
        self._opens_at = opens_at
        self._seconds = seconds
        self.bugs: set[str] = set()
        self.attempts: list[float] = []

    async def write(self, change: Any, *args: Any) -> Any:
        if change is turns.save_turn:
            self.attempts.append(trio.current_time())
            if args[0].run_id in self.bugs:
                raise TypeError("a bug")
            if trio.current_time() < self._opens_at:
                await trio.sleep(self._seconds)
                raise StoreUnavailableError("locked")
        return await self._database.write(change, *args)

    keep = write

    async def read(self, query: Any, *args: Any) -> Any:
        return await self._database.read(query, *args)


def close_until(scene: Scene, opens_at: float, seconds: float = 0.0) -> Closed:
    closed: Any = Closed(scene.database, opens_at, seconds)
    object.__setattr__(scene.store, "database", closed)
    return closed  # type: ignore[no-any-return]  # it is one


async def texts(scene: Scene, session_id: str = "s") -> list[str]:
    return [message.content for message in await scene.database.read(history, ANN, session_id, 20)]


async def status(scene: Scene, run_id: str) -> str:
    run = await scene.database.read(turns.find_run, run_id)
    assert run is not None
    return run.status


async def test_a_turn_is_kept_when_the_store_is_there_again(autojump_clock: MockClock) -> None:
    with inline_scene() as scene:
        closed = close_until(scene, opens_at=13.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.store.unsaved.work)
            run_id = await scene.say("Hi", "Hello.")
            assert (len(scene.store.unsaved), await status(scene, run_id)) == (1, "running")
            assert await scene.store.pending.wait_saved((ANN, "s"), 60.0)
            assert await texts(scene) == ["Hi", "Hello."]
            assert await status(scene, run_id) == "done"
            assert 13.0 <= trio.current_time() <= 13.0 + LONGEST_PAUSE
            assert len(closed.attempts) < 20, "with pauses"
            assert len(scene.store.unsaved) == len(scene.store.pending) == 0
            nursery.cancel_scope.cancel()


async def test_a_run_whose_save_is_cut_off_hands_its_turn_over(autojump_clock: MockClock) -> None:
    with inline_scene() as scene:
        close_until(scene, opens_at=13.0, seconds=20.0)
        memory = scene.memory()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.store.unsaved.work)
            await memory.begin_turn("run", Message("user", "12345678"))
            provider = StepwiseProvider(saying("x"))
            run = Run("run", spec_for(provider, resume_grace=inf, memory_use=MemoryUse(memory=memory)))
            await run.execute()
            assert isinstance(run.log.terminal, GenerationComplete)
            assert trio.current_time() == SAVE_SECONDS
            assert await scene.store.pending.wait_saved((ANN, "s"), 60.0)
            assert await texts(scene) == ["12345678", "x"]
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("opens_at", "waited", "seen"), [(2.0, 2.0, True), (60.0, PENDING_SECONDS, False)])
async def test_the_sessions_next_turn_waits_for_it_but_not_for_ever(
    autojump_clock: MockClock, opens_at: float, waited: float, seen: bool
) -> None:
    with inline_scene() as scene:
        close_until(scene, opens_at)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.store.unsaved.work)
            await scene.say("Hi", "Hello.")
            follower = scene.memory()
            await follower.begin_turn("next", Message("user", "And?"))
            assert waited <= trio.current_time() <= waited + LONGEST_PAUSE
            assert await scene.database.read(history, ANN, "s", 9) == (
                [Message("user", "Hi"), Message("assistant", "Hello.")] if seen else []
            )
            await scene.store.pending.wait_saved((ANN, "s"), 100.0)
            await follower.save_turn(turn("next", "So."))
            assert await texts(scene) == ["Hi", "Hello.", "And?", "So."], "in the order in which they began"
            nursery.cancel_scope.cancel()


async def test_each_turn_is_kept_and_one_that_crashes_holds_nobody(autojump_clock: MockClock) -> None:
    with inline_scene() as scene, structlog.testing.capture_logs() as log:
        closed = close_until(scene, opens_at=5.0)
        async with trio.open_nursery() as nursery:
            for number in range(5):
                await scene.say("Hi", "Hello.", session_id=f"s{number}")
            closed.bugs = {"run-1"}
            nursery.start_soon(scene.store.unsaved.work)
            await scene.store.unsaved.flush(60.0)
            nursery.cancel_scope.cancel()
        assert [await status(scene, f"run-{number}") for number in range(1, 6)] == ["running", *["done"] * 4]
        assert [entry["run_id"] for entry in log if entry["event"] == "turn.lost"] == ["run-1"]
        assert len(scene.store.pending) == 0


async def test_what_is_not_kept_when_the_server_ends_is_told(autojump_clock: MockClock) -> None:
    with inline_scene() as scene, structlog.testing.capture_logs() as log:
        close_until(scene, opens_at=1000.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.store.unsaved.work)
            await scene.say("Hi")
            await scene.store.unsaved.flush(4.0)
            assert trio.current_time() == 4.0
            nursery.cancel_scope.cancel()
        lost = [entry for entry in log if entry["event"] == "turn.lost"]
        assert lost == [
            {"event": "turn.lost", "run_id": "run-1", "reason": "the server has ended", "log_level": "error"}
        ]
        assert len(scene.store.unsaved) == len(scene.store.pending) == 0


async def test_a_flush_of_nothing_is_over_at_once(autojump_clock: MockClock) -> None:
    await UnsavedTurns(PendingSaves()).flush(60.0)
    assert trio.current_time() == 0.0


async def test_work_that_is_cancelled_in_an_attempt_loses_nothing(autojump_clock: MockClock) -> None:
    with inline_scene() as scene:
        close_until(scene, opens_at=3.0, seconds=2.0)
        memory = scene.memory()
        await memory.begin_turn("r", Message("user", "Hi"))
        await memory.save_turn(turn("r"))
        with trio.move_on_after(0.5):
            await scene.store.unsaved.work()
        assert len(scene.store.unsaved) == 1
        with trio.move_on_after(10):
            await scene.store.unsaved.work()
        assert await status(scene, "r") == "done"


async def never() -> None:
    raise AssertionError("nobody works here")


async def test_past_its_bounds_the_oldest_are_lost() -> None:
    pending = PendingSaves()
    few = UnsavedTurns(pending, max_turns=3)
    for number in range(5):
        for _ in range(2):
            few.add(f"s{number}", turn(f"r{number}"), never)
    assert (len(few), len(pending)) == (3, 3)
    assert await pending.wait_saved("s1")
    long = UnsavedTurns(PendingSaves())
    for number in range(4):  # counted twice: as the response and as the message
        long.add("s", turn(f"r{number}", "x" * (MAX_CHARS // 5)), never)
    assert len(long) == 2
    long.add("s", turn("huge", "x" * MAX_CHARS), never)
    assert len(long) == 1


def test_a_store_that_is_locked_says_so_before_the_run_gives_up() -> None:
    assert BUSY_SECONDS < SAVE_SECONDS
    assert LONGEST_PAUSE < PENDING_SECONDS


async def test_a_file_that_another_program_has_locked(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    with closing(Database.open(f"sqlite:///{path}", busy_timeout=0.05)) as database:
        store = MemoryStore(database)
        scene = Scene(database)
        scene.store = store
        memory = scene.memory()
        await memory.begin_turn("r", Message("user", "Hi"))
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await memory.save_turn(turn("r", "Hello."))
            assert await status(scene, "r") == "running"
            other.execute("ROLLBACK")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.unsaved.work)
            assert await store.pending.wait_saved((ANN, "s"), 30.0)
            nursery.cancel_scope.cancel()
        assert await texts(scene) == ["Hi", "Hello."]
