"""The serving stack's traps, each found by measurement, in memory on the virtual clock (``docs/decisions.md``).

The name of a test begins with its trap's: H1 one connection kills the worker, H2 a client that never reads, H3 idle
connections live for ever, H5 long streams are cut, H7 disconnects, H8 sizes, Q1 to Q10 Quart's.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn

import hpack
import httpx
import msgspec
import pytest
import structlog.testing
import trio
from quart import Response
from quart.wrappers.response import ResponseBody
from trio.testing import MockClock

from engine import AgentStopped, Deadlines, Emit, Error, GenerationComplete, RunSupervisor, TextDelta
from providers.chunked import LAST_CHUNK
from server.app import API, Services, create_app
from server.doorkeeper import LINGER_SECONDS
from server.requests import BODY_SECONDS
from server.serving import ServingLimits, serve
from server.sse import EventStreamBody, reading, stream_response
from server.testing.memory_connection import MemoryConnection
from tests.engine.scripted import FOREVER, SENT, Line, ProgrammedProvider, ScriptedProvider, text
from tests.harness.world import LUMOS, World, open_world
from tests.server.raw_http import (
    CHAT_PATH,
    HEAD_END,
    RawClient,
    chat_request,
    chunks,
    raw_client,
    request_bytes,
)

BASE = "http://lumos"
LIVE = request_bytes("GET", "/health/live")
ATTACK_AT = 5.5
WINDOW = 65_536


def words(count: int) -> tuple[Line, ...]:
    """One word a second."""
    return ((0, (SENT,)), *((1 + number, text(f"word{number} ")) for number in range(count)))


def big_reads(count: int = 100, size: int = 10_000) -> tuple[Line, ...]:
    """Ten thousand characters a second: the seventh read is the first that the window has no room for."""
    return ((0, (SENT,)), *((1 + number, text("x" * size)) for number in range(count)))


FULL_AT = 7
"""When the window of a client that never reads is full, with ``big_reads``."""


def lumos_connections(world: World) -> list[MemoryConnection]:
    """Every connection that was made to Lumos, oldest first."""
    return [connection for connection in world.network.connections if connection.server.socket.local == LUMOS]


# H1: whatever the bytes of one client, nobody else notices


def websocket_upgrade(*headers: str) -> bytes:
    """An upgrade to WebSocket, right but for what the headers say."""
    usual = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
    return request_bytes("GET", "/", headers=[*usual, "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", *headers])


def h2c_upgrade(settings: str) -> bytes:
    """An upgrade to HTTP/2 in cleartext."""
    headers = ["Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", f"HTTP2-Settings: {settings}"]
    return request_bytes("GET", "/health/live", headers=headers)


def http2_frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def http2_request(**pseudo: bytes) -> bytes:
    """A connection's preface and one request (HEADERS with END_STREAM and END_HEADERS)."""
    fields: dict[bytes | str, bytes | str] = {b":" + name.encode(): value for name, value in pseudo.items()}
    return PREFACE + http2_frame(1, 5, 1, hpack.Encoder().encode(fields))


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2_frame(4, 0, 0)
GET = {"method": b"GET", "scheme": b"http", "authority": b"lumos"}
TLS_HELLO = bytes.fromhex("16030100c4010000c00303") + random.Random(1).randbytes(190)

KILLERS = {
    "WebSocket extensions that are no UTF-8": websocket_upgrade("Sec-WebSocket-Extensions: \xff"),
    "WebSocket protocol that is no UTF-8": websocket_upgrade("Sec-WebSocket-Protocol: \xff"),
    "WebSocket upgrade and a stray byte": websocket_upgrade() + b"x",
    "h2c with bad base64": h2c_upgrade("!"),
    "h2c with bad settings": h2c_upgrade("AAAA"),
    "HTTP/2 path that is no UTF-8": http2_request(**GET, path=b"/\xff"),
    "HTTP/2 method that is no UTF-8": http2_request(**GET | {"method": b"G\xff"}, path=b"/"),
    "HTTP/2 query that is no UTF-8": http2_request(**GET, path=b"/?\xff"),
    "HTTP/2 CONNECT without a path": http2_request(method=b"CONNECT", authority=b"lumos"),
    "HTTP/2 with 1001 priorities": PREFACE
    + b"".join(http2_frame(2, 0, 2 * number + 1, b"\0\0\0\0\0") for number in range(1001)),
    "HTTP/2 data after the answer": http2_request(**GET, path=b"/") + http2_frame(0, 1, 1, b"x") * 3,
}

