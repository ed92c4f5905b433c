"""A dead worker's runs end once, by one of those that live; a living worker's never do."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from engine import Error, Run
from server.leases import LOST_SEQ, Leases
from server.redis_link import RedisAwayError
from server.run_uploads import SharedLimits
from server.shared_scripts import BURY, events_key, run_key, runs_key
from tests.harness.redis import RedisServer
from tests.server.shared_scene import (
    LEASE,
    LONG,
    Scene,
    Script,
    Worker,
    eventually,
    frames,
    open_scene,
    read_to_end,
    read_until,
    said,
)


async def _run_that_said(worker: Worker, reader: Worker, *words: str, script: Script | None = None) -> Run:
    """A run under way, these words of which Redis has."""
    script = script or Script()
    run = worker.start(script)
    remote = await reader.find(run.id)
    script.say(*words)
    with remote.log.attached():
        await read_until(remote.log, lambda entries: said(entries) == "".join(words))
    return run


async def test_a_dead_workers_run_ends_with_one_error(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        run = await _run_that_said(one, two, "half ", "an answer")
        before = run.log.entries()
        one.die()
        remote = await two.find(run.id)
        entries = await read_to_end(remote.log)
        assert frames(entries[:-1]) == frames(before)
        assert entries[-1].seq == LOST_SEQ
        assert entries[-1].event == Error("worker_lost", "the worker that was answering died", "half an answer")
        assert remote.view().status == "error"
        assert await read_to_end(remote.log, LOST_SEQ) == []
        # who has read more from the worker itself than Redis ever got
        assert [entry.seq for entry in await read_to_end(remote.log, run.log.last_seq + 7)] == [LOST_SEQ]


async def test_three_survivors_write_one_end(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one = await scene.worker("one")
        others = [await scene.worker(f"other{number}") for number in range(3)]
        runs = [await _run_that_said(one, others[0], "word") for _ in range(5)]
        counts = [run.log.last_seq for run in runs]
        one.die()
        for run, count in zip(runs, counts, strict=True):
            for other in others:
                entries = await read_to_end((await other.find(run.id)).log)
                assert [type(entry.event) for entry in entries].count(Error) == 1
            raw = await others[0].shared._link.ask("XRANGE", f"lumos:{{{run.id}}}:events", "-", "+")
            assert [entry[0] for entry in raw].count(b"%d-0" % LOST_SEQ) == 1
            assert len(raw) == count + 1


async def test_an_heir_that_dies_while_it_ends_runs_has_an_heir(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        run = await _run_that_said(one, two, "word")
        claimed = trio.Event()

        async def claim_and_die(run_id: str) -> None:
            claimed.set()
            await trio.sleep_forever()

        monkeypatch.setattr(two.shared._leases, "_end", claim_and_die)
        one.die()
        with trio.fail_after(LONG):
            await claimed.wait()
        two.die()
        three = await scene.worker("three")
        entries = await read_to_end((await three.find(run.id)).log)
        assert [type(entry.event) for entry in entries].count(Error) == 1


async def test_an_end_that_redis_did_not_take_is_written_again(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        run = await _run_that_said(one, two, "word")
        leases = two.shared._leases
        end, failures = leases._end, iter([RedisAwayError("away"), RedisAwayError("away")])

        async def end_at_last(run_id: str) -> None:
            await trio.lowlevel.checkpoint()
            if failure := next(failures, None):
                raise failure
            await end(run_id)

        monkeypatch.setattr(leases, "_end", end_at_last)
        one.die()
        entries = await read_to_end((await two.find(run.id)).log)
        assert [type(entry.event) for entry in entries].count(Error) == 1


async def test_of_a_run_that_redis_has_let_go_an_heir_makes_nothing(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        heir = (await scene.worker("heir")).shared
        await heir._link.ask("SADD", runs_key("dead"), "run")
        await heir._leases.end_runs_of("dead")
        assert await heir._link.ask("EXISTS", runs_key("dead"), run_key("run"), events_key("run")) == 0


async def _stand_still(scene: Scene, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until others have taken the worker for dead: nothing of it reaches Redis."""
    name = worker.shared.worker

    async def nothing(*_: object, **__: object) -> None:
        await trio.sleep_forever()

    with monkeypatch.context() as patch:
        patch.setattr(worker.shared._link, "ask_all", nothing)
        witness = await scene.worker("witness")

        async def buried() -> bool:
            return not await witness.shared._link.ask("HEXISTS", "lumos:workers", name)

        await eventually(buried)


async def test_a_worker_that_comes_back_late_writes_nothing_after_the_end(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = await _run_that_said(one, two, "before", script=script)
        await _stand_still(scene, one, monkeypatch)
        script.say("meanwhile")
        one.shared._link.renew()  # what was asked for is lost
        with trio.fail_after(LONG):
            await run.log.wait_ended()
        own = run.log.terminal
        assert isinstance(own, Error)
        assert own.code == "worker_lost"
        entries = await read_to_end((await two.find(run.id)).log)
        assert said(entries) == "before"
        assert [type(entry.event) for entry in entries].count(Error) == 1
        again = await _run_that_said(one, two, "a new run")
        assert not again.log.ended


async def test_workers_that_live_are_never_taken_for_dead(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        run = await _run_that_said(one, two, "word")
        names = {one.shared.worker, two.shared.worker}
        await trio.sleep(4 * LEASE)
        assert {one.shared.worker, two.shared.worker} == names
        assert not run.log.ended
        assert not (await two.find(run.id)).log.ended


async def test_a_worker_whose_heart_stands_still_can_write_nothing_more(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is connected, and has not noticed that it was taken for dead: what it writes is refused."""
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = await _run_that_said(one, two, "before", script=script)
        monkeypatch.setattr(one.shared._leases, "beat", trio.sleep_forever)
        remote = await two.find(run.id)
        entries = await read_to_end(remote.log)
        assert isinstance(entries[-1].event, Error)
        script.say("too late")
        await read_to_end(run.log)
        assert isinstance(run.log.terminal, Error)
        assert run.log.terminal.code == "worker_lost"
        raw = await two.shared._link.ask("XRANGE", f"lumos:{{{run.id}}}:events", "-", "+")
        assert [int(entry[0].partition(b"-")[0]) for entry in raw] == [entry.seq for entry in entries]


class SilentRedis:
    """A link to a Redis that knows one other worker, whose heart stands still; ``buried`` tells when it was buried."""

    def __init__(self) -> None:
        self.buried: list[float] = []

    async def ask(self, *command: object) -> object:
        await trio.lowlevel.checkpoint()
        if command[0] == "HGETALL":
            return {b"other": b"7"}
        if command[:2] == tuple(BURY.call([])[:2]):
            self.buried.append(trio.current_time())
        return 0


async def test_a_worker_that_stood_still_itself_looks_on_for_a_whole_lease(autojump_clock: MockClock) -> None:
    link: Any = SilentRedis()
    rounds = 0

    async def stand_still_once() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 2:
            await trio.sleep(100)

    with trio.move_on_after(130):
        await Leases(link, "this", SharedLimits(lease=9)).work(stand_still_once)
    looked_again = 3 + 100 + 3.0
    assert link.buried[0] == looked_again + 12, "the first look past a lease since then"
