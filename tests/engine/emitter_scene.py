"""A log with its emitter and readers, for the emitter's tests."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from engine import AgentStarted, AgentStopped, Event, ReasoningDelta, RunLog, StreamingConfig, TextDelta
from engine.emitter import Emitter
from engine.spec import MAX_RUN_BYTES

from .scripted import events_of

STEP = "step-1"
END = AgentStopped("requested", "", None)
ROOM = 1000
"""A size that no text of these tests reaches: only the flush limit wakes the reader then."""


def label(event: Event) -> str:
    """A delta's text, reasoning with a tilde; any other event's tag in brackets."""
    match event:
        case TextDelta(content):
            return content
        case ReasoningDelta(content):
            return f"~{content}"
    return f"<{event.__struct_config__.tag}>"


class Scene:
    """A started log, its emitter and its readers."""

    def __init__(
        self,
        size: int = 1,
        flush_after: float = 0.125,
        delay_ms: float | None = None,
        max_run_bytes: int = MAX_RUN_BYTES,
    ) -> None:
        config = StreamingConfig(text_buffer_size=size, flush_after=flush_after, text_delta_delay_ms=delay_ms)
        self.log = RunLog("run")
        self.emitter = Emitter(self.log, config, max_run_bytes)
        self.emitter.emit(AgentStarted("agent", "run", "now"))

    def text(self, *contents: str, step_id: str = STEP) -> None:
        for content in contents:
            self.emitter.text(content, step_id)

    def reasoning(self, *contents: str, step_id: str = STEP) -> None:
        for content in contents:
            self.emitter.reasoning(content, step_id)

    async def text_at(self, *lines: tuple[float, str]) -> None:
        for at, content in lines:
            await trio.sleep_until(at)
            self.text(content)

    async def end_at(self, at: float) -> None:
        await trio.sleep_until(at)
        self.emitter.emit(END)

    def sealed(self) -> list[str]:
        """What is in the log, without the start."""
        return [label(event) for event in events_of(self.log)[1:]]

    async def reader(self, nursery: trio.Nursery, *, busy: float = 0.0) -> list[tuple[float, list[str]]]:
        """Start a reader that is busy so long after each read; what each read gave and when. It waits on return."""
        reads: list[tuple[float, list[str]]] = []

        async def read() -> None:
            cursor = 1
            with self.log.attached():
                while entries := await self.log.read(cursor):
                    cursor = entries[-1].seq
                    reads.append((trio.current_time(), [label(entry.event) for entry in entries]))
                    await trio.sleep(busy)

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        return reads