GARBAGE = {
    "TLS hello": TLS_HELLO,
    "HTTP/2 preface": PREFACE,
    "h2c": h2c_upgrade("AAMAAABkAAQAAP__"),
    "WebSocket upgrade": websocket_upgrade(),
    "WebSocket upgrade without a key": request_bytes("GET", "/", headers=["Upgrade: websocket", "Connection: Upgrade"]),
    "WebSocket upgrade and frames": websocket_upgrade() + b"\x88\x80\0\0\0\0" * 5,
    "WebSocket upgrade of a stream": websocket_upgrade().replace(b"GET /", b"GET " + CHAT_PATH.encode()),
    "random bytes": random.Random(2).randbytes(5000),
    "zeros": bytes(5000),
    "nothing": b"",
    "an empty line": b"\r\n",
    "empty lines": b"\r\n" * 5000,
    "SSH": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "a PROXY line": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + LIVE,
    "HTTP/0.9": b"GET /\n",
    "HTTP/3.7": b"GET / HTTP/3.7\r\nHost: x\r\n\r\n",
    "HTTP/1.0": b"GET /health/live HTTP/1.0\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "an endless line": b"GET /" + b"a" * 60_000,
    "a head cut short": LIVE[:-3],
    "a body cut short": chat_request()[:-3],
    "a bad chunk": request_bytes("POST", CHAT_PATH, headers=["Transfer-Encoding: chunked"]) + b"zz\r\nx\r\n",
    "a negative chunk": request_bytes("POST", CHAT_PATH, headers=["Transfer-Encoding: chunked"]) + b"-1\r\nx\r\n",
    "an overlong chunk size": request_bytes("POST", CHAT_PATH, headers=["Transfer-Encoding: chunked"]) + b"f" * 100,
    "more than the length says": request_bytes("POST", CHAT_PATH, headers=["Content-Length: 1"]) + b"{}" + b"x" * 99,
    "a length and chunks": request_bytes("POST", "/", headers=["Content-Length: 4", "Transfer-Encoding: chunked"]),
    "an unknown expectation": request_bytes("POST", CHAT_PATH, b"{}", headers=["Expect: 42"]),
    "a response": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "many at once": LIVE * 100,
    "a good one, then garbage": LIVE + b"\xff" * 100,
}


async def send_and_wait(client: RawClient, data: bytes) -> None:
    """Send the bytes, and wait until the server closes."""
    with suppress(trio.BrokenResourceError):  # closed before it had read all
        await client.stream.send_all(data)
    await client.read_to_end()


async def send_and_leave(client: RawClient, data: bytes) -> None:
    """Send the bytes and close at once."""
    await client.stream.send_all(data)


async def send_and_reset(client: RawClient, data: bytes) -> None:
    """Send the bytes, wait a moment and reset."""
    await client.stream.send_all(data)
    await trio.sleep(0.5)
    client.stream.reset()  # type: ignore[attr-defined]


async def send_each_byte(client: RawClient, data: bytes) -> None:
    """Send byte by byte, a thousand each second, and wait until the server closes."""
    with suppress(trio.BrokenResourceError):
        for at in range(min(len(data), 2000)):
            await trio.sleep(0.001)
            await client.stream.send_all(data[at : at + 1])
    await client.read_to_end()


Attack = Callable[[RawClient, bytes], Awaitable[None]]


@pytest.mark.parametrize("attack", [send_and_wait, send_and_leave, send_and_reset, send_each_byte])
@pytest.mark.parametrize("data", (KILLERS | GARBAGE).values(), ids=KILLERS | GARBAGE)
async def test_h1_hostile_bytes_end_only_their_own_connection(
    data: bytes, attack: Attack, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(40)))
        attacked_until = 0.0

        async def attack_a_while_later() -> None:
            nonlocal attacked_until
            await trio.sleep(ATTACK_AT)
            async with raw_client(world) as client:
                await attack(client, data)
            attacked_until = trio.current_time()

        async with world.open_chat() as bystander:
            world.nursery.start_soon(attack_a_while_later)
            said = [event.content async for event in bystander if isinstance(event, TextDelta)]
        assert said == [f"word{number} " for number in range(40)]
        assert bystander.arrivals[-1] == 40
        assert (await world.client.get(f"{BASE}/health/live")).status_code == 200
        hostile = lumos_connections(world)[1]
        assert hostile.client.closed_at == attacked_until
        assert hostile.server.closed_at is not None
        assert ATTACK_AT <= hostile.server.closed_at <= ATTACK_AT + 2 + BODY_SECONDS + LINGER_SECONDS


