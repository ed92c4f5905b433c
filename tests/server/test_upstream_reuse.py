"""Connections to a model's server: used again after a whole answer, closed at the very moment of any other end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import repeat

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from engine import AgentStopped, Deadlines, Error, GenerationComplete
from server.testing.memory_connection import MemoryConnection
from tests.harness.raw_vendor import DONE_EVENT, HELLO, LAST_CHUNK, RawVendor, answer
from tests.harness.recordings import steady_recording
from tests.harness.vendor import STREAM_HEAD, Act, chunked, text_event
from tests.harness.world import LUMOS, STREAM_URL, VENDOR, Answer, World, open_world

WORD = chunked(text_event("word "))
SLOWLY: list[Act] = [1.0, STREAM_HEAD, 1.0, WORD, 1.0, WORD, 1.0, chunked(DONE_EVENT) + LAST_CHUNK]
"""An answer in which something happens at each whole second: the head at 1, tokens at 2 and 3, the end at 4."""


@asynccontextmanager
async def world_with(*scripts: Iterable[Act]) -> AsyncIterator[tuple[World, RawVendor]]:
    async with open_world() as world:
        world.add_agent()
        vendor = RawVendor(*scripts)
        vendor.start(world.nursery, world.network.listen(*VENDOR))
        yield world, vendor


def upstream(world: World) -> list[MemoryConnection]:
    return [connection for connection in world.network.connections if connection.server.socket.local == VENDOR]


async def closed_at(world: World) -> list[float | None]:
    """When each connection to the model's server was closed from our side, up to now; None while it is open."""
    await wait_all_tasks_blocked()
    return [connection.client.closed_at for connection in upstream(world)]


def is_done(answered: Answer) -> bool:
    return isinstance(answered.events[-1], GenerationComplete)


