"""What the emitter lets through: whole code points, no more than the limit, nothing after the end."""

from __future__ import annotations

import json
from contextlib import ExitStack
from math import nan

import msgspec
import pytest
import trio
from trio.testing import MockClock

from engine import (
    GenerationComplete,
    Metadata,
    StepComplete,
    StreamingConfig,
    Usage,
    UsageUpdate,
)
from engine.errors import OutputLimitError

from .emitter_scene import END, ROOM, STEP, Scene

# Unicode


async def test_no_code_point_is_ever_split(autojump_clock: MockClock) -> None:
    content = "日本語👩‍👩‍👧‍👦é" * 50
    scene = Scene(size=7)
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        for char in content:
            scene.text(char)
            await trio.sleep(0.03125)
        scene.emitter.emit(END)
    assert len(reads) > 50
    assert "".join(scene.sealed()) == content + "<stop>"
    for entry in scene.log.entries():
        data = entry.frame.partition(b"data: ")[2]
        assert json.loads(data.decode("utf-8", "strict"))["chunk_type"]


@pytest.mark.parametrize(
    ("content", "replaced"),
    [("\ud83d", "?"), ("a\udc00b", "a?b"), ("\ud83d\ude00", "??"), ("日\ud800", "日?")],
    ids=ascii,
)
async def test_lone_surrogates_are_replaced(autojump_clock: MockClock, content: str, replaced: str) -> None:
    scene = Scene()
    scene.text(content)
    scene.reasoning(content)
    scene.emitter.emit(END)
    assert scene.sealed() == [replaced, f"~{replaced}", "<stop>"]
    assert scene.emitter.response == replaced


async def test_empty_text_is_nothing(autojump_clock: MockClock) -> None:
    scene = Scene()
    async with trio.open_nursery() as nursery:
        reads = await scene.reader(nursery)
        await scene.text_at((1, ""), (2, "a"), (3, ""))
        scene.reasoning("")
        await scene.end_at(4.0)
    assert reads == [(2.0, ["a"]), (4.0, ["<stop>"])]


# The response, the end, the limit


async def test_the_response_is_the_text_so_far_without_the_reasoning(autojump_clock: MockClock) -> None:
    scene = Scene(size=ROOM)
    scene.text("a")
    scene.reasoning("hm")
    scene.text("b", "c")
    assert scene.emitter.response == "abc"
    assert scene.sealed() == ["a", "~hm"]


async def test_what_comes_after_the_terminal_event_is_dropped(autojump_clock: MockClock) -> None:
    scene = Scene()
    scene.text("a")
    scene.emitter.emit(END)
    scene.text("late")
    scene.reasoning("late")
    scene.emitter.emit(Metadata("late", 1))
    scene.emitter.emit(GenerationComplete("late", 1, 1.0, None, None))
    assert scene.sealed() == ["a", "<stop>"]
    assert scene.log.terminal is END
    assert scene.emitter.response == "a"


async def test_text_over_the_limit_is_refused_whole(autojump_clock: MockClock) -> None:
    scene = Scene(max_run_bytes=1000)
    scene.text("a" * 500)
    with pytest.raises(OutputLimitError, match="1000 bytes"):
        scene.text("b" * 500)
    assert scene.emitter.response == "a" * 500
    scene.emitter.emit(END)
    assert scene.sealed() == ["a" * 500, "<stop>"]


@pytest.mark.parametrize(("content", "size"), [("日本", 6), ("a\x01", 7), ('"\n\\', 6), ("\ud800", 1)], ids=ascii)
async def test_the_limit_is_reached_to_the_byte_as_it_is_in_the_frames(
    autojump_clock: MockClock, content: str, size: int
) -> None:
    start_bytes = Scene().log.size_bytes
    Scene(max_run_bytes=start_bytes + size).text(content)
    Scene(max_run_bytes=start_bytes + size).reasoning(content)
    with pytest.raises(OutputLimitError):
        Scene(max_run_bytes=start_bytes + size - 1).text(content)
    with pytest.raises(OutputLimitError):
        Scene(max_run_bytes=start_bytes + size - 1).reasoning(content)


@pytest.mark.parametrize("word", ["word ", "\x01", "日本", '"', "👋" * 100], ids=ascii)
@pytest.mark.parametrize("kind", ["text", "reasoning", "other"])
@pytest.mark.parametrize("read", [True, False], ids=["read", "unread"])
async def test_nothing_that_a_model_sends_without_end_outgrows_the_limit(
    autojump_clock: MockClock, kind: str, word: str, read: bool
) -> None:
    scene = Scene(max_run_bytes=100_000)
    with ExitStack() as stack:
        if read:
            stack.enter_context(scene.log.attached())
        with pytest.raises(OutputLimitError):  # noqa: PT012 - the loop is the point
            for number in range(100_000):
                match kind:
                    case "text":
                        scene.text(word)
                    case "reasoning":
                        scene.reasoning(word)
                    case "other":
                        scene.emitter.emit(UsageUpdate(Usage(1, number)))
        scene.emitter.emit(StepComplete("Final", STEP))
    assert 95_000 < scene.log.size_bytes <= 101_000
    scene.emitter.emit(GenerationComplete(scene.emitter.response, 1, 1.0, 1.0, None))
    assert scene.log.size_bytes <= 201_000


async def test_text_and_reasoning_share_the_room(autojump_clock: MockClock) -> None:
    scene = Scene(max_run_bytes=100_000)
    with pytest.raises(OutputLimitError):  # noqa: PT012 - the loop is the point
        for _ in range(100_000):
            scene.text("said ")
            scene.reasoning("thought ")
    scene.emitter.emit(StepComplete("Final", STEP))
    assert 95_000 < scene.log.size_bytes <= 101_000


async def test_what_closes_a_run_always_fits(autojump_clock: MockClock) -> None:
    scene = Scene(max_run_bytes=Scene().log.size_bytes + 5)
    scene.text("abcde")
    scene.emitter.emit(StepComplete("Final", STEP))
    scene.emitter.emit(GenerationComplete("abcde", 1, 1.0, 1.0, None))
    assert scene.sealed() == ["abcde", "<step_complete>", "<done>"]


# The configuration


@pytest.mark.parametrize(
    "settings",
    [
        {"text_buffer_size": 0},
        {"text_buffer_size": -1},
        {"flush_after": -0.1},
        {"flush_after": nan},
        {"text_delta_delay_ms": -1},
        {"text_delta_delay_ms": nan},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_refused(settings: dict[str, float]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        StreamingConfig(**settings)  # type: ignore[arg-type]  # one of several fields, of several types


@pytest.mark.parametrize(
    "sent",
    [
        '{"text_buffer_size":0}',
        '{"text_buffer_size":65537}',
        '{"text_buffer_size":1.5}',
        '{"flush_after":-1}',
        '{"flush_after":11}',
        '{"text_delta_delay_ms":-1}',
        '{"text_delta_delay_ms":10001}',
        '{"unknown":1}',
    ],
)
def test_a_configuration_from_outside_has_its_bounds(sent: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(sent, type=StreamingConfig)


def test_the_defaults_hold_nothing_back() -> None:
    assert msgspec.json.decode("{}", type=StreamingConfig) == StreamingConfig(
        text_buffer_size=1, flush_after=0.05, emit_metadata=False, emit_memory_updates=False, text_delta_delay_ms=None
    )