@pytest.mark.parametrize("seed", range(20))
async def test_h1_a_mangled_request_ends_only_its_own_connection(seed: int, autojump_clock: MockClock) -> None:
    dice = random.Random(seed)
    sound = [LIVE, chat_request(), websocket_upgrade("Sec-WebSocket-Protocol: a, b"), PREFACE, *KILLERS.values()]
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(3)))
        for _ in range(20):
            data = bytearray(dice.choice(sound) + dice.choice(sound))
            for _ in range(dice.randrange(1, 8)):
                data[dice.randrange(len(data))] = dice.randrange(256)
            async with raw_client(world) as client:
                with trio.move_on_after(dice.uniform(0, 5)):
                    await send_and_wait(client, bytes(data))
        assert (await world.client.get(f"{BASE}/health/live")).status_code == 200
        await trio.sleep(20)
        assert all(connection.server.closed_at is not None for connection in lumos_connections(world))
        assert world.supervisor.active_runs == 0


@pytest.mark.parametrize("data", [h2c_upgrade("AAMAAABkAAQAAP__"), h2c_upgrade("!"), PREFACE])
async def test_h1_http2_in_cleartext_is_not_spoken(data: bytes, autojump_clock: MockClock) -> None:
    async with open_world() as world, raw_client(world) as client:
        with structlog.testing.capture_logs() as logs:
            answer = await client.ask(data)
        assert answer.status == (404 if data is PREFACE else 200)
        assert logs == []


async def test_h1_a_crash_of_the_connection_itself_is_logged_and_ends_only_it(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world() as world, raw_client(world) as victim:
        with structlog.testing.capture_logs() as logs:
            monkeypatch.setattr("hypercorn.protocol.h11.HTTPStream", crash)
            await victim.stream.send_all(LIVE)
            assert await victim.read_to_end() == b""
            monkeypatch.undo()
        assert [line["event"] for line in logs] == ["connection.crashed"]
        assert "a bug" in repr(logs[0]["exc_info"].exceptions)
        assert (await world.client.get(f"{BASE}/health/live")).status_code == 200


def crash(*_: object, **__: object) -> NoReturn:
    """What a bug does."""
    raise ZeroDivisionError("a bug")


# H2: a client that never reads


@pytest.mark.parametrize("write_stall", [20.0, 3.0])
@pytest.mark.parametrize(
    ("on_disconnect", "run_ends_after"),
    [("cancel", 0.0), ("grace", 5.0), ("continue", None)],
    ids=str,
)
async def test_h2_a_client_that_never_reads_is_reset_at_the_stall_limit(
    on_disconnect: str, run_ends_after: float | None, write_stall: float, autojump_clock: MockClock
) -> None:
    async with open_world(ServingLimits(write_stall=write_stall), window=WINDOW) as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider(*big_reads()), deadlines=Deadlines(total=1000))
        await client.stream.send_all(chat_request(on_disconnect=on_disconnect))
        await trio.sleep(200)
        connection = lumos_connections(world)[0]
        cut_at = FULL_AT + write_stall
        assert connection.to_client.sent == WINDOW
        assert connection.server.closed_at == cut_at
        with pytest.raises(trio.BrokenResourceError):
            await client.stream.receive_some()
        ended, _, at = world.journal.entries[-1]
        assert (ended, at) == ("ended", 100 if run_ends_after is None else cut_at + run_ends_after)


async def test_h2_what_a_stalled_client_missed_can_be_resumed(autojump_clock: MockClock) -> None:
    async with open_world(window=WINDOW) as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider(*big_reads()))
        await client.stream.send_all(chat_request())
        await trio.sleep(FULL_AT + 20 + 4.5)
        url = f"{BASE}{API}/runs/{world.journal.entries[0][1]}/events"
        body = (await world.client.get(url)).content
        assert b"x" * 1_000_000 in body
        assert b'"chunk_type":"done"' in body


