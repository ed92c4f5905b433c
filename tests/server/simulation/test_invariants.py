"""Each invariant holds in a good world and sees its own violation, and no other does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine import AgentStopped, Error, GenerationComplete, TextDelta
from engine.events import AgentStarted, Event, data_of, encode_frame
from engine.run import Run
from server.simulation.invariants import check
from server.simulation.observations import (
    KeptRun,
    LoggedEvent,
    Observations,
    ObservedRun,
    Response,
    SeenFrame,
    UpstreamCall,
)
from server.simulation.plan import AgentPlan, ClientPlan, DeadlinePlan, EventPlan, Plan

RUN_ID = "R" * 22
PLAN = Plan(seed=0, agents=(AgentPlan(deadlines=DeadlinePlan(total=120.0, first_token=30.0, idle=30.0)),))
DONE = GenerationComplete("Hello", 1, 2000.0, 500.0, None, "stop")
EVENTS: tuple[Event, ...] = (AgentStarted("agent0", RUN_ID, "now"), TextDelta("Hel", "s"), TextDelta("lo", "s"), DONE)
TIMES = (1.0, 1.5, 2.0, 3.0)


def logged(events: tuple[Event, ...] = EVENTS, times: tuple[float, ...] = TIMES) -> list[LoggedEvent]:
    return [
        LoggedEvent(at, seq, event, encode_frame(RUN_ID, seq, event))
        for seq, (at, event) in enumerate(zip(times, events, strict=True), 1)
    ]


def reading(events: list[LoggedEvent], what: str = "chat", after: int = 0) -> Response:
    frames = [SeenFrame(entry.at, f"{RUN_ID}.{entry.seq}", entry.frame) for entry in events[after:]]
    return Response(0, what, 0, 1.0, after, RUN_ID, 200, {}, frames, ending="whole", ended_at=3.0)


def good_world() -> Observations:
    """One run that two readers have read, one of them from the middle on."""
    events = logged()
    run = cast(Run, SimpleNamespace(id=RUN_ID, spec=SimpleNamespace(agent_id="agent0")))
    whole = Response(
        0, "whole", 0, 1.0, 0, RUN_ID, 200, {}, [], b'{"success":true,"data":{"content":"Hello"}}', "whole"
    )
    return Observations(
        responses=[reading(events), reading(events, "events", after=2), whole],
        runs={RUN_ID: ObservedRun(run, 0, 0, 1.0, events)},
        calls=[UpstreamCall(0, 0, 0, 1.0, [1.5, 2.0], closed_at=3.0)],
        output="a log",
        secrets=("sk-secret",),
        kept={RUN_ID: KeptRun(RUN_ID, "done", "Hello", [(entry.seq, data_of(entry.frame)) for entry in events])},
        bounds={"log_bytes": 1000},
    )


def only(seen: Observations) -> ObservedRun:
    return seen.runs[RUN_ID]


def ended(seen: Observations, end: Event, at: float = 3.0) -> None:
    """The run ends otherwise, for its store and its readers too."""
    events = logged((*EVENTS[:3], end), (*TIMES[:3], at))
    only(seen).events[:] = events
    response = cast(Any, end).response
    status = str(end.__struct_config__.tag)
    seen.kept[RUN_ID] = KeptRun(RUN_ID, status, response, [(entry.seq, data_of(entry.frame)) for entry in events])
    seen.responses[:] = [reading(events)]
    seen.calls[0].closed_at = at


def test_a_good_world_has_no_violation() -> None:
    assert check(PLAN, good_world()) == []


def test_good_ends_of_other_kinds() -> None:
    seen = good_world()
    ended(seen, Error("timeout.idle", "silent", "Hello"), at=32.0)
    assert check(PLAN, seen) == []
    seen = good_world()
    ended(seen, AgentStopped("requested", "Hello", None))
    seen.responses.append(Response(0, "stop", 0, 3.0, 0, RUN_ID, 200, {}, [], b"{}", "whole"))
    seen.stops[RUN_ID] = 3.0
    assert check(PLAN, seen) == []


def test_a_run_that_died_with_its_worker_is_closed_elsewhere() -> None:
    seen = good_world()
    del only(seen).events[3:]
    lost = Error("worker_lost", "gone", "Hello")
    number = 1_000_000_001
    closing = SeenFrame(14.0, f"{RUN_ID}.{number}", encode_frame(RUN_ID, number, lost))
    for response in seen.responses[:2]:
        response.frames[-1] = closing
    del seen.responses[2]
    seen.kept[RUN_ID] = KeptRun(RUN_ID, "error", "Hello", seen.kept[RUN_ID].events[:2])
    seen.deaths.append((3.0, 0))
    assert check(PLAN, seen) == []


def swap_numbers(seen: Observations) -> None:
    only(seen).events[1].seq, only(seen).events[2].seq = 3, 2


def end_twice(seen: Observations) -> None:
    only(seen).events.append(LoggedEvent(3.0, 5, DONE, encode_frame(RUN_ID, 5, DONE)))
    seen.kept[RUN_ID].events.append((5, data_of(encode_frame(RUN_ID, 5, DONE))))


def never_end(seen: Observations) -> None:
    del only(seen).events[3:]
    seen.calls.clear()
    del seen.responses[2]
    for response in seen.responses:
        del response.frames[-1:]
        response.ending = "left"


def end_with_other_text(seen: Observations) -> None:
    ended(seen, GenerationComplete("Hell", 1, 2000.0, 500.0, None, "stop"))


def go_on_after_a_stop(seen: Observations) -> None:
    seen.stops[RUN_ID] = 2.5


def stop_by_nobody(seen: Observations) -> None:
    ended(seen, AgentStopped("requested", "Hello", None))


def fire_late(seen: Observations) -> None:
    ended(seen, Error("timeout.idle", "silent", "Hello"), at=32.250_001)


def fire_idle_early(seen: Observations) -> None:
    ended(seen, Error("timeout.idle", "silent", "Hello"), at=31.999_999)


def fire_total_early(seen: Observations) -> None:
    ended(seen, Error("timeout.total", "long", "Hello"), at=120.9)


def last_too_long(seen: Observations) -> None:
    ended(seen, DONE, at=200.0)


def leave_a_call_open(seen: Observations) -> None:
    seen.calls[0].closed_at = None


def close_a_call_late(seen: Observations) -> None:
    seen.calls[0].closed_at = 3.1


def crash(seen: Observations) -> None:
    only(seen).crashes.append(ValueError("bug"))


def answer_500(seen: Observations) -> None:
    seen.responses.append(Response(0, "health", 0, 1.0, status=500, ending="whole"))


def keep_another_status(seen: Observations) -> None:
    seen.kept[RUN_ID].status = "error"


def keep_another_text(seen: Observations) -> None:
    seen.kept[RUN_ID].response = "Hell"


def lose_a_kept_event(seen: Observations) -> None:
    del seen.kept[RUN_ID].events[1]


def keep_another_event(seen: Observations) -> None:
    seen.kept[RUN_ID].events[1] = (2, b"{}")


def lose_a_kept_run(seen: Observations) -> None:
    seen.kept.clear()


def leave_a_task(seen: Observations) -> None:
    seen.left_over.append("task x")


def grow(seen: Observations) -> None:
    seen.bounds["log_bytes"] = 10**9


def log_a_key(seen: Observations) -> None:
    seen.output = "key=sk-secret"


def tell_a_key(seen: Observations) -> None:
    seen.responses[2].headers["x"] = "sk-secret"


def skip_a_number(seen: Observations) -> None:
    del seen.responses[0].frames[1]


def repeat_a_number(seen: Observations) -> None:
    seen.responses[1].after = 1
    seen.responses[1].frames.insert(0, seen.responses[1].frames[0])
    seen.responses[1].after = 2


def send_another_runs_id(seen: Observations) -> None:
    frame = seen.responses[0].frames[1]
    frame.id = f"{'X' * 22}.2"


def send_other_bytes(seen: Observations) -> None:
    seen.responses[1].frames[0].frame = b"other"


def end_silently(seen: Observations) -> None:
    del seen.responses[0].frames[-1]


def cut_off(seen: Observations) -> None:
    seen.responses[0].ending = "broken"


def hang(seen: Observations) -> None:
    seen.responses[0].ending = ""


def answer_418(seen: Observations) -> None:
    seen.responses.append(Response(0, "state", 0, 1.0, 0, RUN_ID, 418, {}, [], b'{"code":"X"}', "whole"))


def refuse_without_a_time(seen: Observations) -> None:
    seen.responses.append(Response(0, "state", 0, 1.0, 0, RUN_ID, 503, {}, [], b'{"code":"X"}', "whole"))


def tell_another_answer(seen: Observations) -> None:
    seen.responses[2].body = b'{"success":true,"data":{"content":"Bye"}}'


def say_nothing_is_left_too_early(seen: Observations) -> None:
    seen.responses.append(Response(0, "events", 0, 1.0, 2, RUN_ID, 204, {}, [], b"", "whole"))


VIOLATIONS: dict[Callable[[Observations], None], set[str]] = {
    swap_numbers: {"numbers_are_dense", "all_read_the_same", "the_store_agrees"},
    end_twice: {"one_end_and_last"},
    never_end: {"one_end_and_last"},
    end_with_other_text: {"the_end_has_the_text"},
    go_on_after_a_stop: {"nothing_after_a_stop"},
    stop_by_nobody: {"nobody_stops_what_nobody_stopped"},
    fire_late: {"deadlines_are_kept"},
    fire_idle_early: {"deadlines_are_kept"},
    fire_total_early: {"deadlines_are_kept"},
    last_too_long: {"deadlines_are_kept"},
    leave_a_call_open: {"no_call_outlives_its_run"},
    close_a_call_late: {"no_call_outlives_its_run"},
    crash: {"nothing_crashed"},
    answer_500: {"nothing_crashed"},
    keep_another_status: {"the_store_agrees"},
    keep_another_text: {"the_store_agrees"},
    lose_a_kept_event: {"the_store_agrees"},
    keep_another_event: {"the_store_agrees"},
    lose_a_kept_run: {"the_store_agrees"},
    leave_a_task: {"nothing_is_left"},
    grow: {"memory_is_bounded"},
    log_a_key: {"secrets_are_kept"},
    tell_a_key: {"secrets_are_kept"},
    skip_a_number: {"ids_follow_each_other"},
    repeat_a_number: {"ids_follow_each_other"},
    send_another_runs_id: {"ids_follow_each_other"},
    send_other_bytes: {"all_read_the_same"},
    end_silently: {"no_silent_end"},
    cut_off: {"nobody_is_cut_off_without_a_reason"},
    hang: {"everybody_hears_the_end"},
    answer_418: {"statuses_are_known"},
    refuse_without_a_time: {"statuses_are_known"},
    tell_another_answer: {"whole_answers_are_the_runs"},
    say_nothing_is_left_too_early: {"nothing_left_is_204"},
}


@pytest.mark.parametrize("violate", VIOLATIONS, ids=lambda violate: violate.__name__)
def test_each_violation_is_seen(violate: Callable[[Observations], None]) -> None:
    seen = copy.deepcopy(good_world())
    violate(seen)
    assert {line.partition(":")[0] for line in check(PLAN, seen)} == VIOLATIONS[violate]


def test_more_after_the_end_is_seen() -> None:
    seen = good_world()
    seen.responses[0].frames.append(seen.responses[0].frames[-1])
    found = {line.partition(":")[0] for line in check(PLAN, seen)}
    assert found == {"nothing_follows_the_end", "ids_follow_each_other"}


def test_who_reads_slowly_or_when_the_world_is_hit_may_be_cut_off() -> None:
    seen = good_world()
    seen.responses[0].ending = "broken"
    slow = Plan(seed=0, clients=(ClientPlan(read_pause=9.0),))
    hit = Plan(seed=0, events=(EventPlan(at=1.0, act="shared_away"),))
    narrow = Plan(seed=0, latency=0.5, clients=(ClientPlan(window=500),))  # 500 bytes a second
    assert check(slow, seen) == check(hit, seen) == check(narrow, seen) == []
    wide = Plan(seed=0, latency=0.5, clients=(ClientPlan(window=4096),))
    assert len(check(wide, seen)) == 1


BATCH_ID = "B" * 22


def of_batch(after: int, *kinds: str) -> Response:
    """An answer that ended as it should, with frames of those kinds."""
    frames = [
        SeenFrame(3.0, f"{BATCH_ID}.{seq}", b'id: %d\ndata: {"chunk_type":"%s"}\n\n' % (seq, kind.encode()))
        for seq, kind in enumerate(kinds, after + 1)
    ]
    return Response(0, "batch_events", 0, 3.0, after, BATCH_ID, 200, {}, frames, ending="whole", ended_at=3.0)


def checked(seen: Observations) -> set[str]:
    return {line.partition(":")[0] for line in check(PLAN, seen)}


def test_who_has_the_end_of_a_batch_needs_no_other_and_who_has_not_does() -> None:
    seen = good_world()
    seen.responses += [of_batch(0, "batch_start", "batch_done"), of_batch(2)]
    assert checked(seen) == set()
    seen.responses.append(of_batch(1))
    assert checked(seen) == {"no_silent_end"}


def test_a_cursor_that_nobody_was_given_may_be_cut_off_and_no_other() -> None:
    seen = good_world()
    seen.responses += [of_batch(0, "batch_start", "batch_done"), of_batch(9), reading([], "events", after=5)]
    for response in seen.responses[-2:]:
        response.ending = "broken"
        response.frames.clear()
    assert checked(seen) == set()
    seen.responses[-1].after = 4
    assert checked(seen) == {"nobody_is_cut_off_without_a_reason"}
    seen.responses[-1].after, seen.responses[-2].after = 5, 2
    assert checked(seen) == {"nobody_is_cut_off_without_a_reason"}


def test_only_of_a_run_that_failed_nobody_needs_to_say_when_to_ask_again() -> None:
    seen = good_world()
    body = b'{"code":"upstream.overloaded","details":{"run_id":"R"}}'
    failed = Response(0, "whole", 0, 1.0, 0, "", 503, {"content-length": str(len(body))}, [], body, "whole")
    seen.responses.append(failed)
    assert checked(seen) == set()
    failed.body, failed.ending = body[:20], "left"  # not read so far
    assert checked(seen) == set()
    failed.what = "state"
    assert checked(seen) == {"statuses_are_known"}
    failed.what, failed.headers = "whole", {}
    assert checked(seen) == {"statuses_are_known"}


def test_who_reads_a_batch_of_which_a_run_is_deleted_may_be_cut_off_then() -> None:
    seen = good_world()
    cut = of_batch(0, "batch_start")
    cut.ending = "broken"
    seen.responses += [cut, Response(0, "delete", 0, 2.0, 0, RUN_ID, 204, {}, [], b"", "whole")]
    assert checked(seen) == {"nobody_is_cut_off_without_a_reason"}
    seen.batches[BATCH_ID] = [RUN_ID]
    assert checked(seen) == set()
    cut.ended_at = 1.9
    assert checked(seen) == {"nobody_is_cut_off_without_a_reason"}


@pytest.mark.parametrize(("kind", "found"), [("error", set()), ("content", {"ids_follow_each_other"})])
def test_only_an_end_is_numbered_later(kind: str, found: set[str]) -> None:
    seen = good_world()
    lost = of_batch(999_999_999, kind)
    lost.after, lost.ending = 3, "left"
    seen.responses.append(lost)
    assert checked(seen) == found


def test_who_has_the_end_of_a_lost_run_gets_204() -> None:
    seen = good_world()
    nothing = Response(0, "events", 0, 4.0, 1_000_000_000, RUN_ID, 204, {}, [], b"", "whole")
    seen.responses.append(nothing)
    assert checked(seen) == set()
    nothing.after = 999_999_999
    assert checked(seen) == {"nothing_left_is_204"}
