"""Response bodies: framing, one chunk a read, broken upstreams, draining, and leaving in the middle."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import h11
import httpx
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from providers.transport import TrioTransport

from .scripted_network import (
    URL,
    ScriptedNetwork,
    ServerEnd,
    answering,
    body_of,
    chunk,
    chunked_head,
    receive_all,
    saying,
    with_length,
)

HEAD = chunked_head()
DELIMITED_BY_CLOSE = b"HTTP/1.1 200 OK\r\n\r\n"


@asynccontextmanager
async def get(network: ScriptedNetwork, transport: TrioTransport | None = None) -> AsyncIterator[httpx.Response]:
    transport = transport or TrioTransport(network)
    async with (
        httpx.AsyncClient(transport=transport, timeout=None, trust_env=False) as client,
        client.stream("GET", URL) as response,
    ):
        yield response


async def test_all_that_one_read_brings_is_one_chunk(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    reads = [HEAD + chunk(b"a") + chunk(b"b"), chunk(b"c") + chunk(b"d") + chunk(b"e")[:-1], b"\n" + chunk(b"f")]
    async with get(ScriptedNetwork(nursery, saying(*reads, chunk(b"")))) as response:
        assert await receive_all(response) == [b"ab", b"cde", b"f"]
    async with get(ScriptedNetwork(nursery, saying(*reads, chunk(b"")))) as response:
        assert [data async for data in response.aiter_raw()] == [b"ab", b"cde", b"f"]


async def test_chunks_come_at_the_instant_they_arrive(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async with get(ScriptedNetwork(nursery, saying(HEAD, chunk(b"a"), chunk(b"b"), chunk(b"")))) as response:
        arrivals = [(trio.current_time(), data) async for data in body_of(response)]
    assert (arrivals, trio.current_time()) == ([(1.0, b"a"), (2.0, b"b")], 3.0)


async def test_a_long_body_comes_in_reads_of_64_kib(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async with get(ScriptedNetwork(nursery, answering(with_length(b"x" * 1_000_000)))) as response:
        chunks = await receive_all(response)
    assert sum(map(len, chunks)) == 1_000_000
    assert max(map(len, chunks)) == 65_536


WHOLE = {
    "content-length": with_length(b"data: 1\n\n"),
    "chunked": HEAD + chunk(b"data: ") + chunk(b"1\n\n") + chunk(b""),
    "chunked with extensions and trailers": HEAD
    + b"6;a=b\r\ndata: \r\n3\r\n1\n\n\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n",
    "lines ended by LF": b"HTTP/1.1 200 OK\nContent-Length: 9\n\ndata: 1\n\n",
    "interim responses": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    + with_length(b"data: 1\n\n"),
}


@pytest.mark.parametrize("split", ["whole", "by byte"])
@pytest.mark.parametrize("answer", WHOLE.values(), ids=WHOLE)
async def test_framings_split_anywhere(
    nursery: trio.Nursery, autojump_clock: MockClock, answer: bytes, split: str
) -> None:
    parts = [answer] if split == "whole" else [bytes([byte]) for byte in answer]
    network = ScriptedNetwork(nursery, saying(*parts))
    transport = TrioTransport(network)
    async with get(network, transport) as response:
        assert b"".join(await receive_all(response)) == b"data: 1\n\n"
        await response.aclose()
        assert transport.idle_connections == 1


async def test_a_body_may_be_delimited_by_close(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, saying(DELIMITED_BY_CLOSE, b"data: ", b"1\n\n", then_close=True))
    transport = TrioTransport(network)
    async with get(network, transport) as response:
        assert await receive_all(response) == [b"data: ", b"1\n\n"]
        await response.aclose()
        assert (network.open, transport.idle_connections) == (0, 0)


# X10: what was said before the fault, and the parts of the answer, after which the server closes.
CUT: dict[str, tuple[list[bytes], list[bytes]]] = {
    "no bytes": ([], []),
    "mid head": ([], [HEAD[:20]]),
    "mid first word of the head": ([], [HEAD[:3]]),
    "mid interim head": ([], [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 2"]),
    "between head and body": ([], [HEAD]),
    "mid chunk": ([b"a", b"bc"], [HEAD, chunk(b"a"), b"5\r\nbc"]),
    "mid size of a chunk": ([b"a"], [HEAD, chunk(b"a"), b"5"]),
    "between chunks": ([b"a"], [HEAD, chunk(b"a")]),
    "mid last chunk": ([b"a"], [HEAD, chunk(b"a"), b"0\r\n"]),
    "too long content-length": ([b"abc"], [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"]),
}
MALFORMED: dict[str, tuple[list[bytes], list[bytes]]] = {
    "garbage": ([], [b"\x16\x03\x01 this is not HTTP\r\n\r\n"]),
    "garbage without a line's end": ([], [b"\x15\x03\x01\x00\x02\x02\x28"]),
    "garbage that looks like text": ([], [b"SSH-2.0-OpenSSH_9.2\r\n"]),
    "garbage byte by byte": ([], [b"H", b"T", b"M", b"L"]),
    "unasked upgrade": ([], [b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"]),
    "unknown transfer encoding": ([], [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n"]),
    "two lengths": ([], [b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"]),
    "bad chunk": ([b"a"], [HEAD, chunk(b"a"), b"xyz\r\n"]),
    "bad chunk in the same read": ([b"a"], [HEAD, chunk(b"a") + b"xyz\r\n"]),
    "bad chunk with the head": ([b"a"], [HEAD + chunk(b"a") + b"xyz\r\n"]),
    "bad end of a chunk": ([b"abc"], [HEAD, b"3\r\nabcdef"]),
    "endless size of a chunk": ([], [HEAD, b"0" * 200_000]),
}
BROKEN = {
    **{name: (httpx.ReadError, *broken) for name, broken in CUT.items()},
    **{name: (httpx.RemoteProtocolError, *broken) for name, broken in MALFORMED.items()},
}


@pytest.mark.parametrize(("error", "said", "parts"), BROKEN.values(), ids=BROKEN)
async def test_x10_a_broken_upstream_is_an_error_after_what_was_said(
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    error: type[httpx.TransportError],
    said: list[bytes],
    parts: list[bytes],
) -> None:
    network = ScriptedNetwork(nursery, saying(*parts, then_close=True))
    transport = TrioTransport(network)
    received: list[bytes] = []

    async def receive() -> None:
        async with get(network, transport) as response:
            while data := await body_of(response).receive():
                received.append(data)

    with pytest.raises(error) as failure:
        await receive()
    assert received == said
    assert (network.open, transport.open_connections, transport.idle_connections) == (0, 0, 0)
    if parts:
        assert isinstance(failure.value.__cause__, h11.RemoteProtocolError)


@pytest.mark.parametrize(("size", "fits"), [(60_000, True), (200_000, False)])
async def test_the_head_is_bounded(nursery: trio.Nursery, autojump_clock: MockClock, size: int, fits: bool) -> None:
    answer = with_length(b"", "X-Big: " + "x" * size)
    network = ScriptedNetwork(nursery, saying(*(answer[i : i + 1000] for i in range(0, len(answer), 1000))))
    if fits:
        async with get(network) as response:
            assert len(response.headers["x-big"]) == size
    else:
        with pytest.raises(httpx.RemoteProtocolError):
            async with get(network):
                pass
    assert network.open == 0


async def test_an_upgrade_is_refused_even_if_asked_for(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    network = ScriptedNetwork(nursery, answering(answer))
    asking = httpx.Request("GET", URL, headers={"Connection": "Upgrade", "Upgrade": "websocket"})
    with pytest.raises(httpx.RemoteProtocolError, match="another protocol"):
        await TrioTransport(network).handle_async_request(asking)
    assert network.open == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    prefix=st.sampled_from([b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\n", HEAD, HEAD + chunk(b"a"), with_length(b"ab")]),
    garbage=st.lists(
        st.binary(min_size=1, max_size=40) | st.sampled_from([b"\r\n", b"\n", b"0\r\n", b":"]), max_size=8
    ),
)
async def test_no_garbage_raises_anything_but_httpx_errors(
    autojump_clock: MockClock, prefix: bytes, garbage: list[bytes]
) -> None:
    async with trio.open_nursery() as nursery:
        network = ScriptedNetwork(nursery, saying(prefix or b"x", *garbage, then_close=True))
        try:
            async with get(network) as response:
                await receive_all(response)
        except (httpx.ReadError, httpx.RemoteProtocolError):
            pass
        assert network.open == 0
        nursery.cancel_scope.cancel()


class BrokenEnd(trio.abc.Stream):
    """A stream that fails at one operation, as a reset connection does."""

    def __init__(self, at: str, answer: bytes = b"") -> None:
        self._at = at
        self._answer = answer
        self.closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self._at == "write":
            raise trio.BrokenResourceError("reset while writing")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        answer, self._answer = self._answer, b""
        if not answer:
            raise trio.BrokenResourceError("reset while reading")
        return answer

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.closed = True
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("at", "answer", "error"),
    [
        ("write", b"", httpx.WriteError),
        ("read", b"", httpx.ReadError),
        ("body", HEAD + chunk(b"a"), httpx.ReadError),
    ],
)
async def test_a_reset_is_translated_and_keeps_its_cause(
    autojump_clock: MockClock, at: str, answer: bytes, error: type[httpx.TransportError]
) -> None:
    stream = BrokenEnd(at, answer)

    async def connect(host: str, port: int, tls: bool) -> trio.abc.Stream:
        return stream

    transport = TrioTransport(connect)

    async def ask() -> None:
        response = await transport.handle_async_request(httpx.Request("GET", URL))
        try:
            await receive_all(response)
        finally:
            assert stream.closed
            await response.aclose()

    with pytest.raises(error, match="reset") as failure:
        await ask()
    assert isinstance(failure.value.__cause__, trio.BrokenResourceError)
    assert (stream.closed, transport.open_connections) == (True, 0)


async def test_an_early_answer_counts_more_than_the_failed_write(autojump_clock: MockClock) -> None:
    stream, sent = BrokenEnd("write", with_length(b"too large", status="413 Too Large")), list[None]()

    async def connect(host: str, port: int, tls: bool) -> trio.abc.Stream:
        return stream

    async with httpx.AsyncClient(transport=TrioTransport(connect), trust_env=False) as client:
        response = await client.post(URL, content=b"x" * 9, extensions={"request_sent": lambda: sent.append(None)})
        assert (response.status_code, response.content) == (413, b"too large")
        assert stream.closed
    assert sent == []


@pytest.mark.parametrize("failure", [ConnectionRefusedError("refused"), trio.BrokenResourceError("gone")])
async def test_a_failed_connect_is_a_connect_error(autojump_clock: MockClock, failure: Exception) -> None:
    async def connect(host: str, port: int, tls: bool) -> trio.abc.Stream:
        raise failure

    transport = TrioTransport(connect)
    with pytest.raises(httpx.ConnectError, match=str(failure)) as raised:
        await transport.handle_async_request(httpx.Request("GET", URL))
    assert raised.value.__cause__ is failure
    assert transport.open_connections == 0


async def endless(server: ServerEnd) -> None:
    await server.request()
    await server.say(HEAD)
    while True:
        await server.say(chunk(b"x" * 100))


async def test_drain_reads_to_the_end_so_that_the_connection_is_reused(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    network = ScriptedNetwork(nursery, saying(HEAD + chunk(b"[DONE]"), chunk(b"rest"), chunk(b"")))
    transport = TrioTransport(network)
    async with get(network, transport) as response:
        assert await body_of(response).receive() == b"[DONE]"
        await body_of(response).drain(2.5, 100)
        assert (transport.open_connections, transport.idle_connections) == (0, 1)
        assert (trio.current_time(), await body_of(response).receive()) == (2.0, b"")
        await body_of(response).drain(2.5, 100)


@pytest.mark.parametrize(("limit_bytes", "gives_up_at"), [(10**9, 5.5), (250, 3.0), (0, 1.0)])
async def test_drain_gives_up_and_closes_past_its_limits(
    nursery: trio.Nursery, autojump_clock: MockClock, limit_bytes: int, gives_up_at: float
) -> None:
    network = ScriptedNetwork(nursery, endless)
    transport = TrioTransport(network)
    async with get(network, transport) as response:
        await body_of(response).drain(5.5, limit_bytes)
        assert (trio.current_time(), network.open, transport.open_connections) == (gives_up_at, 0, 0)
        await body_of(response).drain(5.5, limit_bytes)


@pytest.mark.parametrize("rest", [chunk(b"rest"), chunk(b"rest") + chunk(b"")], ids=["more", "more and the end"])
async def test_drain_closes_past_its_bytes_also_if_the_end_came_with_them(
    nursery: trio.Nursery, autojump_clock: MockClock, rest: bytes
) -> None:
    network = ScriptedNetwork(nursery, saying(HEAD + chunk(b"[DONE]"), rest))
    transport = TrioTransport(network)
    async with get(network, transport) as response:
        assert await body_of(response).receive() == b"[DONE]"
        await body_of(response).drain(60, 3)
        assert (trio.current_time(), network.open, transport.idle_connections) == (1.0, 0, 0)


async def test_discard_closes_also_after_a_whole_body(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, answering(with_length(b"whole")))
    transport = TrioTransport(network)
    async with get(network, transport) as response:
        assert await receive_all(response) == [b"whole"]
        for _ in range(2):
            await body_of(response).discard()
            assert (network.open, transport.open_connections, transport.idle_connections) == (0, 0, 0)
        assert await body_of(response).receive() == b""


async def test_drain_forgives_a_broken_end(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, saying(HEAD, chunk(b"a"), then_close=True))
    async with get(network) as response:
        await body_of(response).drain(60, 1000)
        assert network.open == 0


async def test_a_closed_body_reads_nothing_of_the_next_response(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    network = ScriptedNetwork(nursery, answering(with_length(b"first"), with_length(b"second")))
    async with httpx.AsyncClient(transport=TrioTransport(network), trust_env=False) as client:
        async with client.stream("GET", URL) as first:
            assert await receive_all(first) == [b"first"]
        async with client.stream("GET", URL) as second:
            await first.aclose()
            assert await body_of(first).receive() == b""
            assert await receive_all(second) == [b"second"]
        assert len(network.clients) == 1


async def test_a_body_closed_early_says_so(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async with get(ScriptedNetwork(nursery, endless)) as response:
        body = body_of(response)
        await body.receive()
        await body.aclose()
        with pytest.raises(httpx.StreamClosed):
            await body.receive()


async def test_x7_leaving_the_loop_early_warns_of_nothing(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, endless)
    async with get(network) as response:
        async for _ in body_of(response):
            break
    assert network.open == 0
    gc.collect()  # a generator left behind would warn here, and warnings are errors


@pytest.mark.parametrize("through_httpx", [False, True])
async def test_x7_cancelling_in_the_loop_warns_of_nothing_and_closes(
    nursery: trio.Nursery, autojump_clock: MockClock, through_httpx: bool
) -> None:
    network = ScriptedNetwork(nursery, endless)
    transport = TrioTransport(network)
    with trio.move_on_after(5.5) as scope:
        async with get(network, transport) as response:
            async for _ in response.aiter_raw() if through_httpx else body_of(response):
                pass
    assert scope.cancelled_caught
    assert (trio.current_time(), network.open, transport.open_connections) == (5.5, 0, 0)
    gc.collect()


async def test_a_cancelled_receive_closes_the_connection_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    network = ScriptedNetwork(nursery, saying(HEAD))
    async with get(network) as response:
        with trio.move_on_after(3):
            await body_of(response).receive()
        assert (trio.current_time(), network.open) == (3.0, 0)