async def test_h2_a_client_that_reads_slowly_but_steadily_is_not_reset(autojump_clock: MockClock) -> None:
    async with open_world(window=WINDOW) as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider((0, (SENT,)), (1, text("x" * 1_000_000))))
        await client.stream.send_all(chat_request())
        received = 0
        while part := await client.stream.receive_some(8_000):
            received += len(part)
            await trio.sleep(1)
            if b"0\r\n\r\n" in part:
                break
        assert received > 2_000_000, "the delta and the terminal event hold the text"
        assert trio.current_time() > 200


async def test_h2_a_stalled_client_cannot_block_a_stop(autojump_clock: MockClock) -> None:
    async with open_world(window=WINDOW) as world, raw_client(world) as client:
        provider = ScriptedProvider(*big_reads())
        world.add_agent(provider=provider)
        await client.stream.send_all(chat_request())
        await trio.sleep(FULL_AT + 1.5)
        response = await world.client.post(f"{BASE}{API}/runs/{world.journal.entries[0][1]}/stop")
        assert response.json()["data"]["status"] == "stop"
        assert world.journal.entries[-1][0::2] == ("ended", FULL_AT + 1.5)
        assert provider.seen[-1] == (FULL_AT + 1.5, "cancelled")


async def test_h2_a_stalled_client_cannot_block_a_deadline(autojump_clock: MockClock) -> None:
    async with open_world(window=WINDOW) as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider(*big_reads()))
        await client.stream.send_all(chat_request(deadlines={"total": 10.5}))
        await trio.sleep(60)
        run = world.supervisor.find(world.journal.entries[0][1])
        assert run is not None
        assert isinstance(run.log.terminal, Error)
        assert (run.log.terminal.code, run.elapsed) == ("timeout.total", 10.5)


@asynccontextmanager
async def second_server(
    world: World, limits: ServingLimits | None = None
) -> AsyncIterator[tuple[RawClient, trio.Event, Callable[[], Awaitable[float]]]]:
    """Lumos at another address: a client of it, what stops it, and a wait for the time at which ``serve`` returned."""
    stopping, stopped = trio.Event(), trio.Event()
    stopped_at = 0.0
    app = create_app(Services(world.agents, world.supervisor))

    async def serve_and_note_the_end() -> None:
        nonlocal stopped_at
        await serve(app, [world.network.listen("second", 80)], stopping, limits)
        stopped_at = trio.current_time()
        stopped.set()

    async def wait_stopped() -> float:
        await stopped.wait()
        return stopped_at

    world.nursery.start_soon(serve_and_note_the_end)
    await trio.testing.wait_all_tasks_blocked()
    async with await world.network.connect("second", 80) as stream:
        yield RawClient(stream), stopping, wait_stopped


@pytest.mark.parametrize("closing", [3.0, 1.0])
async def test_h2_a_stalled_client_cannot_hold_the_shutdown(closing: float, autojump_clock: MockClock) -> None:
    async with open_world(window=WINDOW) as world:
        world.add_agent(provider=ScriptedProvider(*big_reads()))
        async with second_server(world, ServingLimits(closing=closing)) as (client, stopping, wait_stopped):
            await client.stream.send_all(chat_request())
            await trio.sleep(FULL_AT + 1.5)
            stopping.set()
            assert await wait_stopped() == FULL_AT + 1.5 + closing
            with pytest.raises(trio.BrokenResourceError):
                await client.stream.receive_some()


async def test_h2_a_stream_under_way_is_cut_at_the_end_of_closing(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(100)))
        async with second_server(world) as (client, stopping, wait_stopped):
            await client.stream.send_all(chat_request())
            await trio.sleep(5.5)
            stopping.set()
            received = await client.read_to_end()
            assert await wait_stopped() == 5.5 + ServingLimits().closing
        assert b"word7 " in received
        assert b"word8 " not in received
        assert not received.endswith(LAST_CHUNK), "a cut is not a clean end"


