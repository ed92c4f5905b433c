"""Whatever a model's server does wrong, the client gets one error that tells which, at its time, and nothing leaks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from engine import Deadlines, Error, GenerationComplete, TextDelta
from engine.events import TERMINAL_EVENT_TYPES
from providers.http import ERROR_BODY_BYTES
from providers.openai_chat import OpenAIChatProvider
from providers.sse import MAX_EVENT_BYTES
from server.testing.memory_connection import MemoryConnection
from tests.harness.raw_vendor import DONE_EVENT, LAST_CHUNK, RawVendor, answer
from tests.harness.vendor import PLAIN_STREAM_HEAD, STREAM_HEAD, Act, chunked, text_event
from tests.harness.world import VENDOR, Answer, World, open_world

LIMITS = Deadlines(total=100, connect=7, first_token=11, idle=13)
KEY = "sk-secret-0123456789"
WORD = chunked(text_event("word "))
MORE = chunked(text_event("more "))
DONE = chunked(DONE_EVENT)
KEEP_ALIVE = chunked(b": keep-alive\n\n")
ROLE = chunked(b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n')
MEGABYTE = b"x" * 2**20
READ_AHEAD = 3 * 65_536
"""What may be under way or read beside a bound: a window, a read, and what a chunk of it belongs to."""


@dataclass(frozen=True)
class Fault:
    """What the server does, the code that it must end in, what was said before, and when, in seconds.

    ``whole``: the server's answer is whole as HTTP goes, so that its connection may be used again.
    """

    script: Iterable[Act]
    code: str
    said: str = ""
    at: float = 0.0
    whole: bool = False


def event(data: bytes) -> bytes:
    """An event of these bytes, as one chunk."""
    return chunked(b"data: " + data + b"\n\n")


def as_stream(*acts: Act) -> list[Act]:
    """A stream that has said a word, then this; each act is a read of its own."""
    script: list[Act] = [STREAM_HEAD, WORD]
    for act in acts:
        script += [0.25, act]
    return script


def dripping(seconds: float, data: bytes) -> list[Act]:
    """The data byte by byte."""
    drip: list[Act] = []
    for byte in data:
        drip += [seconds, bytes([byte])]
    return drip


def seconds_apart(seconds: float, act: Act, times: int) -> list[Act]:
    return [seconds, act] * times


CUT: dict[str, Fault] = {
    "closes before an answer": Fault(["close"], "upstream.connection"),
    "resets before an answer": Fault(["reset"], "upstream.connection"),
    "closes in the head": Fault([STREAM_HEAD[:30], 1.0, "close"], "upstream.connection", at=1.0),
    "resets in the head": Fault([STREAM_HEAD[:30], 1.0, "reset"], "upstream.connection", at=1.0),
    "closes after the head": Fault([STREAM_HEAD, 1.0, "close"], "upstream.connection", at=1.0),
    "closes in an interim answer": Fault([b"HTTP/1.1 100 Cont", 1.0, "close"], "upstream.connection", at=1.0),
    "closes in a chunk": Fault(as_stream(MORE[:30], "close"), "upstream.connection", "word ", 0.5),
    "resets in a chunk": Fault(as_stream(MORE[:30], "reset"), "upstream.connection", "word ", 0.5),
    "closes between events": Fault(as_stream("close"), "upstream.connection", "word ", 0.25),
    "resets between events": Fault(as_stream("reset"), "upstream.connection", "word ", 0.25),
    "closes right behind a token": Fault(as_stream(MORE, "close"), "upstream.connection", "word more ", 0.5),
    "closes inside the last chunk": Fault(as_stream(b"0\r\n", "close"), "upstream.connection", "word ", 0.5),
    "closes before its length": Fault(
        [STREAM_HEAD.replace(b"Transfer-Encoding: chunked", b"Content-Length: 900"), text_event("word "), 1.0, "close"],
        "upstream.connection",
        "word ",
        1.0,
    ),
}

TRUNCATED: dict[str, Fault] = {
    "ends without its end mark": Fault(as_stream(LAST_CHUNK), "upstream.truncated", "word ", 0.25, whole=True),
    "ends in an event": Fault(
        as_stream(chunked(text_event("more ")[:20]), LAST_CHUNK), "upstream.truncated", "word ", 0.5, whole=True
    ),
    "ends in its end mark": Fault(
        as_stream(chunked(DONE_EVENT[:-1]), LAST_CHUNK), "upstream.truncated", "word ", 0.5, whole=True
    ),
    "ends without a word": Fault([STREAM_HEAD + LAST_CHUNK], "upstream.truncated", whole=True),
    "ends, close-delimited, in an event": Fault(
        [PLAIN_STREAM_HEAD, text_event("word "), 1.0, text_event("more ")[:20], 1.0, "close"],
        "upstream.truncated",
        "word ",
        2.0,
    ),
    "calls plain JSON a stream": Fault(
        [STREAM_HEAD, chunked(b'{"choices":[]}\n\n') + LAST_CHUNK], "upstream.truncated", whole=True
    ),
}

NOT_THE_FORMAT: dict[str, Fault] = {
    "no JSON": Fault(as_stream(event(b"{nope")), "upstream.protocol", "word ", 0.25),
    "JSON of another shape": Fault(as_stream(event(b'{"choices":7}')), "upstream.protocol", "word ", 0.25),
    "no UTF-8": Fault(
        as_stream(event(b'{"choices":[{"delta":{"content":"\xff"}}]}')), "upstream.protocol", "word ", 0.25
    ),
    "a token and no JSON in one read": Fault(as_stream(MORE + event(b"{")), "upstream.protocol", "word more ", 0.25),
    "a bad chunk": Fault(as_stream(b"xyz\r\n"), "upstream.protocol", "word ", 0.25),
    "a token and a bad chunk in one read": Fault(as_stream(MORE + b"xyz\r\n"), "upstream.protocol", "word more ", 0.25),
    "compressed": Fault(
        [STREAM_HEAD.replace(b"Transfer", b"Content-Encoding: gzip\r\nTransfer"), b"4\r\n\x1f\x8b\x08\x00\r\n"],
        "upstream.protocol",
    ),
    "SSH": Fault([b"SSH-2.0-OpenSSH_9.2\r\n"], "upstream.protocol"),
    "a TLS alert": Fault([b"\x15\x03\x01\x00\x02\x02\x28"], "upstream.protocol"),
    "HTTP/2": Fault([b"\x00\x00\x12\x04\x00\x00\x00\x00\x00"], "upstream.protocol"),
    "HTTP/0.9": Fault([b"<html>hello</html>", "close"], "upstream.protocol"),
    "a bad header": Fault([b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"], "upstream.protocol"),
    "an unasked upgrade": Fault([b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"], "upstream.protocol"),
    "JSON under 200": Fault(
        [answer(b'{"choices":[]}', "Content-Type: application/json")], "upstream.protocol", whole=True
    ),
    "HTML under 200": Fault([answer(b"<html>", "Content-Type: text/html")], "upstream.protocol", whole=True),
    "nothing under 200": Fault([answer(b"")], "upstream.protocol", whole=True),
    "nothing under 204": Fault([b"HTTP/1.1 204 No Content\r\n\r\n"], "upstream.protocol", whole=True),
    "HTML under 200 that hangs": Fault(
        [b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>", "hang"], "upstream.protocol", at=2.0
    ),
}

FAILURE = b'{"error":{"type":"overloaded_error","message":"Overloaded"}}'
IN_STREAM: dict[str, Fault] = {
    "an error event after a token": Fault(as_stream(event(FAILURE)), "upstream.overloaded", "word ", 0.25),
    "a token and an error event in one read": Fault(
        as_stream(MORE + event(FAILURE)), "upstream.overloaded", "word more ", 0.25
    ),
    "an error event first": Fault([STREAM_HEAD, event(FAILURE)], "upstream.overloaded"),
    "an error as a string": Fault(as_stream(event(b'{"error":"boom"}')), "upstream.server", "word ", 0.25),
    "an error with a numeric code": Fault(
        as_stream(event(b'{"error":{"code":429}}')), "upstream.rate_limit", "word ", 0.25
    ),
    "an error object under 200": Fault(
        [answer(FAILURE, "Content-Type: application/json")], "upstream.overloaded", whole=True
    ),
    "an error as the reason": Fault(
        as_stream(event(b'{"choices":[{"delta":{},"finish_reason":"error"}]}') + DONE + LAST_CHUNK),
        "upstream.server",
        "word ",
        0.25,
        whole=True,
    ),
}

SILENT: dict[str, Fault] = {
    "nothing at all": Fault(["hang"], "timeout.first_token", at=11.0),
    "half a head": Fault([STREAM_HEAD[:30], "hang"], "timeout.first_token", at=11.0),
    "interim answers only": Fault(
        seconds_apart(2.0, b"HTTP/1.1 100 Continue\r\n\r\n", 50), "timeout.first_token", at=11.0
    ),
    "a head and nothing": Fault([STREAM_HEAD, "hang"], "timeout.first_token", at=11.0),
    "keep-alives only": Fault([STREAM_HEAD, *seconds_apart(2.0, KEEP_ALIVE, 50)], "timeout.first_token", at=11.0),
    "empty deltas only": Fault([STREAM_HEAD, *seconds_apart(2.0, ROLE, 50)], "timeout.first_token", at=11.0),
    "a token byte by byte, too slowly": Fault([STREAM_HEAD, *dripping(0.5, WORD)], "timeout.first_token", at=11.0),
    "a token, then nothing": Fault([STREAM_HEAD, 3.0, WORD, "hang"], "timeout.idle", "word ", 16.0),
    "a token, then keep-alives": Fault(
        [STREAM_HEAD, 3.0, WORD, *seconds_apart(2.0, KEEP_ALIVE, 50)], "timeout.idle", "word ", 16.0
    ),
    "a token, then half an event": Fault(
        [STREAM_HEAD, 3.0, WORD, 1.0, MORE[:30], "hang"], "timeout.idle", "word ", 16.0
    ),
    "a reason, then nothing": Fault(
        [STREAM_HEAD, WORD, 1.0, event(b'{"choices":[{"delta":{},"finish_reason":"stop"}]}'), "hang"],
        "timeout.idle",
        "word ",
        13.0,
    ),
    "a drip without end": Fault([STREAM_HEAD, *seconds_apart(9.0, WORD, 50)], "timeout.total", "word " * 11, 100.0),
}

FAULTS = CUT | TRUNCATED | NOT_THE_FORMAT | IN_STREAM | SILENT


@asynccontextmanager
async def world_with(*scripts: Iterable[Act], **settings: Any) -> AsyncIterator[World]:
    """A world whose model server answers the first requests by these scripts, and all others well."""
    async with open_world() as world:
        provider = OpenAIChatProvider(base_url="http://vendor/v1", api_key=KEY, client=world.model_client)
        world.add_agent(provider=provider, **({"deadlines": LIMITS} | settings))
        RawVendor(*scripts).start(world.nursery, world.network.listen(*VENDOR))
        yield world


def upstream(world: World) -> list[MemoryConnection]:
    """Every connection that was made to the model's server."""
    return [connection for connection in world.network.connections if connection.server.socket.local == VENDOR]


