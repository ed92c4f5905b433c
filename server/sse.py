"""Server-sent events over a run's log: the response body, its headers, and the cursors that clients come back with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType

import trio
from quart import Request, Response
from quart.wrappers.response import ResponseBody

from engine import RunLog

from .errors import ApiError

HEARTBEAT_SECONDS = 15.0
HEARTBEAT = b": heartbeat\n\n"

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


class EventStreamBody(ResponseBody):
    """The frames of a log from a cursor on: all that is there in one piece, then live, to the terminal event.

    Counts as a reader of the run from ``__aenter__`` to ``__aexit__``. A silent run gets a comment every
    ``HEARTBEAT_SECONDS``, so that no proxy takes it for dead; nothing is sent while the client does not read.
    """

    def __init__(self, log: RunLog, after: int) -> None:
        self._log = log
        self._after = after
        self._reading = log.attached()
        self._heartbeat_at = trio.current_time() + HEARTBEAT_SECONDS

    async def __aenter__(self) -> EventStreamBody:
        self._reading.__enter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reading.__exit__(None, None, None)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        entries = await self._log.read(self._after, self._heartbeat_at)
        if not entries and self._log.ended:
            raise StopAsyncIteration
        self._heartbeat_at = trio.current_time() + HEARTBEAT_SECONDS
        if not entries:
            return HEARTBEAT
        self._after = entries[-1].seq
        return b"".join([entry.frame for entry in entries])


def stream_response(body: ResponseBody | bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response that streams for as long as it takes (Quart's own 60 s limit is off)."""
    response = Response(body, status=status, headers=STREAM_HEADERS | (headers or {}))
    response.timeout = None
    return response


def requested_cursor(request: Request, log: RunLog) -> int:
    """The number after which the client wants to read: ``Last-Event-ID`` or ``?after=``, 0 without either.

    Raises:
        ApiError: 400 for a cursor that is malformed, of another run or ahead of the log, and for cursors that differ.
    """
    cursors = {_number_of_event(event_id, log) for event_id in request.headers.getlist("Last-Event-ID") if event_id}
    cursors |= {_sequence_number(text) for text in request.args.getlist("after")}
    if len(cursors) > 1:
        raise _bad_cursor("the request has two cursors that differ")
    cursor = cursors.pop() if cursors else 0
    if cursor > log.last_seq:
        raise _bad_cursor(f"the cursor {cursor} is ahead of the run, which is at {log.last_seq}")
    return cursor


def _number_of_event(event_id: str, log: RunLog) -> int:
    run_id, _, seq = event_id.rpartition(".")
    if run_id != log.run_id:
        raise _bad_cursor("Last-Event-ID is not an event of this run")
    return _sequence_number(seq)


def _sequence_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise _bad_cursor("the cursor is no event number")
    return int(text)


def _bad_cursor(message: str) -> ApiError:
    return ApiError(400, "INVALID_CURSOR", message)