async def test_h2_a_request_that_waits_at_the_end_of_closing_is_answered_503(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(100)))
        async with second_server(world) as (client, stopping, _):
            await client.stream.send_all(request_bytes("POST", CHAT_PATH.removesuffix("/stream"), b'{"message":"hi"}'))
            await trio.sleep(5.5)
            stopping.set()
            head, _, body = (await client.read_to_end()).partition(HEAD_END)
            assert trio.current_time() == 5.5 + ServingLimits().closing
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: " in head
        assert msgspec.json.decode(body)["code"] == "SERVICE_UNAVAILABLE"


# H3: idle connections


async def test_h3_a_connection_without_a_request_is_closed_after_keep_alive(autojump_clock: MockClock) -> None:
    async with open_world(ServingLimits(keep_alive=10)) as world, raw_client(world) as client:
        assert await client.read_to_end() == b""
        assert trio.current_time() == 10


@pytest.mark.parametrize("requests", [1, 2, 5])
async def test_h3_an_idle_connection_is_closed_after_keep_alive(requests: int, autojump_clock: MockClock) -> None:
    async with open_world(ServingLimits(keep_alive=10)) as world, raw_client(world) as client:
        for _ in range(requests):
            await trio.sleep(3)
            assert (await client.ask(LIVE)).status == 200
        assert await client.read_to_end() == b""
        assert trio.current_time() == requests * 3 + 10


async def test_h3_after_a_stream_an_idle_connection_is_closed_after_keep_alive(autojump_clock: MockClock) -> None:
    async with open_world(ServingLimits(keep_alive=10)) as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider(*words(30)))
        assert (await client.ask(chat_request())).status == 200
        assert trio.current_time() == 30
        assert await client.read_to_end() == b""
        assert trio.current_time() == 40


@pytest.mark.parametrize("earlier_requests", [0, 1, 3])
async def test_h3_a_head_that_drips_is_cut_after_keep_alive(earlier_requests: int, autojump_clock: MockClock) -> None:
    async with open_world(ServingLimits(keep_alive=10)) as world, raw_client(world) as client:
        for _ in range(earlier_requests):
            await trio.sleep(3)
            await client.ask(LIVE)

        async def drip() -> None:
            with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
                for at in range(len(LIVE)):
                    await client.stream.send_all(LIVE[at : at + 1])
                    await trio.sleep(0.9)

        world.nursery.start_soon(drip)
        assert await client.read_to_end() == b""
        assert trio.current_time() == earlier_requests * 3 + 10


class EndlessBody(ResponseBody):
    """Always has data: no wait of its own."""

    async def __aenter__(self) -> EndlessBody:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing is open."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return b"x"


