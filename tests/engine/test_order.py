"""What may follow what: every state with every event type, against the rules written down a second time here."""

from __future__ import annotations

import pytest

from engine import (
    AgentStarted,
    AgentStopped,
    Error,
    Event,
    GenerationComplete,
    MemoryUpdate,
    Metadata,
    ReasoningDelta,
    StepComplete,
    TextDelta,
    ToolCallComplete,
    ToolCallDelta,
    ToolCallStart,
    Usage,
    UsageUpdate,
)
from engine.errors import EventOrderError
from engine.events import EVENT_TYPES
from engine.order import CALL_TABLE, RUN_TABLE, CallState, EventOrder, RunState

START = AgentStarted("agent", "run", "now")
CALL_START = ToolCallStart("call", "tool", "step")
CALL_DELTA = ToolCallDelta("call", "{", "step")
CALL_COMPLETE = ToolCallComplete("call", "Success", 1, "step")
TERMINALS: list[Event] = [
    GenerationComplete("", 1, 0.0, None, None),
    Error("internal", "oh"),
    AgentStopped("requested", "", None),
]
PLAIN: list[Event] = [
    TextDelta("a", "step"),
    ReasoningDelta("a", "step"),
    StepComplete("Final", "step"),
    MemoryUpdate("key", "Set"),
    UsageUpdate(Usage(1, 1)),
    Metadata("key", 1),
]
CALL_EVENTS: list[Event] = [CALL_START, CALL_DELTA, CALL_COMPLETE]
ALL: list[Event] = [START, *PLAIN, *CALL_EVENTS, *TERMINALS]

WAY_TO: dict[CallState, list[Event]] = {
    CallState.ABSENT: [],
    CallState.STARTED: [CALL_START],
    CallState.COMPLETED: [CALL_START, CALL_COMPLETE],
}
ADMITTED_IN: dict[CallState, list[Event]] = {
    CallState.ABSENT: [CALL_START],
    CallState.STARTED: [CALL_DELTA, CALL_COMPLETE],
    CallState.COMPLETED: [],
}


def name_of(value: object) -> str:
    return value.name if isinstance(value, RunState | CallState) else type(value).__name__


def order_in(state: RunState, call: CallState = CallState.ABSENT) -> EventOrder:
    """An order that has come to these states by events."""
    order = EventOrder()
    way: list[Event] = [] if state is RunState.CREATED else [START]
    way += WAY_TO[call]
    way += [TERMINALS[0]] if state is RunState.ENDED else []
    for event in way:
        order.admit(event)
    assert order.state is state
    return order


def expected_state(state: RunState, call: CallState, event: Event) -> RunState | None:
    """The rules, said otherwise than in the tables; None where the event is refused."""
    if state is RunState.CREATED:
        return RunState.RUNNING if event is START else None
    if state is RunState.ENDED or event is START:
        return None
    if event in CALL_EVENTS:
        return RunState.RUNNING if event in ADMITTED_IN[call] else None
    return RunState.ENDED if event in TERMINALS else RunState.RUNNING


def test_there_is_a_sample_of_every_event() -> None:
    assert {type(event) for event in ALL} == set(EVENT_TYPES)


def test_the_tables_are_closed() -> None:
    assert set(RUN_TABLE) == set(RunState)
    assert set(CALL_TABLE) == set(CallState)
    for run_row in RUN_TABLE.values():
        assert set(run_row) <= set(EVENT_TYPES)
        assert set(run_row.values()) <= set(RunState)
    for call_row in CALL_TABLE.values():
        assert set(call_row) <= {ToolCallStart, ToolCallDelta, ToolCallComplete}
        assert set(call_row.values()) <= set(CallState)


@pytest.mark.parametrize("event", ALL, ids=name_of)
@pytest.mark.parametrize("call", CallState, ids=name_of)
@pytest.mark.parametrize("state", RunState, ids=name_of)
def test_every_event_in_every_state(state: RunState, call: CallState, event: Event) -> None:
    if state is RunState.CREATED and call is not CallState.ABSENT:
        return  # no call can come before the run's start
    order = order_in(state, call)
    expected = expected_state(state, call, event)
    if expected is None:
        with pytest.raises(EventOrderError, match=type(event).__name__):
            order.admit(event)
        assert order.state is state
    else:
        order.admit(event)
        assert order.state is expected


@pytest.mark.parametrize("event", CALL_EVENTS, ids=name_of)
@pytest.mark.parametrize("call", CallState, ids=name_of)
def test_a_refused_call_event_changes_no_call(call: CallState, event: Event) -> None:
    order = order_in(RunState.RUNNING, call)
    if expected_state(RunState.RUNNING, call, event) is None:
        with pytest.raises(EventOrderError):
            order.admit(event)
        twin = order_in(RunState.RUNNING, call)
        for probe in (CALL_DELTA, CALL_COMPLETE):
            assert admits(order, probe) == admits(twin, probe)


def admits(order: EventOrder, event: Event) -> bool:
    try:
        order.admit(event)
    except EventOrderError:
        return False
    return True


def test_a_call_event_that_the_run_refuses_starts_no_call() -> None:
    order = EventOrder()
    with pytest.raises(EventOrderError, match="CREATED"):
        order.admit(CALL_START)
    order.admit(START)
    order.admit(CALL_START)


def test_calls_interleave_and_each_walks_its_own_way() -> None:
    order = order_in(RunState.RUNNING)
    order.admit(ToolCallStart("a", "tool", "step"))
    order.admit(ToolCallStart("b", "tool", "step"))
    order.admit(ToolCallDelta("a", "1", "step"))
    order.admit(TextDelta("meanwhile", "step"))
    order.admit(ToolCallDelta("b", "2", "step"))
    order.admit(ToolCallComplete("a", "Success", 1, "step"))
    order.admit(ToolCallDelta("b", "3", "step"))
    with pytest.raises(EventOrderError, match="call a is COMPLETED"):
        order.admit(ToolCallDelta("a", "4", "step"))
    order.admit(ToolCallComplete("b", "Error", "timed out", "step"))


@pytest.mark.parametrize("terminal", TERMINALS, ids=name_of)
def test_a_run_may_end_within_a_call(terminal: Event) -> None:
    order = order_in(RunState.RUNNING, CallState.STARTED)
    order.admit(terminal)
    assert order.state is RunState.ENDED
