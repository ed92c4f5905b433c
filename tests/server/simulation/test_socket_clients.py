"""What simulated clients do on a WebSocket of a real server in memory, and what they see of it."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from server.remote_log import OUTAGE_SECONDS
from server.simulation.plan import AnswerPlan, ClientAct, ClientPlan, EventPlan, Plan, ReplyPlan, StepPlan, VendorPlan
from server.simulation.run_plan import simulate
from tests.harness.world import LUMOS
from tests.server.simulation.client_scene import TEXT, kinds, numbers, open_scene, said


def after(wait: float, act: ClientAct, **fields: Any) -> StepPlan:
    return StepPlan(act=act, after=wait, **fields)


@pytest.mark.parametrize("read_bytes", [3, 65_536])
async def test_runs_are_read_side_by_side(autojump_clock: MockClock, read_bytes: int) -> None:
    async with open_scene() as scene:
        one, two = await scene.act(manner="socket", agents=(0, 1), read_bytes=read_bytes)
    for response in (one, two):
        assert (response.what, response.status, response.ending) == ("socket", 200, "whole")
        assert said(response) == TEXT
        assert numbers(response) == list(range(1, len(response.frames) + 1))
        assert {frame.id.partition(".")[0] for frame in response.frames} == {response.run_id}
    assert one.run_id != two.run_id


async def test_a_sockets_frames_are_those_of_http(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        socket, events = await scene.act(after(0.7, "second_reader"), manner="socket")
    assert (events.what, events.run_id) == ("events", socket.run_id)
    assert [frame.frame for frame in socket.frames] == [frame.frame for frame in events.frames]


@pytest.mark.parametrize("act", ["leave", "reset"])
async def test_who_leaves_and_comes_back_gets_all_of_it_once(autojump_clock: MockClock, act: ClientAct) -> None:
    async with open_scene() as scene:
        responses = await scene.act(
            StepPlan(act=act, events=9, after=100.0), after(0.5, "resume"), manner="socket", agents=(0, 1)
        )
    assert len(responses) == 4
    for run_id in {response.run_id for response in responses}:
        first, second = (response for response in responses if response.run_id == run_id)
        assert (first.ending, second.ending) == ("left", "whole")
        assert second.after == len(first.frames)
        assert said(first, second) == TEXT


async def test_a_stop_is_noted_when_it_is_answered(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        (one, two) = await scene.act(after(1.25, "stop"), manner="socket", agents=(0, 1))
        assert scene.observations.stops == {one.run_id: 1.25}
    assert kinds(one)[-1] == "stop"
    assert kinds(two)[-1] == "done"


async def test_what_a_client_does_beside_its_socket(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        responses = await scene.act(
            after(0.6, "state"),
            after(0.1, "pause", seconds=0.2),
            after(0.1, "resume_forged", number=3),
            after(0.1, "stop_elsewhere"),
            after(0.1, "post_again"),
            after(0.1, "delete"),
            manner="socket",
        )
        assert list(scene.observations.stops) == [responses[0].run_id]
    assert [response.what for response in responses] == ["socket", "state", "stop", "socket", "delete"]
    assert [response.status for response in responses] == [200, 200, 200, 200, 204]
    assert kinds(responses[3])[-1] == "stop"


async def test_reading_on_from_a_number(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        first, again = await scene.act(after(1.0, "resume_from", number=2), manner="socket")
        assert (first.ending, again.after, numbers(again)[0]) == ("left", 2, 3)
        assert TEXT.endswith(said(again))
        ahead = (await scene.act(after(1.0, "resume_from", number=900), manner="socket", number=1))[-1]
    assert (ahead.status, ahead.ending, ahead.frames) == (400, "whole", [])
    assert b"INVALID_CURSOR" in ahead.body


async def test_a_half_closed_socket_is_no_broken_one(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        (socket,) = await scene.act(after(1.0, "half_close"), manner="socket")
    assert socket.ending in ("left", "whole")


async def test_a_socket_that_is_cut_is_opened_again_after_a_second(autojump_clock: MockClock) -> None:
    async with open_scene() as scene, trio.open_nursery() as nursery:

        async def cut() -> None:
            await trio.sleep(1.25)
            for connection in scene.network.open_connections(LUMOS[0]):
                connection.cut(reset=True)

        nursery.start_soon(cut)
        first, second = await scene.act(manner="socket")
    assert (first.ending, first.ended_at, second.asked_at) == ("broken", 1.25, 2.25)
    assert said(first, second) == TEXT


async def test_a_refused_start_is_an_answer(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.world.agents.pop("agent0")
        none, one = await scene.act(manner="socket", agents=(0, 1))
    assert (none.status, none.ending) == (400, "whole")
    assert b"NOT_FOUND" in none.body
    assert said(one) == TEXT


async def test_a_refused_socket_is_an_answer(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.world.supervisor.draining = True
        (refused,) = await scene.act(manner="socket")
    assert (refused.status, refused.ending) in ((503, "whole"), (400, "whole"))
    assert b"code" in refused.body


async def test_nobody_there_is_no_socket(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.worker_hosts.clear()
        assert await scene.act(manner="socket") == []


async def test_a_slow_socket_gets_all_of_the_text(autojump_clock: MockClock) -> None:
    reply = ReplyPlan(characters=20_000, pieces=200)
    async with open_scene(AnswerPlan(reply=reply), window=2048) as scene:
        (socket,) = await scene.act(manner="socket", read_bytes=4096, read_pause=0.5, window=2048)
    assert socket.ending == "whole"
    assert len(said(socket)) == 20_000
    assert socket.ended_at > 5.0


async def test_a_run_that_never_ends_is_left_to_see(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        listener = scene.network.listen("silent", 80)
        scene.worker_hosts[0] = ("silent", 80)
        await scene.act(manner="socket")
        assert trio.current_time() < 100.0, "the handshake has a limit"
        await listener.aclose()


@pytest.mark.parametrize(
    "more", [(), (StepPlan(act="stop", after=2.0),)], ids=["alone", "beside a stop that is refused"]
)
def test_a_run_that_cannot_be_read_on_is_cut_and_asked_for_again(more: tuple[StepPlan, ...]) -> None:
    client = ClientPlan(manner="socket", steps=(after(1.0, "resume_elsewhere"), *more))
    away = EventPlan(at=2.0, act="shared_away")
    vendors = (VendorPlan(answers=(AnswerPlan(reply=ReplyPlan(seconds=20.0)),)),)
    plan = Plan(seed=1, workers=2, shared=True, vendors=vendors, clients=(client,), events=(away,))
    seen = simulate(plan).observations
    left, cut, again = (response for response in seen.responses if response.what == "socket")
    assert (left.ending, cut.ending) == ("left", "broken")
    assert cut.ended_at - 2.0 == pytest.approx(OUTAGE_SECONDS, abs=1.0)
    assert (again.run_id, again.after) == (cut.run_id, len(left.frames) + len(cut.frames))
    assert not seen.stops
