"""What a tool is to the engine: how the model sees it, how it is called, and what it may know of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from .memory import Memory, Owner
from .provider import ToolSpec

MemoryOperation: TypeAlias = Literal["Set", "Delete", "Clear"]

MAX_RESULT_BYTES = 32_768


class ToolResult(msgspec.Struct, frozen=True):
    """What a call gave, as the model will see it: text, or a value that msgspec encodes to JSON.

    ``failed`` marks the text of a failure: bad arguments, an exception, a deadline.
    """

    value: Any
    failed: bool = False


class ToolError(Exception):
    """A tool failed in a way that the model should know of: its text, and nothing else, becomes the call's result."""


class ToolContext(msgspec.Struct, frozen=True, kw_only=True):
    """What a tool may know of the run that calls it.

    Attributes:
        memory: what is remembered for the run's owner; None for an agent without memory.
        memory_updated: tells the run that a memory key was changed, so that its readers hear of it. Synchronous, never
            waits, and may be called in any thread and at any time: once the run has ended, nothing happens. TypeError
            and ValueError for what is no key or no operation.
    """

    run_id: str
    call_id: str
    agent_id: str
    owner: Owner
    memory: Memory | None
    memory_updated: Callable[[str, MemoryOperation], None]


class Tool(Protocol):
    """Something that the model may call. One object serves many runs at once."""

    @property
    def spec(self) -> ToolSpec:
        """How the model sees it."""
        ...

    async def call(self, arguments: str, context: ToolContext) -> ToolResult:
        """Do it. ``arguments`` is the JSON text as the model wrote it; empty means none.

        Sets no deadline and bounds no result: the run does. What the model did wrong (bad arguments) is a failed
        result; any exception becomes one too, so a tool need not catch its own.
        """
        ...


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """Which tools a run may use, and how much.

    Attributes:
        max_steps: model calls of one run; the last one is asked for an answer without tools.
        max_tool_calls: tool calls of one run; calls beyond it are answered with a failed result.
        max_result_bytes: of one result as JSON; a longer one is cut, and says so.
    """

    tools: tuple[Tool, ...] = ()
    max_steps: int = 5
    max_tool_calls: int = 10
    max_result_bytes: int = MAX_RESULT_BYTES

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.max_tool_calls < 0 or self.max_result_bytes < 1:
            raise ValueError("max_steps and max_result_bytes are at least 1, max_tool_calls at least 0")
        names = [tool.spec.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError(f"two tools of one agent have the same name: {', '.join(sorted(names))}")