@pytest.mark.parametrize("reads", [True, False], ids=["reads", "never reads"])
async def test_h3_a_body_that_always_has_data_lets_others_run_and_ends_with_its_client(
    reads: bool, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_world() as world:
        app = create_app(Services(world.agents, world.supervisor))

        @app.get("/endless")
        async def endless() -> Response:
            return stream_response(EndlessBody())

        await world.nursery.start(serve, app, [world.network.listen("third", 80)], trio.Event())
        async with await world.network.connect("third", 80) as stream:
            await stream.send_all(request_bytes("GET", "/endless"))
            for _ in range(10 * reads):
                assert await stream.receive_some()
            assert (await world.client.get("http://third/health/live")).status_code == 200
        assert (await world.client.get("http://third/health/live")).status_code == 200
        await trio.testing.wait_all_tasks_blocked()
        assert world.network.connections[0].server.closed_at == 0
        assert caplog.text == "", "where Hypercorn would leave the failure of a test that ran out of time"


async def test_h3_the_shutdown_does_not_wait_for_idle_connections(autojump_clock: MockClock) -> None:
    async with open_world() as world, second_server(world) as (client, stopping, wait_stopped):
        await client.ask(LIVE)
        await trio.sleep(2)
        stopping.set()
        assert await wait_stopped() == 2


@pytest.mark.parametrize("ticks", range(6))
async def test_h3_the_shutdown_does_not_wait_for_a_connection_that_just_came(
    ticks: int, autojump_clock: MockClock
) -> None:
    async with open_world() as world, second_server(world) as (_, stopping, wait_stopped):
        await trio.sleep(2)
        async with await world.network.connect("second", 80):
            for _ in range(ticks):
                await trio.lowlevel.checkpoint()
            stopping.set()
            assert await wait_stopped() == 2


async def leave_idle(client: RawClient) -> None:
    """Close after an answer."""
    await client.ask(LIVE)
    await trio.sleep(1)


async def leave_before_a_request(client: RawClient) -> None:
    """Close without a word."""
    await trio.sleep(1)


async def leave_in_a_head(client: RawClient) -> None:
    """Close before the head is whole."""
    await client.stream.send_all(LIVE[:-3])
    await trio.sleep(1)


async def leave_in_a_body(client: RawClient) -> None:
    """Close before the body is whole."""
    await client.stream.send_all(chat_request()[:-3])
    await trio.sleep(1)


async def leave_a_stream(client: RawClient) -> None:
    """Close while an answer streams."""
    await client.stream.send_all(chat_request(on_disconnect="cancel"))
    await trio.sleep(1)


@pytest.mark.parametrize(
    "leave", [leave_before_a_request, leave_idle, leave_in_a_head, leave_in_a_body, leave_a_stream]
)
async def test_h3_a_connection_ends_when_its_client_leaves(
    leave: Callable[[RawClient], Awaitable[None]], autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((FOREVER, ())))
        async with raw_client(world) as client:
            await leave(client)
        await trio.sleep(100)
        (connection,) = lumos_connections(world)
        assert connection.server.closed_at == 1
        assert world.supervisor.active_runs == 0


# H5: long streams


async def test_h5_a_stream_of_an_hour_is_not_cut_though_its_client_says_nothing(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        provider = ScriptedProvider((0, (SENT,)), *((at, text(f"{at} ")) for at in range(100, 3700, 100)))
        world.add_agent(provider=provider, deadlines=Deadlines(total=4000, first_token=1000, idle=1000))
        answer = await world.chat()
        assert isinstance(answer.events[-1], GenerationComplete)
        assert answer.arrivals[-1] == 3600


# H7: disconnects


async def test_h7_a_disconnect_is_seen_at_once_also_in_silence(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        provider = ScriptedProvider((0, (SENT,)), (FOREVER, ()))
        world.add_agent(provider=provider)
        async with raw_client(world) as client:
            await client.stream.send_all(chat_request(on_disconnect="cancel"))
            await trio.sleep(4.5)
        await trio.sleep(60)
        assert provider.seen[-1] == (4.5, "cancelled")


async def test_h7_half_a_close_counts_as_a_disconnect(autojump_clock: MockClock) -> None:
    async with open_world() as world, raw_client(world) as client:
        provider = ScriptedProvider((0, (SENT,)), (FOREVER, ()))
        world.add_agent(provider=provider)
        await client.stream.send_all(chat_request(on_disconnect="cancel"))
        await trio.sleep(4.5)
        await client.stream.send_eof()  # type: ignore[attr-defined]
        received = await client.read_to_end()
        await trio.testing.wait_all_tasks_blocked()
        assert provider.seen[-1] == (4.5, "cancelled")
        assert trio.current_time() == 4.5
        assert not received.endswith(LAST_CHUNK), "a cut is not a clean end"


async def test_h7_requests_sent_ahead_are_answered_in_order(autojump_clock: MockClock) -> None:
    async with open_world() as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider(*words(3)))
        await client.stream.send_all(chat_request() + request_bytes("GET", "/nothing") + LIVE)
        assert [(await client.answer()).status for _ in range(3)] == [200, 404, 200]
        assert trio.current_time() == 3


@pytest.mark.parametrize("rest", [b"x", LIVE, b"\xff" * 100], ids=["a stray byte", "a request", "garbage"])
@pytest.mark.parametrize("how", ["closes", "resets"])
async def test_h7_a_client_that_sent_ahead_and_left_is_noticed_at_the_next_write(
    rest: bytes, how: str, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        provider = ScriptedProvider(*words(100))
        world.add_agent(provider=provider)
        async with raw_client(world) as client:
            await client.stream.send_all(chat_request(on_disconnect="cancel"))
            await trio.sleep(1)
            await client.stream.send_all(rest)
            await trio.sleep(2.5)
            if how == "resets":
                client.stream.reset()  # type: ignore[attr-defined]
        await trio.sleep(100)
        assert [connection.server.closed_at for connection in lumos_connections(world)] == [4]
        assert provider.seen[-1] == (4, "cancelled")


async def test_h7_a_client_that_sent_ahead_and_never_reads_is_reset_too(autojump_clock: MockClock) -> None:
    async with open_world(window=WINDOW) as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider(*big_reads()))
        await client.stream.send_all(chat_request() + LIVE)
        await trio.sleep(200)
        assert lumos_connections(world)[0].server.closed_at == FULL_AT + 20
        assert world.supervisor.active_runs == 0


async def test_h7_head_of_a_stream_sends_nothing_and_the_connection_goes_on(autojump_clock: MockClock) -> None:
    async with open_world() as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider(*words(50)))
        async with world.open_chat() as answer:
            await client.stream.send_all(request_bytes("HEAD", f"{API}/runs/{answer.run_id}/events"))
            assert (await client.read_head()).startswith(b"HTTP/1.1 200 ")
            assert (await client.ask(LIVE)).json() == {"status": "ok"}
            assert trio.current_time() == 0


async def test_h7_a_client_of_http_1_0_gets_its_stream_up_to_the_close(autojump_clock: MockClock) -> None:
    async with open_world() as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider(*words(3)))
        await client.stream.send_all(chat_request().replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, body = (await client.read_to_end()).partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower()
        assert body.startswith(b"retry: 1000\nid: ")
        assert b'"chunk_type":"done"' in body
        assert trio.current_time() == 3


async def test_h7_a_client_that_waits_for_100_continue_gets_it(autojump_clock: MockClock) -> None:
    async with open_world() as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider(*words(3)))
        request = request_bytes("POST", CHAT_PATH, b'{"message":"hi"}', headers=["Expect: 100-continue"])
        await client.stream.send_all(request[:-16])
        assert (await client.read_head()).startswith(b"HTTP/1.1 100 ")
        assert (await client.ask(request[-16:])).status == 200


