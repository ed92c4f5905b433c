"""What the client is told to do, and what it tells afterwards: one JSON line each."""

from __future__ import annotations

from typing import Literal

import msgspec

from benchmarks.bench.histogram import Histogram

TAG = "@TAG@"
"""Stands for the stream's tag, six digits, in a job's path, headers and body."""


class Read(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a stream is read; nothing set: to its end. A close is a ``close()``, without any farewell."""

    stop_after_events: int | None = None
    """Stop reading once so many events have come; 0 is after the request."""
    resume_after_s: float | None = None
    """Read again so long after it stopped; None is never."""
    close_after_events: int | None = None
    """Close once so many events have come."""
    close_after_s: float | None = None
    """Close so long after the request was sent; of one that stops reading, so long after it stopped."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Streams to open, each on a connection of its own at its own time, whatever has become of the others."""

    host: str
    port: int
    path: str
    headers: dict[str, str]
    """Without ``Host`` and ``Content-Length``."""
    body: str
    """JSON; with ``bench-@TAG@:paced-20x100`` in the user's message."""
    starts_s: list[float]
    """When each stream starts, from the job's start on; ascending."""
    first_tag: int = 0
    """Stream i has the tag ``first_tag + i``."""
    reads: tuple[Read, ...] = (Read(),)
    """Stream i is read as number ``i % len(reads)`` says."""
    patience_s: float = 30
    """So long after the last start (one at a time: after each), what has not ended stays unfinished."""
    window_s: tuple[float, float] | None = None
    """Lateness and ``events_in_window`` count the events that were written in it; None: all."""
    one_at_a_time: bool = False
    """Stream i starts ``starts_s[i] - starts_s[i - 1]`` after the one before it has ended, scheduled for then."""
    stamps: Literal["clock", "offset"] = "clock"
    """``offset``: the stamps (of tag 0) are nanoseconds from the request, in the text of a replayed recording that was
    made so; lateness is then how far an event is from its place behind the first event, either way."""
    receive_buffer: int | None = None
    """Bytes, for ``SO_RCVBUF``: small ones fill soon when nobody reads."""


class Stream(msgspec.Struct):
    """One stream's raw results. Times are CLOCK_MONOTONIC in nanoseconds, 0 for what has not happened."""

    tag: int
    scheduled_ns: int
    """Every latency counts from here."""
    connected_ns: int = 0
    first_byte_ns: int = 0
    first_event_ns: int = 0
    first_written_ns: int = 0
    """When the upstream wrote the first event."""
    last_event_ns: int = 0
    ended_ns: int = 0
    """The end of the response, of the connection, or our own close."""
    events: int = 0
    bytes: int = 0
    status: int = 0
    whole: bool = False
    """The upstream's last event has come."""
    exact: bool = False
    """All events of this stream and of no other have come, in order and once, the last among them."""
    closed: bool = False
    """We closed it, as the job says."""
    last_error_ns: int = 0
    """With ``stamps="offset"``: how far the last event was from its place, later is positive."""
    error: str = ""
    """What went wrong; "unfinished" if it did not end in time."""


class Progress(msgspec.Struct, frozen=True):
    """How far it is; a line on stderr twice a second."""

    at_ns: int
    events: int
    started: int
    open: int
    ended: int


class Outcome(msgspec.Struct, kw_only=True):
    """All of a job's streams, those that failed or never ended too."""

    start_ns: int
    streams: list[Stream]
    lateness: Histogram
    events: int
    events_in_window: int
    window_ns: tuple[int, int]
    start_lateness: Histogram
    """How late the client itself was with opening its connections."""
    cpu_s: float
    """The client's own."""
    progress: list[Progress]
