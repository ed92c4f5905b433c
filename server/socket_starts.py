"""Which run a ``start`` on a socket is about: the one that its key stands for, or a new one."""

from __future__ import annotations

import re

from engine import Run

from .api_chat import start_run
from .chat_runs import run_of_key
from .errors import RETRY_AFTER_SECONDS, ApiError
from .idempotency import KEY
from .remote_log import highest_cursor
from .repeats import place_of
from .requests import ChatRequest
from .routing import Call
from .run_directory import RunHandle
from .sse import bad_cursor


async def run_of_start(call: Call[ChatRequest, None], key: str | None, after: int) -> RunHandle:
    """The run that the key stands for, else a new one: as with ``Idempotency-Key`` over HTTP.

    ``after`` is the number of the last event of it that the client has.

    Raises:
        ApiError: 400 for what can be no key or no number, 409 and 422 for a key that stands for another request; what
            starting raises, and ``draining`` in place of it while the server ends.
    """
    place = None
    if key is not None:
        if not re.fullmatch(KEY, key):
            message = "idempotency_key is one text of 1 to 255 visible ASCII characters"
            raise ApiError(400, "INVALID_IDEMPOTENCY_KEY", message)
        place = place_of(call, call.ids["agent_id"], key)
    return await run_of_key(call, place, after > 0, _start)


async def _start(call: Call[ChatRequest, None], run_id: str | None) -> Run:
    try:
        return await start_run(call, run_id)
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
        raise bad_cursor(f"the run is at {run.log.last_seq}, not at {after}")
