"""What the model is sent: the agent's instructions, what is remembered, the session's history, and the message."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import trio

from .memory import MemoryEntry, MemoryUse
from .provider import Message, ModelRequest
from .trace import Span, Tracer

_logger = logging.getLogger(__name__)

WORKING_MEMORY_HEADING = "# Working memory\nWhat you keep about this user, as JSON:"
MEMORIES_HEADING = "# Memories\nWhat this user told you earlier, the most fitting first. It may be out of date:"


class RunContext(msgspec.Struct):
    """What a run knows before it asks the model; ``missed`` names the reads that failed or took too long."""

    history: Sequence[Message] = ()
    working_memory: dict[str, Any] | None = None
    memories: Sequence[MemoryEntry] = ()
    missed: list[str] = []


async def read_context(use: MemoryUse, request: ModelRequest, run_id: str, tracer: Tracer, parent: Span) -> RunContext:
    """Read the memory, all parts side by side, for ``use.wait`` seconds at most. Fails in no part."""
    context = RunContext()
    memory = use.memory
    reads: dict[str, Callable[[], Awaitable[Any]]] = {
        "history": lambda: memory.history(use.context_window),
        "working_memory": memory.working_memory,
        "memories": lambda: memory.recall(last_user_text(request), use.recall_limit),
    }
    context.missed = list(reads)

    async def read(name: str) -> None:
        try:
            with tracer.span("memory", name, parent):
                setattr(context, name, await reads[name]())
        except Exception:
            _logger.warning("run %s goes on without its %s", run_id, name, exc_info=True)
        else:
            context.missed.remove(name)

    with trio.move_on_after(use.wait) as limit:
        async with trio.open_nursery() as nursery:
            for name in reads:
                nursery.start_soon(read, name)
    if limit.cancelled_caught:
        missed = ", ".join(context.missed)
        _logger.warning("run %s goes on without its %s: not read within %g s", run_id, missed, use.wait)
    return context


def last_user_text(request: ModelRequest) -> str:
    """The text of the user's latest message; empty if there is none."""
    return next((message.content for message in reversed(request.messages) if message.role == "user"), "")


def with_context(request: ModelRequest, context: RunContext) -> ModelRequest:
    """The request with what is known added: sections after the instructions, the history before the messages."""
    leading = 1 if request.messages and request.messages[0].role == "system" else 0
    sections = [message.content for message in request.messages[:leading]]
    if context.working_memory is not None:
        sections.append(f"{WORKING_MEMORY_HEADING}\n{msgspec.json.encode(context.working_memory).decode()}")
    if context.memories:
        sections.append("\n".join([MEMORIES_HEADING, *map(_memory_line, context.memories)]))
    system = (Message("system", "\n\n".join(sections)),) if sections else ()
    return msgspec.structs.replace(request, messages=(*system, *context.history, *request.messages[leading:]))


def _memory_line(entry: MemoryEntry) -> str:
    """One line, whatever the memory holds: what a user once said must not look like a section of ours."""
    return f"- ({entry.created_at[:10]}) {' '.join(entry.text.split())}"
