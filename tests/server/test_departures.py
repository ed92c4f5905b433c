"""Clients that leave, or send more, while nobody reads from them: noticed at once, on real sockets and in memory."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from server.departures import Departures
from server.sockets import SocketStream
from server.testing.memory_network import MemoryNetwork
from tests.providers.sharing import sharing


class Watched:
    """The server's end of a connection; notes what it is told, and whether its client was gone then."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.told: list[bool] = []
        self.stirring = trio.Event()

    def stirred(self) -> None:
        """For the departures."""
        self.told.append(self.stream.peer_closed())
        self.stirring.set()


@asynccontextmanager
async def connection(kind: str) -> AsyncIterator[tuple[Watched, trio.abc.HalfCloseableStream]]:
    """The server's end, and the client's."""
    client: trio.abc.HalfCloseableStream
    if kind == "memory":
        network = MemoryNetwork()
        async with network.listen("lumos", 80) as listener:
            client = await network.connect("lumos", 80)
            yield Watched(await listener.accept()), client
        return
    ours, theirs = socket.socketpair()
    with ours:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as client:
            yield Watched(SocketStream(ours)), client


@asynccontextmanager
async def departures(*, epoll: bool = True) -> AsyncIterator[Departures]:
    """Departures at work, as on a system with epoll or without."""
    async with sharing() as readiness, trio.open_nursery() as nursery:
        yield Departures(readiness if epoll else None, nursery)
        nursery.cancel_scope.cancel()


BOTH = pytest.mark.parametrize("kind", ["memory", "socket"])


@BOTH
@pytest.mark.parametrize("half", [True, False], ids=["half closed", "closed"])
async def test_who_leaves_is_told_of_once(kind: str, half: bool) -> None:
    async with connection(kind) as (watched, client), departures() as watching:
        watching.watch(watched)
        await trio.testing.wait_all_tasks_blocked()
        assert watched.told == []
        await (client.send_eof() if half else client.aclose())
        with trio.fail_after(5):
            await watched.stirring.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert watched.told == [True]
        watching.forget(watched)


async def test_without_epoll_sockets_are_watched_too() -> None:
    async with (
        connection("socket") as (gone, client),
        connection("socket") as (there, _),
        departures(epoll=False) as watching,
    ):
        watching.watch(gone)
        watching.watch(there)
        await client.aclose()
        with trio.fail_after(5):
            await gone.stirring.wait()
        assert (gone.told, there.told) == ([True], [])
        watching.forget(gone)
        watching.forget(there)


@BOTH
async def test_who_sends_more_has_not_left(kind: str) -> None:
    async with connection(kind) as (watched, client), departures() as watching:
        watching.watch(watched)
        await client.send_all(b"more")
        with trio.fail_after(5):
            await watched.stirring.wait()
        await client.send_all(b"and more")
        await trio.testing.wait_all_tasks_blocked()
        assert watched.told == [False]
        watching.forget(watched)
        assert await watched.stream.receive_some() == b"moreand more"


@BOTH
async def test_who_is_forgotten_is_not_told_of_and_may_be_watched_again(kind: str) -> None:
    async with connection(kind) as (watched, client), departures() as watching:
        watching.watch(watched)
        watching.forget(watched)
        watching.forget(watched)
        await client.send_all(b"more")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert watched.told == []
        watching.watch(watched)
        with trio.fail_after(5):
            await watched.stirring.wait()
        watching.forget(watched)


async def test_a_descriptor_that_is_used_again_is_its_new_owners() -> None:
    async with departures() as watching:
        async with connection("socket") as (first, _):
            descriptor = first.stream.socket.fileno()
            watching.watch(first)
            watching.forget(first)
        async with connection("socket") as (second, client):
            assert second.stream.socket.fileno() == descriptor
            watching.watch(second)
            watching.forget(first)
            await client.send_eof()
            with trio.fail_after(5):
                await second.stirring.wait()
            assert (first.told, second.told) == ([], [True])
            watching.forget(second)
