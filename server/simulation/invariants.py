"""What holds in every simulated world, whatever goes wrong in it: of runs, of the store, of what is left at the end.

What holds for readers is in ``reader_invariants``. A check gives one line for each violation, and none in a good world.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from typing import TypeAlias

from engine import AgentStopped, Error, TextDelta
from engine.deadlines import SLACK_SECONDS
from engine.events import TERMINAL_EVENT_TYPES, AgentStarted, data_of
from engine.run import SAVE_SECONDS

from .observations import LoggedEvent, Observations, ObservedRun, UpstreamCall
from .plan import DeadlinePlan, Plan
from .reader_invariants import READER_CHECKS

Check: TypeAlias = Callable[[Plan, Observations], Iterator[str]]

NANOSECOND = 1e-9

JOURNAL_SECONDS = 1.0
"""A worker that dies so shortly after a run's end may take it along: the journal writes every 250 ms."""

BOUNDS = {
    "log_bytes": 9 * 2**20,  # of one run: 8 MiB, and the event that says so
    "journal_bytes": 64 * 2**20,
    "tasks": 2_000,
    "connections": 500,
}
"""What a world may hold at most, by the names of ``Observations.bounds``."""


def check(plan: Plan, seen: Observations) -> list[str]:
    """Every violation, each a line; none in a world where all holds."""
    return [f"{of.__name__}: {line}" for of in CHECKS for line in of(plan, seen)]


def numbers_are_dense(_: Plan, seen: Observations) -> Iterator[str]:
    """A run's events count from 1; the first says that it started."""
    for run_id, run in seen.runs.items():
        numbers = [entry.seq for entry in run.events]
        if numbers != list(range(1, len(numbers) + 1)):
            yield f"run {run_id} has the numbers {numbers}"
        if run.events and not isinstance(run.events[0].event, AgentStarted):
            yield f"run {run_id} begins with {run.events[0].event}"


def one_end_and_last(_: Plan, seen: Observations) -> Iterator[str]:
    """Exactly one terminal event, as the last one; none of a run that died with its worker."""
    for run_id, run in seen.runs.items():
        places = [place for place, entry in enumerate(run.events) if isinstance(entry.event, TERMINAL_EVENT_TYPES)]
        if places and places != [len(run.events) - 1]:
            yield f"run {run_id} has terminal events at {places} of {len(run.events)}"
        if not places and not _died(seen, run):
            yield f"run {run_id} has no terminal event"


def the_end_has_the_text(_: Plan, seen: Observations) -> Iterator[str]:
    """The terminal event's response is what was said."""
    for run_id, run in seen.runs.items():
        end = _end(run)
        said = "".join(entry.event.content for entry in run.events if isinstance(entry.event, TextDelta))
        if end is not None and end.event.response != said:  # type: ignore[union-attr]  # it is terminal
            yield f"run {run_id} said {said!r} and ends with {end.event}"


def nothing_after_a_stop(_: Plan, seen: Observations) -> Iterator[str]:
    """Once a stop was answered, no event follows; and it is not an error that ends the run then."""
    for run_id, at in seen.stops.items():
        run = seen.runs.get(run_id)
        late = [] if run is None else [entry for entry in run.events if entry.at > at + NANOSECOND]
        if late:
            yield f"run {run_id} was stopped at {at} and goes on with {late[0].event} at {late[0].at}"


def nobody_stops_what_nobody_stopped(_: Plan, seen: Observations) -> Iterator[str]:
    """A run that ends by request was stopped or deleted by somebody, in this world."""
    asked = {response.run_id for response in seen.responses if response.what in {"stop", "delete", "socket"}}
    asked |= {run_id for batch_id in asked for run_id in seen.batches.get(batch_id, ())}
    for run_id, run in seen.runs.items():
        end = _end(run)
        if end is None or not isinstance(end.event, AgentStopped) or end.event.reason != "requested":
            continue
        if run_id not in asked:
            yield f"run {run_id} was stopped by nobody"


def deadlines_are_kept(plan: Plan, seen: Observations) -> Iterator[str]:
    """A deadline that fires does so to the nanosecond, an idle one to its slack; no run outlasts its total one."""
    for run_id, run in seen.runs.items():
        end = _end(run)
        if end is None:
            continue
        deadlines = _deadlines(plan, run)
        lasted = end.at - run.started_at
        longest = deadlines.total + SAVE_SECONDS
        if lasted > longest + NANOSECOND:
            yield f"run {run_id} lasted {lasted} s of {longest} s"
        if isinstance(end.event, Error) and end.event.code.startswith("timeout."):
            yield from _fired_on_time(plan, seen, run, end, deadlines)


def _fired_on_time(
    plan: Plan, seen: Observations, run: ObservedRun, end: LoggedEvent, deadlines: DeadlinePlan
) -> Iterator[str]:
    assert isinstance(end.event, Error)
    phase = end.event.code.removeprefix("timeout.")
    seconds = getattr(deadlines, phase)
    if phase == "total":
        since = [run.started_at]
    else:
        since = [at for call in seen.calls if call.worker == run.worker for at in _moments(call, phase, plan.latency)]
    if phase == "first_token" and _has_black_holes(plan):
        since += [end.at - seconds]  # a request on a kept connection that nobody reads any more: nobody sees when
    slack = min(SLACK_SECONDS, seconds / 100) if phase == "idle" else 0.0
    if phase != "connect" and not any(-NANOSECOND <= end.at - at - seconds <= slack + NANOSECOND for at in since):
        yield f"run {run.run.id} ended in {end.event.code} at {end.at}: {seconds} s after nothing"
    if phase == "connect" and end.at < run.started_at + seconds - NANOSECOND:
        yield f"run {run.run.id} ended in {end.event.code} at {end.at}, too early"


