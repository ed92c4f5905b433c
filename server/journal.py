"""The journal: copies what runs say to the store, in batches, off the way of the tokens.

It keeps cursors into the runs' logs and no copies. Of a run that memory has dropped it holds the log itself until that
is stored; while the store does not answer these are bounded, and what goes over the bound is lost and logged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import structlog
import trio
from sqlalchemy import Connection

from engine import AgentStopped, Error, GenerationComplete, LogEntry, Run, RunLog
from engine.events import data_of
from engine.memory import TurnRecord
from engine.run import utc_now
from engine.supervisor import RetentionLimits, kept_bytes

from .log_followers import may_follow
from .store.database import Database
from .store.errors import StoreUnavailableError
from .store.idempotency import sweep_keys
from .store.run_events import NewEvents, Progress, add_events, forget_events, sweep_events
from .store.times import time_text
from .store.turns import save_turn

BATCH_SECONDS = 0.2
"""From the first event that is not stored to the write: with the write it stays within 250 ms."""

BATCH_BYTES = 4 * 2**20
"""Of one transaction, about: others wait for the database meanwhile."""

RETRY_SECONDS = 0.25
LAST_RETRY_SECONDS = 10.0

SWEEP_SECONDS = 24 * 3600.0

_logger = structlog.get_logger("lumos")


class _Copied:
    """A run that is followed, and how far it is stored."""

    __slots__ = ("ended", "input_tokens", "run", "stored")

    def __init__(self, run: Run) -> None:
        self.run = run
        self.stored = 0
        self.input_tokens: int | None = None
        self.ended: Callable[[], TurnRecord] | None = None


class _Part:
    """What one write takes of one run; the terminal event is in it if ``is_last``."""

    __slots__ = ("copied", "entries", "is_last", "last_seq", "progress", "turn")

    def __init__(self, copied: _Copied, entries: Sequence[LogEntry]) -> None:
        self.copied = copied
        self.entries = entries
        self.last_seq = entries[-1].seq if entries else copied.stored
        run = copied.run
        self.is_last = run.log.terminal is not None and self.last_seq == run.log.last_seq
        self.progress = None if self.is_last else Progress(run.elapsed_ms, run.ttfb_ms, run.input_tokens)
        self.turn = None
        if self.is_last and copied.ended is not None:
            self.turn = copied.ended()

    def news(self) -> NewEvents:
        """As the store takes it. In the worker thread."""
        events = [(entry.seq, data_of(entry.frame).decode()) for entry in self.entries]
        run = self.copied.run
        return NewEvents(run.id, events, self.last_seq if self.is_last else None, run.memory_updates, self.progress)


class Journal:
    """Follows runs (``LogFollowers``) and writes what is new of all of them, at most every ``BATCH_SECONDS``.

    Somebody runs ``work``, and in the end calls ``flush``. ``limits`` bound the ended runs that are not stored yet.
    """

    def __init__(
        self,
        database: Database,
        limits: RetentionLimits | None = None,
        wall_clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._limits = limits or RetentionLimits()
        self._wall_clock = wall_clock
        self._followed: dict[str, _Copied] = {}
        self._dirty: dict[str, _Copied] = {}
        self._ended_bytes = 0
        self._ended: dict[str, int] = {}
        self._something = trio.Event()
        self._writing = trio.Lock()
        self._failing = False
        self.lost_runs = 0

    def follow(self, run: Run) -> None:
        """Copy the run from now on."""
        if not may_follow(run):
            _logger.error("journal.refused", run_id=run.id, max_run_bytes=run.spec.max_run_bytes)
            return
        copied = _Copied(run)
        if run.spec.memory_use is None:  # nobody else will tell the store how it ended
            copied.ended = lambda: _turn_record(run)
        self._followed[run.id] = copied
        self.appended(run.log)

    def appended(self, log: RunLog) -> None:
        """Note that there is something to write."""
        if log.run_id not in self._dirty:
            copied = self._followed.get(log.run_id)
            if copied is None:
                return
            self._dirty[log.run_id] = copied
            self._something.set()
        if log.terminal is not None:
            self._note_ended(log.run_id)

    def find(self, run_id: str) -> Run | None:
        """The run, if it has ended and is not stored to its end yet."""
        return self._followed[run_id].run if run_id in self._ended else None

    async def work(self) -> None:
        """Write for as long as it is not cancelled, and wait without a timer while there is nothing to write."""
        pause = BATCH_SECONDS
        while True:
            await self._something.wait()
            await trio.sleep(pause)
            written = await self._write_all()
            pause = BATCH_SECONDS if written else min(2 * pause, LAST_RETRY_SECONDS)

    async def flush(self, seconds: float) -> bool:
        """Write what is left now, for so long at most; whether all is written. Once the runs have ended."""
        with trio.move_on_after(seconds):  # noqa: ASYNC912 - there may be nothing to write
            while self._dirty and not await self._write_all():  # noqa: ASYNC110 - it waits for the store
                await trio.sleep(RETRY_SECONDS)
        for run_id in self._dirty:
            self._lose(run_id, "the server ended")
        return not self._dirty

    async def forget(self, run_id: str) -> None:
        """Copy the run no further, and drop what is stored of it.

        Raises:
            StoreUnavailableError: it is still there.
        """
        self._let_go(run_id)
        async with self._writing:
            await self._database.write(forget_events, run_id)

    async def sweep(self, keep_days: float) -> None:
        """Drop events that are older, and keys, now and daily, for as long as it is not cancelled."""
        while True:
            before = time_text(self._wall_clock() - timedelta(days=keep_days))
            swept = 0
            try:
                while some := await self._database.write(sweep_events, before):
                    swept += some
                await self._database.write(sweep_keys, before)
            except StoreUnavailableError as error:
                _logger.warning("journal.not_swept", reason=str(error))
            if swept:
                _logger.info("journal.swept", runs=swept)
            await trio.sleep(SWEEP_SECONDS)

    async def _write_all(self) -> bool:
        """Write until nothing is dirty that was when this began; False if the store does not take it now."""
        async with self._writing:
            waiting = list(self._dirty.values())
            while waiting:
                parts, waiting = _cut_batch([copied for copied in waiting if copied.run.id in self._followed])
                try:
                    await self._write(parts)
                except StoreUnavailableError as error:
                    self._note_failing(str(error))
                    return False
                except Exception:
                    _logger.exception("journal.crashed", runs=len(parts))
                    await self._write_singly(parts)
            self._note_working()
            if not self._dirty:
                self._something = trio.Event()
            return True

    async def _write(self, parts: Sequence[_Part]) -> None:
        now = time_text(self._wall_clock())
        if parts:
            await self._database.write(_store, parts, now)
        for part in parts:
            self._note_stored(part)

    async def _write_singly(self, parts: Sequence[_Part]) -> None:
        """One that the store refuses for its own sake must not keep the others from being stored."""
        for part in parts:
            try:
                await self._write([part])
            except StoreUnavailableError:
                continue
            except Exception:
                _logger.exception("journal.refused", run_id=part.copied.run.id)
                self._lose(part.copied.run.id, "the store refused its events")
                self._let_go(part.copied.run.id)

    def _note_stored(self, part: _Part) -> None:
        copied, run_id = part.copied, part.copied.run.id
        copied.stored = part.last_seq
        copied.input_tokens = part.progress.input_tokens if part.progress else None
        if part.is_last:
            self._let_go(run_id)
        elif copied.stored == copied.run.log.last_seq and copied.input_tokens == copied.run.input_tokens:
            self._dirty.pop(run_id, None)

    def _note_ended(self, run_id: str) -> None:
        if run_id not in self._ended:
            size = kept_bytes(self._followed[run_id].run)
            self._ended[run_id] = size
            self._ended_bytes += size
            self._drop_excess()

    def _let_go(self, run_id: str) -> None:
        self._followed.pop(run_id, None)
        self._dirty.pop(run_id, None)
        self._ended_bytes -= self._ended.pop(run_id, 0)

    def _lose(self, run_id: str, reason: str) -> None:
        self.lost_runs += 1
        copied = self._followed[run_id]
        _logger.error(
            "journal.lost", run_id=run_id, reason=reason, stored=copied.stored, last_seq=copied.run.log.last_seq
        )

    def _drop_excess(self) -> None:
        while self._ended_bytes > self._limits.bytes or len(self._ended) > self._limits.runs:
            oldest = next(iter(self._ended))
            self._lose(oldest, "the store has not answered for too long")
            self._let_go(oldest)

    def _note_failing(self, reason: str) -> None:
        log = _logger.debug if self._failing else _logger.warning
        log("journal.behind", reason=reason, runs=len(self._dirty))
        self._failing = True

    def _note_working(self) -> None:
        if self._failing:
            _logger.info("journal.caught_up")
        self._failing = False


def _cut_batch(waiting: list[_Copied]) -> tuple[list[_Part], list[_Copied]]:
    """What one transaction takes, and the runs of which something is left."""
    parts: list[_Part] = []
    size = 0
    for at, copied in enumerate(waiting):
        if size >= BATCH_BYTES:
            return parts, waiting[at:]
        entries = copied.run.log.entries(copied.stored)
        taken = 0
        for entry in entries:
            if size >= BATCH_BYTES and taken:
                break
            size += len(entry.frame)
            taken += 1
        if taken or copied.input_tokens != copied.run.input_tokens:
            parts.append(_Part(copied, entries[:taken]))
        if taken < len(entries):
            return parts, waiting[at:]
    return parts, []


def _store(c: Connection, parts: Sequence[_Part], now: str) -> None:
    add_events(c, [part.news() for part in parts])
    for part in parts:
        if part.turn is not None:
            save_turn(c, part.turn, now)


def _turn_record(run: Run) -> TurnRecord:
    """How a run ended of which no memory keeps anything."""
    terminal = run.log.terminal
    assert terminal is not None, "the run has ended"
    return TurnRecord(
        run_id=run.id,
        status="error" if isinstance(terminal, Error) else "stop" if isinstance(terminal, AgentStopped) else "done",
        messages=(),
        response=terminal.response,
        usage=terminal.usage,
        total_steps=terminal.total_steps if isinstance(terminal, GenerationComplete) else 0,
        elapsed_ms=run.elapsed_ms,
        ttfb_ms=run.ttfb_ms,
        error_code=terminal.code if isinstance(terminal, Error) else None,
        reason=terminal.reason if isinstance(terminal, AgentStopped) else None,
    )
