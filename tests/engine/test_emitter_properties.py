"""Whatever a model says and however it is read: nothing lost, doubled, reordered or late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Literal, TypeAlias

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from engine import (
    AgentStarted,
    AgentStopped,
    Event,
    LogEntry,
    Metadata,
    ReasoningDelta,
    RunLog,
    StreamingConfig,
    TextDelta,
)
from engine.emitter import Emitter
from engine.spec import MAX_RUN_BYTES

from .scripted import events_of, in_virtual_time

Kind: TypeAlias = Literal["text", "reasoning", "metadata", "step", "pause"]
TICK = 1 / 16
"""Times are whole ticks, so that sums of them are exact."""


@dataclass(frozen=True)
class Act:
    """One thing that the model does; ``ticks`` is how long a pause lasts."""

    kind: Kind
    content: str = ""
    ticks: int = 0


@dataclass
class Viewer:
    """A reader: comes, is busy after each read, goes after some reads, comes back with its cursor."""

    arrives: int
    busy: int
    reads_per_visit: int
    away: int
    frames: list[bytes] = field(default_factory=list)

    async def watch(self, log: RunLog) -> None:
        await trio.sleep(self.arrives * TICK)
        cursor = 0
        while True:
            with log.attached():
                for _ in range(self.reads_per_visit):
                    entries = await log.read(cursor)
                    if not entries:
                        return
                    cursor = entries[-1].seq
                    self.frames += [entry.frame for entry in entries]
                    await trio.sleep(self.busy * TICK)
            await trio.sleep(self.away * TICK)


contents = st.text(max_size=30) | st.text("日本語👋é\ud83d\n", max_size=30) | st.just("x" * 3000)
acts = st.one_of(
    st.builds(Act, st.just("text"), contents),
    st.builds(Act, st.just("text"), contents),
    st.builds(Act, st.just("reasoning"), contents),
    st.builds(Act, st.just("metadata")),
    st.builds(Act, st.just("step")),
    st.builds(Act, st.just("pause"), ticks=st.integers(0, 8)),
)
configs = st.builds(
    StreamingConfig,
    text_buffer_size=st.sampled_from([1, 2, 7, 100]),
    flush_after=st.sampled_from([0.0, 2 * TICK, 16 * TICK]),
    text_delta_delay_ms=st.sampled_from([None, 0.0, 250.0]),
)
viewers = st.builds(
    Viewer,
    arrives=st.integers(0, 40),
    busy=st.integers(0, 12),
    reads_per_visit=st.integers(1, 4),
    away=st.integers(0, 12),
)


async def perform(emitter: Emitter, script: Sequence[Act]) -> None:
    """Say the script, from the start event to the terminal one."""
    emitter.emit(AgentStarted("agent", "run", "now"))
    steps = 1
    for act in script:
        match act.kind:
            case "text":
                emitter.text(act.content, f"step-{steps}")
            case "reasoning":
                emitter.reasoning(act.content, f"step-{steps}")
            case "metadata":
                emitter.emit(Metadata("key", None))
            case "step":
                steps += 1
            case "pause":
                await trio.sleep(act.ticks * TICK)
    emitter.emit(AgentStopped("requested", emitter.response, None))


Segment: TypeAlias = tuple[str, str, str]
"""Kind, step and text of neighbours put together; other events stand for themselves."""


def add_segment(segments: list[Segment], kind: str, step_id: str, content: str) -> None:
    if segments and segments[-1][:2] == (kind, step_id) and kind in ("text", "reasoning"):
        segments[-1] = (kind, step_id, segments[-1][2] + content)
    else:
        segments.append((kind, step_id, content))


def said(script: Sequence[Act]) -> list[Segment]:
    """What the script says, lone surrogates replaced."""
    segments: list[Segment] = []
    steps = 1
    for act in script:
        steps += act.kind == "step"
        if act.kind == "metadata":
            add_segment(segments, "metadata", "", "")
        elif act.content:
            content = act.content.encode("utf-8", "replace").decode()
            add_segment(segments, act.kind, f"step-{steps}", content)
    return segments


def heard(events: Sequence[Event]) -> list[Segment]:
    """What the events say."""
    segments: list[Segment] = []
    for event in events:
        match event:
            case TextDelta(content, step_id):
                assert content
                add_segment(segments, "text", step_id, content)
            case ReasoningDelta(content, step_id):
                assert content
                add_segment(segments, "reasoning", step_id, content)
            case Metadata():
                add_segment(segments, "metadata", "", "")
    return segments


@settings(max_examples=200, deadline=None)
@given(script=st.lists(acts, max_size=40), config=configs, audience=st.lists(viewers, max_size=4))
def test_nothing_is_lost_doubled_or_reordered(
    script: list[Act], config: StreamingConfig, audience: list[Viewer]
) -> None:
    async def main() -> None:
        log = RunLog("run")
        emitter = Emitter(log, config, MAX_RUN_BYTES)
        async with trio.open_nursery() as nursery:
            for viewer in audience:
                nursery.start_soon(viewer.watch, log)
            await perform(emitter, script)
        assert log.readers == 0
        assert log.waiting == {}
        events = events_of(log)
        assert [entry.seq for entry in log.entries()] == list(range(1, len(events) + 1))
        assert heard(events) == said(script)
        text = "".join(content for kind, _, content in said(script) if kind == "text")
        assert events[-1] == AgentStopped("requested", text, None)
        frames = [entry.frame for entry in log.entries()]
        assert all(viewer.frames == frames for viewer in audience)

    in_virtual_time(main)


@settings(max_examples=100, deadline=None)
@given(script=st.lists(acts, max_size=40), config=configs, idle_readers=st.integers(1, 3))
def test_an_idle_reader_waits_no_longer_than_the_limits(
    script: list[Act], config: StreamingConfig, idle_readers: int
) -> None:
    spoken: list[float] = []  # for each code point of text and reasoning together: when it was said
    received: list[list[float]] = [[] for _ in range(idle_readers)]

    async def read(log: RunLog, times: list[float]) -> None:
        cursor = 0
        with log.attached():
            while entries := await log.read(cursor):
                cursor = entries[-1].seq
                for entry in entries:
                    times += [trio.current_time()] * chars_in(entry)

    class Watched(Emitter):
        def text(self, content: str, step_id: str, now: float | None = None) -> None:
            spoken.extend([trio.current_time()] * len(content))
            super().text(content, step_id, now)

        def reasoning(self, content: str, step_id: str) -> None:
            spoken.extend([trio.current_time()] * len(content))
            super().reasoning(content, step_id)

    async def main() -> None:
        log = RunLog("run")
        async with trio.open_nursery() as nursery:
            for times in received:
                nursery.start_soon(read, log, times)
            await perform(Watched(log, config, MAX_RUN_BYTES), script)

    in_virtual_time(main)
    delay = (config.text_delta_delay_ms or 0) / 1000
    patience = max(delay, config.flush_after if config.text_buffer_size > 1 else 0.0)
    for times in received:
        assert len(times) == len(spoken)
        assert all(0 <= got - said_at <= patience for got, said_at in zip(times, spoken, strict=True))


def chars_in(entry: LogEntry) -> int:
    match entry.event:
        case TextDelta(content) | ReasoningDelta(content):
            return len(content)
    return 0


@settings(max_examples=60, deadline=None)
@given(script=st.lists(acts, max_size=40), config=configs)
def test_the_delay_lies_between_any_two_neighbouring_deltas(script: list[Act], config: StreamingConfig) -> None:
    times: list[float] = []
    unforced = [act for act in script if act.kind in ("text", "pause")]

    async def read(log: RunLog) -> None:
        cursor = 0
        with log.attached():
            while entries := await log.read(cursor):
                cursor = entries[-1].seq
                if not log.ended:  # the end seals early
                    times.extend(trio.current_time() for entry in entries if isinstance(entry.event, TextDelta))

    async def main() -> None:
        log = RunLog("run")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, log)
            await wait_all_tasks_blocked()  # without a reader, 4 KiB are a delta, whatever the delay
            await perform(Emitter(log, config, MAX_RUN_BYTES), unforced)

    in_virtual_time(main)
    least = min((later - earlier for earlier, later in pairwise(times)), default=inf)
    assert least >= (config.text_delta_delay_ms or 0) / 1000
