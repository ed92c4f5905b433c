"""What holds for every reader in a simulated world: the same bytes for all, without gap, repeat or silent end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import inf

import msgspec

from engine.events import TERMINAL_EVENT_TYPES
from server.log_followers import RESERVED_SEQ
from server.serving import STALL_BYTES, ServingLimits

from .observations import Observations, Response, SeenFrame
from .plan import ClientPlan, Plan

_OF_RUNS = ("chat", "events", "socket")
_OF_BATCHES = ("batch", "batch_events")
_ENDS = re.compile(rb'"chunk_type":"(done|error|stop|batch_done)"')
_ID = re.compile(r"([A-Za-z0-9_-]{22})\.(\d+)", re.ASCII)

STATUSES = {
    "chat": {200, 204, 400, 401, 404, 409, 410, 422, 429, 503},
    "events": {200, 204, 400, 401, 404, 410, 422, 429, 503},
    "whole": {200, 400, 401, 404, 409, 410, 422, 429, 503},
    "batch": {200, 204, 400, 401, 404, 409, 410, 422, 429, 503},
    "batch_events": {200, 204, 400, 401, 404, 410, 422, 429, 503},
    "state": {200, 401, 404, 429, 503},
    "stop": {200, 401, 404, 410, 429, 503},
    "delete": {200, 204, 401, 404, 410, 429, 503},
}
"""What each kind of request may be answered with, whatever befalls the world; 0 is a connection that broke."""


def ids_follow_each_other(_: Plan, seen: Observations) -> Iterator[str]:
    """A stream's ids are its run's, and count on from where it was asked; only a lost run's end is numbered later."""
    for response in _streams(seen):
        before = response.after
        for place, frame in enumerate(response.frames):
            match = _ID.fullmatch(frame.id)
            if match is None or match[1] != response.run_id:
                yield f"{_name(response)} got the id {frame.id!r}"
                continue
            seq = int(match[2])
            closes = place == len(response.frames) - 1 and seq >= RESERVED_SEQ and _is_end(response, frame)
            if seq != before + 1 and not closes:
                yield f"{_name(response)} got number {seq} after {before}"
            before = seq


def all_read_the_same(_: Plan, seen: Observations) -> Iterator[str]:
    """Each frame is the bytes that the run's worker made, at all readers and at all times."""
    first: dict[str, bytes] = {}
    for response in _streams(seen):
        run = seen.runs.get(response.run_id)
        logged = {} if run is None else {f"{response.run_id}.{entry.seq}": entry.frame for entry in run.events}
        for frame in response.frames:
            expected = logged.get(frame.id) or first.setdefault(frame.id, frame.frame)
            if frame.frame != expected:
                yield f"{_name(response)} got {frame.frame!r} where {expected!r} was"


def nothing_follows_the_end(_: Plan, seen: Observations) -> Iterator[str]:
    """After a terminal frame there is no other."""
    for response in _streams(seen):
        for frame in response.frames[:-1]:
            if _is_end(response, frame):
                yield f"{_name(response)} got more after {frame.id}"


def no_silent_end(_: Plan, seen: Observations) -> Iterator[str]:
    """A stream that ends as HTTP ends one has its terminal frame."""
    ends = _ends(seen)
    for response in _streams(seen):
        has_end = response.frames and _is_end(response, response.frames[-1])
        # who has it from one worker may be ahead of another
        had_end = not response.frames and f"{response.run_id}.{response.after}" in ends
        if response.ending == "whole" and not has_end and not had_end:
            yield f"{_name(response)} ended without an end, after {len(response.frames)} frames"


def nobody_is_cut_off_without_a_reason(plan: Plan, seen: Observations) -> Iterator[str]:
    """In a world where nothing befell the server, no stream breaks for who reads it from a number that there is."""
    if plan.events:
        return
    newest, deletions = _newest_numbers(seen), _deletions(seen)
    for response in _streams(seen):
        client = plan.clients[response.client] if response.client < len(plan.clients) else None
        is_slow = client is None or _is_slow(client, plan.latency)
        is_ahead_of_all = response.after > newest.get(
            response.run_id, 0
        )  # of what was never to come, nobody has an end
        is_forgotten = deletions.get(response.run_id, inf) <= response.ended_at  # a batch is, with a run of it
        if response.ending == "broken" and not (is_slow or is_ahead_of_all or is_forgotten):
            yield f"{_name(response)} was cut off at {response.ended_at}"


def everybody_hears_the_end(_: Plan, seen: Observations) -> Iterator[str]:
    """No response is still open when the world ends."""
    for response in seen.responses:
        if not response.ending:
            yield f"{_name(response)} never ended"


