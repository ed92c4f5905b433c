"""What the model writes becomes calls: fragments in any order, ids of any kind, never without a bound."""

from __future__ import annotations

import json
from math import inf
from typing import Any

import pytest
from trio.testing import MockClock

from engine import (
    Error,
    Event,
    GenerationComplete,
    Message,
    Piece,
    Run,
    ToolCall,
    ToolCallComplete,
    ToolCallDelta,
    ToolCallPiece,
    ToolCallStart,
)
from engine.emitter import MAX_DEPTH
from engine.model_call import UniqueIds, json_object

from .fake_guests import FakeTool, takes
from .loop_scene import run_with
from .scripted import (
    StepwiseProvider,
    calling,
    events_of,
    saying,
    spec_for,
)

STEP = "step-1"


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def call_events(run: Run) -> list[Event]:
    return [event for event in events_of(run.log) if isinstance(event, ToolCallStart | ToolCallDelta)]


def call_ids(run: Run) -> list[str]:
    """Of the calls begun; each is completed once, and calls and results are the same in the steps."""
    started = [event.call_id for event in events_of(run.log) if isinstance(event, ToolCallStart)]
    completed = [event.call_id for event in events_of(run.log) if isinstance(event, ToolCallComplete)]
    assert sorted(started) == sorted(completed)
    assert len(set(started)) == len(started)
    return started


@pytest.mark.parametrize(
    ("pieces", "events"),
    [
        ([ToolCallPiece(0, "a", "t", '{"x": 1}')], [ToolCallStart("a", "t", STEP, {"x": 1})]),
        ([ToolCallPiece(0, "a", "t")], [ToolCallStart("a", "t", STEP)]),
        (
            [ToolCallPiece(0, "a", "t"), ToolCallPiece(0, None, None, '{"x":'), ToolCallPiece(0, None, None, "1}")],
            [ToolCallStart("a", "t", STEP), ToolCallDelta("a", '{"x":', STEP), ToolCallDelta("a", "1}", STEP)],
        ),
        (
            [ToolCallPiece(0, "a", "t", '{"x":'), ToolCallPiece(0, "a", "t", "1}")],
            [ToolCallStart("a", "t", STEP), ToolCallDelta("a", '{"x":', STEP), ToolCallDelta("a", "1}", STEP)],
        ),
        (
            [ToolCallPiece(0, "a", None, '{"x":'), ToolCallPiece(0, None, None, "1}"), ToolCallPiece(0, None, "t")],
            [ToolCallStart("a", "t", STEP, {"x": 1})],
        ),
        (
            [ToolCallPiece(0, None, None, '{"x":'), ToolCallPiece(0, "a", "t"), ToolCallPiece(0, None, None, "1}")],
            [ToolCallStart("a", "t", STEP), ToolCallDelta("a", '{"x":', STEP), ToolCallDelta("a", "1}", STEP)],
        ),
        ([ToolCallPiece(0, "a", "t", "[1]")], [ToolCallStart("a", "t", STEP), ToolCallDelta("a", "[1]", STEP)]),
        ([ToolCallPiece(0, "a", "t"), ToolCallPiece(1), ToolCallPiece(0, "late")], [ToolCallStart("a", "t", STEP)]),
        (
            [ToolCallPiece(0, "a", "t", '"\ud800')],
            [ToolCallStart("a", "t", STEP), ToolCallDelta("a", '"?', STEP)],
        ),
    ],
)
async def test_a_call_is_told_of_as_it_is_written(
    autojump_clock: MockClock, pieces: list[Piece], events: list[Event]
) -> None:
    run, provider = await run_with(FakeTool("t", takes(0)), pieces)
    assert call_events(run) == events
    assert call_ids(run) == ["a"]
    written = "".join(piece.arguments_fragment for piece in pieces if isinstance(piece, ToolCallPiece))
    assert provider.requests[1].messages[1].tool_calls == (ToolCall("a", "t", written.replace("\ud800", "?")),)


