"""Which batch a request is about: one that it resumes, one that it joins, or a new one; for its caller alone."""

from __future__ import annotations

import re
from typing import Any

from quart import Request

from engine.supervisor import random_run_id

from .batch_start import BatchRequest, start_batch
from .batches import BatchHandle
from .errors import ApiError, not_found
from .idempotency import Keyed, check_fingerprint, fingerprint_of, requested_key
from .routing import API, PATH_IDS, Call
from .run_access import unavailable
from .run_directory import SourceUnavailableError
from .sse import sequence_number
from .store.rows import Scope

NO_AGENT = ""
"""In whose place the keys of batches are kept: no agent can be called so."""

KEYED = Keyed("batch", renewed=False)
"""A batch of which something is gone is not started again: most of it may have been answered."""


async def batch_of_request(call: Call[BatchRequest, None]) -> BatchHandle:
    """The batch of the request's ``Last-Event-ID``, else that of its ``Idempotency-Key``, else one that it starts.

    Raises:
        ApiError: 400 for a header that cannot be, 404 for a batch that is not the caller's to see, 409 and 422 for a
            key that stands for another request, 410 for one whose batch is gone; what starting raises.
    """
    check_parameters(call.request)
    afters = [sequence_number(text) for text in call.request.args.getlist("after")]
    key = requested_key(call.request)
    place = None if key is None else (Scope(call.caller.tenant_id, call.caller.user_id, NO_AGENT), key)
    keys = call.services.idempotency
    resumed_id = _resumed_batch_id(call.request)
    claim = None if place is None else await keys.find(place)
    if claim is not None:
        check_fingerprint(claim, fingerprint_of(call.body), KEYED)
    if resumed_id is not None:
        if claim is not None and claim.run_id != resumed_id:
            raise _bad_cursor("Last-Event-ID is of another batch than the Idempotency-Key")
        return await find_batch(call, resumed_id)

    async def start(batch_id: str) -> BatchHandle:
        if any(afters):
            raise _bad_cursor("there is no batch yet after whose events to read")
        return await start_batch(call, batch_id)

    async def find(batch_id: str) -> BatchHandle | None:
        return await _ask(call, batch_id)

    if place is None:
        return await start(random_run_id())
    return await keys.join_or_start(place, fingerprint_of(call.body), random_run_id(), find, start, KEYED)


async def find_batch(call: Call[Any, Any], batch_id: str) -> BatchHandle:
    """The batch of that id.

    Raises:
        ApiError: 404, there is none, or none of the caller's; 503, who would have it does not answer.
    """
    batch = await _ask(call, batch_id)
    if batch is None or not call.caller.may_see(batch.tenant_id, batch.user_id):
        raise not_found("batch", batch_id)
    return batch


def gone(batch: BatchHandle) -> ApiError:
    """410: not all of its events are kept any more."""
    details = {"batch_id": batch.batch_id, "state": f"{API}/batch/{batch.batch_id}"}
    return ApiError(410, "GONE", "not all of the batch's events are kept any more; ask for its runs", details)


def check_parameters(request: Request) -> None:
    """Refuse a query with anything but ``after``."""
    for name in request.args:
        if name != "after":
            shown = name[:100]
            raise ApiError(422, "VALIDATION_ERROR", f"there is no parameter {shown!r}", {"field": shown})


async def _ask(call: Call[Any, Any], batch_id: str) -> BatchHandle | None:
    try:
        return await call.services.batches.find(batch_id)
    except SourceUnavailableError as error:
        raise unavailable("it cannot be told now where the batch is") from error


def _resumed_batch_id(request: Request) -> str | None:
    """The batch whose event the client has, if it says so."""
    event_ids = {event_id for event_id in request.headers.getlist("Last-Event-ID") if event_id}
    batch_ids = {event_id.rpartition(".")[0] for event_id in event_ids}
    if not batch_ids:
        return None
    batch_id = batch_ids.pop()
    if batch_ids or not re.fullmatch(PATH_IDS["batch_id"].pattern, batch_id, re.ASCII):
        raise _bad_cursor("Last-Event-ID is no event's id")
    return batch_id


def _bad_cursor(message: str) -> ApiError:
    return ApiError(400, "INVALID_CURSOR", message)