def said_in(answer: Answer) -> str:
    return "".join(event.content for event in answer.events if isinstance(event, TextDelta))


async def check_one_error(world: World, answer: Answer) -> Error:
    """That the answer, and the run's log, end in exactly one error that keeps what was said; the error."""
    error = answer.events[-1]
    assert isinstance(error, Error)
    assert [event for event in answer.events if isinstance(event, TERMINAL_EVENT_TYPES)] == [error]
    assert error.response == said_in(answer)
    assert KEY not in error.content
    run = world.supervisor.find(answer.run_id)
    assert run is not None
    await wait_all_tasks_blocked()  # the terminal event may be there some ticks before all has ended
    assert [entry.event for entry in run.log.entries()] == answer.events
    assert answer.ids == [f"{answer.run_id}.{seq + 1}" for seq in range(len(answer.events))]
    assert world.journal.bugs == []
    return error


async def check_next_run_is_fine(world: World) -> None:
    """That another chat gets its whole answer, and leaves one idle connection and no run."""
    answer = await world.chat()
    assert isinstance(answer.events[-1], GenerationComplete)
    assert answer.events[-1].response == said_in(answer) == "hello"
    await wait_all_tasks_blocked()
    assert world.supervisor.active_runs == 0
    assert [connection.client.closed_at for connection in upstream(world)].count(None) == 1


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_ends_in_one_error_that_tells_which(name: str, autojump_clock: MockClock) -> None:
    fault = FAULTS[name]
    async with world_with(fault.script) as world:
        answer = await world.chat()
        error = await check_one_error(world, answer)
        assert (error.code, error.response) == (fault.code, fault.said)
        ended_at = answer.arrivals[-1]
        assert ended_at - answer.asked_at == fault.at
        assert [connection.client.closed_at for connection in upstream(world)] == [None if fault.whole else ended_at]
        await check_next_run_is_fine(world)
        assert len(upstream(world)) == 2 - fault.whole


