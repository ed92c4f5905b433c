"""Whatever a model does and whoever ends the run, in any order of one tick: one end, nothing lost, nothing left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import (
    AgentStopped,
    Deadlines,
    Emit,
    Error,
    Event,
    FinishPiece,
    GenerationComplete,
    LogEntry,
    Piece,
    ProviderError,
    ReasoningDelta,
    ReasoningPiece,
    Run,
    RunLog,
    StreamingConfig,
    TextDelta,
    TextPiece,
    ToolCallPiece,
    UsagePiece,
)

from .scripted import (
    SENT,
    ProgrammedProvider,
    WritingObserver,
    assert_ended_once,
    events_of,
    in_virtual_time,
    spec_for,
)

TICK = 1 / 8


class Bug(Exception):  # noqa: N818 - it is what it says
    """What a provider must not raise."""


@dataclass(frozen=True)
class Model:
    """What a model says, how long its cleanup takes when it is cancelled, and how the cleanup goes."""

    lines: Sequence[tuple[int, Sequence[Piece] | Exception]]
    cleanup_ticks: int
    cleanup: Literal["clean", "failure", "bug", "late words", "swallow"]

    @property
    def text(self) -> str:
        pieces = [piece for _, line in self.lines if not isinstance(line, Exception) for piece in line]
        return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))

    async def answer(self, emit: Emit, seen: list[tuple[float, str]]) -> None:
        seen.append((trio.current_time(), "asked"))
        try:
            for ticks, line in self.lines:
                await trio.sleep(ticks * TICK)
                if isinstance(line, Exception):
                    seen.append((trio.current_time(), "failed"))
                    raise line
                emit(line)
            seen.append((trio.current_time(), "answered"))
        except trio.Cancelled:  # noqa: ASYNC103 - some providers do swallow it
            seen.append((trio.current_time(), "cancelled"))
            if self.cleanup_ticks:
                with trio.move_on_after(self.cleanup_ticks * TICK, shield=True):
                    await trio.sleep_forever()
            if self.cleanup == "failure":
                raise ProviderError("upstream.connection", "broke in cleanup") from None  # noqa: ASYNC104
            if self.cleanup == "bug":
                raise Bug from None  # noqa: ASYNC104
            if self.cleanup == "late words":
                emit([TextPiece("late"), FinishPiece("stop")])
            if self.cleanup != "swallow":
                raise
        finally:
            seen.append((trio.current_time(), "gone"))


@dataclass(frozen=True)
class Act:
    """What is done to the run from outside, and when."""

    tick: int
    what: Literal["stop", "fail", "cancel the surrounding"]


pieces = st.one_of(
    st.just(SENT),
    st.builds(TextPiece, st.text("aé日👋\n", max_size=6)),
    st.builds(TextPiece, st.text("aé日👋\n", max_size=6)),
    st.builds(ReasoningPiece, st.text("hm", max_size=4)),
    st.builds(UsagePiece, st.integers(0, 9), st.integers(0, 9)),
    st.builds(FinishPiece, st.sampled_from(["stop", "length"])),
)
lines = st.one_of(
    st.lists(pieces, max_size=4),
    st.lists(pieces, max_size=4),
    st.lists(pieces, max_size=4),
    st.lists(pieces, max_size=4),
    st.sampled_from(
        [Bug(), ProviderError("upstream.server", "no"), [FinishPiece("error")], [ToolCallPiece(0, "c", "t")]]
    ),
)
models = st.builds(
    Model,
    lines=st.lists(st.tuples(st.integers(0, 12), lines), max_size=15),
    cleanup_ticks=st.sampled_from([0, 0, 0, 1, 5]),
    cleanup=st.sampled_from(["clean", "clean", "failure", "bug", "late words", "swallow"]),
)
acts = st.lists(
    st.builds(Act, st.integers(0, 80), st.sampled_from(["stop", "stop", "fail", "cancel the surrounding"])), max_size=3
)
visits = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=3)
durations = st.sampled_from([TICK, 5 * TICK, 20 * TICK, 20 * TICK, 100.0])
limits = st.builds(Deadlines, total=durations, connect=durations, first_token=durations, idle=durations)
graces = st.sampled_from([0.0, TICK, 8 * TICK, inf])
streamings = st.builds(StreamingConfig, text_buffer_size=st.sampled_from([1, 5, 1000]), flush_after=st.just(4 * TICK))


class Trial:
    """One run with everything that happens to it."""

    def __init__(self, model: Model, deadlines: Deadlines, grace: float, streaming: StreamingConfig) -> None:
        self.model = model
        self.seen: list[tuple[float, str]] = []
        self.observer = WritingObserver()
        provider = ProgrammedProvider(lambda emit: model.answer(emit, self.seen))
        spec = spec_for(provider, deadlines=deadlines, streaming=streaming, resume_grace=grace)
        self.run = Run("run", spec, self.observer)
        self.surrounding = trio.CancelScope()
        self.returned_at = inf
        self.visitors: list[tuple[float, list[tuple[float, LogEntry]]]] = []

    async def execute(self) -> None:
        with self.surrounding:
            await self.run.execute()
        self.returned_at = trio.current_time()

    async def act(self, act: Act) -> None:
        await trio.sleep(act.tick * TICK)
        match act.what:
            case "stop":
                self.run.stop()
            case "fail":
                self.run.fail("draining", "bye")
            case "cancel the surrounding":
                self.surrounding.cancel()

    async def visit(self, arrives: int, stays: int) -> None:
        got: list[tuple[float, LogEntry]] = []
        await trio.sleep(arrives * TICK)
        with self.run.log.attached(), trio.move_on_after(stays * TICK):
            await read_into(self.run.log, got)
        self.visitors.append((trio.current_time(), got))

    def check(self) -> None:
        run, terminal = self.run, self.run.log.terminal
        assert_ended_once(run)
        assert terminal is not None
        said = "".join(event.content for event in events_of(run.log) if isinstance(event, TextDelta))
        assert terminal.response == run.response == said
        assert (self.model.text + "late").startswith(said) or said.endswith("late")
        if isinstance(terminal, GenerationComplete):
            assert said == self.model.text
            assert "answered" in [what for _, what in self.seen]
        self.check_times(terminal)
        self.check_observer(terminal)

    def check_times(self, terminal: Event) -> None:
        """The model is told at the very moment of the end, or before it where its cleanup took a while."""
        cleanup = self.model.cleanup_ticks * TICK
        assert self.run.elapsed <= self.run.spec.deadlines.total + cleanup
        if not self.seen:
            assert isinstance(terminal, AgentStopped | Error)  # ended before the first step
            return
        (asked_at, asked), (ended_at, _), (gone_at, gone) = self.seen[0], self.seen[-2], self.seen[-1]
        assert (asked_at, asked, gone) == (0.0, "asked", "gone")
        assert ended_at <= self.run.elapsed <= gone_at == self.returned_at <= ended_at + cleanup

    def check_observer(self, terminal: Event) -> None:
        tag = str(terminal.__struct_config__.tag)
        story = [what for what in self.observer.story if what != "crashed"]
        assert story in (["started", tag], ["started", "first token", tag])
        content = any(isinstance(event, TextDelta | ReasoningDelta) for event in events_of(self.run.log))
        assert ("first token" in story) == content == (self.run.ttfb is not None)

    def check_visitors(self) -> None:
        for left_at, got in self.visitors:
            assert [entry for _, entry in got] == self.run.log.entries()[: len(got)]
            if left_at > self.run.elapsed and got:
                # Whoever was there at the end, or came after it, has all of it, and had it at once.
                assert got[-1][1].event == self.run.log.terminal
                assert got[-1][0] in (self.run.elapsed, left_at)


async def read_into(log: RunLog, got: list[tuple[float, LogEntry]]) -> None:
    while entries := await log.read(len(got)):
        got += [(trio.current_time(), entry) for entry in entries]


@settings(max_examples=400, deadline=None)
@given(
    model=models,
    deadlines=limits,
    grace=graces,
    streaming=streamings,
    happenings=acts,
    readers=visits,
    seed=st.integers(0, 2**16),
)
def test_one_end_nothing_lost_nothing_left(
    model: Model,
    deadlines: Deadlines,
    grace: float,
    streaming: StreamingConfig,
    happenings: list[Act],
    readers: list[tuple[int, int]],
    seed: int,
) -> None:
    async def main() -> None:
        trial = Trial(model, deadlines, grace, streaming)
        tasks = trio.lowlevel.current_statistics().tasks_living
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trial.execute)
            for act in happenings:
                nursery.start_soon(trial.act, act)
            for arrives, stays in readers:
                nursery.start_soon(trial.visit, arrives, stays)
        trial.check()
        trial.check_visitors()
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert trial.run.log.waiting == {}

    in_virtual_time(main, seed)
