"""Admission: exact times in the queue, who comes first, and places given back once whatever happens."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from server.admission import Admission, AdmissionLimits, Place
from server.doorkeeper import LINGER_SECONDS, MAX_REFUSING
from server.errors import ApiError
from server.serving import ServingLimits
from tests.engine.scripted import FOREVER, SENT, ScriptedProvider, text
from tests.harness.world import STREAM_URL, World, open_world
from tests.server.raw_http import raw_client, request_bytes

LIVE = request_bytes("GET", "/health/live")


def admission(runs: int = 1, queue: int = 2, **of: float) -> Admission:
    return Admission(AdmissionLimits(runs=runs, queue=queue, **of))


def check_refusal(error: ApiError) -> None:
    assert (error.status, error.code, error.headers) == (503, "SERVICE_UNAVAILABLE", {"Retry-After": "5"})


class Queue:
    """Starts as tasks, and when each got its place or its refusal."""

    def __init__(self, nursery: trio.Nursery, door: Admission) -> None:
        self.nursery = nursery
        self.door = door
        self.got: list[tuple[str, float]] = []
        self.refused: list[tuple[str, float]] = []
        self.places: list[Place] = []

    async def start(self, name: str, key_id: str | None = None) -> trio.CancelScope:
        """Let one more come, and wait until it waits."""
        scope = trio.CancelScope()

        async def come() -> None:
            with scope:
                try:
                    self.places.append(await self.door.enter(key_id))
                except ApiError as error:
                    check_refusal(error)
                    self.refused.append((name, trio.current_time()))
                else:
                    self.got.append((name, trio.current_time()))

        self.nursery.start_soon(come)
        await trio.testing.wait_all_tasks_blocked()
        return scope


async def test_a_start_waits_for_a_place_and_gets_it_when_a_run_ends(autojump_clock: MockClock) -> None:
    door = admission()
    place = await door.enter(None)
    async with trio.open_nursery() as nursery:
        queue = Queue(nursery, door)
        await queue.start("second")
        assert (door.taken, door.queued, door.saturated) == (1, 1, True)
        await trio.sleep(3)
        place.close()
    assert queue.got == [("second", 3.0)]
    assert (door.taken, door.queued) == (1, 0)


async def test_a_start_that_waits_too_long_is_refused_at_the_limit(autojump_clock: MockClock) -> None:
    door = admission(queue_seconds=5)
    place = await door.enter(None)
    async with trio.open_nursery() as nursery:
        queue = Queue(nursery, door)
        await queue.start("second")
    assert queue.refused == [("second", 5.0)]
    place.close()
    assert (door.taken, door.queued, door.refused, door.saturated) == (0, 0, 1, False)


async def test_past_the_queue_starts_are_refused_at_once(autojump_clock: MockClock) -> None:
    door = admission(queue=2)
    await door.enter(None)
    async with trio.open_nursery() as nursery:
        queue = Queue(nursery, door)
        await queue.start("second")
        await queue.start("third")
        await trio.sleep(1)
        await queue.start("fourth")
        assert queue.refused == [("fourth", 1.0)]
    assert sorted(queue.refused) == [("fourth", 1.0), ("second", 5.0), ("third", 5.0)]


async def test_no_queue_at_all_refuses_at_once(autojump_clock: MockClock) -> None:
    door = admission(queue=0)
    await door.enter(None)
    with pytest.raises(ApiError):
        await door.enter(None)
    assert trio.current_time() == 0


async def test_first_come_first_served_and_nobody_overtakes(autojump_clock: MockClock) -> None:
    door = admission(queue=10)
    place = await door.enter(None)
    async with trio.open_nursery() as nursery:
        queue = Queue(nursery, door)
        for name in "abc":
            await queue.start(name)
        place.close()
        await queue.start("d")
        assert [name for name, _ in queue.got] == ["a"]
        for _ in "bcd":
            queue.places[-1].close()
            await trio.testing.wait_all_tasks_blocked()
    assert [name for name, _ in queue.got] == ["a", "b", "c", "d"]


async def test_a_key_has_its_share_of_the_queue_and_leaves_the_rest(autojump_clock: MockClock) -> None:
    door = admission(queue=8, key_queue=0.25)
    await door.enter("greedy")
    async with trio.open_nursery() as nursery:
        queue = Queue(nursery, door)
        for number in range(4):
            await queue.start(f"greedy{number}", "greedy")
        await queue.start("other", "other")
        assert queue.refused == [("greedy2", 0.0), ("greedy3", 0.0)]
        assert door.queued == 3
    assert door.queued == 0


async def test_who_leaves_the_queue_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    door = admission(queue=2, key_queue=0.1)
    place = await door.enter("k")
    async with trio.open_nursery() as nursery:
        queue = Queue(nursery, door)
        gone = await queue.start("gone", "k")
        gone.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert door.queued == 0
        await queue.start("stays", "k")  # its share is free again
        place.close()
    assert queue.got == [("stays", 0.0)]


async def test_a_place_given_to_one_who_is_cancelled_in_the_same_moment_comes_back(autojump_clock: MockClock) -> None:
    door = admission()
    place = await door.enter(None)
    async with trio.open_nursery() as nursery:
        queue = Queue(nursery, door)
        waiting = await queue.start("unlucky")
        waiting.cancel()
        place.close()
        await trio.testing.wait_all_tasks_blocked()
    assert queue.got == []
    assert door.taken == 0


async def test_a_place_given_in_the_moment_the_wait_ends_is_taken(autojump_clock: MockClock) -> None:
    door = admission(queue_seconds=5)
    place = await door.enter(None)
    async with trio.open_nursery() as nursery:
        queue = Queue(nursery, door)
        await queue.start("second")
        await trio.sleep(5)
        place.close()
        await trio.testing.wait_all_tasks_blocked()
    assert len(queue.got) + len(queue.refused) == 1
    assert door.taken == len(queue.got)


async def test_a_place_closed_twice_is_given_back_once(autojump_clock: MockClock) -> None:
    door = admission(runs=2)
    first, _second = await door.enter(None), await door.enter(None)
    first.close()
    first.close()
    assert door.taken == 1


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_happens_no_place_is_lost_or_doubled(autojump_clock: MockClock, seed: int) -> None:
    chance = random.Random(seed)
    door = admission(runs=3, queue=5, queue_seconds=2)
    most = 0

    async def come(key: str) -> None:
        nonlocal most
        await trio.sleep(chance.uniform(0, 10))
        with trio.move_on_after(chance.uniform(0, 4)):
            try:
                place = await door.enter(key)
            except ApiError:
                return
            try:
                most = max(most, door.taken)
                await trio.sleep(chance.uniform(0, 2))
            finally:
                place.close()

    async with trio.open_nursery() as nursery:
        for _ in range(60):
            nursery.start_soon(come, chance.choice("abc"))
    assert (door.taken, door.queued) == (0, 0)
    assert most == 3


async def test_who_waits_is_refused_when_the_door_closes_and_so_is_who_comes_later(autojump_clock: MockClock) -> None:
    door = admission()
    place = await door.enter(None)
    async with trio.open_nursery() as nursery:
        queue = Queue(nursery, door)
        await queue.start("second", "a")
        await queue.start("third")
        await trio.sleep(1)
        door.close()
        place.close()
        await queue.start("fourth")
    assert sorted(queue.refused) == [("fourth", 1.0), ("second", 1.0), ("third", 1.0)]
    assert queue.got == []
    assert (door.taken, door.queued, door.refused) == (0, 0, 3)


async def test_who_was_called_when_the_door_closes_has_its_place(autojump_clock: MockClock) -> None:
    door = admission()
    place = await door.enter(None)
    async with trio.open_nursery() as nursery:
        queue = Queue(nursery, door)
        await queue.start("second")
        place.close()
        door.close()
    assert (queue.got, queue.refused, door.taken) == ([("second", 0.0)], [], 1)


# Through HTTP


def busy(world: World) -> None:
    world.add_agent(provider=ScriptedProvider((0, (SENT,)), (1, text("hello")), (FOREVER, ())))


async def test_a_full_worker_answers_503_and_serves_again_once_a_run_has_ended(autojump_clock: MockClock) -> None:
    door = admission(queue_seconds=2)
    async with open_world(admission=door) as world:
        busy(world)
        async with world.open_chat(on_disconnect="cancel") as answer:
            assert answer.response.status_code == 200
            ready = (await world.client.get("http://lumos/health/ready")).json()
            assert {"status": "ok", "active_runs": 1, "queued_runs": 0, "saturated": True}.items() <= ready.items()
            refused = await world.client.post(STREAM_URL, json={"message": "hi"})
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
            assert refused.json()["code"] == "SERVICE_UNAVAILABLE"
            assert trio.current_time() == 2.0
            asked_at = trio.current_time()
        async with world.open_chat() as answer:
            assert answer.response.status_code == 200
            assert trio.current_time() - asked_at < 2
        assert (door.queued, door.refused) == (0, 1)
    assert door.taken == 0


async def test_a_client_that_goes_while_it_waits_starts_nothing(autojump_clock: MockClock) -> None:
    door = admission()
    async with open_world(admission=door) as world:
        busy(world)
        async with world.open_chat(on_disconnect="cancel"):
            with trio.move_on_after(1):
                await world.client.post(STREAM_URL, json={"message": "hi"})
            await trio.testing.wait_all_tasks_blocked()
            assert (door.taken, door.queued) == (1, 0)
        await trio.sleep(10)
        assert len([what for what, *_ in world.journal.entries if what == "started"]) == 1
        assert door.taken == 0


async def test_over_the_connection_ceiling_clients_get_a_503_at_once(autojump_clock: MockClock) -> None:
    async with open_world(ServingLimits(connections=2)) as world:
        busy(world)
        async with world.open_chat(), raw_client(world) as second, raw_client(world) as third:
            answer = await third.ask(LIVE)
            assert (answer.status, answer.headers["retry-after"]) == (503, "5")
            assert answer.json()["code"] == "SERVICE_UNAVAILABLE"
            assert trio.current_time() == 0.0
            assert (await second.ask(LIVE)).status == 200
        await trio.testing.wait_all_tasks_blocked()
        async with raw_client(world) as fourth:
            assert (await fourth.ask(LIVE)).status == 200


async def test_a_flood_over_the_ceiling_is_reset_but_for_a_hundred(autojump_clock: MockClock) -> None:
    async with open_world(ServingLimits(connections=1, keep_alive=60)) as world, AsyncExitStack() as clients:
        holder = await clients.enter_async_context(raw_client(world))
        assert (await holder.ask(LIVE)).status == 200
        flood = [await clients.enter_async_context(raw_client(world)) for _ in range(MAX_REFUSING + 50)]
        await trio.testing.wait_all_tasks_blocked()
        answers = [await client.read_to_end() for client in flood]
        assert sum(answer.startswith(b"HTTP/1.1 503 ") for answer in answers) == MAX_REFUSING
        assert sum(not answer for answer in answers) == 50
        await trio.sleep(LINGER_SECONDS)
        assert (await holder.ask(LIVE)).status == 200
        left = [
            connection for connection in world.network.open_connections("lumos") if connection.server.closed_at is None
        ]
        assert len(left) == 1
