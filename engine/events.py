"""What a run says: one closed union of frozen events, which is also the wire format.

Each struct encodes to the JSON of one frame; its tag is the ``chunk_type`` that clients switch on. There is no second
set of dicts: a field added here is a field on the wire.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import msgspec

from .errors import ErrorCode
from .pieces import FinishReason

StepType: TypeAlias = Literal["Initial", "Tool", "Final"]
CallStatus: TypeAlias = Literal["Success", "Error"]


class Usage(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Tokens of the run so far.

    Attributes:
        estimated: marks figures that we counted because the vendor gave none.
        provider, model: who answered, where an agent has several providers.
    """

    input_tokens: int
    output_tokens: int
    reasoning_tokens: int | None = None
    cached_tokens: int | None = None
    estimated: bool = False
    provider: str | None = None
    model: str | None = None


class _Event(msgspec.Struct, frozen=True, tag_field="chunk_type", omit_defaults=True):
    """Common settings: immutable, tagged; fields at their default are left out of the JSON."""


class AgentStarted(_Event, frozen=True, tag="start"):
    """Always the first event. ``timestamp`` is wall-clock UTC, ISO 8601: for people, never for durations."""

    agent_id: str
    run_id: str
    timestamp: str


class TextDelta(_Event, frozen=True, tag="content"):
    """The next part of the answer's text, whole code points."""

    content: str
    step_id: str


class ReasoningDelta(_Event, frozen=True, tag="reasoning"):
    """The next part of the model's reasoning text."""

    content: str
    step_id: str


class ToolCallStart(_Event, frozen=True, tag="tool_call_start"):
    """The model begins a tool call; ``arguments`` is there when they came whole, else they follow as deltas."""

    call_id: str
    tool_name: str
    step_id: str
    arguments: dict[str, Any] | None = None


class ToolCallDelta(_Event, frozen=True, tag="tool_call_delta"):
    """The next part of a tool call's arguments, as JSON text."""

    call_id: str
    arguments_fragment: str
    step_id: str


class ToolCallComplete(_Event, frozen=True, tag="tool_call_complete"):
    """The tool call has its result, or its failure, as the model will see it."""

    call_id: str
    status: CallStatus
    result: Any
    step_id: str


class CalledTool(msgspec.Struct, frozen=True):
    """A call of a step; ``arguments`` is the object that the model wrote, or its text if that is no JSON object."""

    call_id: str
    tool_name: str
    arguments: Any


class CallOutcome(msgspec.Struct, frozen=True):
    """What a call of a step gave, as in its ``ToolCallComplete``."""

    call_id: str
    status: CallStatus
    result: Any


class StepComplete(_Event, frozen=True, tag="step_complete"):
    """One model call with the tool calls that it led to is over.

    Attributes:
        step_type: ``Final`` answered; ``Initial`` and, after the first step, ``Tool`` called tools.
        tool_calls, tool_results: in the order of the calls.
    """

    step_type: StepType
    step_id: str
    tool_calls: tuple[CalledTool, ...] = ()
    tool_results: tuple[CallOutcome, ...] = ()


class MemoryUpdate(_Event, frozen=True, tag="memory_update"):
    """A memory key was changed; sent when the stream's configuration asks for it."""

    key: str
    operation: Literal["Set", "Delete", "Clear"]


class UsageUpdate(_Event, frozen=True, tag="usage"):
    """The vendor reported token counts; a later one replaces an earlier one."""

    usage: Usage


class Metadata(_Event, frozen=True, tag="metadata"):
    """A fact about the run for developers; sent when the stream's configuration asks for it."""

    key: str
    value: Any


class GenerationComplete(_Event, frozen=True, tag="done"):
    """Terminal: the whole answer. Times in milliseconds since the run started; ``ttfb_ms`` is null without content."""

    response: str
    total_steps: int
    elapsed_ms: float
    ttfb_ms: float | None
    usage: Usage | None
    finish_reason: FinishReason | None = None


class Error(_Event, frozen=True, tag="error"):
    """Terminal: the run failed. ``content`` is for people; what was said before stays said (``response``)."""

    code: ErrorCode
    content: str
    response: str = ""
    usage: Usage | None = None
    retry_after: float | None = None


class AgentStopped(_Event, frozen=True, tag="stop"):
    """Terminal: the run was stopped by a request, or because nobody was reading. Keeps text and usage so far."""

    reason: str
    response: str
    usage: Usage | None


Event: TypeAlias = (
    AgentStarted
    | TextDelta
    | ReasoningDelta
    | ToolCallStart
    | ToolCallDelta
    | ToolCallComplete
    | StepComplete
    | MemoryUpdate
    | UsageUpdate
    | Metadata
    | GenerationComplete
    | Error
    | AgentStopped
)
TerminalEvent: TypeAlias = GenerationComplete | Error | AgentStopped

EVENT_TYPES: tuple[type[Event], ...] = get_args(Event)
TERMINAL_EVENT_TYPES: tuple[type[TerminalEvent], ...] = get_args(TerminalEvent)
RETRY_MILLISECONDS = 1000
"""How long a browser waits before it reconnects, told with the first frame."""

encode_event = msgspec.json.Encoder().encode
"""The event's JSON."""


def encode_frame(run_id: str, seq: int, event: Event) -> bytes:
    """The event as one native frame: ``id: {run_id}.{seq}`` and ``data: {json}``, closed by a blank line.

    JSON has no raw newline, so the frame needs no escaping (WHATWG HTML, section 9.2.5). There is no ``event:``
    field, so a browser's ``onmessage`` sees every frame. The same bytes go to every reader, at any time.
    """
    return frame_of(run_id, seq, encode_event(event))


def frame_of(run_id: str, seq: int, data: bytes) -> bytes:
    """The frame of an event that is JSON already, as a store kept it."""
    retry = b"retry: %d\n" % RETRY_MILLISECONDS if seq == 1 else b""
    return b"%sid: %s.%d\ndata: %s\n\n" % (retry, run_id.encode(), seq, data)


def data_of(frame: bytes) -> bytes:
    """The event's JSON in its frame: what ``frame_of`` makes the same frame from."""
    return frame[frame.index(_DATA) + len(_DATA) : -2]


_DATA = b"\ndata: "
