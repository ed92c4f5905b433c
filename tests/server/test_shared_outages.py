"""Redis away, in the middle of it all: a worker's own runs go on, others' wait, and everything heals; nothing twice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest
import trio
import trio.testing

from engine import BasicAgent, Emit, GenerationComplete, Run
from engine.run import FIRST_READER_SECONDS
from providers.http import open_client
from server import remote_log, run_uploads, shared_log
from server.app import create_app
from server.compose import base_url
from server.run_directory import SourceUnavailableError
from server.services import Services
from server.serving import serve
from server.shared_log import KNOWN_SECONDS
from server.sockets import listen_tcp
from tests.engine.scripted import ProgrammedProvider
from tests.harness.redis import RedisServer
from tests.server.shared_scene import (
    LEASE,
    LONG,
    Script,
    Worker,
    eventually,
    frames,
    open_scene,
    read_to_end,
    read_until,
    said,
)


async def _wait_available(*workers: Worker, available: bool = True) -> None:
    await eventually(lambda: all(worker.shared.available == available for worker in workers))


async def _both(one: Worker, two: Worker) -> tuple[Script, Run]:
    script = Script()
    run = one.start(script)
    await two.find(run.id)
    return script, run


@pytest.mark.parametrize("keeps_its_data", [True, False])
async def test_a_run_goes_on_and_its_readers_elsewhere_get_all_of_it(
    redis_server: RedisServer, keeps_its_data: bool
) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        names = {one.shared.worker, two.shared.worker}
        script, run = await _both(one, two)
        received: list[bytes] = []

        async def read() -> None:
            received.append(frames(await read_to_end((await two.find(run.id)).log)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            script.say("before ")
            await read_until((await two.find(run.id)).log, lambda entries: said(entries) == "before ")
            redis_server.kill()
            await _wait_available(one, two, available=False)
            script.say("meanwhile ")
            with run.log.attached():
                await read_until(run.log, lambda entries: said(entries) == "before meanwhile ")
            await trio.sleep(2 * LEASE)
            if not keeps_its_data:
                redis_server.lose_everything()
            redis_server.start()
            await _wait_available(one, two)
            await trio.sleep(2 * LEASE)
            script.say("after")
            script.end()
        assert received == [frames(run.log.entries())]
        assert isinstance(run.log.terminal, GenerationComplete)
        assert {one.shared.worker, two.shared.worker} == names
        raw = await two.shared._link.ask("XRANGE", f"lumos:{{{run.id}}}:events", "-", "+")
        assert [entry[0] for entry in raw] == [b"%d-0" % seq for seq in range(1, run.log.last_seq + 1)]


async def test_a_run_that_starts_and_ends_while_redis_is_away_is_there_afterwards(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        redis_server.kill()
        await _wait_available(one, two, available=False)
        script = Script()
        run = one.start(script)
        script.say("all ", "of it")
        script.end()
        assert said(await read_to_end(run.log)) == "all of it"
        with pytest.raises(SourceUnavailableError):
            await two.shared.find(run.id)
        redis_server.start()
        await _wait_available(one, two)
        assert frames(await read_to_end((await two.find(run.id)).log)) == frames(run.log.entries())


async def test_a_worker_that_is_quiet_lets_go_of_ended_runs(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_uploads, "ENDED_KEPT_SECONDS", 0.05)
    monkeypatch.setattr(run_uploads, "DROP_EVERY_SECONDS", 0.01)
    async with open_scene(redis_server) as scene:
        one = await scene.worker("one")
        script = Script()
        run = one.start(script)
        script.end()
        await read_to_end(run.log)
        assert one.shared.uploads.ending(run.id)
        await eventually(lambda: not one.shared.uploads.ending(run.id))


async def test_ended_runs_that_cannot_be_written_are_bounded(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_uploads, "DROP_EVERY_SECONDS", 0.01)
    async with open_scene(redis_server) as scene:
        one = await scene.worker("one")
        redis_server.kill()
        await _wait_available(one, available=False)
        runs = []
        for _ in range(3):
            script = Script()
            runs.append(one.start(script))
            script.say("x" * 1000)
            script.end()
            await read_to_end(runs[-1].log)
        monkeypatch.setattr(run_uploads, "ENDED_KEPT_BYTES", runs[-1].log.size_bytes)
        await eventually(lambda: not one.shared.uploads.ending(runs[1].id))
        kept = [bool(one.shared.uploads.ending(run.id)) for run in runs]
        assert kept == [False, False, True]


async def test_who_asks_while_redis_is_away_is_told_so(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        _, run = await _both(one, two)
        remote = await two.find(run.id)
        redis_server.kill()
        await _wait_available(one, two, available=False)
        for ask in (remote.stop, remote.forget):
            with pytest.raises(SourceUnavailableError), trio.fail_after(LONG):
                await ask()
        with pytest.raises(SourceUnavailableError):
            await one.forget(run)
        assert run.log.ended


async def test_a_reader_elsewhere_waits_so_long_and_then_breaks(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_log, "OUTAGE_SECONDS", 0.3)
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        _, run = await _both(one, two)
        log = (await two.find(run.id)).log
        assert await log.read(log.last_seq, trio.current_time() + 0.01) == []
        redis_server.kill()
        with trio.fail_after(LONG), pytest.raises(trio.BrokenResourceError):
            await log.read(log.last_seq)


async def test_a_redis_that_stands_still_counts_as_away_and_heals(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.redis_link.RedisLink.ask_all.__defaults__", (0.3,))
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        names = {one.shared.worker, two.shared.worker}
        script, run = await _both(one, two)
        redis_server.pause()
        await _wait_available(one, two, available=False)
        script.say("meanwhile")
        await trio.sleep(2 * LEASE)
        redis_server.go_on()
        await _wait_available(one, two)
        script.end()
        assert frames(await read_to_end((await two.find(run.id)).log)) == frames(run.log.entries())
        assert {one.shared.worker, two.shared.worker} == names


async def test_a_stop_of_a_run_whose_events_redis_lost_at_the_end(redis_server: RedisServer) -> None:
    """Redis forgets its last second; the run's worker gives it again what it had had already."""
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script, run = await _both(one, two)
        script.say("word")
        script.end()
        await read_to_end((await two.find(run.id)).log)
        key = f"lumos:{{{run.id}}}:events"
        await two.shared._link.ask("XTRIM", key, "MAXLEN", 0)
        await two.shared._link.ask("DEL", key)
        redis_server.kill()
        await _wait_available(one, two, available=False)
        redis_server.start()
        three = await scene.worker("three")

        async def ended() -> bool:
            return (await three.find(run.id)).log.ended

        await eventually(ended)
        assert frames(await read_to_end((await three.find(run.id)).log)) == frames(run.log.entries())


