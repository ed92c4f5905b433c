"""Server-sent events over a run's log: the response body, its headers, and the cursors that clients come back with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from http import HTTPStatus
from types import TracebackType
from typing import Protocol

import structlog
import trio
from hypercorn.typing import ASGISendCallable
from quart import Response
from quart.typing import ResponseTypes
from quart.wrappers.response import ResponseBody
from quart_trio.asgi import TrioASGIHTTPConnection

from engine.log import EventLog, LogEntry, RunLog
from providers.chunked import LAST_CHUNK, chunked

from .asked import Asked
from .errors import ApiError
from .key_watch import KeyRevokedError, KeyWatch
from .remote_log import EventsLostError, highest_cursor

_logger = structlog.get_logger("lumos")

HEARTBEAT_SECONDS = 15.0
HEARTBEAT = b": heartbeat\n\n"
PIECE_BYTES = 16 * 1024
"""What a reader has in memory of its own while it is sent, four times over: the frames themselves are shared."""

WRITER = "lumos.writer"
"""The key of the ``DirectWriter`` in the state of a request's scope."""

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


class WatchedBody(ResponseBody):
    """A response body that, with a ``watch``, breaks off once the reader's key is revoked."""

    watch: KeyWatch | None = None

    async def check_key(self) -> None:
        """Ask about the key if it is time to; before each piece. Raises KeyRevokedError."""
        if self.watch is not None and trio.current_time() >= self.watch.due_at:
            await self.watch.check()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is open."""


class DirectWriter(Protocol):
    """Puts parts of a response's body on its connection past Quart and Hypercorn, between two of its pieces."""

    @property
    def behind(self) -> bool:
        """Whether something that ``write_now`` took still waits for the client to read: ``flush``."""
        ...

    def write_now(self, data: bytes) -> bool:
        """Write without waiting; False: nothing was taken. Does not raise."""
        ...

    async def write(self, data: bytes) -> None:
        """Write, waiting for the client as long as serving allows; one that is gone is no error. No checkpoint."""
        ...

    async def flush(self) -> None:
        """Wait until the client has read so far that all is written."""
        ...


class EventStreamBody(WatchedBody):
    """The frames of a log from a cursor on: all that is there in large pieces, then live, to the terminal event.

    With a ``writer``, what is said while nothing else is under way is written where it is said.

    Who sends it counts it as a reader of the run (``reading``). A silent run gets a comment every
    ``HEARTBEAT_SECONDS``, so that no proxy takes it for dead; nothing is sent while the client does not read.

    Attributes:
        headers: of the answer, beside ``STREAM_HEADERS``.
    """

    writer: DirectWriter | None = None

    def __init__(self, log: EventLog, after: int, headers: Mapping[str, str] | None = None) -> None:
        self.headers = dict(headers or {})
        self._log = log
        self._after = after
        self._pieces: Iterator[bytes] = iter(())
        self._ahead: bytes | None = None
        self._heartbeat_at = trio.current_time() + HEARTBEAT_SECONDS

    @property
    def run_id(self) -> str:
        """The run's, or batch's, whose events these are."""
        return self._log.run_id

    def attached(self) -> AbstractContextManager[None]:
        """Count as a reader of the run for as long as the block lasts."""
        return self._log.attached()

    def take_headers(self) -> Iterable[tuple[str, str]]:
        """The ``headers``, which are wanted once."""
        headers, self.headers = self.headers, {}
        return headers.items()

    async def send(self, writer: DirectWriter, held: bytes) -> None:
        """Write all in chunks, behind the head that is held: what is there already in one write with it.

        The last piece and the end are one write too. Where it breaks off, it raises as ``reading`` knows.
        """
        if not self.is_ready:
            await writer.write(held)
            held = b""
        self.writer = writer
        while piece := self._ahead or await self._read_piece():
            if self._has_to_ask_next():
                await self.check_key()
            held += chunked(piece)
            if not self.is_at_end:
                await writer.write(held)
                held = b""
            if self._ahead:
                await trio.lowlevel.checkpoint()  # others have their turn between two pieces
        await writer.write(held + LAST_CHUNK)

    async def __aenter__(self) -> EventStreamBody:
        return self

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        piece = self._ahead or await self._read_piece()
        if not piece:
            raise StopAsyncIteration
        if self._has_to_ask_next():
            await self.check_key()
        return piece

    def _has_to_ask_next(self) -> bool:
        """Turn to the next piece; whether the key has to be asked for before this one."""
        self._ahead = next(self._pieces, None)
        now = trio.current_time()
        self._heartbeat_at = now + HEARTBEAT_SECONDS
        return self.watch is not None and now >= self.watch.due_at

    @property
    def is_ready(self) -> bool:
        """Whether there is something to read that takes no waiting."""
        return self._log.last_seq > self._after

    @property
    def is_at_end(self) -> bool:
        """Whether the piece that was read last is the last one."""
        return self._ahead is None and self._is_read

    @property
    def _is_read(self) -> bool:
        return self._log.ended and self._after >= self._log.last_seq

    async def _read_piece(self) -> bytes:
        """Wait for the log; ``_pieces`` keeps what is more than one piece. b"" at the end."""
        while not self._is_read:
            if self.writer is None or not isinstance(self._log, RunLog):
                entries = await self._log.read(self._after, self._heartbeat_at)
            else:
                entries = await self._log.read(self._after, self._heartbeat_at, self._take)
                if self.writer.behind:
                    await self.writer.flush()
            frames = [entry.frame for entry in entries if entry.seq > self._after]  # what ``_take`` did not take
            if frames:
                self._after = entries[-1].seq
                if sum(map(len, frames)) <= PIECE_BYTES:
                    return b"".join(frames)
                self._pieces = in_pieces(frames)
                return next(self._pieces)
            if trio.current_time() >= self._heartbeat_at:
                return HEARTBEAT
        return b""

    def _take(self, entries: Sequence[LogEntry], now: float) -> bool:
        """Write them, if that takes no waiting; the log calls this while ``_read_piece`` waits."""
        if self.writer is None or (self.watch is not None and now >= self.watch.due_at):
            return False
        piece = entries[0].frame if len(entries) == 1 else b"".join([entry.frame for entry in entries])
        if not self.writer.write_now(piece):
            return False
        self._after = entries[-1].seq
        self._heartbeat_at = now + HEARTBEAT_SECONDS
        return not self.writer.behind


