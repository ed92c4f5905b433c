"""What a WebSocket's other side may be: a page from elsewhere, a client without a key, silent, loud, or hostile."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest
import structlog
import trio
from trio.testing import MockClock
from wsproto.extensions import PerMessageDeflate
from wsproto.utilities import LocalProtocolError

from server.app import create_app
from server.doorkeeper import LINGER_SECONDS
from server.guard import RequestGuard
from server.services import Services
from server.serving import serve
from server.socket_session import BURST_MESSAGES, BYTES_OF_A_MESSAGE, MESSAGES_PER_SECOND, Allowance
from server.websocket_protocol import MAX_MESSAGE_BYTES, PING_SECONDS, SILENCE_SECONDS
from tests.engine.scripted import FOREVER, SENT, ScriptedProvider, text
from tests.harness.websocket_client import (
    SOCKET_PATH,
    SUBPROTOCOL,
    RefusedError,
    WebSocketClient,
    open_socket,
)
from tests.harness.world import World, open_keeping_world, open_world
from tests.server.raw_http import raw_client, request_bytes

PONG = {"type": "pong"}


async def refused(world: World, **handshake: Any) -> RefusedError:
    """How the server answers this handshake."""
    with pytest.raises(RefusedError) as error:
        async with open_socket(world, **handshake):
            pass
    return error.value


# The handshake


@pytest.mark.parametrize("offered", [(), ("lumos.v2",), ("LUMOS.V1",), ("lumos.key.x",)], ids=str)
async def test_without_the_subprotocol_there_is_no_socket(offered: tuple[str, ...], autojump_clock: MockClock) -> None:
    async with open_world() as world:
        answer = await refused(world, subprotocols=offered)
        assert (answer.status, answer.json()["code"]) == (400, "SUBPROTOCOL_REQUIRED")


async def test_only_the_protocol_is_echoed(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world, subprotocols=("x", SUBPROTOCOL, "lumos.key.y")) as socket:
        assert socket.subprotocol == SUBPROTOCOL


async def test_the_key_comes_in_a_header_or_as_a_subprotocol_and_never_in_the_address(
    autojump_clock: MockClock,
) -> None:
    async with open_keeping_world() as world:
        headers = await world.add_key("acme", "ada")
        text_of_key = headers["Authorization"].removeprefix("Bearer ")
        offered = (SUBPROTOCOL, f"lumos.key.{text_of_key}")
        for handshake in (
            {"headers": headers},
            {"headers": {"X-API-Key": text_of_key}},
            {"subprotocols": offered},
            {"subprotocols": offered, "headers": headers},
        ):
            async with open_socket(world, **handshake) as socket:
                assert socket.subprotocol == SUBPROTOCOL
                assert await socket.ask("ping") == PONG
        assert (await refused(world)).status == 401
        assert (await refused(world, subprotocols=(SUBPROTOCOL, "lumos.key.nonsense"))).status == 401
        answer = await refused(world, path=f"{SOCKET_PATH}?key={text_of_key}")
        assert (answer.status, text_of_key in answer.body.decode()) == (422, False)
        other = await world.add_key("acme", "bob")
        answer = await refused(world, subprotocols=offered, headers=other)
        assert (answer.status, answer.json()["code"]) == (400, "AMBIGUOUS_KEY")


async def guarded_world(world: World, *, keyed: bool) -> None:
    """Serve another Lumos, at ``guarded``, which checks Host and Origin as ``lumos serve`` does."""

    async def is_keyed() -> bool:
        return keyed

    services = Services(world.agents, world.supervisor, guard=RequestGuard(is_keyed))
    await world.nursery.start(serve, create_app(services), [world.network.listen("guarded", 80)], world.stopping)


DOORS: dict[str, tuple[str, dict[str, str], int]] = {
    "this machine": ("localhost", {}, 101),
    "by its address": ("127.0.0.1:8080", {}, 101),
    "its own page": ("localhost:8080", {"Origin": "http://localhost:8080"}, 101),
    "another page": ("localhost:8080", {"Origin": "https://evil.example"}, 403),
    "a page of another port": ("localhost:8080", {"Origin": "http://localhost:3000"}, 403),
    "a page without an origin": ("localhost:8080", {"Origin": "null"}, 403),
    "another site": ("localhost:8080", {"Sec-Fetch-Site": "cross-site"}, 403),
    "a rebound name": ("evil.example", {"Origin": "http://evil.example"}, 421),
}


@pytest.mark.parametrize("keyed", [False, True], ids=["without keys", "with keys"])
@pytest.mark.parametrize("door", DOORS)
async def test_a_page_from_elsewhere_opens_no_socket_to_a_server_without_keys(
    door: str, keyed: bool, autojump_clock: MockClock
) -> None:
    host, headers, status = DOORS[door]
    async with open_world() as world:
        await guarded_world(world, keyed=keyed)
        socket = WebSocketClient(await world.network.connect("guarded", 80))
        async with socket.stream:
            if status == 101 or keyed:
                await socket.shake_hands(host=host, headers=headers)
            else:
                with pytest.raises(RefusedError) as error:
                    await socket.shake_hands(host=host, headers=headers)
                assert error.value.status == status


async def test_compression_is_declined(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world, extensions=[PerMessageDeflate()]) as socket:
        assert socket.extensions == []
        assert await socket.ask("ping") == PONG


async def test_a_plain_request_for_the_socket_is_refused(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        assert (await world.client.get(f"http://lumos{SOCKET_PATH}")).status_code == 400
        assert (await refused(world, path="/api/v1/nothing")).status == 404


# What makes no sense


NONSENSE: dict[str, tuple[str, str]] = {
    "nothing": ("", "INVALID_JSON"),
    "no JSON": ("{", "INVALID_JSON"),
    "words": ("hello", "INVALID_JSON"),
    "an array": ("[]", "VALIDATION_ERROR"),
    "null": ("null", "VALIDATION_ERROR"),
    "no type": ("{}", "VALIDATION_ERROR"),
    "an unknown type": ('{"type":"dance"}', "VALIDATION_ERROR"),
    "a type that is none": ('{"type":7}', "VALIDATION_ERROR"),
    "what the server says": ('{"type":"pong"}', "VALIDATION_ERROR"),
    "an unknown field": ('{"type":"ping","colour":"red"}', "VALIDATION_ERROR"),
    "no run": ('{"type":"stop"}', "VALIDATION_ERROR"),
    "a run that cannot be": ('{"type":"stop","run_id":"a b"}', "VALIDATION_ERROR"),
    "a number below": ('{"type":"subscribe","run_id":"a","after":-1}', "VALIDATION_ERROR"),
    "a number that is none": ('{"type":"subscribe","run_id":"a","after":"1"}', "VALIDATION_ERROR"),
    "deep": ('{"type":"ping","data":' + "[" * 100_000 + "]" * 100_000 + "}", ""),
    "deep metadata": (
        '{"type":"start","request_id":"r","agent_id":"a","message":"m","metadata":{"a":' + "[" * 100 + "]" * 100 + "}}",
        "INVALID_JSON",
    ),
    "a start without a name": ('{"type":"start","agent_id":"a","message":"m"}', "VALIDATION_ERROR"),
}


@pytest.mark.parametrize("said", NONSENSE)
async def test_nonsense_is_answered_and_the_socket_stays(said: str, autojump_clock: MockClock) -> None:
    message, code = NONSENSE[said]
    async with open_world() as world, open_socket(world) as socket:
        await socket.say_text(message)
        answer = await socket.hear()
        assert answer["type"] == "error"
        assert answer["code"] in {code or "INVALID_JSON", code or "VALIDATION_ERROR"}
        assert await socket.ask("ping") == PONG


@pytest.mark.parametrize("data", [b"", b"x", b'{"type":"ping"}'])
async def test_h10_a_binary_message_is_answered_too(data: bytes, autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        await socket.say_bytes(data)
        assert (await socket.hear())["code"] == "INVALID_JSON"
        assert await socket.ask("ping") == PONG


async def test_the_answer_names_what_it_is_about(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        answer = await socket.ask("start", request_id="mine", agent_id=7)
        assert (answer["code"], answer["request_id"], "run_id" in answer) == ("VALIDATION_ERROR", "mine", False)
        answer = await socket.ask("subscribe", run_id="one", after="x")
        assert (answer["code"], answer["run_id"], "request_id" in answer) == ("VALIDATION_ERROR", "one", False)


# Too much


@pytest.mark.parametrize("letter", ["x", "é"])
async def test_a_message_that_is_too_large_ends_the_socket(letter: str, autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        fits = '{"type":"ping","colour":"' + "x" * (MAX_MESSAGE_BYTES - 27) + '"}'
        assert len(fits) == MAX_MESSAGE_BYTES
        await socket.say_text(fits)
        assert (await socket.hear())["code"] == "VALIDATION_ERROR"
        await trio.sleep(10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_say_quietly, socket, letter * (MAX_MESSAGE_BYTES // len(letter.encode()) + 1))
            closed = await socket.wait_closed()
        assert closed.code == 1009


async def _say_quietly(socket: WebSocketClient, message: str) -> None:
    with suppress(trio.BrokenResourceError, LocalProtocolError):  # closed by then
        await socket.say_text(message)


async def test_a_message_without_an_end_is_cut_off(autojump_clock: MockClock) -> None:
    """Fragments for ever: no more is taken than a message may have."""
    async with open_world() as world, open_socket(world) as socket:
        fragment = bytes([0x00, 0xFE]) + (60_000).to_bytes(2, "big") + bytes(4) + b"x" * 60_000

        async def send_for_ever() -> None:
            await socket.stream.send_all(bytes([0x01]) + fragment[1:])
            while True:
                await socket.stream.send_all(fragment)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_for_ever)
            assert (await socket.wait_closed()).code == 1009
            nursery.cancel_scope.cancel()
        assert socket.stream.connection.to_server.sent < 2 * MAX_MESSAGE_BYTES


async def test_who_says_too_much_is_cut_off(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        for _ in range(BURST_MESSAGES):
            await socket.say("ping")
        for _ in range(BURST_MESSAGES):
            assert await socket.hear() == PONG
        await trio.sleep(1)
        for _ in range(MESSAGES_PER_SECOND + 1):
            await socket.say("ping")
        closed = await socket.wait_closed()
        assert (closed.code, closed.reason) == (1008, "too many messages")
        assert len(socket.heard) == BURST_MESSAGES + MESSAGES_PER_SECOND


async def test_an_allowance_is_so_much_a_second_and_a_burst(autojump_clock: MockClock) -> None:
    allowance = Allowance(8, 16)
    assert [allowance.take() for _ in range(16)] == [True] * 16
    await trio.sleep(1)
    assert allowance.take(8)
    assert not allowance.take()


async def test_a_long_message_counts_as_several(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        each = '{"type":"ping","colour":"' + "x" * (10 * BYTES_OF_A_MESSAGE) + '"}'
        heard = 0
        async with trio.open_nursery() as nursery:

            async def flood() -> None:
                for _ in range(BURST_MESSAGES):
                    await _say_quietly(socket, each)

            nursery.start_soon(flood)
            closed = await socket.wait_closed()
            nursery.cancel_scope.cancel()
        heard = len(socket.heard)
        assert closed.code == 1008
        assert heard == BURST_MESSAGES // 11


# Bytes


FRAMES: dict[str, bytes] = {
    "no mask": b"\x81\x02hi",
    "reserved bits": b"\xf1\x82\0\0\0\0hi",
    "an unknown kind": b"\x83\x80\0\0\0\0",
    "a long ping": b"\x89\xfe\x01\x00\0\0\0\0" + bytes(256),
    "a ping in two": b"\x09\x80\0\0\0\0",
    "text that is no UTF-8": b"\x81\x81\0\0\0\0\xff",
    "a continuation of nothing": b"\x80\x80\0\0\0\0",
    "a length of 2^63": b"\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0",
    "a close of one byte": b"\x88\x81\0\0\0\0x",
    "a close with a bad code": b"\x88\x82\0\0\0\0\0\1",
    "a close twice": b"\x88\x80\0\0\0\0" * 2,
    "a close, then text": b"\x88\x80\0\0\0\0\x81\x82\0\0\0\0hi",
    "garbage": random.Random(3).randbytes(3000),
    "HTTP": request_bytes("GET", "/health/live"),
}


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
async def test_h1_bytes_that_are_no_frames_end_their_own_socket(frames: bytes, autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as bystander:
        world.add_agent("a", ScriptedProvider((0, (SENT,)), (1, text("x")), (FOREVER, ())))
        async with open_socket(world) as socket:
            await socket.say("start", request_id="r", agent_id="a", message="hi", on_disconnect="cancel")
            await socket.hear_until("event", seq=2)
            with structlog.testing.capture_logs() as logs:
                await socket.stream.send_all(frames)
                closed, closed_at = await socket.wait_closed(), trio.current_time()
                await trio.sleep(LINGER_SECONDS + 1)
            assert logs == []
            assert closed.code in ({1005} if frames.startswith(b"\x88\x80") else {1002, 1007})
            assert socket.stream.connection.server.closed_at == closed_at + LINGER_SECONDS, (
                "unread bytes would reset it"
            )
        assert world.supervisor.active_runs == 0
        assert await bystander.ask("ping") == PONG


def handshake_bytes(*headers: str) -> bytes:
    """A handshake that is right but for what the headers say."""
    usual = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
    key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
    return request_bytes("GET", SOCKET_PATH, headers=[*usual, key, *headers])


@pytest.mark.parametrize(
    ("handshake", "status"),
    [
        (handshake_bytes("Sec-WebSocket-Protocol: lumos.v1", "Sec-WebSocket-Extensions: \xff"), 101),
        (handshake_bytes("Sec-WebSocket-Protocol: \xff"), 400),
        (handshake_bytes("Sec-WebSocket-Protocol: lumos.v1, \xff"), 400),
        (handshake_bytes("Sec-WebSocket-Protocol: lumos.v1").replace(b"Version: 13", b"Version: 8"), 400),
        (handshake_bytes("Sec-WebSocket-Protocol: lumos.v1").replace(b"Connection: Upgrade", b"Connection: \xff"), 400),
    ],
)
async def test_h1_a_hostile_handshake_is_answered(handshake: bytes, status: int, autojump_clock: MockClock) -> None:
    async with open_world() as world, raw_client(world) as client:
        with structlog.testing.capture_logs() as logs:
            await client.stream.send_all(handshake)
            head = await client.read_head()
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert b"sec-websocket-extensions" not in head.lower()
        assert logs == []


@pytest.mark.parametrize("seed", range(10))
async def test_h1_whatever_is_sent_no_other_socket_notices(seed: int, autojump_clock: MockClock) -> None:
    dice = random.Random(seed)
    async with open_world(window=dice.choice([500, 65_536])) as world, open_socket(world) as bystander:
        world.add_agent("a", ScriptedProvider((0, (SENT,)), (0.5, text("x" * 300)), (FOREVER, ())))
        with structlog.testing.capture_logs() as logs:
            for _ in range(20):
                with trio.move_on_after(dice.uniform(0, 30)):
                    async with open_socket(world) as socket:
                        await socket.say("start", request_id="r", agent_id="a", message="hi", on_disconnect="cancel")
                        for _ in range(dice.randrange(1, 5)):
                            await socket.stream.send_all(_mangled(dice))
                            await trio.sleep(dice.choice([0, 0.1]))
                        await socket.wait_closed()
        assert logs == []
        await trio.sleep(30)
        assert world.supervisor.active_runs == 0
        assert await bystander.ask("ping") == PONG


def _mangled(dice: random.Random) -> bytes:
    data = bytearray(b"".join(dice.choices(list(FRAMES.values()), k=2)))
    for _ in range(dice.randrange(4)):
        data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data)


# Silence


async def test_a_socket_that_answers_pings_stays(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        with trio.move_on_after(310):
            await socket.hear()
        assert socket.pings == [PING_SECONDS * n for n in range(1, 16)]
        await socket.ping()
        assert await socket.hear() == "pong"


async def test_a_socket_that_answers_nothing_is_dropped(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        model = ScriptedProvider((0, (SENT,)), (1, text("x")), (FOREVER, ()))
        world.add_agent("a", model)
        async with open_socket(world) as socket:
            socket.answers_pings = False
            await trio.sleep(7)
            fields = {"on_disconnect": "cancel", "deadlines": {"idle": 30}}
            await socket.say("start", request_id="r", agent_id="a", message="hi", **fields)
            said_at = trio.current_time()
            closed = await socket.wait_closed()
            assert closed.code is None
            assert trio.current_time() == said_at + SILENCE_SECONDS
            assert socket.pings == [20, 40, 60]


async def test_no_ping_is_sent_before_the_socket_is_open(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        headers = await world.add_key("acme", "ada")
        async with open_socket(world, headers=headers) as socket:
            with trio.move_on_after(25):
                await socket.hear()
            assert socket.pings == [PING_SECONDS]


async def test_a_bug_ends_its_socket_and_says_so(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    async with open_world() as world, open_socket(world) as socket, open_socket(world) as bystander:
        monkeypatch.setattr("server.socket_session.parse", crash)
        with structlog.testing.capture_logs() as logs:
            await socket.say("ping")
            assert (await socket.wait_closed()).code == 1011
        monkeypatch.undo()
        assert [line["event"] for line in logs] == ["socket.crashed"]
        assert await bystander.ask("ping") == PONG
