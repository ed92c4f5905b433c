"""Cancels: clients that go at random moments, and what they leave behind: nothing.

    .venv/bin/python -m benchmarks.cancels [--count 10000] [--at-once 10] [--seed 1]

A real Lumos, a model server and the clients share one process and the loopback. Clients go before the model server has
answered, while it is silent before its first token, in the midst of its text, during a tool call, and while they do not
read; the grace is 0. Reported is the time from the client's ``close`` to the moment the model server saw its connection
closed (of a tool call: to the tool's cancelling), with all that the loop had to do in between.
"""

from __future__ import annotations

import gc
import os
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count

import click
import httpx
import msgspec
import trio

from engine import BasicAgent, RunSupervisor
from engine.function_tool import tool
from engine.pieces import FinishPiece, ToolCallPiece
from engine.tools import ToolUse
from providers.chunked import LAST_CHUNK, chunked
from providers.http import open_client
from providers.openai_chat import OpenAIChatProvider
from server.app import Services, create_app
from server.compose import base_url
from server.serving import ServingLimits, serve
from server.sockets import listen_tcp, raise_descriptor_limit
from server.testing.vendor_bytes import STREAM_HEAD

PHASES = ("before headers", "before the first token", "in the text", "in a tool", "not reading")
LONGEST_STAY = 0.15
"""Seconds; the model has begun long before, if the machine is not overloaded."""

SETTLE_SECONDS = 10.0

_NAME = re.compile(rb"scene-(\d)-(\d+)")


class Report(msgspec.Struct, frozen=True):
    """What was measured.

    Attributes:
        went: how many clients went in each phase.
        reached: of how many of those something had been begun upstream by then.
        milliseconds: from the client's close to the upstream's end, sorted, by phase.
        left_runs, left_upstream, left_tasks, left_descriptors: what was there afterwards and not before.
    """

    went: dict[str, int]
    reached: dict[str, int]
    milliseconds: dict[str, list[float]]
    left_runs: int
    left_upstream: int
    left_tasks: int
    left_descriptors: int
    seconds: float

    @property
    def leaks(self) -> int:
        return self.left_runs + self.left_upstream + self.left_tasks + self.left_descriptors


class Meter:
    """When clients went and when what they had begun ended, by the client's number, on trio's clock."""

    def __init__(self) -> None:
        self.went: dict[int, tuple[str, float]] = {}
        self.ended: dict[int, float] = {}
        self.speaking = 0

    def end(self, number: int) -> None:
        self.ended[number] = trio.current_time()

    def milliseconds(self) -> dict[str, list[float]]:
        by_phase: dict[str, list[float]] = defaultdict(list)
        for number, ended_at in self.ended.items():
            phase, went_at = self.went[number]
            by_phase[phase].append(1000 * (ended_at - went_at))
        return {phase: sorted(by_phase[phase]) for phase in PHASES}


class Model:
    """A model server that behaves as the message's scene wants, and sees at once when its client closes."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    async def serve_connection(self, stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError):
                while request := await stream.receive_some():
                    await self._answer(stream, request)

    async def _answer(self, stream: trio.SocketStream, request: bytes) -> None:
        name = _NAME.search(request)
        while name is None:
            request += (more := await stream.receive_some())
            if not more:
                return
            name = _NAME.search(request)
        phase, number = PHASES[int(name[1])], int(name[2])
        if phase == "in a tool":
            await stream.send_all(STREAM_HEAD + chunked(_tool_call(number)) + chunked(b"data: [DONE]\n\n") + LAST_CHUNK)
            return
        self._meter.speaking += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, stream, number, nursery.cancel_scope)
                with suppress(trio.BrokenResourceError):
                    await self._speak(stream, phase)
        finally:
            self._meter.speaking -= 1

    async def _watch(self, stream: trio.SocketStream, number: int, speaking: trio.CancelScope) -> None:
        await trio.lowlevel.wait_readable(stream.socket)
        self._meter.end(number)
        speaking.cancel()

    async def _speak(self, stream: trio.SocketStream, phase: str) -> None:
        if phase == "before headers":
            await trio.sleep_forever()
        await stream.send_all(STREAM_HEAD)
        if phase == "before the first token":
            await trio.sleep_forever()
        size = 16_384 if phase == "not reading" else 5
        for _ in count():
            await stream.send_all(chunked(_text("x" * size)))
            await trio.sleep(0.002)


def _text(text: str) -> bytes:
    return _event({"content": text})


def _tool_call(number: int) -> bytes:
    piece = ToolCallPiece(0, f"c{number}", "wait", msgspec.json.encode({"number": number}).decode())
    function = {"name": piece.name, "arguments": piece.arguments_fragment}
    call = {"index": 0, "id": piece.call_id, "type": "function", "function": function}
    return _event({"tool_calls": [call]}) + _event({}, FinishPiece("tool_calls").reason)


def _event(delta: object, finish: str | None = None) -> bytes:
    return (
        b"data: " + msgspec.json.encode({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}) + b"\n\n"
    )


@asynccontextmanager
async def site(meter: Meter) -> AsyncIterator[tuple[int, RunSupervisor]]:
    """Lumos and the model server; Lumos's port."""

    @tool
    async def wait(number: int) -> str:
        """Wait for ever."""
        try:
            await trio.sleep_forever()
        finally:
            meter.end(number)

    async with trio.open_nursery() as nursery, open_client() as client, trio.open_nursery() as runs:
        [models] = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=1024)
        await nursery.start(trio.serve_listeners, Model(meter).serve_connection, [models])
        url = f"http://127.0.0.1:{models.socket.getsockname()[1]}/v1"
        provider = OpenAIChatProvider(base_url=url, api_key="k", client=client)
        agent = BasicAgent(agent_id="demo", provider=provider, model="m", tool_use=ToolUse(tools=(wait,)))
        supervisor = RunSupervisor(runs)
        app = create_app(Services({"demo": agent}, supervisor, resume_grace=0.0))
        listeners = listen_tcp("127.0.0.1", 0)
        await nursery.start(serve, app, listeners, trio.Event(), ServingLimits(closing=0.5))
        yield httpx.URL(base_url(listeners[0])).port or 0, supervisor
        runs.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


