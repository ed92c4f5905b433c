"""A thousand requests cancelled at random moments over real sockets: no connection, task or descriptor is left.

Then a thousand chats through the whole product, left or stopped at random moments.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from math import inf

import httpx
import pytest
import trio

from engine import BasicAgent, Message, ModelRequest, Piece, RunSupervisor
from engine.provider import Provider
from providers.openai_chat import OpenAIChatProvider
from providers.transport import TrioTransport
from server.app import Services, create_app
from server.serving import ServingLimits, serve
from server.sockets import listen_tcp
from tests.harness.raw_vendor import DONE_EVENT, LAST_CHUNK
from tests.harness.vendor import STREAM_HEAD, chunked, text_event

REQUESTS = 1_000
CHATS = 500  # of each kind
AT_ONCE = 50
TOKENS = 8
PAUSE_SECONDS = 0.004
ANSWER_SECONDS = (TOKENS + 2) * PAUSE_SECONDS
SETTLE_SECONDS = 3.0
CHAT_PATH = "/api/v1/agents/demo/chat/lumosai/stream"
REQUEST = ModelRequest((Message("user", "hi"),), "m")


class SlowModel:
    """A model server on a loopback socket that speaks slowly; ``speaking`` answers are under way, or go on for ever."""

    def __init__(self, listener: trio.SocketListener) -> None:
        self.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/v1"
        self.endless = False
        self.connections = self.speaking = self.finished = 0

    async def serve_connection(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        try:
            with suppress(trio.BrokenResourceError):
                while await stream.receive_some():  # small requests come in one read
                    await self._answer(stream)
        finally:
            self.connections -= 1
            await trio.aclose_forcefully(stream)

    async def _answer(self, stream: trio.SocketStream) -> None:
        """Answer, and notice at once when the client goes, as model servers do."""
        self.speaking += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_when_readable, stream, nursery.cancel_scope)
                with suppress(trio.BrokenResourceError):
                    await self._speak(stream)
                nursery.cancel_scope.cancel()
        finally:
            self.speaking -= 1

    async def _speak(self, stream: trio.SocketStream) -> None:
        await trio.sleep(PAUSE_SECONDS)
        await stream.send_all(STREAM_HEAD)
        for token in count():
            if token >= TOKENS and not self.endless:
                break
            await trio.sleep(PAUSE_SECONDS)
            await stream.send_all(chunked(text_event(f"{token} ")))
        await stream.send_all(chunked(DONE_EVENT) + LAST_CHUNK)
        self.finished += 1

    async def _stop_when_readable(self, stream: trio.SocketStream, answer: trio.CancelScope) -> None:
        await trio.lowlevel.wait_readable(stream.socket)
        answer.cancel()


@asynccontextmanager
async def slow_model() -> AsyncIterator[SlowModel]:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    model = SlowModel(listener)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, model.serve_connection, [listener])
        yield model
        nursery.cancel_scope.cancel()


class Balance:
    """Tasks and file descriptors as they are now; ``settled`` waits until they are that few again."""

    def __init__(self) -> None:
        gc.collect()  # what earlier tests left is not ours
        self.tasks, self.descriptors = self._now()

    def _now(self) -> tuple[int, int]:
        return trio.lowlevel.current_statistics().tasks_living, len(os.listdir("/proc/self/fd"))

    async def check_settled(self) -> None:
        await until(lambda: self._now() == (self.tasks, self.descriptors))
        assert self._now() == (self.tasks, self.descriptors)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, a few seconds at most; the caller asserts what it wants."""
    with trio.move_on_after(SETTLE_SECONDS):
        await trio.lowlevel.checkpoint()
        while not condition():  # noqa: ASYNC110 - nobody tells of descriptors
            await trio.sleep(0.01)


async def at_random_moments(seed: int, times: int, patient: float, ask: Callable[[], Awaitable[None]]) -> int:
    """Ask so often, each time cancelled at a random moment, a part of them never; how many were cancelled."""
    chance = random.Random(seed)
    limiter, cancelled = trio.CapacityLimiter(AT_ONCE), 0

    async def ask_once(seconds: float) -> None:
        nonlocal cancelled
        async with limiter:
            with trio.move_on_after(seconds) as scope:
                await ask()
        cancelled += scope.cancelled_caught

    async with trio.open_nursery() as nursery:
        for _ in range(times):
            patience = inf if chance.random() < patient else chance.uniform(0, 1.5 * ANSWER_SECONDS)
            nursery.start_soon(ask_once, patience)
    return cancelled


