"""Runs: their state, their events again, stop and forget, their trace."""

from __future__ import annotations

from typing import Any

import msgspec
import trio
from quart import Response

from engine import Run, Usage
from engine.events import TerminalEvent
from engine.run import SAVE_SECONDS

from .api_chat import run_headers
from .errors import ApiError, not_found
from .routing import API, STREAM, Call, Route
from .sse import EventStreamBody, requested_cursor, stream_response
from .store import turns
from .store.rows import RunStatus, StoredRun
from .store.run_texts import drop_response

STOP_SECONDS = SAVE_SECONDS + 1.0
"""How long a stop waits for the end of an answer that is being kept."""


class RunView(msgspec.Struct, frozen=True, kw_only=True):
    """A run's state. Times in milliseconds since its start.

    Attributes:
        last_seq: the number of its newest event; 0 of a run that memory has dropped and the store still knows.
        response: the text so far.
        ttfb_ms: until the first content; null before it.
        usage: token counts so far.
        terminal: its last event, once it has ended and while its events are there.
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


class EventsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From where on the events are read.

    Attributes:
        after: the number of the last event that the reader has; without it, or ``Last-Event-ID``, all are sent.
    """

    after: int = 0


def find_run(call: Call[Any, Any]) -> Run | None:
    """The run in memory that the path names, if it is the caller's to see."""
    run = call.services.supervisor.find(call.ids["run_id"])
    return run if run is not None and call.caller.may_see(run.spec.owner.tenant_id, run.spec.owner.user_id) else None


def find_live_run(call: Call[Any, Any]) -> Run:
    """As ``find_run``.

    Raises:
        ApiError: 404, there is none, or none of the caller's.
    """
    run = find_run(call)
    if run is None:
        raise not_found("run", call.ids["run_id"])
    return run


async def find_stored_run(call: Call[Any, Any]) -> StoredRun:
    """The run that the path names as the store knows it.

    Raises:
        ApiError: 404, there is none, or none of the caller's; 503, the store does not answer.
    """
    run_id = call.ids["run_id"]
    run = None if call.services.database is None else await call.services.read(turns.find_run, run_id)
    if run is None or not call.caller.may_see(run.tenant_id, run.user_id):
        raise not_found("run", run_id)
    return run


async def get_run(call: Call[None, None]) -> RunView:
    """The run's state."""
    run = find_run(call)
    return stored_run_view(await find_stored_run(call)) if run is None else run_view(run)


async def get_run_events(call: Call[None, EventsQuery]) -> Response:
    """The run's events from a number on, then live."""
    run = find_run(call)
    if run is None:
        await find_stored_run(call)
        raise ApiError(410, "GONE", "the run's events are no longer kept; its state is")
    cursor = requested_cursor(call.request, run.log)
    if run.log.ended and cursor == run.log.last_seq:
        return Response(b"", status=204, headers={"Cache-Control": "no-store"})
    body = b"" if call.request.method == "HEAD" else EventStreamBody(run.log, cursor)
    return stream_response(body, headers=run_headers(run))


async def stop_run(call: Call[None, None]) -> RunView:
    """Stop the run, keeping what it has said. An answer that is whole and just being kept is waited for instead."""
    run = find_run(call)
    if run is None:
        return stored_run_view(await find_stored_run(call))
    run.stop()
    with trio.move_on_after(STOP_SECONDS):
        await run.log.wait_ended()
    return run_view(run)


async def forget_run(call: Call[None, None]) -> None:
    """Stop the run, drop its events, and its answer in the store; what was said stays in its session."""
    run = find_run(call)
    if run is None:
        await find_stored_run(call)
    else:
        call.services.supervisor.forget(run)
    if call.services.database is not None:
        await call.services.write(drop_response, call.ids["run_id"])


async def get_run_trace(call: Call[None, None]) -> dict[str, Any]:
    """The run's spans as a tree."""
    run_id = find_live_run(call).id
    tree = None if call.services.traces is None else call.services.traces.as_tree(run_id)
    if tree is None:
        raise not_found("trace of run", run_id)
    return tree


def run_view(run: Run) -> RunView:
    """The run as it stands now."""
    terminal = run.log.terminal
    return RunView(
        run_id=run.id,
        agent_id=run.spec.agent_id,
        status="running" if terminal is None else terminal.__struct_config__.tag,  # type: ignore[arg-type]
        last_seq=run.log.last_seq,
        response=run.response,
        elapsed_ms=run.elapsed_ms,
        ttfb_ms=run.ttfb_ms,
        usage=run.usage,
        terminal=terminal,
    )


def stored_run_view(run: StoredRun) -> RunView:
    """A run that memory has dropped."""
    usage = None
    if run.input_tokens is not None and run.output_tokens is not None:
        usage = Usage(run.input_tokens, run.output_tokens)
    return RunView(
        run_id=run.run_id,
        agent_id=run.agent_id,
        status=run.status,
        last_seq=0,
        response=run.response or "",
        elapsed_ms=run.elapsed_ms,
        ttfb_ms=run.ttfb_ms,
        usage=usage,
        terminal=None,
    )


_PATH = f"{API}/runs/{{run_id}}"

ROUTES = (
    Route(method="GET", path=_PATH, handler=get_run, summary="A run's state", tag="Runs", answer=RunView),
    Route(
        method="DELETE",
        path=_PATH,
        handler=forget_run,
        summary="Stop a run and forget its events and its answer",
        tag="Runs",
        status=204,
    ),
    Route(
        method="GET",
        path=f"{_PATH}/events",
        handler=get_run_events,
        summary="A run's events after a number, then live",
        tag="Runs",
        query=EventsQuery,
        raw_query=True,
        answer=STREAM,
        also={204: "The run is over, and all its events were delivered before."},
        headers={"Last-Event-ID": "The id of the last event that the reader has; what a browser sends by itself."},
        refusals=(410,),
    ),
    Route(
        method="POST",
        path=f"{_PATH}/stop",
        handler=stop_run,
        summary="Stop a run, keeping what it has said; after its end it changes nothing",
        tag="Runs",
        answer=RunView,
    ),
    Route(
        method="GET",
        path=f"{_PATH}/trace",
        handler=get_run_trace,
        summary="Where a run's time went: its spans as a tree",
        tag="Runs",
        answer=dict[str, Any],
    ),
)