def statuses_are_known(_: Plan, seen: Observations) -> Iterator[str]:
    """Each answer is one that the documentation names; a refusal says when to come back, and what is wrong."""
    for response in seen.responses:
        if response.status and response.status not in STATUSES.get(response.what, {response.status}):
            yield f"{_name(response)} was answered {response.status}: {response.body[:200]!r}"
        whole = response.ending == "whole"
        is_failed_run = _may_be_a_failed_run(response)
        is_raw = response.what == "hostile"  # bytes as they came, the head among them
        if response.status in {429, 503} and "retry-after" not in response.headers and not (is_failed_run or is_raw):
            yield f"{_name(response)} got {response.status} without Retry-After: {response.body[:200]!r}"
        if response.status >= 400 and whole and response.what in STATUSES and not _is_refusal(response):
            yield f"{_name(response)} got {response.status} without a code: {response.body[:200]!r}"


def whole_answers_are_the_runs(_: Plan, seen: Observations) -> Iterator[str]:
    """An answer that comes whole is what its run said."""
    for response in seen.responses:
        run = seen.runs.get(response.run_id)
        if response.what != "whole" or response.status != 200 or run is None or response.ending != "whole":
            continue
        said = msgspec.json.decode(response.body)["data"]["content"]
        last = run.events[-1].event
        if not isinstance(last, TERMINAL_EVENT_TYPES) or last.response != said:
            yield f"{_name(response)} was told {said!r}; the run ended with {last}"


def nothing_left_is_204(_: Plan, seen: Observations) -> Iterator[str]:
    """204 comes to those alone who have the last event of a run that is over."""
    for response in seen.responses:
        run = seen.runs.get(response.run_id)
        if response.status != 204 or response.what not in _OF_RUNS or run is None:
            continue
        last = run.events[-1]
        if response.after < RESERVED_SEQ and not (
            isinstance(last.event, TERMINAL_EVENT_TYPES) and response.after == last.seq
        ):
            yield f"{_name(response)} got 204 after {response.after}; the newest event is {last.seq}"


READER_CHECKS = (
    ids_follow_each_other,
    all_read_the_same,
    nothing_follows_the_end,
    no_silent_end,
    nobody_is_cut_off_without_a_reason,
    everybody_hears_the_end,
    statuses_are_known,
    whole_answers_are_the_runs,
    nothing_left_is_204,
)


def _streams(seen: Observations) -> Iterator[Response]:
    for response in seen.responses:
        if response.status == 200 and response.what in (*_OF_RUNS, *_OF_BATCHES):
            yield response


def _ends(seen: Observations) -> set[str]:
    """The ids of all terminal frames that were made or read."""
    last = {run_id: run.events[-1] for run_id, run in seen.runs.items() if run.events}
    made = {f"{run_id}.{entry.seq}" for run_id, entry in last.items() if isinstance(entry.event, TERMINAL_EVENT_TYPES)}
    return made | {frame.id for response in _streams(seen) for frame in response.frames if _is_end(response, frame)}


def _newest_numbers(seen: Observations) -> dict[str, int]:
    """Of each run and each batch, the highest number that was made or read."""
    newest = {run_id: run.events[-1].seq for run_id, run in seen.runs.items() if run.events}
    for response in _streams(seen):
        for frame in response.frames[-1:]:
            if (match := _ID.fullmatch(frame.id)) is not None:
                newest[match[1]] = max(newest.get(match[1], 0), int(match[2]))
    return newest


def _deletions(seen: Observations) -> dict[str, float]:
    """Of each batch of which somebody deleted a run, when that was asked for first."""
    asked: dict[str, float] = {}
    for response in seen.responses:
        if response.what == "delete":
            asked.setdefault(response.run_id, response.asked_at)
    times = {batch_id: [asked[run] for run in runs if run in asked] for batch_id, runs in seen.batches.items()}
    return {batch_id: min(of_runs) for batch_id, of_runs in times.items() if of_runs}


def _is_slow(client: ClientPlan, latency: float) -> bool:
    """Whether its reading, or its line (a window for each round trip), may be slower than serving puts up with."""
    takes = 2 * latency * STALL_BYTES / client.window
    pauses = client.read_pause > 0 or any(step.act == "pause" for step in client.steps)
    return pauses or takes > ServingLimits().write_stall


def _is_end(response: Response, frame: SeenFrame) -> bool:
    """A run's own end; in a batch that of the batch, or the error that closes a lost one (it names no run)."""
    kind = _ENDS.search(frame.frame)
    if kind is None:
        return False
    if response.what in _OF_RUNS:
        return kind[1] != b"batch_done"
    return kind[1] == b"batch_done" or b'"run_id"' not in frame.frame


def _may_be_a_failed_run(response: Response) -> bool:
    """Whether it is a run's answer that was to come whole, which names its run; when to ask again, nobody knows."""
    is_cut_short = len(response.body) < int(response.headers.get("content-length", 0))
    return b'"run_id"' in response.body or (response.what == "whole" and is_cut_short)


def _is_refusal(response: Response) -> bool:
    return b'"code"' in response.body


def _name(response: Response) -> str:
    of = f" of {response.run_id}" if response.run_id else ""
    return f"client {response.client}'s {response.what}{of} (asked at {response.asked_at:.9f})"
