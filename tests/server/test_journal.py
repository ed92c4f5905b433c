"""The journal: what runs say is in the store within 250 ms, is read there as it came live, and outlives trouble."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar, TypeVarTuple

import httpx
import msgspec
import pytest
import structlog.testing
import trio
from sqlalchemy import Connection, select, update
from trio.testing import MockClock

from engine import RetentionLimits, Run, RunSupervisor
from server.journal import BATCH_SECONDS, LAST_RETRY_SECONDS, Journal
from server.journal_batch import RECENT_SECONDS, SETTLED_BYTES
from server.log_followers import LogFollowers
from server.store.database import Database
from server.store.errors import StoreUnavailableError
from server.store.interrupted import interrupt_runs
from server.store.recent_events import RecentEvents
from server.store.run_events import page_of_events
from server.store.schema import recent_events, runs, storable
from server.store.turns import find_run
from tests.engine.scripted import FOREVER, SENT, Line, ScriptedProvider, text
from tests.harness.world import World, open_keeping_world
from tests.server.api_scene import API, HELPER, Caller

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

WORDS: tuple[Line, ...] = (
    (0, (SENT,)),
    *((1 + number * 0.1, text(f'wörd{number} 🧵 \x00\u2028"\\ ')) for number in range(30)),
)
FORGET_AT_ONCE = RetentionLimits(seconds=0.0, runs=0)


class TroubledDatabase(Database):
    """A database in memory that writes down when it is written to, and fails or takes its time when it is told to.

    Attributes:
        writes: function names with times.
        trouble: raised by each write while it is set.
        seconds: what a write takes.
        refused: runs whose events are refused for their own sake.
    """

    writes: list[tuple[str, float]]
    trouble: Exception | None = None
    seconds = 0.0
    refused: frozenset[str] = frozenset()

    async def write(self, change: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        if change.__name__ == "store_batch":
            self.writes.append((change.__name__, trio.current_time()))
            await trio.sleep(self.seconds)
            if self.trouble is not None:
                raise self.trouble
            batch: Any = next(iter(args))
            if any(part.copied.run.id in self.refused for part in batch.parts):
                raise ValueError("these events are refused")
        return await super().write(change, *args)


def troubled() -> TroubledDatabase:
    database = TroubledDatabase.open("sqlite://", inline=True)
    assert isinstance(database, TroubledDatabase)
    database.writes = []
    return database


async def settled(database: Database, run_id: str) -> list[int]:
    """The numbers of the run's events that can be read by themselves."""
    seqs = [0]
    while page := await database.read(page_of_events, run_id, seqs[-1]):
        seqs += [seq for seq, _ in page]
    return seqs[1:]


async def stored(database: Database, run_id: str) -> list[int]:
    """The numbers of the run's events in the store."""
    seqs = set(await settled(database, run_id))
    for recent in await database.read(recent_of, run_id):
        seqs.update(range(recent.first_seq, recent.first_seq + len(recent.frames)))
    return sorted(seqs)


def recent_of(c: Connection, run_id: str) -> list[RecentEvents]:
    """What batches brought of the run that is still there batch by batch."""
    rows = c.execute(select(recent_events.c.events).order_by(recent_events.c.number)).scalars()
    batches = [msgspec.msgpack.decode(row, type=list[RecentEvents]) for row in rows]
    return [recent for batch in batches for recent in batch if recent.run_id == run_id]


async def start(world: World, script: tuple[Line, ...] = WORDS) -> Run:
    """A run that goes on without a reader."""
    world.add_agent(provider=ScriptedProvider(*script))
    async with world.open_chat(on_disconnect="continue") as answer:
        run = world.supervisor.find(answer.run_id)
        assert run is not None
        return run


def events_url(run: Run) -> str:
    return f"{API}/runs/{run.id}/events"


def frames(run: Run, after: int = 0) -> bytes:
    return b"".join(entry.frame for entry in run.log.entries(after))


async def read_live(world: World, run: Run) -> bytes:
    return (await world.client.get(events_url(run))).content


async def iter_body(body: Any) -> AsyncIterator[bytes]:
    """The parts of a response as they come."""
    while part := await body.receive():
        yield part


# Batches