# H8: sizes


@pytest.mark.parametrize("header", [f"X: {'x' * 70_000}", "\r\n".join(f"X{n}: {n}" for n in range(9000))])
async def test_h8_a_head_over_the_limit_is_431(header: str, autojump_clock: MockClock) -> None:
    async with open_world() as world, raw_client(world) as client:
        answer = await client.ask(request_bytes("GET", "/health/live", headers=[header]))
        assert (answer.status, answer.headers["connection"]) == (431, "close")
        assert await client.read_to_end() == b""
        assert trio.current_time() == 0


async def test_h8_a_head_that_never_ends_is_431(autojump_clock: MockClock) -> None:
    async with open_world() as world, raw_client(world) as client:

        async def send_without_end() -> None:
            with suppress(trio.BrokenResourceError):
                while True:
                    await client.stream.send_all(b"X: %s\r\n" % (b"x" * 1000))
                    await trio.sleep(0.001)

        await client.stream.send_all(b"GET /health/live HTTP/1.1\r\nHost: lumos\r\n")
        world.nursery.start_soon(send_without_end)
        assert (await client.answer()).status == 431
        assert trio.current_time() < 0.1
        assert await client.read_to_end() == b""
        await trio.sleep(10)
        (connection,) = lumos_connections(world)
        assert connection.server.closed_at is not None
        assert connection.server.closed_at < 0.1 + LINGER_SECONDS


# Quart's


async def test_q1_a_run_that_crashes_touches_nobody(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(10)))
        bugs: Sequence[BaseException] = (ZeroDivisionError("a bug"), ExceptionGroup("two", [KeyError("a"), OSError()]))
        for number, bug in enumerate(bugs):
            world.add_agent(f"crash{number}", ScriptedProvider((0, (SENT,)), (2.5, bug)))
        async with world.open_chat() as bystander, trio.open_nursery() as nursery:
            for number in range(len(bugs)):
                nursery.start_soon(assert_ends_in_internal, world, f"crash{number}")
            events = [event async for event in bystander]
        assert isinstance(events[-1], GenerationComplete)
        assert bystander.arrivals[-1] == 10
        assert len(world.journal.bugs) == len(bugs)
        assert isinstance((await world.chat()).events[-1], GenerationComplete)


async def assert_ends_in_internal(world: World, agent_id: str) -> None:
    """A chat with the agent ends in ``internal`` after 2.5 s and tells nothing of the bug."""
    url = f"{BASE}{API}/agents/{agent_id}/chat/lumosai/stream"
    response = await world.client.post(url, json={"message": "hi"})
    assert b'"code":"internal","content":"internal error"' in response.content
    assert b"a bug" not in response.content
    assert trio.current_time() == 2.5


