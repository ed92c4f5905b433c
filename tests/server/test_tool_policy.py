"""Which tools an agent may name that came through the API, and who is shown how much of an agent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import msgspec
import pytest
from trio.testing import MockClock

from engine.function_tool import tool
from engine.provider import ToolSpec
from engine.tools import Tool, ToolContext, ToolResult
from providers.registry import ModelConfig
from server.errors import ApiError
from server.principal import LOCAL_USER, Principal
from server.records import MAX_METADATA_BYTES, AgentRecord, MemorySettings
from server.store import agents
from server.tool_policy import ToolPolicy, check_tools
from server.tool_registry import ToolRegistry
from tests.harness.world import World, open_keeping_world
from tests.server.api_scene import Caller

ADMIN = Principal(tenant_id="t", user_id="root", key_id="k", admin=True)
USER = Principal(tenant_id="t", user_id="ada", key_id="k")
REPLAYING = {"provider": "replay", "model": "gpt4o-short"}
MINE: dict[str, Any] = {"id": "mine", "llm_config": REPLAYING}

SECRETIVE = AgentRecord(
    id="secretive",
    system="The password is hunter2.",
    llm_config=ModelConfig(
        provider="openai", model="gpt-4o", base_url="http://inner.host/v1", api_key_env="INNER_VARIABLE", max_tokens=7
    ),
    tools=("calculator", "files.read"),
    memory=MemorySettings(embeddings=ModelConfig(provider="openai", base_url="http://inner.host/v1")),
    metadata={"inner": "note"},
)
HIDDEN = ("hunter2", "inner", "INNER_VARIABLE", "files", "max_tokens")


def with_tools(*names: str) -> AgentRecord:
    return AgentRecord(id="a", llm_config=ModelConfig(**REPLAYING), tools=names)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "allowed", "may"),
    [
        ("calculator", (), True),
        ("update_working_memory", (), True),
        ("files.read", (), False),
        ("files.*", (), False),
        ("weather", (), False),
        ("weather", ("weather",), True),
        ("files.read", ("files.read",), True),
        ("files.write", ("files.read",), False),
        ("files.*", ("files.read",), False),
        ("files.*", ("files.*",), True),
        ("files.read", ("files.*",), True),
        ("files.a.b", ("files.*",), True),
        ("files2.read", ("files.*",), False),
        ("files", ("files.*",), False),
        ("", ("files.*",), False),
    ],
)
def test_built_in_tools_and_what_the_operator_allows(name: str, allowed: tuple[str, ...], may: bool) -> None:
    policy = ToolPolicy.allowing(allowed)
    check_tools(with_tools(name), LOCAL_USER, policy)
    for principal in (USER, ADMIN):
        assert policy.refused(principal, [name]) == ([] if may else [name])


def test_a_refusal_names_the_field_and_no_other_tool() -> None:
    with pytest.raises(ApiError) as refused:
        check_tools(with_tools("calculator", "files.read"), ADMIN, ToolPolicy.allowing(["inner.thing"]))
    assert (refused.value.status, refused.value.details) == (403, {"field": "tools"})
    assert "files.read" in refused.value.message
    assert "inner" not in refused.value.message


@pytest.mark.parametrize("name", ["", "*", ".read", "files.", "files. x", "2x", "a b"])
def test_what_can_be_no_tool_is_not_allowed(name: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a tool"):
        ToolPolicy.allowing([name])


class Files:
    """A source with a tool that works, and one whose schema no vendor takes."""

    def tools(self) -> Mapping[str, Tool]:
        return {"read": FileTool("read", {"type": "object"}), "broken": FileTool("broken", {"type": "string"})}


class FileTool:
    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        self.spec = ToolSpec(name, "Reads.", parameters)

    async def call(self, arguments: str, context: ToolContext) -> ToolResult:
        raise NotImplementedError


@tool
async def calculator(expression: str) -> str:
    """Another one of that name."""
    return expression


def registry() -> ToolRegistry:
    class Shadow(EntryPoint):
        def load(self) -> Any:
            return calculator

    return ToolRegistry({"files": Files()}, plugins=lambda: [Shadow("shadow", "plug:calculator", "lumos.tools")])


@asynccontextmanager
async def open_tooled_world(*allowed: str, declared: tuple[AgentRecord, ...] = ()) -> AsyncIterator[World]:
    """A world with the tools of ``registry``, of which the operator allows these."""
    original = World.services

    class Tooled(World):
        def services(self, *args: Any, **settings: Any) -> Any:
            return replace(
                original(self, *args, **settings), tools=registry(), tool_policy=ToolPolicy.allowing(allowed)
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "services", Tooled.services)
        async with open_keeping_world(*declared) as world:
            yield world


def test_what_cannot_be_used_is_left_out_of_the_usable_tools() -> None:
    usable = registry().usable()
    assert "files.read" in usable
    assert "current_time" in usable
    assert not {"files.broken", "calculator"} & set(usable)


async def test_the_tools_are_listed_for_who_may_name_them(autojump_clock: MockClock) -> None:
    async with open_tooled_world("files.read") as world:
        local = {entry["name"] for entry in await Caller(world).data("GET", "/tools")}
        assert "files.read" in local
        ada = Caller(world, await world.add_key("acme", "ada"))
        assert "files.read" in {entry["name"] for entry in await ada.data("GET", "/tools")}
    async with open_tooled_world() as world:
        ada = Caller(world, await world.add_key("acme", "ada"))
        assert {"current_time", "remember"} <= (names := {entry["name"] for entry in await ada.data("GET", "/tools")})
        assert not any(name.startswith("files") for name in names)


async def test_a_users_agent_names_no_tool_of_the_operators(autojump_clock: MockClock) -> None:
    async with open_tooled_world() as world:
        await Caller(world).refused(422, "POST", "/agents", json=MINE | {"tools": ["hammer"]})
        for user, admin in (("ada", False), ("boss", True)):
            caller = Caller(world, await world.add_key("acme", user, admin=admin))
            refusal = await caller.refused(403, "POST", "/agents", json=MINE | {"tools": ["files.*"]})
            assert refusal["details"] == {"field": "tools"}
            await caller.data("POST", "/agents", 201, json=MINE | {"id": user})
            await caller.refused(403, "PUT", f"/agents/{user}", json=MINE | {"id": user, "tools": ["files.read"]})


async def test_an_agent_with_a_tool_that_is_no_longer_allowed_does_not_chat(autojump_clock: MockClock) -> None:
    async with open_tooled_world() as world:
        assert world.database is not None
        record = with_tools("current_time", "files.read")
        await world.database.write(agents.create_agent, "acme", None, record, "2026-01-01T00:00:00.000000+00:00")
        ada = Caller(world, await world.add_key("acme", "ada"))
        boss = Caller(world, await world.add_key("acme", "boss", admin=True))
        chat = {"json": {"message": "hi"}}
        told = await boss.refused(422, "POST", "/agents/a/chat/lumosai", **chat)
        assert (told["code"], "operator does not allow" in told["message"]) == ("AGENT_UNUSABLE", True)
        untold = await ada.refused(422, "POST", "/agents/a/chat/lumosai", **chat)
        assert (untold["code"], "tool" in untold["message"]) == ("AGENT_UNUSABLE", False)


async def test_an_agent_of_the_operators_is_a_summary_to_tenants(autojump_clock: MockClock) -> None:
    async with open_tooled_world(declared=(SECRETIVE,)) as world:
        whole = await Caller(world).data("GET", "/agents/secretive")
        assert (whole["view"], whole["system"]) == ("whole", SECRETIVE.system)
        for user, admin in (("ada", False), ("boss", True)):
            caller = Caller(world, await world.add_key("acme", user, admin=admin))
            for path in ("/agents/secretive", "/agents"):
                answer = await caller.ask("GET", path)
                assert not [word for word in HIDDEN if word in answer.text]
            summary = await caller.data("GET", "/agents/secretive")
            assert (summary["view"], summary["tools"]) == ("summary", ["calculator"])
            assert summary["llm_config"] == {"provider": "openai", "model": "gpt-4o"}
            unusable = await caller.refused(422, "POST", "/agents/secretive/chat/lumosai", json={"message": "hi"})
            assert (unusable["code"], "INNER" in unusable["message"]) == ("AGENT_UNUSABLE", False)


async def test_a_tenants_agent_is_whole_to_its_admins_alone(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        ada = Caller(world, await world.add_key("acme", "ada"))
        boss = Caller(world, await world.add_key("acme", "boss", admin=True))
        await boss.data("POST", "/agents", 201, json=MINE | {"system": "Ours.", "metadata": {"x": 1}})
        assert (await boss.data("GET", "/agents/mine"))["system"] == "Ours."
        summary = await ada.data("GET", "/agents/mine")
        assert not {"system", "metadata"} & set(summary)
        await ada.data("POST", "/agents", 201, json=MINE | {"id": "adas", "system": "His."})
        assert (await ada.data("GET", "/agents/adas"))["system"] == "His."


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"llm_config": REPLAYING | {"retries": 10**9}}, "llm_config.retries"),
        ({"llm_config": REPLAYING | {"temperature": 3}}, "llm_config.temperature"),
        ({"llm_config": REPLAYING | {"fallbacks": [REPLAYING] * 9}}, "llm_config.fallbacks"),
        ({"memory": {"embeddings": {"provider": "openai", "retries": 11}}}, "memory.embeddings.retries"),
        ({"memory": {"embeddings": {"provider": "anthropic"}}}, "memory.embeddings"),
        ({"deadlines": {"total": 0}}, "deadlines.total"),
        ({"deadlines": {"total": 3601}}, "deadlines.total"),
        ({"deadlines": {"tool": 1e18}}, "deadlines.tool"),
        ({"tools": ["calculator"] * 129}, "tools"),
        ({"tools": ["t" * 201]}, "tools[0]"),
        ({"tools": ["remember"], "memory": {"enabled": False}}, "tools"),
    ],
    ids=str,
)
async def test_a_record_has_bounds(change: dict[str, Any], field: str, autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        ada = Caller(world, await world.add_key("acme", "ada"))
        refusal = await ada.refused(422, "POST", "/agents", json=MINE | change)
        assert refusal["details"]["field"] == field


def test_metadata_has_bounds() -> None:
    fits = {"x": "y" * (MAX_METADATA_BYTES - 8)}
    assert msgspec.convert(MINE | {"metadata": fits}, AgentRecord).metadata == fits
    with pytest.raises(msgspec.ValidationError, match="metadata is 16385 bytes"):
        msgspec.convert(MINE | {"metadata": {"x": fits["x"] + "y"}}, AgentRecord)


async def test_the_operators_own_agents_wait_as_long_as_he_wants(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        await Caller(world).data("POST", "/agents", 201, json=MINE | {"deadlines": {"total": 86_400}})