async def go(port: int, number: int, meter: Meter, chance: random.Random) -> None:
    """Be one client: ask, perhaps read, and go."""
    phase = number % len(PHASES)
    body = msgspec.json.encode({"message": f"scene-{phase}-{number}"})
    head = (
        "POST /api/v1/agents/demo/chat/lumosai/stream HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    stay = chance.uniform(0, LONGEST_STAY)
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    try:
        await stream.send_all(head.encode() + body)
        with trio.move_on_after(stay):
            if PHASES[phase] == "not reading":
                await trio.sleep_forever()
            while await stream.receive_some():
                pass
    finally:
        meter.went[number] = (PHASES[phase], trio.current_time())
        await trio.aclose_forcefully(stream)


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


async def settled(meter: Meter, supervisor: RunSupervisor) -> None:
    """Until nothing is under way, or too long; who asks looks at what is left."""
    with trio.move_on_after(SETTLE_SECONDS):  # noqa: ASYNC912 - may be settled already
        while supervisor.active_runs or meter.speaking:  # noqa: ASYNC110 - nobody tells of what is leaked
            await trio.sleep(0.02)


async def measure(clients: int, at_once: int, seed: int) -> Report:
    """Let so many clients come and go."""
    chance, meter, started = random.Random(seed), Meter(), time.perf_counter()
    gc.collect()
    tasks, files = trio.lowlevel.current_statistics().tasks_living, descriptors()
    async with site(meter) as (port, supervisor):
        numbers = iter(range(clients))

        async def come_and_go() -> None:
            for number in numbers:
                await go(port, number, meter, chance)

        async with trio.open_nursery() as nursery:
            for _ in range(at_once):
                nursery.start_soon(come_and_go)
        await settled(meter, supervisor)
        left_runs, left_upstream = supervisor.active_runs, meter.speaking
    gc.collect()
    went, milliseconds = Counter(phase for phase, _ in meter.went.values()), meter.milliseconds()
    return Report(
        went=dict(went),
        reached={phase: len(values) for phase, values in milliseconds.items()},
        milliseconds=milliseconds,
        left_runs=left_runs,
        left_upstream=left_upstream,
        left_tasks=trio.lowlevel.current_statistics().tasks_living - tasks,
        left_descriptors=descriptors() - files,
        seconds=time.perf_counter() - started,
    )


def percentile(values: list[float], share: float) -> float:
    """Of sorted values."""
    return values[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


@click.command()
@click.option("--count", "clients", default=10_000, show_default=True)
@click.option("--at-once", default=10, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(clients: int, at_once: int, seed: int) -> None:
    """Measure, and print a table."""
    raise_descriptor_limit()
    report = trio.run(partial(measure, clients, at_once, seed))
    print("| clients go | clients | reached the model | p50 ms | p99 ms | most ms |\n|---|--:|--:|--:|--:|--:|")
    for phase in PHASES:
        values = report.milliseconds[phase]
        figures = " | ".join(f"{percentile(values, share):.1f}" for share in (0.5, 0.99, 1.0))
        print(f"| {phase} | {report.went.get(phase, 0)} | {report.reached[phase]} | {figures} |")
    print(
        f"\nLeft behind: {report.left_runs} runs, {report.left_upstream} upstream connections, "
        f"{report.left_tasks} tasks, {report.left_descriptors} descriptors. "
        f"{at_once} at once, {report.seconds:.0f} s, seed {seed}."
    )


if __name__ == "__main__":
    main()
