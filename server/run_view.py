"""A run's state as clients see it, from wherever the run is."""

from __future__ import annotations

import msgspec

from engine import Run, Usage
from engine.events import TerminalEvent

from .store.rows import RunStatus, StoredRun


class RunView(msgspec.Struct, frozen=True, kw_only=True):
    """A run's state. Times in milliseconds since its start.

    Attributes:
        last_seq: the number of its newest event; 0 of a run whose events are not kept any more.
        response: the text so far.
        ttfb_ms: until the first content; null before it.
        usage: token counts so far.
        terminal: its last event, once it has ended and while its events are there.
        memory_updates: how often it changed what is remembered.
    """

    run_id: str
    agent_id: str
    status: RunStatus
    last_seq: int
    response: str
    elapsed_ms: float | None
    ttfb_ms: float | None
    usage: Usage | None
    terminal: TerminalEvent | None
    memory_updates: int = 0


def run_view(run: Run) -> RunView:
    """A run of this process as it stands now."""
    terminal = run.log.terminal
    return RunView(
        run_id=run.id,
        agent_id=run.spec.agent_id,
        status="running" if terminal is None else status_of(terminal),
        last_seq=run.log.last_seq,
        response=run.response,
        elapsed_ms=run.elapsed_ms,
        ttfb_ms=run.ttfb_ms,
        usage=run.usage,
        terminal=terminal,
        memory_updates=run.memory_updates,
    )


def stored_run_view(run: StoredRun, last_seq: int = 0, terminal: TerminalEvent | None = None) -> RunView:
    """A run that memory has dropped; what its terminal event says counts, if that is there."""
    return RunView(
        run_id=run.run_id,
        agent_id=run.agent_id,
        status=run.status if terminal is None else status_of(terminal),
        last_seq=last_seq,
        response=(run.response or "") if terminal is None else terminal.response,
        elapsed_ms=run.elapsed_ms,
        ttfb_ms=run.ttfb_ms,
        usage=run.usage if terminal is None else terminal.usage,
        terminal=terminal,
        memory_updates=run.memory_updates or 0,
    )


def status_of(terminal: TerminalEvent) -> RunStatus:
    """How the run ended, by its last event."""
    status: RunStatus = terminal.__struct_config__.tag  # type: ignore[assignment]
    return status
