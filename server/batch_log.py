"""Several runs as one log: their events in one order, fixed when first read or copied, under numbers of its own.

Nothing is copied. A batch keeps which run each number belongs to, one byte an event; the events stay in the runs' logs,
and the frame of a number is made from the run's frame whenever it is read, so it is the same bytes every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from math import inf
from typing import Any, TypeAlias, cast

import msgspec
import trio

from engine import Error, Event, RunLog
from engine.events import RETRY_MILLISECONDS, AgentStarted
from engine.log import LogEntry

READ_BYTES = 256 * 1024
"""About what one read makes frames of: unlike a run's, they are made anew for each reader."""

MARK_EVERY = 1024
"""Events between two places from which the runs' own numbers are counted."""


class BatchedRun(msgspec.Struct, frozen=True):
    """A run of a batch; ``index`` is its place in the request."""

    index: int
    run_id: str
    agent_id: str
    session_id: str


class BatchedEnd(msgspec.Struct, frozen=True):
    """How a run of a batch ended: ``done``, ``error`` or ``stop``."""

    index: int
    run_id: str
    status: str


class _BatchEvent(msgspec.Struct, frozen=True, tag_field="chunk_type", omit_defaults=True):
    """Common settings, as of the runs' events."""


class BatchStarted(_BatchEvent, frozen=True, tag="batch_start"):
    """Always the first frame of a batch: the runs that it started. ``timestamp`` is UTC, for people."""

    batch_id: str
    timestamp: str
    runs: tuple[BatchedRun, ...]


class BatchRefusal(_BatchEvent, frozen=True, tag="batch_error"):
    """A request of the batch that was not started: ``code``, ``content`` and ``details`` as of an HTTP refusal.

    Attributes:
        retry_after: seconds until it may be tried again.
    """

    index: int
    agent_id: str
    code: str
    content: str
    details: Any = None
    retry_after: int | None = None


class BatchComplete(_BatchEvent, frozen=True, tag="batch_done"):
    """The last frame of a batch, after each run's own last one."""

    batch_id: str
    runs: tuple[BatchedEnd, ...]


BatchEvent: TypeAlias = BatchStarted | BatchRefusal | BatchComplete


class BatchedFrame(msgspec.Struct, frozen=True):
    """A run's frame in a batch, as far as who only passes it on needs to know it."""

    chunk_type: str
    run_id: str | None = None


_encode = msgspec.json.Encoder().encode
_decode_frame = msgspec.json.Decoder(BatchedFrame).decode
_decode_own = msgspec.json.Decoder(BatchEvent | Error).decode


