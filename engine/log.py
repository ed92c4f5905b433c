"""The run's log: the one structure that resume, several viewers, WebSocket and batching under load hang on.

An append-only list of numbered events with their encoded frames. ``append`` never blocks; a reader holds a cursor and
takes *everything* after it in one go, so a reader that was busy writing finds more at its next read and no timer makes
a token wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import inf
from typing import Any, Protocol, TypeAlias

import msgspec
import trio

from .errors import OutputLimitError
from .events import TERMINAL_EVENT_TYPES, Event, TerminalEvent, encode_event, frame_of
from .order import EventOrder


class LogEntry(msgspec.Struct, frozen=True, gc=False):
    """One event, its number in the run (from 1, without gaps) and its encoded frame, shared by all readers."""

    seq: int
    event: Event
    frame: bytes


class EventLog(Protocol):
    """A run's events to read, wherever they are kept: in this process, in the store, at another worker."""

    @property
    def run_id(self) -> str:
        """Whose events they are."""
        ...

    @property
    def last_seq(self) -> int:
        """The number of the newest event that is known here; 0 before the first."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the terminal event is known here: nothing follows it."""
        ...

    async def read(self, after: int = 0, deadline: float = inf) -> list[LogEntry]:
        """Everything after number ``after``, as soon as there is something; see ``RunLog.read``."""
        ...

    def attached(self) -> AbstractContextManager[None]:
        """Count as a reader of the run for as long as the block lasts."""
        ...


class Gathering(Protocol):
    """Text in front of the log that becomes an event at the moment a reader takes it (the emitter)."""

    def seal_if_due(self, now: float | None = None) -> None:
        """Append what has gathered, if its time has come; ``now`` is the time, for who knows it."""
        ...

    @property
    def due_at(self) -> float:
        """When what has gathered may be taken, on trio's clock; ``inf`` when nothing has."""
        ...


Take: TypeAlias = Callable[[Sequence[LogEntry], float], bool]
"""Takes what is new at once, without waiting, where it is said; False: not taken, the reader is to come for it.
It is told the time. What it raises, the reader's ``read`` raises."""


class _Waiting:
    """Who waits for the log; a reader may have something taken for it meanwhile."""

    __slots__ = ("_log", "after", "bug", "take", "task")

    def __init__(self, log: RunLog, after: int = 0, take: Take | None = None) -> None:
        self._log = log
        self.after = after
        self.take = take
        self.task = trio.lowlevel.current_task()
        self.bug: Exception | None = None

    def give_up(self, _: Any) -> trio.lowlevel.Abort:
        """It is cancelled while it waits."""
        del self._log.waiting[self]
        return trio.lowlevel.Abort.SUCCEEDED


class _Attached:
    """The block of a reader; ``contextmanager`` would be 450 bytes and 3 µs more."""

    __slots__ = ("_log",)

    def __init__(self, log: RunLog) -> None:
        self._log = log

    def __enter__(self) -> None:
        self._log.count_readers(+1)

    def __exit__(self, *_: object) -> None:
        self._log.count_readers(-1)


