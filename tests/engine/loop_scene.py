"""Runs of several steps, for the tests of the loop: started without a reader, and what is found in their logs."""

from __future__ import annotations

from math import inf
from typing import Any

import trio

from engine import (
    Error,
    FinishPiece,
    GenerationComplete,
    Piece,
    Provider,
    Run,
    RunSpec,
    StepComplete,
    TextDelta,
    ToolCallComplete,
)

from .fake_guests import FakeTool
from .scripted import Line, StepwiseProvider, assert_ended_once, events_of, saying, spec_for

REFUSED = "not called: no more tools may be called for this answer"


def lasting(provider: Provider, **settings: Any) -> RunSpec:
    """A run that needs no reader, unless the settings say so."""
    return spec_for(provider, **{"resume_grace": inf, **settings})


async def completed(run: Run) -> GenerationComplete:
    """Execute the run; its ``done``."""
    await run.execute()
    assert_ended_once(run)
    assert isinstance(run.log.terminal, GenerationComplete), run.log.terminal
    return run.log.terminal


async def failed(run: Run) -> Error:
    """Execute the run; its ``error``."""
    await run.execute()
    assert_ended_once(run)
    assert isinstance(run.log.terminal, Error), run.log.terminal
    return run.log.terminal


def said_in(run: Run) -> str:
    return "".join(event.content for event in events_of(run.log) if isinstance(event, TextDelta))


def outcomes_of(run: Run) -> list[tuple[str, str, object]]:
    """The calls that were completed, in the order of that."""
    events = [event for event in events_of(run.log) if isinstance(event, ToolCallComplete)]
    return [(event.call_id, event.status, event.result) for event in events]


def steps_of(run: Run) -> list[StepComplete]:
    return [event for event in events_of(run.log) if isinstance(event, StepComplete)]


async def run_with(tool: FakeTool, *reads: list[Piece], finish: Any = "tool_calls") -> tuple[Run, StepwiseProvider]:
    """A run whose first step is these reads, whose second answers."""
    script: list[Line] = [*((0, read) for read in reads), (0, [FinishPiece(finish)])]
    provider = StepwiseProvider(script, saying("x"))
    run = Run("run", lasting(provider, tools=[tool]))
    await run.execute()
    assert_ended_once(run)
    return run, provider


def start_in(nursery: trio.Nursery, run: Run) -> trio.CancelScope:
    """Execute the run in a task of the nursery; the scope cancels it from outside."""
    surrounding = trio.CancelScope()

    async def execute() -> None:
        with surrounding:
            await run.execute()

    nursery.start_soon(execute)
    return surrounding