async def test_over_http_a_reader_elsewhere_gets_a_broken_transport_and_then_503(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote_log, "OUTAGE_SECONDS", 0.3)
    listeners = listen_tcp("127.0.0.1", 0)
    async with open_scene(redis_server) as scene, trio.open_nursery() as nursery, open_client() as client:
        one, two = await scene.worker("one"), await scene.worker("two")
        script, run = await _both(one, two)
        services = Services({}, two.supervisor, sources=(two.shared,), shared_log=two.shared)
        await nursery.start(serve, create_app(services), listeners, trio.Event())
        url = f"{base_url(listeners[0])}/api/v1/runs/{run.id}/events"
        async with client.stream("GET", url) as response:
            assert response.status_code == 200
            await response.extensions["body"].receive()
            redis_server.kill()
            with trio.fail_after(LONG), pytest.raises(httpx.TransportError):
                await response.extensions["body"].receive()
        refused = await client.get(url)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        redis_server.start()
        await _wait_available(one, two)
        script.say("and on")
        script.end()
        with trio.fail_after(LONG):
            assert (await client.get(url)).text.count('"chunk_type":"done"') == 1
        ahead = await client.get(url, headers={"Last-Event-ID": f"{run.id}.{run.log.last_seq + 1}"})
        assert ahead.status_code == 400
        all_read = await client.get(url, headers={"Last-Event-ID": f"{run.id}.{run.log.last_seq}"})
        assert all_read.status_code == 204
        assert "Traceback" not in caplog.text
        nursery.cancel_scope.cancel()


