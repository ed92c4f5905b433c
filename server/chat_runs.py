"""Which run a chat request is about: one that it resumes, one that it joins, or a new one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from engine import Run

from .idempotency import RUN, Place, fingerprint_of
from .repeats import check_nothing_read, repeat_of
from .requests import ChatRequest
from .routing import Call
from .run_access import find_run, unavailable, wait_known
from .run_directory import ElsewhereError, RunHandle, SourceUnavailableError
from .sse import bad_cursor

StartRun: TypeAlias = Callable[[Call[ChatRequest, None], str | None], Awaitable[Run]]


async def run_of_chat(call: Call[ChatRequest, None], start_run: StartRun) -> RunHandle:
    """The run of the request's ``Last-Event-ID``, else that of its ``Idempotency-Key``, else one that it starts.

    Raises:
        ApiError: 400 for a header that cannot be, 404 for a run that is not the caller's to see, 409 and 422 for a key
            that stands for another request; what starting raises.
    """
    repeat = await repeat_of(call, call.ids["agent_id"], RUN)
    if repeat.resumed_id is not None:
        return await _resumed(call, repeat.resumed_id)
    return await run_of_key(call, repeat.place, repeat.after, start_run)


async def run_of_key(call: Call[ChatRequest, None], place: Place | None, after: bool, start_run: StartRun) -> RunHandle:
    """The run that the key of that place stands for, else a new one; ``after``: the client has events of it already.

    Raises:
        ApiError: as ``run_of_chat``.
    """
    if place is None:
        check_nothing_read("run", after)
        run = call.services.runs.local(await start_run(call, None))
    else:
        run = await _run_of_place(call, place, after, start_run)
    await wait_known(call, run.run_id, run.log)
    return run


async def _run_of_place(call: Call[ChatRequest, None], place: Place, after: bool, start_run: StartRun) -> RunHandle:
    async def find(run_id: str) -> RunHandle | None:
        try:
            return await call.services.runs.find(run_id)
        except (ElsewhereError, SourceUnavailableError) as error:
            raise unavailable("it cannot be told now how the run stands") from error

    async def start(run_id: str | None) -> RunHandle:
        check_nothing_read("run", after)
        return call.services.runs.local(await start_run(call, run_id))

    new_run_id = call.services.supervisor.new_run_id()
    return await call.services.idempotency.join_or_start(place, fingerprint_of(call.body), new_run_id, find, start)


async def _resumed(call: Call[ChatRequest, None], run_id: str) -> RunHandle:
    run = await find_run(call, run_id)
    if run.agent_id != call.ids["agent_id"]:
        raise bad_cursor("Last-Event-ID is of a run of another agent")
    return run
