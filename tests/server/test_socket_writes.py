"""How a socket is written to: what one read of a run's log brings is one write, cut where it is large."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import TextMessage

from server.sse import PIECE_BYTES
from server.testing.memory_connection import Direction
from tests.engine.scripted import Line, reasoning, text
from tests.harness.websocket_client import WebSocketClient, count_writes, open_socket
from tests.harness.world import World, open_world
from tests.server.socket_scene import assert_whole, ended, events, find, hear_ends, speaking, start

ROOMY = 2**20
"""A window in which every write has room."""

BY_TURNS: Line = (1, tuple(part for number in range(10) for part in (*text(f"{number} "), *reasoning("hm "))))
"""One read of the model's that becomes many events."""


def messages_in(write: bytes) -> int:
    """How many whole messages the write brought."""
    client = Connection(ConnectionType.CLIENT)
    client.receive_data(write)
    return sum(event.message_finished for event in client.events() if isinstance(event, TextMessage))


def to_client(socket: WebSocketClient) -> Direction:
    direction: Direction = socket.stream.connection.to_client
    return direction


async def test_the_events_of_one_read_are_one_write(autojump_clock: MockClock) -> None:
    async with open_world(window=ROOMY) as world, open_socket(world) as socket:
        world.add_agent("a", speaking(BY_TURNS, (2, text("one "))))
        run_id = await start(socket, "a")
        await socket.hear_until("event", seq=1)
        writes = count_writes(to_client(socket))
        await hear_ends(socket, run_id)
        assert_whole(socket, find(world, run_id))
        at = [when for when, one in socket.heard if one["type"] == "event"]
        assert at.count(1) == 20
        assert [messages_in(write) for write in writes] == [20, len(at) - 1 - 20 + 1], "the end is with the last events"


async def test_a_backlog_is_written_in_pieces_and_its_end_with_the_last(autojump_clock: MockClock) -> None:
    async with open_world(window=ROOMY) as world:
        run_id = await ended_run(world, *((1 + number / 100, text("x" * 1000)) for number in range(40)))
        log = find(world, run_id).log
        async with open_socket(world) as socket:
            writes = count_writes(to_client(socket))
            await socket.say("subscribe", run_id=run_id)
            await hear_ends(socket, run_id)
            assert_whole(socket, find(world, run_id))
        counts = [messages_in(write) for write in writes]
        assert sum(counts) == 1 + log.last_seq + 1, "subscribed, the events, the end"
        assert counts[0] == 1
        assert len(counts) - 1 == len(list(pieces_of([len(entry.frame) for entry in log.entries()])))
        assert max(map(len, writes[:-1])) < 1.1 * PIECE_BYTES


def pieces_of(sizes: list[int]) -> list[int]:
    """How much each piece has of frames of these sizes, none more than ``PIECE_BYTES``."""
    pieces = [0]
    for size in sizes:
        if pieces[-1] + size > PIECE_BYTES:
            pieces.append(0)
        pieces[-1] += size
    return pieces


async def test_what_is_larger_than_a_piece_is_a_write_of_its_own(autojump_clock: MockClock) -> None:
    async with open_world(window=ROOMY) as world:
        run_id = await ended_run(world, (1, text("a")), (2, text("x" * 3 * PIECE_BYTES)), (3, text("b")))
        async with open_socket(world) as socket:
            writes = count_writes(to_client(socket))
            await socket.say("subscribe", run_id=run_id)
            await hear_ends(socket, run_id)
            assert_whole(socket, find(world, run_id))
        large = [messages_in(write) for write in writes if len(write) > PIECE_BYTES]
        assert large == [1, 2], "the large text, and the whole answer in the terminal event with the end behind it"


async def ended_run(world: World, *lines: Line) -> str:
    """A run of agent ``a`` that said these lines, each an event, and is over."""
    world.add_agent("a", speaking(*lines))
    async with open_socket(world) as socket:
        run_id = await start(socket, "a")
        await hear_ends(socket, run_id)
    return run_id


async def test_one_write_of_a_slow_socket_holds_no_other_run(autojump_clock: MockClock) -> None:
    """Runs on the same socket wait for the client alone, and everything comes, each run's events in order."""
    async with open_world(window=500) as world, open_socket(world) as socket, open_socket(world) as quick:
        for name in ("a", "b"):
            world.add_agent(name, speaking(*((1 + number / 10, text("x" * 3000)) for number in range(20))))
        runs = [await start(socket, name) for name in ("a", "b")]
        beside = await start(quick, "a")
        await hear_ends(quick, beside)
        assert trio.current_time() == 2.9
        await trio.sleep_until(15)
        await hear_ends(socket, *runs)
        for run_id in runs:
            assert_whole(socket, find(world, run_id))
        assert_whole(quick, find(world, beside))


@pytest.mark.parametrize("pieces", [1, 2, 3])
async def test_an_unsubscribe_ends_a_turn_after_the_piece_that_is_being_written(
    pieces: int, autojump_clock: MockClock
) -> None:
    async with open_world(window=1000) as world:
        run_id = await ended_run(world, *((1 + number, text("x" * (PIECE_BYTES - 500))) for number in range(6)))
        async with open_socket(world) as socket:
            await socket.say("subscribe", run_id=run_id)
            await socket.hear_until("event", seq=1 + pieces)
            await socket.say("unsubscribe", run_id=run_id)
            assert await socket.hear_until("unsubscribed")
            assert events(socket, run_id)[-1][0] <= 1 + pieces + 1
            assert await socket.ask("ping") == {"type": "pong"}
            await socket.say("subscribe", run_id=run_id, after=events(socket, run_id)[-1][0])
            await hear_ends(socket, run_id)
            assert_whole(socket, find(world, run_id))


async def test_a_goodbye_between_two_pieces_ends_the_socket_cleanly(autojump_clock: MockClock) -> None:
    async with open_world(window=1000) as world:
        run_id = await ended_run(world, *((1 + number, text("x" * (PIECE_BYTES - 500))) for number in range(6)))
        async with open_socket(world) as socket:
            await socket.say("subscribe", run_id=run_id)
            await socket.hear_until("event", seq=2)
            await socket.close()
            assert not ended(socket)
        assert find(world, run_id).log.readers == 0


async def test_what_is_said_while_a_piece_is_written_comes_in_the_next(autojump_clock: MockClock) -> None:
    async with open_world(window=100) as world, open_socket(world) as socket:
        world.add_agent("a", speaking((1, text("x" * 1000)), (1.5, text("y")), (2, reasoning("z"))))
        run_id = await start(socket, "a")
        await trio.sleep_until(5)
        assert find(world, run_id).log.ended
        await hear_ends(socket, run_id)
        assert_whole(socket, find(world, run_id))
