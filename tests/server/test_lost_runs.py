"""The end of a dead worker's run is one and the same in Redis and in the store, whichever of them is away meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest
import trio

from engine import Error, GenerationComplete, Run
from engine.events import data_of
from engine.log import LogEntry
from server import leases
from server.leases import LOST_SEQ, UNSETTLED_SEQ, KnownEvents
from server.store.database import Database
from server.store.errors import StoreUnavailableError
from server.store.interrupted import Ending, end_run, interrupt_runs
from server.store.run_events import NewEvents, add_events, page_of_events, terminal_seq_of
from server.store.turns import begin_run, save_turn
from tests.harness.redis import RedisServer
from tests.server.shared_scene import LONG, Scene, Script, Worker, eventually, open_scene, read_to_end, read_until, said
from tests.server.store.scene import SCOPE, at, turn

WORDS = ("half ", "an ", "answer")


class Store:
    """The store that all workers have.

    Attributes:
        away: whether it answers.
        asked: how often it was asked to keep an end.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.away = False
        self.asked = 0

    async def settle(self, run_id: str, known: KnownEvents) -> Ending | None:
        """As the composition has it."""
        self.asked += 1
        await trio.lowlevel.checkpoint()
        if self.away:
            raise StoreUnavailableError("away")
        return await self.database.write(end_run, run_id, "worker_lost", at(9), known)

    async def events(self, run_id: str) -> list[tuple[int, bytes]]:
        """What it has of the run, to its end."""
        page = await self.database.read(page_of_events, run_id, 0)
        last = await self.database.read(terminal_seq_of, run_id)
        assert page
        assert page[-1][0] == last
        return [(seq, event.encode()) for seq, event in page]


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    database = Database.open("sqlite://", inline=True)
    yield Store(database)
    database.close()


def bytes_of(entries: Sequence[LogEntry]) -> list[tuple[int, bytes]]:
    """Numbers and JSON, as they are on the wire."""
    return [(entry.seq, data_of(entry.frame)) for entry in entries]


async def heir_in(scene: Scene, store: Store, name: str = "heir") -> Worker:
    """A worker that ends what others leave."""
    worker = await scene.worker(name)
    worker.shared.settle_with(store.settle)
    return worker


async def run_in(one: Worker, two: Worker, store: Store, journalled: int) -> Run:
    """A run that Redis has whole so far, and the store only so many events of."""
    script = Script()
    run = one.start(script)
    assert await store.database.write(begin_run, SCOPE, "session", run.id, None, at(1))
    script.say(*WORDS)
    remote = await two.find(run.id)
    with remote.log.attached():
        await read_until(remote.log, lambda entries: said(entries) == "".join(WORDS))
    await journal(store, run.log.entries(0, journalled), run.id)
    return run


async def journal(store: Store, entries: Sequence[LogEntry], run_id: str, terminal: int | None = None) -> None:
    events = [(seq, event.decode()) for seq, event in bytes_of(entries)]
    await store.database.write(add_events, [NewEvents(run_id, events, terminal)])


async def test_redis_and_the_store_have_the_same_bytes(redis_server: RedisServer, store: Store) -> None:
    async with open_scene(redis_server) as scene:
        one, heir = await scene.worker("one"), await heir_in(scene, store)
        run = await run_in(one, heir, store, journalled=2)
        before = run.log.entries()
        one.die()
        remote = await heir.find(run.id)
        entries = await read_to_end(remote.log)
        end = entries[-1]
        assert (entries[:-1], end.seq) == (before, LOST_SEQ)
        assert isinstance(end.event, Error)
        assert (end.event.code, end.event.response) == ("worker_lost", "half an answer")
        assert await store.events(run.id) == bytes_of(entries)
        view = (await heir.find(run.id)).view()
        assert (view.status, view.usage) == ("error", end.event.usage)
        assert await store.database.write(interrupt_runs, at(10)) == 0


async def test_an_answer_whose_end_only_the_store_has_is_whole(redis_server: RedisServer, store: Store) -> None:
    async with open_scene(redis_server) as scene:
        one, heir = await scene.worker("one"), await heir_in(scene, store)
        run = await run_in(one, heir, store, journalled=2)
        done = GenerationComplete("half an answer", 1, 9.0, 1.0, None)
        await store.database.write(save_turn, turn(run.id, response="half an answer"), at(2))
        one.die()
        entries = await read_to_end((await heir.find(run.id)).log)
        assert isinstance(entries[-1].event, GenerationComplete)
        assert entries[-1].event.response == done.response
        assert (await heir.find(run.id)).view().status == "done"
        assert await store.events(run.id) == bytes_of(entries)


async def test_an_heir_of_the_heir_writes_the_same_end(redis_server: RedisServer, store: Store) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        run = await run_in(one, two, store, journalled=1)

        settled = trio.Event()

        async def settle_and_die(run_id: str, known: KnownEvents) -> Ending | None:
            await store.settle(run_id, known)
            two.die()
            settled.set()
            return await trio.sleep_forever()

        two.shared.settle_with(settle_and_die)
        one.die()
        with trio.fail_after(LONG):
            await settled.wait()
        kept = await store.events(run.id)
        heir = await heir_in(scene, store)
        entries = await read_to_end((await heir.find(run.id)).log)
        assert bytes_of(entries) == kept == await store.events(run.id)


async def test_while_the_store_is_away_redis_ends_the_run_and_the_store_gets_that_end(
    redis_server: RedisServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(leases, "SETTLE_LATER_SECONDS", 0.05)
    async with open_scene(redis_server) as scene:
        one, heir = await scene.worker("one"), await heir_in(scene, store)
        run = await run_in(one, heir, store, journalled=2)
        store.away = True
        one.die()
        entries = await read_to_end((await heir.find(run.id)).log)
        assert entries[-1].seq == UNSETTLED_SEQ
        assert store.asked > 1
        store.away = False

        async def kept() -> object:
            return await store.database.read(terminal_seq_of, run.id)

        await eventually(kept)
        assert await store.events(run.id) == bytes_of(entries)


async def test_an_end_that_the_store_never_took_has_another_number_than_the_stores_own(
    redis_server: RedisServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.0)
    async with open_scene(redis_server) as scene:
        one, heir = await scene.worker("one"), await heir_in(scene, store)
        run = await run_in(one, heir, store, journalled=2)
        store.away = True
        one.die()
        entries = await read_to_end((await heir.find(run.id)).log)
        assert await store.database.write(interrupt_runs, at(10)) == 1
        in_redis, in_store = dict(bytes_of(entries)), dict(await store.events(run.id))
        assert in_store.keys() - in_redis.keys() == {LOST_SEQ}
        assert all(in_redis[seq] == in_store[seq] for seq in in_redis.keys() & in_store.keys())


async def test_a_store_that_hangs_does_not_stop_the_heirs_heart(redis_server: RedisServer, store: Store) -> None:
    async with open_scene(redis_server) as scene:
        one, heir = await scene.worker("one"), await scene.worker("heir")
        run = await run_in(one, heir, store, journalled=2)
        asked = trio.Event()

        async def hang(run_id: str, known: KnownEvents) -> Ending | None:
            asked.set()
            return await trio.sleep_forever()

        heir.shared.settle_with(hang)
        one.die()
        await asked.wait()
        name, beat = heir.shared.worker, await heir.shared._link.ask("HGET", "lumos:workers", heir.shared.worker)

        async def beats_on() -> bool:
            return int(await heir.shared._link.ask("HGET", "lumos:workers", name)) > int(beat) + 4

        await eventually(beats_on)
        assert not (await heir.find(run.id)).log.ended
