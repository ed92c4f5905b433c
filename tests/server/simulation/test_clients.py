"""What simulated clients do to a real server in memory, and what they see of it, over HTTP."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from server.simulation.observations import Response
from server.simulation.plan import AnswerPlan, ClientAct, ReplyPlan, StepPlan
from tests.harness.world import LUMOS
from tests.server.simulation.client_scene import REPLY, TEXT, data, kinds, numbers, open_scene, said


def after(wait: float, act: ClientAct, **fields: Any) -> StepPlan:
    return StepPlan(act=act, after=wait, **fields)


def of_kind(responses: list[Response], what: str) -> list[Response]:
    return [response for response in responses if response.what == what]


@pytest.mark.parametrize("read_bytes", [1, 7, 65_536])
async def test_a_stream_is_seen_frame_by_frame(autojump_clock: MockClock, read_bytes: int) -> None:
    async with open_scene() as scene:
        (chat,) = await scene.act(read_bytes=read_bytes, at=1.0)
    assert (chat.what, chat.status, chat.ending, chat.asked_at) == ("chat", 200, "whole", 1.0)
    assert chat.headers["x-run-id"] == chat.run_id
    assert said(chat) == TEXT
    assert numbers(chat) == list(range(1, len(chat.frames) + 1))
    assert kinds(chat)[0] == "start"
    assert kinds(chat)[-1] == "done"
    assert chat.frames[0].frame.startswith(b"retry: 1000\nid: ")
    first = next(frame for frame in chat.frames if b'"content"' in frame.frame)
    assert (first.at, chat.ended_at) == (1.0 + REPLY.first_after, 1.0 + REPLY.first_after + REPLY.seconds)


async def test_a_whole_answer(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        (whole,) = await scene.act(manner="whole")
    assert (whole.what, whole.status, whole.ending, whole.ended_at) == ("whole", 200, "whole", 2.4)
    assert msgspec.json.decode(whole.body)["data"]["content"] == TEXT
    assert whole.run_id


async def test_a_batch_is_one_stream(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        (batch,) = await scene.act(manner="batch", agents=(0, 1))
    assert (batch.what, batch.ending) == ("batch", "whole")
    assert numbers(batch) == list(range(1, len(batch.frames) + 1))
    assert kinds(batch)[0] == "batch_start"
    assert kinds(batch)[-1] == "batch_done"
    assert kinds(batch).count("done") == 2
    runs = {data(frame.frame)["run_id"] for frame in batch.frames[1:-1]}
    assert set(scene.observations.batches[batch.run_id]) == runs


async def test_who_leaves_and_resumes_gets_all_of_it_once(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        first, second, third = await scene.act(
            StepPlan(act="leave", events=5, after=100.0),
            after(1.0, "resume"),
            StepPlan(act="reset", events=3, after=100.0),
            after(0.5, "resume", number=1),
        )
    assert (first.ending, second.ending, third.ending) == ("left", "left", "whole")
    assert (second.what, third.what) == ("events", "chat")
    assert [second.after, third.after] == [numbers(first)[-1], numbers(second)[-1]]
    assert numbers(first, second, third) == list(range(1, third.after + len(third.frames) + 1))
    assert said(first, second, third) == TEXT


async def test_who_resets_sends_more_than_an_end(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        await scene.act(after(1.0, "reset"))
        await scene.act(after(1.0, "leave"), number=1)
        broken = [c.to_server.broken for c in scene.network.connections if c.server.socket.local == LUMOS]
    assert broken == [True, False]


@pytest.mark.parametrize("manner", ["stream", "batch"])
async def test_a_stop_is_noted_when_it_is_answered(autojump_clock: MockClock, manner: str) -> None:
    async with open_scene() as scene:
        responses = await scene.act(after(1.25, "stop"), manner=manner, agents=(0, 1))
        stream, stop = responses
        assert (stop.what, stop.status, stop.ended_at) == ("stop", 200, 1.25)
        assert set(scene.observations.stops.values()) == {1.25}
        runs = {data(frame.frame).get("run_id", stream.run_id) for frame in stream.frames[1:-1]}
        assert set(scene.observations.stops) == runs
        assert len(runs) == (2 if manner == "batch" else 1)
    assert "stop" in kinds(stream)
    assert stream.ended_at == 1.25


async def test_what_a_client_does_beside_its_stream(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        responses = await scene.act(
            after(0.6, "second_reader"),
            after(0.1, "post_again"),
            after(0.1, "state"),
            after(0.1, "pause", seconds=0.3),
            after(0.1, "delete"),
            idempotent=True,
        )
    chat, beside, again, state, delete = responses
    assert [response.what for response in responses] == ["chat", "events", "chat", "state", "delete"]
    assert [response.status for response in responses] == [200, 200, 200, 200, 204]
    assert chat.run_id == beside.run_id == again.run_id
    assert [frame.frame for frame in beside.frames] == [frame.frame for frame in chat.frames]
    assert msgspec.json.decode(state.body)["data"]["status"] == "running"
    assert delete.asked_at == pytest.approx(1.3)
    assert kinds(chat)[-1] == "stop"


async def test_without_its_key_the_same_post_is_another_run(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        chat, again = await scene.act(after(0.6, "post_again"))
    assert chat.run_id != again.run_id
    assert said(again) == TEXT


@pytest.mark.parametrize("number", range(7))
async def test_forged_ids_are_refused(autojump_clock: MockClock, number: int) -> None:
    async with open_scene() as scene:
        chat, forged = await scene.act(after(1.0, "resume_forged", number=number))
    assert (forged.status, forged.ending) == (400, "whole")
    assert said(chat) == TEXT


async def test_reading_on_from_a_number(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        chat, events = await scene.act(after(1.05, "resume_from", number=2))
        assert (chat.ending, events.after, numbers(events)[0]) == ("left", 2, 3)
        ahead = (await scene.act(after(1.05, "resume_from", number=900), number=1))[-1]
    assert (ahead.status, ahead.ending) == (400, "whole")
    assert TEXT.startswith(said(chat))
    assert TEXT.endswith(said(events))


async def test_a_half_closed_stream_is_no_broken_one(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        (chat,) = await scene.act(after(1.0, "half_close"))
    assert chat.ending in ("left", "whole")


async def test_who_comes_too_late_to_resume_hears_so(autojump_clock: MockClock) -> None:
    async with open_scene(AnswerPlan(reply=ReplyPlan(seconds=100.0))) as scene:
        chat, events = await scene.act(after(1.0, "leave"), after(20.0, "resume"))
    assert kinds(events)[-1] == "stop"
    assert numbers(chat, events) == list(range(1, len(chat.frames) + len(events.frames) + 1))


async def test_who_has_all_is_told_so(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        chat, events = await scene.act(after(30.0, "resume"))
    assert (events.status, events.ending, events.frames) == (204, "whole", [])
    assert events.after == len(chat.frames)


async def test_a_slow_reader_gets_larger_pieces_and_all_of_the_text(autojump_clock: MockClock) -> None:
    reply = ReplyPlan(characters=20_000, pieces=200)
    async with open_scene(AnswerPlan(reply=reply), window=2048) as scene:
        scene.network.window = 65_536
        (chat,) = await scene.act(read_bytes=4096, read_pause=0.5, window=2048)
        windows = {c.to_client.window for c in scene.network.connections if c.server.socket.local == LUMOS}
    assert windows == {2048}
    assert chat.ending == "whole"
    assert len(said(chat)) == 20_000
    assert kinds(chat).count("content") < 100
    assert chat.ended_at > 8.0


async def test_a_stream_that_is_cut_is_read_on_after_a_second(autojump_clock: MockClock) -> None:
    async with open_scene() as scene, trio.open_nursery() as nursery:

        async def cut() -> None:
            await trio.sleep(1.25)
            for connection in scene.network.open_connections(LUMOS[0]):
                connection.cut(reset=True)

        nursery.start_soon(cut)
        chat, events = await scene.act()
    assert (chat.ending, chat.ended_at, events.asked_at) == ("broken", 1.25, 2.25)
    assert events.after == len(chat.frames)
    assert said(chat, events) == TEXT


async def test_workers_that_are_not_there_are_passed_over(autojump_clock: MockClock) -> None:
    async with open_scene(workers=3) as scene:
        first, second, third = await scene.act(worker=1)
    assert [(response.worker, response.status, response.ending) for response in (first, second)] == [
        (1, 0, "broken"),
        (2, 0, "broken"),
    ]
    assert (third.worker, third.asked_at) == (0, 2.0)
    assert said(third) == TEXT


async def test_nobody_is_asked_for_ever(autojump_clock: MockClock) -> None:
    async with open_scene(workers=2) as scene:
        scene.worker_hosts.clear()
        responses = await scene.act()
        assert len(responses) == 13
        assert {response.ending for response in responses} == {"broken"}
        assert trio.current_time() == 12.0


async def test_a_server_that_drains_is_asked_again_when_it_says(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.world.supervisor.draining = True
        responses = await scene.act(idempotent=True)
        assert {response.status for response in responses} == {503}
        assert [response.asked_at for response in responses] == [5.0 * number for number in range(13)]


async def test_a_stream_that_never_ends_is_left_to_see(autojump_clock: MockClock) -> None:
    reply = ReplyPlan(first_after=1.0, seconds=1e6, pieces=100_000)
    async with open_scene(AnswerPlan(reply=reply)) as scene:
        scene.worker_hosts[0] = ("silent", 80)
        listener = scene.network.listen("silent", 80)
        await scene.act()
        await scene.act(number=1, read_pause=1.0)
        assert [response.ending for response in scene.observations.responses] == ["", "left"]
        assert trio.current_time() == 1800.0
        await listener.aclose()


ATTACKED = ({0, 400, 404}, {0, 408}, {200, 431}, {408}, {0}, {200, 400, 422}, {200, 400, 405, 501}, {200})
"""What each kind of attack is answered; 0 is a connection that was just closed."""


@pytest.mark.parametrize("number", range(24))
async def test_hostile_clients_harm_nobody(autojump_clock: MockClock, number: int) -> None:
    async with open_scene() as scene, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: scene.act(number=100))
        await trio.sleep(0.1)
        await scene.act(number=number, manner="hostile")
    (attack,) = of_kind(scene.observations.responses, "hostile")
    (chat,) = [response for response in of_kind(scene.observations.responses, "chat") if response.client == 100]
    assert attack.ending in ("broken", "left")
    assert attack.status in ATTACKED[number % len(ATTACKED)]
    assert said(chat) == TEXT


async def test_heartbeats_are_no_frames(autojump_clock: MockClock) -> None:
    async with open_scene(AnswerPlan(reply=ReplyPlan(first_after=29.0, seconds=0.0))) as scene:
        (chat,) = await scene.act()
    assert numbers(chat) == list(range(1, len(chat.frames) + 1))
    assert all(b": heartbeat" not in frame.frame for frame in chat.frames)


async def test_an_attack_ends_with_its_connection(autojump_clock: MockClock) -> None:
    async with open_scene() as scene, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: scene.act(number=3, manner="hostile"))
        await trio.sleep(2.0)
        for connection in scene.network.open_connections(LUMOS[0]):
            connection.reset()
    (attack,) = scene.observations.responses
    assert (attack.ending, attack.ended_at) == ("broken", 2.0)


async def test_the_same_clients_make_the_same_trace(autojump_clock: MockClock) -> None:
    texts = []
    for _ in range(2):
        async with open_scene() as scene:
            start = trio.current_time()
            steps = after(0.73, "leave"), after(0.51, "resume"), after(0.42, "state")  # when nothing is said
            await scene.act(*steps, at=start)
            lines = [line.split(maxsplit=1)[1] for line in scene.trace.lines]
            run_id = scene.observations.responses[0].run_id
            texts.append("".join(lines).replace(run_id, "RUN"))
    assert texts[0] == texts[1]
