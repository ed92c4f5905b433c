"""Reading a run again: from any event on, by any number of readers, always the same bytes, however often they drop."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import httpx
import pytest
import trio
from trio.testing import MockClock

from engine import Run
from server.app import API
from server.simulated import SimulatedBody
from server.sse import PIECE_BYTES, EventStreamBody
from server.testing.memory_connection import MemoryConnection
from tests.engine.scripted import SENT, Line, ScriptedProvider, text
from tests.harness.world import LUMOS, STREAM_URL, World, open_world

BASE = "http://lumos"
LAST_TOKEN = 30.0
SCRIPT: tuple[Line, ...] = (
    (0, (SENT,)),
    *((1 + number * 0.25, text(f"wörd{number} 🧵 ")) for number in range(100)),
    (LAST_TOKEN, text("end")),
)


def events_url(run_id: str) -> str:
    """Where a run's events are read again."""
    return f"{BASE}{API}/runs/{run_id}/events"


async def start(world: World, script: tuple[Line, ...] = SCRIPT) -> Run:
    """A run that goes on without a reader."""
    world.add_agent(provider=ScriptedProvider(*script))
    async with world.open_chat(on_disconnect="continue") as answer:
        run = world.supervisor.find(answer.run_id)
        assert run is not None
        return run


async def ended(world: World, script: tuple[Line, ...] = SCRIPT) -> Run:
    """A run that has ended."""
    run = await start(world, script)
    await trio.sleep(LAST_TOKEN + 1)
    assert run.log.ended
    return run


def frames(run: Run, after: int = 0) -> bytes:
    """What a reader of the run has to get after that event, to the byte."""
    return b"".join(entry.frame for entry in run.log.entries(after))


def assert_bad_cursor(response: httpx.Response) -> None:
    assert response.status_code == 400, response.content
    assert response.json()["code"] == "INVALID_CURSOR"


# From any event on


