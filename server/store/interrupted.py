"""Ends runs in the stead of a process that died: one terminal event each, after anything that a client can have seen.

What the run had said is what its journal has. A run that had come to its own end, and whose last events did not reach
the journal any more, gets the end that its row tells; any other gets ``error`` with the code that is given.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from sqlalchemy import Connection, delete, select, update

from engine import Message, Usage
from engine.errors import ErrorCode
from engine.events import (
    AgentStopped,
    Error,
    Event,
    GenerationComplete,
    ReasoningDelta,
    TerminalEvent,
    TextDelta,
    UsageUpdate,
)
from engine.memory import TurnRecord
from engine.provider import ModelRequest
from engine.usage import estimated_usage

from .rows import StoredRun
from .run_events import NewEvents, add_events, page_of_events
from .schema import idempotency_keys, messages, runs
from .turns import find_run, save_turn

_decode = msgspec.json.Decoder(Event).decode
_encode = msgspec.json.Encoder().encode

_TEXTS: dict[ErrorCode, str] = {
    "interrupted": "the server died while it was answering",
    "worker_lost": "the worker that was answering died",
}


def interrupt_runs(c: Connection, now: str) -> int:
    """End every run that has no end; how many were under way. Only for who knows that nobody goes on with any of them.

    Requests that were to start a run and did not come to it may be repeated.
    """
    c.execute(delete(idempotency_keys).where(idempotency_keys.c.run_id.not_in(select(runs.c.run_id))))
    open_events = select(runs.c.run_id, runs.c.status).where(
        runs.c.reserved_seq.is_not(None), runs.c.terminal_seq.is_(None)
    )
    interrupted = 0
    for run_id, status in c.execute(open_events).all():
        end_run(c, run_id, "interrupted", now)
        interrupted += status == "running"
    without_events = update(runs).where(runs.c.status == "running")
    fields = {"status": "error", "error_code": "interrupted", "ended_at": now}
    return interrupted + c.execute(without_events.values(fields)).rowcount


def end_run(c: Connection, run_id: str, code: ErrorCode, now: str) -> bool:
    """End this run, of a process that is surely dead; False, and nothing is changed, if its events have their end."""
    run = find_run(c, run_id)
    if run is None or run.reserved_seq is None or run.terminal_seq is not None:
        return False
    if run.status == "running":
        terminal = _broken_off(c, run, code)
        save_turn(c, _turn(run, terminal), now)
    else:
        terminal = _as_it_ended(run)
    seq = run.reserved_seq + 1
    add_events(c, [NewEvents(run_id, [(seq, _encode(terminal).decode())], seq, run.memory_updates or 0)])
    return True


def _broken_off(c: Connection, run: StoredRun, code: ErrorCode) -> TerminalEvent:
    said: list[str] = []
    thought: list[str] = []
    reported: Usage | None = None
    for event in _events(c, run.run_id):
        match event:
            case TextDelta(content):
                said.append(content)
            case ReasoningDelta(content):
                thought.append(content)
            case UsageUpdate(usage):
                reported = usage
    response = "".join(said)
    asked = c.execute(select(messages.c.content).where(messages.c.run_id == run.run_id, messages.c.role == "user"))
    request = ModelRequest(tuple(Message("user", content) for content in asked.scalars()), "")
    used = estimated_usage(request, response, "".join(thought), reported) if said or thought or reported else None
    return Error(code, _TEXTS.get(code, code), response, used)


def _as_it_ended(run: StoredRun) -> TerminalEvent:
    response = run.response or ""
    usage = run.usage
    match run.status:
        case "done":
            return GenerationComplete(response, run.total_steps or 0, run.elapsed_ms or 0.0, run.ttfb_ms, usage)
        case "stop":
            return AgentStopped(run.reason or "requested", response, usage)
    code = msgspec.convert(run.error_code or "internal", ErrorCode)
    return Error(code, f"the run ended with {code}", response, usage)


def _turn(run: StoredRun, terminal: TerminalEvent) -> TurnRecord:
    return TurnRecord(
        run_id=run.run_id,
        status="error",
        messages=(),
        response=terminal.response,
        usage=terminal.usage,
        total_steps=0,
        elapsed_ms=0.0,
        ttfb_ms=None,
        error_code=terminal.code if isinstance(terminal, Error) else None,
    )


def _events(c: Connection, run_id: str) -> Iterator[Event]:
    after = 0
    while page := page_of_events(c, run_id, after):
        for _, event in page:
            yield _decode(event)
        after = page[-1][0]
