"""Each deadline fires at exactly its time with exactly its code, seen by a client of the whole server.

The provider is asked directly, and through a failover chain, as every agent from a file has it: that changes nothing.
"""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from engine import Deadlines, Error, TextDelta
from tests.harness.vendor import STREAM_HEAD, Act, chunked, text_event
from tests.harness.world import VENDOR, Answer, World, open_world

pytestmark = pytest.mark.parametrize("in_chain", [False, True], ids=["bare", "in a chain"])

LIMITS = Deadlines(total=100, connect=7, first_token=11, idle=13)
KEEP_ALIVE = chunked(b": keep-alive\n\n")
EMPTY_DELTA = chunked(b'data: {"choices":[{"delta":{"content":""}}]}\n\n')
WORD = chunked(text_event("word "))


def every(first: Act, second: Act, times: int) -> list[Act]:
    """The two acts in turn, so many times."""
    return [first, second] * times


async def failed(world: World, **body: object) -> tuple[Error, float, Answer]:
    """The error that the answer ended in, and when, in seconds from the request."""
    answer = await world.chat(**body)
    error = answer.events[-1]
    assert isinstance(error, Error)
    assert sum(isinstance(event, Error) for event in answer.events) == 1
    return error, answer.arrivals[-1] - answer.asked_at, answer


SCRIPTS: dict[str, tuple[list[Act], str, float]] = {
    "no answer at all": (["hang"], "timeout.first_token", 11.0),
    "a head, then nothing": ([STREAM_HEAD, "hang"], "timeout.first_token", 11.0),
    "keep-alives, never a token": ([STREAM_HEAD, *every(KEEP_ALIVE, 2.0, 40), "hang"], "timeout.first_token", 11.0),
    "empty deltas, never a token": ([STREAM_HEAD, *every(EMPTY_DELTA, 2.0, 40), "hang"], "timeout.first_token", 11.0),
    "a token, then nothing": ([STREAM_HEAD, 3.0, WORD, "hang"], "timeout.idle", 16.0),
    "a token, then keep-alives": ([STREAM_HEAD, 3.0, WORD, *every(KEEP_ALIVE, 2.0, 40)], "timeout.idle", 16.0),
    "tokens just in time, then nothing": ([STREAM_HEAD, *every(10.0, WORD, 5), "hang"], "timeout.idle", 63.0),
    "a drip without end": ([STREAM_HEAD, *every(5.0, WORD, 40)], "timeout.total", 100.0),
}


@pytest.mark.parametrize("name", SCRIPTS)
async def test_a_deadline_fires_at_its_time_with_its_code(name: str, in_chain: bool, autojump_clock: MockClock) -> None:
    script, code, at = SCRIPTS[name]
    async with open_world() as world:
        world.add_agent(in_chain=in_chain, deadlines=LIMITS)
        world.add_scripted_vendor(script)
        error, seconds, answer = await failed(world)
        assert (error.code, seconds) == (code, at)
        said = "".join(event.content for event in answer.events if isinstance(event, TextDelta))
        assert error.response == said
        assert [connection.client.closed_at for connection in world.network.connections[1:]] == [answer.arrivals[-1]]


async def test_a_connection_that_never_opens_ends_the_connect_phase(in_chain: bool, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(in_chain=in_chain, deadlines=LIMITS)
        world.network.black_hole(*VENDOR)
        error, seconds, _ = await failed(world)
        assert (error.code, seconds) == ("timeout.connect", 7.0)


async def test_a_request_may_shorten_each_deadline(in_chain: bool, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(in_chain=in_chain, deadlines=LIMITS)
        world.add_scripted_vendor([STREAM_HEAD, *every(1.0, WORD, 200)])
        error, seconds, _ = await failed(world, deadlines={"total": 4.5})
        assert (error.code, seconds) == ("timeout.total", 4.5)
        error, seconds, _ = await failed(world, deadlines={"first_token": 0.25})
        assert (error.code, seconds) == ("timeout.first_token", 0.25)


async def test_the_next_run_works_after_a_deadline(in_chain: bool, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(in_chain=in_chain, deadlines=LIMITS)
        world.add_scripted_vendor([STREAM_HEAD, WORD, 12.0, chunked(b"data: [DONE]\n\n"), b"0\r\n\r\n"])
        error, _, _ = await failed(world, deadlines={"idle": 1})
        assert error.code == "timeout.idle"
        answer = await world.chat()
        assert answer.events[-1].__struct_config__.tag == "done"
