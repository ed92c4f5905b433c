"""The replay provider on the virtual clock: every arrival is compared with ``==``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import trio
from trio.testing import MockClock

from engine.errors import ProviderError
from engine.pieces import FinishPiece, Piece, RequestSentPiece, TextPiece
from engine.provider import Message, ModelRequest, Role
from providers.recording import RecordedFailure, RecordedRead, Recording, load, names
from providers.replay import ReplayProvider

# Read before any clock starts: file I/O has no place in virtual time.
PACKAGED = {name: load(name) for name in names()}
REPLAY = ReplayProvider()
SENT = (RequestSentPiece(),)

Arrivals = list[tuple[float, tuple[Piece, ...]]]


def request(model: str) -> ModelRequest:
    """A request for the recording of that name."""
    return ModelRequest((Message("user", "?"),), model)


def listen(arrivals: Arrivals) -> Callable[[Sequence[Piece]], None]:
    """An ``emit`` that notes when what came."""
    return lambda pieces: arrivals.append((trio.current_time(), tuple(pieces)))


def expected(recording: Recording, start: float) -> Arrivals:
    """What a replay from ``start`` on must bring, and when."""
    return [(start, SENT), *((start + read.at_ns / 1e9, read.pieces) for read in recording.reads)]


def recording_of(*reads: RecordedRead, failure: RecordedFailure | None = None) -> Recording:
    """A recording like ``gpt4o-short`` with other reads."""
    header = PACKAGED["gpt4o-short"].header
    fields = {field: getattr(header, field) for field in header.__struct_fields__}
    return Recording(type(header)(**{**fields, "failure": failure}), reads)


@pytest.mark.parametrize("start", [0.0, 0.1, 1 / 3, 777.777, 86_000.1])
@pytest.mark.parametrize("name", PACKAGED)
async def test_every_arrival_is_exact(autojump_clock: MockClock, name: str, start: float) -> None:
    await trio.sleep_until(start)
    arrivals: Arrivals = []
    await REPLAY.stream(request(name), listen(arrivals))
    assert arrivals == expected(PACKAGED[name], start)
    assert trio.current_time() == arrivals[-1][0]


async def test_demo_ends_at_93_seconds(autojump_clock: MockClock) -> None:
    await REPLAY.stream(request("demo-93s"), lambda pieces: None)
    assert trio.current_time() == 93.0


async def test_many_at_once_do_not_disturb_each_other(autojump_clock: MockClock) -> None:
    arrivals: dict[tuple[str, float], Arrivals] = {(name, i / 7): [] for name in PACKAGED for i in range(4)}

    async def replay(name: str, start: float) -> None:
        await trio.sleep_until(start)
        await REPLAY.stream(request(name), listen(arrivals[name, start]))

    async with trio.open_nursery() as nursery:
        for name, start in arrivals:
            nursery.start_soon(replay, name, start)
    for (name, start), came in arrivals.items():
        assert came == expected(PACKAGED[name], start)


async def test_late_read_makes_no_other_late(autojump_clock: MockClock) -> None:
    """A consumer that blocks the loop for a while delays what falls into that time, nothing after it."""
    reads = [RecordedRead(at * 10**9, (TextPiece(str(at)),)) for at in (1, 2, 3, 4)]
    recording = recording_of(*reads, RecordedRead(5 * 10**9, (FinishPiece("stop"),)))
    arrivals: list[float] = []

    def emit(pieces: Sequence[Piece]) -> None:
        arrivals.append(trio.current_time())
        if pieces == (TextPiece("1"),):
            autojump_clock.jump(2.5)

    await ReplayProvider(recording).stream(request("any"), emit)
    assert arrivals == [0.0, 1.0, 3.5, 3.5, 4.0, 5.0]


async def test_reads_of_one_instant_come_at_one_instant(autojump_clock: MockClock) -> None:
    recording = recording_of(
        RecordedRead(10**9, (TextPiece("a"), TextPiece("b"))),
        RecordedRead(10**9, (TextPiece("c"), FinishPiece("stop"))),
    )
    arrivals: Arrivals = []
    await ReplayProvider(recording).stream(request("any"), listen(arrivals))
    assert arrivals == [(0.0, SENT), (1.0, recording.reads[0].pieces), (1.0, recording.reads[1].pieces)]


async def test_records_without_a_gap_are_one_emit(autojump_clock: MockClock) -> None:
    """The trace's third and fourth record have the second's timestamp (gaps of 0.0): one read, one call."""
    arrivals: Arrivals = []
    await REPLAY.stream(request("gpt4o-demo"), listen(arrivals))
    times = [at for at, _ in arrivals]
    assert len(set(times)) == len(times)
    assert [(at, len(pieces)) for at, pieces in arrivals[1:3]] == [(0.463893, 9), (0.463894, 4)]


@pytest.mark.parametrize("at", [0.0, 0.2, 40.0, 92.9999])
async def test_cancelled_replay_says_nothing_more(autojump_clock: MockClock, at: float) -> None:
    arrivals: Arrivals = []
    with trio.move_on_at(at) as scope:
        await REPLAY.stream(request("demo-93s"), listen(arrivals))
    assert scope.cancelled_caught
    assert trio.current_time() == at
    assert arrivals == [arrival for arrival in expected(PACKAGED["demo-93s"], 0.0) if arrival[0] <= at]
    await trio.sleep(100)
    assert arrivals[-1][0] <= at


async def test_provider_serves_on_after_a_cancelled_request(autojump_clock: MockClock) -> None:
    with trio.move_on_after(1):
        await REPLAY.stream(request("demo-93s"), lambda pieces: None)
    arrivals: Arrivals = []
    await REPLAY.stream(request("ollama-llama3"), listen(arrivals))
    assert arrivals == expected(PACKAGED["ollama-llama3"], 1.0)


async def test_unknown_name_is_an_invalid_request(autojump_clock: MockClock) -> None:
    arrivals: Arrivals = []
    with pytest.raises(ProviderError) as caught:
        await REPLAY.stream(request("../../etc/passwd"), listen(arrivals))
    assert caught.value.code == "upstream.invalid_request"
    assert str(caught.value) == (f"no recording is named '../../etc/passwd'; there are: {', '.join(PACKAGED)}")
    assert arrivals == []


async def test_given_recording_answers_every_model(autojump_clock: MockClock) -> None:
    arrivals: Arrivals = []
    await ReplayProvider(PACKAGED["gpt4o-short"]).stream(request("gpt-4o"), listen(arrivals))
    assert arrivals == expected(PACKAGED["gpt4o-short"], 0.0)


async def test_failed_recording_fails_again_at_its_time(autojump_clock: MockClock) -> None:
    recording = recording_of(
        RecordedRead(10**9, (TextPiece("a"),)), failure=RecordedFailure(4 * 10**9, "upstream.overloaded", "try later")
    )
    arrivals: Arrivals = []
    with pytest.raises(ProviderError, match="try later") as caught:
        await ReplayProvider(recording).stream(request("any"), listen(arrivals))
    assert (caught.value.code, trio.current_time()) == ("upstream.overloaded", 4.0)
    assert arrivals == expected(recording, 0.0)


async def test_error_out_of_emit_passes_through(autojump_clock: MockClock) -> None:
    def emit(pieces: Sequence[Piece]) -> None:
        if pieces != SENT:
            raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        await REPLAY.stream(request("demo-93s"), emit)
    assert trio.current_time() == 0.319355


async def test_speed_divides_the_offsets(autojump_clock: MockClock) -> None:
    await ReplayProvider(PACKAGED["demo-93s"], speed=10.0).stream(request("any"), lambda pieces: None)
    assert trio.current_time() == 9.3


async def test_infinite_speed_takes_no_time(autojump_clock: MockClock) -> None:
    came: list[Piece] = []
    await ReplayProvider(PACKAGED["demo-93s"], speed=math.inf).stream(request("any"), came.extend)
    assert trio.current_time() == 0.0
    assert "".join(piece.text for piece in came if isinstance(piece, TextPiece)) == PACKAGED["demo-93s"].text


@pytest.mark.parametrize("speed", [0.0, -1.0, math.nan])
def test_speed_must_be_positive(speed: float) -> None:
    with pytest.raises(ValueError, match="speed must be above 0"):
        ReplayProvider(speed=speed)


async def test_aclose_leaves_it_usable(autojump_clock: MockClock) -> None:
    provider = ReplayProvider()
    await provider.aclose()
    await provider.stream(request("gpt4o-short"), lambda pieces: None)
    assert trio.current_time() == 1.04839


async def test_real_clock_is_kept_within_milliseconds() -> None:
    """Never early; a median of lateness, so that a busy build machine does not decide the test."""
    recording = PACKAGED["gpt4o-short"]
    arrivals: Arrivals = []
    await ReplayProvider(recording).stream(request("any"), listen(arrivals))
    start = arrivals[0][0]
    late = sorted(at - start - read.at_ns / 1e9 for (at, _), read in zip(arrivals[1:], recording.reads, strict=True))
    assert late[0] > -0.000_1
    assert late[len(late) // 2] < 0.005


# An agent's steps


def step_request(model: str, *roles: Role) -> ModelRequest:
    """A request with messages of these roles."""
    return ModelRequest(tuple(Message(role, "x") for role in roles), model)


@pytest.mark.parametrize(
    ("roles", "name"),
    [
        (("system", "user"), "demo-tools"),
        (("user", "assistant", "tool", "tool"), "demo-tools-step-2"),
        (("user", "assistant", "tool", "assistant", "user"), "demo-tools"),
        (("user", "assistant", "user", "assistant", "tool"), "demo-tools-step-2"),
        (("user", "assistant", "tool", "assistant", "tool"), "demo-tools"),
    ],
    ids=["first", "second", "a new turn", "second of a second turn", "no third"],
)
async def test_each_step_of_a_turn_has_its_recording(
    autojump_clock: MockClock, roles: tuple[Role, ...], name: str
) -> None:
    arrivals: Arrivals = []
    await REPLAY.stream(step_request("demo-tools", *roles), listen(arrivals))
    assert arrivals == expected(PACKAGED[name], 0.0)


async def test_given_recordings_are_for_the_steps(autojump_clock: MockClock) -> None:
    first, second = PACKAGED["demo-tools"], PACKAGED["gpt4o-short"]
    provider = ReplayProvider(first, second)
    for steps, recording in enumerate([first, second, first]):
        arrivals: Arrivals = []
        start = trio.current_time()
        answers: list[Role] = ["assistant"] * steps
        await provider.stream(step_request("any", "user", *answers), listen(arrivals))
        assert arrivals == expected(recording, start)


async def test_an_answer_of_one_step_is_the_same_at_any_step(autojump_clock: MockClock) -> None:
    arrivals: Arrivals = []
    await REPLAY.stream(step_request("gpt4o-short", "user", "assistant", "tool"), listen(arrivals))
    assert arrivals == expected(PACKAGED["gpt4o-short"], 0.0)