async def test_calls_may_interleave_and_their_indexes_have_gaps(autojump_clock: MockClock) -> None:
    tool = FakeTool("t", takes(0))
    pieces: list[Piece] = [
        ToolCallPiece(7, "late", "t", '{"n":'),
        ToolCallPiece(2, "soon", "t", '{"m":'),
        ToolCallPiece(7, None, None, "1}"),
        ToolCallPiece(2, None, None, "2}"),
    ]
    _, provider = await run_with(tool, pieces)
    messages = provider.requests[1].messages
    assert messages[1].tool_calls == (ToolCall("soon", "t", '{"m":2}'), ToolCall("late", "t", '{"n":1}'))
    assert [message.tool_call_id for message in messages[2:]] == ["soon", "late"]


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (["a", "a", "a"], ["a", "a-2", "a-3"]),
        ([None, "", "b"], ["step-1-call-0", "step-1-call-1", "b"]),
        (["a", "a-2", "a"], ["a", "a-2", "a-3"]),
        (["x" * 1001, "x" * 1002], ["x" * 1000, "x" * 1000 + "-2"]),
        (["\ud800", "?"], ["?", "?-2"]),
    ],
    ids=lambda value: str(value).encode("ascii", "replace").decode()[:30],
)
async def test_ids_are_unique_in_a_step(autojump_clock: MockClock, ids: list[str | None], told: list[str]) -> None:
    run, provider = await run_with(
        FakeTool("t", takes(0)), [ToolCallPiece(index, call_id, "t") for index, call_id in enumerate(ids)]
    )
    assert call_ids(run) == told
    messages = provider.requests[1].messages
    assert [call.call_id for call in messages[1].tool_calls] == told
    assert [message.tool_call_id for message in messages[2:]] == told


async def test_an_id_repeated_in_a_later_step_is_another_in_events_and_the_same_for_the_model(
    autojump_clock: MockClock,
) -> None:
    provider = StepwiseProvider(calling("a t"), calling("a t", "a-2 t"), saying("x"))
    run = Run("run", spec_for(provider, tools=[FakeTool("t", takes(0))], resume_grace=inf))
    await run.execute()
    assert call_ids(run) == ["a", "a-2", "a-2-2"]
    last = provider.requests[2].messages[3:]
    assert [call.call_id for call in last[0].tool_calls] == ["a", "a-2"]
    assert [message.tool_call_id for message in last[1:]] == ["a", "a-2"]


def test_many_repeated_ids_cost_no_search() -> None:
    ids = UniqueIds()
    taken = [ids.take("a") for _ in range(100_000)]
    assert len(set(taken)) == 100_000
    assert taken[-1] == "a-100000"


@pytest.mark.parametrize(
    "piece", [ToolCallPiece(0, "a"), ToolCallPiece(0, None, None, "{}"), ToolCallPiece(0, "a", "")]
)
async def test_a_call_without_a_name_is_the_models_fault(autojump_clock: MockClock, piece: Piece) -> None:
    run, _ = await run_with(FakeTool("t", takes(0)), [ToolCallPiece(1, "b", "t"), piece])
    assert isinstance(run.log.terminal, Error)
    assert (run.log.terminal.code, run.log.terminal.content) == (
        "upstream.protocol",
        "the model called a tool without naming it",
    )


@pytest.mark.parametrize("kind", ["fragments", "calls", "named calls", "named fragments"])
async def test_calls_without_end_outgrow_the_limit(autojump_clock: MockClock, kind: str) -> None:
    def piece(number: int) -> ToolCallPiece:
        match kind:
            case "fragments":
                return ToolCallPiece(0, None, None, "x" * 100)
            case "calls":
                return ToolCallPiece(number, f"id{number}")
            case "named calls":
                return ToolCallPiece(number, "same", "t")
        return ToolCallPiece(0, "a", "t", "x" * 100)

    taken: list[Piece] = [piece(number) for number in range(20_000)]
    provider = StepwiseProvider([(0, taken)])
    run = Run("run", spec_for(provider, tools=[FakeTool("t", takes(0))], max_run_bytes=200_000))
    await run.execute()
    assert isinstance(run.log.terminal, Error)
    assert run.log.terminal.code == "output_limit"


def test_arguments_are_an_object_or_text() -> None:
    assert json_object("") == {}
    assert json_object('{"a": [1]}') == {"a": [1]}
    for bad in ("[]", "1", "{", '{"a": "\\ud800"}', '{"a":' * 5000, json.dumps({"a": nested(MAX_DEPTH)})):
        assert json_object(bad) is None


async def test_arguments_of_any_depth_end_no_run(autojump_clock: MockClock) -> None:
    for depth in (90, 99, 101, 400, 900, 950, 990, 2000):
        arguments = '{"a":' + "[" * depth + "]" * depth + "}"
        run, provider = await run_with(FakeTool("t", takes(0)), [ToolCallPiece(0, "a", "t", arguments)])
        assert isinstance(run.log.terminal, GenerationComplete)
        assert provider.requests[1].messages[1].tool_calls[0].arguments == arguments


async def test_an_empty_result_is_still_an_answer(autojump_clock: MockClock) -> None:
    _, provider = await run_with(FakeTool("t", takes(0, "")), [ToolCallPiece(0, "a", "t")])
    assert provider.requests[1].messages[2] == Message("tool", "", tool_call_id="a")
