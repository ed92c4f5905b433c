"""Frames are bytes that clients parse: pinned exactly."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from engine.events import EVENT_TYPES, TERMINAL_EVENT_TYPES, CalledTool, CallOutcome, encode_frame

USAGE = Usage(12, 34, reasoning_tokens=5, cached_tokens=6, estimated=True, provider="vendor", model="large")

CHUNK_TYPES: dict[type[Event], str] = {
    AgentStarted: "start",
    TextDelta: "content",
    ReasoningDelta: "reasoning",
    ToolCallStart: "tool_call_start",
    ToolCallDelta: "tool_call_delta",
    ToolCallComplete: "tool_call_complete",
    StepComplete: "step_complete",
    MemoryUpdate: "memory_update",
    UsageUpdate: "usage",
    Metadata: "metadata",
    GenerationComplete: "done",
    Error: "error",
    AgentStopped: "stop",
}

FULL: list[Event] = [
    AgentStarted("agent", "run", "2026-11-22T12:00:00+00:00"),
    TextDelta("Hello", "step-1"),
    ReasoningDelta("Hm", "step-1"),
    ToolCallStart("call", "weather", "step-1", {"city": "Bern", "days": [1, 2]}),
    ToolCallDelta("call", '{"city": "Be', "step-1"),
    ToolCallComplete("call", "Success", {"degrees": 21.5, "sky": None}, "step-1"),
    StepComplete("Tool", "step-1", (CalledTool("c", "t", {}),), (CallOutcome("c", "Success", 1),)),
    MemoryUpdate("name", "Set"),
    UsageUpdate(USAGE),
    Metadata("streaming_mode", "direct"),
    GenerationComplete("Hello", 2, 1234.5, 250.25, USAGE, "length"),
    Error("timeout.idle", "no token", "Hel", USAGE, 2.5),
    AgentStopped("requested", "Hel", USAGE),
]

BARE: list[tuple[Event, str]] = [
    (ToolCallStart("c", "t", "s"), '{"chunk_type":"tool_call_start","call_id":"c","tool_name":"t","step_id":"s"}'),
    (
        ToolCallComplete("c", "Error", None, "s"),
        '{"chunk_type":"tool_call_complete","call_id":"c","status":"Error","result":null,"step_id":"s"}',
    ),
    (UsageUpdate(Usage(1, 2)), '{"chunk_type":"usage","usage":{"input_tokens":1,"output_tokens":2}}'),
    (
        GenerationComplete("", 1, 0.0, None, None),
        '{"chunk_type":"done","response":"","total_steps":1,"elapsed_ms":0.0,"ttfb_ms":null,"usage":null}',
    ),
    (Error("internal", "oh"), '{"chunk_type":"error","code":"internal","content":"oh"}'),
    (
        AgentStopped("requested", "", None),
        '{"chunk_type":"stop","reason":"requested","response":"","usage":null}',
    ),
]


def data_of(frame: bytes) -> bytes:
    return frame.partition(b"data: ")[2].removesuffix(b"\n\n")


def test_the_first_frame_is_these_bytes() -> None:
    event = AgentStarted("agent", "R-_0", "2026-11-22T12:00:00+00:00")
    assert encode_frame("R-_0", 1, event) == (
        b"retry: 1000\n"
        b"id: R-_0.1\n"
        b'data: {"chunk_type":"start","agent_id":"agent","run_id":"R-_0","timestamp":"2026-11-22T12:00:00+00:00"}\n'
        b"\n"
    )


def test_a_later_frame_is_these_bytes() -> None:
    assert encode_frame("R-_0", 1234567, TextDelta("Grüezi 👋", "step-1")) == (
        b"id: R-_0.1234567\n"
        b'data: {"chunk_type":"content","content":"Gr\xc3\xbcezi \xf0\x9f\x91\x8b","step_id":"step-1"}\n'
        b"\n"
    )


@pytest.mark.parametrize("seq", [2, 10, 11, 101, 1000])
def test_only_frame_one_says_retry(seq: int) -> None:
    assert encode_frame("run", seq, TextDelta("", "s")).startswith(b"id: run.%d\ndata: {" % seq)


def test_the_tags_are_the_chunk_types_of_the_design() -> None:
    assert {kind: kind.__struct_config__.tag for kind in EVENT_TYPES} == CHUNK_TYPES
    assert {kind.__struct_config__.tag_field for kind in EVENT_TYPES} == {"chunk_type"}


def test_the_terminal_events_are_named() -> None:
    assert set(TERMINAL_EVENT_TYPES) == {GenerationComplete, Error, AgentStopped}


def test_there_is_a_full_sample_of_every_event() -> None:
    assert [type(event) for event in FULL] == list(EVENT_TYPES)


@pytest.mark.parametrize("event", FULL, ids=lambda event: type(event).__name__)
def test_every_event_comes_back_from_its_frame(event: Event) -> None:
    assert msgspec.json.decode(data_of(encode_frame("run", 2, event)), type=Event) == event


@pytest.mark.parametrize("event", FULL, ids=lambda event: type(event).__name__)
def test_the_frame_has_every_field_that_is_set(event: Event) -> None:
    fields = json.loads(data_of(encode_frame("run", 2, event)))
    assert list(fields) == ["chunk_type", *event.__struct_fields__]


@pytest.mark.parametrize(("event", "data"), BARE, ids=lambda value: type(value).__name__)
def test_fields_at_their_default_are_left_out_and_others_never(event: Event, data: str) -> None:
    assert data_of(encode_frame("run", 2, event)) == data.encode()
    assert msgspec.json.decode(data, type=Event) == event


@pytest.mark.parametrize("event", FULL, ids=lambda event: type(event).__name__)
def test_events_cannot_be_changed(event: Event) -> None:
    with pytest.raises(AttributeError, match="immutable"):
        setattr(event, event.__struct_fields__[0], "other")


@pytest.mark.parametrize(
    "content",
    [
        "\n",
        "\r",
        "\r\n",
        "a\n\ndata: b\n\n",
        "\u2028",
        "\u2029",
        "\x85",
        "\x0b\x0c",
        "\x00",
        "👩‍👩‍👧‍👦",
        "\ufeff",
        "日本語",
        '"\\',
    ],
    ids=ascii,
)
def test_any_content_stays_one_data_line(content: str) -> None:
    assert_one_data_line(content)


@given(content=st.text(st.characters(exclude_categories=["Cs"])))
def test_whatever_the_content_it_stays_one_data_line(content: str) -> None:
    assert_one_data_line(content)


def assert_one_data_line(content: str) -> None:
    frame = encode_frame("run", 7, TextDelta(content, "s"))
    assert b"\r" not in frame
    first, data, *rest = frame.split(b"\n")
    assert (first, rest) == (b"id: run.7", [b"", b""])
    assert json.loads(data.removeprefix(b"data: "))["content"] == content


@pytest.mark.parametrize("result", [float("nan"), float("inf")])
def test_a_number_that_json_lacks_becomes_null(result: Any) -> None:
    frame = encode_frame("run", 2, ToolCallComplete("c", "Success", result, "s"))
    assert json.loads(data_of(frame))["result"] is None
