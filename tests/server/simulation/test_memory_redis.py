"""The Redis in memory on a virtual clock: time, faults, and whole shared logs over it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from engine import Error, Run, RunSupervisor
from server.leases import LOST_SEQ
from server.log_followers import LogFollowers
from server.redis_link import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, REPLY_SECONDS, RedisAwayError
from server.run_directory import SourceUnavailableError
from server.run_uploads import SharedLimits
from server.shared_log import SharedLog
from server.simulation.memory_link import MemoryLink, WorkerLinks
from server.simulation.memory_redis import REMEMBERED_SECONDS, MemoryRedis
from tests.server.shared_scene import Script, Worker, frames, read_to_end, said

LEASE = 10.0


@asynccontextmanager
async def _linked(redis: MemoryRedis) -> AsyncIterator[MemoryLink]:
    """A link that is up."""
    link = MemoryLink(redis, "test")
    async with trio.open_nursery() as nursery:
        await nursery.start(_keep, link)
        yield link
        nursery.cancel_scope.cancel()


async def _keep(link: MemoryLink, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC114 - see ``_linked``
    started = False

    async def session() -> None:
        nonlocal started
        if not started:
            started = True
            task_status.started()
        await trio.sleep_forever()

    await link.run(session)


async def _until(met: Callable[[], bool]) -> None:
    """In virtual time, to a hundredth of a second: of what tells nobody when it changes."""
    while not met():  # noqa: ASYNC110
        await trio.sleep(0.01)


async def test_a_blocking_read_waits_for_an_entry_or_its_time(autojump_clock: MockClock) -> None:
    redis = MemoryRedis()
    async with _linked(redis) as reader, _linked(redis) as writer:
        read = ("XREAD", "BLOCK", 5000, "COUNT", 10, "STREAMS", "one", "two", "0-0", "1-0")
        assert await reader.ask(*read, seconds=10) is None
        assert trio.current_time() == 5.0
        answers: list[Any] = []

        async def wait() -> None:
            answers.append((await reader.ask(*read, seconds=10), trio.current_time()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(2)
            await writer.ask("XADD", "two", "1-0", "e", "old")
            await trio.sleep(1)
            await writer.ask("XADD", "two", "2-0", "e", "new")
        assert answers == [({b"two": [[b"2-0", [b"e", b"new"]]]}, 8.0)]
        assert await reader.ask(*read) is not None
        assert trio.current_time() == 8.0


async def test_keys_live_to_the_millisecond(autojump_clock: MockClock) -> None:
    redis = MemoryRedis()
    async with _linked(redis) as link:
        await link.ask("SET", "key", "value", "PX", 1500)
        await trio.sleep(1.5)
        assert await link.ask_all([["GET", "key"], ["PTTL", "key"]]) == [b"value", 0]
        await trio.sleep(0.001)
        assert await link.ask_all([["GET", "key"], ["PTTL", "key"], ["KEYS", "*"]]) == [None, -2, []]


async def test_ids_are_made_of_the_time(autojump_clock: MockClock) -> None:
    redis = MemoryRedis()
    async with _linked(redis) as link:
        await trio.sleep(3)
        add = ["XADD", "inbox", "*", "m", ""]
        assert await link.ask_all([add, add]) == [b"3000-0", b"3000-1"]


async def test_away_breaks_what_is_there_and_refuses_what_comes(autojump_clock: MockClock) -> None:
    redis = MemoryRedis()
    async with _linked(redis) as link:
        await link.ask("SET", "key", "value")
        changes: list[tuple[bool, float]] = []
        link.on_changed = lambda: changes.append((link.up, trio.current_time()))
        redis.away = True
        with pytest.raises(RedisAwayError):
            await link.ask("GET", "key")
        await trio.sleep(10)
        assert (link.up, link.went_down_at, redis.connections) == (False, 0.0, 0)
        with pytest.raises(RedisAwayError, match="no connection"):
            await link.ask("GET", "key")
        redis.away = False
        await _until(lambda: link.up)
        assert 10 < trio.current_time() <= 11
        assert await link.ask("GET", "key") == b"value"
        assert [up for up, _ in changes] == [False, True]


async def test_a_blocked_reader_is_told_when_redis_goes_away(autojump_clock: MockClock) -> None:
    redis = MemoryRedis()
    async with _linked(redis) as link:

        async def go() -> None:
            await trio.sleep(1)
            redis.away = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(go)
            with pytest.raises(RedisAwayError, match="went away"):
                await link.ask("XREAD", "BLOCK", 0, "STREAMS", "s", "0-0", seconds=60)
        assert trio.current_time() == 1.0


async def test_forget_last_comes_back_as_it_was(autojump_clock: MockClock) -> None:
    redis = MemoryRedis()
    async with _linked(redis) as link:
        for second in range(30):
            await link.ask("XADD", "s", f"{second + 1}-0", "e", "x")
            await link.ask_all(
                [["HINCRBY", "h", "n", 1], ["SET", f"key{second}", "1", "PX", 2000], ["SADD", "set", "m"]]
            )
            await trio.sleep(1)
        redis.away = True
        await trio.sleep(5)
        redis.forget_last(2.5)
        redis.away = False
        await _until(lambda: link.up)
        assert [entry[0] for entry in await link.ask("XRANGE", "s", "27-0", "+")] == [b"27-0", b"28-0"]
        assert await link.ask("HGETALL", "h") == {b"n": b"28"}
        assert await link.ask("KEYS", "*") == [b"s", b"h", b"set"]  # the clock went on
        assert await link.ask("XADD", "s", "29-0", "e", "again") == b"29-0"
        redis.forget_last(0)
        await trio.sleep(LONGEST_PAUSE_SECONDS + 0.1)
        assert await link.ask("XREVRANGE", "s", "+", "-", "COUNT", 1) == [[b"29-0", [b"e", b"again"]]]
        with pytest.raises(ValueError, match="only the last"):
            redis.forget_last(REMEMBERED_SECONDS + 1)
        with pytest.raises(RedisAwayError, match="No matching script"):
            await link.ask("EVALSHA", "0" * 40, 0)


async def test_an_answer_is_lost_after_the_command_was_done(autojump_clock: MockClock) -> None:
    redis = MemoryRedis()
    async with _linked(redis) as link:
        redis.lose_answer(after=1)
        with pytest.raises(RedisAwayError, match="before the answer"):
            await link.ask_all([["HINCRBY", "h", field, 1] for field in "abc"])
        await trio.sleep(FIRST_PAUSE_SECONDS + 0.01)
        assert await link.ask("HGETALL", "h") == {b"a": b"1", b"b": b"1"}


async def test_latency_is_there_and_back_and_too_slow_is_away(autojump_clock: MockClock) -> None:
    redis = MemoryRedis()
    async with _linked(redis) as link:
        redis.latency = 0.25
        async with trio.open_nursery() as nursery:
            for _ in range(3):  # one behind the other, not one after the other
                nursery.start_soon(link.ask, "HINCRBY", "h", "n", 1)
        assert trio.current_time() == 0.5
        redis.latency = REPLY_SECONDS
        with pytest.raises(RedisAwayError, match="does not answer"):
            await link.ask("HINCRBY", "h", "n", 1)
        assert trio.current_time() == 0.5 + REPLY_SECONDS


async def test_a_redis_that_stands_still_does_what_was_asked_when_it_goes_on(autojump_clock: MockClock) -> None:
    redis = MemoryRedis()
    async with _linked(redis) as link, trio.open_nursery() as nursery:
        redis.stands_still = True
        nursery.start_soon(link.ask, "SET", "key", "value")
        await trio.sleep(3)
        redis.stands_still = False
        assert await link.ask("GET", "key") == b"value"
        assert trio.current_time() == 3.0
        redis.stands_still = True
        with pytest.raises(RedisAwayError, match="does not answer"):
            await link.ask("GET", "key")
        assert trio.current_time() == 3.0 + REPLY_SECONDS
        redis.stands_still = False


async def test_a_cancelled_caller_leaves_only_an_answer(autojump_clock: MockClock) -> None:
    redis = MemoryRedis()
    async with _linked(redis) as link:
        redis.latency = 1.0
        with trio.move_on_after(0.5):
            await link.ask("SET", "key", "value")
        assert await link.ask("GET", "key") == b"value"
        assert link.up


async def test_a_killed_link_does_nothing_more(autojump_clock: MockClock) -> None:
    redis = MemoryRedis()
    async with _linked(redis) as dead, _linked(redis) as living:
        redis.latency = 1.0
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(RedisAwayError, match="does not answer"):
                    await dead.ask("SET", "key", "value")

            nursery.start_soon(ask)
            await trio.sleep(0.5)
            dead.kill()
        await trio.sleep(60)
        assert not dead.up
        assert await living.ask("GET", "key") is None
        assert redis.connections == 1


def test_a_simulation_does_without_coredis() -> None:
    program = "import sys; sys.modules['coredis'] = None; import server.shared_log, server.simulation.memory_link"
    subprocess.run([sys.executable, "-c", program], check=True)


# Shared logs over it


class _World:
    """Workers over one Redis in memory."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.redis = MemoryRedis()
        self.links: dict[str, WorkerLinks] = {}
        self._nursery = nursery

    async def worker(self, name: str) -> _MemoryWorker:
        """A new worker, known to Redis."""
        worker: _MemoryWorker = await self._nursery.start(self._live, name)
        await worker.shared.wait_available()
        return worker

    async def _live(  # noqa: ASYNC114 - started by ``worker``
        self, name: str, task_status: trio.TaskStatus[_MemoryWorker]
    ) -> None:
        async with trio.open_nursery() as nursery:
            task_status.started(_MemoryWorker(nursery, self.redis, name))
            await trio.sleep_forever()