@dataclass
class _Asking:
    """Somebody starts a run, or a batch, over HTTP at a worker whose Redis stands still.

    Attributes:
        asked: the run is under way.
        ended: and not any more.
        told: the answer's head has come.
        client: cancelled, it has gone.
    """

    asked: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    told: trio.Event = field(default_factory=trio.Event)
    client: trio.CancelScope = field(default_factory=trio.CancelScope)

    async def say(self, emit: Emit) -> None:
        """Nothing, for ever."""
        self.asked.set()
        try:
            await trio.sleep_forever()
        finally:
            self.ended.set()

    async def ask(self, url: str, body: dict[str, object]) -> None:
        """Hold the stream until ``client`` is cancelled."""
        with self.client:
            async with open_client() as client, client.stream("POST", url, json=body) as response:
                assert response.status_code == 200
                self.told.set()
                await trio.sleep_forever()


@asynccontextmanager
async def _asking(route: str, redis: RedisServer) -> AsyncIterator[_Asking]:
    chat: dict[str, object] = {"message": "hi", "on_disconnect": "cancel"}
    body: dict[str, object] = chat if "agents" in route else {"requests": [{"agent_id": "agent", **chat}]}
    listeners = listen_tcp("127.0.0.1", 0)
    asking = _Asking()
    async with open_scene(redis) as scene, trio.open_nursery() as nursery:
        one = await scene.worker("one")
        agent = BasicAgent(agent_id="agent", provider=ProgrammedProvider(asking.say), model="m")
        services = Services({"agent": agent}, one.supervisor, sources=(one.shared,), shared_log=one.shared)
        await nursery.start(serve, create_app(services), listeners, trio.Event())
        redis.pause()
        nursery.start_soon(asking.ask, f"{base_url(listeners[0])}/api/v1/{route}", body)
        with trio.fail_after(LONG):
            await asking.asked.wait()
        yield asking
        redis.go_on()
        nursery.cancel_scope.cancel()


ROUTES = ("agents/agent/chat/lumosai/stream", "batch/stream")


@pytest.mark.parametrize("route", ROUTES)
async def test_an_id_is_told_once_redis_knows_it(
    route: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_log, "KNOWN_SECONDS", LONG)
    async with _asking(route, redis_server) as asking:
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not asking.told.is_set()
        redis_server.go_on()
        with trio.fail_after(LONG):
            await asking.told.wait()


@pytest.mark.parametrize("route", ROUTES)
async def test_a_client_that_goes_before_the_id_is_told_leaves_its_run(
    route: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_log, "KNOWN_SECONDS", LONG)
    async with _asking(route, redis_server) as asking:
        await trio.testing.wait_all_tasks_blocked(0.05)
        asking.client.cancel()
        with trio.fail_after(FIRST_READER_SECONDS / 2):
            await asking.ended.wait()


async def test_while_redis_is_away_ids_are_told_at_once(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one = await scene.worker("one")
        redis_server.kill()
        await _wait_available(one, available=False)
        run = one.start(Script())
        before = trio.current_time()
        await one.shared.wait_known(run.id)
        assert trio.current_time() - before < KNOWN_SECONDS


async def test_what_redis_has_lost_of_a_run_under_way_is_written_again(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script, run = await _both(one, two)
        script.say("before ")
        log = (await two.find(run.id)).log
        with log.attached():
            await read_until(log, lambda entries: said(entries) == "before ")
            await two.shared._link.ask("DEL", f"lumos:{{{run.id}}}:events")
            script.say("after")
            script.end()
            assert frames(await read_to_end(log)) == frames(run.log.entries())
        three = await scene.worker("three")
        assert frames(await read_to_end((await three.find(run.id)).log)) == frames(run.log.entries())
