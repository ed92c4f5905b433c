"""Memories for tests: of several users, sessions and agents over one database, with clocks and ids that count."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import trio

from engine import Message, ProviderError
from engine.memory import TurnRecord
from server.memory import MemoryStore, StoredMemory
from server.store.database import Database
from server.store.rows import Scope

ANN = Scope("acme", "ann", "helper")


class Scene:
    """Makes memories; each run has the next id (``run-1`` …), each fact too, and each look at the clock is a second."""

    def __init__(self, database: Database) -> None:
        self.database = database
        seconds, facts = itertools.count(), itertools.count(1)
        begin = datetime(2026, 11, 22, tzinfo=UTC)
        self.store = MemoryStore(
            database,
            clock=lambda: begin + timedelta(seconds=next(seconds)),
            new_id=lambda: f"fact-{next(facts)}",
        )
        self._runs = itertools.count(1)

    def memory(self, session_id: str = "s", scope: Scope = ANN, **settings: Any) -> StoredMemory:
        """A memory as one run has it."""
        return StoredMemory(self.store, scope, session_id, **settings)

    def next_run(self) -> str:
        """The id of one more run."""
        return f"run-{next(self._runs)}"

    async def say(
        self, text: str, answer: str = "Yes.", session_id: str = "s", scope: Scope = ANN, **settings: Any
    ) -> str:
        """One whole turn; its run's id."""
        memory, run_id = self.memory(session_id, scope, **settings), self.next_run()
        await memory.begin_turn(run_id, Message("user", text))
        await memory.save_turn(turn(run_id, answer))
        return run_id


def turn(run_id: str, answer: str = "Yes.", **changes: Any) -> TurnRecord:
    """What a run of one answer leaves behind."""
    whole: dict[str, Any] = {
        "run_id": run_id,
        "status": "done",
        "messages": (Message("assistant", answer),),
        "response": answer,
        "usage": None,
        "total_steps": 1,
        "elapsed_ms": 1.0,
        "ttfb_ms": 1.0,
    }
    return TurnRecord(**whole | changes)


@contextmanager
def inline_scene() -> Iterator[Scene]:
    """A scene over SQLite in memory, without threads: for virtual time."""
    database = Database.open("sqlite://", inline=True)
    try:
        yield Scene(database)
    finally:
        database.close()


class FakeEmbedder:
    """Vectors by table: ``meanings`` maps a word in a text to one of the axes; other texts get the last axis.

    ``delay`` is what each request takes, ``failure`` what each one raises instead, ``refused`` texts fail with it too.
    """

    def __init__(self, *axes: set[str], model: str = "fake/m", batch: int = 64) -> None:
        self.model = model
        self.batch = batch
        self.axes = axes
        self.delay = 0.0
        self.failure: ProviderError | None = None
        self.refused: dict[str, ProviderError] = {}
        self.asked: list[list[str]] = []

    async def embed(self, texts: Sequence[str]) -> list[bytes]:
        """The texts' vectors."""
        assert len(texts) <= self.batch
        self.asked.append(list(texts))
        await trio.sleep(self.delay)
        failure = self.failure or next((self.refused[text] for text in texts if text in self.refused), None)
        if failure is not None:
            raise failure
        return [self.vector(text) for text in texts]

    def vector(self, text: str) -> bytes:
        """One text's vector, with a little of every axis."""
        weights = [1.0 if any(word in text for word in axis) else 0.01 for axis in self.axes]
        return struct.pack(f"<{len(weights)}f", *weights)
