"""What the upstream tells of itself, and what that says about the client's streams, joined by their tags.

``GET /open`` costs it next to nothing; ``GET /stats``, ``GET /log`` (one entry for each answer) and ``POST /reset`` are
for before and after a round.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from benchmarks.bench.histogram import Histogram
from benchmarks.bench.job import Stream

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


class OpenNow(msgspec.Struct):
    """What is open at this moment; the connection that asks is one of them."""

    connections: int
    answers: int


class Stats(msgspec.Struct, kw_only=True):
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


def own_time_ns(log: list[Served]) -> dict[int, int]:
    """For each tag, what the upstream itself took until its first content event, steps before that one included.

    Subtracted from the client's time to the first event, it leaves what the arm added.
    """
    taken: dict[int, int] = {}
    answered: set[int] = set()
    for served in log:
        if served.tag not in answered and (until := served.first_write_ns or served.ended_ns):
            taken[served.tag] = taken.get(served.tag, 0) + until - served.received_ns
            if served.first_write_ns:
                answered.add(served.tag)
    return {tag: ns for tag, ns in taken.items() if tag in answered}


class Closings(msgspec.Struct, kw_only=True):
    """What became, at the upstream, of the streams that the client closed."""

    delays_ns: list[int] = []
    """From the client's close to the upstream's seeing it, of those that it saw."""
    leaked: list[int] = []
    """Tags that are still open at the upstream."""
    over_before: list[int] = []
    """Tags whose answer was written to its end all the same."""
    never_asked: list[int] = []
    """Tags whose request had not got to the upstream, and never did."""


def closings(streams: list[Stream], log: list[Served]) -> Closings:
    """By the client's results and a log that was fetched as much later as a leak may last."""
    served_by_tag: dict[int, list[Served]] = {}
    for served in log:
        served_by_tag.setdefault(served.tag, []).append(served)
    found = Closings()
    for stream in streams:
        if not stream.closed:
            continue
        answers = served_by_tag.get(stream.tag, [])
        if not answers:
            found.never_asked.append(stream.tag)
        elif any(served.ending == "open" for served in answers):
            found.leaked.append(stream.tag)
        elif (last := answers[-1]).ending == "whole":
            found.over_before.append(stream.tag)
        else:
            found.delays_ns.append(last.ended_ns - stream.ended_ns)
    return found
