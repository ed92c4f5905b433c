"""Which run a chat request is about: one that it resumes, one that it joins, or a new one."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import msgspec

from engine import Run

from .errors import ApiError
from .idempotency import check_fingerprint, fingerprint_of, requested_key
from .requests import ChatRequest
from .routing import PATH_IDS, Call
from .run_access import find_run, unavailable
from .run_directory import ElsewhereError, RunHandle, SourceUnavailableError
from .sse import sequence_number
from .store.rows import Scope

StartRun: TypeAlias = Callable[[Call[ChatRequest, None], str | None], Awaitable[Run]]


class ResumeQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From where on a repeated request reads on.

    Attributes:
        after: the number of the last event that the client has; goes with ``Idempotency-Key`` or ``Last-Event-ID``.
    """

    after: int = 0


async def run_of_chat(call: Call[ChatRequest, None], start_run: StartRun) -> RunHandle:
    """The run of the request's ``Last-Event-ID``, else that of its ``Idempotency-Key``, else one that it starts.

    Raises:
        ApiError: 400 for a header that cannot be, 404 for a run that is not the caller's to see, 409 and 422 for a key
            that stands for another request; what starting raises.
    """
    afters = [sequence_number(text) for text in call.request.args.getlist("after")]
    key = requested_key(call.request)
    place = None if key is None else (Scope(call.caller.tenant_id, call.caller.user_id, call.ids["agent_id"]), key)
    keys = call.services.idempotency
    resumed_id = _resumed_run_id(call)
    claim = None if place is None else await keys.find(place)
    if claim is not None:
        check_fingerprint(claim, fingerprint_of(call.body))
    if resumed_id is not None:
        if claim is not None and claim.run_id != resumed_id:
            raise _bad_cursor("Last-Event-ID is of another run than the Idempotency-Key")
        return await _resumed(call, resumed_id)

    async def find(run_id: str) -> RunHandle | None:
        try:
            return await call.services.runs.find(run_id)
        except (ElsewhereError, SourceUnavailableError) as error:
            raise unavailable("it cannot be told now how the run stands") from error

    async def start(run_id: str | None) -> RunHandle:
        if any(afters):
            raise _bad_cursor("there is no run yet after whose events to read")
        return call.services.runs.local(await start_run(call, run_id))

    if place is None:
        return await start(None)
    new_run_id = call.services.supervisor.new_run_id()
    return await keys.join_or_start(place, fingerprint_of(call.body), new_run_id, find, start)


async def _resumed(call: Call[ChatRequest, None], run_id: str) -> RunHandle:
    run = await find_run(call, run_id)
    if run.agent_id != call.ids["agent_id"]:
        raise _bad_cursor("Last-Event-ID is of a run of another agent")
    return run


def _resumed_run_id(call: Call[ChatRequest, None]) -> str | None:
    """The run whose event the client has, if it says so."""
    event_ids = {event_id for event_id in call.request.headers.getlist("Last-Event-ID") if event_id}
    run_ids = {event_id.rpartition(".")[0] for event_id in event_ids}
    if not run_ids:
        return None
    run_id = run_ids.pop()
    if run_ids or not re.fullmatch(PATH_IDS["run_id"].pattern, run_id, re.ASCII):
        raise _bad_cursor("Last-Event-ID is no event's id")
    return run_id


def _bad_cursor(message: str) -> ApiError:
    return ApiError(400, "INVALID_CURSOR", message)
