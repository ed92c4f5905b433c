"""Batches asked for over HTTP, and who reads them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import trio

from engine import Run
from providers.sse import SSEParser
from tests.engine.scripted import SENT, Line, ScriptedProvider, text
from tests.harness.world import World
from tests.server.api_scene import API

BATCH = f"{API}/batch"


def speaking(*lines: Line) -> ScriptedProvider:
    """A model that was asked at once and says these."""
    return ScriptedProvider((0, (SENT,)), *lines)


def ask(*agents: str, **fields: Any) -> dict[str, Any]:
    """A batch with a message for each of these agents."""
    return {"requests": [{"agent_id": agent, "message": f"hi {agent}"} for agent in agents]} | fields


class BatchReader:
    """The frames of a batch as they come: their data, ids, and times."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.frames: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.arrivals: list[float] = []
        self.raw = b""
        self._body = response.extensions["body"]
        self._parser = SSEParser()
        self._told = 0

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self

    async def __anext__(self) -> dict[str, Any]:
        while self._told == len(self.frames):
            chunk = await self._body.receive()
            if not chunk:
                raise StopAsyncIteration
            self.raw += chunk
            for frame in self._parser.feed(chunk):
                self.frames.append(msgspec.json.decode(frame.data))
                self.ids.append(frame.id)
                self.arrivals.append(trio.current_time())
        self._told += 1
        return self.frames[self._told - 1]

    async def rest(self) -> BatchReader:
        """Read to the end."""
        async for _ in self:
            pass
        return self

    @property
    def batch_id(self) -> str:
        """From the header."""
        return str(self.response.headers["X-Batch-Id"])

    @property
    def story(self) -> list[tuple[float, str, str]]:
        """When which agent said what, without the batch's own frames."""
        agents = {run["run_id"]: run["agent_id"] for run in self.frames[0]["runs"]}
        return [
            (at, agents[frame["run_id"]], frame.get("content", frame["chunk_type"]))
            for at, frame in zip(self.arrivals, self.frames, strict=True)
            if "run_id" in frame
        ]


@asynccontextmanager
async def open_batch(
    world: World, body: dict[str, Any], headers: dict[str, str] | None = None
) -> AsyncIterator[BatchReader]:
    async with world.client.stream("POST", f"{BATCH}/stream", json=body, headers=headers or {}) as response:
        if response.status_code != 200:
            await response.aread()
            raise AssertionError(response.text)
        yield BatchReader(response)


async def whole_batch(world: World, body: dict[str, Any], headers: dict[str, str] | None = None) -> BatchReader:
    async with open_batch(world, body, headers) as reader:
        return await reader.rest()


async def read_again(world: World, batch_id: str, after: int | None = None, **options: Any) -> httpx.Response:
    query = {} if after is None else {"after": str(after)}
    return await world.client.get(f"{BATCH}/{batch_id}/events", params=query, **options)


def runs_of(world: World, reader: BatchReader) -> list[Run]:
    found = [world.supervisor.find(run["run_id"]) for run in reader.frames[0]["runs"]]
    assert None not in found
    return [run for run in found if run is not None]


def assert_one_log(reader: BatchReader, *, after: int = 0) -> None:
    """Dense numbers, the batch's own first and last frame, and each run's events in its own order to its own end."""
    assert reader.ids == [f"{reader.batch_id}.{n}" for n in range(after + 1, after + 1 + len(reader.ids))]
    assert reader.frames[-1]["chunk_type"] == "batch_done"


def two(world: World) -> None:
    """Two agents that speak by turns, each at its own times."""
    world.add_agent("left", speaking((1, text("l1 ")), (3, text("l2 ")), (5, text("l3"))))
    world.add_agent("right", speaking((2, text("r1 ")), (4, text("r2"))))