@pytest.mark.parametrize(
    ("at", "elapsed_ms", "ttfb_ms"), [(1, 200.0, None), (4, 3200.0, None), (6, 5200.0, 5000.0), (28, 20_400.0, 5000.0)]
)
async def test_the_store_knows_how_far_a_run_under_way_has_come(
    at: float, elapsed_ms: float, ttfb_ms: float | None, autojump_clock: MockClock
) -> None:
    """Who ends it for a dead process tells that: also if there was nothing but a request that was sent."""
    async with open_keeping_world() as world:
        assert world.database is not None
        run = await start(world, ((3, (SENT,)), (5, text("Hello")), (9, text("you")), (FOREVER, ())))
        async with trio.open_nursery() as readers:
            readers.start_soon(read_live, world, run)
            await trio.sleep(at)
            found = await world.database.read(find_run, run.id)
            assert found is not None
            assert (found.status, found.usage) == ("running", None)
            assert await world.database.write(interrupt_runs, "2026-11-23T12:00:00.000000+00:00") == 1
            ended = await world.database.read(find_run, run.id)
            assert ended is not None
            assert (ended.usage, ended.elapsed_ms, ended.ttfb_ms) == (run.usage, elapsed_ms, ttfb_ms)
            run.stop()


async def test_what_is_new_of_all_runs_is_written_together_within_250_ms(autojump_clock: MockClock) -> None:
    database = troubled()
    async with open_keeping_world(database=database) as world:
        await trio.sleep(100)
        assert database.writes == [], "no timer while there is nothing to write"
        first, second = await start(world), await start(world)
        began = trio.current_time()
        async with trio.open_nursery() as readers:
            for run in (first, second, first):
                readers.start_soon(read_live, world, run)
        assert BATCH_SECONDS < 0.25
        times = [time for _, time in database.writes]
        assert times[0] == began + BATCH_SECONDS
        assert min(later - time for time, later in pairwise(times)) >= BATCH_SECONDS
        assert len(times) <= 4 / BATCH_SECONDS
        await trio.sleep(0.25)
        for run in (first, second):
            assert await stored(database, run.id) == list(range(1, run.log.last_seq + 1))
            row = await database.read(find_run, run.id)
            assert row is not None
            assert (row.status, row.terminal_seq, row.response) == ("done", run.log.last_seq, storable(run.response))
        count = len(database.writes)
        await trio.sleep(100)
        assert len(database.writes) == count
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline > 100


async def test_an_event_is_stored_at_most_250_ms_after_it_came(autojump_clock: MockClock) -> None:
    database = troubled()
    async with open_keeping_world(database=database) as world:
        run = await start(world)
        world.nursery.start_soon(read_live, world, run)
        seen: dict[int, float] = {}
        while not run.log.ended:
            for entry in run.log.entries(len(seen)):
                seen[entry.seq] = trio.current_time()
            late = [seq for seq, time in seen.items() if time + 0.25 < trio.current_time()]
            kept = await stored(database, run.id)
            assert set(late) <= set(kept)
            await trio.sleep(0.05)


async def test_what_comes_while_the_journal_writes_is_in_the_next_write(autojump_clock: MockClock) -> None:
    database = troubled()
    database.seconds = 0.15
    async with open_keeping_world(database=database) as world:
        run = await start(world, ((0, (SENT,)), (1, text("a")), (1 + BATCH_SECONDS + 0.05, text("b")), (20, ())))
        async with trio.open_nursery() as readers:
            readers.start_soon(read_live, world, run)
            await trio.sleep(5)
            assert (run.response, run.log.ended) == ("ab", False)
            assert await stored(database, run.id) == list(range(1, run.log.last_seq + 1))


