"""One request and its answer through httpx and the transport: what is sent, emitted, refused, and left open."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

import httpx
import msgspec
import pytest
import trio
from trio.testing import MockClock

from engine.errors import ProviderError
from engine.pieces import FinishPiece, Piece, RequestSentPiece, TextPiece
from engine.provider import Message, ModelRequest
from providers.http import ERROR_BODY_BYTES, VendorRequest, open_client, stream_answer
from providers.openai_chat import ChatDecoder, OpenAIChatProvider
from server.testing.memory_connection import MemoryConnection
from server.testing.memory_network import MemoryNetwork
from tests.harness.raw_vendor import DONE_EVENT, LAST_CHUNK, RawVendor, answer
from tests.harness.vendor import STREAM_HEAD, Act, chunked, text_event

KEY = "sk-secret-0123456789"
URL = "http://vendor/v1/chat/completions"
REQUEST = VendorRequest(URL, {"Authorization": f"Bearer {KEY}"}, b'{"stream":true}')
SENT = RequestSentPiece()
WORD = chunked(text_event("word"))
DONE = chunked(DONE_EVENT) + LAST_CHUNK
STOP = FinishPiece("stop")


class Scene:
    """A client, a model server that follows scripts, and what was emitted, with its time."""

    def __init__(self, network: MemoryNetwork, vendor: RawVendor) -> None:
        self.network = network
        self.vendor = vendor
        self.client = open_client(network.connect)
        self.emitted: list[tuple[float, list[Piece]]] = []

    def emit(self, pieces: Sequence[Piece]) -> None:
        self.emitted.append((trio.current_time(), list(pieces)))

    @property
    def said(self) -> list[Piece]:
        return [piece for _, pieces in self.emitted for piece in pieces]

    async def ask(self, request: VendorRequest = REQUEST) -> None:
        await stream_answer(self.client, request, ChatDecoder(), self.emit)

    async def fail(self, request: VendorRequest = REQUEST) -> ProviderError:
        with pytest.raises(ProviderError) as raised:
            await self.ask(request)
        return raised.value

    @property
    def open(self) -> list[MemoryConnection]:
        return [connection for connection in self.network.connections if connection.client.closed_at is None]


@asynccontextmanager
async def scene(*scripts: Iterable[Act]) -> AsyncIterator[Scene]:
    network, vendor = MemoryNetwork(), RawVendor(*scripts)
    async with trio.open_nursery() as nursery:
        vendor.start(nursery, network.listen("vendor", 80))
        opened = Scene(network, vendor)
        async with opened.client:
            yield opened
        nursery.cancel_scope.cancel()


async def test_all_that_one_read_brings_is_one_call(autojump_clock: MockClock) -> None:
    cut = chunked(text_event("three"))
    script: list[Act] = [
        STREAM_HEAD + WORD,
        1.0,
        WORD + WORD + cut[:9],
        1.0,
        cut[9:],
        1.0,
        chunked(b": alive\n\n"),
        1.0,
        DONE,
    ]
    async with scene(script) as here:
        await here.ask()
        word = TextPiece("word")
        assert here.emitted == [(0, [SENT]), (0, [word]), (1, [word, word]), (2, [TextPiece("three")]), (4, [STOP])]


async def test_what_goes_over_the_wire(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://proxy:3128")
    async with scene() as here:
        await here.ask()
        head, _, body = here.vendor.requests[0].partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        assert lines[0] == "POST /v1/chat/completions HTTP/1.1"
        headers = dict(line.lower().split(": ", 1) for line in lines[1:])
        assert headers["accept-encoding"] == "identity"
        assert headers["authorization"] == f"bearer {KEY}"
        assert headers["content-length"] == str(len(body))
        assert body == REQUEST.content


@pytest.mark.parametrize(
    "content_type",
    ["text/event-stream", "Text/Event-Stream", "text/event-stream;charset=utf-8", "TEXT/EVENT-STREAM ; x=y"],
)
async def test_a_streams_content_type_in_any_form(autojump_clock: MockClock, content_type: str) -> None:
    head = STREAM_HEAD.replace(b"text/event-stream", content_type.encode())
    async with scene([head, WORD, DONE]) as here:
        await here.ask()
        assert here.said == [SENT, TextPiece("word"), STOP]


@pytest.mark.parametrize("content_type", ["application/json", "text/html; charset=utf-8", "text/plain", ""])
async def test_another_content_type_is_no_stream(autojump_clock: MockClock, content_type: str) -> None:
    head = STREAM_HEAD.replace(b"text/event-stream", content_type.encode())
    async with scene([head, WORD, DONE]) as here:
        assert (await here.fail()).code == "upstream.protocol"
        assert here.said == [SENT]


async def test_a_compressed_stream_is_refused_for_what_it_is(autojump_clock: MockClock) -> None:
    head = STREAM_HEAD.replace(b"Transfer", b"Content-Encoding: gzip\r\nTransfer")
    async with scene([head, WORD, DONE]) as here:
        error = await here.fail()
        assert (error.code, here.said) == ("upstream.protocol", [SENT])
        assert "compressed" in str(error)


async def test_what_came_before_an_error_in_the_same_read_is_said(autojump_clock: MockClock) -> None:
    failure = chunked(b'data: {"error":{"type":"overloaded_error","message":"Overloaded"}}\n\n')
    async with scene([STREAM_HEAD, WORD + failure, "hang"]) as here:
        error = await here.fail()
        assert (error.code, here.said, here.open) == ("upstream.overloaded", [SENT, TextPiece("word")], [])


async def test_a_read_that_is_too_large_says_what_it_completed(autojump_clock: MockClock) -> None:
    async with scene([STREAM_HEAD, WORD + WORD + chunked(b"data: " + b"x" * 2_000_000), "hang"]) as here:
        assert (await here.fail()).code == "upstream.protocol"
        assert here.said == [SENT, TextPiece("word"), TextPiece("word")]


async def test_an_error_out_of_emit_passes_and_closes(autojump_clock: MockClock) -> None:
    class EnoughError(Exception):
        pass

    def refuse(pieces: Sequence[Piece]) -> None:
        if pieces != [SENT]:
            raise EnoughError

    async with scene([STREAM_HEAD, WORD, "hang"]) as here:
        with pytest.raises(EnoughError):
            await stream_answer(here.client, REQUEST, ChatDecoder(), refuse)
        assert here.open == []


async def test_without_an_end_mark_the_end_of_the_body_is_the_end(autojump_clock: MockClock) -> None:
    async with scene([STREAM_HEAD, WORD, LAST_CHUNK]) as here:
        decoder = ChatDecoder()
        decoder.may_end = True
        await stream_answer(here.client, REQUEST, decoder, here.emit)
        assert (here.said, len(here.open)) == ([SENT, TextPiece("word")], 1)


NOT_FOUND = b'{"error":{"message":"no such model"}}'


async def test_with_an_end_mark_the_end_of_the_body_alone_is_a_cut(autojump_clock: MockClock) -> None:
    async with scene([STREAM_HEAD + WORD + LAST_CHUNK]) as here:
        assert (await here.fail()).code == "upstream.truncated"
        assert here.said == [SENT, TextPiece("word")]


async def test_an_error_whose_body_was_read_leaves_the_connection_for_reuse(autojump_clock: MockClock) -> None:
    async with scene([answer(NOT_FOUND, status="404 Not Found")]) as here:
        error = await here.fail()
        assert (error.code, str(error)) == (
            "upstream.invalid_request",
            "the model's server answered HTTP 404: no such model",
        )
        await here.ask()
        assert len(here.network.connections) == 1


@pytest.mark.parametrize(
    ("rest", "takes"),
    [(["close"], 0.0), ([0.5, "reset"], 0.5), (["hang"], 2.0), ([1.0, b" "] * 60, 2.0)],
    ids=["closed", "reset", "hanging", "dripping"],
)
async def test_a_status_is_told_also_if_its_body_never_ends(
    autojump_clock: MockClock, rest: list[Act], takes: float
) -> None:
    head = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 900\r\n\r\n"
    async with scene([head + NOT_FOUND, *rest]) as here:
        assert (await here.fail()).code == "upstream.auth"
        assert (trio.current_time(), here.open) == (takes, [])


async def test_a_status_is_told_before_the_deadline_of_the_run(autojump_clock: MockClock) -> None:
    async with scene([b"HTTP/1.1 429 Slow Down\r\nContent-Length: 9\r\nRetry-After: 7\r\n\r\n", "hang"]) as here:
        with trio.fail_after(1):
            error = await here.fail()
        assert (error.code, error.retry_after, trio.current_time()) == ("upstream.rate_limit", 7, 0.5)


async def test_a_huge_error_body_is_not_read_whole(autojump_clock: MockClock) -> None:
    async with scene([answer(b"x" * 10_000_000, status="500 Oops")]) as here:
        assert (await here.fail()).code == "upstream.server"
        [connection] = here.network.connections
        assert connection.client.closed_at == 0
        assert connection.to_client.sent <= ERROR_BODY_BYTES + 3 * here.network.window


async def test_a_redirect_is_not_followed(autojump_clock: MockClock) -> None:
    redirect = answer(b"", "Location: http://elsewhere/", status="307 Temporary Redirect")
    async with scene([redirect]) as here:
        assert (await here.fail()).code == "upstream.invalid_request"
        assert [connection.server.socket.local[0] for connection in here.network.connections] == ["vendor"]


async def test_cookies_are_not_kept(autojump_clock: MockClock) -> None:
    head = STREAM_HEAD.replace(b"Transfer", b"Set-Cookie: __cf_bm=tracker; path=/\r\nTransfer")
    async with scene([head, WORD, DONE]) as here:
        await here.ask()
        await here.ask()
        assert b"cookie" not in here.vendor.requests[1].lower()


@pytest.mark.parametrize(
    "script",
    [
        [f"SSH-2.0-{KEY}\r\n\r\n".encode()],
        [f"HTTP/1.1 200 OK\r\nbad header {KEY}\r\n\r\n".encode()],
        [STREAM_HEAD, f"xyz{KEY}\r\n".encode()],
        [answer(f'{{"error":{{"message":"bad key {KEY}"}}}}'.encode(), status="400 Bad Request")],
        [STREAM_HEAD, chunked(f'data: {{"error":"bad key {KEY}"}}\n\n'.encode())],
        [STREAM_HEAD, chunked(f"data: {KEY}\n\n".encode())],
    ],
    ids=["no HTTP", "bad header", "bad chunk", "error body", "error event", "no JSON"],
)
async def test_no_text_shows_what_the_server_was_told_or_sent(autojump_clock: MockClock, script: list[Act]) -> None:
    async with scene([*script, "hang"]) as here:
        assert KEY not in str(await here.fail())


async def test_the_key_is_removed_also_if_it_looks_like_none(autojump_clock: MockClock) -> None:
    script = [answer(b'{"error":{"message":"plain words is no key"}}', status="400 Bad Request")]
    async with scene(script) as here:
        provider = OpenAIChatProvider(api_key="plain words", base_url="http://vendor/v1", client=here.client)
        with pytest.raises(ProviderError) as raised:
            await provider.stream(ModelRequest((Message("user", "hi"),), "m"), here.emit)
        assert str(raised.value) == "the model's server answered HTTP 400: [removed] is no key"


async def test_a_request_that_is_no_http_is_the_callers_fault_and_not_shown(autojump_clock: MockClock) -> None:
    async with scene() as here:
        error = await here.fail(VendorRequest(URL, {"X-Api-Key": f"{KEY}\nx"}, b""))
        assert error.code == "upstream.invalid_request"
        assert KEY not in str(error)


@pytest.mark.parametrize("url", ["http://[::1/v1", "ftp://vendor/v1", "vendor/v1", "http://h:port/"])
async def test_a_url_that_cannot_be_asked_is_the_callers_fault(autojump_clock: MockClock, url: str) -> None:
    async with scene() as here:
        assert (await here.fail(msgspec.structs.replace(REQUEST, url=url))).code == "upstream.invalid_request"


async def test_after_the_end_mark_the_end_of_the_body_is_waited_for(autojump_clock: MockClock) -> None:
    async with scene([STREAM_HEAD, WORD, chunked(DONE_EVENT), 0.25, LAST_CHUNK]) as here:
        await here.ask()
        assert (trio.current_time(), len(here.open)) == (0.25, 1)
        await here.ask()
        assert len(here.network.connections) == 1


async def test_a_server_that_never_ends_its_body_loses_the_connection_soon(autojump_clock: MockClock) -> None:
    async with scene([STREAM_HEAD, WORD, chunked(DONE_EVENT), "hang"]) as here:
        await here.ask()
        assert (trio.current_time(), here.open) == (0.5, [])


async def test_a_complete_answer_is_never_a_timeout(autojump_clock: MockClock) -> None:
    async with scene([STREAM_HEAD, WORD, 1.0, chunked(DONE_EVENT), "hang"]) as here:
        with trio.fail_after(1.25):
            await here.ask()
        assert (trio.current_time(), here.open) == (1.125, [])


@pytest.mark.parametrize(
    "rest",
    [
        [0.25, WORD, 0.25, LAST_CHUNK],
        [0.25, WORD + LAST_CHUNK],
        [LAST_CHUNK + b"HTTP/1.1 200 OK\r\n\r\n"],
        [0.25, LAST_CHUNK + answer(b"")],
    ],
    ids=["event, end", "event with end", "second response", "second response later"],
)
async def test_a_server_that_goes_on_after_the_end_mark_is_not_asked_again_on_that_connection(
    autojump_clock: MockClock, rest: list[Act]
) -> None:
    async with scene([STREAM_HEAD, WORD, chunked(DONE_EVENT), *rest]) as here:
        await here.ask()
        assert (here.said, here.open) == ([SENT, TextPiece("word"), STOP], [])
        await here.ask()
        assert len(here.network.connections) == 2


async def test_events_after_the_end_mark_in_its_own_read_close_the_connection_too(autojump_clock: MockClock) -> None:
    async with scene([STREAM_HEAD, WORD + chunked(DONE_EVENT) + WORD + LAST_CHUNK]) as here:
        await here.ask()
        assert (here.said, here.open) == ([SENT, TextPiece("word"), STOP], [])


async def test_the_rest_of_the_end_marks_line_is_no_reason_to_close(autojump_clock: MockClock) -> None:
    async with scene([STREAM_HEAD, chunked(b"data: [DONE]\r\n\r"), 0.25, chunked(b"\n") + LAST_CHUNK]) as here:
        await here.ask()
        assert len(here.open) == 1


@pytest.mark.parametrize("at", [0.5, 1.0, 1.5, 2.0, 2.25])
async def test_a_cancelled_request_closes_its_connection_then(autojump_clock: MockClock, at: float) -> None:
    async with scene([1.0, STREAM_HEAD, 0.5, WORD, 0.5, chunked(DONE_EVENT), "hang"]) as here:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(here.ask)
                await trio.sleep(at)
                scope.cancel()
        [connection] = here.network.connections
        assert connection.client.closed_at == at
        await here.ask()
        assert here.said[-2:] == [TextPiece("hello"), STOP]


async def test_the_request_shows_neither_headers_nor_body(autojump_clock: MockClock) -> None:
    assert repr(REQUEST) == f"VendorRequest(url='{URL}', 15 bytes)"


async def test_a_client_made_without_a_network_uses_sockets() -> None:
    async with open_client() as client:
        assert isinstance(client, httpx.AsyncClient)
        with pytest.raises(httpx.ConnectError):
            await client.get("http://127.0.0.1:1/")
