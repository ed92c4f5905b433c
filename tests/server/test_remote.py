"""The client of a running Lumos, in memory: what it sends, what it gets, and servers that are something else."""

from __future__ import annotations

from collections.abc import Sequence

import httpx
import pytest
import trio
from trio.testing import MockClock

from engine import AgentStarted, GenerationComplete, TextDelta
from engine.events import TERMINAL_EVENT_TYPES, Event, encode_frame
from providers.http import open_client
from providers.replay import ReplayProvider
from server.remote import MAX_EVENT_BYTES, RemoteError, remote_run
from server.testing.memory_network import MemoryNetwork
from tests.engine.scripted import SENT, ScriptedProvider, text
from tests.harness.recordings import steady_recording
from tests.harness.vendor import STREAM_HEAD, Act, chunked, play_script
from tests.harness.world import open_keeping_world, open_world

RECORDING = steady_recording(first=2.0, gap=1.0, last=5.0)
REFUSAL = b"HTTP/1.1 429 Too Many\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


async def answer_of(script: Sequence[Act]) -> list[Event]:
    """What the client makes of a server that sends this."""
    network = MemoryNetwork()
    async with open_client(network.connect) as client, trio.open_nursery() as nursery:
        nursery.start_soon(play_script, network.listen("lumos", 80), script)
        async with remote_run(client, "http://lumos", "demo", {"message": "hi"}) as events:
            answer = [event async for event in events]
        nursery.cancel_scope.cancel()
    return answer


@pytest.mark.parametrize("way", ["/stream", "/simulated"])
async def test_the_events_of_a_run_with_their_times(autojump_clock: MockClock, way: str) -> None:
    async with open_world() as world:
        world.add_agent("what:1.a_b-c", ReplayProvider(RECORDING))
        started_at = trio.current_time()
        async with remote_run(world.client, "http://lumos/", "what:1.a_b-c", {"message": "hi"}, way=way) as events:
            arrived = [(event, events.arrived_at - started_at) async for event in events]
    times = [at for event, at in arrived if isinstance(event, TextDelta)]
    assert times[0] == (2.0 if way == "/stream" else 5.0)
    assert times[-1] == 5.0
    assert isinstance(arrived[0][0], AgentStarted)
    assert isinstance(arrived[-1][0], TERMINAL_EVENT_TYPES)
    assert "".join(event.content for event, _ in arrived if isinstance(event, TextDelta)) == RECORDING.text


async def test_leaving_the_block_ends_the_run(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent("demo", ReplayProvider(RECORDING))
        body = {"message": "hi", "on_disconnect": "cancel"}
        async with remote_run(world.client, "http://lumos", "demo", body) as events:
            await anext(aiter(events))
        await trio.testing.wait_all_tasks_blocked()
        assert world.supervisor.active_runs == 0


async def test_what_follows_the_terminal_event_is_not_read(autojump_clock: MockClock) -> None:
    done = GenerationComplete("", 1, 0, None, None)
    assert await answer_of([STREAM_HEAD, chunked(encode_frame("r", 1, done)), "hang"]) == [done]


@pytest.mark.parametrize("way", ["/stream", "/simulated"])
async def test_an_answer_of_three_megabytes_comes_whole(autojump_clock: MockClock, way: str) -> None:
    line = "a line of text\n" * 20_000
    async with open_world() as world:
        world.add_agent("demo", ScriptedProvider((0, (SENT,)), *((0, text(line)) for _ in range(10))))
        async with remote_run(world.client, "http://lumos", "demo", {"message": "hi"}, way=way) as events:
            *_, last = [event async for event in events]
    assert isinstance(last, GenerationComplete)
    assert last.response == line * 10


async def raised_by(script: Sequence[Act]) -> str:
    with pytest.RaisesGroup(RemoteError, flatten_subgroups=True) as raised:
        await answer_of(script)
    (error,) = raised.value.exceptions
    return str(error)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"message": "slow down"}', "HTTP 429: slow down"),
        (b"[]", "HTTP 429"),
        (b"\xff", "HTTP 429"),
        (b"", "HTTP 429"),
    ],
)
async def test_a_refusal_is_told(autojump_clock: MockClock, body: bytes, message: str) -> None:
    assert await raised_by([REFUSAL % (len(body), body)]) == message


async def test_a_key_is_shown_and_a_missing_one_is_asked_for(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        world.add_agent("demo", ReplayProvider(RECORDING))
        key = (await world.add_key("acme", "ada"))["Authorization"].removeprefix("Bearer ")
        async with remote_run(world.client, "http://lumos", "demo", {"message": "hi"}, api_key=key) as events:
            assert isinstance([event async for event in events][-1], GenerationComplete)
        refused = "HTTP 401: this needs a valid API key, as Authorization: Bearer or X-API-Key"
        hint = " (lumos chat takes the key from LUMOS_API_KEY, or from --api-key)"
        for wrong, message in ((None, refused + hint), ("", refused + hint), (key[:-1] + "!", refused)):
            with pytest.raises(RemoteError) as raised:
                async with remote_run(world.client, "http://lumos", "demo", {"message": "hi"}, api_key=wrong):
                    pass
            assert str(raised.value) == message


@pytest.mark.parametrize("key", ["käse", "a\nb"])
async def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: str, autojump_clock: MockClock) -> None:
    async with open_client(MemoryNetwork().connect) as client:
        with pytest.raises(RemoteError) as raised:
            async with remote_run(client, "http://lumos", "demo", {}, api_key=key):
                pass
    assert str(raised.value) == "the API key has characters that no key has"


async def test_another_kind_of_answer(autojump_clock: MockClock) -> None:
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 0\r\n\r\n"
    assert await raised_by([page]) == "the server answered with text/html, not with a stream: is it Lumos?"


@pytest.mark.parametrize(
    "data", [b'{"chunk_type":"news"}', b"[1]", b"{", b'{"chunk_type":"\xff"}', b"x" * (MAX_EVENT_BYTES + 1)]
)
async def test_events_that_are_not_ours(autojump_clock: MockClock, data: bytes) -> None:
    message = await raised_by([STREAM_HEAD, chunked(b"data: " + data + b"\n\n"), "hang"])
    assert message.startswith("the server sent something else than Lumos's events: ")


async def test_a_stream_that_breaks_off(autojump_clock: MockClock) -> None:
    start = encode_frame("r", 1, AgentStarted("a", "r", ""))
    expected = "the server's stream broke off without a terminal event"
    assert await raised_by([STREAM_HEAD, chunked(start), b"0\r\n\r\n", "close"]) == expected


async def test_a_connection_that_breaks(autojump_clock: MockClock) -> None:
    start = encode_frame("r", 1, AgentStarted("a", "r", ""))
    assert (await raised_by([STREAM_HEAD, chunked(start), "reset"])).startswith("http://lumos: ")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://nobody", "cannot reach http://nobody: "),
        ("nobody", "nobody is not an http or https URL"),
        ("http://nobody:port", "http://nobody:port: Invalid port"),
    ],
)
async def test_a_server_that_cannot_be_reached(autojump_clock: MockClock, url: str, message: str) -> None:
    async with open_client(MemoryNetwork().connect) as client:
        with pytest.raises(RemoteError) as raised:
            async with remote_run(client, url, "demo", {}):
                pass
    assert str(raised.value).startswith(message)
    assert isinstance(raised.value.__cause__, httpx.TransportError | httpx.InvalidURL)
