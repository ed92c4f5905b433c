"""The built-in tools, called as a run calls them."""

from __future__ import annotations

import sys
import zoneinfo
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
import trio
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from engine.builtin_tools import BUILT_IN_TOOLS, current_time_tool
from engine.memory import MemoryEntry, MemoryRefusedError, TurnRecord, WorkingMemoryChange
from engine.provider import Message
from engine.tools import ToolError, ToolResult, ToolUse

from .tool_contexts import HeardUpdates, make_context

NOON = datetime(2026, 11, 22, 12, 30, 15, 999, tzinfo=UTC)
at_noon = current_time_tool(NOON.astimezone)


class NotedMemory:
    """A memory that keeps facts in a list and one document, and refuses what is blank."""

    def __init__(self) -> None:
        self.entries: list[MemoryEntry] = []
        self.searched: list[tuple[str, int]] = []

    async def remember(self, text: str) -> MemoryEntry:
        if not text.strip():
            raise MemoryRefusedError("there is nothing to remember in that")
        entry = MemoryEntry(id=f"m{len(self.entries) + 1}", text=text, kind="fact", created_at="2026-11-22T12:00:00Z")
        self.entries.append(entry)
        return entry

    async def search(self, query: str, limit: int) -> Sequence[MemoryEntry]:
        self.searched.append((query, limit))
        return [entry for entry in self.entries if query in entry.text][:limit]

    async def forget(self, memory_id: str) -> bool:
        left = [entry for entry in self.entries if entry.id != memory_id]
        found = len(left) < len(self.entries)
        self.entries = left
        return found

    async def patch_working_memory(self, patch: dict[str, Any]) -> WorkingMemoryChange:
        if "much" in patch:
            raise MemoryRefusedError("the document would have 5000 bytes, 4096 are allowed")
        return WorkingMemoryChange(document={"name": "Ada"}, set_keys=("name", "town"), deleted_keys=("age",))

    async def begin_turn(self, run_id: str, message: Message) -> None: ...

    async def history(self, messages: int) -> Sequence[Message]:
        return ()

    async def recall(self, text: str, limit: int) -> Sequence[MemoryEntry]:
        return ()

    async def working_memory(self) -> dict[str, Any] | None:
        return None

    async def save_turn(self, turn: TurnRecord) -> None: ...


class Scene:
    """The built-in tools with a memory, and what the run heard of it."""

    def __init__(self) -> None:
        self.memory = NotedMemory()
        self.heard = HeardUpdates()

    async def call(self, name: str, arguments: str) -> ToolResult:
        return await BUILT_IN_TOOLS[name].call(arguments, make_context(self.memory, self.heard))


def test_they_are_tools_that_one_agent_can_have_together() -> None:
    assert list(BUILT_IN_TOOLS) == [
        "current_time",
        "calculator",
        "remember",
        "search_memory",
        "forget",
        "update_working_memory",
    ]
    ToolUse(tools=tuple(BUILT_IN_TOOLS.values()))
    for name, tool in BUILT_IN_TOOLS.items():
        assert tool.spec.name == name
        assert "context" not in tool.spec.parameters["properties"]
        assert all("description" in field for field in tool.spec.parameters["properties"].values())
        assert len(tool.spec.description) <= 1024  # OpenAI's limit
        Draft202012Validator.check_schema(tool.spec.parameters)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("", {"time": "2026-11-22T12:30:15+00:00", "weekday": "Sunday", "timezone": "UTC"}),
        (
            '{"timezone": "Asia/Tokyo"}',
            {"time": "2026-11-22T21:30:15+09:00", "weekday": "Sunday", "timezone": "Asia/Tokyo"},
        ),
        (
            '{"timezone": "Pacific/Auckland"}',
            {"time": "2026-11-23T01:30:15+13:00", "weekday": "Monday", "timezone": "Pacific/Auckland"},
        ),
    ],
)
async def test_the_time_is_told_in_a_time_zone(arguments: str, value: dict[str, str]) -> None:
    assert await at_noon.call(arguments, make_context()) == ToolResult(value)


@pytest.mark.parametrize("name", ["Mars/Olympus", "", "Europe", "../../etc/passwd", "/etc/passwd", "a\0b", "x" * 5000])
async def test_a_time_zone_that_there_is_not_is_an_error_for_the_model(name: str) -> None:
    zone = at_noon.function(timezone=name)  # type: ignore[attr-defined]
    with pytest.raises(ToolError, match=r"there is no time zone '.*'; write an IANA name") as failure:
        await zone
    assert len(str(failure.value)) < 300


