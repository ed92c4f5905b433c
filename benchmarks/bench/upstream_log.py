"""What the upstream tells of itself: ``GET /stats``, ``GET /log`` (one line for each answer), ``POST /reset``."""

from __future__ import annotations

from typing import Literal

import msgspec

from benchmarks.bench.histogram import Histogram

Ending = Literal["open", "whole", "fin", "reset"]


class Served(msgspec.Struct):
    """One answer that was asked for. Times are CLOCK_MONOTONIC in nanoseconds, 0 for what has not happened."""

    tag: int
    name: str
    received_ns: int
    first_write_ns: int = 0
    """Of its first content event."""
    ended_ns: int = 0
    """When its last byte was written, or the upstream saw that its client had gone."""
    ending: Ending = "open"
    """``fin`` and ``reset`` are the client's going before the end."""
    events: int = 0


class Stats(msgspec.Struct):
    """Counts since the start or the last reset."""

    connections: int
    """Open now."""
    open_answers: int
    requests: int
    events: int
    sends: int
    lateness: Histogram
    """Of each event, its write behind its time in the script, where no full socket was waited for."""
    refused: int
    """Requests that were none of ours; the arm is set up wrongly."""


def open_streams(log: list[Served]) -> list[Served]:
    """Those that nobody has closed: leaks, if their clients have long gone."""
    return [served for served in log if served.ending == "open"]