def _has_black_holes(plan: Plan) -> bool:
    return any(answer.fault == "black_hole" for vendor in plan.vendors for answer in vendor.answers)


def _moments(call: UpstreamCall, phase: str, latency: float) -> list[float]:
    if phase == "first_token":
        return [call.opened_at, call.opened_at - latency]
    return [at + latency for at in call.content_times]


def no_call_outlives_its_run(_: Plan, seen: Observations) -> Iterator[str]:
    """A request upstream is over once no run of its worker is left that may have made it."""
    for call in seen.calls:
        runs = [run for run in seen.runs.values() if run.worker == call.worker and run.started_at <= call.opened_at]
        latest = max((_over_at(seen, run) for run in runs), default=-inf)
        closed = inf if call.closed_at is None else call.closed_at
        if closed > latest + NANOSECOND:
            yield f"request {call.number} to vendor {call.vendor} was open until {closed}, its run until {latest}"


def nothing_crashed(_: Plan, seen: Observations) -> Iterator[str]:
    """No bug of ours ended a run, and none a request."""
    for run_id, run in seen.runs.items():
        for bug in run.crashes:
            yield f"run {run_id} crashed: {bug!r}"
    for response in seen.responses:
        if response.status == 500:
            yield f"client {response.client} got 500 for {response.what}: {response.body[:300]!r}"


def the_store_agrees(plan: Plan, seen: Observations) -> Iterator[str]:
    """What the store keeps of a run is what was said: the end of it, the text, and every event that it has."""
    deleted = {response.run_id for response in seen.responses if response.what == "delete"}
    store_failed = any(event.act.startswith("store") for event in plan.events)
    for run_id, run in seen.runs.items():
        kept = seen.kept.get(run_id)
        if run_id in deleted or kept is None:
            if kept is None and run_id not in deleted and not _died(seen, run, JOURNAL_SECONDS) and not store_failed:
                yield f"run {run_id} is not in the store"
            continue
        logged = {entry.seq: data_of(entry.frame) for entry in run.events}
        wrong = [seq for seq, data in kept.events if seq in logged and logged[seq] != data]
        if wrong:
            yield f"run {run_id}: the store has other events at {wrong}"
        end = _end(run)
        if end is None or store_failed or _died(seen, run, JOURNAL_SECONDS):
            continue
        if kept.status != end.event.__struct_config__.tag:
            yield f"run {run_id} ended in {end.event}; the store says {kept.status}"
        if kept.response != end.event.response:  # type: ignore[union-attr]  # it is terminal
            yield f"run {run_id} said {end.event.response!r}; the store has {kept.response!r}"  # type: ignore[union-attr]
        if {seq for seq, _ in kept.events} != set(logged):
            yield f"run {run_id} has {len(logged)} events, the store {[seq for seq, _ in kept.events]}"


def nothing_is_left(_: Plan, seen: Observations) -> Iterator[str]:
    """After the end there is no task, connection, slot or reader."""
    yield from seen.left_over


def memory_is_bounded(_: Plan, seen: Observations) -> Iterator[str]:
    """What was largest is below its bound."""
    for name, size in seen.bounds.items():
        if size > BOUNDS.get(name, inf):
            yield f"{name} came to {size}"


def secrets_are_kept(_: Plan, seen: Observations) -> Iterator[str]:
    """No key is in the log, nor in anything that a client got."""
    for secret in seen.secrets:
        if secret in seen.output:
            yield "a key is in the log"
        for response in seen.responses:
            got = b"".join((response.body, *(frame.frame for frame in response.frames)))
            if secret.encode() in got or any(secret in value for value in response.headers.values()):
                yield f"client {response.client} got a key with {response.what}"


CHECKS: tuple[Check, ...] = (
    numbers_are_dense,
    one_end_and_last,
    the_end_has_the_text,
    nothing_after_a_stop,
    nobody_stops_what_nobody_stopped,
    deadlines_are_kept,
    no_call_outlives_its_run,
    nothing_crashed,
    the_store_agrees,
    nothing_is_left,
    memory_is_bounded,
    secrets_are_kept,
    *READER_CHECKS,
)


def _end(run: ObservedRun) -> LoggedEvent | None:
    last = run.events[-1] if run.events else None
    return last if last is not None and isinstance(last.event, TERMINAL_EVENT_TYPES) else None


def _died(seen: Observations, run: ObservedRun, after: float = 0.0) -> bool:
    """Whether its worker's life ended while it was under way, or no more than so many seconds after its end."""
    end = _end(run)
    return any(
        worker == run.worker and run.started_at <= at and (end is None or at <= end.at + after)
        for at, worker in seen.deaths
    )


def _over_at(seen: Observations, run: ObservedRun) -> float:
    end = _end(run)
    deaths = [at for at, worker in seen.deaths if worker == run.worker and at >= run.started_at]
    return min([*deaths, inf if end is None else end.at])


def _deadlines(plan: Plan, run: ObservedRun) -> DeadlinePlan:
    number = int(run.run.spec.agent_id.removeprefix("agent"))
    return plan.agents[number].deadlines