async def test_a_large_backlog_goes_in_bounded_transactions(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.journal_batch.BATCH_BYTES", 2000)
    database = troubled()
    async with open_keeping_world(database=database) as world:
        runs = [await start(world) for _ in range(3)]
        async with trio.open_nursery() as readers:
            for run in runs:
                readers.start_soon(read_live, world, run)
            database.trouble = StoreUnavailableError("it is down")
            await trio.sleep(30)
            database.trouble = None
            count = len(database.writes)
        await trio.sleep(LAST_RETRY_SECONDS)
        assert len(database.writes) > count + 4
        for run in runs:
            assert await stored(database, run.id) == list(range(1, run.log.last_seq + 1))


async def recent_rows(database: Database) -> list[int]:
    """The numbers of the batches that are there batch by batch."""
    return list(await database.read(lambda c: c.execute(select(recent_events.c.number)).scalars().all()))


async def test_what_a_run_said_is_settled_after_a_time_also_if_it_is_quiet(autojump_clock: MockClock) -> None:
    database = troubled()
    async with open_keeping_world(database=database) as world:
        run = await start(world, ((0, (SENT,)), (1, text("a")), (2, text("b")), (2.5, text("c")), (25, ())))
        async with trio.open_nursery() as readers:
            readers.start_soon(read_live, world, run)
            await trio.sleep(3)
            assert await settled(database, run.id) == []
            assert len(await recent_rows(database)) == len(database.writes) == 4
            await trio.sleep(RECENT_SECONDS - 2.5)
            assert await settled(database, run.id) == list(range(1, run.log.last_seq + 1))
            assert await recent_rows(database) == []
            assert len(database.writes) == 5
            await trio.sleep(2)
            assert len(database.writes) == 5
        await trio.sleep(1)
        assert await settled(database, run.id) == list(range(1, run.log.last_seq + 1))


async def test_a_run_that_ends_at_once_is_settled_at_once(autojump_clock: MockClock) -> None:
    database = troubled()
    async with open_keeping_world(database=database) as world:
        run = await start(world, ((0, (SENT,)), (0.1, text("a"))))
        await read_live(world, run)
        await trio.sleep(BATCH_SECONDS)
        assert len(database.writes) == 1
        assert await settled(database, run.id) == list(range(1, run.log.last_seq + 1))


def talk(words: int) -> tuple[Line, ...]:
    """A kilobyte each tenth of a second."""
    return (0, (SENT,)), *((0.1 * number, text("x" * 1000)) for number in range(1, words + 1))


async def test_what_is_not_settled_is_bounded_however_long_a_run_talks(autojump_clock: MockClock) -> None:
    database = troubled()
    async with open_keeping_world(database=database) as world:
        quiet = await start(world, ((0, (SENT,)), (200, text("a"))))
        run = await start(world, talk(650))
        async with trio.open_nursery() as readers:
            for each in (run, quiet):
                readers.start_soon(read_live, world, each)
            most_rows = most_bytes = 0
            while run.log.last_seq < 600:
                await trio.sleep(1)
                first = (await settled(database, run.id) or [0])[-1]
                most_bytes = max(most_bytes, sum(len(entry.frame) for entry in run.log.entries(first)))
                most_rows = max(most_rows, len(await recent_rows(database)))
            assert SETTLED_BYTES / 2 < most_bytes < SETTLED_BYTES + 10_000
            assert RECENT_SECONDS / 2 < most_rows * BATCH_SECONDS * 1.5 < RECENT_SECONDS * 2
            readers.cancel_scope.cancel()
        quiet.stop()
        await trio.sleep(1)
        assert await recent_rows(database) == []


async def test_of_runs_that_talk_at_once_some_are_settled_at_a_time(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.journal_batch.SETTLING_BYTES", 1000)
    monkeypatch.setattr("server.journal.DROPPED_ROWS", 2)
    database = troubled()
    async with open_keeping_world(database=database) as world:
        runs = [await start(world, talk(100)) for _ in range(6)]
        at_once: list[int] = []
        rows = before = 0
        async with trio.open_nursery() as readers:
            for run in runs:
                readers.start_soon(read_live, world, run)
            while not any(run.log.ended for run in runs):
                await trio.sleep(BATCH_SECONDS)
                now = sum([bool(await settled(database, run.id)) for run in runs])
                at_once.append(now - before)
                before = now
                there = len(await recent_rows(database))
                assert there >= rows - 2
                rows = there
        assert (max(at_once), sum(at_once)) == (1, 6)
        await trio.sleep(1)
        for run in runs:
            assert await settled(database, run.id) == list(range(1, run.log.last_seq + 1))
        assert await recent_rows(database) == []


async def test_what_was_said_by_a_forgotten_run_is_gone_after_a_time_while_others_talk(
    autojump_clock: MockClock,
) -> None:
    database = troubled()
    async with open_keeping_world(database=database) as world:
        other, run = await start(world, talk(400)), await start(world)
        async with trio.open_nursery() as readers:
            readers.start_soon(read_live, world, other)
            await trio.sleep(2)
            await Caller(world).gone("DELETE", f"/runs/{run.id}")
            await trio.sleep(RECENT_SECONDS + 1)
            assert not other.log.ended
            assert await stored(database, run.id) == []


# Trouble with the store


@pytest.mark.parametrize("seconds", [0.0, 2.0], ids=["down", "slow and down"])
async def test_a_store_that_is_away_for_a_while_loses_nothing_and_holds_nobody(
    seconds: float, autojump_clock: MockClock
) -> None:
    database = troubled()
    async with open_keeping_world(database=database, retention=FORGET_AT_ONCE) as world:
        database.trouble, database.seconds = StoreUnavailableError("it is down"), seconds
        with structlog.testing.capture_logs() as logged:
            run = await start(world)
            began = trio.current_time()
            assert await read_live(world, run) == frames(run)
            assert trio.current_time() == pytest.approx(began + 3.9)
            await trio.sleep(60)
            assert await stored(database, run.id) == []
            assert world.supervisor.find(run.id) is None
            assert await read_live(world, run) == frames(run), "the journal still holds what memory has dropped"
            database.trouble, database.seconds = None, 0.0
            await trio.sleep(LAST_RETRY_SECONDS)
        assert await stored(database, run.id) == list(range(1, run.log.last_seq + 1))
        assert [line["event"] for line in logged if line["log_level"] == "warning"] == ["journal.behind"]
        assert "journal.caught_up" in [line["event"] for line in logged]
        assert len(database.writes) < 20, "it asks less and less often"


async def test_what_memory_cannot_hold_any_more_is_lost_and_logged(autojump_clock: MockClock) -> None:
    database = troubled()
    async with open_keeping_world(database=database) as world:
        journal = Journal(database, RetentionLimits(runs=2))
        supervisor = RunSupervisor(world.runs, LogFollowers(journal), FORGET_AT_ONCE)
        world.nursery.start_soon(journal.work)
        database.trouble = StoreUnavailableError("it is down")
        world.add_agent(provider=ScriptedProvider((0, (SENT,)), (1, text("hi"))))
        spec = world.agents["demo"].run_spec("hi")
        with structlog.testing.capture_logs() as logged:
            runs = [supervisor.start(spec) for _ in range(5)]
            await trio.sleep(100)
        lost = [line["run_id"] for line in logged if line["event"] == "journal.lost"]
        assert len(set(lost)) == len(lost) == journal.lost_runs == 3
        held = {run.id for run in runs if journal.find(run.id) is run}
        assert held == {run.id for run in runs} - set(lost)


async def test_events_that_the_store_refuses_keep_no_others_from_it(autojump_clock: MockClock) -> None:
    database = troubled()
    async with open_keeping_world(database=database) as world:
        bad, good = await start(world), await start(world)
        database.refused = frozenset([bad.id])
        with structlog.testing.capture_logs() as logged:
            assert await read_live(world, good) == frames(good)
            await trio.sleep(1)
        assert await stored(database, good.id) == list(range(1, good.log.last_seq + 1))
        assert [line["run_id"] for line in logged if line["event"] == "journal.lost"] == [bad.id]
        assert bad.log.ended


async def test_flush_writes_what_is_left_and_has_a_limit(autojump_clock: MockClock) -> None:
    database = troubled()
    async with open_keeping_world(database=database) as world:
        journal = Journal(database)
        supervisor = RunSupervisor(world.runs, LogFollowers(journal))
        world.add_agent(provider=ScriptedProvider((0, (SENT,)), (1, text("hi"))))
        supervisor.start(world.agents["demo"].run_spec("hi"))
        await trio.sleep(2)
        database.trouble = StoreUnavailableError("it is down")
        with structlog.testing.capture_logs() as logged:
            assert not await journal.flush(3)
        assert trio.current_time() == 5
        assert [line["event"] for line in logged if line["log_level"] == "error"] == ["journal.lost"]
        database.trouble = None
        assert await journal.flush(3)
        assert trio.current_time() == 5


# Read from the store


async def ended_and_dropped(world: World) -> Run:
    """A run that was read live, and that memory does not have any more."""
    run = await start(world)
    assert await read_live(world, run) == frames(run)
    await trio.sleep(1)
    assert world.supervisor.find(run.id) is None
    assert world.run_journal is not None
    assert world.run_journal.find(run.id) is None
    return run


async def test_the_journals_bytes_are_the_live_ones_from_any_event_on(autojump_clock: MockClock) -> None:
    async with open_keeping_world(retention=FORGET_AT_ONCE) as world:
        run = await ended_and_dropped(world)
        for after in range(run.log.last_seq):
            response = await world.client.get(events_url(run), params={"after": str(after)})
            assert response.status_code == 200
            assert response.content == frames(run, after)
            assert response.headers["X-Run-Id"] == run.id
            assert response.headers["X-Session-Id"] == run.spec.owner.session_id
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            headers = {"Last-Event-ID": f"{run.id}.{after}"}
            assert (await world.client.get(events_url(run), headers=headers)).content == frames(run, after)
        assert (await world.client.get(f"{events_url(run)}?after={run.log.last_seq}")).status_code == 204


async def test_cursors_mean_the_same_in_the_journal(autojump_clock: MockClock) -> None:
    async with open_keeping_world(retention=FORGET_AT_ONCE) as world:
        run, other = await ended_and_dropped(world), await ended_and_dropped(world)
        ahead = run.log.last_seq + 1
        for query in (f"?after={ahead}", "?after=x", "?after=1&after=2", "?after="):
            refusal = await world.client.get(events_url(run) + query)
            assert (refusal.status_code, refusal.json()["code"]) == (400, "INVALID_CURSOR")
        for event_id in (f"{other.id}.1", f"{run.id}.{ahead}", "x", f"{run.id}."):
            refusal = await world.client.get(events_url(run), headers={"Last-Event-ID": event_id})
            assert (refusal.status_code, refusal.json()["code"]) == (400, "INVALID_CURSOR")
        assert (await world.client.get(f"{API}/runs/{'x' * 22}/events")).status_code == 404


async def test_several_readers_of_the_journal_at_once(autojump_clock: MockClock) -> None:
    async with open_keeping_world(retention=FORGET_AT_ONCE) as world:
        run = await ended_and_dropped(world)
        bodies: list[bytes] = []

        async def read() -> None:
            bodies.append(await read_live(world, run))

        async with trio.open_nursery() as readers:
            for _ in range(8):
                readers.start_soon(read)
        assert set(bodies) == {frames(run)}


async def test_state_stop_and_forget_of_a_run_in_the_journal(autojump_clock: MockClock) -> None:
    async with open_keeping_world(retention=FORGET_AT_ONCE) as world:
        run = await ended_and_dropped(world)
        caller = Caller(world)
        state = await caller.data("GET", f"/runs/{run.id}")
        assert (state["status"], state["last_seq"], state["response"]) == (
            "done",
            run.log.last_seq,
            run.response,
        )
        assert state["terminal"]["chunk_type"] == "done"
        assert (await caller.data("POST", f"/runs/{run.id}/stop")) == state
        assert await read_live(world, run) == frames(run)
        await caller.gone("DELETE", f"/runs/{run.id}")
        refusal = await caller.refused(410, "GET", f"/runs/{run.id}/events")
        assert refusal["details"] == {"run_id": run.id, "status": "done", "state": f"/api/v1/runs/{run.id}"}
        after = await caller.data("GET", f"/runs/{run.id}")
        assert after == state | {"last_seq": 0, "terminal": None, "response": ""}
        assert await caller.data("POST", f"/runs/{run.id}/stop") == after
        await caller.gone("DELETE", f"/runs/{run.id}")


async def test_a_run_that_is_forgotten_while_it_goes_on_leaves_nothing(autojump_clock: MockClock) -> None:
    database = troubled()
    async with open_keeping_world(database=database) as world:
        run = await start(world)
        await trio.sleep(2)
        assert await stored(database, run.id)
        await Caller(world).gone("DELETE", f"/runs/{run.id}")
        assert run.log.ended
        await trio.sleep(5)
        assert await stored(database, run.id) == []
        await Caller(world).refused(410, "GET", f"/runs/{run.id}/events")


async def test_another_users_run_in_the_journal_is_not_there(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER, retention=FORGET_AT_ONCE) as world:
        ada = Caller(world, await world.add_key("acme", "ada"))
        bob = Caller(world, await world.add_key("acme", "bob"))
        run_id = (await ada.chat("helper"))["run_id"]
        await trio.sleep(1)
        await ada.ask("GET", f"/runs/{run_id}/events")
        for gone in (False, True):
            if gone:
                await ada.gone("DELETE", f"/runs/{run_id}")
            await bob.refused(404, "GET", f"/runs/{run_id}")
            await bob.refused(404, "GET", f"/runs/{run_id}/events")
            await bob.refused(404, "POST", f"/runs/{run_id}/stop")
            await bob.refused(404, "DELETE", f"/runs/{run_id}")


async def test_a_store_that_does_not_answer_is_503_and_not_404(autojump_clock: MockClock) -> None:
    database = troubled()
    async with open_keeping_world(database=database, retention=FORGET_AT_ONCE) as world:
        run = await ended_and_dropped(world)

        async def fail(*_: object) -> None:
            raise StoreUnavailableError("it is down")

        database.read = fail  # type: ignore[assignment, method-assign]
        refusal = await world.client.get(events_url(run))
        assert (refusal.status_code, refusal.headers["Retry-After"]) == (503, "5")


async def test_a_run_of_another_process_is_503_with_its_state(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        run = await start(world)
        stranger = Caller(world)
        elsewhere = world.supervisor.find
        world.supervisor.find = lambda _: None  # type: ignore[method-assign, assignment]
        await stranger.refused(503, "GET", f"/runs/{run.id}/events")
        assert (await stranger.data("GET", f"/runs/{run.id}"))["status"] == "running"
        world.supervisor.find = elsewhere  # type: ignore[method-assign]


async def test_a_reader_whose_events_are_dropped_meanwhile_sees_a_broken_transport(
    autojump_clock: MockClock,
) -> None:
    async with open_keeping_world(retention=FORGET_AT_ONCE) as world:
        big: tuple[Line, ...] = ((0, (SENT,)), *((1 + number, text("x" * 60_000)) for number in range(20)))
        run = await start(world, big)
        await read_live(world, run)
        await trio.sleep(1)
        received = b""
        async with world.client.stream("GET", events_url(run)) as response:
            body = response.extensions["body"]
            received += await body.receive()
            await Caller(world).gone("DELETE", f"/runs/{run.id}")

            async def read_on() -> bytes:
                return b"".join([part async for part in iter_body(body)])

            with pytest.raises(httpx.TransportError):
                received += await read_on()
        assert b'"chunk_type":"done"' not in received


async def test_a_whole_answer_after_memory_has_dropped_its_run(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER, retention=FORGET_AT_ONCE) as world:
        caller = Caller(world)
        headers = {"Idempotency-Key": "once"}
        url = "/agents/helper/chat/lumosai"
        first = await caller.data("POST", url, json={"message": "hi"}, headers=headers)
        await trio.sleep(1)
        assert world.supervisor.find(first["run_id"]) is None
        assert await caller.data("POST", url, json={"message": "hi"}, headers=headers) == first


async def test_the_sweep_drops_what_is_too_old(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.journal.SWEEP_SECONDS", 3600.0)
    database = troubled()
    async with open_keeping_world(database=database, retention=FORGET_AT_ONCE) as world:
        assert world.run_journal is not None
        world.nursery.start_soon(world.run_journal.sweep, 0.25)
        run = await start(world, ((0, (SENT,)), (1, text("hi"))))
        await trio.sleep(5 * 3600)
        assert await read_live(world, run) == frames(run)
        old = (world.wall_clock() - timedelta(hours=6)).isoformat(timespec="microseconds")
        await database.write(make_older, run.id, old)
        await trio.sleep(2 * 3600)
        assert await stored(database, run.id) == []
        await Caller(world).refused(410, "GET", f"/runs/{run.id}/events")
        assert (await Caller(world).data("GET", f"/runs/{run.id}"))["response"] == "hi"


def make_older(c: Connection, run_id: str, created_at: str) -> None:
    """Let the run have begun then."""
    c.execute(update(runs).where(runs.c.run_id == run_id).values(created_at=created_at))