async def test_without_a_time_zone_database_only_utc_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tzdata", None)
    zoneinfo.reset_tzpath(to=[])
    zoneinfo.ZoneInfo.clear_cache()
    try:
        result = await at_noon.call('{"timezone": "UTC"}', make_context())
        assert result.value["time"] == "2026-11-22T12:30:15+00:00"
        with pytest.raises(ToolError, match="no time zone database; only UTC is known"):
            await at_noon.call('{"timezone": "Asia/Tokyo"}', make_context())
    finally:
        zoneinfo.reset_tzpath()
        zoneinfo.ZoneInfo.clear_cache()


async def test_the_clock_is_the_machines_by_default() -> None:
    result = await BUILT_IN_TOOLS["current_time"].call("", make_context())
    assert datetime.fromisoformat(result.value["time"]).tzinfo == UTC


async def test_the_calculator_gives_numbers_and_long_ones_as_text() -> None:
    scene = Scene()
    assert await scene.call("calculator", '{"expression": "0.1 + 0.2"}') == ToolResult(0.3)
    assert await scene.call("calculator", '{"expression": "2**53 - 1"}') == ToolResult(2**53 - 1)
    assert await scene.call("calculator", '{"expression": "2**53"}') == ToolResult("9007199254740992")
    with pytest.raises(ToolError, match="too large"):
        await scene.call("calculator", '{"expression": "9**9**9"}')


async def test_memories_come_and_go_and_the_run_hears_of_it() -> None:
    scene = Scene()
    assert await scene.call("remember", '{"text": "likes tea"}') == ToolResult({"memory_id": "m1", "text": "likes tea"})
    found = {"memories": [{"memory_id": "m1", "text": "likes tea", "created_at": "2026-11-22T12:00:00Z"}]}
    assert await scene.call("search_memory", '{"query": "tea"}') == ToolResult(found)
    assert await scene.call("search_memory", '{"query": "coffee", "limit": 50}') == ToolResult({"memories": []})
    assert scene.memory.searched == [("tea", 5), ("coffee", 50)]
    assert await scene.call("forget", '{"memory_id": "m1"}') == ToolResult({"forgotten": "m1"})
    assert scene.memory.entries == []
    assert scene.heard == [("memories.m1", "Set"), ("memories.m1", "Delete")]


async def test_what_memory_refuses_the_model_is_told_and_nobody_hears_of_a_change() -> None:
    scene = Scene()
    for name, arguments, why in [
        ("remember", '{"text": " "}', "nothing to remember"),
        ("forget", '{"memory_id": "m9"}', "no memory with the id 'm9'"),
        ("update_working_memory", '{"patch": {"much": 1}}', "4096 are allowed"),
    ]:
        with pytest.raises(ToolError, match=why):
            await scene.call(name, arguments)
    assert (await scene.call("search_memory", '{"query": "tea", "limit": 51}')).failed
    assert (await scene.call("update_working_memory", '{"patch": []}')).failed
    assert scene.heard == []


async def test_a_patch_tells_of_each_key_that_it_changed() -> None:
    scene = Scene()
    result = await scene.call("update_working_memory", '{"patch": {"name": "Ada", "town": "Bern", "age": null}}')
    assert result == ToolResult({"name": "Ada"})
    assert scene.heard == [("name", "Set"), ("town", "Set"), ("age", "Delete")]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("remember", '{"text": "x"}'),
        ("search_memory", '{"query": "x"}'),
        ("forget", '{"memory_id": "x"}'),
        ("update_working_memory", '{"patch": {}}'),
    ],
)
async def test_an_agent_without_memory_is_told_so(name: str, arguments: str) -> None:
    with pytest.raises(ToolError, match="this agent has no memory"):
        await BUILT_IN_TOOLS[name].call(arguments, make_context())


async def test_none_of_them_uses_a_thread(autojump_clock: trio.testing.MockClock) -> None:
    """Else the clock would jump while the thread works."""
    scene = Scene()
    with trio.fail_after(5):
        await at_noon.call("", make_context())
        await scene.call("calculator", '{"expression": "factorial(1000) - factorial(1000)"}')
        await scene.call("remember", '{"text": "x"}')
        await trio.lowlevel.checkpoint()
    assert trio.current_time() == 0
