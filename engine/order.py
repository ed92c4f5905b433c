"""What may follow what in a run's log: two tables, and the small state that walks them.

The style is h11's ``_state.py``: state and event type give the next state; what is not in the table is a bug.
"""

from __future__ import annotations

from enum import Enum, auto

from .errors import EventOrderError
from .events import (
    EVENT_TYPES,
    TERMINAL_EVENT_TYPES,
    AgentStarted,
    Event,
    ToolCallComplete,
    ToolCallDelta,
    ToolCallStart,
)


class RunState(Enum):
    """Where a run's log stands."""

    CREATED = auto()
    RUNNING = auto()
    ENDED = auto()


class CallState(Enum):
    """Where one tool call stands."""

    ABSENT = auto()
    STARTED = auto()
    COMPLETED = auto()


RUN_TABLE: dict[RunState, dict[type[Event], RunState]] = {
    RunState.CREATED: {AgentStarted: RunState.RUNNING},
    RunState.RUNNING: {
        kind: RunState.ENDED if kind in TERMINAL_EVENT_TYPES else RunState.RUNNING
        for kind in EVENT_TYPES
        if kind is not AgentStarted
    },
    RunState.ENDED: {},
}

CALL_TABLE: dict[CallState, dict[type[Event], CallState]] = {
    CallState.ABSENT: {ToolCallStart: CallState.STARTED},
    CallState.STARTED: {
        ToolCallDelta: CallState.STARTED,
        ToolCallComplete: CallState.COMPLETED,
    },
    CallState.COMPLETED: {},
}


_OF_CALLS = (ToolCallStart, ToolCallDelta, ToolCallComplete)


class EventOrder:
    """Walks the tables for one log; refuses, without a change of state, what they do not allow."""

    __slots__ = ("_calls", "_next", "state")

    def __init__(self) -> None:
        self.state = RunState.CREATED
        self._next = RUN_TABLE[self.state]
        self._calls: dict[str, CallState] = {}

    def admit(self, event: Event) -> None:
        """Step to the next state.

        Raises:
            EventOrderError: the event may not come at this point.
        """
        state = self._next.get(type(event))
        if state is None:
            raise EventOrderError(f"{type(event).__name__} may not come when the run is {self.state.name}")
        if isinstance(event, _OF_CALLS):
            call = self._calls.get(event.call_id, CallState.ABSENT)
            if type(event) not in CALL_TABLE[call]:
                raise EventOrderError(f"{type(event).__name__} may not come when call {event.call_id} is {call.name}")
            self._calls[event.call_id] = CALL_TABLE[call][type(event)]
        if state is not self.state:
            self.state, self._next = state, RUN_TABLE[state]
