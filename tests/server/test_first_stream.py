"""The main job on the virtual clock: a 93-second answer over two real HTTP hops, every token at its recorded time."""

from __future__ import annotations

from trio.testing import MockClock

from engine import TextDelta, TextPiece
from providers.recording import Recording, load
from tests.harness.world import open_world


def recorded_arrivals(recording: Recording) -> list[tuple[str, float]]:
    """What each read with text says, and when."""
    reads = [
        ("".join(piece.text for piece in read.pieces if isinstance(piece, TextPiece)), read.at_ns / 1e9)
        for read in recording.reads
    ]
    return [(text, at) for text, at in reads if text]


async def test_every_token_of_93_seconds_arrives_at_its_recorded_time(autojump_clock: MockClock) -> None:
    recording = load("demo-93s")
    async with open_world() as world:
        world.add_agent()
        vendor = await world.add_vendor(recording)
        answer = await world.chat()
        asked_at = vendor.calls[0].started_at
        arrived = [
            (event.content, at)
            for event, at in zip(answer.events, answer.arrivals, strict=True)
            if isinstance(event, TextDelta)
        ]
        assert arrived == [(text, asked_at + at) for text, at in recorded_arrivals(recording)]
        assert arrived[-1][1] - asked_at == 93.0
        assert asked_at == answer.asked_at
