"""Simulated clients that do not mean well: bytes that are no request, requests that never end, and more."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeAlias

import trio

from .asking import Asker
from .http_client import request_bytes
from .observations import Ending, Response

HOSTILE_SECONDS = 60.0
"""A server that still holds the connection then may keep it for all the client cares."""

KEPT_BYTES = 4096

Act: TypeAlias = bytes | float
"""Bytes to send, or seconds to wait."""

_CHAT = "/api/v1/agents/agent0/chat/lumosai/stream"
_TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(32)) * 8
_BODIES = (b"", b"[]", b"{", b'{"message": NaN}', b'{"message": "a", "message": "b"}', b"\xff\xfe", b"[" * 5000)


def attack(number: int) -> Iterable[Act]:
    """What the hostile client of that number sends; the same for the same number."""
    draw = random.Random(number)
    attacks = (_garbage, _half_a_request, _huge_head, _slow_body, _slow_head, _odd_body, _odd_request, _many_at_once)
    return attacks[number % len(attacks)](draw)


def _garbage(draw: random.Random) -> Iterator[Act]:
    yield draw.choice(
        [draw.randbytes(draw.randint(1, 3000)), _TLS_HELLO, b"\r\n" * 500, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    )


def _half_a_request(draw: random.Random) -> Iterator[Act]:
    whole = request_bytes("POST", _CHAT, {}, b'{"message": "hi"}')
    yield whole[: draw.randint(1, len(whole) - 1)]


def _huge_head(draw: random.Random) -> Iterator[Act]:
    yield request_bytes("GET", "/api/v1/agents", {"X-Huge": "x" * draw.randint(20_000, 200_000)})


def _slow_body(_: random.Random) -> Iterator[Act]:
    yield f"POST {_CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    yield b"Content-Length: 1000\r\n\r\n"
    yield from itertools.chain.from_iterable((1.0, b"x") for _ in range(1000))


def _slow_head(_: random.Random) -> Iterator[Act]:
    for byte in request_bytes("GET", "/api/v1/agents", {}):
        yield bytes([byte])
        yield 1.0


def _odd_body(draw: random.Random) -> Iterator[Act]:
    yield request_bytes("POST", _CHAT, {}, draw.choice(_BODIES) or b" ")


def _odd_request(draw: random.Random) -> Iterator[Act]:
    yield draw.choice(
        [
            request_bytes("HEAD", "/api/v1/agents", {}),
            request_bytes("DELETE", _CHAT, {}),
            request_bytes("POST", _CHAT, {"Transfer-Encoding": "chunked"}) + b"zz\r\n",
            request_bytes("GET", "/api/v1/runs/../../etc/passwd", {}),
            request_bytes("GET", "/api/v1/agents", {"Host": "evil.example"}),
            request_bytes("GET", "/api/v1/agents", {}).replace(b"HTTP/1.1", b"HTTP/1.0"),
            request_bytes("GET", "/api/v1/ws", {"Upgrade": "websocket", "Connection": "Upgrade"}),
        ]
    )


def _many_at_once(draw: random.Random) -> Iterator[Act]:
    yield request_bytes("GET", "/health/live", {}) * draw.randint(2, 50)


async def attack_worker(asker: Asker) -> None:
    """Do what the client's number says, and read what comes, for ``HOSTILE_SECONDS`` at most."""
    worker = asker.plan.worker % asker.world.plan.workers
    response = asker.response("hostile", worker)
    asker.note("attacks", worker=worker)
    stream = await asker.connect(worker, asker.plan.window)
    ending: Ending = "broken"
    if stream is not None:
        with trio.move_on_after(HOSTILE_SECONDS) as limit:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_send, stream, attack(asker.number))
                await _listen(asker, stream, response)
                nursery.cancel_scope.cancel(reason="the server has closed")
        ending = "left" if limit.cancelled_caught else "broken"
        stream.close()
    if response.body.startswith(b"HTTP/1.1 ") and response.body[9:12].isdigit():
        response.status = int(response.body[9:12])
    response.ending, response.ended_at = ending, trio.current_time()
    asker.note("attacked", status=response.status, ending=ending)


async def _listen(asker: Asker, stream: trio.abc.ReceiveStream, response: Response) -> None:
    with suppress(trio.BrokenResourceError):
        while data := await stream.receive_some(asker.plan.read_bytes):
            response.body = (response.body + data)[:KEPT_BYTES]


async def _send(stream: trio.abc.SendStream, acts: Iterable[Act]) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        for act in acts:
            if isinstance(act, bytes):
                await stream.send_all(act)
            else:
                await trio.sleep(act)
