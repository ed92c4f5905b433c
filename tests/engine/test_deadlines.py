"""Each deadline fires at its time, with its code, and nothing but progress puts it off; only quick pieces blur it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from engine import (
    AgentStarted,
    AgentStopped,
    AttemptsPiece,
    Deadlines,
    DeadlineTooLongError,
    DeadlineWish,
    Emit,
    Error,
    Event,
    FinishPiece,
    GenerationComplete,
    Provider,
    ProviderError,
    ReasoningPiece,
    Run,
    TextDelta,
    TextPiece,
    Usage,
    UsagePiece,
)
from engine.deadlines import SLACK_SECONDS, Phases

from .scripted import (
    FOREVER,
    SENT,
    Line,
    ProgrammedProvider,
    ScriptedProvider,
    reasoning,
    run_read_by_one,
    spec_for,
    text,
)

NAMES = ["total", "connect", "first_token", "idle", "tool"]
SILENCE: Line = (FOREVER, ())


@dataclass
class Ended:
    """How a run ended: when its reader got the terminal event, the events, and what the model saw."""

    at: float
    events: list[Event]
    seen: list[tuple[float, str]]

    @property
    def error(self) -> Error:
        assert isinstance(self.events[-1], Error)
        return self.events[-1]


async def ended(*script: Line, **deadlines: float) -> Ended:
    provider = ScriptedProvider(*script)
    got = await run_read_by_one(Run("run", spec_for(provider, deadlines=Deadlines(**deadlines))))
    return Ended(got[-1][0], [event for _, event in got], provider.seen)


# Each at its time


NO_TOKEN = Error("timeout.first_token", "no first token from the model within 30 s", usage=Usage(2, 0, estimated=True))


@pytest.mark.parametrize(
    ("script", "at", "error"),
    [
        ([SILENCE], 10.0, Error("timeout.connect", "no connection to the model within 10 s")),
        ([(4, [SENT]), SILENCE], 34.0, NO_TOKEN),
        ([(9.875, [SENT]), SILENCE], 39.875, NO_TOKEN),
    ],
    ids=["connect", "first token", "first token, sent late"],
)
async def test_before_the_first_token(autojump_clock: MockClock, script: list[Line], at: float, error: Error) -> None:
    run = await ended(*script)
    assert run.at == at
    assert run.error == error
    assert run.seen == [(0.0, "asked"), (at, "cancelled")]


async def test_idle_after_the_last_token(autojump_clock: MockClock) -> None:
    run = await ended((1, [SENT]), (2, text("a")), (31, text("b")), SILENCE)
    assert run.at == 61.0
    assert (run.error.code, run.error.content) == ("timeout.idle", "no token from the model for 30 s")
    assert run.error.response == "ab"
    assert run.seen[-1] == (61.0, "cancelled")


async def test_total_though_every_token_is_in_time(autojump_clock: MockClock) -> None:
    run = await ended((0, [SENT]), *[(float(at), text("a")) for at in range(10, 200, 20)])
    assert run.at == 120.0
    assert (run.error.code, run.error.content) == ("timeout.total", "the run took longer than 120 s")
    assert run.error.response == "a" * 6
    assert run.seen[-1] == (120.0, "cancelled")


@pytest.mark.parametrize(
    ("name", "script", "code"),
    [
        ("connect", [SILENCE], "timeout.connect"),
        ("first_token", [(0, [SENT]), SILENCE], "timeout.first_token"),
        ("idle", [(0, [SENT, *text("a")]), SILENCE], "timeout.idle"),
        ("total", [(0, [SENT, *text("a")]), SILENCE], "timeout.total"),
    ],
)
async def test_each_is_the_runs_own(autojump_clock: MockClock, name: str, script: list[Line], code: str) -> None:
    run = await ended(*script, **{name: 0.5})
    assert (run.at, run.error.code) == (0.5, code)
    assert " 0.5 s" in run.error.content


async def test_total_counts_from_the_runs_start_though_its_task_comes_late(autojump_clock: MockClock) -> None:
    run = Run("run", spec_for(ScriptedProvider(SILENCE), deadlines=Deadlines(total=5), resume_grace=inf))
    await trio.sleep(2)
    await run.execute()
    assert isinstance(run.log.terminal, Error)
    assert (run.log.terminal.code, trio.current_time()) == ("timeout.total", 5.0)


async def test_a_run_in_time_meets_no_deadline(autojump_clock: MockClock) -> None:
    run = await ended((9.875, [SENT]), (39.75, text("a")), (69.625, text("b")), (99.5, [FinishPiece("stop")]))
    assert run.at == 99.5
    assert isinstance(run.events[-1], GenerationComplete)


# What counts as progress


@pytest.mark.parametrize(
    "piece",
    [TextPiece(""), ReasoningPiece(""), UsagePiece(1, 1), FinishPiece("stop")],
    ids=["empty text", "empty reasoning", "usage", "finish"],
)
async def test_what_is_no_content_does_not_arm_idle_anew(autojump_clock: MockClock, piece: Any) -> None:
    keep_alives: list[Line] = [(float(at), [piece]) for at in range(5, 100, 5)]
    run = await ended((0, [SENT, *text("a")]), *keep_alives)
    assert (run.at, run.error.code) == (30.0, "timeout.idle")


@pytest.mark.parametrize(
    "piece",
    [TextPiece(""), ReasoningPiece(""), UsagePiece(1, 1)],
    ids=["empty text", "empty reasoning", "usage"],
)
async def test_what_is_no_content_is_no_first_token(autojump_clock: MockClock, piece: Any) -> None:
    keep_alives: list[Line] = [(float(at), [piece]) for at in range(6, 100, 5)]
    run = await ended((5, [SENT]), *keep_alives)
    assert (run.at, run.error.code) == (35.0, "timeout.first_token")


async def test_what_is_no_content_does_not_end_the_connect_phase(autojump_clock: MockClock) -> None:
    run = await ended(*[(float(at), text("")) for at in range(20)])
    assert (run.at, run.error.code) == (10.0, "timeout.connect")


async def test_reasoning_is_progress(autojump_clock: MockClock) -> None:
    run = await ended((0, [SENT]), (29, reasoning("hm")), (58, reasoning("so")), SILENCE)
    assert (run.at, run.error.code) == (88.0, "timeout.idle")


async def test_content_among_empty_pieces_is_progress(autojump_clock: MockClock) -> None:
    run = await ended((0, [SENT, *text("a")]), (29, text("", "b", "")), SILENCE)
    assert (run.at, run.error.code) == (59.0, "timeout.idle")


async def test_content_without_word_of_the_request_ends_the_connect_phase(autojump_clock: MockClock) -> None:
    run = await ended((5, text("a")), SILENCE)
    assert (run.at, run.error.code) == (35.0, "timeout.idle")


async def test_each_attempt_waits_anew_for_its_first_token(autojump_clock: MockClock) -> None:
    run = await ended((1, [SENT]), (20, [SENT]), SILENCE)
    assert (run.at, run.error.code) == (50.0, "timeout.first_token")


# A provider that keeps the deadlines of its attempts itself


async def test_a_provider_of_several_attempts_has_no_connect_deadline_of_the_run(autojump_clock: MockClock) -> None:
    run = await ended((0, [AttemptsPiece()]), SILENCE)
    assert (run.at, run.error.code) == (120.0, "timeout.total")


async def test_after_the_first_content_the_run_watches_the_attempt(autojump_clock: MockClock) -> None:
    run = await ended((0, [AttemptsPiece()]), (60, text("a")), SILENCE)
    assert (run.at, run.error.code) == (90.0, "timeout.idle")


async def test_a_provider_of_several_attempts_is_told_the_runs_deadlines(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider()
    deadlines = Deadlines(connect=1.0, first_token=2.0)
    await Run("run", spec_for(provider, deadlines=deadlines)).execute()
    assert provider.requests[0].deadlines == deadlines


# Coincidences


async def test_total_wins_when_idle_ends_at_the_same_time(autojump_clock: MockClock) -> None:
    run = await ended((0, [SENT]), (1, text("a")), SILENCE, total=31.0)
    assert (run.at, run.error.code) == (31.0, "timeout.total")


async def test_total_wins_when_connect_ends_at_the_same_time(autojump_clock: MockClock) -> None:
    run = await ended(SILENCE, total=10.0)
    assert (run.at, run.error.code) == (10.0, "timeout.total")


async def test_grace_wins_when_total_ends_at_the_same_time(autojump_clock: MockClock) -> None:
    spec = spec_for(ScriptedProvider((0, [SENT]), SILENCE), deadlines=Deadlines(total=5.0))
    run = Run("run", spec)
    await run.execute()
    assert run.elapsed == 5.0
    assert run.log.terminal == AgentStopped("disconnect", "", Usage(2, 0, estimated=True))


async def test_a_token_at_the_very_deadline_is_too_late(autojump_clock: MockClock) -> None:
    run = await ended((0, [SENT, *text("a")]), (30, text("b")))
    assert (run.at, run.error.code, run.error.response) == (30.0, "timeout.idle", "a")


@pytest.mark.parametrize("brings_content", [True, False])
async def test_what_a_cancelled_model_still_says_does_not_rename_the_deadline(
    autojump_clock: MockClock, brings_content: bool
) -> None:
    """It was the first token that did not come in time, though it was on its way when the deadline fired."""

    async def answer(emit: Emit) -> None:
        emit([SENT])
        try:
            await trio.sleep_forever()
        finally:
            emit(text("late") if brings_content else [SENT])

    run = Run("run", spec_for(ProgrammedProvider(answer)))
    await run_read_by_one(run)
    assert isinstance(run.log.terminal, Error)
    assert run.log.terminal.code == "timeout.first_token"
    assert run.log.terminal.content == "no first token from the model within 30 s"
    assert run.log.terminal.response == ("late" if brings_content else "")


# The partial text


async def test_gathered_text_is_sealed_before_the_error(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider((0, [SENT]), (1, text("said ")), (2, text("and kept")), SILENCE)
    run = Run("run", spec_for(provider, deadlines=Deadlines(total=3.0)))
    await run.execute()  # without a reader: nothing but the end seals
    events = [entry.event for entry in run.log.entries()]
    assert [type(event) for event in events] == [AgentStarted, TextDelta, Error]
    assert events[1] == TextDelta("said and kept", "step-1")
    assert isinstance(events[2], Error)
    assert events[2].response == "said and kept"


# A provider that fails while it is being cancelled


def failing_in_cleanup(*said: Any) -> Provider:
    async def answer(emit: Emit) -> None:
        emit(said)
        try:
            await trio.sleep_forever()
        finally:
            raise ProviderError("upstream.connection", "the connection broke when it was closed")

    return ProgrammedProvider(answer)


@pytest.mark.parametrize(
    ("said", "total", "at", "code"),
    [
        ((), 120.0, 10.0, "timeout.connect"),
        ((SENT,), 120.0, 30.0, "timeout.first_token"),
        ((SENT, TextPiece("a")), 120.0, 30.0, "timeout.idle"),
        ((SENT, TextPiece("a")), 20.0, 20.0, "timeout.total"),
    ],
)
async def test_a_failure_of_the_cancelled_cleanup_does_not_hide_the_deadline(
    autojump_clock: MockClock, said: tuple[Any, ...], total: float, at: float, code: str
) -> None:
    run = Run("run", spec_for(failing_in_cleanup(*said), deadlines=Deadlines(total=total)))
    got = await run_read_by_one(run)
    assert got[-1][0] == at
    assert isinstance(run.log.terminal, Error)
    assert run.log.terminal.code == code


async def test_nor_does_it_hide_that_nobody_was_reading(autojump_clock: MockClock) -> None:
    run = Run("run", spec_for(failing_in_cleanup(SENT, TextPiece("a"))))
    await run.execute()
    assert isinstance(run.log.terminal, AgentStopped)
    assert run.log.terminal.reason == "disconnect"


@pytest.mark.parametrize(("total", "code"), [(120.0, "timeout.idle"), (20.0, "timeout.total")])
async def test_a_provider_that_swallows_its_cancellation_has_not_answered(
    autojump_clock: MockClock, total: float, code: str
) -> None:
    """A truncated answer must never look complete, whatever a provider does."""

    async def answer(emit: Emit) -> None:
        emit([SENT, *text("half an ans")])
        try:
            await trio.sleep_forever()
        except trio.Cancelled:  # noqa: ASYNC103 - what no provider should do
            return  # noqa: ASYNC104

    run = Run("run", spec_for(ProgrammedProvider(answer), deadlines=Deadlines(total=total)))
    await run_read_by_one(run)
    assert isinstance(run.log.terminal, Error)
    assert run.log.terminal.code == code


# The values


@pytest.mark.parametrize("seconds", [0, -1, -0.0, nan, inf, -inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_deadline_is_a_number_of_seconds_above_zero(name: str, seconds: float) -> None:
    with pytest.raises(ValueError, match=f"deadline {name} "):
        Deadlines(**{name: seconds})
    with pytest.raises(ValueError, match=f"deadline {name} "):
        DeadlineWish(**{name: seconds})


@pytest.mark.parametrize(
    "sent",
    ['{"total":0}', '{"idle":-1}', '{"tool":"5"}', '{"connect":true}', '{"first_token":1e999}', '{"all":1}', "[]"],
)
def test_a_wish_from_outside_is_checked(sent: str) -> None:
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(sent, type=DeadlineWish)


def test_a_wish_from_outside_may_be_whole_seconds() -> None:
    assert msgspec.json.decode('{"total":5,"idle":null}', type=DeadlineWish) == DeadlineWish(total=5.0)


def test_the_defaults_are_those_of_the_design() -> None:
    assert Deadlines() == Deadlines(total=120.0, connect=10.0, first_token=30.0, idle=30.0, tool=30.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_wish_shortens_its_deadline_and_no_other(name: str) -> None:
    shortened = Deadlines().shortened(DeadlineWish(**{name: 2.5}))
    assert shortened == msgspec.structs.replace(Deadlines(), **{name: 2.5})


@pytest.mark.parametrize("name", NAMES)
def test_a_wish_for_longer_is_refused_with_what_is_allowed(name: str) -> None:
    allowed: float = getattr(Deadlines(), name)
    with pytest.raises(
        DeadlineTooLongError, match=f"deadline {name} is {allowed + 0.5:g} s; at most {allowed:g} s"
    ) as it:
        Deadlines().shortened(DeadlineWish(**{name: allowed + 0.5}))
    assert (it.value.name, it.value.allowed) == (name, allowed)


def test_a_wish_for_as_long_or_for_nothing_changes_nothing() -> None:
    assert Deadlines().shortened(DeadlineWish()) == Deadlines()
    assert Deadlines().shortened(DeadlineWish(total=120, idle=30)) == Deadlines()


@pytest.mark.parametrize(("idle", "gap", "most_moves"), [(30.0, 0.05, 20), (30.0, 0.3, 101), (2.0, 0.003, 20)])
async def test_after_quick_pieces_the_idle_deadline_is_never_early_and_at_most_a_hundredth_late(
    autojump_clock: MockClock, idle: float, gap: float, most_moves: int
) -> None:
    moves: list[float] = []
    phases = Phases(Deadlines(idle=idle), moves.append)
    for _ in range(100):
        await trio.sleep(gap)
        phases.enter("idle")
        assert -1e-9 <= phases.due_at - (trio.current_time() + idle) <= min(idle / 100, SLACK_SECONDS) + 1e-9
        assert moves[-1] == phases.due_at
    assert len(moves) <= most_moves


async def test_after_slow_pieces_it_is_exact(autojump_clock: MockClock) -> None:
    phases = Phases(Deadlines(idle=30), lambda _: None)
    for _ in range(10):
        await trio.sleep(2 * SLACK_SECONDS)
        phases.enter("idle")
        assert phases.due_at == trio.current_time() + 30
