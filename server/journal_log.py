"""Runs that have ended, read from the store long after memory has dropped them: the same bytes as they came live."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import inf

import msgspec
import trio
from sqlalchemy import Connection

from engine import LogEntry, RunSupervisor
from engine.events import Event, TerminalEvent, frame_of
from engine.memory import Owner

from .availability import STORE_SECONDS
from .journal import Journal
from .run_directory import ElsewhereError, GoneError, LocalRun, RunHandle, SourceUnavailableError
from .run_view import RunView, stored_run_view
from .store.database import Database
from .store.errors import StoreUnavailableError
from .store.rows import StoredRun
from .store.run_events import event_of, forget_events, page_of_events
from .store.turns import find_run

_decode_event = msgspec.json.Decoder(Event).decode
_decode_terminal = msgspec.json.Decoder(TerminalEvent).decode


class EventsDroppedError(Exception):
    """The run's events were dropped (forgotten, swept) while somebody read them: that response breaks off."""


class JournalLog:
    """An ended run's events in the store (``engine.log.EventLog``). Each read gives a page: memory holds no more."""

    def __init__(self, database: Database, run_id: str, last_seq: int) -> None:
        self.run_id = run_id
        self.last_seq = last_seq
        self.ended = True
        self._database = database

    async def read(self, after: int = 0, deadline: float = inf) -> list[LogEntry]:  # noqa: ARG002
        """The next events after a number; none after the last. It does not wait for more: there is none to come.

        Raises:
            EventsDroppedError: they are not there any more.
            StoreUnavailableError, trio.TooSlowError: the store does not answer.
        """
        if after >= self.last_seq:
            await trio.lowlevel.checkpoint()
            return []
        with trio.fail_after(STORE_SECONDS):
            page = await self._database.read(page_of_events, self.run_id, after)
        if not page:
            raise EventsDroppedError(f"the events of run {self.run_id} were dropped")
        return [self._entry(seq, data) for seq, data in page]

    def attached(self) -> AbstractContextManager[None]:
        """Nobody counts the readers of a run that has ended."""
        return nullcontext()

    def _entry(self, seq: int, data: str) -> LogEntry:
        encoded = data.encode()
        return LogEntry(seq, _decode_event(encoded), frame_of(self.run_id, seq, encoded))


class JournalRun:
    """An ended run in the store."""

    def __init__(self, source: JournalSource, log: JournalLog, run: StoredRun, terminal: TerminalEvent) -> None:
        self.run_id = run.run_id
        self.agent_id = run.agent_id
        self.owner = owner_of(run)
        self.log = log
        self._source = source
        self._view = stored_run_view(run, log.last_seq, terminal)

    def view(self) -> RunView:
        """How it ended."""
        return self._view

    async def stop(self, reason: str = "requested") -> None:  # noqa: ARG002
        """Nothing: it has ended."""
        await trio.lowlevel.checkpoint()

    async def forget(self) -> None:
        """Drop its events. Raises SourceUnavailableError."""
        await self._source.forget(self.run_id)


class JournalSource:
    """Finds runs that have ended in the store. With a ``journal``, also those that are just being written there."""

    def __init__(self, database: Database, supervisor: RunSupervisor, journal: Journal | None = None) -> None:
        self._database = database
        self._supervisor = supervisor
        self._journal = journal

    async def find(self, run_id: str) -> RunHandle | None:
        """See ``RunSource``."""
        unwritten = None if self._journal is None else self._journal.find(run_id)
        if unwritten is not None:
            return LocalRun(unwritten, self._supervisor, (self,))
        run, terminal = await self._ask(run_id)
        if run is None:
            return None
        if run.reserved_seq is not None and run.status == "running":
            raise ElsewhereError(stored_run_view(run), owner_of(run))
        if terminal is None or run.terminal_seq is None:
            raise GoneError(stored_run_view(run), owner_of(run))
        return JournalRun(self, JournalLog(self._database, run_id, run.terminal_seq), run, terminal)

    async def forget(self, run_id: str) -> None:
        """See ``RunSource``."""
        try:
            with trio.fail_after(STORE_SECONDS):
                if self._journal is None:
                    await self._database.write(forget_events, run_id)
                else:
                    await self._journal.forget(run_id)
        except (StoreUnavailableError, trio.TooSlowError) as error:
            raise SourceUnavailableError("the store does not answer") from error

    async def _ask(self, run_id: str) -> tuple[StoredRun | None, TerminalEvent | None]:
        try:
            with trio.fail_after(STORE_SECONDS):
                return await self._database.read(_run_and_end, run_id)
        except (StoreUnavailableError, trio.TooSlowError) as error:
            raise SourceUnavailableError("the store does not answer") from error


def owner_of(run: StoredRun) -> Owner:
    """Whose run it is."""
    return Owner(tenant_id=run.tenant_id, user_id=run.user_id, session_id=run.session_id)


def _run_and_end(c: Connection, run_id: str) -> tuple[StoredRun | None, TerminalEvent | None]:
    run = find_run(c, run_id)
    if run is None or run.terminal_seq is None:
        return run, None
    data = event_of(c, run_id, run.terminal_seq)
    return run, None if data is None else _decode_terminal(data)
