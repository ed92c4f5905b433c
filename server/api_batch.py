"""Batches: many runs started by one request and streamed over one connection, as one log."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
import trio
from msgspec import Meta
from quart import Response

from engine import Run
from engine.supervisor import random_run_id

from .api_chat import start_run
from .api_runs import EventsQuery
from .batch_log import Batch, BatchedRun, BatchLog, BatchRefusal, BatchStarted
from .batches import BatchGoneError
from .errors import ApiError, draining, not_found
from .requests import ChatRequest, OnDisconnect
from .routing import API, PATH_IDS, STREAM, Call, Route
from .run_view import run_view
from .sse import EventStreamBody, requested_cursor, stream_response
from .store.rows import RunStatus

MAX_REQUESTS = 32

START_SECONDS = 4.0
"""What starting all of a batch may take: less than a run waits for its first reader, who comes once all have begun."""


class BatchedRequest(ChatRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message of a batch, and the agent that it is for.

    Attributes:
        on_disconnect: as of a chat; null is as the batch says.
    """

    agent_id: str
    on_disconnect: OnDisconnect | None = None  # type: ignore[assignment]  # read by ``chat`` alone

    def chat(self, on_disconnect: OnDisconnect) -> ChatRequest:
        """The request as one of its own; ``on_disconnect`` counts if it names none."""
        fields = {name: getattr(self, name) for name in ChatRequest.__struct_fields__}
        return ChatRequest(**fields | {"on_disconnect": self.on_disconnect or on_disconnect})


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Messages to agents that are answered at once.

    Attributes:
        requests: each starts a run of its own.
        on_disconnect: for those that name none: what becomes of a run when its last reader leaves.
    """

    requests: Annotated[list[BatchedRequest], Meta(min_length=1, max_length=MAX_REQUESTS)]
    on_disconnect: OnDisconnect = "grace"


class BatchedRunView(msgspec.Struct, frozen=True, kw_only=True):
    """A run of a batch.

    Attributes:
        status: null of a run that memory has dropped; its own state may still be known.
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
        last_seq: the number of its newest frame that was read.
        refused: the requests that were not started.
    """

    batch_id: str
    status: Literal["running", "done"]
    last_seq: int
    runs: list[BatchedRunView]
    refused: list[BatchRefusal]


async def batch_stream(call: Call[BatchRequest, None]) -> Response:
    """Start the runs and stream their events; a client that has events of a batch already reads on instead."""
    event_ids = [event_id for event_id in call.request.headers.getlist("Last-Event-ID") if event_id]
    if event_ids:
        return _events(call, event_ids[0].rpartition(".")[0])
    for index, request in enumerate(call.body.requests):
        _check(index, request.chat(call.body.on_disconnect))
    if call.services.supervisor.draining:
        raise draining()
    log = await _start_batch(call)
    return stream_response(EventStreamBody(log, after=0), headers=_headers(log.run_id))


def _check(index: int, request: ChatRequest) -> None:
    try:
        request.check()
    except ApiError as error:
        details = {"field": f"requests[{index}].{error.details['field']}"} if error.details else {"index": index}
        message = f"requests[{index}]: {error.message}"
        raise ApiError(error.status, error.code, message, details) from error


async def _start_batch(call: Call[BatchRequest, None]) -> BatchLog:
    """Start one after the other, so that of two in one session the second comes second; what cannot start is told."""
    runs: list[Run] = []
    started: list[BatchedRun] = []
    refusals: list[BatchRefusal] = []
    deadline = trio.current_time() + START_SECONDS
    for index, request in enumerate(call.body.requests):
        run = await _start_one(call, index, deadline)
        if isinstance(run, ApiError):
            refusals.append(BatchRefusal(index, request.agent_id, run.code, run.message, run.details))
        else:
            runs.append(run)
            started.append(BatchedRun(index, run.id, run.spec.agent_id, run.spec.owner.session_id))
    batch_id = random_run_id()
    first = BatchStarted(batch_id, call.services.clock().isoformat(), tuple(started))
    owner = (call.caller.tenant_id, call.caller.user_id)
    return call.services.batches.add(Batch(batch_id, owner, first, refusals), runs)


async def _start_one(call: Call[BatchRequest, None], index: int, deadline: float) -> Run | ApiError:
    """The run of that request, or why there is none. Each counts as a request; the first is the batch's own."""
    request = call.body.requests[index]
    services, caller = call.services, call.caller
    one = Call(
        services, caller, {"agent_id": request.agent_id}, request.chat(call.body.on_disconnect), None, call.request
    )
    with trio.CancelScope(deadline=deadline) as limit:  # noqa: ASYNC912 - a start may not need to wait
        try:
            if index and services.gatekeeper is not None:
                services.gatekeeper.limiter.count_request(caller)
            if not re.fullmatch(PATH_IDS["agent_id"].pattern, request.agent_id, re.ASCII):
                raise not_found("agent", request.agent_id)
            return await start_run(one)
        except ApiError as refusal:
            return refusal
    assert limit.cancelled_caught
    return ApiError(503, "SERVICE_UNAVAILABLE", f"it could not be started within {START_SECONDS:g} s")


