"""Every wire format, every case, over HTTP: from a server of raw bytes, in memory and over a real socket.

In memory the clock is virtual, so that each read, and when it comes, is exact: ``TICK`` is a power of two and adds up
without error. What bytes alone can show is in ``test_conformance.py``.
"""

from __future__ import annotations

import itertools
import logging
import ssl
import traceback
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from engine.errors import ProviderError, ProviderErrorCode
from engine.pieces import Piece, RequestSentPiece
from engine.provider import Message, ModelRequest
from providers.baidu_v1 import BaiduV1Wire
from providers.http import open_client
from providers.network import Connect, TcpConnect
from providers.wire import Endpoint, HttpProvider
from server.testing.memory_network import MemoryNetwork

from .conformance import Outcome, Reading, by_case, by_vendor, decode, is_event_stream, live_frames, meant, strings
from .scripted_network import ServerEnd, chunk, chunked_head
from .sharing import sharing
from .wire_cases import WireCase

TICK = 2**-6
"""Seconds between two writes of the server."""

VENDOR = ("vendor", 80)
KEY = "Zq7.conformance.fQ8vXy2"
"""Unlike a key, so that it is not the filter for what looks like one that keeps it out of a text."""

TEXT = '流式 🌊 \u2028 " \\ é'
REQUEST = ModelRequest((Message("system", "Be brief."), Message("user", TEXT)), "model-1")
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For plain HTTP: the default context takes 23 ms to make."""


# A server, and what a provider makes of it


def stream_head(case: WireCase) -> bytes:
    """The head of an answer that is streamed."""
    kind = "text/event-stream; charset=utf-8" if is_event_stream(case) else "application/x-ndjson"
    return chunked_head(f"Content-Type: {kind}", "X-Unknown: 1")


LAST_CHUNK = chunk(b"")


class FrameVendor:
    """Answers its n-th request by the n-th of ``answers``, and then from the first on again.

    An answer is a sequence of writes: the first at once, each further one ``every`` so many seconds. ``then_close``
    hangs up behind the last.
    """

    def __init__(self, *answers: Sequence[bytes], every: float = TICK, then_close: bool = False) -> None:
        self.connections: list[ServerEnd] = []
        self._answers = itertools.cycle(answers)
        self._every = every
        self._then_close = then_close

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one connection until the client closes it."""
        end = ServerEnd(stream, (*VENDOR, False))
        self.connections.append(end)
        # A client that has gone is no fault here: what a test looks at is the client's side.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await end.request():
                for number, write in enumerate(next(self._answers)):
                    await trio.sleep(self._every if number else 0)
                    await stream.send_all(write)
                if self._then_close:
                    break
        await trio.aclose_forcefully(stream)


def frame_by_frame(case: WireCase, frames: Sequence[bytes] | None = None) -> list[bytes]:
    """The writes of an answer, one a frame: head, chunks, end."""
    return [stream_head(case), *map(chunk, case.frames if frames is None else frames), LAST_CHUNK]


@dataclass
class Heard:
    """What a caller of a provider heard: each call of ``emit`` and when it came, in seconds from the request."""

    emits: list[tuple[float, list[Piece]]] = field(default_factory=list)
    error: ProviderError | None = None
    ended_at: float = 0.0

    def outcome(self) -> Outcome:
        """All of it together, without what says that the request was sent."""
        pieces = [piece for _, pieces in self.emits for piece in pieces]
        assert pieces[:1] == [RequestSentPiece()], "the request first"
        return Outcome(pieces[1:], None if self.error is None else self.error.code)


async def ask(provider: HttpProvider) -> Heard:
    """Ask once, to the end."""
    heard, asked_at = Heard(), trio.current_time()

    def emit(pieces: Sequence[Piece]) -> None:
        heard.emits.append((trio.current_time() - asked_at, list(pieces)))

    try:
        await provider.stream(REQUEST, emit)
    except ProviderError as error:
        heard.error = error
    heard.ended_at = trio.current_time() - asked_at
    return heard


@asynccontextmanager
async def open_provider(
    case: WireCase, connect: Connect, base_url: str = "http://vendor/v1", api_key: str | None = KEY
) -> AsyncIterator[HttpProvider]:
    """A provider of the case's wire format, with a client that is closed after the block."""
    async with open_client(connect) as client:
        yield HttpProvider("vendor", case.wire, Endpoint(base_url, api_key, {"X-Extra": "yes"}), client)


@asynccontextmanager
async def in_memory(case: WireCase, vendor: FrameVendor) -> AsyncIterator[tuple[HttpProvider, MemoryNetwork]]:
    """A provider whose server is ``vendor``, joined in memory; afterwards nothing may be open."""
    network = MemoryNetwork()
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, vendor.serve, [network.listen(*VENDOR)])
        async with open_provider(case, network.connect) as provider:
            yield provider, network
        assert all(connection.client.closed_at is not None for connection in network.connections)
        nursery.cancel_scope.cancel()


