"""Runs of other workers, read here: each one's log as it comes from Redis, shared by all who read it in this process.

One task reads for all of them (one blocking XREAD over all their streams), from where each log is. What is read here
has the bytes that its own worker sends: a frame is made from the run's id, the number and the event's JSON. Batches are
read like runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import msgspec
import trio

from engine import LogEntry, Metadata
from engine.events import TERMINAL_EVENT_TYPES, Event, TerminalEvent, frame_of
from engine.log import EventLog

from .batch_log import BatchComplete, decode_batched
from .store.run_events import RESERVED_SEQ

OUTAGE_SECONDS = 15.0
"""How long readers wait for Redis to come back; then their transport breaks, and they come back themselves."""

CACHED_BYTES = 64 * 2**20
CACHED_LOGS = 1000
"""Of other workers' runs that nobody here reads just now."""

CURSORS_AHEAD = 10_000
"""How far a reader may be ahead of what Redis has of a run under way: it has read from the run's own worker."""

_decode_event = msgspec.json.Decoder(Event).decode


class EventsLostError(trio.BrokenResourceError):
    """The rest of a run's events cannot be had here now: who reads them must not take this for their end."""


class RemoteLog:
    """The events of another worker's run, as far as they are known here; an ``EventLog``.

    Attributes:
        owner: the worker whose run it is.
        ended: whether the last event is known here: nothing follows it.
        terminal: the last event, once it is known here; None of a batch whose runs have all ended.
    """

    def __init__(self, run_id: str, owner: str, logs: RemoteLogs, *, batched: bool = False) -> None:
        self.run_id = run_id
        self.owner = owner
        self.readers = 0
        self.size_bytes = 0
        self.terminal: TerminalEvent | None = None
        self.entries: list[LogEntry] = []
        self.ended = False
        self._decode = decode_batched if batched else decode_event
        self._logs = logs
        self._followers = 0
        self._gone = False
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def last_seq(self) -> int:
        """The number of the newest event that is known here; 0 before the first."""
        return self.entries[-1].seq if self.entries else 0

    @property
    def in_use(self) -> bool:
        """Whether anybody here reads it or waits for it."""
        return bool(self.readers or self._followers)

    @property
    def wanted(self) -> bool:
        """Whether more of it is to be read from Redis."""
        return self.in_use and not self.ended and not self._gone

    def admit(self, seq: int, event_json: bytes) -> None:
        """Take the event of that number, if it is the next. Only what ends a lost run may leave numbers out."""
        if self.ended or seq <= self.last_seq:
            return
        event = self._decode(event_json)
        if seq != self.last_seq + 1 and not (seq >= RESERVED_SEQ and isinstance(event, TERMINAL_EVENT_TYPES)):
            self.break_off()  # Redis has lost what was between
            return
        entry = LogEntry(seq, event, frame_of(self.run_id, seq, event_json))
        self.entries.append(entry)
        self.size_bytes += len(entry.frame)
        if isinstance(event, TERMINAL_EVENT_TYPES):
            self.terminal = event
        self.ended = self.terminal is not None or isinstance(event, BatchComplete)
        self.wake()

    def break_off(self) -> None:
        """What follows cannot be had any more: who still waits for it is told so."""
        self._gone = True
        self.wake()

    def wake(self) -> None:
        """Let who waits look again."""
        self._changed.unpark_all()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Count as a reader of the run for as long as the block lasts: its worker is told."""
        self.readers += 1
        if self.readers == 1:
            self._logs.on_reading(self, True)
        self._logs.look_again()
        try:
            yield
        finally:
            self.readers -= 1
            if not self.readers:
                self._logs.on_reading(self, False)

    async def read(self, after: int = 0, deadline: float = inf) -> list[LogEntry]:
        """Everything after number ``after``, as ``RunLog.read``.

        Raises:
            EventsLostError: Redis is away for too long, or does not have the rest: never a clean end.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._followed():
            while True:
                if found := self._after(after):
                    return found
                if self.ended and after == self.last_seq:
                    return []
                now = trio.current_time()
                if self.ended or self._gone or now >= self._logs.broken_at:
                    raise EventsLostError("the rest of the run's events cannot be had")
                if now >= deadline:
                    return []
                with trio.CancelScope(deadline=min(deadline, self._logs.broken_at)):
                    await self._changed.park()

    async def wait_ended(self) -> None:
        """Until the terminal event is known here. Raises as ``read``."""
        while not self.ended:
            await self.read(self.last_seq)

    def _after(self, after: int) -> list[LogEntry]:
        found = self.entries[after:]
        if not found and self.last_seq > after:  # the end of a lost run, whose number is not its place
            return self.entries[-1:]
        return found

    @contextmanager
    def _followed(self) -> Iterator[None]:
        self._followers += 1
        if self._followers == 1:
            self._logs.look_again()
        try:
            yield
        finally:
            self._followers -= 1