class RunLog:
    """Append-only events of one run, read by any number of readers from any number on.

    The log owns nothing that must be closed. Its size is bounded by the emitter in front of it.

    Attributes:
        last_seq: the number of the newest event; 0 before the first.
        ended: whether the terminal event is in: nothing follows it.
        waiting: who waits for it.
        on_append: hears of every event as it is appended (who copies the log elsewhere), and when something else of the
            run is worth keeping (``note_news``); synchronous, must not raise.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.gathering: Gathering | None = None
        self.on_append: Callable[[RunLog], None] | None = None
        self.on_readers_changed: Callable[[int], None] | None = None
        self.readers = 0
        self.last_seq = 0
        self.ended = False
        self.size_bytes = 0
        self.terminal: TerminalEvent | None = None
        self._entries: list[LogEntry] = []
        self._order = EventOrder()
        self.waiting: dict[_Waiting, None] = {}
        self._waiting_for_several: tuple[trio.lowlevel.ParkingLot, ...] = ()
        self._held = self._changed = False

    def append(self, event: Event, max_bytes: float = inf) -> LogEntry:
        """Number the event, keep it and wake the readers. Synchronous, never blocks.

        A refused event, also one that cannot be encoded (TypeError, UnicodeEncodeError), leaves the log unchanged.

        Raises:
            OutputLimitError: with it, the log would be larger than ``max_bytes``.
            EventOrderError: the event may not come at this point: a bug of the caller.
        """
        seq = self.last_seq + 1
        entry = LogEntry(seq, event, frame_of(self.run_id, seq, encode_event(event)))
        if self.size_bytes + len(entry.frame) > max_bytes:
            raise OutputLimitError(f"the run's output is over {max_bytes} bytes")
        self._order.admit(event)  # after the encoding, which may fail
        self._entries.append(entry)
        self.last_seq = seq
        self.size_bytes += len(entry.frame)
        if isinstance(event, TERMINAL_EVENT_TYPES):
            self.terminal, self.ended = event, True
        if self._held:
            self._changed = True
        elif self.waiting or self._waiting_for_several:
            self.wake()
        if self.on_append is not None:
            self.on_append(self)
        return entry

    def note_news(self) -> None:
        """Have who copies the log look again."""
        if self.on_append is not None:
            self.on_append(self)

    def entries(self, after: int = 0, until: int | None = None) -> list[LogEntry]:
        """What is in the log now, after number ``after`` up to ``until``; gathered text is not in it yet."""
        return self._entries[after:until]

    def wake(self) -> None:
        """Let waiting readers look again: gathered text has come due, or has begun to gather."""
        if self._held:
            self._changed = True
            return
        for one in self.waiting:
            trio.lowlevel.reschedule(one.task)
        self.waiting.clear()
        for lot in self._waiting_for_several:
            lot.unpark_all()

    def hold(self) -> None:
        """What is appended and gathered from here to ``release`` is news once, then. Nobody waits in between."""
        self._held = True

    def release(self, *, more_follows: bool = False, now: float | None = None) -> None:
        """Tell of what came since ``hold``. Readers with a ``take`` are not even woken while it takes everything.

        Args:
            more_follows: before anybody else can run. Then all are woken, and find it together.
            now: the time, from who knows it: of one read's news it is asked once.
        """
        if self._changed and not more_follows:
            if self.waiting:  # still held: what is sealed is no news of its own
                self._serve(trio.current_time() if now is None else now)
            for lot in self._waiting_for_several:
                lot.unpark_all()
            self._changed = False
        self._held = False
        if self._changed:
            self._changed = False
            self.wake()

    def _serve(self, now: float) -> None:
        must_look = self.terminal is not None
        if self.gathering is not None:
            self.gathering.seal_if_due(now)
            must_look = must_look or self.gathering.due_at < inf
        for one in list(self.waiting):
            if one in self.waiting and (must_look or not self._taken_for(one, now)):
                del self.waiting[one]
                trio.lowlevel.reschedule(one.task)

    def _taken_for(self, one: _Waiting, now: float) -> bool:
        entries = self._entries[one.after :]
        try:
            taken = one.take is not None and (not entries or one.take(entries, now))
        except Exception as bug:  # noqa: BLE001 - the reader's business: raised in its task
            one.bug = bug
            return False
        if taken:
            one.after = len(self._entries)
        return taken

    def also_wake(self, lot: trio.lowlevel.ParkingLot) -> None:
        """From now on wake those in this lot too: who waits for several logs at once has one lot for all of them."""
        self._waiting_for_several += (lot,)

    def attached(self) -> AbstractContextManager[None]:
        """Count a reader for as long as the block lasts; ``on_readers_changed`` hears of each change."""
        return _Attached(self)

    def count_readers(self, change: int) -> None:
        """There are so many more, or fewer."""
        self.readers += change
        if self.on_readers_changed is not None:
            self.on_readers_changed(self.readers)

    async def wait_ended(self) -> None:
        """Until the terminal event is in, without reading."""
        while not self.ended:
            waiting = _Waiting(self)
            self.waiting[waiting] = None
            await trio.lowlevel.wait_task_rescheduled(waiting.give_up)

    async def read(self, after: int = 0, deadline: float = inf, take: Take | None = None) -> list[LogEntry]:
        """Everything after number ``after``, as soon as there is something.

        Args:
            after: the last number that the reader has; 0 for all.
            deadline: when to stop waiting, on trio's clock (a heartbeat's time, say).
            take: is offered what comes while this waits; it goes on waiting for what comes after what was taken.

        Returns:
            The entries in order. Empty when the run has ended and all is read, or when the deadline passed:
            ``ended`` tells which.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        waiting: _Waiting | None = None
        while True:
            due = inf
            if self.gathering is not None and self.gathering.due_at < inf:
                self.gathering.seal_if_due()
                due = self.gathering.due_at
            if len(self._entries) > after:
                return self._entries[after:]
            if self.ended or trio.current_time() >= deadline:
                return []
            waiting = waiting or _Waiting(self, after, take)
            with trio.CancelScope(deadline=min(due, deadline)):
                self.waiting[waiting] = None
                await trio.lowlevel.wait_task_rescheduled(waiting.give_up)
            if waiting.bug is not None:
                raise waiting.bug
            after = waiting.after
