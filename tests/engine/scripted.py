"""Fakes for the engine's tests: models that do as they are told, readers and observers that write down what comes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import TypeAlias

import msgspec
import trio
from trio.testing import MockClock

from engine import (
    BasicAgent,
    Deadlines,
    Emit,
    Event,
    FinishPiece,
    MemoryUse,
    Message,
    ModelRequest,
    Piece,
    Provider,
    ReasoningPiece,
    RequestSentPiece,
    Run,
    RunLog,
    RunSpec,
    StreamingConfig,
    TextPiece,
    Tool,
    ToolCallPiece,
    ToolUse,
    TraceCollector,
)
from engine.events import TERMINAL_EVENT_TYPES
from engine.spec import MAX_RUN_BYTES

Line: TypeAlias = tuple[float, Sequence[Piece] | BaseException]
"""Seconds after the request, and what comes then: the pieces of one read, or an exception."""

Timed: TypeAlias = list[tuple[float, Event]]

SENT = RequestSentPiece()
FOREVER = float("inf")
WALL_TIME = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
TIMESTAMP = "2026-11-22T12:00:00+00:00"
VIRTUAL_DAY_SECONDS = 86_400


def text(*parts: str) -> tuple[Piece, ...]:
    """One read that brought these texts."""
    return tuple(TextPiece(part) for part in parts)


def reasoning(*parts: str) -> tuple[Piece, ...]:
    """One read that brought these parts of the reasoning."""
    return tuple(ReasoningPiece(part) for part in parts)


class ScriptedProvider:
    """Says each line at its time. A line at ``FOREVER`` never comes. ``seen`` tells what became of each request."""

    name = "scripted"

    def __init__(self, *script: Line) -> None:
        self.script = script
        self.requests: list[ModelRequest] = []
        self.seen: list[tuple[float, str]] = []

    async def stream(self, request: ModelRequest, emit: Emit) -> None:
        start = trio.current_time()
        self.requests.append(msgspec.structs.replace(request, progress=None))
        self._saw("asked")
        try:
            for at, line in self.script:
                await trio.sleep_until(start + at)
                if isinstance(line, BaseException):
                    raise line
                emit(line)
        except trio.Cancelled:
            self._saw("cancelled")
            raise
        self._saw("answered")

    async def aclose(self) -> None:
        self._saw("closed")

    def _saw(self, what: str) -> None:
        self.seen.append((trio.current_time(), what))


class ProgrammedProvider:
    """Runs a function as the model, for what a script cannot say."""

    name = "programmed"

    def __init__(self, answer: Callable[[Emit], Awaitable[None]]) -> None:
        self.answer = answer

    async def stream(self, request: ModelRequest, emit: Emit) -> None:
        await self.answer(emit)

    async def aclose(self) -> None:
        """Nothing is open."""


class StepwiseProvider:
    """Plays one script for each request, the last one over and over. ``requests`` has what was asked, with its time."""

    name = "stepwise"

    def __init__(self, *scripts: Sequence[Line]) -> None:
        self.scripts = scripts
        self.requests: list[ModelRequest] = []
        self.asked_at: list[float] = []

    async def stream(self, request: ModelRequest, emit: Emit) -> None:
        start = trio.current_time()
        self.requests.append(msgspec.structs.replace(request, progress=None))
        self.asked_at.append(start)
        for at, line in self.scripts[min(len(self.asked_at), len(self.scripts)) - 1]:
            await trio.sleep_until(start + at)
            if isinstance(line, BaseException):
                raise line
            emit(line)

    async def aclose(self) -> None:
        """Nothing is open."""


def calling(*calls: str, said: str = "", at: float = 0) -> list[Line]:
    """A step that says this and calls tools, each call written ``id name arguments``."""
    pieces: list[Piece] = list(text(said)) if said else []
    for index, call in enumerate(calls):
        call_id, name, arguments = call.split(" ", 2) if call.count(" ") > 1 else (*call.split(" "), "")
        pieces.append(ToolCallPiece(index, call_id, name, arguments))
    return [(at, [*pieces, FinishPiece("tool_calls")])]


def saying(*parts: str, at: float = 0) -> list[Line]:
    """A step that answers with this text."""
    return [(at, [*text(*parts), FinishPiece("stop")])]


class WritingObserver:
    """Writes down each turning point with its time."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, str]] = []
        self.bugs: list[BaseException] = []

    def run_started(self, run: Run) -> None:
        self._saw("started")

    def run_first_token(self, run: Run) -> None:
        self._saw("first token")

    def run_ended(self, run: Run) -> None:
        assert run.log.terminal is not None
        self._saw(str(run.log.terminal.__struct_config__.tag))

    def run_crashed(self, run: Run, bug: BaseException) -> None:
        self.bugs.append(bug)
        self._saw("crashed")

    def _saw(self, what: str) -> None:
        self.seen.append((trio.current_time(), what))

    @property
    def story(self) -> list[str]:
        """What happened, in order, without the times."""
        return [what for _, what in self.seen]