async def get_batch(call: Call[None, None]) -> BatchView:
    """The batch's state."""
    return _view(call, _find(call, call.ids["batch_id"]))


async def get_batch_events(call: Call[None, EventsQuery]) -> Response:
    """The batch's events from a number on, then live."""
    return _events(call, call.ids["batch_id"])


def _events(call: Call[Any, Any], batch_id: str) -> Response:
    log = _find_log(call, batch_id)
    cursor = requested_cursor(call.request, log)
    if log.ended and cursor == log.last_seq:
        return Response(b"", status=204, headers={"Cache-Control": "no-store"})
    body = b"" if call.request.method == "HEAD" else EventStreamBody(log, cursor)
    return stream_response(body, headers=_headers(log.run_id))


async def stop_batch(call: Call[None, None]) -> BatchView:
    """Stop every run of the batch, keeping what they have said."""
    batch = _find(call, call.ids["batch_id"])
    for run in call.services.batches.runs(batch):
        if run is not None:
            run.stop()
    return _view(call, batch)


def _find(call: Call[Any, Any], batch_id: str) -> Batch:
    batch = call.services.batches.find(batch_id, call.caller)
    if batch is None:
        raise not_found("batch", batch_id)
    return batch


def _find_log(call: Call[Any, Any], batch_id: str) -> BatchLog:
    try:
        return call.services.batches.log(_find(call, batch_id))
    except BatchGoneError:
        raise ApiError(410, "GONE", "not all of the batch's events are kept any more; ask for its runs") from None


def _view(call: Call[None, None], batch: Batch) -> BatchView:
    kept = call.services.batches.runs(batch)
    if None not in kept:
        call.services.batches.log(batch)  # numbers what is new
    runs = [
        BatchedRunView(status=None if run is None else run_view(run).status, **msgspec.structs.asdict(batched))
        for batched, run in zip(batch.runs, kept, strict=True)
    ]
    status: Literal["running", "done"] = "running" if any(run.status == "running" for run in runs) else "done"
    return BatchView(
        batch_id=batch.batch_id, status=status, last_seq=batch.last_seq, runs=runs, refused=list(batch.refusals)
    )


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
        answer_headers=_HEADERS,
        also={204: "All events of the batch that Last-Event-ID names were delivered before."},
        headers={"Last-Event-ID": "The id of the last event that the client has of a batch: that is read on."},
        refusals=(404, 410),
        example={"requests": [{"agent_id": "demo", "message": "Hi"}, {"agent_id": "demo", "message": "Hello"}]},
    ),
    Route(method="GET", path=_PATH, handler=get_batch, summary="A batch's state", tag="Batches", answer=BatchView),
    Route(
        method="GET",
        path=f"{_PATH}/events",
        handler=get_batch_events,
        summary="A batch's events after a number, then live",
        tag="Batches",
        query=EventsQuery,
        raw_query=True,
        answer=STREAM,
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
