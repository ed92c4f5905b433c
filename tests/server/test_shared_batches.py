"""Batches at any worker: the same bytes, read on, stopped, forgotten and ended anywhere, by a real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import httpx
import msgspec
import pytest
import trio

from engine import AgentStopped, BasicAgent, Error, LogEntry, Run
from engine.log import EventLog
from providers.http import open_client
from server import remote_log, shared_log
from server.app import create_app
from server.batch_log import Batch, BatchComplete, BatchedRun, BatchLog, BatchRefusal, BatchStarted
from server.batches import BatchHandle
from server.compose import base_url
from server.leases import LOST_SEQ, KnownEvents
from server.principal import LOCAL_USER
from server.run_directory import SourceUnavailableError
from server.run_uploads import BYTES_AT_ONCE, SharedLimits
from server.services import Services
from server.serving import serve
from server.shared_scripts import events_key
from server.sockets import listen_tcp
from server.store.database import Database
from tests.engine.scripted import ScriptedProvider, text
from tests.harness.redis import RedisServer
from tests.server.shared_scene import (
    LONG,
    Scene,
    Script,
    Worker,
    eventually,
    frames,
    open_scene,
    read_to_end,
    read_until,
)

BATCH_ID = "b" * 22


def services(worker: Worker, agents: Mapping[str, BasicAgent] | None = None, **options: Any) -> Services:
    return Services(agents or {}, worker.supervisor, sources=(worker.shared,), shared_log=worker.shared, **options)


@dataclass
class Party:
    """Two workers, the first with a batch of two runs, the second of which is told of one that was not started."""

    one: Worker
    two: Worker
    scripts: tuple[Script, Script]
    runs: list[Run]
    local: BatchLog

    async def elsewhere(self) -> BatchHandle:
        """The batch at the second worker."""
        return await found(self.two)

    async def elsewhere_log(self) -> EventLog:
        return log_of(await self.elsewhere())

    def end(self) -> None:
        for script in self.scripts:
            script.end()


async def found(worker: Worker) -> BatchHandle:
    """The batch, once Redis knows of it."""
    await eventually(lambda: worker.shared.find_batch(BATCH_ID))
    batch = await services(worker).batches.find(BATCH_ID)
    assert batch is not None
    return batch


def log_of(batch: BatchHandle) -> EventLog:
    assert batch.log is not None
    return batch.log


async def open_party(scene: Scene, grace: float = 60.0) -> Party:
    one, two = await scene.worker("one"), await scene.worker("two")
    scripts = (Script(), Script())
    runs = [one.start(script, grace) for script in scripts]
    batched = tuple(BatchedRun(index, run.id, "agent", "session") for index, run in enumerate(runs))
    owner = (LOCAL_USER.tenant_id, LOCAL_USER.user_id)
    refusals = [BatchRefusal(2, "nobody", "NOT_FOUND", "there is none")]
    batch = Batch(BATCH_ID, owner, BatchStarted(BATCH_ID, "now", batched), refusals)
    log = services(one).batches.add(batch, runs).log
    assert isinstance(log, BatchLog)
    return Party(one, two, scripts, runs, log)


@asynccontextmanager
async def party_in(redis: RedisServer, grace: float = 60.0, limits: SharedLimits | None = None) -> AsyncIterator[Party]:
    async with open_scene(redis, limits) as scene:
        yield await open_party(scene, grace)


def words(entries: Sequence[LogEntry]) -> bytes:
    return frames(list(entries))


# Read


async def test_a_batch_elsewhere_is_the_same_bytes_from_any_number_on(redis_server: RedisServer) -> None:
    async with party_in(redis_server) as party:
        left, right = party.scripts
        read: dict[str, list[LogEntry]] = {}

        async def reader(name: str, log: EventLog) -> None:
            read[name] = await read_to_end(log)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader, "here", party.local)
            nursery.start_soon(reader, "there", await party.elsewhere_log())
            for number in range(20):
                (left if number % 3 else right).say(f"Grüße {number} \n\n")
            party.end()
        assert words(read["here"]) == words(read["there"])
        assert [entry.seq for entry in read["there"]] == list(range(1, party.local.last_seq + 1))
        assert read["there"][-1].frame.count(b'"batch_done"') == 1
        log = await party.elsewhere_log()
        for after in range(party.local.last_seq + 1):
            assert words(await read_to_end(log, after)) == words(read["here"][after:])


async def test_each_word_comes_live_and_readers_elsewhere_count(redis_server: RedisServer) -> None:
    async with party_in(redis_server, grace=0.0) as party:
        log = await party.elsewhere_log()
        with log.attached():
            await eventually(lambda: all(run.log.readers for run in party.runs))
            seen = 0
            for script, word in zip(party.scripts * 2, "abcd", strict=True):
                script.say(word)
                entries = await read_until(log, lambda entries, w=word: _says(entries, w), seen)  # type: ignore[misc]
                seen = entries[-1].seq
            assert not any(run.log.ended for run in party.runs)
        with trio.fail_after(LONG):  # noqa: ASYNC912 - they may have ended
            for run in party.runs:
                await run.log.wait_ended()
        assert [type(run.log.terminal) for run in party.runs] == [AgentStopped, AgentStopped]
        end = (await read_to_end(await party.elsewhere_log()))[-1]
        assert cast(object, end.event) == party.local._batch.complete


def _says(entries: Sequence[LogEntry], word: str) -> bool:
    return any(f'"content":"{word}"'.encode() in entry.frame for entry in entries)


async def test_a_large_batch_is_written_whole(redis_server: RedisServer) -> None:
    async with party_in(redis_server) as party:
        for script in party.scripts:
            script.say(*(f"{number} " + "x" * 500 for number in range(900)))
            script.end()
        with party.local.attached():
            here = await read_to_end(party.local)
        assert party.local.size_bytes > 3 * BYTES_AT_ONCE
        assert words(await read_to_end(await party.elsewhere_log())) == words(here)


# State and stop


async def test_its_state_elsewhere_follows_its_runs(redis_server: RedisServer) -> None:
    async with party_in(redis_server) as party:
        batch = await party.elsewhere()
        assert batch.statuses() == ["running", "running"]
        assert [run.run_id for run in batch.runs] == [run.id for run in party.runs]
        assert [refusal.index for refusal in batch.refusals] == [2]
        party.scripts[1].end()

        async def second_done() -> bool:
            return (await party.elsewhere()).statuses() == ["running", "done"]

        await eventually(second_done)
        party.end()
        await read_to_end(await party.elsewhere_log())
        assert (await party.elsewhere()).statuses() == ["done", "done"]
        assert (await party.elsewhere()).last_seq == party.local.last_seq


async def test_a_stop_elsewhere_stops_all_of_it(redis_server: RedisServer) -> None:
    async with party_in(redis_server) as party:
        for script in party.scripts:
            script.say("word")
        batch = await party.elsewhere()
        await batch.stop()
        assert batch.statuses() == ["stop", "stop"]
        assert log_of(batch).ended
        assert [type(run.log.terminal) for run in party.runs] == [AgentStopped, AgentStopped]
        await batch.stop()


async def test_of_a_batch_that_is_gone_a_stop_elsewhere_stops_the_runs_that_are_left(redis_server: RedisServer) -> None:
    """Found by the simulation, seed 10371."""
    async with party_in(redis_server) as party:
        await party.elsewhere()
        await services(party.one).runs.local(party.runs[0]).forget()
        batch = await party.elsewhere()
        assert batch.log is None
        await batch.stop()
        assert isinstance(party.runs[1].log.terminal, AgentStopped)
        await batch.stop()


# Gone


async def test_a_batch_is_no_run_and_a_run_no_batch(redis_server: RedisServer) -> None:
    async with party_in(redis_server) as party:
        await party.elsewhere()
        for worker in (party.one, party.two):
            assert await worker.shared.find(BATCH_ID) is None
            assert await worker.shared.find_batch(party.runs[0].id) is None


@pytest.mark.parametrize("at", ["one", "two"])
async def test_who_forgets_a_run_forgets_its_batch(
    at: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_log, "FORGETTING_MILLISECONDS", 100)
    monkeypatch.setattr(shared_log, "LONGEST_PAUSE_SECONDS", 0.0)
    async with party_in(redis_server) as party:
        log = await party.elsewhere_log()
        with log.attached():
            handle = await services(party.one if at == "one" else party.two).runs.find(party.runs[0].id)
            assert handle is not None
            await handle.forget()
            await eventually(lambda: party.one.supervisor.find(party.runs[0].id) is None)
            local = await services(party.one).batches.find(BATCH_ID)
            assert local is not None
            assert local.log is None
            party.scripts[1].say("still there")
            with pytest.raises(trio.BrokenResourceError):
                await read_to_end(log)
        assert (await party.elsewhere()).log is None
        assert not party.runs[1].log.ended
        await eventually(lambda: party.one.shared.uploads.batch(BATCH_ID) is None)

        async def dropped() -> bool:
            return not await party.two.shared._link.ask("EXISTS", events_key(BATCH_ID))

        await eventually(dropped)


async def test_it_is_there_as_long_as_all_of_its_runs(redis_server: RedisServer) -> None:
    async with party_in(redis_server, limits=SharedLimits(lease=0.6, retention=0.5)) as party:
        batch = await party.elsewhere()
        assert batch.log is not None
        party.scripts[0].end()

        async def gone() -> bool:
            return (await party.elsewhere()).log is None

        await eventually(gone)
        assert not party.runs[1].log.ended


async def test_who_reads_it_elsewhere_when_a_run_is_not_kept_any_more_reads_on(redis_server: RedisServer) -> None:
    """Found by the simulation, seed 107075: who asked for the batch then cut off all who read it at that worker."""
    async with party_in(redis_server, limits=SharedLimits(lease=0.6, retention=0.5)) as party:
        log = await party.elsewhere_log()
        with log.attached():
            party.scripts[0].end()

            async def gone() -> bool:
                return (await party.elsewhere()).log is None

            await eventually(gone)
            party.scripts[1].end()
            assert b'"batch_done"' in words(await read_to_end(log))


# Lost, and Redis away


async def test_a_dead_workers_batch_ends_with_one_error_for_all_readers(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        party = await open_party(scene)
        three = await scene.worker("three")
        lost: list[str] = []

        async def settle(run_id: str, known: KnownEvents) -> None:
            assert known, "what Redis has of it"
            lost.append(run_id)

        for worker in (party.two, three):
            worker.shared.settle_with(settle)
        read: list[list[LogEntry]] = []

        async def reader(worker: Worker) -> None:
            read.append(await read_to_end(log_of(await found(worker))))

        log = await party.elsewhere_log()
        with log.attached():
            party.scripts[0].say("word")
            await read_until(log, lambda entries: _says(entries, "word"))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader, party.two)
                nursery.start_soon(reader, three)
                await trio.testing.wait_all_tasks_blocked(0.01)
                party.one.die()
        assert words(read[0]) == words(read[1])
        ids = [entry.seq for entry in read[0]]
        assert ids == [*range(1, len(ids)), LOST_SEQ]
        assert read[0][-1].event == Error("worker_lost", "the worker of this batch is gone")
        await eventually(lambda: sorted(lost) == sorted(run.id for run in party.runs))
        assert words(await read_to_end(log_of(await found(three)), LOST_SEQ - 1)) == words(read[0][-1:])
        states = await _state(three)
        assert [run["status"] for run in states["runs"]] == ["error", "error"]


async def _state(worker: Worker) -> Any:
    async with _served(worker) as (client, url):
        return (await client.get(f"{url}/api/v1/batch/{BATCH_ID}")).json()["data"]


@asynccontextmanager
async def _served(worker: Worker, **options: Any) -> AsyncIterator[tuple[httpx.AsyncClient, str]]:
    listeners = listen_tcp("127.0.0.1", 0)
    async with trio.open_nursery() as nursery, open_client() as client:
        await nursery.start(serve, create_app(services(worker, **options)), listeners, trio.Event())
        yield client, base_url(listeners[0])
        nursery.cancel_scope.cancel()


async def test_a_worker_that_comes_back_has_no_batch_any_more(redis_server: RedisServer) -> None:
    async with party_in(redis_server) as party:
        await party.elsewhere()
        party.one.shared._leases.on_buried()
        assert party.one.shared.uploads.batch(BATCH_ID) is None
        assert [cast(Error, run.log.terminal).code for run in party.runs] == ["worker_lost", "worker_lost"]


@pytest.mark.parametrize("keeps_its_data", [True, False])
async def test_a_batch_goes_on_while_redis_is_away_and_heals(keeps_its_data: bool, redis_server: RedisServer) -> None:
    async with party_in(redis_server) as party:
        shares = (party.one.shared, party.two.shared)
        log = await party.elsewhere_log()
        read: list[LogEntry] = []

        async def reader() -> None:
            read.extend(await read_to_end(log))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            party.scripts[0].say("before")
            await read_until(log, lambda entries: _says(entries, "before"))
            redis_server.kill()
            await eventually(lambda: not any(shared.available for shared in shares))
            with pytest.raises(SourceUnavailableError):
                await services(party.two).batches.find(BATCH_ID)
            party.scripts[1].say("meanwhile")
            with party.local.attached():
                await read_until(party.local, lambda entries: _says(entries, "meanwhile"))
            if not keeps_its_data:
                redis_server.lose_everything()
            redis_server.start()
            await eventually(lambda: all(shared.available for shared in shares))
            party.end()
        assert isinstance(cast(object, party.local._batch.complete), BatchComplete)
        assert words(read) == words(party.local.entries())


async def test_over_http_another_worker_answers_as_its_own_would(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_log, "OUTAGE_SECONDS", 0.3)
    async with party_in(redis_server) as party, _served(party.two) as (client, url):
        await party.elsewhere()
        path = f"{url}/api/v1/batch/{BATCH_ID}"
        assert (await client.get(f"{url}/api/v1/runs/{BATCH_ID}")).status_code == 404
        assert (await client.get(f"{url}/api/v1/batch/{party.runs[0].id}")).status_code == 404
        state = (await client.post(f"{path}/stop")).json()["data"]
        assert (state["status"], [run["status"] for run in state["runs"]]) == ("done", ["stop", "stop"])
        assert [one["index"] for one in state["refused"]] == [2]
        assert (await client.get(f"{path}/events")).content == words(party.local.entries())
        last = {"Last-Event-ID": f"{BATCH_ID}.{party.local.last_seq}"}
        body = {"requests": [{"agent_id": "agent", "message": "hi"}]}
        assert (await client.get(f"{path}/events", headers=last)).status_code == 204
        assert (await client.post(f"{url}/api/v1/batch/stream", json=body, headers=last)).status_code == 204
        ahead = {"Last-Event-ID": f"{BATCH_ID}.{party.local.last_seq + 1}"}
        assert (await client.get(f"{path}/events", headers=ahead)).status_code == 400
        redis_server.kill()
        await eventually(lambda: not party.two.shared.available)
        away = await client.get(f"{path}/events")
        assert (away.status_code, away.headers["Retry-After"]) == (503, "5")


async def test_a_key_is_one_batch_at_any_worker(redis_server: RedisServer) -> None:
    agents = {"quick": BasicAgent(agent_id="quick", provider=ScriptedProvider((0, text("hello"))), model="m")}
    database = Database.open("sqlite://", inline=True)
    body = {"requests": [{"agent_id": "quick", "message": "hi"}] * 2, "on_disconnect": "continue"}
    key = {"Idempotency-Key": "once"}
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        kept = {"agents": agents, "database": database}
        async with _served(one, **kept) as (client, here), _served(two, **kept) as (_, there):
            first = await client.post(f"{here}/api/v1/batch/stream", json=body, headers=key)
            again = await client.post(f"{there}/api/v1/batch/stream", json=body, headers=key)
            assert (again.status_code, again.content) == (200, first.content)
            other = await client.post(
                f"{there}/api/v1/batch/stream", json=body | {"on_disconnect": "grace"}, headers=key
            )
            assert (other.status_code, other.json()["code"]) == (422, "IDEMPOTENCY_KEY_REUSED")
            run_id = msgspec.json.decode(first.content.partition(b"data: ")[2].partition(b"\n")[0])["runs"][1]["run_id"]
            assert (await client.delete(f"{there}/api/v1/runs/{run_id}")).status_code == 204
            await eventually(lambda: one.supervisor.find(run_id) is None)
            for url in (here, there):
                gone = await client.post(f"{url}/api/v1/batch/stream", json=body, headers=key)
                assert (gone.status_code, gone.json()["details"]["batch_id"]) == (410, first.headers["X-Batch-Id"])
    database.close()
