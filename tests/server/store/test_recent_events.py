"""What batches brought of runs under way, on both databases: moved into ``run_events`` without gaps, or dropped."""

from __future__ import annotations

import random

from sqlalchemy import func, select

from engine.events import frame_of
from server.store.database import Database
from server.store.interrupted import end_run, interrupt_runs
from server.store.recent_events import RecentEvents, add_recent, drop_recent, settle_recent
from server.store.run_events import RESERVED_SEQ, NewEvents, add_events, event_of, forget_events, rows_of
from server.store.schema import recent_events
from server.store.turns import find_run
from tests.server.store.scene import at, have_turn
from tests.server.store.test_run_events import begin, read_all

LAST = RESERVED_SEQ + 1


def event(seq: int) -> str:
    return f'{{"chunk_type":"content","content":"wörd {seq} 👋","step_id":"s"}}'


def events(first: int, last: int) -> list[tuple[int, str]]:
    return [(seq, event(seq)) for seq in range(first, last + 1)]


def recent(run_id: str, first: int, last: int, elapsed: float = 0.0) -> RecentEvents:
    frames = [frame_of(run_id, seq, data.encode()) for seq, data in events(first, last)]
    return RecentEvents(run_id, first, frames, elapsed, elapsed / 2, 7)


def settled(run_id: str, first: int, last: int) -> NewEvents:
    """As the journal brings them."""
    return NewEvents(run_id, list(rows_of(first, [data.encode() for _, data in events(first, last)])))


async def rows_left(database: Database) -> int:
    return await database.read(lambda c: c.execute(select(func.count()).select_from(recent_events)).scalar_one())


async def test_what_is_recent_comes_after_what_is_settled_in_the_order_of_its_coming(database: Database) -> None:
    for run_id in ("run", "other"):
        await begin(database, run_id)
    await database.write(add_events, [settled("run", 1, 3)])
    for number in range(1, 13):  # ten comes after nine, and there is a run that nothing is said of
        batch = [recent("run", 3 + number, 3 + number, elapsed=number)]
        await database.write(add_recent, "writer", number, batch if number % 2 else [*batch, recent("other", 1, 0)])
    await database.write(add_recent, "another writer", 1, [recent("other", 1, 2), recent("unknown", 1, 2)])
    await database.write(settle_recent)
    assert await read_all(database, "run") == events(1, 15)
    assert await read_all(database, "other") == events(1, 2)
    assert await rows_left(database) == 0
    run = await database.read(find_run, "run")
    assert run is not None
    assert (run.elapsed_ms, run.ttfb_ms, run.input_tokens) == (12_000, 6000, 7)
    await database.write(settle_recent)
    assert await read_all(database, "run") == events(1, 15)


async def test_progress_does_not_go_back(database: Database) -> None:
    """Rows that are not needed any more may be there for some time."""
    await begin(database, "run")
    await database.write(add_recent, "writer", 1, [recent("run", 1, 2, elapsed=2.0)])
    await database.write(settle_recent)
    await database.write(add_recent, "writer", 2, [recent("run", 1, 1, elapsed=1.0)])
    await database.write(settle_recent)
    run = await database.read(find_run, "run")
    assert run is not None
    assert run.elapsed_ms == 2000
    assert await read_all(database, "run") == events(1, 2)


async def test_a_batch_that_was_kept_unnoticed_is_in_the_next_one_again(database: Database) -> None:
    await begin(database, "run")
    for number, last in enumerate((2, 4, 3, 6), 1):
        await database.write(add_recent, "writer", number, [recent("run", 1, last)])
        if number % 2 == 0:
            await database.write(settle_recent)
    assert await read_all(database, "run") == events(1, 6)


async def test_of_runs_that_are_forgotten_or_have_their_end_nothing_is_brought_back(database: Database) -> None:
    for run_id in ("forgotten", "ended"):
        await begin(database, run_id)
    await database.write(add_recent, "writer", 1, [recent("forgotten", 1, 2), recent("ended", 1, 2)])
    await database.write(forget_events, "forgotten")
    await database.write(add_events, [NewEvents("ended", events(1, 1), 1)])
    await database.write(settle_recent)
    assert await read_all(database, "forgotten") == []
    assert await read_all(database, "ended") == events(1, 1)
    assert await rows_left(database) == 0


async def test_a_writer_drops_its_own_rows_before_a_number(database: Database) -> None:
    await begin(database, "run")
    for writer in ("a", "b"):
        for number in (1, 2, 10):
            await database.write(add_recent, writer, number, [recent("run", number, number)])
    await database.write(drop_recent, "a", 2)
    assert await rows_left(database) == 5
    await database.write(drop_recent, "a", 11)
    assert await rows_left(database) == 3


async def test_who_ends_runs_of_the_dead_finds_what_was_recent(database: Database) -> None:
    for run_id in ("first", "second"):
        await begin(database, run_id)
    await have_turn(database, "done", "question")
    await database.write(
        add_recent, "dead", 1, [recent("first", 1, 2, elapsed=3.0), recent("second", 1, 1), recent("done", 1, 1)]
    )
    ending = await database.write(end_run, "first", "worker_lost", at(9))
    assert ending is not None
    *said, (seq, _) = ending.missing
    assert (said, seq) == (events(1, 2), LAST)
    assert ending.facts["elapsed_ms"] == "3000.0"
    assert await database.write(interrupt_runs, at(9)) == 1
    for run_id, last in (("first", 2), ("second", 1), ("done", 1)):
        *said, (seq, _) = await read_all(database, run_id)
        assert (said, seq) == (events(1, last), LAST)


async def test_nothing_is_lost_between_a_writer_and_those_who_take_it_for_dead(database: Database) -> None:
    """Whatever is cut where: each settles from where the other may have settled further."""
    for seed in range(12):
        chance, run_id, writer = random.Random(seed), f"run-{seed}", f"writer-{seed}"
        await begin(database, run_id)
        stored = kept = number = first_row = 0
        for _ in range(30):
            match chance.choice(("add", "add", "add", "settle", "take over")):
                case "add":
                    number, new = number + 1, stored + chance.randint(1, 3)
                    await database.write(add_recent, writer, number, [recent(run_id, stored + 1, new)])
                    stored = new
                case "take over":
                    await database.write(settle_recent)
                case "settle" if kept < stored:
                    cut = chance.randint(kept, stored - 1)
                    batch = [settled(run_id, kept + 1, cut), settled(run_id, cut + 1, stored)]
                    await database.write(add_events, batch)
                    kept, first_row = stored, chance.randint(first_row, number + 1)
                    await database.write(drop_recent, writer, first_row)
        await database.write(settle_recent)
        assert await read_all(database, run_id) == events(1, stored)
        for seq, data in events(1, stored):
            assert await database.read(event_of, run_id, seq) == data
