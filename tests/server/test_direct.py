"""Plain chat requests are answered on their connection, others by Quart: nobody can tell which it was."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

import pytest
import trio
from quart import Response
from quart_trio import QuartTrio
from trio.testing import MockClock

from engine import AgentStopped
from providers.chunked import LAST_CHUNK
from server.cors import Cors
from server.direct import plain_request
from server.guard import RequestGuard
from server.requests import BODY_SECONDS
from server.routing import Call
from server.run_access import events_response
from server.run_directory import RunHandle
from server.serving import REST_SECONDS
from server.sse import EventStreamBody
from server.testing.memory_connection import MemoryStream
from tests.engine.scripted import SENT, ScriptedProvider, text
from tests.harness.world import World, open_world
from tests.server.raw_http import CHAT_PATH, HEAD_END, RawAnswer, chat_request, raw_client, request_bytes

BODY = b'{"message":"hi"}'
PLAIN = request_bytes("POST", CHAT_PATH, BODY)
QUARTS = ("Content-Type: application/json; charset=utf-8",)
"""What makes a request not plain, and changes nothing else."""


@contextmanager
def counted_by_quart() -> Iterator[list[str]]:
    """The paths that Quart is asked for."""
    paths: list[str] = []
    handle = QuartTrio.handle_request

    async def counting(app: QuartTrio, request: object) -> object:
        paths.append(request.path)  # type: ignore[attr-defined]
        return await handle(app, request)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuartTrio, "handle_request", counting)
        yield paths


@asynccontextmanager
async def talking_world(at: float = 1.0) -> AsyncIterator[World]:
    """A world with an agent that says one word."""
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((0, (SENT,)), (at, text("word"))))
        yield world


# What is plain


@pytest.mark.parametrize(
    "request_data",
    [
        PLAIN,
        request_bytes("POST", CHAT_PATH, BODY, ["Connection: Keep-Alive", "Accept:", "X-Odd_1.~:  \t two words \t "]),
        request_bytes("POST", CHAT_PATH, BODY, ["Authorization: Bearer lumos_a_b"]),
    ],
    ids=["as it is", "odd headers", "a key"],
)
def test_these_are_plain(request_data: bytes) -> None:
    asked = plain_request(request_data)
    assert asked is not None
    assert (asked.target.decode(), asked.missing) == (CHAT_PATH, 0)


def test_headers_are_read_as_they_mean(autojump_clock: MockClock) -> None:
    asked = plain_request(request_bytes("POST", CHAT_PATH, BODY, ["X-API-Key:  \t a key \t ", "Accept:"]))
    assert asked is not None
    assert asked.headers.get("x-api-key") == "a key"
    assert asked.headers.getlist("ACCEPT") == [""]


NOT_PLAIN = {
    "another method": PLAIN.replace(b"POST", b"PUT"),
    "HTTP/1.0": PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "an absolute URL": PLAIN.replace(b"POST /", b"POST http://lumos/"),
    "another type": request_bytes("POST", CHAT_PATH, BODY, ["Content-Type: text/plain"]),
    "a type with parameters": request_bytes("POST", CHAT_PATH, BODY, QUARTS),
    "two types": request_bytes("POST", CHAT_PATH, BODY, ["Content-Type: application/json"] * 2),
    "two lengths": request_bytes("POST", CHAT_PATH, BODY, [f"Content-Length: {len(BODY)}"]),
    "no length": PLAIN.replace(b"Content-Length: 16\r\n", b""),
    "a signed length": PLAIN.replace(b": 16", b": +16"),
    "a length too short": PLAIN.replace(b": 16", b": 15"),
    "a length of foreign digits": PLAIN.replace(b": 16", ": ١٦".encode()),
    "two hosts": request_bytes("POST", CHAT_PATH, BODY, ["Host: lumos"]),
    "no host": PLAIN.replace(b"Host: lumos\r\n", b""),
    "a host that is none": PLAIN.replace(b"Host: lumos", b"Host: a b"),
    "a name twice": request_bytes("POST", CHAT_PATH, BODY, ["X-API-Key: a", "x-api-key: b"]),
    "chunks": request_bytes("POST", CHAT_PATH, BODY, ["Transfer-Encoding: chunked"]),
    "expectations": request_bytes("POST", CHAT_PATH, BODY, ["Expect: 100-continue"]),
    "an upgrade": request_bytes("POST", CHAT_PATH, BODY, ["Upgrade: h2c"]),
    "the last one": request_bytes("POST", CHAT_PATH, BODY, ["Connection: close"]),
    "a folded line": request_bytes("POST", CHAT_PATH, BODY, ["X-A: a\r\n b"]),
    "a space before the colon": request_bytes("POST", CHAT_PATH, BODY, ["X-A : a"]),
    "a line feed alone": PLAIN.replace(b"Host: lumos\r\n", b"Host: lumos\n"),
    "a control character": request_bytes("POST", CHAT_PATH, BODY, ["X-A: a\x00"]),
    "a byte that is no ASCII": request_bytes("POST", CHAT_PATH, BODY, ["X-A: \xe9"]),
    "something behind": PLAIN + b"G",
    "half a head": PLAIN[: PLAIN.index(HEAD_END)],
    "nothing": b"",
}


@pytest.mark.parametrize("data", NOT_PLAIN.values(), ids=list(NOT_PLAIN))
def test_what_is_not_plain_by_one_byte_is_not(data: bytes) -> None:
    assert plain_request(data) is None


@pytest.mark.parametrize("path", [CHAT_PATH, CHAT_PATH.replace("/api/v1", "/api")])
async def test_a_plain_chat_never_meets_quart(path: str, autojump_clock: MockClock) -> None:
    async with talking_world() as world, raw_client(world) as client:
        with counted_by_quart() as paths:
            answer = await client.ask(request_bytes("POST", path, BODY))
    assert paths == []
    assert b'"chunk_type":"done"' in answer.body


@pytest.mark.parametrize("path", [f"{CHAT_PATH}?after=0", CHAT_PATH.removesuffix("/stream"), CHAT_PATH + "/"])
async def test_other_paths_are_quarts(path: str, autojump_clock: MockClock) -> None:
    async with talking_world() as world, raw_client(world) as client:
        with counted_by_quart() as paths:
            await client.ask(request_bytes("POST", path, BODY))
    assert paths == [path.partition("?")[0]]


# The same answers


SAME = {
    "a stream": (CHAT_PATH, BODY),
    "no such agent": (CHAT_PATH.replace("demo", "nobody"), BODY),
    "an encoded id": (CHAT_PATH.replace("demo", "%64emo"), BODY),
    "no JSON": (CHAT_PATH, b"{"),
    "another shape": (CHAT_PATH, b'{"massage":"hi"}'),
    "a blank message": (CHAT_PATH, b'{"message":" "}'),
    "a long deadline": (CHAT_PATH, b'{"message":"hi","deadlines":{"total":1e6}}'),
}


def facts_of(answer: RawAnswer) -> tuple[int, dict[str, str], bytes]:
    """Without what differs from answer to answer."""
    headers = {name: value for name, value in answer.headers.items() if name not in {"date", "x-run-id", "location"}}
    same = b"\n".join(
        line for line in answer.body.splitlines() if b"chunk_type" in line and b'"chunk_type":"start"' not in line
    )
    return answer.status, headers, same if answer.status == 200 else answer.body.partition(b'"timestamp"')[0]


@pytest.mark.parametrize("headers", [(), ("Origin: https://a.example",)], ids=["no page", "a page"])
@pytest.mark.parametrize(("path", "body"), SAME.values(), ids=list(SAME))
async def test_both_ways_answer_alike(
    path: str, body: bytes, headers: tuple[str, ...], autojump_clock: MockClock
) -> None:
    async def is_keyed() -> bool:
        await trio.lowlevel.checkpoint()
        return True

    guard = RequestGuard(is_keyed, Cors(["https://a.example"], keyed=True))
    async with open_world(guard=guard) as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider((0, (SENT,)), (1, text("word"))))
        with counted_by_quart() as paths:
            direct = await client.ask(request_bytes("POST", path, body, headers))
            assert len(paths) == ("%" in path)
            quarts = await client.ask(request_bytes("POST", path, body, [*headers, *QUARTS]))
    assert facts_of(direct)[1:] == facts_of(quarts)[1:]
    assert direct.status == quarts.status


async def test_a_page_that_may_not_ask_is_refused(autojump_clock: MockClock) -> None:
    async def is_keyed() -> bool:
        await trio.lowlevel.checkpoint()
        return False

    async with open_world(guard=RequestGuard(is_keyed)) as world, raw_client(world) as client:
        answer = await client.ask(PLAIN.replace(b"Host: lumos", b"Host: localhost\r\nOrigin: https://evil.example"))
    assert answer.status == 403


async def test_a_bug_is_500_and_the_connection_serves_on(autojump_clock: MockClock) -> None:
    def crash(*_args: object) -> object:
        raise ExceptionGroup("several", [ZeroDivisionError("a bug")])

    async with talking_world() as world, raw_client(world) as client:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("server.api_chat.resolve_user", crash)
            answer = await client.ask(PLAIN)
        assert (answer.status, answer.json()["code"]) == (500, "INTERNAL_ERROR")
        assert (await client.ask(PLAIN)).status == 200


# The connection


async def test_requests_of_both_kinds_follow_each_other(autojump_clock: MockClock) -> None:
    requests = [
        PLAIN,
        request_bytes("GET", "/health/live"),
        PLAIN,
        PLAIN,
        request_bytes("POST", CHAT_PATH, BODY, QUARTS),
    ]
    async with talking_world() as world, raw_client(world) as client:
        assert [(await client.ask(data)).status for data in requests * 2] == [200] * 10


async def test_a_request_sent_too_early_waits_for_the_answer_before(autojump_clock: MockClock) -> None:
    async with talking_world() as world, raw_client(world) as client:
        await client.stream.send_all(PLAIN)
        await trio.sleep(0.5)
        await client.stream.send_all(PLAIN)
        await client.answer()
        assert trio.current_time() == 1.0
        await client.answer()
        assert trio.current_time() == 2.0


async def test_two_requests_in_one_write_are_answered_in_order(autojump_clock: MockClock) -> None:
    async with talking_world() as world, raw_client(world) as client:
        await client.stream.send_all(PLAIN + request_bytes("GET", "/health/live"))
        assert b"word" in (await client.answer()).body
        assert b"word" not in (await client.answer()).body


async def test_a_body_behind_its_head_is_taken(autojump_clock: MockClock) -> None:
    end = PLAIN.index(HEAD_END) + len(HEAD_END)
    async with talking_world() as world, raw_client(world) as client:
        with counted_by_quart() as paths:
            await client.stream.send_all(PLAIN[:end])
            await trio.sleep(REST_SECONDS / 2)
            assert (await client.ask(PLAIN[end:])).status == 200
    assert paths == []


@pytest.mark.parametrize("late", [0.0, REST_SECONDS * 2, BODY_SECONDS - 1])
@pytest.mark.parametrize("cut", [1, len(BODY) - 1])
async def test_a_body_that_dawdles_is_quarts(late: float, cut: int, autojump_clock: MockClock) -> None:
    end = PLAIN.index(HEAD_END) + len(HEAD_END)
    async with talking_world() as world, raw_client(world) as client:
        with counted_by_quart() as paths:
            await client.stream.send_all(PLAIN[:end])
            await trio.sleep(late)
            await client.stream.send_all(PLAIN[end : end + cut])
            await trio.sleep(REST_SECONDS)
            assert (await client.ask(PLAIN[end + cut :])).status == 200
    assert paths == [CHAT_PATH]


async def test_a_head_without_a_body_is_408_after_its_time(autojump_clock: MockClock) -> None:
    async with talking_world() as world, raw_client(world) as client:
        answer = await client.ask(PLAIN[: PLAIN.index(HEAD_END) + len(HEAD_END)])
        assert answer.status == 408
        assert trio.current_time() == BODY_SECONDS + REST_SECONDS


async def test_the_model_is_asked_before_the_answer_is_made(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order in which trio's tasks have their turn, which it draws by chance."""
    asked: list[int] = []

    def make_noting(call: Call[Any, Any], run: RunHandle) -> Response | EventStreamBody:
        asked.append(len(provider.requests))
        return events_response(call, run)

    monkeypatch.setattr("server.api_chat.events_response", make_noting)
    async with open_world() as world:
        provider = ScriptedProvider((0, (SENT,)), (1, text("word")))
        world.add_agent(provider=provider)
        for _ in range(12):
            await world.chat()
    assert asked == list(range(1, 13))