class RemoteLogs:
    """The logs of other workers' runs that are known here. Those that nobody reads are kept while there is room.

    Attributes:
        on_reading: hears of a log's first reader here, and of its last one's leaving.
        on_wanted: called when there are logs to be read that were not before.
        broken_at: on trio's clock, when readers stop waiting; ``inf`` while Redis is there.
    """

    def __init__(self) -> None:
        self._logs: OrderedDict[str, RemoteLog] = OrderedDict()
        self._asked: set[RemoteLog] = set()
        self.on_reading: Callable[[RemoteLog, bool], None] = lambda _log, _reading: None
        self.on_wanted: Callable[[], None] = lambda: None
        self.broken_at = inf

    def get(self, run_id: str, owner: str, *, batched: bool = False) -> RemoteLog:
        """The log of that run, or of a batch; a new one if it is not known here."""
        log = self._logs.get(run_id)
        if log is None or log._gone:
            log = self._logs[run_id] = RemoteLog(run_id, owner, self, batched=batched)
        log.owner = owner
        self._logs.move_to_end(run_id)
        self._drop_unused()
        return log

    def known(self, run_id: str) -> RemoteLog | None:
        """The log of that run, if it is known here."""
        return self._logs.get(run_id)

    def drop(self, run_id: str) -> None:
        """Forget the log; who reads it finds its end, or that it is gone."""
        if log := self._logs.pop(run_id, None):
            log.break_off()

    def wanted(self) -> list[RemoteLog]:
        """The logs that are to be read now. What is asked for later calls ``on_wanted``."""
        wanted = [log for log in self._logs.values() if log.wanted]
        self._asked = set(wanted)
        return wanted

    def read_here(self) -> list[RemoteLog]:
        """The logs that have readers here and have not ended."""
        return [log for log in self._logs.values() if log.readers and not log.ended]

    def look_again(self) -> None:
        """A log is read that was not."""
        if any(log.wanted and log not in self._asked for log in reversed(self._logs.values())):
            self.on_wanted()

    def link_changed(self, went_down_at: float) -> None:
        """Redis was lost at that time, or is there again (``inf``)."""
        self.broken_at = went_down_at + OUTAGE_SECONDS
        for log in self._logs.values():
            log.wake()

    def _drop_unused(self) -> None:
        size = sum(log.size_bytes for log in self._logs.values())
        for run_id, log in list(self._logs.items())[:-1]:
            if size <= CACHED_BYTES and len(self._logs) <= CACHED_LOGS:
                break
            if not log.in_use:
                del self._logs[run_id]
                size -= log.size_bytes


def highest_cursor(log: EventLog) -> int:
    """The highest number that a reader of the log can have come with."""
    ahead = CURSORS_AHEAD if isinstance(log, RemoteLog) and not log.ended else 0
    return log.last_seq + ahead


def decode_event(event_json: bytes) -> Any:
    """The event; of a kind that this version does not know, a ``metadata`` that says so: its frame passes as it is."""
    try:
        return _decode_event(event_json)
    except msgspec.ValidationError:
        return Metadata("unknown_event", None)