@pytest.mark.parametrize("way", ["header", "query", "both"])
async def test_every_cursor_gives_exactly_what_comes_after_it(way: str, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await ended(world)
        for after in range(run.log.last_seq):
            header = {"Last-Event-ID": f"{run.id}.{after}"} if way != "query" else {}
            query = {"after": str(after)} if way != "header" else {}
            response = await world.client.get(events_url(run.id), headers=header, params=query)
            assert response.status_code == 200
            assert response.content == frames(run, after)


LARGE: tuple[Line, ...] = ((0, (SENT,)), *((1 + number, text("word " * 1_000)) for number in range(25)))


async def test_a_large_backlog_comes_in_pieces(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await ended(world, LARGE)
        *pieces, done = [piece async for piece in EventStreamBody(run.log, after=0)]
        assert len(pieces) == 9
        assert max(map(len, pieces)) <= PIECE_BYTES
        assert done == run.log.entries()[-1].frame
        assert b"".join(pieces) + done == frames(run)


async def test_a_large_simulated_answer_comes_in_pieces(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await ended(world, LARGE)
        *pieces, done = [piece async for piece in SimulatedBody(run.log)]
        assert max(map(len, pieces)) <= PIECE_BYTES < len(done)
        assert b"".join(pieces).count(b'"chunk_type":"content"') == len(run.response) // 10


async def test_without_a_cursor_all_events_come(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await ended(world)
        response = await world.client.get(events_url(run.id))
        assert response.content == frames(run)
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache, no-transform"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["X-Run-Id"] == run.id


async def test_an_empty_last_event_id_is_none(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await ended(world)
        response = await world.client.get(events_url(run.id), headers={"Last-Event-ID": ""})
        assert response.content == frames(run)


async def test_a_reader_in_the_middle_gets_the_rest_then_what_comes_live(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await start(world)
        await trio.sleep(10.1)
        arrivals: list[float] = []
        received = b""
        async with world.client.stream("GET", f"{events_url(run.id)}?after=1") as response:
            while part := await response.extensions["body"].receive():
                arrivals.append(trio.current_time())
                received += part
        assert received == frames(run, 1)
        assert arrivals[:3] == [10.1, 10.25, 10.5]
        assert arrivals[-1] == LAST_TOKEN


@pytest.mark.parametrize("cursor", ["header", "query"])
async def test_after_the_end_there_is_nothing_to_come_back_for(cursor: str, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await ended(world)
        last = run.log.last_seq
        header = {"Last-Event-ID": f"{run.id}.{last}"} if cursor == "header" else {}
        query = {"after": str(last)} if cursor == "query" else {}
        response = await world.client.get(events_url(run.id), headers=header, params=query)
        assert (response.status_code, response.content) == (204, b"")
        assert response.headers["Cache-Control"] == "no-store"


async def test_at_the_newest_event_of_a_live_run_the_reader_waits(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await start(world)
        response = await world.client.get(f"{events_url(run.id)}?after=1")
        assert response.content == frames(run, 1)
        assert trio.current_time() == LAST_TOKEN


# Cursors that are none


BAD_NUMBERS = [
    "x",
    "-1",
    "+1",
    " 1",
    "1 ",
    "1.0",
    "1e1",
    "0x1",
    "\u0661",
    "\u00b2",
    "1,2",
    "01",
    "00",
    "9" * 13,
    "9" * 5000,
]


@pytest.mark.parametrize("number", [*BAD_NUMBERS, "", "nan", "%"], ids=lambda number: repr(number[:14]))
async def test_a_malformed_number_is_400(number: str, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await ended(world)
        assert_bad_cursor(await world.client.get(events_url(run.id), params={"after": number}))


@pytest.mark.parametrize(
    "event_id",
    [
        "x",
        ".",
        "1",
        ".1",
        "{id}",
        "{id}.",
        "{id}.x",
        "{id}.-1",
        "{id}.1.1",
        "{id}.03",
        "{id} .1",
        "{ID}.1",
        "{id}.\u00b2",
        "\xff",
    ],
)
async def test_a_malformed_event_id_is_400(event_id: str, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await ended(world)
        value = event_id.replace("{id}", run.id).replace("{ID}", run.id.swapcase()).encode("latin-1")
        assert_bad_cursor(await world.client.get(events_url(run.id), headers={b"Last-Event-ID": value}))


async def test_an_event_of_another_run_is_400(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run, other = await ended(world), await ended(world)
        headers = {"Last-Event-ID": f"{other.id}.1"}
        assert_bad_cursor(await world.client.get(events_url(run.id), headers=headers))


async def test_a_cursor_ahead_of_the_run_is_400(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await start(world)
        for after in (run.log.last_seq + 1, 10**11):
            assert_bad_cursor(await world.client.get(f"{events_url(run.id)}?after={after}"))
            headers = {"Last-Event-ID": f"{run.id}.{after}"}
            assert_bad_cursor(await world.client.get(events_url(run.id), headers=headers))


@pytest.mark.parametrize("query", ["?after=2", "?after=1&after=2", "?after=2&after=1"])
async def test_two_cursors_that_differ_are_400(query: str, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await ended(world)
        headers = {"Last-Event-ID": f"{run.id}.1"}
        assert_bad_cursor(await world.client.get(events_url(run.id) + query, headers=headers))


@pytest.mark.parametrize("query", ["?after=1&after=1", "?until=1&until=1", "?after=1&after=1&until=2"])
async def test_a_parameter_that_is_there_twice_is_422(query: str, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await ended(world)
        response = await world.client.get(events_url(run.id) + query)
        assert (response.status_code, response.json()["code"]) == (422, "VALIDATION_ERROR")


async def test_two_last_event_ids_that_differ_are_400(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await ended(world)
        headers = [("Last-Event-ID", f"{run.id}.1"), ("Last-Event-ID", f"{run.id}.2")]
        assert_bad_cursor(await world.client.get(events_url(run.id), headers=headers))


# Readers


async def test_several_readers_get_the_same_bytes_whenever_they_come(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await start(world)
        bodies: list[bytes] = []

        async def read_from(seconds: float) -> None:
            await trio.sleep(seconds)
            bodies.append((await world.client.get(events_url(run.id))).content)

        async with trio.open_nursery() as readers:
            for seconds in (0, 0, 0.9, 1, 1.1, 7.3, 29, 31):
                readers.start_soon(read_from, seconds)
        assert len(set(bodies)) == 1
        assert bodies[0] == frames(run)


async def test_a_reader_of_a_stopped_run_gets_its_end(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await start(world)
        await trio.sleep(5)
        run.stop()
        response = await world.client.get(events_url(run.id))
        assert response.content == frames(run)
        assert b'"chunk_type":"stop"' in response.content


async def test_a_run_ends_after_the_last_of_its_readers_has_left(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*SCRIPT))

        async def read_until(run_id: str, at: float) -> None:
            with trio.CancelScope(deadline=at):
                await world.client.get(events_url(run_id))

        async with world.open_chat(on_disconnect="grace") as answer:
            world.nursery.start_soon(read_until, answer.run_id, 8.2)
            world.nursery.start_soon(read_until, answer.run_id, 12.2)
            await trio.sleep(5)
        await trio.sleep(60)
        assert world.journal.entries[-1] == ("ended", answer.run_id, 12.2 + 5.0)


async def test_head_tells_the_headers_and_starts_no_body(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        run = await start(world)
        response = await world.client.head(events_url(run.id))
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert trio.current_time() == 0
        assert run.log.readers == 0
        assert (await world.client.head(f"{events_url(run.id)}?after=x")).status_code == 400
        run.stop()
        last = run.log.last_seq
        assert (await world.client.head(f"{events_url(run.id)}?after={last}")).status_code == 204


# Clients that drop


class DroppingClient:
    """Reads a run as a browser does: keeps whole frames only, and comes back with the id of the last of them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.received = b""
        self.attempts = 0
        self.run_id = ""

    @property
    def done(self) -> bool:
        """Whether the terminal event was received."""
        return b'"chunk_type":"done"' in self.received

    async def read_once(self) -> None:
        """Start the run or come back to it; read until its end or until the connection breaks."""
        self.attempts += 1
        kept = b""
        try:
            async with self._request() as response:
                assert response.status_code == 200
                self.run_id = response.headers["X-Run-Id"]
                while part := await response.extensions["body"].receive():
                    kept += part
        except httpx.TransportError:
            pass
        finally:
            self.received += b"".join(
                frame + b"\n\n" for frame in kept.split(b"\n\n")[:-1] if not frame.startswith(b":")
            )

    def _request(self) -> AbstractAsyncContextManager[httpx.Response]:
        if not self.run_id:
            return self.world.client.stream("POST", STREAM_URL, json={"message": "hi"})
        ids = [line for line in self.received.split(b"\n") if line.startswith(b"id: ")]
        headers = {b"Last-Event-ID": ids[-1].removeprefix(b"id: ")} if ids else {}
        return self.world.client.stream("GET", events_url(self.run_id), headers=headers)


async def read_with_drops(world: World, drop: Callable[[DroppingClient], Awaitable[None]]) -> DroppingClient:
    """Read a run to its end; ``drop`` calls ``read_once`` and breaks it off in its way."""
    world.add_agent(provider=ScriptedProvider(*SCRIPT))
    client = DroppingClient(world)
    while not client.done:
        await drop(client)
    run = world.supervisor.find(client.run_id)
    assert run is not None
    assert client.received == frames(run)
    assert run.response == "".join(f"wörd{number} 🧵 " for number in range(100)) + "end"
    assert trio.current_time() <= LAST_TOKEN + 5
    assert [what for what, _, _ in world.journal.entries] == ["started", "first_token", "ended"]
    return client


@pytest.mark.parametrize("seed", range(12))
async def test_a_client_that_leaves_at_any_time_and_comes_back_misses_and_doubles_nothing(
    seed: int, autojump_clock: MockClock
) -> None:
    dice = random.Random(seed)

    async def leave_and_wait(client: DroppingClient) -> None:
        with trio.move_on_after(dice.choice([0.25, 1.0, dice.uniform(0.01, 4)])):
            await client.read_once()
        await trio.sleep(dice.choice([0, 0.25, dice.uniform(0, 4.9)]))

    async with open_world() as world:
        client = await read_with_drops(world, leave_and_wait)
        assert client.attempts > 5


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("reset", [False, True], ids=["cut", "reset"])
async def test_a_connection_that_breaks_at_any_byte_misses_and_doubles_nothing(
    reset: bool, seed: int, autojump_clock: MockClock
) -> None:
    dice = random.Random(seed)

    def break_after_some_bytes(connection: MemoryConnection) -> None:
        if connection.server.socket.local == LUMOS:
            connection.server.cut_after(400 + dice.randrange(3000), reset=reset)

    async with open_world() as world:
        world.network.on_connect = break_after_some_bytes
        client = await read_with_drops(world, DroppingClient.read_once)
        assert client.attempts > 3


async def test_a_client_that_comes_back_after_the_grace_finds_the_run_stopped(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*SCRIPT))
        with trio.move_on_after(4.1):
            await world.chat()
        await trio.sleep(5.1)
        run = world.supervisor.find(world.journal.entries[0][1])
        assert run is not None
        response = await world.client.get(events_url(run.id), headers={"Last-Event-ID": f"{run.id}.3"})
        assert response.content == frames(run, 3)
        assert b'"chunk_type":"stop","reason":"disconnect"' in response.content