async def test_q1_nothing_runs_in_the_apps_own_nursery(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        app = create_app(Services(world.agents, world.supervisor))
        world.add_agent(provider=ScriptedProvider(*words(3)))
        await world.nursery.start(serve, app, [world.network.listen("third", 80)], trio.Event())
        response = await world.client.post(f"http://third{CHAT_PATH}", json={"message": "hi"})
        assert b'"chunk_type":"done"' in response.content
        assert not hasattr(app, "nursery")


async def test_q2_a_provider_that_fails_while_it_is_cancelled_is_heard_of(autojump_clock: MockClock) -> None:
    async def fail_in_clean_up(emit: Emit) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ZeroDivisionError("in clean-up")

    async with open_world() as world:
        world.add_agent(provider=ProgrammedProvider(fail_in_clean_up))
        with trio.move_on_after(2.5):
            await world.chat(on_disconnect="cancel")
        await trio.sleep(1)
        assert "in clean-up" in repr(world.journal.bugs)
        assert world.supervisor.active_runs == 0


@pytest.mark.parametrize("plain", [True, False])
async def test_q2_a_body_that_fails_while_its_client_leaves_is_logged(
    plain: bool, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reading if plain else EventStreamBody, "__exit__" if plain else "__aexit__", crash)
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(10)))
        async with raw_client(world) as client:
            await client.stream.send_all(chat_request() if plain else chat_request().replace(b"/stream", b"/stream?"))
            await trio.sleep(2.5)
        await trio.sleep(1)
        assert "ZeroDivisionError: a bug" in caplog.text


@pytest.mark.parametrize("way", ["", "/stream", "/simulated"])
async def test_q3_every_way_of_leaving_ends_the_reading(way: str, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(50)))
        url = f"{BASE}{API}/agents/demo/chat/lumosai{way}"
        with trio.move_on_after(3.5):
            await world.client.post(url, json={"message": "hi", "on_disconnect": "continue"})
        run = world.supervisor.find(world.journal.entries[0][1])
        assert run is not None
        await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        assert run.log.readers == 0
        assert trio.current_time() == 3.5
        assert not run.log.ended


async def test_q9_a_bug_in_a_handler_is_500_in_the_error_shape_and_logged(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world() as world:
        with structlog.testing.capture_logs() as logs, monkeypatch.context() as patch:
            patch.setattr(RunSupervisor, "find", crash)
            response = await world.client.get(f"{BASE}{API}/runs/x")
        assert response.status_code == 500
        payload: dict[str, Any] = response.json()
        del payload["timestamp"]
        assert payload == {"code": "INTERNAL_ERROR", "message": "internal error", "details": None}
        assert [(line["event"], repr(line["exc_info"])) for line in logs] == [
            ("request.crashed", "ZeroDivisionError('a bug')")
        ]
        assert (await world.client.get(f"{BASE}{API}/runs/x")).status_code == 404


async def test_q10_a_bug_in_a_body_is_logged_and_seen_as_a_broken_stream(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(10)))

        async def break_the_body() -> None:
            await trio.sleep(2.5)
            monkeypatch.setattr("server.serving.Connection.write_now", crash)

        async with world.open_chat() as answer:
            run = world.supervisor.find(answer.run_id)
            assert run is not None
            world.nursery.start_soon(break_the_body)
            with pytest.raises(httpx.TransportError):
                [event async for event in answer]
        assert trio.current_time() == 3
        assert "ZeroDivisionError: a bug" in caplog.text
        await trio.sleep(5.5)
        assert isinstance(run.log.terminal, AgentStopped), "the reader is gone, so the grace has passed"


async def test_q7_a_body_in_many_chunks_that_nobody_reads_blocks_nothing(autojump_clock: MockClock) -> None:
    async with open_world() as world, raw_client(world) as client:
        request = request_bytes("GET", "/nothing", headers=["Transfer-Encoding: chunked"])
        assert (await client.ask(request + chunks(*[b"x"] * 5000) + LAST_CHUNK)).status == 404
        await trio.sleep(20)
        assert lumos_connections(world)[0].server.closed_at is not None