STATUSES: dict[str, tuple[str, list[str], bytes, str, float | None]] = {
    "401": (
        "401 Unauthorized",
        [],
        b'{"error":{"message":"Incorrect API key provided: sk-secret"}}',
        "upstream.auth",
        None,
    ),
    "403": ("403 Forbidden", [], b"<html>blocked</html>", "upstream.auth", None),
    "404": ("404 Not Found", [], b'{"error":{"code":"model_not_found"}}', "upstream.invalid_request", None),
    "429": ("429 Too Many", ["Retry-After: 7"], b'{"error":{"type":"requests"}}', "upstream.rate_limit", 7.0),
    "429 in 10 h": ("429 Too Many", ["Retry-After: 36000"], b"", "upstream.rate_limit", 36_000.0),
    "429 in ms": ("429 Too Many", ["Retry-After-Ms: 250"], b"", "upstream.rate_limit", 0.25),
    "429 at a date": (
        "429 Too Many",
        ["Date: Mon, 23 Nov 2026 10:00:00 GMT", "Retry-After: Mon, 23 Nov 2026 10:00:09 GMT"],
        b"",
        "upstream.rate_limit",
        9.0,
    ),
    "429 before now": ("429 Too Many", ["Retry-After: -5"], b"", "upstream.rate_limit", None),
    "400 too long": (
        "400 Bad Request",
        [],
        b'{"error":{"type":"invalid_request_error","code":"context_length_exceeded"}}',
        "upstream.context_length",
        None,
    ),
    "500": ("500 Internal Server Error", [], b"", "upstream.server", None),
    "503": (
        "503 Service Unavailable",
        ["Retry-After: 1"],
        b'{"error":{"type":"server_error"}}',
        "upstream.overloaded",
        1.0,
    ),
    "529": ("529 Overloaded", [], FAILURE, "upstream.overloaded", None),
    "302": ("302 Found", ["Location: http://elsewhere/"], b"", "upstream.invalid_request", None),
}


