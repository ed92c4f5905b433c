"""When gathered text becomes a delta: every sealing rule of the design, on the virtual clock, to equality."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from engine import (
    AgentStarted,
    Error,
    Event,
    GenerationComplete,
    MemoryUpdate,
    Metadata,
    ReasoningDelta,
    RunLog,
    StepComplete,
    StreamingConfig,
    TextDelta,
    ToolCallComplete,
    ToolCallDelta,
    ToolCallStart,
    Usage,
    UsageUpdate,
)
from engine.emitter import Emitter
from engine.spec import MAX_RUN_BYTES

from .emitter_scene import END, ROOM, STEP, Scene, label
from .scripted import events_of

# The first delta


@pytest.mark.parametrize("content", ["a", "日", "👋", "a long first delta"])
async def test_the_first_delta_comes_at_once_whatever_the_size(autojump_clock: MockClock, content: str) -> None:
    scene = Scene(size=ROOM, flush_after=10)
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        await scene.text_at((2.5, content), (3.0, "second"))
        await scene.end_at(4.0)
    assert reads == [(2.5, [content]), (4.0, ["second", "<stop>"])]


async def test_first_reasoning_counts_as_the_first_delta(autojump_clock: MockClock) -> None:
    scene = Scene(size=ROOM, flush_after=10)
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        scene.reasoning("hm")
        await scene.text_at((1.0, "a"))
        await scene.end_at(2.0)
    assert reads == [(0.0, ["~hm"]), (2.0, ["a", "<stop>"])]


async def test_pieces_of_one_tick_are_one_delta(autojump_clock: MockClock) -> None:
    scene = Scene()
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        scene.text("one ", "upstream ", "read")
        await scene.end_at(1.0)
    assert reads == [(0.0, ["one upstream read"]), (1.0, ["<stop>"])]


async def test_by_default_each_read_of_the_model_is_delivered_as_it_comes(autojump_clock: MockClock) -> None:
    scene = Scene()
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        await scene.text_at((0.5, "a"), (0.5625, "b"), (7.0, "c"))
        await scene.end_at(8.0)
    assert reads == [(0.5, ["a"]), (0.5625, ["b"]), (7.0, ["c"]), (8.0, ["<stop>"])]


# text_buffer_size


async def test_a_waiting_reader_is_woken_at_the_buffer_size(autojump_clock: MockClock) -> None:
    scene = Scene(size=5, flush_after=10)
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        await scene.text_at((0, "first"), (1, "ab"), (2, "cd"), (3, "e"), (4, "fghijklmn"), (5, "op"))
        await scene.end_at(6.0)
    assert reads == [(0.0, ["first"]), (3.0, ["abcde"]), (4.0, ["fghijklmn"]), (6.0, ["op", "<stop>"])]


@pytest.mark.parametrize("five", ["日本語です", "👋👋👋👋👋", "👩‍👩‍👧", "e\u0301e\u0301x", "ab\x00\n\u2028"], ids=ascii)
async def test_the_buffer_size_counts_code_points(autojump_clock: MockClock, five: str) -> None:
    scene = Scene(size=5, flush_after=10)
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        await scene.text_at((0, "first"), (1, five[:4]), (2, five[4:]))
        await scene.end_at(3.0)
    assert reads == [(0.0, ["first"]), (2.0, [five]), (3.0, ["<stop>"])]


# flush_after


async def test_fewer_characters_come_exactly_at_the_flush_limit(autojump_clock: MockClock) -> None:
    scene = Scene(size=ROOM, flush_after=0.125)
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        await scene.text_at((0, "first"), (1, "a"), (1.0625, "b"), (1.109375, "c"), (2, "d"))
        await scene.end_at(3.0)
    # Counted from the first character: what follows does not put it off.
    assert reads == [(0.0, ["first"]), (1.125, ["abc"]), (2.125, ["d"]), (3.0, ["<stop>"])]


async def test_the_default_flush_limit_is_50_ms(autojump_clock: MockClock) -> None:
    log = RunLog("run")
    emitter = Emitter(log, StreamingConfig(text_buffer_size=ROOM), MAX_RUN_BYTES)
    emitter.emit(AgentStarted("agent", "run", "now"))
    with log.attached():
        emitter.text("first", STEP)
        await log.read(1)
        emitter.text("a", STEP)
        assert [entry.event for entry in await log.read(2)] == [TextDelta("a", STEP)]
    assert trio.current_time() == 0.05


async def test_a_flush_limit_of_zero_holds_nothing_back(autojump_clock: MockClock) -> None:
    scene = Scene(size=ROOM, flush_after=0)
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        await scene.text_at((0, "first"), (1, "a"))
        await scene.end_at(2.0)
    assert reads == [(0.0, ["first"]), (1.0, ["a"]), (2.0, ["<stop>"])]


# Busy, late and absent readers


async def test_a_busy_reader_finds_one_larger_delta(autojump_clock: MockClock) -> None:
    scene = Scene()
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery, busy=1.0)
        await scene.text_at((0, "a"), (0.25, "b"), (0.5, "c"), (0.75, "d"), (1.25, "e"), (3.5, "f"))
        await scene.end_at(9.0)
    assert reads == [(0.0, ["a"]), (1.0, ["bcd"]), (2.0, ["e"]), (3.5, ["f"]), (9.0, ["<stop>"])]


async def test_a_busy_reader_delays_no_idle_one_and_both_get_the_same_bytes(autojump_clock: MockClock) -> None:
    scene = Scene()
    async with trio.open_nursery() as nursery:
        idle = await scene.reader(nursery)
        busy = await scene.reader(nursery, busy=1.0)
        await scene.text_at((0, "a"), (0.25, "b"), (0.5, "c"))
        await scene.end_at(2.0)
    assert idle == [(0.0, ["a"]), (0.25, ["b"]), (0.5, ["c"]), (2.0, ["<stop>"])]
    assert busy == [(0.0, ["a"]), (1.0, ["b", "c"]), (2.0, ["<stop>"])]


async def test_two_waiting_readers_are_both_woken_by_the_flush_limit(autojump_clock: MockClock) -> None:
    scene = Scene(size=ROOM, flush_after=0.5)
    async with trio.open_nursery() as nursery:
        first, second = await scene.reader(nursery), await scene.reader(nursery)
        await scene.text_at((0, "a"), (1, "b"), (1.25, "c"))
        await scene.end_at(3.0)
    assert first == second == [(0.0, ["a"]), (1.5, ["bc"]), (3.0, ["<stop>"])]


async def test_a_reader_that_comes_late_gets_what_is_past_its_time_at_once(autojump_clock: MockClock) -> None:
    scene = Scene(size=ROOM, flush_after=0.5)
    scene.text("first")
    await trio.sleep(1)
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        await scene.end_at(2.0)
    assert reads == [(1.0, ["first"]), (2.0, ["<stop>"])]


async def test_a_reader_that_comes_in_between_gets_the_text_at_its_time(autojump_clock: MockClock) -> None:
    scene = Scene(size=ROOM, flush_after=0.5)
    scene.text("first")
    assert len(await scene.log.read(1)) == 1
    scene.text("a")
    await trio.sleep(0.25)
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        await scene.end_at(2.0)
    assert reads == [(0.25, ["first"]), (0.5, ["a"]), (2.0, ["<stop>"])]


async def test_a_readers_own_deadline_that_comes_first_leaves_the_text_gathering(autojump_clock: MockClock) -> None:
    scene = Scene(size=ROOM, flush_after=10)
    scene.text("first")
    await scene.log.read(1)
    scene.text("a")
    assert await scene.log.read(2, deadline=4.0) == []
    assert trio.current_time() == 4.0
    assert [label(entry.event) for entry in await scene.log.read(2, deadline=15.0)] == ["a"]
    assert trio.current_time() == 10.0


async def test_a_reader_cancelled_in_its_wait_takes_nothing_with_it(autojump_clock: MockClock) -> None:
    scene = Scene(size=ROOM, flush_after=10)
    scene.text("first")
    await scene.log.read(1)
    scene.text("a")
    with scene.log.attached(), trio.move_on_after(1) as scope:
        await scene.log.read(2)
    assert scope.cancelled_caught
    assert scene.sealed() == ["first"]
    scene.text("b")
    assert [label(entry.event) for entry in await scene.log.read(2)] == ["ab"]
    assert trio.current_time() == 10.0


async def test_without_a_reader_text_is_sealed_every_4_kib(autojump_clock: MockClock) -> None:
    scene = Scene()
    scene.text("a" * 4095)
    assert scene.sealed() == []
    scene.text("b", "c")
    assert scene.sealed() == ["a" * 4095 + "b"]
    scene.text(*["0123456789"] * 1000)
    assert [len(content) for content in scene.sealed()] == [4096, 4101, 4100]  # whole pieces: 1 + 410 tens, 410 tens


async def test_the_4_kib_are_utf_8_bytes(autojump_clock: MockClock) -> None:
    scene = Scene()
    scene.text("日" * 1365)
    assert scene.sealed() == []
    scene.text("é")
    assert scene.sealed() == ["日" * 1365 + "é"]


async def test_with_a_busy_reader_text_is_not_cut_at_4_kib(autojump_clock: MockClock) -> None:
    scene = Scene()
    with scene.log.attached():
        scene.text(*["0123456789"] * 1000)
        assert scene.sealed() == []
    scene.text("!")
    assert [len(content) for content in scene.sealed()] == [10001]


async def test_however_busy_the_reader_no_delta_is_much_over_64_kib(autojump_clock: MockClock) -> None:
    scene = Scene()
    with scene.log.attached():
        scene.text(*["0123456789"] * 20_000)
        assert [len(content) for content in scene.sealed()] == [65_540, 65_540, 65_540]
        scene.text(*["\x01"] * 20_000)
    sizes = [len(entry.frame) for entry in scene.log.entries()[1:]]
    assert len(sizes) == 4
    assert max(sizes) < 66_000, "a control character counts as the six bytes that it takes in a frame"


async def test_the_rest_below_4_kib_is_there_for_a_reader_who_comes(autojump_clock: MockClock) -> None:
    scene = Scene()
    scene.text("a" * 4096, "rest")
    await trio.sleep(1)
    assert [label(entry.event) for entry in await scene.log.read(1)] == ["a" * 4096, "rest"]
    assert trio.current_time() == 1.0


# What seals first


@pytest.mark.parametrize(
    "event",
    [
        ToolCallStart("call", "tool", STEP),
        StepComplete("Final", STEP),
        MemoryUpdate("key", "Set"),
        UsageUpdate(Usage(1, 2)),
        Metadata("key", "value"),
        GenerationComplete("firsta", 1, 1.0, 1.0, None),
        Error("internal", "oh"),
        END,
    ],
    ids=label,
)
async def test_any_other_event_seals_the_text_before_it(autojump_clock: MockClock, event: Event) -> None:
    scene = Scene(size=ROOM, flush_after=10)
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        await scene.text_at((0, "first"), (1, "a"))
        await trio.sleep_until(2)
        scene.emitter.emit(event)
        await trio.sleep_until(3)
        nursery.cancel_scope.cancel()
    assert reads == [(0.0, ["first"]), (2.0, ["a", label(event)])]


async def test_text_between_the_parts_of_a_tool_call_keeps_its_place(autojump_clock: MockClock) -> None:
    scene = Scene(size=ROOM)
    for event in (
        ToolCallStart("call", "tool", STEP),
        ToolCallDelta("call", "{}", STEP),
        ToolCallComplete("call", "Success", 1, STEP),
    ):
        scene.text("a")
        scene.emitter.emit(event)
    assert scene.sealed() == ["a", "<tool_call_start>", "a", "<tool_call_delta>", "a", "<tool_call_complete>"]


async def test_text_and_reasoning_keep_their_order(autojump_clock: MockClock) -> None:
    scene = Scene(size=ROOM, flush_after=10)
    scene.reasoning("a", "b")
    scene.text("c", "d")
    scene.reasoning("e")
    scene.text("f")
    scene.emitter.emit(END)
    assert scene.sealed() == ["~ab", "cd", "~e", "f", "<stop>"]


async def test_each_delta_names_its_own_step(autojump_clock: MockClock) -> None:
    scene = Scene(size=ROOM)
    scene.text("a", step_id="step-1")
    scene.text("b", step_id="step-2")
    scene.reasoning("c", step_id="step-2")
    scene.emitter.emit(END)
    assert events_of(scene.log)[1:-1] == [
        TextDelta("a", "step-1"),
        TextDelta("b", "step-2"),
        ReasoningDelta("c", "step-2"),
    ]


# text_delta_delay_ms


async def test_the_delay_is_the_least_time_between_two_deltas(autojump_clock: MockClock) -> None:
    scene = Scene(delay_ms=500)
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        await scene.text_at((0, "a"), (0.125, "b"), (0.25, "c"), (0.625, "d"), (3.0, "e"))
        await scene.end_at(9.0)
    assert reads == [(0.0, ["a"]), (0.5, ["bc"]), (1.0, ["d"]), (3.0, ["e"]), (9.0, ["<stop>"])]


async def test_with_a_delay_the_later_of_it_and_the_flush_limit_rules(autojump_clock: MockClock) -> None:
    scene = Scene(size=ROOM, flush_after=0.25, delay_ms=1000)
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        await scene.text_at((0, "a"), (0.125, "b"), (1.875, "c"))
        await scene.end_at(9.0)
    assert reads == [(0.0, ["a"]), (1.0, ["b"]), (2.125, ["c"]), (9.0, ["<stop>"])]


async def test_the_delay_holds_back_no_other_event(autojump_clock: MockClock) -> None:
    scene = Scene(delay_ms=1000)
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        await scene.text_at((0, "a"), (0.25, "b"))
        await scene.end_at(0.5)
    assert reads == [(0.0, ["a"]), (0.5, ["b", "<stop>"])]