class _MemoryWorker(Worker):
    def __init__(self, nursery: trio.Nursery, redis: MemoryRedis, name: str) -> None:
        self._nursery = nursery
        self._links = WorkerLinks(redis)
        self.shared = SharedLog("", name, SharedLimits(lease=LEASE), self._links)
        self.supervisor = RunSupervisor(nursery, LogFollowers(self.shared))
        nursery.start_soon(self.shared.run, self.supervisor)

    def kill(self) -> None:
        """Nothing of it reaches Redis any more, though its tasks go on."""
        self._links.kill()


async def _in_world(act: Callable[[_World], Awaitable[None]]) -> None:
    async with trio.open_nursery() as nursery:
        await act(_World(nursery))
        nursery.cancel_scope.cancel()


def _started(worker: Worker, *words: str) -> tuple[Script, Run]:
    script = Script()
    script.say(*words)
    return script, worker.start(script)


async def test_a_run_of_one_worker_is_read_at_another(autojump_clock: MockClock) -> None:
    async def act(world: _World) -> None:
        one, two = await world.worker("one"), await world.worker("two")
        script, run = _started(one, "Grüße ", "\n\U0001f600")
        remote = await two.find(run.id)
        script.end()
        assert frames(await read_to_end(remote.log)) == frames(run.log.entries())
        assert world.redis.connections == 4
        assert trio.current_time() < 1.0

    await _in_world(act)