class MergedOrder:
    """Which run each event is of, in the order in which they were taken; numbers count from 1."""

    def __init__(self, runs: int) -> None:
        if runs > 256:
            raise ValueError("a batch has at most 256 runs")
        self.taken = [0] * runs
        self._order = bytearray()
        self._marks = [(0,) * runs]

    def __len__(self) -> int:
        return len(self._order)

    def take(self, run: int, count: int) -> None:
        """Put the run's next events behind all others."""
        while count:
            part = min(count, MARK_EVERY - len(self._order) % MARK_EVERY)
            self._order.extend(bytes([run]) * part)
            self.taken[run] += part
            count -= part
            if len(self._order) % MARK_EVERY == 0:
                self._marks.append(tuple(self.taken))

    def places(self, after: int) -> Iterator[tuple[int, int]]:
        """Of each event after that many: its run, and its number there."""
        marked = after - after % MARK_EVERY
        seen = [
            count + self._order.count(run, marked, after) for run, count in enumerate(self._marks[after // MARK_EVERY])
        ]
        for at in range(after, len(self._order)):
            run = self._order[at]
            seen[run] += 1
            yield run, seen[run]


class Batch:
    """What is kept of a batch as long as its runs are: whose it is, what was refused, and the order of its events.

    Attributes:
        tenant_id, user_id: who asked for it.
        waiting: where readers of the batch wait; its runs' logs wake them.
    """

    def __init__(
        self,
        batch_id: str,
        owner: tuple[str, str],
        started: BatchStarted,
        refusals: Sequence[BatchRefusal] = (),
    ) -> None:
        self.batch_id = batch_id
        self.tenant_id, self.user_id = owner
        self.runs = started.runs
        self.refusals = tuple(refusals)
        self.complete: BatchComplete | None = None
        self.waiting = trio.lowlevel.ParkingLot()
        self._head: tuple[BatchEvent, ...] = (started, *refusals)
        self._order = MergedOrder(len(started.runs))

    @property
    def last_seq(self) -> int:
        """The newest number that was given."""
        return len(self._head) + len(self._order) + (self.complete is not None)

    @property
    def head(self) -> tuple[BatchEvent, ...]:
        """Its first frames: what was started, and what was not."""
        return self._head

    def merge(self, logs: Sequence[RunLog]) -> None:
        """Give numbers to what is new in the runs' logs; gathered text is not in them yet."""
        for run, log in enumerate(logs):
            self._order.take(run, log.last_seq - self._order.taken[run])
        if self.complete is None and all(log.ended for log in logs):
            ends = (BatchedEnd(run.index, run.run_id, _status(log)) for run, log in zip(self.runs, logs, strict=True))
            self.complete = BatchComplete(self.batch_id, tuple(ends))

    def entries(self, logs: Sequence[RunLog], after: int, until: float = inf) -> list[LogEntry]:
        """What has a number in ``after`` < n <= ``until``: at least one if there is any, then about ``READ_BYTES``."""
        entries: list[LogEntry] = []
        size = 0
        for seq, (event, frame) in enumerate(self._frames(logs, after), after + 1):
            if seq > until or (entries and size + len(frame) > READ_BYTES):
                break
            entries.append(LogEntry(seq, event, frame))
            size += len(frame)
        return entries

    def _frames(self, logs: Sequence[RunLog], after: int) -> Iterator[tuple[Event, bytes]]:
        for seq, own in enumerate(self._head[after:], after + 1):
            yield _own(self.batch_id, seq, own)
        before = len(self._head)
        for seq, (run, number) in enumerate(self._order.places(max(0, after - before)), max(after, before) + 1):
            (entry,) = logs[run].entries(number - 1, number)
            yield entry.event, batch_frame(self.batch_id, seq, logs[run].run_id, entry)
        if self.complete is not None and after < self.last_seq:
            yield _own(self.batch_id, self.last_seq, self.complete)


class BatchLog:
    """An ``EventLog`` of a batch for one reader: the batch's order over its runs' logs, which it holds."""

    def __init__(self, batch: Batch, logs: Sequence[RunLog]) -> None:
        self._batch = batch
        self._logs = tuple(logs)
        batch.merge(self._logs)

    @property
    def run_id(self) -> str:
        """The batch's id: the first part of its frames' ids."""
        return self._batch.batch_id

    @property
    def last_seq(self) -> int:
        """The newest number that was given."""
        return self._batch.last_seq

    @property
    def ended(self) -> bool:
        """Whether every run has ended and all is numbered."""
        return self._batch.complete is not None

    @property
    def size_bytes(self) -> int:
        """What its runs' logs hold."""
        return sum(log.size_bytes for log in self._logs)

    def entries(self, after: int = 0, until: int | None = None) -> list[LogEntry]:
        """As ``RunLog.entries``, but at most ``READ_BYTES`` at once."""
        self._batch.merge(self._logs)
        return self._batch.entries(self._logs, after, inf if until is None else until)

    def attached(self) -> AbstractContextManager[None]:
        """Count as a reader of every run of the batch for as long as the block lasts."""
        return _attached(self._logs)

    async def read(self, after: int = 0, deadline: float = inf) -> list[LogEntry]:
        """As ``RunLog.read``, but at most ``READ_BYTES`` at once."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            due = _seal_due(self._logs)
            self._batch.merge(self._logs)
            if self.last_seq > after:
                return self._batch.entries(self._logs, after)
            if self.ended or trio.current_time() >= deadline:
                return []
            with trio.CancelScope(deadline=min(due, deadline)):
                await self._batch.waiting.park()


def _seal_due(logs: Sequence[RunLog]) -> float:
    """Have gathered text sealed whose time has come; when the next comes, on trio's clock."""
    due = inf
    for log in logs:
        if log.gathering is not None:
            log.gathering.seal_if_due()
            due = min(due, log.gathering.due_at)
    return due


@contextmanager
def _attached(logs: Sequence[RunLog]) -> Iterator[None]:
    with ExitStack() as readers:
        for log in logs:
            readers.enter_context(log.attached())
        yield


def batch_frame(batch_id: str, seq: int, run_id: str, entry: LogEntry) -> bytes:
    """The run's frame as the batch's: under its number, and naming the run."""
    _, _, fields = entry.frame.partition(b"data: {")
    names_its_run = isinstance(entry.event, AgentStarted)
    name = b"" if names_its_run else b'"run_id":"%s",' % run_id.encode()
    return b"id: %s.%d\ndata: {%s%s" % (batch_id.encode(), seq, name, fields)


def decode_batched(event_json: bytes) -> Any:
    """A frame's data as what it is: the batch's own, an ``Error`` that ends it for its dead worker, a run's frame."""
    frame = _decode_frame(event_json)
    if frame.run_id is not None:
        return frame
    try:
        return _decode_own(event_json)
    except msgspec.ValidationError:
        return frame  # of a version that knows more than this


def _own(batch_id: str, seq: int, event: BatchEvent) -> tuple[Event, bytes]:
    """A frame of the batch itself. Who reads logs takes entries as they are: what kind of event it is, nobody asks."""
    retry = b"retry: %d\n" % RETRY_MILLISECONDS if seq == 1 else b""
    frame = b"%sid: %s.%d\ndata: %s\n\n" % (retry, batch_id.encode(), seq, _encode(event))
    return cast(Event, event), frame


def _status(log: RunLog) -> str:
    assert log.terminal is not None, "asked of a run that has ended"
    return str(log.terminal.__struct_config__.tag)