def emits_by_frame(case: WireCase) -> list[tuple[float, list[Piece]]]:
    """The calls of ``emit`` if each frame is one read, a tick apart."""
    reading, emits = Reading(case), [(0.0, list[Piece]([RequestSentPiece()]))]
    for number, frame in enumerate(case.frames, 1):
        before = len(reading.pieces)
        reading.feed(frame)
        if pieces := reading.pieces[before:]:
            emits.append((number * TICK, pieces))
    return emits


# Answers


@by_case
async def test_each_read_is_one_emit_at_its_time_and_the_connection_is_used_again(
    case: WireCase, autojump_clock: MockClock
) -> None:
    live = len(live_frames(case))
    async with in_memory(case, FrameVendor(frame_by_frame(case))) as (provider, network):
        for count in (1, 2):
            heard = await ask(provider)
            assert heard.emits == emits_by_frame(case)
            assert heard.outcome() == meant(case)
            assert heard.ended_at == (live + (not fails_in_stream(case))) * TICK, "read on to the end of the body"
            if is_reusable(case):
                assert len(network.connections) == 1
            else:
                assert len(network.connections) == count
                assert network.connections[-1].client.closed_at == trio.current_time(), "closed at once"


def fails_in_stream(case: WireCase) -> bool:
    """Whether what the server says ends the answer in an error; a body that ends too early does so at its end."""
    return case.error not in (None, "upstream.truncated")


def is_reusable(case: WireCase) -> bool:
    """Whether the answer leaves its connection fit for another: all of it was read."""
    return not fails_in_stream(case) and len(live_frames(case)) == len(case.frames)


@by_case
async def test_all_in_one_read_is_one_emit_and_reads_that_know_no_frames_change_nothing(
    case: WireCase, autojump_clock: MockClock
) -> None:
    """The second answer is cut in its frames and characters: chunks of 139 bytes, written 97 bytes at a time."""
    body, head = b"".join(case.frames), stream_head(case)
    all_in_one = [head, b"".join([*map(chunk, case.frames), LAST_CHUNK])]
    anyhow = portions(b"".join([head, *map(chunk, portions(body, 139)), LAST_CHUNK]), 97)
    async with in_memory(case, FrameVendor(all_in_one, anyhow)) as (provider, _):
        heard = await ask(provider)
        assert heard.outcome() == meant(case)
        assert heard.emits[1:] == ([(TICK, list(case.pieces))] if case.pieces else [])
        assert (await ask(provider)).outcome() == meant(case)


def portions(data: bytes, size: int) -> list[bytes]:
    """The data in portions of this size."""
    return [data[start : start + size] for start in range(0, len(data), size)]


@by_vendor
async def test_two_answers_at_once_do_not_mix(case: WireCase, autojump_clock: MockClock) -> None:
    outcomes: list[Outcome] = []

    async def ask_after(seconds: float, provider: HttpProvider) -> None:
        await trio.sleep(seconds)
        outcomes.append((await ask(provider)).outcome())

    async with in_memory(case, FrameVendor(frame_by_frame(case))) as (provider, network):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_after, 0, provider)
            nursery.start_soon(ask_after, TICK / 2, provider)
        assert len(network.connections) == 2
    assert outcomes == [meant(case)] * 2


def longest_cut_off(case: WireCase) -> Sequence[bytes]:
    """As many of the frames as may come without the answer being whole or failed."""
    live = live_frames(case)
    cut_off = [live[:count] for count in range(len(live)) if decode(case, live[:count]).error == "upstream.truncated"]
    return cut_off[-1]


@by_vendor
async def test_an_end_before_the_end_mark_is_truncated(case: WireCase, autojump_clock: MockClock) -> None:
    """The body ends as HTTP wants it, too early: nothing but the vendor's mark tells."""
    frames = longest_cut_off(case)
    async with in_memory(case, FrameVendor(frame_by_frame(case, frames))) as (provider, _):
        outcome = (await ask(provider)).outcome()
    assert outcome == decode(case, frames)
    assert outcome.error == "upstream.truncated"


@by_vendor
async def test_a_server_that_hangs_up_is_an_error(case: WireCase, autojump_clock: MockClock) -> None:
    frames = longest_cut_off(case)
    vendor = FrameVendor(frame_by_frame(case, frames)[:-1], then_close=True)
    async with in_memory(case, vendor) as (provider, _):
        outcome = (await ask(provider)).outcome()
    assert outcome.pieces == decode(case, frames).pieces
    assert outcome.error in ("upstream.truncated", "upstream.protocol", "upstream.connection")


@by_vendor
async def test_a_caller_that_leaves_takes_the_connection_along(case: WireCase, autojump_clock: MockClock) -> None:
    vendor = FrameVendor([stream_head(case), chunk(b"\n")], every=60.0)
    async with in_memory(case, vendor) as (provider, network):
        for leaves_after in (1.0, 61.0, 1000.0):
            with trio.move_on_after(leaves_after) as scope:
                await ask(provider)
            assert scope.cancelled_caught
            assert network.connections[-1].client.closed_at == trio.current_time()


