"""Replay accuracy over a real socket: how late each piece of a recording reaches a client, and whether that drifts."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from statistics import median

import click
import httpx
import msgspec
import trio

from engine import BasicAgent, RunSupervisor, TextDelta, TextPiece
from providers.http import open_client
from providers.recording import Recording
from providers.replay import ReplayProvider

from .app import Services, create_app
from .compose import base_url
from .recording_session import replay_deadlines
from .remote import remote_run
from .serving import serve
from .sockets import listen_tcp
from .terminal import interruptible

Arrival = tuple[int, float]
"""How many characters came, and when: seconds from the request."""


class ReplayAccuracy(msgspec.Struct, frozen=True):
    """How late the text of a recording arrived, in milliseconds after its recorded offset from the request."""

    events: int
    seconds: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    drift_ms: float

    def line(self) -> str:
        """The figures in one line."""
        return (
            f"{self.events} events over {self.seconds:.2f} s,"
            f" late by p50 {self.p50_ms:.2f} ms, p99 {self.p99_ms:.2f} ms, max {self.max_ms:.2f} ms;"
            f" drift from the first to the last tenth {self.drift_ms:+.2f} ms"
        )


async def show_accuracy(recording: Recording) -> bool:
    """Measure and print the figures. False if there are none: no text in the recording, or Ctrl-C."""
    name = recording.header.name
    if not recording.text:
        click.secho(f"lumos: {name}: there is no text to measure", fg="red", err=True)
        return False
    measured = None
    if sys.stderr.isatty():
        click.secho(f"Measuring {name}, which takes {recording.duration_ns / 1e9:.1f} s.", dim=True, err=True)
    with interruptible():
        measured = await measure_replay(recording)
    if measured is not None:
        click.echo(f"{name}: {measured.line()}")
    return measured is not None


async def measure_replay(recording: Recording) -> ReplayAccuracy:
    """Serve the recording, which has text, on a loopback socket of its own, and compare the times at a client."""
    agent = BasicAgent(
        agent_id="replayed",
        provider=ReplayProvider(recording),
        model="",
        instructions="",
        deadlines=replay_deadlines(recording),
    )
    listeners = listen_tcp("127.0.0.1", 0)
    stopping = trio.Event()
    async with open_client() as client, trio.open_nursery() as nursery:
        services = Services({agent.agent_id: agent}, RunSupervisor(nursery))
        await nursery.start(serve, create_app(services), listeners, stopping)
        arrivals = await stream_arrivals(client, base_url(listeners[0]), agent.agent_id)
        stopping.set()
    return accuracy(recording, arrivals)


async def stream_arrivals(client: httpx.AsyncClient, url: str, agent_id: str) -> list[Arrival]:
    """Stream one answer. Before it, one is begun and left: the first of all pays for what later ones find made."""
    body = {"message": "replay", "on_disconnect": "cancel"}
    async with remote_run(client, url, agent_id, body) as events:
        await anext(events)
    await client.get(f"{url}/health/live")  # and opens the connection again
    started_at = trio.current_time()
    async with remote_run(client, url, agent_id, body) as events:
        return [
            (len(event.content), events.arrived_at - started_at)
            async for event in events
            if isinstance(event, TextDelta)
        ]


def accuracy(recording: Recording, arrivals: Sequence[Arrival]) -> ReplayAccuracy:
    """Compare the arrivals, at least one, with the recording.

    Each event is held against the read that completed its text, so that events which carry several reads count too.
    """
    texts = [
        (sum(len(piece.text) for piece in read.pieces if isinstance(piece, TextPiece)), read.at_ns / 1e9)
        for read in recording.reads
    ]
    told = list(accumulate(chars for chars, _ in texts))
    arrived = accumulate(chars for chars, _ in arrivals)
    late = [
        (seconds - texts[bisect_left(told, chars)][1]) * 1000
        for chars, (_, seconds) in zip(arrived, arrivals, strict=True)
    ]
    ranked = sorted(late)
    tenth = max(1, len(late) // 10)
    return ReplayAccuracy(
        events=len(late),
        seconds=arrivals[-1][1],
        p50_ms=median(late),
        p99_ms=ranked[(len(ranked) * 99 - 1) // 100],
        max_ms=ranked[-1],
        drift_ms=median(late[-tenth:]) - median(late[:tenth]),
    )
