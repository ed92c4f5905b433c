"""The journal: copies what runs say to the store, in batches, off the way of the tokens.

It keeps cursors into the runs' logs and no copies. Of a run that memory has dropped it holds the log itself until that
is stored; while the store does not answer these are bounded, and what goes over the bound is lost and logged.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from math import inf

import structlog
import trio
from sqlalchemy import Connection

from engine import AgentStopped, Error, GenerationComplete, Run, RunLog
from engine.memory import TurnRecord
from engine.run import utc_now
from engine.supervisor import RetentionLimits, kept_bytes

from .journal_batch import RECENT_SECONDS, Batch, Copied, Part, cut_parts, store_batch
from .log_followers import may_follow
from .store.database import Database
from .store.errors import StoreUnavailableError
from .store.idempotency import sweep_keys
from .store.recent_events import drop_recent
from .store.run_events import forget_events, sweep_events
from .store.times import time_text

BATCH_SECONDS = 0.2
"""From the first event that is not stored to the write: with the write it stays within 250 ms."""

DROPPED_ROWS = 8
"""Of ``recent_events`` in one transaction: SQLite may overwrite each of their pages."""

RETRY_SECONDS = 0.25
LAST_RETRY_SECONDS = 10.0

SWEEP_SECONDS = 24 * 3600.0

_logger = structlog.get_logger("lumos")


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
        self._followed: dict[str, Copied] = {}
        self._dirty: dict[str, Copied] = {}
        self._unsettled: dict[str, Copied] = {}  # the longest first
        self._writer = secrets.token_urlsafe(9)
        self._last_row = 0
        self._first_row = 1
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
        copied = Copied(run)
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
        """Write for as long as it is not cancelled; no timer while there is nothing to write and all is settled."""
        pause = BATCH_SECONDS
        while True:
            first = next(iter(self._unsettled.values()), None)
            with trio.move_on_at(inf if first is None else first.settle_at):
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
            first = self._first_needed(())
            await self._database.write(_forget, run_id, self._writer, first)
            self._first_row = first

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
            waiting = self._take_waiting()
            parts: Sequence[Part] = ()
            try:
                while waiting:
                    followed = [copied for copied in waiting if copied.run.id in self._followed]
                    parts, waiting = cut_parts(followed, trio.current_time())
                    await self._write_parts(parts)
                    parts = ()
            except StoreUnavailableError as error:
                self._note_failing(str(error))
                return False
            finally:
                for copied in (*(part.copied for part in parts), *waiting):
                    self._mark(copied)
            self._note_working()
            return True

    def _take_waiting(self) -> Sequence[Copied]:
        """What is dirty, which it is no longer from here on, and what is to be settled by now."""
        waiting, self._dirty = self._dirty, {}
        if self._something.is_set():
            self._something = trio.Event()
        now = trio.current_time()
        for run_id, copied in self._unsettled.items():
            if copied.settle_at > now:
                break
            waiting.setdefault(run_id, copied)
        return list(waiting.values())

    def _mark(self, copied: Copied) -> None:
        if copied.run.id in self._followed:
            self._dirty[copied.run.id] = copied
            self._something.set()

    async def _write_parts(self, parts: Sequence[Part]) -> None:
        try:
            await self._write(parts)
        except StoreUnavailableError:
            raise
        except Exception:
            _logger.exception("journal.crashed", runs=len(parts))
            await self._write_singly(parts)

    async def _write(self, parts: Sequence[Part]) -> None:
        if not parts:
            return
        if not all(part.settles for part in parts):
            self._last_row += 1
        first = self._first_needed(parts)
        batch = Batch(parts, self._writer, self._last_row, first if first > self._first_row else None)
        await self._database.write(store_batch, batch, time_text(self._wall_clock()))
        self._first_row = first
        settle_at = trio.current_time() + RECENT_SECONDS
        for part in parts:
            self._note_stored(part, batch.number, settle_at)

    def _first_needed(self, parts: Sequence[Part]) -> int:
        """The first row of ``recent_events`` that is to be there once these parts are stored.

        Those before it hold nothing but what is settled. While others are needed, only some are dropped at a time.
        """
        settled = {part.copied for part in parts if part.settles}
        for copied in self._unsettled.values():
            if copied not in settled:
                return min(copied.first_row, self._first_row + DROPPED_ROWS)
        return self._last_row if len(settled) < len(parts) else self._last_row + 1

    async def _write_singly(self, parts: Sequence[Part]) -> None:
        """One that the store refuses for its own sake must not keep the others from being stored."""
        for part in parts:
            try:
                await self._write([part])
            except StoreUnavailableError:
                self._mark(part.copied)
            except Exception:
                _logger.exception("journal.refused", run_id=part.copied.run.id)
                self._lose(part.copied.run.id, "the store refused its events")
                self._let_go(part.copied.run.id)

    def _note_stored(self, part: Part, row: int, settle_at: float) -> None:
        copied, run_id = part.copied, part.copied.run.id
        copied.stored, copied.stored_bytes, copied.input_tokens = part.last_seq, part.bytes, part.input_tokens
        if part.is_last or run_id not in self._followed:
            self._let_go(run_id)
        elif part.settles:
            copied.settled, copied.settled_bytes, copied.settle_at = part.last_seq, part.bytes, inf
            self._unsettled.pop(run_id, None)
        elif copied.settle_at == inf:
            copied.first_row, copied.settle_at = row, settle_at
            self._unsettled[run_id] = copied

    def _note_ended(self, run_id: str) -> None:
        if run_id not in self._ended:
            size = kept_bytes(self._followed[run_id].run)
            self._ended[run_id] = size
            self._ended_bytes += size
            self._drop_excess()

    def _let_go(self, run_id: str) -> None:
        self._followed.pop(run_id, None)
        self._dirty.pop(run_id, None)
        self._unsettled.pop(run_id, None)
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


def _forget(c: Connection, run_id: str, writer: str, first_row: int) -> None:
    drop_recent(c, writer, first_row)
    forget_events(c, run_id)


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
