"""What was seen of a simulated world, by everybody in it; ``invariants`` judges it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from engine import Event
from engine.run import Run

Ending: TypeAlias = Literal["", "whole", "broken", "left"]
"""How a response ended for its reader: not yet, as HTTP ends one, with a broken transport, or the reader left."""


@dataclass
class SeenFrame:
    """A frame as a reader got it; ``at`` is virtual. ``frame`` is from its ``id:`` line (or ``retry:``) on."""

    at: float
    id: str
    frame: bytes


@dataclass
class Response:
    """One answer that a client got, or is getting.

    Attributes:
        client: the client's number in the plan; extra clients of bursts count on.
        what: what was asked: ``chat``, ``whole``, ``batch``, ``events``, ``state``, ``stop``, ``delete``, ``socket``,
            ``batch_events``, ``hostile``.
        run_id: the run that it is of, a batch's id for a batch; empty if none.
        after: from which number on events were asked for.
        status: 0 if no head came.
        body: of what is no stream.
    """

    client: int
    what: str
    worker: int
    asked_at: float
    after: int = 0
    run_id: str = ""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    frames: list[SeenFrame] = field(default_factory=list)
    body: bytes = b""
    ending: Ending = ""
    ended_at: float = 0.0


@dataclass
class LoggedEvent:
    """An event as the run's own worker appended it."""

    at: float
    seq: int
    event: Event
    frame: bytes


@dataclass
class ObservedRun:
    """A run as its worker's log follower saw it. ``life`` numbers the worker's lives, from 0."""

    run: Run
    worker: int
    life: int
    started_at: float
    events: list[LoggedEvent] = field(default_factory=list)
    crashes: list[BaseException] = field(default_factory=list)


@dataclass
class UpstreamCall:
    """A request that a vendor got, times on the world's clock.

    Attributes:
        worker: who asked.
        content_times: when each piece of content was sent whole.
        request: its bytes.
        closed_at: when it was over: the caller's end of the connection was closed, or ``answered_at``; None while it
            is neither.
        answered_at: when the last byte of an answer went out that leaves the connection to further requests.
    """

    vendor: int
    number: int
    worker: int
    opened_at: float
    content_times: list[float] = field(default_factory=list)
    request: bytes = b""
    closed_at: float | None = None
    answered_at: float | None = None


@dataclass
class KeptRun:
    """A run as the store has it at the end of the world; ``events`` are number and JSON, in order."""

    run_id: str
    status: str
    response: str
    events: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass
class Observations:
    """All that was seen.

    Attributes:
        responses: in the order of asking.
        runs: by id.
        calls: in the order of arrival at vendors.
        stops: per run id, when a stop was answered with 200.
        batches: per batch's id, its runs' ids, as its clients were told or its worker has them.
        output: everything that was logged, as text.
        deaths, drains: when which worker died, or got its first SIGTERM: (time, worker).
        left_over: what was still there after the end: names of tasks, connections, slots, one line each.
        kept: what the store has of each run, by id.
        secrets: what nobody may see: keys of users and of vendors.
        bounds: what was largest: names to figures (buffered bytes, tasks, kept runs ...).
    """

    responses: list[Response] = field(default_factory=list)
    runs: dict[str, ObservedRun] = field(default_factory=dict)
    calls: list[UpstreamCall] = field(default_factory=list)
    stops: dict[str, float] = field(default_factory=dict)
    batches: dict[str, list[str]] = field(default_factory=dict)
    output: str = ""
    deaths: list[tuple[float, int]] = field(default_factory=list)
    drains: list[tuple[float, int]] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    kept: dict[str, KeptRun] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    bounds: dict[str, int] = field(default_factory=dict)
