"""Contexts for calling tools without a run."""

from __future__ import annotations

from engine.memory import Memory, Owner
from engine.tools import MemoryOperation, ToolContext


class HeardUpdates(list[tuple[str, MemoryOperation]]):
    """Records what a tool says of memory keys."""

    def hear(self, key: str, operation: MemoryOperation) -> None:
        self.append((key, operation))


def make_context(memory: Memory | None = None, heard: HeardUpdates | None = None) -> ToolContext:
    updates = HeardUpdates() if heard is None else heard
    return ToolContext(
        run_id="run-1", call_id="call-1", agent_id="a", owner=Owner(), memory=memory, memory_updated=updates.hear
    )
