"""Closing and cancelling: at any instant, of requests, bodies and the transport itself, nothing is left."""

from __future__ import annotations

import math
import random

import httpx
import pytest
import trio
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

HELLO = with_length(b"hello")
REQUESTS = 60


def client_of(transport: TrioTransport) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=transport, timeout=None, trust_env=False)


async def test_closing_the_transport_ends_what_is_in_use(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, saying(chunked_head() + chunk(b"one")))
    transport = TrioTransport(network)
    async with client_of(transport) as client, client.stream("GET", URL) as response:
        body = body_of(response)
        assert await body.receive() == b"one"
        async with trio.open_nursery() as closing:
            closing.start_soon(transport.aclose)
            with pytest.raises(httpx.ReadError):
                await body.receive()
        assert (network.open, transport.open_connections) == (0, 0)


async def test_a_transport_closed_while_connecting_leaves_nothing(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO), delay=2)
    transport = TrioTransport(network)
    async with trio.open_nursery() as closing:
        closing.start_soon(transport.aclose)
        with pytest.raises(httpx.ConnectError, match="closed"):
            await client_of(transport).get(URL)
    assert (len(network.clients), network.open) == (1, 0)


async def test_closing_under_cancellation_closes_everything(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    transport = TrioTransport(network)
    client = client_of(transport)
    responses = [await client.send(client.build_request("GET", URL), stream=True) for _ in range(6)]
    for response in responses[:3]:
        await receive_all(response)
        await response.aclose()
    with trio.CancelScope() as scope:
        scope.cancel()
        await responses[3].aclose()
        await responses[3].aclose()
        assert network.open == 5
        await transport.aclose()
    assert (network.open, transport.open_connections, transport.idle_connections) == (0, 0, 0)


async def dialogue(server: ServerEnd) -> None:
    """Something happens at every whole second: the head, three chunks, the end."""
    while await server.request():
        await trio.sleep(1)
        await server.say(chunked_head(), *map(chunk, (b"a", b"b", b"c")), chunk(b""))


@pytest.mark.parametrize("seed", range(25))
async def test_x1_cancelling_at_the_instant_of_an_event_leaks_nothing(
    nursery: trio.Nursery, autojump_clock: MockClock, seed: int
) -> None:
    async def cancelled_request() -> None:
        with trio.move_on_after(chance.randrange(8)):
            async with client.stream("POST", URL, content=b"{}") as response:
                if chance.random() < 0.5:
                    await receive_all(response)
                else:
                    async for _ in body_of(response):
                        pass

    # The order of tasks within one instant is drawn from this; pytest-trio has made it repeatable.
    trio._core._run._r.seed(seed)
    chance = random.Random(seed)
    network = ScriptedNetwork(nursery, dialogue, delay=1, watching=chance.random() < 0.5)
    transport = TrioTransport(network, idle_seconds=chance.choice([1, 2, 60]), max_idle=chance.choice([0, 1, 3, 100]))
    async with client_of(transport) as client:
        async with trio.open_nursery() as requests:
            for _ in range(REQUESTS):
                requests.start_soon(cancelled_request)
                await trio.sleep(chance.randrange(2))
        assert transport.open_connections == 0
        assert network.open == transport.idle_connections
        async with client.stream("POST", URL) as response:
            assert await receive_all(response) == [b"a", b"b", b"c"]
    assert network.open == 0
    await trio.sleep(60)
    assert all(server.client_closed_at < math.inf for server in network.servers)


@pytest.mark.parametrize("moment", [0.5, 1.0, 1.5, 2.5, 3.5, 5.5])
async def test_a_cancelled_request_closes_its_connection_at_that_instant(
    nursery: trio.Nursery, autojump_clock: MockClock, moment: float
) -> None:
    network = ScriptedNetwork(nursery, dialogue, delay=1)
    transport = TrioTransport(network)
    async with client_of(transport) as client:
        with trio.move_on_after(moment) as scope:
            await client.post(URL)
        assert scope.cancelled_caught
        assert (trio.current_time(), network.open, transport.open_connections) == (moment, 0, 0)
        assert (await client.post(URL)).content == b"abc"


async def test_x6_a_dropped_response_does_not_stop_others(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    transport = TrioTransport(network)
    async with client_of(transport) as client:
        for _ in range(200):
            await client.send(client.build_request("GET", URL), stream=True)
        assert (await client.get(URL)).content == b"hello"
        assert transport.open_connections == 200
    assert network.open == 0
