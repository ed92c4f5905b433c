"""The in-memory network keeps trio's stream contract, and is exact to the byte and to the virtual second."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import pytest
import trio
import trio.testing
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from trio.testing import MockClock

from server.testing.memory_connection import MemoryConnection, MemoryStream
from server.testing.memory_network import MemoryNetwork


def make_connection(window: int = 65_536, latency: float = 0.0) -> MemoryConnection:
    return MemoryConnection(("client", 1), ("server", 2), tls=False, window=window, latency=latency)


async def outcome(operation: Callable[[], Awaitable[object]]) -> tuple[str, float]:
    """How the operation ends, and when."""
    try:
        await operation()
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError, ConnectionError) as exc:
        return type(exc).__name__, trio.current_time()
    return "done", trio.current_time()


@asynccontextmanager
async def running(*operations: Callable[[], Awaitable[object]]) -> AsyncIterator[list[tuple[str, float]]]:
    """Run the operations beside the block; what it gets holds their outcomes in the end."""
    outcomes: list[tuple[str, float]] = []

    async def note(operation: Callable[[], Awaitable[object]]) -> None:
        outcomes.append(await outcome(operation))

    async with trio.open_nursery() as nursery:
        for operation in operations:
            nursery.start_soon(note, operation)
        yield outcomes


async def read_all(stream: MemoryStream) -> bytes:
    return b"".join([chunk async for chunk in stream])


@pytest.mark.parametrize("latency", [0.0, 0.25])
async def test_trios_own_stream_checker_passes(autojump_clock: MockClock, latency: float) -> None:
    async def make_pair(unread: int = 0) -> tuple[MemoryStream, MemoryStream]:
        connection = make_connection(window=4096, latency=latency)
        connection.client.send_now(bytes(unread))
        connection.server.send_now(bytes(unread))
        return connection.client, connection.server

    make_clogged_pair = partial(make_pair, unread=4096)
    await trio.testing.check_two_way_stream(make_pair, make_clogged_pair)
    await trio.testing.check_half_closeable_stream(make_pair, make_clogged_pair)


async def test_one_read_brings_all_that_has_gathered(autojump_clock: MockClock) -> None:
    connection = make_connection()
    for event in (b"one ", b"two ", b"three"):
        await connection.server.send_all(event)
    assert await connection.client.receive_some(5) == b"one t"
    assert await connection.client.receive_some() == b"wo three"


async def test_send_all_waits_exactly_while_the_window_is_full(autojump_clock: MockClock) -> None:
    connection = make_connection(window=10)
    async with running(partial(connection.server.send_all, bytes(25))) as ends:
        for at, (sent, read) in enumerate([(10, 6), (16, 9), (25, 10)], start=1):
            await trio.sleep_until(at)
            assert (connection.to_client.sent, connection.to_client.unread) == (sent, 10)
            assert len(await connection.client.receive_some(read)) == read
    assert ends == [("done", 2.0)]


async def test_a_cancelled_send_has_sent_the_first_part(autojump_clock: MockClock) -> None:
    connection = make_connection(window=4)
    with trio.move_on_after(1):
        await connection.server.send_all(b"0123456789")
    assert connection.to_client.sent == 4
    assert await connection.client.receive_some() == b"0123"
    await connection.server.send_all(b"4567")
    assert await connection.client.receive_some() == b"4567"


async def test_a_cancelled_receive_has_taken_nothing(autojump_clock: MockClock) -> None:
    connection = make_connection()
    with trio.move_on_after(1):
        await connection.client.receive_some()
    await connection.server.send_all(b"late")
    with trio.CancelScope() as scope:
        scope.cancel()
        await connection.client.receive_some()
    assert await connection.client.receive_some() == b"late"


@pytest.mark.parametrize("seed", range(20))
async def test_no_byte_is_lost_or_doubled_by_cancellations_at_any_instant(autojump_clock: MockClock, seed: int) -> None:
    rnd = random.Random(seed)
    data = rnd.randbytes(3000)
    received = bytearray()
    connection = make_connection(window=rnd.randrange(1, 50), latency=rnd.choice([0.0, 0.5]))

    async def send() -> None:
        while connection.to_client.sent < len(data):
            # Whole seconds on both sides, so that cancellations and wake-ups coincide.
            with trio.move_on_after(rnd.randrange(4)):
                await connection.server.send_all(data[connection.to_client.sent :])
        await connection.server.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while len(received) < len(data):
            with trio.move_on_after(rnd.randrange(4)):
                received += await connection.client.receive_some(rnd.randrange(1, 60))
                await trio.sleep(rnd.randrange(2))
    assert received == data


async def test_send_now_sends_what_fits(autojump_clock: MockClock) -> None:
    connection = make_connection(window=5)
    client, server = connection.client, connection.server
    assert [server.send_now(b"abc"), server.send_now(b"defg"), server.send_now(b"g")] == [3, 2, 0]
    async with running(partial(server.send_all, b"fghijk")):
        await trio.testing.wait_all_tasks_blocked()
        assert await client.receive_some(4) == b"abcd"
        assert server.send_now(b"!") == 0, "it would overtake the send_all that waits"
        await trio.testing.wait_all_tasks_blocked()
        assert await client.receive_some() == b"efghi"
    assert server.send_now(b"l") == 1
    assert await client.receive_some() == b"jkl"
    for end, error in ((client, trio.BrokenResourceError), (server, trio.ClosedResourceError)):
        await end.aclose()
        with pytest.raises(error):
            server.send_now(b"m")


async def test_closing_wakes_whoever_waits_at_either_end(autojump_clock: MockClock) -> None:
    connection = make_connection(window=1)
    own, peer = connection.client, connection.server
    async with running(partial(own.send_all, b"xy")) as own_ends, running(partial(peer.send_all, b"12")) as peer_ends:
        await trio.sleep(1)
        await own.aclose()
    assert own_ends == [("ClosedResourceError", 1.0)]
    assert peer_ends == [("BrokenResourceError", 1.0)]
    assert await read_all(peer) == b"x"


async def test_peer_closed_and_is_readable_tell_idle_from_dead(autojump_clock: MockClock) -> None:
    connection = make_connection()
    client, server = connection.client, connection.server
    assert (client.peer_closed(), client.is_readable()) == (False, False)
    await server.send_all(b"xy")
    await client.receive_some(1)
    assert (client.peer_closed(), client.is_readable()) == (False, True)
    await server.send_eof()
    assert (client.peer_closed(), client.is_readable()) == (False, True)
    await client.receive_some()
    assert (client.peer_closed(), client.is_readable()) == (True, True)
    assert not server.peer_closed()
    client.reset()
    assert server.peer_closed()


async def test_a_reset_breaks_both_ends_at_once_and_drops_what_was_not_read(autojump_clock: MockClock) -> None:
    connection = make_connection(window=3)
    async with running(partial(connection.server.send_all, b"unread"), connection.server.receive_some) as ends:
        await trio.sleep(2)
        connection.client.reset()
    assert ends == [("BrokenResourceError", 2.0)] * 2
    assert connection.to_client.unread == 0
    for end in (connection.client, connection.server):
        for operation in (end.receive_some, partial(end.send_all, b""), end.send_eof):
            assert await outcome(operation) == ("BrokenResourceError", 2.0)
        assert connection.is_open
        await end.aclose()
        assert await outcome(end.receive_some) == ("ClosedResourceError", 2.0)
    assert not connection.is_open


@pytest.mark.parametrize("reset", [False, True])
async def test_a_cut_falls_right_behind_the_given_byte(autojump_clock: MockClock, reset: bool) -> None:
    connection = make_connection(window=4)
    connection.server.cut_after(6, reset=reset)
    await connection.client.send_all(b"ask")
    async with running(partial(connection.server.send_all, b"0123456789")) as ends:
        await trio.sleep(1)
        assert await connection.client.receive_some() == b"0123"
        await trio.testing.wait_all_tasks_blocked()
        assert await connection.client.receive_some() == b"45"
    assert ends == [("BrokenResourceError", 1.0)]
    assert await connection.server.receive_some() == b"ask"
    for end in (connection.client, connection.server):
        assert await outcome(end.receive_some) == ("BrokenResourceError" if reset else "done", 1.0)
        assert await outcome(partial(end.send_all, b"more")) == ("BrokenResourceError", 1.0)


async def test_a_cut_wakes_whoever_waits(autojump_clock: MockClock) -> None:
    connection = make_connection(window=1)
    async with running(partial(connection.server.send_all, b"full"), connection.server.receive_some) as ends:
        await trio.sleep(1)
        connection.cut()
    assert sorted(ends) == [("BrokenResourceError", 1.0), ("done", 1.0)]


async def test_a_listener_hands_out_connections_in_order_until_it_closes(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    listener = network.listen("api", 80)
    assert listener.address == ("api", 80)
    with pytest.raises(OSError, match="in use"):
        network.listen("api", 80)
    first, second = await network.connect("api", 80), await network.connect("api", 80)
    assert [(await listener.accept()).connection for _ in range(2)] == [first.connection, second.connection]
    async with running(listener.accept) as ends:
        await trio.sleep(3)
        assert await outcome(listener.accept) == ("BusyResourceError", 3.0)
        await listener.aclose()
    assert ends == [("ClosedResourceError", 3.0)]
    assert await outcome(partial(network.connect, "api", 80)) == ("ConnectionRefusedError", 3.0)
    network.listen("api", 80)
    await network.connect("api", 80)


async def test_closing_a_listener_resets_what_was_never_accepted(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    listener = network.listen("api", 80)
    client = await network.connect("api", 80)
    await listener.aclose()
    assert await outcome(client.receive_some) == ("BrokenResourceError", 0.0)
    await client.aclose()
    assert not network.open_connections()


async def test_refused_and_unanswered_addresses(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    network.listen("api", 80)
    assert await outcome(partial(network.connect, "api", 81)) == ("ConnectionRefusedError", 0.0)
    network.refuse("api", 80)
    assert await outcome(partial(network.connect, "api", 80)) == ("ConnectionRefusedError", 0.0)
    network.black_hole("api", 80)
    with pytest.raises(trio.TooSlowError), trio.fail_after(75):
        await network.connect("api", 80)
    assert trio.current_time() == 75
    network.restore("api", 80)
    assert network.connections == [(await network.connect("api", 80)).connection]


async def test_addresses_are_what_servers_read_from_a_socket(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    network.listen("203.0.113.1", 443)
    await network.connect("203.0.113.1", 443)
    await network.connect("203.0.113.1", 443, True, client_host="198.51.100.7")
    plain, secure = network.connections
    assert secure.client.socket.getsockname() == secure.server.socket.getpeername() == ("198.51.100.7", 1025)
    assert secure.client.socket.getpeername() == secure.server.socket.getsockname() == ("203.0.113.1", 443)
    assert (plain.tls, secure.tls) == (False, True)
    assert plain.client.socket.getsockname() == ("127.0.0.1", 1024)
    assert not hasattr(secure.server.socket, "fileno")


async def test_a_connection_records_times_bytes_and_who_has_closed(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    listener = network.listen("api", 80)
    await trio.sleep(1)
    client = await network.connect("api", 80)
    server = await listener.accept()
    await client.send_all(b"question")
    server.send_now(b"an answer")
    (connection,) = network.open_connections("api")
    assert network.open_connections("other") == []
    await trio.sleep(1)
    await client.aclose()
    assert network.open_connections() == [connection], "the server has yet to close its end"
    await trio.sleep(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await server.aclose()
    assert network.open_connections() == []
    await client.aclose()
    assert (connection.opened_at, client.closed_at, server.closed_at) == (1.0, 2.0, 3.0)
    assert (connection.to_server.sent, connection.to_client.sent) == (8, 9)
    assert "client closed at 2.0, server closed at 3.0" in repr(connection)


async def test_latency_delays_bytes_and_the_end_and_keeps_their_order(autojump_clock: MockClock) -> None:
    network = MemoryNetwork(latency=0.5)
    network.listen("api", 80)
    client = await network.connect("api", 80)
    assert trio.current_time() == 1.0, "one round trip"
    server = client.connection.server
    await server.send_all(b"slow ")
    client.connection.to_client.latency = 0.0
    await server.send_all(b"quick")
    await server.send_eof()
    assert (client.is_readable(), client.peer_closed()) == (False, False)
    assert (await client.receive_some(), trio.current_time()) == (b"slow quick", 1.5)
    assert (await client.receive_some(), trio.current_time()) == (b"", 1.5)
    await client.send_eof()
    assert (await server.receive_some(), trio.current_time()) == (b"", 2.0)


async def test_a_reset_overtakes_what_is_under_way(autojump_clock: MockClock) -> None:
    connection = make_connection(latency=60.0)
    await connection.server.send_all(b"x")
    await connection.server.aclose()
    connection.reset()
    assert await outcome(connection.client.receive_some) == ("BrokenResourceError", 0.0)


async def test_on_connect_sets_the_conditions_of_a_connection(autojump_clock: MockClock) -> None:
    def make_hostile(connection: MemoryConnection) -> None:
        connection.to_server.window = 2
        connection.to_client.latency = 9.0
        connection.server.cut_after(1)

    network = MemoryNetwork()
    network.on_connect = make_hostile
    network.listen("api", 80)
    client = await network.connect("api", 80)
    assert client.send_now(b"abc") == 2
    assert client.connection.server.send_now(b"xy") == 1
    assert (await read_all(client), trio.current_time()) == (b"x", 9.0)


def test_impossible_conditions_are_refused() -> None:
    for window, latency in ((0, 0.0), (1, -1.0)):
        with pytest.raises(ValueError, match="window must be"):
            MemoryNetwork(window, latency)


def record_busy_seconds() -> frozenset[tuple[float | None, ...]]:
    """Run forty clients whose steps coincide, in whatever order trio picks, and return what the network recorded."""
    network = MemoryNetwork(window=100, latency=0.25)

    async def answer(server: MemoryStream) -> None:
        question = await read_all(server)
        await trio.sleep(len(question) % 7)
        await server.send_all(question * 10)

    async def ask(number: int) -> None:
        await trio.sleep(number % 5)
        async with await network.connect("api", 80) as client:
            await client.send_all(bytes(number))
            await client.send_eof()
            assert len(await read_all(client)) == number * 10

    async def main() -> None:
        async with trio.open_nursery() as server_nursery:
            server_nursery.start_soon(trio.serve_listeners, answer, [network.listen("api", 80)])
            async with trio.open_nursery() as nursery:
                for number in range(40):
                    nursery.start_soon(ask, number)
            server_nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert not network.open_connections()
    return frozenset((c.client.closed_at, c.server.closed_at, c.to_client.sent) for c in network.connections)


def test_times_and_bytes_do_not_depend_on_the_order_of_tasks() -> None:
    assert len({record_busy_seconds() for _ in range(20)}) == 1


async def test_the_real_hypercorn_serves_over_it_in_virtual_time(autojump_clock: MockClock) -> None:
    async def tell_time(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"x-client", scope["client"][0].encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for more in (True, True, False):
            await trio.sleep(60)
            await send({"type": "http.response.body", "body": b"%d" % trio.current_time(), "more_body": more})

    async def serve(stream: MemoryStream) -> None:
        await TCPServer(ASGIWrapper(tell_time), Config(), WorkerContext(None), ConnectionState({}), cast(Any, stream))

    network = MemoryNetwork()
    received: defaultdict[float, bytes] = defaultdict(bytes)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [network.listen("api", 80)])
        async with await network.connect("api", 80, client_host="198.51.100.7") as client:
            await client.send_all(b"GET / HTTP/1.1\r\nHost: api\r\n\r\n")
            async for chunk in client:
                received[trio.current_time()] += chunk
        nursery.cancel_scope.cancel()
    assert list(received) == [0.0, 60.0, 120.0, 180.0]
    assert b"x-client: 198.51.100.7\r\n" in received[0.0]
    assert received[120.0] == b"3\r\n120\r\n"
    assert client.closed_at == client.connection.server.closed_at == 185.0, "Hypercorn's keep-alive limit is 5 s"
