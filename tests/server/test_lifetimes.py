"""Two lifetimes: a connection reads, a run runs; a client that leaves ends its run after the grace, a stop at once.

The provider is asked directly, and through a failover chain, as every agent from a file has it: that changes nothing.
"""

from __future__ import annotations

from math import inf

import pytest
import trio
from trio.testing import MockClock

from engine import AgentStopped, GenerationComplete, TextDelta
from providers.recording import load
from tests.harness.recordings import steady_recording
from tests.harness.vendor import VendorServer
from tests.harness.world import VENDOR, World, open_world

pytestmark = pytest.mark.parametrize("in_chain", [False, True], ids=["bare", "in a chain"])

RECORDING = steady_recording(first=2.5, last=93.0)
FIRST_TOKEN = RECORDING.reads[0].at_ns / 1e9
LAST_TOKEN = 93.0
GRACES = {"cancel": 0.0, "grace": 5.0, "continue": inf}


async def leave_at(world: World, seconds: float, on_disconnect: str) -> None:
    """Start a chat and close the connection so many seconds after the request."""
    with trio.move_on_after(seconds):
        await world.chat(on_disconnect=on_disconnect)


def upstream_closed_at(world: World) -> float | None:
    """When the connection to the model server was closed from our side; None while it is open or kept for reuse."""
    (upstream,) = (c for c in world.network.connections if c.server.socket.local == VENDOR)
    return upstream.client.closed_at


@pytest.mark.parametrize("on_disconnect", GRACES)
@pytest.mark.parametrize("left_at", [0.1, FIRST_TOKEN, 40.0, LAST_TOKEN - 0.5], ids="{:.1f} s".format)
async def test_a_client_that_leaves_closes_the_upstream_after_the_grace(
    left_at: float, on_disconnect: str, in_chain: bool, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        world.add_agent(in_chain=in_chain)
        vendor: VendorServer = await world.add_vendor(RECORDING)
        await leave_at(world, left_at, on_disconnect)
        await trio.sleep_until(200)
        asked_at = vendor.calls[0].started_at
        closing = left_at + GRACES[on_disconnect]
        if closing < LAST_TOKEN:
            assert upstream_closed_at(world) == asked_at + left_at + GRACES[on_disconnect]
            assert vendor.calls[0].ended_at == asked_at + closing
        else:
            assert vendor.calls[0].finished
            assert upstream_closed_at(world) is None, "kept for the next request"
        assert world.supervisor.active_runs == 0


async def test_a_client_that_leaves_after_the_end_leaves_the_connection_for_reuse(
    in_chain: bool, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        world.add_agent(in_chain=in_chain)
        await world.add_vendor(RECORDING)
        await world.chat()
        await world.chat()
        assert world.upstream_open() == 1
        assert len(world.network.connections) == 2


async def test_a_reader_that_comes_back_in_time_keeps_the_run(in_chain: bool, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(in_chain=in_chain)
        await world.add_vendor(RECORDING)
        async with world.open_chat() as answer:
            await trio.sleep(10)
        await trio.sleep(4.9)
        url = f"http://lumos/api/v1/runs/{answer.run_id}/events"
        async with world.client.stream("GET", url) as response:
            body = b"".join([chunk async for chunk in response.aiter_raw()])
        assert body.count(b'"chunk_type":"done"') == 1
        assert world.journal.entries[-1] == ("ended", answer.run_id, answer.asked_at + LAST_TOKEN)


@pytest.mark.parametrize("stopped_at", [0.1, FIRST_TOKEN, 40.0], ids="{:.1f} s".format)
async def test_a_stop_closes_the_upstream_at_once_and_keeps_the_text(
    stopped_at: float, in_chain: bool, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        world.add_agent(in_chain=in_chain)
        vendor = await world.add_vendor(RECORDING)
        async with world.open_chat() as answer, trio.open_nursery() as nursery:

            async def stop() -> None:
                await trio.sleep_until(answer.asked_at + stopped_at)
                url = f"http://lumos/api/v1/runs/{answer.run_id}/stop"
                for _ in range(2):  # the second one finds it stopped
                    reply = await world.client.post(url)
                    assert reply.json()["data"]["status"] == "stop"

            nursery.start_soon(stop)
            async for _ in answer:
                pass
        stopped = answer.events[-1]
        assert isinstance(stopped, AgentStopped)
        assert answer.arrivals[-1] == vendor.calls[0].ended_at == answer.asked_at + stopped_at
        assert upstream_closed_at(world) == answer.asked_at + stopped_at
        said = "".join(event.content for event in answer.events if isinstance(event, TextDelta))
        assert stopped.response == said
        assert stopped.usage is not None, "the request had been sent"
        assert (stopped.usage.output_tokens > 0) == bool(said)


async def test_a_stop_wins_over_a_completion_that_comes_later(in_chain: bool, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(in_chain=in_chain)
        await world.add_vendor(RECORDING)
        async with world.open_chat(on_disconnect="continue") as answer:
            await trio.sleep_until(answer.asked_at + 92.99)
            run = world.supervisor.find(answer.run_id)
            assert run is not None
            assert run.stop()
            await trio.sleep(10)
            assert not run.stop()
            assert isinstance(run.log.terminal, AgentStopped)


async def test_a_client_that_leaves_the_whole_answer_ends_the_run(in_chain: bool, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(in_chain=in_chain)
        vendor = await world.add_vendor(RECORDING)
        url = "http://lumos/api/v1/agents/demo/chat/lumosai"
        with trio.move_on_after(3):
            await world.client.post(url, json={"message": "hi", "on_disconnect": "cancel"})
        await trio.sleep(1)
        assert vendor.calls[0].ended_at == vendor.calls[0].started_at + 3
        reply = await world.client.post(url, json={"message": "hi"})
        assert reply.json()["data"]["content"] == RECORDING.text


async def test_runs_that_end_leave_one_terminal_event_each(in_chain: bool, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(in_chain=in_chain)
        await world.add_vendor(load("gpt4o-short"))
        answers = [await world.chat() for _ in range(3)]
        assert all(isinstance(answer.events[-1], GenerationComplete) for answer in answers)
        assert [what for what, _, _ in world.journal.entries] == ["started", "first_token", "ended"] * 3
