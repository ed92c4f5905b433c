"""The tools that every agent can be given by name: the clock, the calculator and the memory."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, tzinfo
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import msgspec

from .calculator import calculate
from .function_tool import tool
from .memory import Memory, MemoryRefusedError
from .tools import Tool, ToolContext, ToolError

Clock = Callable[[tzinfo], datetime]
"""The time now in that time zone."""

MAX_SAFE_INTEGER = 2**53 - 1
"""The largest whole number that every reader of JSON keeps."""

_UTC_NAMES = frozenset({"utc", "etc/utc", "z", "gmt", "etc/gmt"})


def current_time_tool(clock: Clock = datetime.now) -> Tool:
    """The tool ``current_time`` on a clock."""

    @tool
    async def current_time(timezone: str = "UTC") -> dict[str, str]:
        """The date and time now. Use it whenever an answer depends on today's date, the day of the week or the time.

        Args:
            timezone: IANA name of the time zone, such as Europe/Zurich or Asia/Tokyo.
        """
        now = clock(_time_zone(timezone))
        return {"time": now.isoformat(timespec="seconds"), "weekday": f"{now:%A}", "timezone": timezone}

    return current_time


@tool
async def calculator(expression: str) -> int | float | str:
    """Computes an arithmetic expression exactly. Use it for every calculation instead of computing yourself.

    Operators: + - * / // % ** and parentheses. Constants: pi, e. Functions: sqrt, abs, round(x, decimals), floor, ceil,
    min, max, log(x) (natural), log(x, base), log10, ln, exp, sin, cos, tan (radians), factorial.
    No variables, units, percent signs or thousands separators.

    Args:
        expression: such as (1299 * 12 + 80) / 3 or round(1000 * 1.035 ** 10, 2).
    """
    value = calculate(expression)
    return str(value) if isinstance(value, int) and abs(value) > MAX_SAFE_INTEGER else value


@tool
async def remember(text: str, context: ToolContext) -> dict[str, str]:
    """Puts a fact about the user into long-term memory, where it outlives this conversation. Returns its id.

    Use it when the user says something worth knowing later (a preference, a plan, a name) or asks you to remember.

    Args:
        text: the fact, as one sentence that can be understood by itself.
        context: of the run.
    """
    try:
        entry = await _memory(context).remember(text)
    except MemoryRefusedError as refusal:
        raise ToolError(str(refusal)) from refusal
    context.memory_updated(f"memories.{entry.id}", "Set")
    return {"memory_id": entry.id, "text": entry.text}


@tool
async def search_memory(
    query: Annotated[str, msgspec.Meta(max_length=1000)],
    context: ToolContext,
    limit: Annotated[int, msgspec.Meta(ge=1, le=50)] = 5,
) -> dict[str, Any]:
    """Searches what the user said earlier and what was remembered about them, the best match first.

    Use it when an answer may depend on something that is not in this conversation.

    Args:
        query: words to look for.
        limit: how many entries to return at most.
        context: of the run.
    """
    entries = await _memory(context).search(query, limit)
    return {
        "memories": [{"memory_id": entry.id, "text": entry.text, "created_at": entry.created_at} for entry in entries]
    }


@tool
async def forget(memory_id: str, context: ToolContext) -> dict[str, str]:
    """Deletes one entry from long-term memory, for ever. Use it when the user asks you to forget something.

    Args:
        memory_id: the entry's id, as search_memory or remember gave it.
        context: of the run.
    """
    if not await _memory(context).forget(memory_id):
        raise ToolError(f"there is no memory with the id {memory_id[:100]!r}; search_memory gives the ids")
    context.memory_updated(f"memories.{memory_id}", "Delete")
    return {"forgotten": memory_id}


@tool
async def update_working_memory(patch: dict[str, Any], context: ToolContext) -> dict[str, Any]:
    """Changes the working memory, the JSON document about the user that you see in every conversation. Returns it.

    Args:
        patch: a JSON merge patch: a field in it is set, a field that is null in it is deleted, others stay as they are.
            To change a list, give the whole new list.
        context: of the run.
    """
    try:
        change = await _memory(context).patch_working_memory(patch)
    except MemoryRefusedError as refusal:
        raise ToolError(str(refusal)) from refusal
    for key in change.set_keys:
        context.memory_updated(key, "Set")
    for key in change.deleted_keys:
        context.memory_updated(key, "Delete")
    return change.document


BUILT_IN_TOOLS: dict[str, Tool] = {
    built_in.spec.name: built_in
    for built_in in (current_time_tool(), calculator, remember, search_memory, forget, update_working_memory)
}
"""By name, as agents name them. None of them blocks or uses a thread."""


def _memory(context: ToolContext) -> Memory:
    if context.memory is None:
        raise ToolError("this agent has no memory")
    return context.memory


def _time_zone(name: str) -> tzinfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # unknown; no possible name; a directory, or too long for a file
        if name.lower() in _UTC_NAMES:
            return UTC
    try:
        ZoneInfo("Europe/London")
    except (KeyError, OSError):
        raise ToolError("this machine has no time zone database; only UTC is known") from None
    raise ToolError(f"there is no time zone {name[:100]!r}; write an IANA name such as Europe/Zurich, or UTC")