@pytest.mark.parametrize("name", STATUSES)
async def test_a_status_is_an_error_at_once_and_its_connection_is_used_again(
    name: str, autojump_clock: MockClock
) -> None:
    status, headers, body, code, retry_after = STATUSES[name]
    async with world_with([1.0, answer(body, *headers, status=status)]) as world:
        refused = await world.chat()
        error = await check_one_error(world, refused)
        assert (error.code, error.retry_after, error.response) == (code, retry_after, "")
        assert refused.arrivals[-1] - refused.asked_at == 1.0
        await check_next_run_is_fine(world)
        assert len(upstream(world)) == 1


async def test_a_refused_connection_is_an_error_at_once(autojump_clock: MockClock) -> None:
    async with world_with() as world:
        world.network.refuse(*VENDOR)
        refused = await world.chat()
        error = await check_one_error(world, refused)
        assert (error.code, refused.arrivals[-1] - refused.asked_at) == ("upstream.connection", 0)
        world.network.restore(*VENDOR)
        await check_next_run_is_fine(world)
        assert len(upstream(world)) == 1


async def test_a_black_hole_is_an_error_at_the_connect_deadline(autojump_clock: MockClock) -> None:
    async with world_with() as world:
        world.network.black_hole(*VENDOR)
        lost = await world.chat()
        error = await check_one_error(world, lost)
        assert (error.code, lost.arrivals[-1] - lost.asked_at) == ("timeout.connect", LIMITS.connect)
        world.network.restore(*VENDOR)
        await check_next_run_is_fine(world)


def endless(act: bytes, begin: bytes = STREAM_HEAD + WORD) -> Iterable[Act]:
    """This begin, then the same bytes as fast as they are taken."""
    return chain([begin], repeat(act))


