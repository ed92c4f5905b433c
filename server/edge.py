"""Ranges of an ended run's events: they never change, so caches may keep them.

``?after=A&until=B`` is the events with numbers in A < n <= B, as server-sent events or as JSON. Only an ended run has
ranges: once its end is in the store, the answer to one URL is the same for ever, with a strong ``ETag`` that is known
before the log is read. Until then another end may still become the run's, so nothing may keep the answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from email.utils import formatdate
from hashlib import sha256
from typing import Literal, TypeAlias

import msgspec
import trio
from quart import Request, Response

from engine.events import Event, MemoryUpdate, Metadata, UsageUpdate, data_of, encode_frame
from engine.log import EventLog, LogEntry

from .availability import STORE_SECONDS
from .errors import RETRY_AFTER_SECONDS, ApiError
from .journal_log import EventsDroppedError, JournalLog
from .remote_log import EventsLostError
from .sse import STREAM_HEADERS, WatchedBody, in_pieces, requested_cursor, sequence_number, there_twice
from .store.database import Database
from .store.errors import StoreUnavailableError
from .store.run_events import terminal_seq_of

YEAR_SECONDS = 31_536_000
READ_SECONDS = 5.0
"""What a log that is kept elsewhere gets for each read."""

_FORMAT = "1"
"""Part of every ETag: change it with anything that changes a range's bytes."""

_NOT_KEPT = {"Cache-Control": "no-store"}

Representation: TypeAlias = Literal["text/event-stream", "application/json"]

_CONTENT_TYPES: dict[Representation, str] = {
    "text/event-stream": STREAM_HEADERS["Content-Type"],  # alone: nginx keeps nothing that it shall not buffer
    "application/json": "application/json",
}
_REPRESENTATIONS = tuple(_CONTENT_TYPES)


class Audience(msgspec.Struct, frozen=True):
    """For whom an answer is.

    Attributes:
        headers: who may keep it, how long, and which request headers it depends on.
        public: what only the run's owner sees is left out: metadata, usage, what was remembered.
    """

    headers: Mapping[str, str]
    public: bool


OWNER = Audience(
    {
        "Cache-Control": f"private, max-age={YEAR_SECONDS}, immutable",
        "Vary": "Accept, Authorization, X-API-Key",
    },
    public=False,
)


def bearers_of_a_link(expires_at: int) -> Audience:
    """Everybody who has a share link: any cache may keep the answer while the link is good.

    The end is a time, not an age: nginx sends what it keeps without an ``Age``, and with a ``Date`` of its own, so that
    an age would begin anew in the cache behind it. A second early, because ``Date`` has no fractions.
    """
    headers = {
        "Cache-Control": "public, immutable",
        "Expires": formatdate(expires_at - 1, usegmt=True),
        "Vary": "Accept",
    }
    return Audience(headers, public=True)


async def owners_range(request: Request, log: EventLog, database: Database | None) -> Response:
    """The range that the query names, for who may see the run. The database is the server's, if it has one.

    Raises:
        ApiError: 400, the query names no range; else as ``range_response``.
    """
    after = requested_cursor(request, log) if log.ended else 0
    asked = request.args.getlist("until")
    if len(set(asked)) > 1:
        raise ApiError(400, "INVALID_CURSOR", "the range has two ends")
    until = sequence_number(asked[0])
    if len(asked) > 1:
        raise there_twice("until")
    if log.ended and after == until and request.headers.get("Last-Event-ID"):
        return Response(b"", status=204, headers={"Cache-Control": "no-store"})  # an EventSource that has it all
    return await range_response(request, log, after, until, OWNER, database)


class RangeView(msgspec.Struct, frozen=True):
    """A range as JSON.

    Attributes:
        after, until: as asked.
        last_seq: the number of the run's last event.
    """

    events: list[NumberedEvent]
    after: int
    until: int
    last_seq: int


class NumberedEvent(msgspec.Struct, frozen=True):
    """An event and its number in the run."""

    seq: int
    event: Event


def check_range(log: EventLog, after: int, until: int) -> None:
    """Whether the run has that range.

    Raises:
        ApiError: 409, the run has not ended, so that there are no ranges yet; 400, the range is none or goes past the
            run's end.
    """
    if not log.ended:
        details = {"last_seq": log.last_seq}
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        raise ApiError(409, "RUN_NOT_ENDED", "ranges are of ended runs; read this one live", details, headers)
    if after > until:
        raise ApiError(400, "INVALID_CURSOR", f"the range ends at {until}, before it begins at {after}")
    if until > log.last_seq:
        message = f"the range ends at {until}, which is ahead of the run's end at {log.last_seq}"
        raise ApiError(400, "INVALID_CURSOR", message, {"last_seq": log.last_seq})