async def test_runs_one_after_the_other_share_one_connection(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent()
        vendor = await world.add_vendor(steady_recording(first=0.5, last=3.0))
        for _ in range(20):
            assert is_done(await world.chat())
        assert (len(vendor.calls), await closed_at(world)) == (20, [None])


async def test_runs_at_once_each_have_a_connection_and_share_them_later(autojump_clock: MockClock) -> None:
    async with world_with(*repeat(SLOWLY, 10)) as (world, vendor):
        for round_ in (1, 2):
            async with trio.open_nursery() as chats:
                for _ in range(5):
                    chats.start_soon(world.chat)
            assert (len(vendor.requests), await closed_at(world)) == (5 * round_, [None] * 5)


async def test_an_idle_connection_is_kept_for_a_minute(autojump_clock: MockClock) -> None:
    async with world_with() as (world, _):
        await world.chat()
        await trio.sleep(59)
        await world.chat()
        assert await closed_at(world) == [None]
        await trio.sleep(61)
        await world.chat()
        assert await closed_at(world) == [120.0, None]


@pytest.mark.parametrize(
    "while_idle",
    [[1.0, "close"], [1.0, "reset"], [1.0, b"HTTP/1.1 408 Request Timeout\r\n\r\n"], [1.0, answer(b"")]],
    ids=["close", "reset", "408", "answer unasked"],
)
async def test_a_connection_that_stirred_while_idle_is_not_used_again(
    while_idle: list[Act], autojump_clock: MockClock
) -> None:
    async with world_with([*HELLO, *while_idle]) as (world, vendor):
        assert is_done(await world.chat())
        await trio.sleep(5)
        assert is_done(await world.chat())
        assert (len(vendor.requests), await closed_at(world)) == (2, [5.0, None])


@pytest.mark.parametrize("ending", ["close", "reset"])
async def test_a_connection_closed_as_the_request_comes_is_replaced_unnoticed(
    ending: str, autojump_clock: MockClock
) -> None:
    hang_up: list[Act] = [0.5, "close" if ending == "close" else "reset"]
    async with world_with(HELLO, hang_up) as (world, vendor):
        await world.chat()
        answered = await world.chat()
        assert is_done(answered)
        assert answered.arrivals[-1] - answered.asked_at == 0.5
        assert (len(vendor.requests), await closed_at(world)) == (3, [0.5, None])


async def test_a_connection_closed_as_the_request_comes_is_replaced_only_once(autojump_clock: MockClock) -> None:
    async with world_with(HELLO, ["close"], ["close"]) as (world, vendor):
        await world.chat()
        failed = (await world.chat()).events[-1]
        assert isinstance(failed, Error)
        assert (failed.code, len(vendor.requests), await closed_at(world)) == ("upstream.connection", 3, [0, 0])


async def test_the_first_token_deadline_counts_over_a_replaced_connection(autojump_clock: MockClock) -> None:
    async with world_with(HELLO, [0.5, "close"], ["hang"]) as (world, _):
        await world.chat()
        late = await world.chat(deadlines={"first_token": 10})
        assert isinstance(late.events[-1], Error)
        assert late.events[-1].code == "timeout.first_token"
        assert late.arrivals[-1] - late.asked_at == 10


async def test_a_connection_that_closes_after_a_silence_is_no_stale_one(autojump_clock: MockClock) -> None:
    async with world_with(HELLO, [6.0, "close"]) as (world, vendor):
        await world.chat()
        failed = (await world.chat()).events[-1]
        assert isinstance(failed, Error)
        assert (failed.code, len(vendor.requests)) == ("upstream.connection", 2)


async def stop(world: World, answered: Answer, at: float) -> None:
    await trio.sleep_until(answered.asked_at + at)
    await world.client.post(f"http://lumos/api/v1/runs/{answered.run_id}/stop")


async def forget(world: World, answered: Answer, at: float) -> None:
    await trio.sleep_until(answered.asked_at + at)
    await world.client.delete(f"http://lumos/api/v1/runs/{answered.run_id}")


async def end_server(world: World, answered: Answer, at: float) -> None:
    await trio.sleep_until(answered.asked_at + at)
    world.supervisor.end_all()


async def crash_runs(world: World, answered: Answer, at: float) -> None:
    await trio.sleep_until(answered.asked_at + at)
    world.runs.cancel_scope.cancel()


MOMENTS = {
    "before the head": 0.5,
    "as the head comes": 1.0,
    "before the first token": 1.5,
    "as the first token comes": 2.0,
    "between tokens": 2.5,
    "before the end": 3.5,
}


@pytest.mark.parametrize("end", [stop, forget, end_server, crash_runs])
@pytest.mark.parametrize("moment", MOMENTS)
async def test_ending_a_run_closes_its_connection_at_that_moment(
    moment: str, end: Callable[[World, Answer, float], Awaitable[None]], autojump_clock: MockClock
) -> None:
    at = MOMENTS[moment]
    async with world_with(SLOWLY) as (world, _):
        async with world.open_chat() as answered, trio.open_nursery() as nursery:
            nursery.start_soon(end, world, answered, at)
            async for _ in answered:
                pass
        assert await closed_at(world) == [answered.asked_at + at]
        assert isinstance(answered.events[-1], AgentStopped | Error)
        assert world.journal.bugs == []


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_client_that_leaves_without_grace_closes_the_connection_then(
    moment: str, autojump_clock: MockClock
) -> None:
    at = MOMENTS[moment]
    async with world_with(SLOWLY) as (world, _):
        with trio.move_on_after(at):
            await world.chat(on_disconnect="cancel")
        await trio.sleep(1)
        assert (await closed_at(world), world.supervisor.active_runs) == ([at], 0)
        assert is_done(await world.chat())


@pytest.mark.parametrize("closes", [True, False], ids=["closes", "half closes"])
@pytest.mark.parametrize("ticks", range(30))
async def test_a_client_that_leaves_as_it_asks_leaves_nothing(
    ticks: int, closes: bool, autojump_clock: MockClock
) -> None:
    """A real socket still takes a write after the client has closed; half a close in memory does too."""
    body = b'{"message":"hi","on_disconnect":"cancel"}'
    lines = [f"POST {STREAM_URL.removeprefix('http://lumos')} HTTP/1.1", "Host: lumos", f"Content-Length: {len(body)}"]
    async with world_with(SLOWLY) as (world, _):
        stream = await world.network.connect(*LUMOS)
        await stream.send_all("\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode() + body)
        for _ in range(ticks):
            await trio.lowlevel.checkpoint()
        await (stream.aclose() if closes else stream.send_eof())
        assert await closed_at(world) in ([], [0.0])
        assert world.supervisor.active_runs == 0


async def test_a_run_stopped_while_connecting_has_no_connection(autojump_clock: MockClock) -> None:
    async with world_with() as (world, _):
        world.network.black_hole(*VENDOR)
        async with world.open_chat() as answered, trio.open_nursery() as nursery:
            nursery.start_soon(stop, world, answered, 3.0)
            async for _ in answered:
                pass
        assert isinstance(answered.events[-1], AgentStopped)
        assert (answered.arrivals[-1], upstream(world)) == (3.0, [])
        world.network.restore(*VENDOR)
        assert is_done(await world.chat())


async def test_a_stop_while_the_end_is_drained_closes_the_connection_then(autojump_clock: MockClock) -> None:
    async with world_with([STREAM_HEAD, WORD, 1.0, chunked(DONE_EVENT), "hang"]) as (world, _):
        async with world.open_chat() as answered, trio.open_nursery() as nursery:
            nursery.start_soon(stop, world, answered, 1.25)
            async for _ in answered:
                pass
        assert isinstance(answered.events[-1], AgentStopped)
        assert await closed_at(world) == [1.25]


@pytest.mark.parametrize("deadlines", [{"idle": 1.125}, {"total": 1.125}])
async def test_a_complete_answer_is_done_however_near_the_deadline(
    deadlines: dict[str, float], autojump_clock: MockClock
) -> None:
    async with world_with([STREAM_HEAD, WORD, 1.0, chunked(DONE_EVENT), "hang"]) as (world, _):
        answered = await world.chat(deadlines=deadlines)
        assert is_done(answered)
        assert await closed_at(world) == [1.0625]


async def test_a_hundred_ends_of_every_kind_leave_one_idle_connection_at_most(autojump_clock: MockClock) -> None:
    scripts: list[list[Act]] = [
        SLOWLY,
        ["close"],
        [STREAM_HEAD, WORD, "hang"],
        [STREAM_HEAD, WORD, "reset"],
        [STREAM_HEAD, WORD, chunked(b"data: {\n\n"), "hang"],
        [answer(b"", status="500 Oops")],
    ]
    async with world_with(*(scripts[index % len(scripts)] for index in range(120))) as (world, vendor):
        world.add_agent(deadlines=Deadlines(first_token=3, idle=2, connect=1))
        for index in range(120):
            with trio.move_on_after(0.5 + index % 7):
                await world.chat(on_disconnect="cancel")
        assert len(vendor.requests) >= 120
        assert (await closed_at(world)).count(None) <= 1
        assert world.supervisor.active_runs == 0
        assert world.journal.bugs == []