async def test_head_and_first_events_are_one_write_and_so_are_the_last_event_and_the_end(
    autojump_clock: MockClock,
) -> None:
    async with talking_world() as world, raw_client(world) as client:
        await client.stream.send_all(PLAIN)
        parts = [bytes(await client.stream.receive_some())]
        while not parts[-1].endswith(LAST_CHUNK):
            parts.append(bytes(await client.stream.receive_some()))
    assert parts[0].startswith(b"HTTP/1.1 200 ")
    assert b'"chunk_type":"start"' in parts[0]
    assert b'"chunk_type":"done"' in parts[-1]


async def test_an_idle_connection_closes_after_its_time_and_one_that_is_answered_does_not(
    autojump_clock: MockClock,
) -> None:
    async with talking_world(at=60) as world, raw_client(world) as client:
        await trio.sleep(9)
        assert (await client.ask(PLAIN)).status == 200
        answered_at = trio.current_time()
        assert await client.read_to_end() == b""
        assert trio.current_time() == answered_at + 10


@pytest.mark.parametrize("half", [True, False], ids=["half closed", "closed"])
async def test_who_leaves_ends_the_run_at_that_instant(half: bool, autojump_clock: MockClock) -> None:
    async with talking_world(at=60) as world, raw_client(world) as client:
        await client.stream.send_all(chat_request(on_disconnect="cancel"))
        await trio.sleep(7.5)
        await (cast(MemoryStream, client.stream).send_eof() if half else client.stream.aclose())
        await trio.sleep(1)
        run = world.supervisor.find(world.journal.entries[0][1])
        assert run is not None
        assert isinstance(run.log.terminal, AgentStopped)
        assert run.ended_at == 7.5


async def test_who_still_waits_when_serving_ends_is_told(autojump_clock: MockClock) -> None:
    async def hang(*_args: object) -> object:
        return await trio.sleep_forever()

    async with open_world() as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider((1, text("hi"))))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("server.api_chat.find_chat_agent", hang)
            await client.stream.send_all(PLAIN)
            await trio.sleep(1)
            world.stopping.set()
            answer = await client.answer()
    assert (answer.status, answer.json()["message"]) == (503, "the server is shutting down")
    assert answer.headers["connection"] == "close"
