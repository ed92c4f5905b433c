"""Fakes of what others write: tools and memories that do as they are told, and a collector that keeps the spans."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import trio

from engine import (
    MemoryEntry,
    MemoryUse,
    Message,
    Span,
    ToolContext,
    ToolResult,
    ToolSpec,
    TurnRecord,
    WorkingMemoryChange,
)

Conduct: TypeAlias = Callable[[str, ToolContext], Awaitable[Any]]


class FakeTool:
    """Does as it is told. ``seen`` tells when it was called, with what, and what became of the call."""

    def __init__(self, name: str, conduct: Conduct) -> None:
        self.spec = ToolSpec(name, f"The tool {name}.", {"type": "object"})
        self.conduct = conduct
        self.seen: list[tuple[float, str]] = []
        self.contexts: list[ToolContext] = []

    async def call(self, arguments: str, context: ToolContext) -> ToolResult:
        self._saw(f"called {arguments}".strip())
        self.contexts.append(context)
        try:
            value = await self.conduct(arguments, context)
        except trio.Cancelled:
            self._saw("cancelled")
            raise
        self._saw("ended")
        return value if isinstance(value, ToolResult) else ToolResult(value)

    def _saw(self, what: str) -> None:
        self.seen.append((trio.current_time(), what))


def takes(seconds: float, value: Any = "done") -> Conduct:
    """A tool that gives the value after so many seconds; at ``FOREVER``, never."""

    async def conduct(_: str, __: ToolContext) -> Any:
        await trio.sleep(seconds)
        return value

    return conduct


def fails(failure: BaseException, seconds: float = 0) -> Conduct:
    """A tool that raises this."""

    async def conduct(_: str, __: ToolContext) -> Any:
        await trio.sleep(seconds)
        raise failure

    return conduct


async def stubborn(let_go: trio.Event) -> None:
    """Wait for the event, whoever cancels this."""
    with trio.CancelScope(shield=True):  # what no code should do, and some does
        await let_go.wait()


def holds_until(let_go: trio.Event) -> Conduct:
    """A tool that does not let itself be cancelled before that event."""

    async def conduct(_: str, __: ToolContext) -> Any:
        await stubborn(let_go)
        return "late"

    return conduct


class FakeMemory:
    """Gives what it holds, each after its ``delays``, or raises its ``failures``; ``seen`` tells what was asked.

    It always lets itself be cancelled at once; ``is_prompt`` is whether a run is told so.
    """

    is_prompt = False

    def __init__(
        self,
        *,
        history: Sequence[Message] = (),
        recalled: Sequence[MemoryEntry] = (),
        document: dict[str, Any] | None = None,
        delays: dict[str, float] | None = None,
        failures: dict[str, BaseException] | None = None,
    ) -> None:
        self.past = history
        self.recalled = recalled
        self.document = document
        self.delays = delays or {}
        self.failures = failures or {}
        self.seen: list[tuple[float, str]] = []
        self.begun: list[tuple[str, Message]] = []
        self.saved: list[TurnRecord] = []

    def used(self, **settings: Any) -> MemoryUse:
        """How a run uses it."""
        return MemoryUse(memory=self, is_prompt=self.is_prompt, **settings)

    async def _do(self, what: str, *details: object) -> None:
        self.seen.append((trio.current_time(), " ".join(map(str, (what, *details)))))
        await trio.sleep(self.delays.get(what, 0))
        if what in self.failures:
            raise self.failures[what]

    async def begin_turn(self, run_id: str, message: Message) -> None:
        await self._do("begin_turn")
        self.begun.append((run_id, message))

    async def history(self, messages: int) -> Sequence[Message]:
        await self._do("history", messages)
        return self.past

    async def recall(self, text: str, limit: int) -> Sequence[MemoryEntry]:
        await self._do("recall", text, limit)
        return self.recalled

    async def working_memory(self) -> dict[str, Any] | None:
        await self._do("working_memory")
        return self.document

    async def save_turn(self, turn: TurnRecord) -> None:
        await self._do("save_turn")
        self.saved.append(turn)

    async def remember(self, text: str) -> MemoryEntry:
        raise NotImplementedError

    async def search(self, query: str, limit: int) -> Sequence[MemoryEntry]:
        raise NotImplementedError

    async def forget(self, memory_id: str) -> bool:
        raise NotImplementedError

    async def patch_working_memory(self, patch: dict[str, Any]) -> WorkingMemoryChange:
        raise NotImplementedError


class WritingTraces:
    """Keeps the spans of all runs, in the order of their begin."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.ended: list[Span] = []

    def span_started(self, span: Span) -> None:
        self.spans.append(span)

    def span_ended(self, span: Span) -> None:
        self.ended.append(span)

    @property
    def story(self) -> list[tuple[str, str, float, float | None, str | None]]:
        """Each span's kind, name, times and error."""
        return [(span.kind, span.name, span.started_at, span.ended_at, span.error) for span in self.spans]
