"""Which batch a request is about: one that it resumes, one that it joins, or a new one; for its caller alone."""

from __future__ import annotations

from typing import Any

from engine.supervisor import random_run_id

from .batch_start import BatchRequest, start_batch
from .batches import BatchHandle
from .errors import ApiError, not_found
from .idempotency import Keyed, fingerprint_of
from .repeats import check_nothing_read, repeat_of
from .routing import API, Call
from .run_access import unavailable, wait_known
from .run_directory import SourceUnavailableError

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
    repeat = await repeat_of(call, NO_AGENT, KEYED)
    if repeat.resumed_id is not None:
        return await find_batch(call, repeat.resumed_id)

    async def start(batch_id: str) -> BatchHandle:
        check_nothing_read("batch", repeat.after)
        return await start_batch(call, batch_id)

    async def find(batch_id: str) -> BatchHandle | None:
        return await _ask(call, batch_id)

    new_id, keys = random_run_id(), call.services.idempotency
    if repeat.place is None:
        batch = await start(new_id)
    else:
        batch = await keys.join_or_start(repeat.place, fingerprint_of(call.body), new_id, find, start, KEYED)
    await wait_known(call, batch.batch_id, batch.log)
    return batch


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


async def _ask(call: Call[Any, Any], batch_id: str) -> BatchHandle | None:
    try:
        return await call.services.batches.find(batch_id)
    except SourceUnavailableError as error:
        raise unavailable("it cannot be told now where the batch is") from error