HUGE: dict[str, tuple[Iterable[Act], str, str, int]] = {
    "a line of 10 MB": (as_stream(event(MEGABYTE * 10)), "upstream.protocol", "word ", MAX_EVENT_BYTES),
    "a line without end": (endless(chunked(MEGABYTE)), "upstream.protocol", "word ", MAX_EVENT_BYTES),
    "an event of 10 MB in short lines": (
        as_stream(chunked(b"data: xxxxxxxx\n" * 700_000)),
        "upstream.protocol",
        "word ",
        2 * MAX_EVENT_BYTES,
    ),
    "an event without end": (endless(chunked(b"data: x\n" * 4096)), "upstream.protocol", "word ", 8 * MAX_EVENT_BYTES),
    "a field without end": (endless(chunked(b"x" * 9999), STREAM_HEAD), "upstream.protocol", "", MAX_EVENT_BYTES),
    "JSON of 10 MB under 200": (
        [answer(MEGABYTE * 10, "Content-Type: application/json")],
        "upstream.protocol",
        "",
        ERROR_BODY_BYTES,
    ),
    "HTML without end under 200": (
        endless(MEGABYTE, b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"),
        "upstream.protocol",
        "",
        ERROR_BODY_BYTES,
    ),
    "an error without end": (endless(MEGABYTE, b"HTTP/1.1 500 Oops\r\n\r\n"), "upstream.server", "", ERROR_BODY_BYTES),
    "a head without end": (endless(b"X-More: of this\r\n", b"HTTP/1.1 200 OK\r\n"), "upstream.protocol", "", 65_536),
    "a header without end": (endless(MEGABYTE, b"HTTP/1.1 200 OK\r\nX: "), "upstream.protocol", "", 65_536),
    "garbage without end": (endless(MEGABYTE, b"garbage"), "upstream.protocol", "", 65_536),
    "a size of a chunk without end": (endless(b"0" * 9999, STREAM_HEAD), "upstream.protocol", "", 65_536),
    "a chunk extension without end": (endless(MEGABYTE, STREAM_HEAD + b"5;x="), "upstream.protocol", "", 65_536),
}


@pytest.mark.parametrize("name", HUGE)
async def test_what_is_too_large_is_read_no_further_than_its_bound(name: str, autojump_clock: MockClock) -> None:
    script, code, said, bound = HUGE[name]
    async with world_with(script) as world:
        flooded = await world.chat()
        error = await check_one_error(world, flooded)
        assert (error.code, error.response) == (code, said)
        [connection] = upstream(world)
        assert connection.client.closed_at == flooded.arrivals[-1]
        assert connection.to_client.sent <= bound + READ_AHEAD
        await check_next_run_is_fine(world)


async def test_an_answer_without_end_stops_at_the_runs_bound(autojump_clock: MockClock) -> None:
    async with world_with(endless(WORD, STREAM_HEAD), max_run_bytes=200_000) as world:
        flooded = await world.chat()
        error = await check_one_error(world, flooded)
        assert error.code == "output_limit"
        assert 1_000 < len(error.response) <= 200_000
        [connection] = upstream(world)
        assert connection.client.closed_at == flooded.arrivals[-1]
        await check_next_run_is_fine(world)


AFTER_THE_END: dict[str, tuple[list[Act], float]] = {
    "an event": ([0.25, MORE + LAST_CHUNK], 0.25),
    "an event, and no end": ([0.25, MORE, "hang"], 0.25),
    "an error": ([0.25, event(FAILURE) + LAST_CHUNK], 0.25),
    "a second response": ([LAST_CHUNK + STREAM_HEAD + MORE], 0.0),
    "a second response later": ([0.25, LAST_CHUNK + answer(b"")], 0.25),
    "nothing, and no end": (["hang"], 0.5),
    "keep-alives, and no end": ([0.125, KEEP_ALIVE] * 9, 0.125),
    "a close": ([0.25, "close"], 0.25),
    "a reset": ([0.25, "reset"], 0.25),
    "a bad chunk": ([0.25, b"xyz\r\n"], 0.25),
}


@pytest.mark.parametrize("name", AFTER_THE_END)
async def test_what_follows_the_end_mark_changes_nothing_but_the_connection(
    name: str, autojump_clock: MockClock
) -> None:
    acts, at = AFTER_THE_END[name]
    async with world_with([STREAM_HEAD, WORD, DONE, *acts]) as world:
        answered = await world.chat()
        done = answered.events[-1]
        assert isinstance(done, GenerationComplete)
        await wait_all_tasks_blocked()
        assert done.response == said_in(answered) == "word "
        assert answered.arrivals[-1] - answered.asked_at == at
        assert [connection.client.closed_at for connection in upstream(world)] == [answered.arrivals[-1]]
        await check_next_run_is_fine(world)
        assert len(upstream(world)) == 2
