"""What the model is sent: the agent's instructions, what is remembered, the session's history, and the message."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import trio

from .emitter import encodable
from .guests import Guests, tamed
from .memory import MemoryEntry, MemoryUse
from .provider import Message, ModelRequest
from .trace import Span, Tracer

_logger = logging.getLogger(__name__)

WORKING_MEMORY_HEADING = "# Working memory\nWhat you keep about this user, as JSON:"
MEMORIES_HEADING = "# Memories\nWhat this user told you earlier, the most fitting first. It may be out of date:"


class RunContext(msgspec.Struct):
    """What a run knows before it asks the model.

    Attributes:
        working_memory: the user's document as JSON; empty for none.
        memories: one line each.
        missed: the reads that failed or took too long.
    """

    history: Sequence[Message] = ()
    working_memory: str = ""
    memories: Sequence[str] = ()
    missed: Sequence[str] = ()


async def read_context(
    use: MemoryUse, request: ModelRequest, guests: Guests, tracer: Tracer, parent: Span
) -> RunContext:
    """Read what the memory does not have at hand, side by side, for ``use.wait`` seconds at most. Fails in no part."""
    arrived = _at_hand(use, tracer, parent)
    if len(arrived) == 2 and not use.has_document:
        return RunContext(**arrived)
    parts = {name: part for name, part in _parts(use, last_user_text(request)).items() if name not in arrived}
    deadline = trio.current_time() + use.wait

    async def read(name: str, part: Callable[[], Awaitable[Any]]) -> None:
        try:
            with (
                trio.CancelScope(deadline=deadline),
                tracer.span("memory", name, parent),
            ):
                value = await tamed(part)
            if trio.current_time() < deadline:  # at the deadline it is late each time, not by the order of tasks
                arrived[name] = value
        except Exception:
            _logger.warning("run %s goes on without its %s", guests.run_id, name, exc_info=True)

    await _side_by_side({name: partial(read, name, part) for name, part in parts.items()}, use, guests, deadline)
    missed = [name for name in parts if name not in arrived]
    if missed and trio.current_time() >= deadline:
        names = ", ".join(missed)
        _logger.warning("run %s goes on without its %s: not read within %g s", guests.run_id, names, use.wait)
    return RunContext(**arrived, missed=missed)


async def _side_by_side(
    reads: dict[str, Callable[[], Awaitable[None]]], use: MemoryUse, guests: Guests, deadline: float
) -> None:
    """Until all have ended, or the deadline: where they do not let themselves be cancelled, they stay behind."""
    if not use.is_prompt:
        gone = [guests.invite(f"memory {name}", read) for name, read in reads.items()]
        with trio.CancelScope(deadline=deadline):  # noqa: ASYNC912 - there are some
            for one in gone:
                await one.wait()
    elif len(reads) == 1:
        for read in reads.values():
            await read()
    else:
        async with trio.open_nursery() as nursery:
            for read in reads.values():
                nursery.start_soon(read)


def _at_hand(use: MemoryUse, tracer: Tracer, parent: Span) -> dict[str, Any]:
    """The parts that need no reading, and so no task; a trace tells of them all the same."""
    known = use.at_hand()
    ready: dict[str, Any] = {}
    if known.history is not None:
        ready["history"] = _worth_sending(known.history)
    if known.memories is not None:
        ready["memories"] = _memory_lines(known.memories)
    for name in ready:
        tracer.end(tracer.begin("memory", name, parent))
    return ready


def _parts(use: MemoryUse, question: str) -> dict[str, Callable[[], Awaitable[Any]]]:
    """The reads by the fields that they fill, each with what may fail in its making."""
    memory = use.memory

    async def history() -> Sequence[Message]:
        return _worth_sending(await memory.history(use.context_window))

    async def document() -> str:
        value = await memory.working_memory()
        return " ".join(msgspec.json.encode(value).decode().splitlines()) if value else ""

    async def recalled() -> Sequence[str]:
        return _memory_lines(await memory.recall(question, use.recall_limit))

    if not use.has_document:
        return {"history": history, "memories": recalled}
    return {"history": history, "working_memory": document, "memories": recalled}


def last_user_text(request: ModelRequest) -> str:
    """The text of the user's latest message; empty if there is none."""
    return next((message.content for message in reversed(request.messages) if message.role == "user"), "")


def with_context(request: ModelRequest, context: RunContext) -> ModelRequest:
    """The request with what is known added: sections after the instructions, the history before the messages."""
    leading = 1 if request.messages and request.messages[0].role == "system" else 0
    sections = [message.content for message in request.messages[:leading] if message.content.strip()]
    if context.working_memory:
        sections.append(f"{WORKING_MEMORY_HEADING}\n{context.working_memory}")
    if context.memories:
        sections.append("\n".join([MEMORIES_HEADING, *context.memories]))
    system = (Message("system", "\n\n".join(sections)),) if sections else ()
    return msgspec.structs.replace(request, messages=(*system, *context.history, *request.messages[leading:]))


def _worth_sending(history: Sequence[Message]) -> Sequence[Message]:
    """Vendors refuse a turn without anything in it; a tool's empty result is an answer to its call."""
    return [
        message
        for message in history
        if message.content or message.images or message.tool_calls or message.role == "tool"
    ]


def _memory_lines(entries: Sequence[MemoryEntry]) -> Sequence[str]:
    return [_memory_line(entry) for entry in entries if entry.text.strip()]


def _memory_line(entry: MemoryEntry) -> str:
    """One line, whatever the memory holds: what a user once said must not look like a section of ours."""
    return f"- ({entry.created_at[:10]}) {' '.join(encodable(entry.text).split())}"
