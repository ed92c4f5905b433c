"""Runs' events in the store: added in batches, read in pages, ended for processes that died, dropped when too old."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, func, select, update

from .prepared import Prepared, given
from .schema import idempotency_keys, run_events, runs

RESERVED_SEQ = 1_000_000_000
"""No run hands out a number above this one: the event that ends it in its process's stead gets the next.

Every run's row says so before the run starts, and nothing is left to reserve while it goes on: its log is bounded in
bytes, and so in events. ``server.log_followers.may_follow`` checks it; with the limit of 8 MiB they are half a million.
"""

PAGE_EVENTS = 200
PAGE_CHARS = 256 * 1024

SWEPT_RUNS = 20
"""In one transaction: each has at most some megabytes."""

_INSERT = {
    "sqlite": "INSERT INTO run_events (run_id, seq, event) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
    "postgresql": "INSERT INTO run_events (run_id, seq, event) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
}
"""Straight to the driver: one row for each event of every run, and through SQLAlchemy each costs 1.5 µs more."""

_END = Prepared(
    lambda _: (
        update(runs)
        .where(runs.c.run_id == given("run_id"), runs.c.terminal_seq.is_(None))
        .values(terminal_seq=given("terminal_seq"), memory_updates=given("memory_updates"))
    )
)


_PROGRESS = (
    update(runs)
    .where(runs.c.run_id == bindparam("of"), runs.c.status == "running")
    .values({name: bindparam(f"new_{name}") for name in ("elapsed_ms", "ttfb_ms", "input_tokens")})
)


class Progress(msgspec.Struct, frozen=True):
    """What the row of a run under way says of it, for who has to end it in its process's stead.

    Attributes:
        elapsed_ms, ttfb_ms: as its end would tell them now.
        input_tokens: what the model was sent so far; None before the first request.
    """

    elapsed_ms: float
    ttfb_ms: float | None
    input_tokens: int | None


class NewEvents(msgspec.Struct, frozen=True):
    """What is new of one run.

    Attributes:
        events: numbers with their JSON, in order.
        terminal_seq: the number of the terminal event, if that is among them.
        memory_updates: how often the run changed what is remembered; of an ended run.
        progress: how far a run under way has come.
    """

    run_id: str
    events: Sequence[tuple[int, str]]
    terminal_seq: int | None = None
    memory_updates: int = 0
    progress: Progress | None = None


def add_events(c: Connection, batch: Iterable[NewEvents]) -> int:
    """Keep the events, each once however often they are added; how many rows were asked for.

    A run that has no row, whose events were dropped, or have their end, is left out: nothing comes after an end, also
    if a process that was taken for dead goes on.
    """
    news = list(batch)
    kept = _kept(c, [new.run_id for new in news])
    rows = [(new.run_id, seq, event) for new in news if new.run_id in kept for seq, event in new.events]
    if rows:
        c.exec_driver_sql(_INSERT[c.dialect.name], rows)
    _note_progress(c, [new for new in news if new.run_id in kept])
    ended = [new for new in news if new.terminal_seq is not None and new.run_id in kept]
    _END.run_each(c, [msgspec.structs.asdict(new) for new in ended])
    return len(rows)


def _note_progress(c: Connection, news: Iterable[NewEvents]) -> None:
    come = [
        {"of": new.run_id} | {f"new_{name}": value for name, value in msgspec.structs.asdict(new.progress).items()}
        for new in news
        if new.progress is not None
    ]
    if come:
        c.execute(_PROGRESS, come)


def page_of_events(c: Connection, run_id: str, after: int) -> list[tuple[int, str]]:
    """The run's events after a number, in order: as many as make a page, at least one if there is one."""
    columns = select(run_events.c.seq, run_events.c.event)
    page: list[tuple[int, str]] = []
    chars = 0
    wanted = columns.where(run_events.c.run_id == run_id, run_events.c.seq > after).order_by(run_events.c.seq)
    for seq, event in c.execute(wanted.limit(PAGE_EVENTS)):
        chars += len(event)
        if page and chars > PAGE_CHARS:
            break
        page.append((seq, event))
    return page


def last_seq_of(c: Connection, run_id: str) -> int:
    """The number of the newest event that is kept; 0 without any."""
    newest = select(func.max(run_events.c.seq)).where(run_events.c.run_id == run_id)
    return c.execute(newest).scalar_one() or 0


def terminal_seq_of(c: Connection, run_id: str) -> int | None:
    """The number of the run's terminal event, if the store has it, and all before it."""
    return c.execute(select(runs.c.terminal_seq).where(runs.c.run_id == run_id)).scalar_one_or_none()


def event_of(c: Connection, run_id: str, seq: int) -> str | None:
    """One event's JSON."""
    wanted = select(run_events.c.event).where(run_events.c.run_id == run_id, run_events.c.seq == seq)
    return c.execute(wanted).scalar_one_or_none()


def drop_events(c: Connection, which: ColumnElement[bool]) -> None:
    """Keep the events of these runs no more (a condition on ``runs``); requests that repeat theirs start new ones."""
    which = and_(runs.c.reserved_seq.is_not(None), which)
    dropped = select(runs.c.run_id).where(which)
    c.execute(delete(idempotency_keys).where(idempotency_keys.c.run_id.in_(dropped)))
    c.execute(delete(run_events).where(run_events.c.run_id.in_(dropped)))
    c.execute(update(runs).where(which).values(reserved_seq=None, terminal_seq=None))


def forget_events(c: Connection, run_id: str) -> None:
    """Keep the events of this run no more."""
    drop_events(c, runs.c.run_id == run_id)


def sweep_events(c: Connection, before: str) -> int:
    """Keep the events of the oldest ended runs that began before that time no more; of how many: 0 when none is left.

    Each call takes a bounded number of runs, so that nobody waits long for the database.
    """
    ended = (runs.c.reserved_seq.is_not(None), runs.c.created_at < before, runs.c.status != "running")
    oldest = select(runs.c.run_id).where(*ended).order_by(runs.c.created_at).limit(SWEPT_RUNS)
    run_ids = list(c.execute(oldest).scalars())
    if run_ids:
        drop_events(c, runs.c.run_id.in_(run_ids))
    return len(run_ids)


def _kept(c: Connection, run_ids: Sequence[str]) -> set[str]:
    """Those of the runs that are there, whose events are kept and have no end; nobody else ends them meanwhile."""
    kept: set[str] = set()
    for start in range(0, len(run_ids), PAGE_EVENTS):  # SQLite takes some thousand parameters at most
        some = run_ids[start : start + PAGE_EVENTS]
        open_ones = (runs.c.run_id.in_(some), runs.c.reserved_seq.is_not(None), runs.c.terminal_seq.is_(None))
        held = select(runs.c.run_id).where(*open_ones).order_by(runs.c.run_id).with_for_update(key_share=True)
        kept.update(c.execute(held).scalars())
    return kept