@by_case
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
async def test_the_same_over_a_real_socket(case: WireCase, *, shared: bool) -> None:
    vendor = FrameVendor(frame_by_frame(case), every=0.0)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, vendor.serve, listeners)
        async with (
            sharing() if shared else nullcontext(),
            open_provider(case, TcpConnect(NO_TLS), f"http://127.0.0.1:{port}/v1") as provider,
        ):
            for _ in range(2):
                heard = await ask(provider)
                assert heard.outcome() == meant(case)
                assert all(pieces for _, pieces in heard.emits)
        assert len(vendor.connections) == (1 if is_reusable(case) else 2)
        nursery.cancel_scope.cancel()


# Requests


async def request_of(case: WireCase, api_key: str | None) -> tuple[str, dict[str, str], bytes]:
    """Target, headers and body of what the server got; h11 has checked that they are HTTP."""
    vendor = FrameVendor(frame_by_frame(case))
    async with in_memory(case, vendor) as (_, network), open_provider(case, network.connect, api_key=api_key) as asked:
        await ask(asked)
    request = vendor.connections[0].requests[0]
    head = request.head
    assert (head.method, head.http_version) == (b"POST", b"1.1")
    headers = {name.decode(): value.decode("utf-8") for name, value in head.headers}
    assert len(headers) == len(head.headers), "a header twice"
    return head.target.decode("ascii"), headers, request.body


@by_vendor
async def test_the_request_is_plain_json_and_says_what_was_asked(case: WireCase, autojump_clock: MockClock) -> None:
    target, headers, body = await request_of(case, KEY)
    assert target.startswith("/v1/")
    assert headers["host"] == "vendor"
    assert headers["content-length"] == str(len(body))
    assert headers["content-type"] == "application/json"
    assert headers["accept-encoding"] == "identity", "compression would hold tokens back"
    assert headers["x-extra"] == "yes"
    said: Any = msgspec.json.decode(body)
    assert isinstance(said, dict)
    assert TEXT in set(strings(said))


@by_vendor
async def test_the_key_is_in_one_place_and_nowhere_else(
    case: WireCase, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    target, headers, body = await request_of(case, KEY)
    without = await request_of(case, None)
    assert caplog.records, "httpx logs requests"
    assert KEY not in caplog.text
    assert KEY.encode() not in body
    with_key = [name for name, value in headers.items() if KEY in value]
    if isinstance(case.wire, KEY_IN_URL):
        assert not with_key
        assert target.endswith(f"?access_token={KEY}")
        assert without[1:] == (headers, body)
    else:
        assert KEY not in target
        assert len(with_key) == 1
        assert without == (target, {name: value for name, value in headers.items() if name not in with_key}, body)


KEY_IN_URL = (BaiduV1Wire,)
"""Baidu's first API takes its token from the query and nowhere else (wire-formats.md, section 2g)."""


# Answers that are no stream


def plain_answer(status: str, body: bytes, *headers: str) -> bytes:
    """A whole answer that is no stream."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


QUOTING = msgspec.json.encode(
    {"error": {"message": f"Incorrect API key provided: {KEY}.", "type": "invalid_request_error", "code": "x"}}
)
NO_STREAM: dict[str, tuple[bytes, ProviderErrorCode, float | None]] = {
    "401": (plain_answer("401 Unauthorized", QUOTING), "upstream.auth", None),
    "403": (plain_answer("403 Forbidden", b""), "upstream.auth", None),
    "429": (plain_answer("429 Too Many Requests", b"{}", "Retry-After: 7"), "upstream.rate_limit", 7.0),
    "500": (plain_answer("500 Internal Server Error", b"<html>" + KEY.encode()), "upstream.server", None),
    "503 quoting the key": (plain_answer("503 Service Unavailable", QUOTING), "upstream.overloaded", None),
    "302": (plain_answer("302 Found", b"", "Location: http://elsewhere/"), "upstream.invalid_request", None),
    "200 that is a page": (
        plain_answer("200 OK", b"<html>login").replace(b"application/json", b"text/html"),
        "upstream.protocol",
        None,
    ),
}


@pytest.mark.parametrize(("answer", "code", "retry_after"), NO_STREAM.values(), ids=NO_STREAM.keys())
@by_vendor
async def test_what_is_no_stream_is_an_error_without_the_key(
    case: WireCase, answer: bytes, code: ProviderErrorCode, retry_after: float | None, autojump_clock: MockClock
) -> None:
    async with in_memory(case, FrameVendor([answer])) as (provider, network):
        heard = await ask(provider)
        assert len(network.connections) == 1, "a key must not follow a redirect"
        assert KEY not in repr(provider)
    assert heard.outcome() == Outcome([], code)
    assert heard.error is not None
    assert heard.error.retry_after == retry_after
    assert KEY not in "".join(traceback.format_exception(heard.error))
