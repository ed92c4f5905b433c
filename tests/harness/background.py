"""Real servers on loopback sockets in a thread of their own, for tests of what runs a loop itself: the commands."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import trio
from quart_trio import QuartTrio

from engine import BasicAgent, RunSupervisor
from server.app import Services, create_app
from server.compose import base_url
from server.serving import ServingLimits, serve
from server.sockets import listen_tcp

STARTING_SECONDS = 10


@contextmanager
def served(make_app: Callable[[trio.Nursery], QuartTrio]) -> Iterator[str]:
    """The base URL of the app, which may start tasks in the nursery; all is gone after the block."""
    listeners = listen_tcp("127.0.0.1", 0)
    stopping = trio.Event()
    tokens: list[trio.lowlevel.TrioToken] = []
    started = threading.Event()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            tokens.append(trio.lowlevel.current_trio_token())
            started.set()
            await serve(make_app(nursery), listeners, stopping, ServingLimits(closing=0.1))
            nursery.cancel_scope.cancel()

    with ThreadPoolExecutor(1) as thread:
        serving = thread.submit(trio.run, run)
        assert started.wait(STARTING_SECONDS)
        try:
            yield base_url(listeners[0])
        finally:
            tokens[0].run_sync_soon(stopping.set)
            serving.result()


@contextmanager
def served_agents(agents: Mapping[str, BasicAgent]) -> Iterator[str]:
    """The base URL of a Lumos with these agents."""
    with served(lambda nursery: create_app(Services(agents, RunSupervisor(nursery)))) as url:
        yield url
