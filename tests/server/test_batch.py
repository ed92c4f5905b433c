"""Batches: many runs on one connection, one order, numbered once, read again from any number on."""

from __future__ import annotations

import random

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from engine import LogEntry, Run
from server.batch_log import MARK_EVERY, READ_BYTES, Batch, BatchedRun, BatchLog, BatchStarted, MergedOrder
from server.batch_start import MAX_REQUESTS
from server.batches import BatchDirectory
from server.sse import HEARTBEAT_SECONDS
from tests.engine.scripted import FOREVER, text
from tests.harness.world import open_keeping_world, open_world
from tests.server.api_scene import API, Caller
from tests.server.batch_scene import (
    BATCH,
    BatchReader,
    ask,
    assert_one_log,
    open_batch,
    read_again,
    runs_of,
    speaking,
    two,
    whole_batch,
)
from tests.server.raw_http import raw_client, request_bytes

# One order


async def test_the_runs_events_come_as_they_happen_on_one_connection(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        reader = await whole_batch(world, ask("left", "right"))
        assert reader.story == [
            (0, "left", "start"),
            (0, "right", "start"),
            (1, "left", "l1 "),
            (2, "right", "r1 "),
            (3, "left", "l2 "),
            (4, "right", "r2"),
            (4, "right", "step_complete"),
            (4, "right", "done"),
            (5, "left", "l3"),
            (5, "left", "step_complete"),
            (5, "left", "done"),
        ]
        assert_one_log(reader)
        first, last = reader.frames[0], reader.frames[-1]
        left, right = runs_of(world, reader)
        assert first.pop("timestamp")
        assert first == {
            "chunk_type": "batch_start",
            "batch_id": reader.batch_id,
            "runs": [
                {"index": 0, "run_id": left.id, "agent_id": "left", "session_id": "default"},
                {"index": 1, "run_id": right.id, "agent_id": "right", "session_id": "default"},
            ],
        }
        assert last == {
            "chunk_type": "batch_done",
            "batch_id": reader.batch_id,
            "runs": [
                {"index": 0, "run_id": left.id, "status": "done"},
                {"index": 1, "run_id": right.id, "status": "done"},
            ],
        }
        assert reader.response.headers["Location"] == f"/api/v1/batch/{reader.batch_id}/events"
        assert reader.raw.startswith(b"retry: 1000\nid: ")
        assert reader.raw.count(b"retry:") == 1
        assert len(world.network.connections) == 1


async def test_a_frame_is_the_runs_own_and_names_it(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        reader = await whole_batch(world, ask("left", "right"))
        for run in runs_of(world, reader):
            own = [msgspec.json.decode(entry.frame.partition(b"data: ")[2]) for entry in run.log.entries()]
            batched = [frame for frame in reader.frames if frame.get("run_id") == run.id]
            assert batched == [event | {"run_id": run.id} for event in own]


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_the_times_every_run_is_whole_and_in_order(seed: int, autojump_clock: MockClock) -> None:
    dice = random.Random(seed)
    async with open_world() as world:
        names = [f"a{number}" for number in range(dice.randrange(1, MAX_REQUESTS + 1))]
        said: dict[str, str] = {}
        for name in names:
            times = sorted(dice.uniform(0, 5) for _ in range(dice.randrange(1, 20)))
            words = [f"{name}-{number} " for number in range(len(times))]
            said[name] = "".join(words)
            lines = [(at, text(word)) for at, word in zip(times, words, strict=True)]
            world.add_agent(name, speaking(*lines))
        reader = await whole_batch(world, ask(*names))
        assert_one_log(reader)
        ends = [frame for frame in reader.frames if frame["chunk_type"] == "done"]
        assert len(ends) == len(names)
        for run in reader.frames[0]["runs"]:
            own = [frame for frame in reader.frames if frame.get("run_id") == run["run_id"]]
            assert "".join(f["content"] for f in own if f["chunk_type"] == "content") == said[run["agent_id"]]
            assert own[0]["chunk_type"] == "start"
            assert own[-1]["chunk_type"] == "done"


@given(takes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2 * MARK_EVERY)), max_size=8), data=st.data())
def test_an_order_tells_of_any_number_whose_event_it_is(takes: list[tuple[int, int]], data: st.DataObject) -> None:
    order = MergedOrder(4)
    plain: list[tuple[int, int]] = []
    taken = [0] * 4
    for run, count in takes:
        order.take(run, count)
        plain += [(run, taken[run] + number) for number in range(1, count + 1)]
        taken[run] += count
    assert len(order) == len(plain)
    assert order.taken == taken
    for after in {0, len(plain), data.draw(st.integers(0, len(plain)))}:
        assert list(order.places(after)) == plain[after:]


