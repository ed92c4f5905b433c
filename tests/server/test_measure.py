"""How exact a replay is: the figures from known numbers, on the virtual clock, and over a real socket."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import msgspec
import pytest
import trio
from trio.testing import MockClock

from engine import FinishPiece, ReasoningPiece, TextPiece, UsagePiece
from providers.recording import RecordedRead, Recording, dump, load
from providers.replay import ReplayProvider
from server.measure import Arrival, accuracy, measure_replay, stream_arrivals
from tests.harness.pseudo_terminal import CTRL_C, in_terminal
from tests.harness.recordings import steady_recording
from tests.harness.world import open_world
from tests.server.commands import LUMOS, complaint, lumos

HEADER = steady_recording().header
FOUR_TEXTS = Recording(
    HEADER,
    (
        RecordedRead(500_000_000, (ReasoningPiece("Hm"),)),
        RecordedRead(1_000_000_000, (TextPiece("one"),)),
        RecordedRead(2_000_000_000, (TextPiece("tw"), TextPiece("o"))),
        RecordedRead(3_000_000_000, (TextPiece("three"),)),
        RecordedRead(4_000_000_000, (TextPiece("four"), FinishPiece("stop"))),
        RecordedRead(5_000_000_000, (UsagePiece(1, 4),)),
    ),
)


def figures(recording: Recording, arrivals: list[Arrival]) -> dict[str, float]:
    return msgspec.structs.asdict(accuracy(recording, arrivals))


def test_each_event_is_as_late_as_the_read_that_completed_it() -> None:
    arrivals = [(3, 1.001), (3, 2.003), (5, 3.002), (4, 4.006)]
    expected = {"events": 4, "seconds": 4.006, "p50_ms": 2.5, "p99_ms": 6, "max_ms": 6, "drift_ms": 5}
    assert figures(FOUR_TEXTS, arrivals) == pytest.approx(expected)


def test_an_event_may_carry_several_reads() -> None:
    arrivals = [(3, 1.001), (8, 3.004), (4, 4.001)]
    expected = {"events": 3, "seconds": 4.001, "p50_ms": 1, "p99_ms": 4, "max_ms": 4, "drift_ms": 0}
    assert figures(FOUR_TEXTS, arrivals) == pytest.approx(expected)


def test_drift_is_between_the_medians_of_the_first_and_the_last_tenth() -> None:
    words = [RecordedRead(n * 10**9, (TextPiece("x"),)) for n in range(1, 101)]
    recording = Recording(HEADER, (*words, RecordedRead(101 * 10**9, (FinishPiece("stop"),))))
    measured = figures(recording, [(1, n + n / 1000) for n in range(1, 101)])
    expected = {"events": 100, "seconds": 100.1, "p50_ms": 50.5, "p99_ms": 99, "max_ms": 100, "drift_ms": 90}
    assert measured == pytest.approx(expected)


def test_the_line_has_all_figures() -> None:
    assert accuracy(FOUR_TEXTS, [(3, 1.001), (3, 2.003), (5, 3.002), (4, 4.006)]).line() == (
        "4 events over 4.01 s, late by p50 2.50 ms, p99 6.00 ms, max 6.00 ms;"
        " drift from the first to the last tenth +5.00 ms"
    )


async def test_on_the_virtual_clock_nothing_is_late(autojump_clock: MockClock) -> None:
    recording = load("demo-93s")
    async with open_world() as world:
        world.add_agent("demo", ReplayProvider(recording))
        started_at = trio.current_time()
        measured = accuracy(recording, await stream_arrivals(world.client, "http://lumos", "demo"))
        assert trio.current_time() - started_at == 93
    assert measured.seconds == 93
    assert measured.max_ms == pytest.approx(0, abs=1e-6)
    assert measured.drift_ms == pytest.approx(0, abs=1e-6)


async def test_requests_that_are_not_measured_come_first(autojump_clock: MockClock) -> None:
    asked: list[str] = []

    async def note(request: httpx.Request) -> None:
        asked.append(request.url.path)

    async with open_world() as world:
        world.add_agent("demo", ReplayProvider(FOUR_TEXTS))
        world.client.event_hooks = {"request": [note]}
        await stream_arrivals(world.client, "http://lumos", "demo")
    stream = "/api/v1/agents/demo/chat/lumosai/stream"
    assert asked == [stream, "/health/live", stream]
    assert [what for what, _, _ in world.journal.entries].count("first_token") == 1


async def test_over_a_real_socket_a_replay_does_not_drift() -> None:
    recording = load("gpt4o-short")
    measured = await measure_replay(recording)
    assert 10 < measured.events <= len(recording.reads)
    assert abs(measured.drift_ms) < 50
    assert 0 < measured.p50_ms < 250
    assert measured.p50_ms <= measured.p99_ms <= measured.max_ms
    assert recording.duration_ns / 1e9 - 0.02 < measured.seconds < recording.duration_ns / 1e9 + 0.5


def test_the_command_prints_the_figures(tmp_path: Path) -> None:
    dump(steady_recording(first=0.05, gap=0.05, last=0.2), tmp_path / "quick.jsonl")
    result = lumos("replay", tmp_path / "quick.jsonl", env={"LUMOS_MEASURE": "1"})
    assert result.exit_code == 0
    figure = r"-?\d+\.\d\d ms"
    line = (
        rf"steady: 4 events over 0\.\d\d s, late by p50 {figure}, p99 {figure}, max {figure}; drift .* [+]?{figure}\n"
    )
    assert re.fullmatch(line, result.output)


def test_without_text_there_is_nothing_to_measure(tmp_path: Path) -> None:
    dump(Recording(HEADER, (RecordedRead(1, (FinishPiece("stop"),)),)), tmp_path / "mute.jsonl")
    line = complaint(lumos("replay", "--measure", tmp_path / "mute.jsonl"))
    assert line == "steady: there is no text to measure"


def test_ctrl_c_ends_it_without_figures_and_without_a_traceback() -> None:
    with in_terminal([str(LUMOS), "replay", "demo-93s", "--measure"]) as keyboard:
        keyboard.see("Measuring demo-93s, which takes 93.0 s.")
        keyboard.type(CTRL_C)
        assert keyboard.wait_end() == 1
    assert "Traceback" not in keyboard.shown
    assert "drift" not in keyboard.shown
