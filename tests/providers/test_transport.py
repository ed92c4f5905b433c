"""The pool: reuse, expiry, stale connections, cancellation at any instant, and what requests look like on the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import nullcontext

import httpx
import pytest
import trio
from trio.testing import MockClock

from providers.transport import EXPIRED_AT_ONCE, TrioTransport

from .scripted_network import (
    NOT_MODIFIED,
    URL,
    ScriptedNetwork,
    ServerEnd,
    answering,
    chunked_head,
    receive_all,
    saying,
    with_length,
)

HELLO = with_length(b"hello")


def client_of(transport: TrioTransport) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=transport, timeout=None, trust_env=False)


async def test_a_connection_is_reused_and_closed_with_the_client(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    transport = TrioTransport(network)
    async with client_of(transport) as client:
        for _ in range(5):
            assert (await client.post(URL, content=b"{}")).content == b"hello"
            assert (transport.open_connections, transport.idle_connections) == (0, 1)
        assert len(network.clients) == 1
        assert len(network.servers[0].requests) == 5
    assert (network.open, transport.idle_connections) == (0, 0)


async def test_the_request_on_the_wire(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    async with client_of(TrioTransport(network)) as client:
        await client.post(URL + "?a=b%20c", content=b"x" * 200_000, headers={"Authorization": "Bearer k"})
        await client.get("https://model.test:8443/")
        await client.get("https://bücher.test/")
        await client.get("http://[::1]/")
    [post], [get], _, _ = (server.requests for server in network.servers)
    assert (post.head.method, post.head.target, post.body) == (b"POST", b"/v1/chat?a=b%20c", b"x" * 200_000)
    assert (b"authorization", b"Bearer k") in list(post.head.headers)
    assert (get.head.method, get.body) == (b"GET", b"")
    assert (b"host", b"model.test:8443") in list(get.head.headers)
    assert [server.address for server in network.servers] == [
        ("model.test", 80, False),
        ("model.test", 8443, True),
        ("xn--bcher-kva.test", 443, True),
        ("::1", 80, False),
    ]
    assert [client.writes for client in network.clients] == [1, 1, 1, 1]


async def test_a_streamed_request_body_is_sent_whole(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b"one "
        await trio.sleep(1)
        yield b"two"

    network = ScriptedNetwork(nursery, answering(HELLO))
    async with client_of(TrioTransport(network)) as client:
        await client.post(URL, content=parts())
    assert network.servers[0].requests[0].body == b"one two"


async def test_the_response_tells_status_headers_and_version(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    answer = with_length(b"no", "Retry-After: 7", "X-Twice: a", "X-Twice: b", status="429 Slow Down")
    async with client_of(TrioTransport(ScriptedNetwork(nursery, answering(answer)))) as client:
        response = await client.post(URL)
    assert (response.status_code, response.reason_phrase, response.http_version) == (429, "Slow Down", "HTTP/1.1")
    assert response.headers["retry-after"] == "7"
    assert response.headers.get_list("x-twice") == ["a", "b"]


async def test_the_last_used_connection_is_used_next(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    async with client_of(TrioTransport(network)) as client:
        async with client.stream("GET", URL) as first, client.stream("GET", URL) as second:
            await second.aread()
            await first.aread()
        for _ in range(3):
            await client.get(URL)
    assert [len(server.requests) for server in network.servers] == [4, 1]


async def test_any_number_of_requests_run_at_once(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async def slow(server: ServerEnd) -> None:
        while await server.request():
            await trio.sleep(10)
            await server.say(HELLO)

    transport = TrioTransport(ScriptedNetwork(nursery, slow), max_idle=7)
    async with client_of(transport) as client:
        async with trio.open_nursery() as requests:
            for _ in range(300):
                requests.start_soon(client.get, URL)
            await trio.sleep(5)
            assert transport.open_connections == 300
        assert trio.current_time() == 10
        assert (transport.open_connections, transport.idle_connections) == (0, 7)


async def test_the_oldest_idle_connection_is_closed_first(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    async with client_of(TrioTransport(network, max_idle=2)) as client:
        responses = [await client.send(client.build_request("GET", URL), stream=True) for _ in range(3)]
        for response in responses:
            await response.aread()
        assert [stream.closed for stream in network.clients] == [True, False, False]


async def test_origins_do_not_share_connections(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    transport = TrioTransport(network)
    async with client_of(transport) as client:
        for url in ("http://a.test/", "https://a.test/", "http://a.test:81/", "http://b.test/", "http://a.test:80/"):
            await client.get(url)
        assert (len(network.clients), transport.idle_connections) == (4, 4)


@pytest.mark.parametrize(("pause", "connections"), [(59.0, 1), (60.0, 2)])
async def test_an_idle_connection_expires_on_trios_clock(
    nursery: trio.Nursery, autojump_clock: MockClock, pause: float, connections: int
) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    async with client_of(TrioTransport(network, idle_seconds=60)) as client:
        await client.get(URL)
        await trio.sleep(pause)
        await client.get(URL)
        assert (len(network.clients), network.open) == (connections, 1)


async def test_expired_connections_are_closed_when_another_comes_back(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    async with client_of(TrioTransport(network, idle_seconds=60)) as client:
        async with client.stream("GET", URL) as slow:
            await client.get(URL)
            await trio.sleep(61)
            await receive_all(slow)
        assert [stream.closed for stream in network.clients] == [False, True]


async def test_requests_close_what_has_expired_at_other_origins(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    transport = TrioTransport(network, idle_seconds=60)
    async with client_of(transport) as client:
        for origin in range(10):
            await client.get(f"http://model{origin}.test/")
        await trio.sleep(30)
        await client.get(URL)
        await trio.sleep(30)
        async with client.stream("GET", URL) as response:
            assert network.open == 11 - EXPIRED_AT_ONCE
            await receive_all(response)
        assert network.open == transport.idle_connections == 11 - 2 * EXPIRED_AT_ONCE
        await client.get(URL)
        assert (network.open, len(network.clients)) == (1, 11)


async def test_an_origin_with_many_expired_connections_gets_a_fresh_one(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    transport = TrioTransport(network, idle_seconds=60)
    async with client_of(transport) as client:
        responses = [await client.send(client.build_request("GET", URL), stream=True) for _ in range(20)]
        for response in responses:
            await response.aread()
        await trio.sleep(60)
        for _ in range(3):
            await client.get(URL)
        assert [len(server.requests) for server in network.servers] == [1] * 20 + [3]
        assert (network.open, transport.idle_connections) == (1, 1)


async def test_closing_the_transport_while_stale_connections_are_closed(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO), watching=True)
    transport = TrioTransport(network)
    client = client_of(transport)
    responses = [await client.send(client.build_request("GET", URL), stream=True) for _ in range(3)]
    for response in responses:
        await response.aread()
    for server in network.servers:
        await server.aclose()
    async with trio.open_nursery() as closing:
        closing.start_soon(transport.aclose)
        with pytest.raises(httpx.ConnectError, match="closed"):
            await client.get(URL)
    assert (network.open, transport.idle_connections) == (0, 0)


async def close_after_one(server: ServerEnd) -> None:
    await server.request()
    await server.say(HELLO)
    await server.aclose()


async def test_a_connection_seen_closed_while_idle_is_not_reused(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    network = ScriptedNetwork(nursery, close_after_one, watching=True)
    async with client_of(TrioTransport(network)) as client:
        await client.get(URL)
        await trio.sleep(2)
        await client.get(URL)
        assert [stream.writes for stream in network.clients] == [1, 1]
        assert network.clients[0].closed


@pytest.mark.parametrize("read_first", [False, True], ids=["write fails", "no answer"])
async def test_a_stale_connection_is_replaced_once(
    nursery: trio.Nursery, autojump_clock: MockClock, read_first: bool
) -> None:
    async def hang_up_on_the_second(server: ServerEnd) -> None:
        await server.request()
        await server.say(HELLO)
        if read_first:
            await server.request()
        await server.aclose()

    network, sent = ScriptedNetwork(nursery, hang_up_on_the_second), list[float]()
    transport = TrioTransport(network)
    async with client_of(transport) as client:
        await client.get(URL)
        await trio.sleep(2)
        extensions = {"request_sent": lambda: sent.append(trio.current_time())}
        assert (await client.post(URL, content=b"again", extensions=extensions)).content == b"hello"
        assert [server.requests[-1].body for server in network.servers] == [b"again" if read_first else b"", b"again"]
        assert sent == [2.0]
        assert (transport.open_connections, network.open) == (0, 1)


@pytest.mark.parametrize(("silence", "connections"), [(1.0, 2), (1.5, 1)])
async def test_a_reused_connection_that_closes_late_is_not_replaced(
    nursery: trio.Nursery, autojump_clock: MockClock, silence: float, connections: int
) -> None:
    """The model may have worked on the request, which would then be paid twice."""

    async def hang_up_late_on_the_second(server: ServerEnd) -> None:
        await server.request()
        await server.say(HELLO)
        await server.request()
        await trio.sleep(silence)
        await server.aclose()

    network = ScriptedNetwork(nursery, hang_up_late_on_the_second)
    async with client_of(TrioTransport(network)) as client:
        await client.get(URL)
        await trio.sleep(2)
        with pytest.raises(httpx.ReadError, match="without an answer") if connections == 1 else nullcontext():
            await client.get(URL)
    assert (len(network.clients), network.open) == (connections, 0)


async def test_a_fresh_connection_that_says_nothing_is_not_tried_again(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    network = ScriptedNetwork(nursery, saying(then_close=True))
    async with client_of(TrioTransport(network)) as client:
        with pytest.raises(httpx.ReadError, match="without an answer"):
            await client.get(URL)
    assert (len(network.clients), network.open) == (1, 0)


async def test_a_reused_connection_that_began_to_answer_is_not_tried_again(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async def cut_the_second(server: ServerEnd) -> None:
        await server.request()
        await server.say(HELLO)
        await server.request()
        await server.say(b"HTTP/1.1 200")
        await server.aclose()

    network = ScriptedNetwork(nursery, cut_the_second)
    async with client_of(TrioTransport(network)) as client:
        await client.get(URL)
        with pytest.raises(httpx.ReadError):
            await client.get(URL)
    assert (len(network.clients), network.open) == (1, 0)


UNFIT = {
    "the server closes": with_length(b"hello", "Connection: close"),
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "bytes left over": HELLO + b"x",
    "a second response": HELLO + HELLO,
}


@pytest.mark.parametrize("answer", UNFIT.values(), ids=UNFIT)
async def test_a_connection_unfit_for_reuse_is_closed(
    nursery: trio.Nursery, autojump_clock: MockClock, answer: bytes
) -> None:
    network = ScriptedNetwork(nursery, answering(answer))
    transport = TrioTransport(network)
    async with client_of(transport) as client:
        assert (await client.get(URL)).content == b"hello"
        assert (network.open, transport.open_connections, transport.idle_connections) == (0, 0, 0)


async def test_a_request_that_says_close_closes(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    async with client_of(TrioTransport(network)) as client:
        await client.get(URL, headers={"Connection": "close"})
        assert network.open == 0


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"),
        ("HEAD", chunked_head()),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", NOT_MODIFIED),
        ("GET", with_length(b"")),
    ],
)
async def test_a_response_without_a_body_needs_no_reading(
    nursery: trio.Nursery, autojump_clock: MockClock, method: str, answer: bytes
) -> None:
    network = ScriptedNetwork(nursery, answering(answer))
    transport = TrioTransport(network)
    async with client_of(transport) as client:
        async with client.stream(method, URL) as response:
            pass
        assert transport.idle_connections == 1
        async with client.stream(method, URL) as response:
            assert await receive_all(response) == []
        assert len(network.clients) == 1


async def test_an_unread_body_closes_its_connection(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    async with client_of(TrioTransport(network)) as client:
        async with client.stream("GET", URL):
            pass
        assert network.open == 0


async def test_the_connect_phase_ends_when_the_request_is_written(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async def slow(server: ServerEnd) -> None:
        await server.request()
        await trio.sleep(10)
        await server.say(HELLO)

    sent: list[float] = []
    async with client_of(TrioTransport(ScriptedNetwork(nursery, slow, delay=3))) as client:
        await client.get(URL, extensions={"request_sent": lambda: sent.append(trio.current_time())})
    assert (sent, trio.current_time()) == ([3.0], 13.0)


async def test_an_error_of_the_callback_passes_and_closes(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    def refuse() -> None:
        raise ValueError("the run is over")

    network = ScriptedNetwork(nursery, answering(HELLO))
    transport = TrioTransport(network)
    async with client_of(transport) as client:
        with pytest.raises(ValueError, match="the run is over"):
            await client.get(URL, extensions={"request_sent": refuse})
        assert (network.open, transport.open_connections) == (0, 0)


@pytest.mark.parametrize("url", ["ftp://model.test/", "ws://model.test/"])
async def test_other_schemes_are_refused(nursery: trio.Nursery, autojump_clock: MockClock, url: str) -> None:
    transport = TrioTransport(ScriptedNetwork(nursery, answering(HELLO)))
    with pytest.raises(httpx.UnsupportedProtocol):
        await transport.handle_async_request(httpx.Request("GET", url))


async def test_a_request_that_is_not_http_is_refused(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    async with client_of(TrioTransport(network)) as client:
        with pytest.raises(httpx.LocalProtocolError):
            await client.get(URL, headers={"X-Bad": "a\nb"})
        with pytest.raises(httpx.LocalProtocolError):
            await client.post(URL, content=b"longer", headers={"Content-Length": "2"})
        assert network.open == 0
        assert (await client.get(URL)).content == b"hello"
