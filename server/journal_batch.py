"""What one write of the journal takes of the runs that it follows, and which of the store's two places it is for.

Little of a run that goes on is added to ``recent_events``; it is settled, that is, all of it that ``run_events`` does
not have goes there, once it is worth a row, is old, or the run has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple

from sqlalchemy import Connection

from engine import Run
from engine.events import data_of
from engine.memory import TurnRecord
from engine.trace import milliseconds

from .store.recent_events import RecentEvents, add_recent, drop_recent
from .store.run_events import NewEvents, Progress, add_events, rows_of
from .store.turns import save_turn

BATCH_BYTES = 4 * 2**20
"""Of one transaction, about: others wait for the database meanwhile."""

SETTLED_BYTES = 16 * 2**10
"""So much of one run is worth a row of its own; twice as much is settled without regard to ``SETTLING_BYTES``."""

RECENT_SECONDS = 20.0
"""What has waited so long is settled too. For about as long the file may hold what was dropped of a run meanwhile."""

SETTLING_BYTES = 2**20
"""Of runs that go on one transaction settles so much: a thousand that began together would hold it up for 0.2 s."""


class Copied:
    """A run that is followed, and how far it is stored.

    Attributes:
        stored, stored_bytes: the number of the last event that is in the store, and the size of the log up to it.
        settled, settled_bytes: the same of ``run_events``.
        first_row: of those of ``recent_events`` that have what is not settled.
        settle_at: when that is to be settled at the latest, on trio's clock; never, if everything stored is.
        input_tokens: as the store knows them.
        ended: what else to keep of the run once it has ended, if nobody else does.
    """

    __slots__ = (
        "ended",
        "first_row",
        "input_tokens",
        "run",
        "settle_at",
        "settled",
        "settled_bytes",
        "stored",
        "stored_bytes",
    )

    def __init__(self, run: Run) -> None:
        self.run = run
        self.stored = self.stored_bytes = self.settled = self.settled_bytes = 0
        self.first_row = 0
        self.settle_at = inf
        self.input_tokens: int | None = None
        self.ended: Callable[[], TurnRecord] | None = None


class Part:
    """What one write takes of one run; the terminal event is in it if ``is_last``."""

    __slots__ = (
        "bytes",
        "copied",
        "entries",
        "input_tokens",
        "is_cut",
        "is_last",
        "last_seq",
        "now",
        "settles",
        "turn",
    )

    def __init__(self, copied: Copied, now: float, most_bytes: int, *, may_settle: bool) -> None:
        run, log = copied.run, copied.run.log
        ended = log.terminal is not None
        unsettled = log.size_bytes - copied.settled_bytes
        self.copied = copied
        self.now = now
        self.input_tokens = run.input_tokens
        self.settles = (
            ended
            or unsettled >= 2 * SETTLED_BYTES
            or (may_settle and (unsettled >= SETTLED_BYTES or now >= copied.settle_at))
        )
        self.entries = log.entries(copied.settled if self.settles else copied.stored)
        self.bytes = log.size_bytes
        self.is_cut = self.settles and unsettled > most_bytes and self._cut(most_bytes)
        self.last_seq = self.entries[-1].seq if self.entries else copied.stored
        self.is_last = ended and not self.is_cut
        self.turn = copied.ended() if self.is_last and copied.ended is not None else None

    @property
    def is_empty(self) -> bool:
        """Whether the store has all that is in it."""
        return not self.entries and self.copied.input_tokens == self.input_tokens

    def recent(self) -> RecentEvents:
        """As ``recent_events`` has it. In the worker thread."""
        run = self.copied.run
        frames = [entry.frame for entry in self.entries]
        return RecentEvents(run.id, self.copied.stored + 1, frames, self._elapsed, run.ttfb, self.input_tokens)

    def news(self) -> NewEvents:
        """As ``run_events`` has it. In the worker thread."""
        run, entries = self.copied.run, self.entries
        events = list(rows_of(entries[0].seq, [data_of(entry.frame) for entry in entries])) if entries else []
        if self.is_last:
            return NewEvents(run.id, events, self.last_seq, run.memory_updates)
        return NewEvents(run.id, events, progress=Progress(milliseconds(self._elapsed), run.ttfb_ms, self.input_tokens))

    @property
    def _elapsed(self) -> float:
        run = self.copied.run
        return (self.now if run.ended_at is None else run.ended_at) - run.started_at

    def _cut(self, most_bytes: int) -> bool:
        """Take no more than that, but one event at least that is not stored; whether something is left."""
        size = 0
        taken = 0
        for entry in self.entries:
            if size >= most_bytes and entry.seq > self.copied.stored + 1:
                break
            size += len(entry.frame)
            taken += 1
        left = taken < len(self.entries)
        self.bytes = self.copied.settled_bytes + size
        del self.entries[taken:]
        return left


class Batch(NamedTuple):
    """What one transaction keeps.

    Attributes:
        number: of the row of ``recent_events``, if there is anything for it.
        needed: the first of its rows that is needed from then on; None if no other can be dropped.
    """

    parts: Sequence[Part]
    writer: str
    number: int
    needed: int | None


def cut_parts(waiting: Sequence[Copied], now: float) -> tuple[list[Part], Sequence[Copied]]:
    """What one transaction takes, and the runs of which something is left."""
    parts: list[Part] = []
    room, settling = BATCH_BYTES, SETTLING_BYTES
    for at, copied in enumerate(waiting):
        if room <= 0:
            return parts, waiting[at:]
        part = Part(copied, now, room, may_settle=settling > 0)
        if part.settles:
            settling -= part.bytes - copied.settled_bytes
        if not part.is_empty:
            parts.append(part)
            room -= part.bytes - (copied.settled_bytes if part.settles else copied.stored_bytes)
        if part.is_cut:
            return parts, waiting[at:]
    return parts, ()


def store_batch(c: Connection, batch: Batch, now: str) -> None:
    """In the worker thread."""
    if batch.needed is not None:
        drop_recent(c, batch.writer, batch.needed)  # before runs are locked: who takes rows over does it in this order
    if recent := [part.recent() for part in batch.parts if not part.settles]:
        add_recent(c, batch.writer, batch.number, recent)
    add_events(c, [part.news() for part in batch.parts if part.settles])
    for part in batch.parts:
        if part.turn is not None:
            save_turn(c, part.turn, now)