def spec_for(
    provider: Provider,
    *,
    deadlines: Deadlines | None = None,
    streaming: StreamingConfig | None = None,
    resume_grace: float = 5.0,
    max_run_bytes: int = MAX_RUN_BYTES,
    tools: Sequence[Tool] = (),
    tool_use: ToolUse | None = None,
    memory_use: MemoryUse | None = None,
    trace: TraceCollector | None = None,
    on_ended: Callable[[Run], None] | None = None,
) -> RunSpec:
    """The run that asks this provider one short question."""
    return RunSpec(
        agent_id="agent",
        provider=provider,
        request=ModelRequest(messages=(Message("user", "12345678"),), model="model"),
        deadlines=deadlines or Deadlines(),
        streaming=streaming or StreamingConfig(),
        resume_grace=resume_grace,
        max_run_bytes=max_run_bytes,
        tool_use=tool_use or ToolUse(tools=tuple(tools)),
        memory_use=memory_use,
        trace=trace,
        on_ended=on_ended,
    )


def agent_for(provider: Provider, **settings: object) -> BasicAgent:
    """An agent over this provider."""
    return BasicAgent(agent_id="agent", provider=provider, model="model", **settings)  # type: ignore[arg-type]  # any fields


async def read_timed(log: RunLog, after: int = 0) -> Timed:
    """Every event after that number, with the time at which an idle reader got it; returns when the log has ended."""
    got: Timed = []
    with log.attached():
        while entries := await log.read(after):
            after = entries[-1].seq
            got += [(trio.current_time(), entry.event) for entry in entries]
    return got


async def run_read_by_one(run: Run) -> Timed:
    """Execute the run with one idle reader from the start on; what that reader got."""
    got: Timed = []

    async def read() -> None:
        got.extend(await read_timed(run.log))

    async with trio.open_nursery() as nursery:
        with run.log.attached():
            nursery.start_soon(read)
            await run.execute()
    return got


def events_of(log: RunLog) -> list[Event]:
    """The events that are in the log now."""
    return [entry.event for entry in log.entries()]


def in_virtual_time(main: Callable[[], Awaitable[None]], seed: int = 0) -> None:
    """Run to the end on a virtual clock of its own: for properties, where a fixture would be shared by the examples.

    The seed decides the order of tasks in one tick (pytest-trio makes trio's scheduler a function of it).
    """

    async def limited() -> None:
        with trio.fail_after(VIRTUAL_DAY_SECONDS):
            await main()

    trio._core._run._r.seed(seed)
    trio.run(limited, clock=MockClock(autojump_threshold=0))


def assert_ended_once(run: Run) -> None:
    """The log has exactly one terminal event, its last, and numbers without gaps."""
    entries = run.log.entries()
    terminals = [entry.event for entry in entries if isinstance(entry.event, TERMINAL_EVENT_TYPES)]
    assert terminals == [entries[-1].event] == [run.log.terminal]
    assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
    assert run.log.ended
    assert run.ended_at is not None
