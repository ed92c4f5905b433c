"""Memory in the store: what the engine's ``Memory`` asks for, for one user with one agent in one session."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import structlog
import trio
from sqlalchemy import Connection, exc

from engine import Message
from engine.memory import AtHand, MemoryEntry, MemoryRefusedError, TurnRecord, WorkingMemoryChange
from engine.run import utc_now
from engine.supervisor import random_run_id

from .embedding_backlog import EmbeddingBacklog
from .embedding_recall import EmbeddingRecall, fused
from .pending import PendingSaves
from .records import MemorySettings, WorkingMemorySettings
from .store import history, memories, rows, turns
from .store.database import Database
from .store.errors import StoreUnavailableError, reason_of
from .store.times import time_text
from .unsaved_turns import UnsavedTurns
from .working_memory import patch_document, read_document

MAX_FACT_CHARS = 4000
MAX_RECALLED_CHARS = 2000
"""Of each entry that the model is shown, in code points: a user may once have pasted a book."""

EMBEDDING_SHARE = 0.75
"""Of the time that memory may hold the model's request back: what words have found is never lost for vectors."""

SEARCH_EMBEDDING_SECONDS = 5.0
MAX_SEARCHED = 200

_logger = structlog.get_logger("lumos")


@dataclass(frozen=True)
class MemoryStore:
    """What all memories of a server share. Whoever opened the database closes it.

    Vectors of new memories are made where somebody runs ``backlog.work()``; turns that the store did not take at once
    are kept where somebody runs ``unsaved.work()``.
    """

    database: Database
    pending: PendingSaves = field(default_factory=PendingSaves)
    backlog: EmbeddingBacklog = field(default_factory=EmbeddingBacklog)
    clock: Callable[[], datetime] = utc_now
    new_id: Callable[[], str] = random_run_id
    unsaved: UnsavedTurns = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "unsaved", UnsavedTurns(self.pending))

    def now(self) -> str:
        """The time as the store keeps it."""
        return time_text(self.clock())


class _Known(NamedTuple):
    """What was read while the turn was begun: the history for the model, and what is recalled; None: to be read."""

    history: Sequence[Message]
    memories: Sequence[MemoryEntry] | None


_Recall: TypeAlias = Callable[[Connection, str, Sequence[Message]], Sequence[MemoryEntry] | None]
"""What the text recalls beside what was said; None: to be read."""


class _RecallFailedError(Exception):
    """The search for memories failed in the transaction that begins the turn, which is undone by that."""


