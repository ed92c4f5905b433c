"""Ends runs in the stead of a process that died: one terminal event each, after anything that a client can have seen.

What the run had said is what its journal has, and what others have of it. A run that had come to its own end, and whose
last events did not reach the journal any more, gets the end that its row tells; any other gets ``error`` with the code
that is given. An end that is in the store is the run's for good: who comes later gets that one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
from sqlalchemy import Connection, and_, delete, or_, select, update

from engine import Message, Usage
from engine.errors import ErrorCode
from engine.events import (
    TERMINAL_EVENT_TYPES,
    AgentStopped,
    Error,
    Event,
    GenerationComplete,
    ReasoningDelta,
    TerminalEvent,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    UsageUpdate,
)
from engine.memory import TurnRecord
from engine.provider import ModelRequest
from engine.usage import estimated_usage

from .recent_events import settle_recent
from .rows import StoredRun
from .run_events import NewEvents, add_events, last_seq_of, page_of_events
from .schema import idempotency_keys, messages, run_events, runs
from .turns import find_run, keep_said, save_turn

_decode = msgspec.json.Decoder(Event).decode
_encode = msgspec.json.Encoder().encode

LOST_TEXT = "the worker that was answering died"
_TEXTS: dict[ErrorCode, str] = {"interrupted": "the server died while it was answering", "worker_lost": LOST_TEXT}


class Ending(msgspec.Struct, frozen=True):
    """How a run ended, as the store tells it for good.

    Attributes:
        missing: the events that who asked did not know, numbers with their JSON, in order, the terminal one last; none
            if the end that was brought is the run's.
        facts: what else is known of it, as a run's hash in Redis says it.
    """

    missing: Sequence[tuple[int, str]]
    facts: dict[str, str]


def interrupt_runs(c: Connection, now: str) -> int:
    """End every run that has no end; how many were under way. Only for who knows that nobody goes on with any of them.

    Requests that were to start a run and did not come to it may be repeated.
    """
    c.execute(delete(idempotency_keys).where(idempotency_keys.c.run_id.not_in(select(runs.c.run_id))))
    open_events = select(runs.c.run_id, runs.c.status).where(
        runs.c.reserved_seq.is_not(None), runs.c.terminal_seq.is_(None)
    )
    settle_recent(c)
    interrupted = 0
    for run_id, status in c.execute(open_events).all():
        _end_run(c, run_id, "interrupted", now)
        interrupted += status == "running"
    without_events = and_(
        runs.c.status == "running", or_(runs.c.reserved_seq.is_(None), runs.c.terminal_seq.is_not(None))
    )
    for run_id in c.execute(select(runs.c.run_id).where(without_events)).scalars().all():
        keep_said(c, run_id)
    fields = {"status": "error", "error_code": "interrupted", "ended_at": now}
    return interrupted + c.execute(update(runs).where(without_events).values(fields)).rowcount


def end_run(
    c: Connection, run_id: str, code: ErrorCode, now: str, known: Sequence[tuple[int, str]] = ()
) -> Ending | None:
    """End this run, of a process that is surely dead, unless it has ended; None if the store keeps none of its events.

    ``known`` is what somebody else has of it, from the first event on: the store gets what it lacks of that. If the
    last one is a terminal event, clients may have seen it already: it becomes the end, without what the store has more.
    """
    settle_recent(c)
    return _end_run(c, run_id, code, now, known)


def _end_run(
    c: Connection, run_id: str, code: ErrorCode, now: str, known: Sequence[tuple[int, str]] = ()
) -> Ending | None:
    run = _held_run(c, run_id)
    if run is None or run.reserved_seq is None:
        return None
    last, data = known[-1] if known else (0, "")
    if run.terminal_seq is None:
        terminal = _terminal_of(data)
        if terminal is None:
            _make_end(c, run, known, code, now)
        else:
            _take_end(c, run, known, terminal, now)
    run = find_run(c, run_id)
    assert run is not None, "its row is held"
    return Ending(list(_events(c, run_id, last)), _facts(run))


def _held_run(c: Connection, run_id: str) -> StoredRun | None:
    """The run; who else would write its events or its end waits until this is committed."""
    c.execute(select(runs.c.run_id).where(runs.c.run_id == run_id).with_for_update(key_share=True))
    return find_run(c, run_id)


def _make_end(c: Connection, run: StoredRun, known: Sequence[tuple[int, str]], code: ErrorCode, now: str) -> None:
    assert run.reserved_seq is not None, "its events are kept"
    kept = last_seq_of(c, run.run_id)
    news = [(seq, event) for seq, event in known if seq > kept]
    add_events(c, [NewEvents(run.run_id, news)])
    if run.status == "running":
        terminal = _broken_off(c, run, code, kept)
        save_turn(c, _turn(run, terminal), now)
    else:
        terminal = _as_it_ended(run)
    seq = run.reserved_seq + 1
    add_events(c, [NewEvents(run.run_id, [(seq, _encode(terminal).decode())], seq, run.memory_updates or 0)])


def _take_end(
    c: Connection, run: StoredRun, known: Sequence[tuple[int, str]], terminal: TerminalEvent, now: str
) -> None:
    """Have exactly these events, the terminal one included."""
    seq = known[-1][0]
    before = known[-2][0] if len(known) > 1 else 0
    c.execute(delete(run_events).where(run_events.c.run_id == run.run_id, run_events.c.seq > before))
    kept = last_seq_of(c, run.run_id)
    news = [(number, event) for number, event in known if number > kept]
    save_turn(c, _turn(run, terminal), now)
    add_events(c, [NewEvents(run.run_id, news, seq, run.memory_updates or 0)])


def _broken_off(c: Connection, run: StoredRun, code: ErrorCode, journalled: int) -> TerminalEvent:
    """How a run ends that had come to no end; events after ``journalled`` are newer than what its row says."""
    said: list[str] = []
    thought: list[str] = []
    called: list[str] = []
    reported: Usage | None = None
    reported_at = 0
    for seq, data in _events(c, run.run_id):
        match _decode(data):
            case TextDelta(content):
                said.append(content)
            case ReasoningDelta(content):
                thought.append(content)
            case ToolCallStart(_, name, _, arguments):
                called += (name, "" if arguments is None else _encode(arguments).decode())
            case ToolCallDelta(_, fragment):
                called.append(fragment)
            case UsageUpdate(usage):
                reported, reported_at = usage, seq
    response = "".join(said)
    sent = None if reported_at > journalled else run.input_tokens
    if sent is None and not (said or thought or called or reported):
        return Error(code, _TEXTS.get(code, code), response)
    used = estimated_usage(_request(c, run.run_id), response + "".join(called), "".join(thought), reported)
    if sent is not None and sent != used.input_tokens:
        used = msgspec.structs.replace(used, input_tokens=sent, estimated=True)
    return Error(code, _TEXTS.get(code, code), response, used)


def _request(c: Connection, run_id: str) -> ModelRequest:
    """What is known of what was sent, where the row does not say how much it was: the user's message."""
    asked = c.execute(select(messages.c.content).where(messages.c.run_id == run_id, messages.c.role == "user"))
    return ModelRequest(tuple(Message("user", content) for content in asked.scalars()), "")


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
    """What such a run leaves behind; its times are those of the last time that its process wrote."""
    return TurnRecord(
        run_id=run.run_id,
        status="error",
        messages=(),
        response=terminal.response,
        usage=terminal.usage,
        total_steps=0,
        elapsed_ms=run.elapsed_ms or 0.0,
        ttfb_ms=run.ttfb_ms,
        error_code=terminal.code if isinstance(terminal, Error) else None,
    )


def _terminal_of(data: str) -> TerminalEvent | None:
    event = _decode(data) if data else None
    return event if isinstance(event, TERMINAL_EVENT_TYPES) else None


def _facts(run: StoredRun) -> dict[str, str]:
    facts: dict[str, str] = {"status": run.status}
    if run.elapsed_ms is not None:
        facts["elapsed_ms"] = repr(run.elapsed_ms)
    if run.ttfb_ms is not None:
        facts["ttfb_ms"] = repr(run.ttfb_ms)
    return facts


def _events(c: Connection, run_id: str, after: int = 0) -> Iterator[tuple[int, str]]:
    while page := page_of_events(c, run_id, after):
        yield from page
        after = page[-1][0]