async def range_response(
    request: Request, log: EventLog, after: int, until: int, audience: Audience, database: Database | None
) -> Response:
    """The range as the request accepts it, 304 if the client has it already.

    Raises:
        ApiError: as ``check_range``; 406, another representation is wanted; 503, the log cannot be read now.
    """
    check_range(log, after, until)
    kind = _representation(request)
    etag = _etag(log.run_id, after, until, kind, audience)
    final = await _is_final(log, database)
    headers = {**(audience.headers if final else _NOT_KEPT), "X-Run-Id": log.run_id}
    if final and request.if_none_match.contains_weak(etag):
        response = Response(b"", status=304, headers=headers)
        del response.headers["Content-Type"]
    else:
        entries = await _read_range(log, after, until)
        if audience.public:
            entries = [_public(log.run_id, entry) for entry in entries if not isinstance(entry.event, _PRIVATE_EVENTS)]
        body = _RangeBody(_as_json(entries, after, until, log.last_seq) if kind == _REPRESENTATIONS[1] else entries)
        response = Response(body, headers=headers | {"Content-Type": _CONTENT_TYPES[kind]})
        response.headers["Content-Length"] = str(body.size)
        response.timeout = None  # who reads slowly is cut by the stall limit
    if final:
        response.headers["ETag"] = f'"{etag}"'
    return response


async def _is_final(log: EventLog, database: Database | None) -> bool:
    """Whether the store has this very end, which nothing changes any more; without a store there is no other one."""
    if database is None or isinstance(log, JournalLog):
        await trio.lowlevel.checkpoint()
        return True
    try:
        with trio.fail_after(STORE_SECONDS):
            return await database.read(terminal_seq_of, log.run_id) == log.last_seq
    except (StoreUnavailableError, trio.TooSlowError):
        return False


class _RangeBody(WatchedBody):
    """The frames of entries in pieces, or one text. The frames are the log's own: a slow reader costs no copy."""

    def __init__(self, content: list[LogEntry] | list[bytes]) -> None:
        frames = [entry.frame if isinstance(entry, LogEntry) else entry for entry in content]
        self.size = sum(map(len, frames))
        self._pieces: Iterator[bytes] = in_pieces(frames)

    async def __aenter__(self) -> _RangeBody:
        return self

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        await self.check_key()
        piece = next(self._pieces, None)
        if piece is None:
            raise StopAsyncIteration
        return piece


def _representation(request: Request) -> Representation:
    """What the client likes best of the two; the stream if it does not mind."""
    if not request.accept_mimetypes:
        return _REPRESENTATIONS[0]
    best = request.accept_mimetypes.best_match(_REPRESENTATIONS)
    for kind in _REPRESENTATIONS:
        if best == kind:
            return kind
    raise ApiError(406, "NOT_ACCEPTABLE", f"events come as {' or '.join(_REPRESENTATIONS)}")


def _etag(run_id: str, after: int, until: int, kind: Representation, audience: Audience) -> str:
    named = (_FORMAT, run_id, str(after), str(until), kind, "public" if audience.public else "whole")
    return sha256("\n".join(named).encode()).hexdigest()[:32]


async def _read_range(log: EventLog, after: int, until: int) -> list[LogEntry]:
    """The entries of the range, whole. Raises ApiError: 410, they were just dropped; 503, they cannot be read now."""
    found: list[LogEntry] = []
    cursor = after
    while cursor < until:
        try:
            entries = await log.read(cursor, trio.current_time() + READ_SECONDS)
        except EventsDroppedError as error:
            raise ApiError(410, "GONE", "the run's events are no longer kept") from error
        except (StoreUnavailableError, trio.TooSlowError, EventsLostError) as error:
            raise _unreadable() from error
        if not entries:
            raise _unreadable()
        cursor = entries[-1].seq
        found += (entry for entry in entries if entry.seq <= until)
    return found


def _unreadable() -> ApiError:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ApiError(503, "SERVICE_UNAVAILABLE", "the run's events cannot be read now", headers=headers)


_PRIVATE_EVENTS = (Metadata, UsageUpdate, MemoryUpdate)


def _public(run_id: str, entry: LogEntry) -> LogEntry:
    """The entry without what the run cost."""
    if getattr(entry.event, "usage", None) is None:
        return entry
    event = msgspec.structs.replace(entry.event, usage=None)
    return LogEntry(entry.seq, event, encode_frame(run_id, entry.seq, event))


def _as_json(entries: Iterable[LogEntry], after: int, until: int, last_seq: int) -> list[bytes]:
    """``RangeView`` in parts, of the very bytes that the frames carry."""
    parts = [b'{"events":[']
    for entry in entries:
        comma = b"" if len(parts) == 1 else b","
        parts.append(b'%s{"seq":%d,"event":%s}' % (comma, entry.seq, data_of(entry.frame)))
    parts.append(b'],"after":%d,"until":%d,"last_seq":%d}' % (after, until, last_seq))
    return parts