async def test_a_killed_workers_run_ends_once_after_the_lease(autojump_clock: MockClock) -> None:
    async def act(world: _World) -> None:
        one, two, three = [await world.worker(name) for name in ("one", "two", "three")]
        script, run = _started(one, "half ", "an answer")
        logs = [(await worker.find(run.id)).log for worker in (two, three)]
        with logs[0].attached():
            await _until(lambda: said(logs[0].entries) == "half an answer")
        one.kill()
        killed_at = trio.current_time()
        script.say("never heard")
        script.end()
        for log in logs:
            entries = await _read_on(log)
            assert [(entry.seq, type(entry.event)) for entry in entries[-1:]] == [(LOST_SEQ, Error)]
            assert said(entries) == "half an answer"
        assert LEASE < trio.current_time() - killed_at < LEASE + 2 * LEASE / 3
        await trio.sleep(3 * LEASE)
        async with _linked(world.redis) as link:
            raw = await link.ask("XRANGE", f"lumos:{{{run.id}}}:events", "-", "+")
            assert [entry[0] for entry in raw].count(b"%d-0" % LOST_SEQ) == 1
            assert b"never heard" not in b"".join(entry[1][1] for entry in raw)
            assert len(await link.ask("HGETALL", "lumos:workers")) == 2

    await _in_world(act)


async def _read_on(log: Any) -> list[Any]:
    entries: list[Any] = []
    with log.attached():
        while more := await log.read(entries[-1].seq if entries else 0):
            entries += more
    return entries


@pytest.mark.parametrize("forgotten", [0.0, 1.0])
async def test_away_and_back_heals(autojump_clock: MockClock, forgotten: float) -> None:
    async def act(world: _World) -> None:
        one, two = await world.worker("one"), await world.worker("two")
        names = {one.shared.worker, two.shared.worker}
        script, run = _started(one, "before ")
        remote = await two.find(run.id)
        received: list[bytes] = []

        async def read() -> None:
            received.append(frames(await _read_on(remote.log)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.sleep(2)
            script.say("the last ")
            await trio.sleep(0.5)
            world.redis.away = True
            script.say("meanwhile ")
            await trio.sleep(5)
            assert not two.shared.available
            with pytest.raises(SourceUnavailableError):
                await two.shared.find(run.id)
            world.redis.forget_last(forgotten)
            world.redis.away = False
            await _until(lambda: one.shared.available and two.shared.available)
            script.say("after")
            script.end()
        assert received == [frames(run.log.entries())]
        assert said(run.log.entries()) == "before the last meanwhile after"
        assert {one.shared.worker, two.shared.worker} == names
        three = await world.worker("three")
        assert frames(await _read_on((await three.find(run.id)).log)) == received[0]

    await _in_world(act)


async def test_a_write_whose_answer_is_lost_is_not_done_twice(autojump_clock: MockClock) -> None:
    async def act(world: _World) -> None:
        one, two = await world.worker("one"), await world.worker("two")
        script, run = _started(one)
        remote = await two.find(run.id)
        for number in range(20):
            script.say(f"word{number} ")
            world.redis.lose_answer(after=number % 4)
            await trio.sleep(1)
        script.end()
        assert frames(await _read_on(remote.log)) == frames(run.log.entries())
        async with _linked(world.redis) as link:
            raw = await link.ask("XRANGE", f"lumos:{{{run.id}}}:events", "-", "+")
        assert [entry[0] for entry in raw] == [b"%d-0" % (seq + 1) for seq in range(run.log.last_seq)]

    await _in_world(act)
