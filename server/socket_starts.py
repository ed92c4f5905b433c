"""Which run a ``start`` on a socket is about: the one that its key stands for, or a new one."""

from __future__ import annotations

import re

from .api_chat import start_run
from .errors import RETRY_AFTER_SECONDS, ApiError
from .idempotency import KEY, fingerprint_of
from .remote_log import highest_cursor
from .requests import ChatRequest
from .routing import Call
from .run_access import unavailable
from .run_directory import ElsewhereError, RunHandle, SourceUnavailableError
from .store.rows import Scope


async def run_of_start(call: Call[ChatRequest, None], key: str | None, after: int) -> RunHandle:
    """The run that the key stands for, else a new one: what ``chat_runs.run_of_chat`` does with ``Idempotency-Key``.

    ``after`` is the number of the last event of it that the client has.

    Raises:
        ApiError: 400 for what can be no key or no number, 409 and 422 for a key that stands for another request; what
            starting raises, and ``draining`` in place of it while the server ends.
    """

    async def find(run_id: str) -> RunHandle | None:
        try:
            return await call.services.runs.find(run_id)
        except (ElsewhereError, SourceUnavailableError) as error:
            raise unavailable("it cannot be told now how the run stands") from error

    async def start(run_id: str | None) -> RunHandle:
        if after:
            raise ApiError(400, "INVALID_CURSOR", "there is no run yet after whose events to read")
        return await _start(call, run_id)

    if key is None:
        return await start(None)
    if not re.fullmatch(KEY, key):
        message = "idempotency_key is one text of 1 to 255 visible ASCII characters"
        raise ApiError(400, "INVALID_IDEMPOTENCY_KEY", message)
    place = (Scope(call.caller.tenant_id, call.caller.user_id, call.ids["agent_id"]), key)
    new_run_id = call.services.supervisor.new_run_id()
    keys = call.services.idempotency
    return await keys.join_or_start(place, fingerprint_of(call.body), new_run_id, find, start)


async def _start(call: Call[ChatRequest, None], run_id: str | None) -> RunHandle:
    try:
        return call.services.runs.local(await start_run(call, run_id))
    except ApiError as error:
        if error.status == 503 and call.services.supervisor.draining:
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            raise ApiError(503, "draining", "the server is shutting down: connect again", headers=headers) from error
        raise


def check_cursor(run: RunHandle, after: int) -> None:
    """Refuse a number that no reader of the run can have come with.

    Raises:
        ApiError: 400.
    """
    if after > highest_cursor(run.log):
        raise ApiError(400, "INVALID_CURSOR", f"the run is at {run.log.last_seq}, not at {after}")
