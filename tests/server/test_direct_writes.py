"""What a run says is written in the task that says it, past Quart and Hypercorn: the same bytes, and the same ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from trio.testing import MockClock

from engine import AgentStopped, Deadlines, TextDelta
from providers.chunked import LAST_CHUNK
from server.app import API
from server.serving import Connection, ServingLimits
from tests.engine.scripted import SENT, Line, ScriptedProvider, text
from tests.harness.world import LUMOS, open_world
from tests.server.raw_http import RawClient, chat_request, raw_client, request_bytes

BASE = "http://lumos"
WINDOW = 4096


def words(count: int, size: int = 1) -> tuple[Line, ...]:
    """One word a second."""
    return ((0, (SENT,)), *((1 + number, text(f"word{number} ".ljust(size))) for number in range(count)))


class Writes:
    """What was asked of ``write_now``: when, and whether it was taken."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, bool]] = []

    @contextmanager
    def watched(self) -> Iterator[Writes]:
        write_now = Connection.write_now

        def watch(connection: Connection, data: bytes) -> bool:
            taken = write_now(connection, data)
            self.seen.append((trio.current_time(), taken))
            return taken

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Connection, "write_now", watch)
            yield self


async def test_each_word_is_written_at_once(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(5)))
        with Writes().watched() as writes:
            answer = await world.chat()
        said = "".join(event.content for event in answer.events if isinstance(event, TextDelta))
        assert said == "word0 word1 word2 word3 word4 "
        assert writes.seen == [(1.0 + number, True) for number in range(5)]


async def test_the_frames_are_those_that_the_log_has(autojump_clock: MockClock) -> None:
    async with open_world(window=WINDOW) as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider(*words(8, size=1500)))
        await client.stream.send_all(chat_request())
        await client.read_head()
        live = b"".join([part async for part in client.body_chunks()])
        stored = await world.client.get(f"{BASE}{API}/runs/{world.journal.entries[0][1]}/events")
        assert live == stored.content


@pytest.mark.parametrize("read_bytes", [1, 700, WINDOW])
async def test_a_chunk_that_does_not_fit_is_finished_first(read_bytes: int, autojump_clock: MockClock) -> None:
    async with open_world(window=WINDOW) as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider(*words(4, size=3000)))
        await client.stream.send_all(chat_request())
        await trio.sleep(2.5)
        (connection,) = (one for one in world.network.connections if one.server.socket.local == LUMOS)
        assert connection.to_client.sent == WINDOW
        received = b""
        while not received.endswith(LAST_CHUNK):
            received += await client.stream.receive_some(read_bytes)
        assert received.count(b"word1") == 2, "in its delta, and in the whole answer"


async def test_a_client_of_http_1_0_gets_no_chunks(autojump_clock: MockClock) -> None:
    request = chat_request().replace(b"HTTP/1.1", b"HTTP/1.0")
    async with open_world() as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider(*words(3)))
        with Writes().watched() as writes:
            await client.stream.send_all(request)
            answer = await client.read_to_end()
        assert not any(taken for _, taken in writes.seen)
        assert b"chunked" not in answer
        assert answer.count(b"\n\n") == answer.count(b"\nid: ")
        assert b'"chunk_type":"done"' in answer


async def test_a_client_that_goes_between_two_words_ends_its_run(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        provider = ScriptedProvider(*words(100))
        world.add_agent(provider=provider)
        async with raw_client(world) as client:
            await client.stream.send_all(chat_request(on_disconnect="cancel"))
            await trio.sleep(3.5)
        await trio.sleep(1)
        run = world.supervisor.find(world.journal.entries[0][1])
        assert run is not None
        assert isinstance(run.log.terminal, AgentStopped)
        assert provider.seen[-1] == (3.5, "cancelled")


async def test_who_stalls_in_the_middle_of_a_chunk_is_reset(autojump_clock: MockClock) -> None:
    limits = ServingLimits(write_stall=20.0)
    async with open_world(limits, window=WINDOW) as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider(*words(100, size=3000)), deadlines=Deadlines(total=1000))
        with Writes().watched() as writes:
            await client.stream.send_all(chat_request())
            await trio.sleep(60)
        assert writes.seen == [(1.0, True), (2.0, True)]
        (connection,) = (one for one in world.network.connections if one.server.socket.local == LUMOS)
        assert connection.server.closed_at == 22.0
        with pytest.raises(trio.BrokenResourceError):
            await client.stream.receive_some()


async def test_a_silent_run_after_words_is_kept_alive_from_the_last_word_on(autojump_clock: MockClock) -> None:
    async with open_world() as world, raw_client(world) as client:
        world.add_agent(
            provider=ScriptedProvider((0, (SENT,)), (1, text("a")), (10, text("b")), (29, text("c"))),
        )
        await client.stream.send_all(chat_request())
        await client.read_head()
        beats = [trio.current_time() async for part in client.body_chunks() if part.startswith(b": heartbeat")]
        assert beats == [25.0]


async def test_two_readers_of_a_run_get_the_same_bytes(autojump_clock: MockClock) -> None:
    async with open_world() as world, raw_client(world) as first, raw_client(world) as second:
        world.add_agent(provider=ScriptedProvider(*words(6)))
        got: dict[str, bytes] = {}

        async def read(name: str, client: RawClient) -> None:
            await client.read_head()
            got[name] = b"".join([part async for part in client.body_chunks()])

        await first.stream.send_all(chat_request())
        await trio.sleep(2.5)
        run_id = world.journal.entries[0][1]
        await second.stream.send_all(request_bytes("GET", f"{API}/runs/{run_id}/events"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, "first", first)
            nursery.start_soon(read, "second", second)
        assert got["first"] == got["second"]
        assert got["first"].count(b"\nid: ") + 1 >= 8


async def test_a_connection_is_used_again_after_direct_writes(autojump_clock: MockClock) -> None:
    async with open_world() as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider(*words(3)))
        for _ in range(2):
            answer = await client.ask(chat_request())
            assert answer.status == 200