def ignore(pieces: object) -> None:
    """What a cancelled request said is of no interest."""


async def whole_answer(provider: Provider) -> list[Piece]:
    pieces: list[Piece] = []
    await provider.stream(REQUEST, pieces.extend)
    return pieces


async def test_requests_cancelled_at_random_moments_leave_nothing() -> None:
    async with slow_model() as model:
        transport, before = TrioTransport(), Balance()
        async with httpx.AsyncClient(transport=transport, timeout=None, trust_env=False) as client:
            provider = OpenAIChatProvider(base_url=model.url, client=client)
            cancelled = await at_random_moments(1, REQUESTS, 0.2, lambda: provider.stream(REQUEST, ignore))
            assert cancelled > REQUESTS / 4
            assert model.finished > REQUESTS / 10
            assert transport.open_connections == 0
            await until(lambda: (model.speaking, model.connections) == (0, transport.idle_connections))
            assert (model.speaking, model.connections) == (0, transport.idle_connections)
            assert len(await whole_answer(provider)) == TOKENS + 2
        await before.check_settled()


async def go_on(run_id: str) -> None:
    """What is done with a run that is neither left nor stopped."""


@asynccontextmanager
async def lumos(model_url: str) -> AsyncIterator[tuple[str, RunSupervisor]]:
    """The whole product on a real socket; its URL and its supervisor. No run outlives its reader."""
    model_client = httpx.AsyncClient(transport=TrioTransport(), timeout=None, trust_env=False)
    provider = OpenAIChatProvider(base_url=model_url, client=model_client)
    agent = BasicAgent(agent_id="demo", provider=provider, model="m")
    stopping = trio.Event()
    [listener] = listen_tcp("127.0.0.1", 0)
    async with model_client, trio.open_nursery() as runs:
        supervisor = RunSupervisor(runs)
        app = create_app(Services({"demo": agent}, supervisor, resume_grace=0.0))
        async with trio.open_nursery() as serving:
            await serving.start(serve, app, [listener], stopping, ServingLimits(closing=0.5))
            yield "http://{}:{}".format(*listener.address), supervisor
            stopping.set()
        runs.cancel_scope.cancel()


@pytest.mark.parametrize("on_disconnect", ["cancel", "grace"])
async def test_chats_left_and_stopped_at_random_moments_leave_nothing(on_disconnect: str) -> None:
    async with slow_model() as model:
        before = Balance()
        async with (
            lumos(model.url) as (url, supervisor),
            httpx.AsyncClient(transport=TrioTransport(), timeout=None, trust_env=False) as client,
        ):
            chance, stopped = random.Random(3), 0

            async def stop_soon(run_id: str) -> None:
                await trio.sleep(chance.uniform(0, 1.5 * ANSWER_SECONDS))
                (await client.post(f"{url}/api/v1/runs/{run_id}/stop")).raise_for_status()

            async def chat(after_head: Callable[[str], Awaitable[None]]) -> str:
                body = {"message": "hi", "on_disconnect": on_disconnect}
                async with client.stream("POST", f"{url}{CHAT_PATH}", json=body) as response:
                    await after_head(response.headers["X-Run-Id"])
                    return (await response.aread()).decode()

            async def chat_and_stop() -> None:
                nonlocal stopped
                assert (await chat(stop_soon)).count('"chunk_type":"stop"') == 1
                stopped += 1

            model.endless = True
            left = await at_random_moments(2, CHATS, 0.5, chat_and_stop)
            assert left + stopped == CHATS
            assert min(left, stopped) > CHATS / 4
            await until(lambda: (supervisor.active_runs, model.speaking, model.connections) == (0, 0, 0))
            assert (supervisor.active_runs, model.speaking, model.connections) == (0, 0, 0)
            model.endless = False
            assert (await chat(go_on)).count('"chunk_type":"done"') == 1
        await before.check_settled()
