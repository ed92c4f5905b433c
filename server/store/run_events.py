"""Runs' events in the store: added in batches, read in pages, ended for processes that died, dropped when too old.

A row holds what one batch brought of a run: events that follow each other, one JSON line each, under the number of the
last. Read in the order of their numbers, rows may say again what the one before them said: a batch that was written
twice begins where it began before, and what was said first counts.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import msgspec
from sqlalchemy import ColumnElement, Connection, and_, delete, func, select, update

from .connecting import driver_of
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

ROW_CHARS = 8 * 1024
"""Of events that share a row, about."""

_OPEN = "reserved_seq IS NOT NULL AND terminal_seq IS NULL"
_KEPT = {
    "sqlite": f"SELECT run_id FROM runs WHERE run_id IN (SELECT value FROM json_each(?)) AND {_OPEN}",
    "postgresql": f"SELECT run_id FROM runs WHERE run_id = ANY(%s) AND {_OPEN} ORDER BY run_id FOR NO KEY UPDATE",
}
_INSERT = {
    "sqlite": "INSERT INTO run_events (run_id, seq, event) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
    "postgresql": "INSERT INTO run_events (run_id, seq, event) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
}
_SET_PROGRESS = """
    UPDATE runs SET elapsed_ms = {0}, ttfb_ms = {0}, input_tokens = {0}
    WHERE run_id = {0} AND status = 'running' AND coalesce(elapsed_ms, 0) <= {0}
"""
_PROGRESS = {"sqlite": _SET_PROGRESS.format("?"), "postgresql": _SET_PROGRESS.format("%s")}
"""These go straight to the driver: a batch may have a row for each run, and SQLAlchemy costs more than the database."""

_END = Prepared(
    lambda _: (
        update(runs)
        .where(runs.c.run_id == given("run_id"), runs.c.terminal_seq.is_(None))
        .values(terminal_seq=given("terminal_seq"), memory_updates=given("memory_updates"))
    )
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
        events: numbers with their JSON, in order. Several that follow each other may be one text (see ``rows_of``),
            one a line, under the number of the last.
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
    """Keep the events, each once however often they are added; how many were asked for.

    A run that has no row, whose events were dropped, or have their end, is left out: nothing comes after an end, also
    if a process that was taken for dead goes on.
    """
    news = list(batch)
    kept = hold_kept(c, [new.run_id for new in news])
    news = [new for new in news if new.run_id in kept]
    _run_each(c, _INSERT, [row for new in news for row in _rows_of(new)])
    _run_each(c, _PROGRESS, [_progress_row(new.run_id, new.progress) for new in news if new.progress is not None])
    _END.run_each(c, [msgspec.structs.asdict(new) for new in news if new.terminal_seq is not None])
    return sum(1 + text.count("\n") for new in news for _, text in new.events)


def _progress_row(run_id: str, progress: Progress) -> tuple[object, ...]:
    return progress.elapsed_ms, progress.ttfb_ms, progress.input_tokens, run_id, progress.elapsed_ms


def rows_of(first_seq: int, events: Sequence[bytes]) -> Iterator[tuple[int, str]]:
    """Events that follow each other, as few texts: the number of the last in each, and one event a line."""
    ends = list(accumulate(map(len, events)))
    at = size = 0
    while at < len(events):
        upto = max(at + 1, bisect_right(ends, size + ROW_CHARS, at))
        yield first_seq + upto - 1, b"\n".join(events[at:upto]).decode()
        at, size = upto, ends[upto - 1]


def _rows_of(new: NewEvents) -> Iterator[tuple[str, int, str]]:
    texts: list[str] = []
    last = chars = 0
    for seq, text in new.events:
        if texts and (seq - text.count("\n") != last + 1 or chars + len(text) > ROW_CHARS):
            yield new.run_id, last, "\n".join(texts)
            texts, chars = [], 0
        texts.append(text)
        chars += len(text)
        last = seq
    if texts:
        yield new.run_id, last, "\n".join(texts)


def _events_of(last: int, row: str) -> Iterator[tuple[int, str]]:
    lines = row.split("\n")
    return enumerate(lines, last + 1 - len(lines))


def page_of_events(c: Connection, run_id: str, after: int) -> list[tuple[int, str]]:
    """The run's events after a number, in order: as many as make a page, at least one if there is one."""
    columns = select(run_events.c.seq, run_events.c.event)
    page: list[tuple[int, str]] = []
    chars = 0
    wanted = columns.where(run_events.c.run_id == run_id, run_events.c.seq > after).order_by(run_events.c.seq)
    for last, row in c.execute(wanted.limit(PAGE_EVENTS)):
        for seq, event in _events_of(last, row):
            if seq <= after:
                continue
            chars += len(event)
            if page and (chars > PAGE_CHARS or len(page) == PAGE_EVENTS):
                return page
            page.append((seq, event))
            after = seq
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
    columns = select(run_events.c.seq, run_events.c.event)
    wanted = columns.where(run_events.c.run_id == run_id, run_events.c.seq >= seq).order_by(run_events.c.seq)
    row = c.execute(wanted.limit(1)).one_or_none()
    return None if row is None else dict(_events_of(*row)).get(seq)


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


def hold_kept(c: Connection, run_ids: Sequence[str]) -> set[str]:
    """Those of the runs that are there, whose events are kept and have no end; nobody else ends them meanwhile."""
    if c.dialect.name == "sqlite":
        found = driver_of(c).execute(_KEPT["sqlite"], (json.dumps(run_ids),))
        return {run_id for (run_id,) in found}
    return set(c.exec_driver_sql(_KEPT["postgresql"], (list(run_ids),)).scalars())


def _run_each(c: Connection, statement: Mapping[str, str], rows: Sequence[tuple[object, ...]]) -> None:
    if not rows:
        return
    if c.dialect.name == "sqlite":
        driver_of(c).executemany(statement["sqlite"], rows)
    else:
        c.exec_driver_sql(statement["postgresql"], list(rows))