# Resumed


async def test_from_any_number_on_the_rest_comes_again_to_the_byte(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        reader = await whole_batch(world, ask("left", "right"))
        frames = [frame + b"\n\n" for frame in reader.raw.split(b"\n\n")[:-1]]
        for after in range(len(frames)):
            response = await read_again(world, reader.batch_id, after)
            assert response.content == b"".join(frames[after:])
            header = {"Last-Event-ID": f"{reader.batch_id}.{after}"}
            assert (await read_again(world, reader.batch_id, headers=header)).content == response.content
        nothing = await read_again(world, reader.batch_id, len(frames))
        assert (nothing.status_code, nothing.content) == (204, b"")


async def test_a_dropped_reader_goes_on_where_it_was_while_the_runs_run(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        raw, ids = b"", []
        async with open_batch(world, ask("left", "right")) as reader:
            async for frame in reader:
                if frame.get("content") == "r1 ":
                    break
            raw, ids = reader.raw, reader.ids
        await trio.sleep_until(4.5)
        url = f"{BATCH}/{reader.batch_id}/events"
        async with world.client.stream("GET", url, headers={"Last-Event-ID": ids[-1]}) as response:
            rest = await BatchReader(response).rest()
        assert_one_log(rest, after=len(ids))
        assert raw + rest.raw == (await read_again(world, reader.batch_id)).content


async def test_a_repeated_request_that_has_events_reads_on_and_starts_nothing(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        reader = await whole_batch(world, ask("left", "right"))
        for after in (1, 5, len(reader.ids)):
            headers = {"Last-Event-ID": reader.ids[after - 1]}
            response = await world.client.post(f"{BATCH}/stream", json=ask("left", "right"), headers=headers)
            again = await read_again(world, reader.batch_id, after)
            assert (response.status_code, response.content) == (again.status_code, again.content)
        headers = {"Last-Event-ID": "A" * 22 + ".1"}
        response = await world.client.post(f"{BATCH}/stream", json=ask("left", "right"), headers=headers)
        assert response.status_code == 404
        assert [what for what, _, _ in world.journal.entries].count("started") == 2


async def test_two_readers_at_different_places_see_the_same_order(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        seen: list[bytes] = []

        async def follow(batch_id: str, at: float) -> None:
            await trio.sleep_until(at)
            seen.append((await read_again(world, batch_id)).content)

        async with open_batch(world, ask("left", "right")) as reader, trio.open_nursery() as nursery:
            for at in (0.5, 1.0, 2.5, 4.0):
                nursery.start_soon(follow, reader.batch_id, at)
            await reader.rest()
        assert seen == [reader.raw] * 4


CURSORS = {
    "ahead": ({"after": "999"}, {}),
    "no number": ({"after": "x"}, {}),
    "negative": ({"after": "-1"}, {}),
    "of another log": ({}, {"Last-Event-ID": "A" * 22 + ".1"}),
    "two that differ": ({"after": "1"}, {"Last-Event-ID": "{batch_id}.2"}),
}


@pytest.mark.parametrize("cursor", CURSORS)
async def test_a_cursor_that_cannot_be_is_refused(cursor: str, autojump_clock: MockClock) -> None:
    query, headers = CURSORS[cursor]
    async with open_world() as world:
        two(world)
        reader = await whole_batch(world, ask("left"))
        headers = {name: value.format(batch_id=reader.batch_id) for name, value in headers.items()}
        response = await world.client.get(f"{BATCH}/{reader.batch_id}/events", params=query, headers=headers)
        assert (response.status_code, response.json()["code"]) == (400, "INVALID_CURSOR")
        assert "run" not in response.json()["message"], "it is a batch's"


async def test_a_batch_is_gone_when_a_run_of_it_is(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        reader = await whole_batch(world, ask("left", "right"))
        left, _ = runs_of(world, reader)
        await world.client.delete(f"{API}/runs/{left.id}")
        assert (await read_again(world, reader.batch_id)).status_code == 410
        state = (await world.client.get(f"{BATCH}/{reader.batch_id}")).json()["data"]
        assert [run["status"] for run in state["runs"]] == [None, "done"]


async def test_a_batch_is_kept_as_long_as_its_runs(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        reader = await whole_batch(world, ask("left", "right"))
        await trio.sleep_until(4 + 600 - 1)
        assert (await read_again(world, reader.batch_id)).content == reader.raw
        await trio.sleep_until(5 + 600 + 1)
        assert (await read_again(world, reader.batch_id)).status_code == 410


async def test_an_unknown_batch_is_not_there(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        for path in ("", "/events"):
            assert (await world.client.get(f"{BATCH}/{'A' * 22}{path}")).status_code == 404
        assert (await world.client.post(f"{BATCH}/{'A' * 22}/stop")).status_code == 404


async def test_batches_whose_events_are_gone_make_room_then_the_oldest(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        directory = BatchDirectory(world.supervisor, max_batches=10)

        def add(name: str, *runs: Run) -> None:
            started = BatchStarted(name, "now", tuple(BatchedRun(0, run.id, "a", "s") for run in runs))
            directory.add(Batch(name, ("t", "u"), started), list(runs))

        def names() -> list[str]:
            return [name for name in ("gone", *map(str, range(20))) if directory.find_here(name)]

        add("0")
        two(world)
        (run, *_) = runs_of(world, await whole_batch(world, ask("left")))
        add("gone", run)
        world.supervisor.forget(run)
        for number in range(1, 9):
            add(str(number))
        assert names() == ["gone", *map(str, range(9))]
        add("9")
        assert names() == [str(number) for number in range(1, 10)], "one more than had to go: a tenth is free"
        for number in range(10, 20):
            add(str(number))
            assert len(directory) <= 10
        assert names()[-9:] == [str(number) for number in range(11, 20)]


# Stopped


async def test_one_is_stopped_and_the_others_go_on(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        async with open_batch(world, ask("left", "right")) as reader:
            async for frame in reader:
                if frame.get("content") == "l1 ":
                    await world.client.post(f"{API}/runs/{frame['run_id']}/stop")
        assert [(agent, what) for at, agent, what in reader.story if at > 0] == [
            ("left", "l1 "),
            ("left", "stop"),
            ("right", "r1 "),
            ("right", "r2"),
            ("right", "step_complete"),
            ("right", "done"),
        ]
        assert [run["status"] for run in reader.frames[-1]["runs"]] == ["stop", "done"]


async def test_all_are_stopped_at_once(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        async with open_batch(world, ask("left", "right")) as reader:
            async for frame in reader:
                if frame.get("content") == "r1 ":
                    response = await world.client.post(f"{BATCH}/{reader.batch_id}/stop")
                    state = response.json()["data"]
        assert state["status"] == "done"
        assert [run["status"] for run in state["runs"]] == ["stop", "stop"]
        assert state["last_seq"] == len(reader.ids)
        assert reader.arrivals[-1] == 2
        await trio.testing.wait_all_tasks_blocked()
        assert world.supervisor.active_runs == 0
        again = await world.client.post(f"{BATCH}/{reader.batch_id}/stop")
        assert again.json()["data"] == state


async def test_a_batchs_state_follows_its_runs(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        async with open_batch(world, ask("left", "nobody", "right")) as reader:
            async for frame in reader:
                if frame["chunk_type"] == "done":
                    break
            state = (await world.client.get(f"{BATCH}/{reader.batch_id}")).json()["data"]
            assert (state["status"], [run["status"] for run in state["runs"]]) == ("running", ["running", "done"])
            assert [(one["index"], one["code"]) for one in state["refused"]] == [(1, "NOT_FOUND")]


# Left


@pytest.mark.parametrize(("on_disconnect", "grace"), [("cancel", 0.0), ("grace", 5.0)])
async def test_who_leaves_a_batch_leaves_each_run(on_disconnect: str, grace: float, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        models = [speaking((1, text("x")), (FOREVER, ())) for _ in range(3)]
        for number, model in enumerate(models):
            world.add_agent(f"a{number}", model)
        with trio.move_on_after(10):
            await whole_batch(world, ask("a0", "a1", "a2", on_disconnect=on_disconnect))
        await trio.sleep_until(20)
        assert [model.seen[-1] for model in models] == [(10 + grace, "cancelled")] * 3
        assert world.supervisor.active_runs == 0


async def test_a_run_may_want_another_end_than_its_batch(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        models = [speaking((25, text("x"))) for _ in range(2)]
        for number, model in enumerate(models):
            world.add_agent(f"a{number}", model)
        body = ask("a0", "a1", on_disconnect="cancel")
        body["requests"][1]["on_disconnect"] = "continue"
        with trio.move_on_after(10):
            await whole_batch(world, body)
        await trio.sleep_until(60)
        assert [model.seen[-1] for model in models] == [(10, "cancelled"), (25, "answered")]


@pytest.mark.parametrize("seed", range(10))
async def test_whenever_it_is_left_nothing_stays(seed: int, autojump_clock: MockClock) -> None:
    dice = random.Random(seed)
    async with open_world() as world:
        two(world)
        for _ in range(20):
            with trio.move_on_after(dice.choice([0, 1e-9, dice.uniform(0, 6)])):
                await whole_batch(world, ask("left", "right", "left", on_disconnect="cancel"))
        await trio.sleep(10)
        assert world.supervisor.active_runs == 0


async def test_a_slow_reader_slows_no_run_and_loses_nothing(autojump_clock: MockClock) -> None:
    async with open_world(window=1000) as world:
        lines = [(1 + number / 100, text(f"{number} " + "x" * 100)) for number in range(200)]
        world.add_agent("a", speaking(*lines))
        world.add_agent("b", speaking(*lines))
        body = msgspec.json.encode(ask("a", "b"))
        async with raw_client(world) as client:
            await client.stream.send_all(request_bytes("POST", "/api/v1/batch/stream", body))
            head = await client.read_head()
            await trio.sleep(4)
            ended = [at for what, _, at in world.journal.entries if what == "ended"]
            assert ended == [1 + 1.99] * 2
            got = b"".join([chunk async for chunk in client.body_chunks()])
        batch_id = head.partition(b"x-batch-id: ")[2].partition(b"\r\n")[0].decode()
        assert got == (await read_again(world, batch_id)).content
        assert b"batch_done" in got


async def test_a_read_is_bounded_however_much_there_is(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        lines = [(1 + number, text("word " * 10_000)) for number in range(19)]
        world.add_agent("a", speaking(*lines))
        world.add_agent("b", speaking(*lines))
        reader = await whole_batch(world, ask("a", "b"))
        runs = runs_of(world, reader)
        started = BatchStarted("b", "now", tuple(BatchedRun(n, run.id, "a", "s") for n, run in enumerate(runs)))
        batch = Batch("b", ("t", "u"), started)
        log = BatchLog(batch, [run.log for run in runs])
        reads: list[list[LogEntry]] = []
        while entries := await log.read(reads[-1][-1].seq if reads else 0):
            reads.append(entries)
        assert len(reads) > 4
        longest = max(len(entry.frame) for entries in reads for entry in entries)
        assert all(sum(len(entry.frame) for entry in entries) <= max(READ_BYTES, longest) for entries in reads)
        assert [entry.seq for entries in reads for entry in entries] == list(range(1, log.last_seq + 1))
        assert (await read_again(world, reader.batch_id)).content == reader.raw


async def test_a_silent_batch_gets_heartbeats(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent("a", speaking((20, text("x"))))
        reader = await whole_batch(world, ask("a"))
        assert reader.raw.count(b": heartbeat\n\n") == 20 // HEARTBEAT_SECONDS


# Whose it is


async def test_a_batch_is_its_owners(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        two(world)
        ada = await world.add_key("acme", "ada")
        reader = await whole_batch(world, ask("left", "right"), ada)
        for tenant, user, admin, status in (
            ("acme", "ada", False, 200),
            ("acme", "boss", True, 200),
            ("acme", "bob", False, 404),
            ("other", "ada", True, 404),
        ):
            caller = Caller(world, await world.add_key(tenant, user, admin=admin))
            path = f"/batch/{reader.batch_id}"
            for method, more in (("GET", ""), ("GET", "/events"), ("POST", "/stop")):
                assert (await caller.ask(method, path + more)).status_code == status


async def test_a_head_request_reads_nothing(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        reader = await whole_batch(world, ask("left"))
        response = await world.client.head(f"{BATCH}/{reader.batch_id}/events")
        assert (response.status_code, response.content) == (200, b"")
