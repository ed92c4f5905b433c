"""What came last of the runs under way, in the order of its coming: a row for each batch of a process that writes.

``run_events`` is ordered by runs: each run that a batch adds to costs a page of its own there, and most of these pages
would be written anew five times a second. So a batch's small pieces go into one row here first, and what they bring of
a run goes into ``run_events`` together, when the run ends or it is worth a row. Who wrote a row drops it when
``run_events`` has all that it brought. What a dead process left here is taken over by whoever ends its runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection, delete

from engine.events import data_of
from engine.trace import milliseconds

from .prepared import Prepared, given
from .run_events import NewEvents, Progress, add_events, hold_kept, last_seq_of, rows_of
from .schema import recent_events

_ADD_ROW = Prepared(
    lambda insert: insert(recent_events).values({name: given(name) for name in ("writer", "number", "events")})
)
_DROP_ROWS = Prepared(
    lambda _: delete(recent_events).where(
        recent_events.c.writer == given("writer"), recent_events.c.number < given("number")
    )
)


class RecentEvents(msgspec.Struct, frozen=True, array_like=True):
    """What a batch brings of one run.

    Attributes:
        first_seq: the number of the first frame's event; the others follow it without gaps.
        frames: as the run's log has them.
        elapsed, ttfb: how far the run has come with them, in seconds.
        input_tokens: see ``Progress``.
    """

    run_id: str
    first_seq: int
    frames: Sequence[bytes]
    elapsed: float
    ttfb: float | None
    input_tokens: int | None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[RecentEvents]).decode


def add_recent(c: Connection, writer: str, number: int, batch: Sequence[RecentEvents]) -> None:
    """Keep a batch, under a number of the writer's that is above all before."""
    _ADD_ROW.run(c, {"writer": writer, "number": number, "events": _encode(batch)})


def drop_recent(c: Connection, writer: str, before: int) -> None:
    """Drop the writer's batches that have lower numbers: ``run_events`` has what they brought."""
    _DROP_ROWS.run(c, {"writer": writer, "number": before})


def settle_recent(c: Connection) -> None:
    """Move everything into ``run_events``: of the dead, and of the living, who will bring the same once more.

    Of runs whose events are not kept, or have their end, it is dropped.
    """
    columns = (recent_events.c.writer, recent_events.c.number, recent_events.c.events)
    rows = c.execute(delete(recent_events).returning(*columns)).all()
    brought: dict[str, list[RecentEvents]] = {}
    for _, _, events in sorted(tuple(row) for row in rows):
        for recent in _decode(events):
            brought.setdefault(recent.run_id, []).append(recent)
    kept = sorted(hold_kept(c, list(brought)))
    add_events(c, [_beyond(last_seq_of(c, run_id), brought[run_id]) for run_id in kept])


def _beyond(last: int, brought: Sequence[RecentEvents]) -> NewEvents:
    """What is new of the run after that number: ``run_events`` has no gaps."""
    first_seq = last + 1
    events: list[bytes] = []
    for recent in brought:
        new = recent.frames[max(0, last + 1 - recent.first_seq) :]
        events += map(data_of, new)
        last += len(new)
    newest = brought[-1]
    ttfb_ms = None if newest.ttfb is None else milliseconds(newest.ttfb)
    progress = Progress(milliseconds(newest.elapsed), ttfb_ms, newest.input_tokens)
    return NewEvents(newest.run_id, list(rows_of(first_seq, events)), progress=progress)
