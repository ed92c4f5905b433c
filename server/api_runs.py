"""Runs: their state, their events again, stop and forget, their trace."""

from __future__ import annotations

from typing import Any

import msgspec
from quart import Response, request

from engine.events import Error, TerminalEvent

from .edge import RangeView, owners_range
from .errors import ApiError
from .remote_log import RemoteLog
from .routing import API, STREAM, Call, Route
from .run_access import events_response, find_run, find_run_or_state, unavailable
from .run_directory import ElsewhereError, EventsAwayError, GoneError, SourceUnavailableError
from .run_view import RunView, run_view
from .sse import EventStreamBody
from .store.run_texts import drop_response

__all__ = ["ROUTES", "EventsQuery", "RunView", "run_view"]


class EventsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which events are read.

    Attributes:
        after: the number of the last event that the reader has; without it, or ``Last-Event-ID``, all are sent.
        until: the last number of a range; only an ended run has ranges, and caches may keep them.
    """

    after: int = 0
    until: int | None = None


async def get_run(call: Call[None, None]) -> RunView:
    """The run's state."""
    try:
        return (await find_run_or_state(call)).view()
    except EventsAwayError as away:
        return away.view


async def get_run_events(call: Call[None, EventsQuery]) -> Response | EventStreamBody:
    """The run's events from a number on, then live; or those of a range, for good."""
    run = await find_run(call)
    if "until" in call.request.args:
        return await owners_range(request, run.log, call.services.database)
    return events_response(call, run)


async def stop_run(call: Call[None, None]) -> RunView:
    """Stop the run, keeping what it has said. An answer that is whole and just being kept is waited for instead."""
    try:
        run = await find_run_or_state(call)
    except GoneError as gone:
        return gone.view  # it has ended
    except ElsewhereError as elsewhere:
        raise unavailable("another server has the run") from elsewhere
    await run.stop()
    return run.view()


async def forget_run(call: Call[None, None]) -> None:
    """Stop the run, drop its events and the response that the store keeps; what was said stays in its session."""
    try:
        run = await find_run_or_state(call)
        await run.forget()
    except GoneError:
        pass  # they are
    except ElsewhereError as elsewhere:
        raise unavailable("another server has the run") from elsewhere
    except SourceUnavailableError as error:
        raise unavailable("the store that keeps the run's events does not answer") from error
    if call.services.database is not None:
        await call.services.write(drop_response, call.ids["run_id"])


async def get_run_trace(call: Call[None, None]) -> dict[str, Any]:
    """The run's spans as a tree: the worker that ran it keeps them, in memory."""
    try:
        run = await find_run_or_state(call)
        elsewhere = isinstance(run.log, RemoteLog) and not was_lost(run.log.terminal)
    except EventsAwayError as away:
        elsewhere = isinstance(away, ElsewhereError)
    tree = None if call.services.traces is None else call.services.traces.as_tree(call.ids["run_id"])
    if tree is not None:
        return tree
    if elsewhere:
        raise unavailable("another worker ran it, and has its trace; ask again to come to that one")
    raise ApiError(410, "GONE", "the run's trace is not kept here, or not any more", {"run_id": call.ids["run_id"]})


def was_lost(terminal: TerminalEvent | None) -> bool:
    """Whether that is the end of a run whose worker died, with all that it had in memory."""
    return isinstance(terminal, Error) and terminal.code == "worker_lost"


_PATH = f"{API}/runs/{{run_id}}"

ROUTES = (
    Route(method="GET", path=_PATH, handler=get_run, summary="A run's state", tag="Runs", answer=RunView),
    Route(
        method="DELETE",
        path=_PATH,
        handler=forget_run,
        summary="Stop a run and drop its events and the kept response; its session keeps what was said",
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
        answer_json=RangeView,
        also={
            204: "The run is over, and all its events were delivered before.",
            304: "You have this range.",
        },
        headers={
            "Last-Event-ID": "The id of the last event that the reader has; what a browser sends by itself.",
            "If-None-Match": "The ETag of a range that you have.",
        },
        refusals=(406, 409, 410),
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
        refusals=(410,),
    ),
)
