"""Batches: many runs started by one request and streamed over one connection, as one log."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from quart import Response

from .batch_log import BatchRefusal
from .batch_runs import batch_of_request, find_batch, gone
from .batch_start import BatchRequest
from .batches import BatchHandle
from .repeats import ResumeQuery
from .routing import API, STREAM, Call, Route
from .run_access import unavailable
from .run_directory import ElsewhereError, GoneError, SourceUnavailableError
from .sse import EventStreamBody, requested_cursor, stream_response
from .store.rows import RunStatus


class BatchedRunView(msgspec.Struct, frozen=True, kw_only=True):
    """A run of a batch.

    Attributes:
        status: null of a run of which nothing is known any more.
    """

    index: int
    run_id: str
    agent_id: str
    session_id: str
    status: RunStatus | None


class BatchView(msgspec.Struct, frozen=True, kw_only=True):
    """A batch's state.

    Attributes:
        status: whether any of its runs is under way.
        last_seq: the number of its newest frame; 0 if that is not known any more.
        refused: the requests that were not started.
    """

    batch_id: str
    status: Literal["running", "done"]
    last_seq: int
    runs: list[BatchedRunView]
    refused: list[BatchRefusal]


async def batch_stream(call: Call[BatchRequest, None]) -> Response:
    """Start the runs, or join a batch, and stream their events."""
    return _events(call, await batch_of_request(call))


async def get_batch(call: Call[None, None]) -> BatchView:
    """The batch's state."""
    return await _view(call, await find_batch(call, call.ids["batch_id"]))


async def get_batch_events(call: Call[None, ResumeQuery]) -> Response:
    """The batch's events from a number on, then live."""
    return _events(call, await find_batch(call, call.ids["batch_id"]))


def _events(call: Call[Any, Any], batch: BatchHandle) -> Response:
    log = batch.log
    if log is None:
        raise gone(batch)
    cursor = requested_cursor(call.request, log, "batch")
    if log.ended and cursor == log.last_seq:
        return Response(b"", status=204, headers={"Cache-Control": "no-store", **_headers(batch.batch_id)})
    body = b"" if call.request.method == "HEAD" else EventStreamBody(log, cursor)
    return stream_response(body, headers=_headers(batch.batch_id))


async def stop_batch(call: Call[None, None]) -> BatchView:
    """Stop every run of the batch, keeping what they have said."""
    batch = await find_batch(call, call.ids["batch_id"])
    try:
        await batch.stop()
    except SourceUnavailableError as error:
        raise unavailable("the worker that has the batch cannot be reached") from error
    return await _view(call, batch)


async def _view(call: Call[None, None], batch: BatchHandle) -> BatchView:
    runs = [
        BatchedRunView(status=status, **msgspec.structs.asdict(run))
        for run, status in zip(batch.runs, await _statuses(call, batch), strict=True)
    ]
    status: Literal["running", "done"] = "running" if any(run.status == "running" for run in runs) else "done"
    return BatchView(
        batch_id=batch.batch_id, status=status, last_seq=batch.last_seq, runs=runs, refused=list(batch.refusals)
    )


async def _statuses(call: Call[None, None], batch: BatchHandle) -> list[RunStatus | None]:
    """How each of its runs stands; where the batch does not know, the run itself is asked for, wherever it is."""
    statuses = batch.statuses()
    try:
        for index, status in enumerate(statuses):
            if status is None:
                statuses[index] = await _status(call, batch.runs[index].run_id)
    except SourceUnavailableError:
        pass  # nobody can tell now
    return statuses


async def _status(call: Call[None, None], run_id: str) -> RunStatus | None:
    try:
        run = await call.services.runs.find(run_id)
    except ElsewhereError as elsewhere:
        return elsewhere.view.status
    except GoneError as gone_run:  # of a forgotten one nobody knows how it ended
        return None if gone_run.view.status == "running" else gone_run.view.status
    return None if run is None else run.view().status


def _headers(batch_id: str) -> dict[str, str]:
    return {"X-Batch-Id": batch_id, "Location": f"{API}/batch/{batch_id}/events"}


_PATH = f"{API}/batch/{{batch_id}}"
_HEADERS = {"X-Batch-Id": "The batch's id.", "Location": "Where the batch's events can be read again."}

ROUTES = (
    Route(
        method="POST",
        path=f"{API}/batch/stream",
        handler=batch_stream,
        summary="Start several runs and stream them over one connection",
        tag="Batches",
        body=BatchRequest,
        answer=STREAM,
        frames="BatchEvent",
        answer_headers=_HEADERS,
        also={204: "The batch is over, and all its events were delivered before."},
        query=ResumeQuery,
        raw_query=True,
        headers={
            "Idempotency-Key": "Requests with the same key and body are one batch: a repeated one joins it.",
            "Last-Event-ID": "The id of the last event that the client has: its batch is read on, and none started.",
        },
        refusals=(404, 409, 410),
        example={"requests": [{"agent_id": "demo", "message": "Hi"}, {"agent_id": "demo", "message": "Hello"}]},
    ),
    Route(method="GET", path=_PATH, handler=get_batch, summary="A batch's state", tag="Batches", answer=BatchView),
    Route(
        method="GET",
        path=f"{_PATH}/events",
        handler=get_batch_events,
        summary="A batch's events after a number, then live",
        tag="Batches",
        query=ResumeQuery,
        raw_query=True,
        answer=STREAM,
        frames="BatchEvent",
        answer_headers=_HEADERS,
        also={204: "All its runs are over, and all its events were delivered before."},
        headers={"Last-Event-ID": "The id of the last event that the reader has; what a browser sends by itself."},
        refusals=(410,),
    ),
    Route(
        method="POST",
        path=f"{_PATH}/stop",
        handler=stop_batch,
        summary="Stop every run of a batch, keeping what they have said",
        tag="Batches",
        answer=BatchView,
    ),
)
