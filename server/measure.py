"""Replay accuracy over a real socket: how late each piece of a recording reaches a client, and whether that drifts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from statistics import median

import msgspec
import trio

from engine import BasicAgent, RunSupervisor, TextDelta, TextPiece
from providers.http import open_client
from providers.recording import Recording
from providers.replay import ReplayProvider

from .app import Services, create_app
from .compose import base_url
from .remote import remote_run
from .serving import serve
from .sockets import listen_tcp


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


async def measure_replay(recording: Recording) -> ReplayAccuracy:
    """Serve the recording on a loopback socket of its own, stream it to a client, and compare the times."""
    agent = BasicAgent(agent_id="replayed", provider=ReplayProvider(recording), model="", instructions="")
    listeners = listen_tcp("127.0.0.1", 0)
    stopping = trio.Event()
    async with open_client() as client, trio.open_nursery() as nursery:
        services = Services({agent.agent_id: agent}, RunSupervisor(nursery))
        await nursery.start(serve, create_app(services), listeners, stopping)
        started_at = trio.current_time()
        body = {"message": "replay", "on_disconnect": "cancel"}
        async with remote_run(client, base_url(listeners[0]), agent.agent_id, body) as events:
            arrivals = [
                (len(event.content), events.arrived_at - started_at)
                async for event in events
                if isinstance(event, TextDelta)
            ]
        stopping.set()
    return accuracy(recording, arrivals)


def accuracy(recording: Recording, arrivals: Sequence[tuple[int, float]]) -> ReplayAccuracy:
    """Compare ``(characters, seconds)`` as they arrived with the recording.

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