class StoredMemory:
    """Memory over a database; see ``engine.memory.Memory``. Made for each run; holds nothing that must be closed."""

    def __init__(
        self,
        store: MemoryStore,
        scope: rows.Scope,
        session_id: str,
        *,
        settings: MemorySettings | None = None,
        working: WorkingMemorySettings | None = None,
        meaning: EmbeddingRecall | None = None,
        key_id: str | None = None,
    ) -> None:
        """Bind to an owner.

        Args:
            store: the database and what is under way in it.
            scope: whose memories.
            session_id: which conversation.
            settings: the agent's; the defaults without.
            working: the agent's; None for an agent that has none.
            meaning: recall by meaning; None recalls by words alone.
            key_id: the API key that the run counts for.
        """
        self._store = store
        self._database = store.database
        self._scope = scope
        self._session_id = session_id
        self._session = scope, session_id
        self._settings = settings or MemorySettings()
        self._working = working
        self._meaning = meaning
        self._key_id = key_id
        self._run_id: str | None = None
        self._known: _Known | None = None

    async def begin_turn(self, run_id: str, message: Message) -> None:
        """Keep the user's message, once, before its run starts; see ``Memory``."""
        self._run_id = run_id
        await self._store.pending.wait_saved(self._session)
        now = self._store.now()
        try:
            self._known = await self._database.write(self._begin_turn, run_id, message, now, self._recall_few)
        except _RecallFailedError as error:  # its run goes on without, and may find more luck by itself
            _logger.warning("recall.failed", run_id=run_id, reason=str(error))
            self._known = await self._database.write(self._begin_turn, run_id, message, now, _recall_later)

    def at_hand(self) -> AtHand:
        """What ``begin_turn`` read along: ``MemoryUse.at_hand`` for a run that is shown as much as the settings say."""
        if self._known is None:
            return AtHand()
        return AtHand(self._known.history, self._known.memories)

    async def history(self, messages: int) -> Sequence[Message]:
        """The last messages of the session; see ``Memory``."""
        if messages < 1:
            return ()
        known = self._known
        if known is not None and messages == self._settings.context_window:
            await trio.lowlevel.checkpoint()
            return known.history
        await self._store.pending.wait_saved(self._session)
        return await self._database.read(history.history, self._scope, self._session_id, messages)

    async def recall(self, text: str, limit: int) -> Sequence[MemoryEntry]:
        """What has to do with the text, without what the history shows; see ``Memory``."""
        budget = self._settings.wait * EMBEDDING_SHARE
        return await self._find(text, limit, budget, without_shown=True)

    async def search(self, query: str, limit: int) -> Sequence[MemoryEntry]:
        """All that matches the query, this session's messages too; see ``Memory``."""
        return await self._find(query, limit, SEARCH_EMBEDDING_SECONDS, without_shown=False)

    async def remember(self, text: str) -> MemoryEntry:
        """Put down a fact; see ``Memory``."""
        text = text.strip()
        if not text:
            raise MemoryRefusedError("there is nothing to remember in a blank text")
        if len(text) > MAX_FACT_CHARS:
            raise MemoryRefusedError(f"a memory has at most {MAX_FACT_CHARS} characters, this one has {len(text)}")
        return _entry(await self._database.write(self._add_fact, self._store.new_id(), text, self._store.now()))

    async def forget(self, memory_id: str) -> bool:
        """Delete one entry; see ``Memory``."""
        return await self._database.write(memories.delete_memory, self._scope, memory_id)

    async def working_memory(self) -> dict[str, Any] | None:
        """The user's document; see ``Memory``."""
        if self._working is None:
            return None
        return await self._database.read(read_document, self._scope, self._working)

    async def patch_working_memory(self, patch: dict[str, Any]) -> WorkingMemoryChange:
        """Change the document by a merge patch; see ``Memory``."""
        if self._working is None:
            raise MemoryRefusedError("this agent has no working memory")
        return await self._database.write(patch_document, self._scope, self._working, patch, self._store.now())

    async def save_turn(self, turn: TurnRecord) -> None:
        """Keep what the run said; see ``Memory``. From the call on, with no checkpoint before, its readers wait.

        What the store does not take now, or not before this is cancelled, is left to ``MemoryStore.unsaved``.
        """
        self._store.pending.hold(self._session)
        try:
            save = partial(self._save, turn, self._store.now())
            try:
                await save()
            except StoreUnavailableError as error:
                _logger.warning("turn.not_kept_yet", run_id=turn.run_id, reason=str(error))
                self._store.unsaved.add(self._session, turn, save)
            except trio.Cancelled:
                self._store.unsaved.add(self._session, turn, save)
                raise
        finally:
            self._store.pending.release(self._session)

    async def _save(self, turn: TurnRecord, now: str) -> None:
        await self._database.keep(turns.save_turn, turn, now)
        if self._meaning is not None:
            self._store.backlog.add(self._scope, self._meaning)

    def _begin_turn(self, connection: Connection, run_id: str, message: Message, now: str, recall: _Recall) -> _Known:
        """In a worker thread: keep the message, and read what costs next to nothing there, and 0.2 ms by itself."""
        is_first = turns.begin_turn(connection, self._scope, self._session_id, run_id, self._key_id, message, now)
        said = [] if is_first else self._read_history(connection)
        try:
            recalled = recall(connection, message.content, said)
        except (exc.SQLAlchemyError, sqlite3.Error) as error:
            raise _RecallFailedError(reason_of(error)) from error
        return _Known(said, recalled)

    def _recall_few(self, c: Connection, text: str, said: Sequence[Message]) -> Sequence[MemoryEntry] | None:
        """What is recalled, where it is found at once: by words, among few; else None."""
        limit = self._settings.recall_limit
        if limit < 1 or not (total := memories.count_few(c, self._scope)):
            return ()
        if self._meaning is not None:
            return None
        shown = _shown(text, said)
        found = memories.search_few(c, self._scope, text, _more_than(limit, shown), total)
        return None if found is None else _new_ones(found, shown, limit)

    def _add_fact(self, connection: Connection, memory_id: str, text: str, now: str) -> rows.StoredMemory:
        return memories.add_memory(
            connection, self._scope, memory_id, text, "fact", now, session_id=self._session_id, run_id=self._run_id
        )

    async def _find(self, text: str, limit: int, seconds: float, *, without_shown: bool) -> Sequence[MemoryEntry]:
        """Words first, meaning with what is left of the time: so what words find is there whatever becomes of it."""
        if limit < 1:
            await trio.lowlevel.checkpoint()
            return ()
        vectors_until = trio.current_time() + seconds
        shown = await self._shown(text) if without_shown else frozenset[str]()
        wanted = _more_than(limit, shown)
        by_words = await self._database.read(memories.search_memories, self._scope, text, wanted)
        by_meaning: Sequence[rows.StoredMemory] = ()
        if self._meaning is not None:
            left = vectors_until - trio.current_time()
            by_meaning = await self._meaning.nearest(self._scope, text, wanted, left)
        return _new_ones(fused(by_words, by_meaning), shown, limit)

    async def _shown(self, text: str) -> frozenset[str]:
        known = self._known
        return _shown(text, await self._database.read(self._read_history) if known is None else known.history)

    def _read_history(self, connection: Connection) -> Sequence[Message]:
        return history.history(connection, self._scope, self._session_id, self._settings.context_window)


def _recall_later(_: Connection, __: str, ___: Sequence[Message]) -> None:
    """Leave it to a read of its own."""


def _shown(text: str, said: Sequence[Message]) -> frozenset[str]:
    """The user's texts that the model is shown anyway."""
    return frozenset([text, *[message.content for message in said if message.role == "user"]])


def _new_ones(found: Sequence[rows.StoredMemory], shown: frozenset[str], limit: int) -> Sequence[MemoryEntry]:
    """So many at most, without a text that is shown or came before."""
    new: dict[str, rows.StoredMemory] = {}
    for memory in found:
        if memory.text not in shown:
            new.setdefault(memory.text, memory)
    return tuple([_entry(memory) for memory in islice(new.values(), limit)])


def _more_than(limit: int, shown: frozenset[str]) -> int:
    """How many to look for, so that enough are left without those that are not new."""
    return min(2 * limit + len(shown) + 1, MAX_SEARCHED)


def _entry(memory: rows.StoredMemory) -> MemoryEntry:
    return MemoryEntry(
        id=memory.id, text=memory.text[:MAX_RECALLED_CHARS], kind=memory.kind, created_at=memory.created_at
    )
