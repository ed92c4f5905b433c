"""Starts the runs of a batch, one after the other; a batch of which nothing starts is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import trio
from msgspec import Meta

from engine import Run

from .api_chat import start_run
from .batch_log import Batch, BatchedRun, BatchRefusal, BatchStarted
from .batches import BatchHandle
from .errors import RETRY_AFTER_SECONDS, ApiError, draining, not_found
from .requests import ChatRequest, OnDisconnect
from .routing import PATH_IDS, Call

MAX_REQUESTS = 32

START_SECONDS = 4.0
"""What starting all of a batch may take: less than a run waits for its first reader, who comes once all have begun."""

_PASSING = (429, 503)
"""Statuses of what may be started later."""


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


async def start_batch(call: Call[BatchRequest, None], batch_id: str) -> BatchHandle:
    """Start what can be started, of that id. If that is given up on the way, its runs are stopped: nobody has them.

    Raises:
        ApiError: 422, the body is wrong; or why nothing could be started.
    """
    for index, request in enumerate(call.body.requests):
        _check(index, request.chat(call.body.on_disconnect))
    if call.services.supervisor.draining:
        raise draining()
    runs: list[Run] = []
    try:
        started, refusals = await _start_each(call, runs)
    except BaseException:
        for run in runs:
            run.stop("disconnect")
        raise
    if not runs:
        raise refusal_of_all([refusal for _, refusal in refusals], [told for told, _ in refusals])
    first = BatchStarted(batch_id, call.services.clock().isoformat(), tuple(started))
    owner = (call.caller.tenant_id, call.caller.user_id)
    batch = Batch(batch_id, owner, first, [told for told, _ in refusals])
    return call.services.batches.add(batch, runs)


def _check(index: int, request: ChatRequest) -> None:
    try:
        request.check()
    except ApiError as error:
        details = {"field": f"requests[{index}].{error.details['field']}"} if error.details else {"index": index}
        message = f"requests[{index}]: {error.message}"
        raise ApiError(error.status, error.code, message, details) from error


async def _start_each(
    call: Call[BatchRequest, None], runs: list[Run]
) -> tuple[list[BatchedRun], list[tuple[BatchRefusal, ApiError]]]:
    """One after the other, so that of two in one session the second comes second; what cannot start is told.

    ``runs`` gets each run at once.
    """
    started: list[BatchedRun] = []
    refusals: list[tuple[BatchRefusal, ApiError]] = []
    deadline = trio.current_time() + START_SECONDS
    for index, request in enumerate(call.body.requests):
        run = await _start_one(call, index, deadline)
        if isinstance(run, ApiError):
            told = BatchRefusal(index, request.agent_id, run.code, run.message, run.details, _retry_after(run))
            refusals.append((told, run))
        else:
            runs.append(run)
            started.append(BatchedRun(index, run.id, run.spec.agent_id, run.spec.owner.session_id))
    return started, refusals


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
            if not PATH_IDS["agent_id"].fits(request.agent_id):
                raise not_found("agent", request.agent_id)
            return await start_run(one)
        except ApiError as refusal:
            return refusal
    assert limit.cancelled_caught
    message = f"it could not be started within {START_SECONDS:g} s"
    return ApiError(503, "SERVICE_UNAVAILABLE", message, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def refusal_of_all(refusals: Sequence[ApiError], told: Sequence[BatchRefusal]) -> ApiError:
    """The one refusal of a batch of which nothing could be started.

    It has the status that all of them have; else it is a 503 if any of them may be started later, or a 422. Its
    ``Retry-After`` is the longest of theirs: then all may be tried again.
    """
    first, statuses = refusals[0], {refusal.status for refusal in refusals}
    if len(statuses) == 1:
        status, code = first.status, first.code
    elif statuses.intersection(_PASSING):
        status, code = 503, "SERVICE_UNAVAILABLE"
    else:
        status, code = 422, "VALIDATION_ERROR"
    waits = [one.retry_after for one in told if one.retry_after is not None]
    headers = {"Retry-After": str(max(waits))} if waits else {}
    message = f"nothing of the batch could be started; requests[{told[0].index}]: {first.message}"
    return ApiError(status, code, message, {"refused": told}, headers)


def _retry_after(refusal: ApiError) -> int | None:
    seconds = refusal.headers.get("Retry-After")
    return None if seconds is None else int(seconds)
