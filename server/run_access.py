"""The run that a request means, found for its caller alone, and the response that reads it again."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from quart import Response

from engine.log import EventLog
from engine.memory import Owner

from .errors import RETRY_AFTER_SECONDS, ApiError, not_found
from .routing import API, Call
from .run_directory import ElsewhereError, EventsAwayError, GoneError, RunHandle, SourceUnavailableError
from .sse import EventStreamBody, requested_cursor, stream_response


async def find_run(call: Call[Any, Any], run_id: str | None = None) -> RunHandle:
    """The run of that id, or the one that the path names.

    Raises:
        ApiError: 404, there is none, or none of the caller's; 410, its events are not kept any more; 503, who would
            have it does not answer.
    """
    try:
        return await find_run_or_state(call, run_id)
    except GoneError as gone:
        details = {"run_id": gone.view.run_id, "status": gone.view.status, "state": f"{API}/runs/{gone.view.run_id}"}
        raise ApiError(410, "GONE", "the run's events are no longer kept; its state is", details) from gone
    except ElsewhereError as elsewhere:
        raise unavailable("another server has the run") from elsewhere


async def find_run_or_state(call: Call[Any, Any], run_id: str | None = None) -> RunHandle:
    """As ``find_run``, for who can do without the events.

    Raises:
        GoneError, ElsewhereError: the run is the caller's to see, and its events are not here.
        ApiError: as ``find_run``.
    """
    run_id = call.ids["run_id"] if run_id is None else run_id
    try:
        run = await call.services.runs.find(run_id)
    except SourceUnavailableError as error:
        raise unavailable("it cannot be told now where the run is") from error
    except EventsAwayError as away:
        _check_owner(call, run_id, away.owner)
        raise
    _check_owner(call, run_id, None if run is None else run.owner)
    assert run is not None, "it has an owner"
    return run


def _check_owner(call: Call[Any, Any], run_id: str, owner: Owner | None) -> None:
    """A run of somebody else's looks like one that is not there."""
    if owner is None or not call.caller.may_see(owner.tenant_id, owner.user_id):
        raise not_found("run", run_id)


def unavailable(message: str) -> ApiError:
    """503: what is needed does not answer now."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ApiError(503, "SERVICE_UNAVAILABLE", message, headers=headers)


def events_response(call: Call[Any, Any], run: RunHandle) -> Response | EventStreamBody:
    """The run's events after the cursor that the request brings, then live; 204 once there will be none.

    Raises:
        ApiError: 400, that is no cursor of this run's.
    """
    cursor = requested_cursor(call.request, run.log)
    if run.log.ended and cursor == run.log.last_seq:
        return Response(b"", status=204, headers={"Cache-Control": "no-store", **run_headers(run)})
    if call.request.method == "HEAD":
        return stream_response(b"", headers=run_headers(run))
    return EventStreamBody(run.log, cursor, run_headers(run))


async def wait_known(call: Call[Any, Any], run_id: str, log: EventLog | None) -> None:
    """Before the id of a run, or a batch, is told: until any worker can be asked for it.

    A client that goes meanwhile leaves as a reader of it would.
    """
    if call.services.shared_log is None:
        return
    try:
        await call.services.shared_log.wait_known(run_id)
    except BaseException:
        with nullcontext() if log is None else log.attached():
            raise


def run_headers(run: RunHandle) -> dict[str, str]:
    """The headers that tell which run a response is of."""
    location = f"{API}/runs/{run.run_id}/events"
    return {"X-Run-Id": run.run_id, "X-Session-Id": run.owner.session_id, "Location": location}