def in_pieces(frames: Iterable[bytes]) -> Iterator[bytes]:
    """The frames joined into pieces of at most ``PIECE_BYTES``; a larger frame is a piece of its own."""
    piece: list[bytes] = []
    size = 0
    for frame in frames:
        if piece and size + len(frame) > PIECE_BYTES:
            yield b"".join(piece)
            piece, size = [], 0
        piece.append(frame)
        size += len(frame)
    yield b"".join(piece)


class reading:  # noqa: N801 - a context manager, as in ``with reading(body)``
    """The block sends that body of an answer: from before its head, a stream counts as read.

    What breaks a stream off ends the block without an error.
    """

    __slots__ = ("_attached", "_body")

    def __init__(self, body: object) -> None:
        self._body = body
        self._attached = body.attached() if isinstance(body, EventStreamBody) else nullcontext()

    def __enter__(self) -> None:
        self._attached.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._attached.__exit__(kind, error, trace)
        if isinstance(error, EventsLostError):
            run_id = self._body.run_id if isinstance(self._body, EventStreamBody) else None
            _logger.warning("stream.cut", run_id=run_id, reason=str(error))
        return isinstance(error, EventsLostError | KeyRevokedError)


class StreamConnection(TrioASGIHTTPConnection):
    """Quart-Trio's side of a request. A stream is read from before its head is sent, not from after it.

    A client that goes in between would never have been a reader, and its run would wait seconds for the first one.
    """

    async def _send_response(self, send: ASGISendCallable, response: ResponseTypes) -> None:
        body = response.response
        if isinstance(body, EventStreamBody) and self._comes_in_chunks(response):
            body.writer = self.scope.get("state", {}).get(WRITER)
        with reading(body):
            await super()._send_response(send, response)  # unfinished, without its last chunk, Hypercorn breaks it

    def _comes_in_chunks(self, response: ResponseTypes) -> bool:
        is_plain = response.status_code == HTTPStatus.OK and "Content-Length" not in response.headers
        return is_plain and self.scope["http_version"] == "1.1" and self.scope["method"] != "HEAD"


def stream_response(body: ResponseBody | bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response that streams for as long as it takes (Quart's own 60 s limit is off)."""
    response = Response(body, status=status, headers=STREAM_HEADERS | (headers or {}))
    response.timeout = None
    return response


def requested_cursor(request: Asked, log: EventLog, what: str = "run") -> int:
    """The number after which the client wants to read: ``Last-Event-ID`` or ``?after=``, 0 without either.

    ``what`` the log is of, refusals say.

    Raises:
        ApiError: 400 for a cursor that is malformed, of another run or ahead of the log, and for cursors that differ;
            422 for an ``after`` that is there twice.
    """
    cursor = cursor_of(request, log.run_id, what)
    if cursor and cursor > highest_cursor(log):
        raise bad_cursor(f"the cursor {cursor} is ahead of the {what}, which is at {log.last_seq}")
    return cursor


def cursor_of(request: Asked, run_id: str, what: str = "run") -> int:
    """As ``requested_cursor``, for a run that may be anywhere."""
    event_ids = request.headers.getlist("Last-Event-ID")
    after = request.args.getlist("after")
    if not (event_ids or after):
        return 0
    cursors = {_number_of_event(event_id, run_id, what) for event_id in event_ids if event_id}
    cursors |= {sequence_number(text) for text in after}
    if len(cursors) > 1:
        raise bad_cursor("the request has two cursors that differ")
    if len(after) > 1:
        raise there_twice("after")
    return cursors.pop() if cursors else 0


def _number_of_event(event_id: str, run_id: str, what: str) -> int:
    of_run, _, seq = event_id.rpartition(".")
    if of_run != run_id:
        raise bad_cursor(f"Last-Event-ID is not an event of this {what}")
    return sequence_number(seq)


def sequence_number(text: str) -> int:
    """The number of an event.

    Raises:
        ApiError: 400, it is none, or not as we write it: without leading zeros.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 12) or (text[0] == "0" and len(text) > 1):
        raise bad_cursor("the cursor is no event number")
    return int(text)


def there_twice(name: str) -> ApiError:
    """422 for a parameter that is in the query twice."""
    return ApiError(422, "VALIDATION_ERROR", f"the parameter {name!r} is there twice", {"field": name})


def bad_cursor(message: str) -> ApiError:
    """400 for what no reader of these events can have come with."""
    return ApiError(400, "INVALID_CURSOR", message)
