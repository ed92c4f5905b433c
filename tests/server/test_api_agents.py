"""The agents API: what is kept, for whom, and who may change it."""

from __future__ import annotations

from typing import Any

import pytest
from trio.testing import MockClock

from server.agents import BUILT_IN_AGENTS
from tests.harness.world import open_keeping_world
from tests.server.api_scene import HELPER, Caller

MINE: dict[str, Any] = {"id": "mine", "llm_config": {"provider": "replay", "model": "gpt4o-short"}}
BUILT_IN = [record.id for record in BUILT_IN_AGENTS]


async def test_an_agent_is_made_read_changed_and_deleted(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        me = Caller(world)
        made = await me.ask("POST", "/agents", json=MINE | {"system": "Be brief.", "tools": ["calculator"]})
        assert (made.status_code, made.headers["Location"]) == (201, "/api/v1/agents/mine")
        assert made.headers["ETag"] == '"1"'
        record = await me.data("GET", "/agents/mine")
        assert record == made.json()["data"]
        assert (record["system"], record["tools"], record["revision"]) == ("Be brief.", ["calculator"], 1)
        changed = await me.data("PUT", "/agents/mine", json=MINE | {"system": "Be long."})
        assert (changed["system"], changed["tools"], changed["revision"]) == ("Be long.", [], 2)
        assert (await me.data("GET", "/agents/mine"))["revision"] == 2
        assert (await me.chat("mine"))["content"] != ""
        await me.gone("DELETE", "/agents/mine")
        await me.refused(404, "GET", "/agents/mine")
        await me.refused(404, "DELETE", "/agents/mine")


async def test_an_agent_without_an_id_gets_one(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        me = Caller(world)
        made = await me.data("POST", "/agents", 201, json={"llm_config": MINE["llm_config"]})
        assert made["id"].startswith("agent-")
        assert await me.data("GET", f"/agents/{made['id']}") == made


async def test_the_list_has_pages_that_meet(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        me = Caller(world)
        for number in range(5):
            await me.data("POST", "/agents", 201, json=MINE | {"id": f"a{number}"})
        whole = await me.data("GET", "/agents")
        ids = [agent["id"] for agent in whole["items"]]
        assert ids == [*BUILT_IN, "helper", "a0", "a1", "a2", "a3", "a4"]
        assert (whole["total"], whole["limit"], whole["offset"]) == (len(ids), 50, 0)
        pages = [await me.data("GET", f"/agents?limit=3&offset={offset}") for offset in (0, 3, 6, 9, 12)]
        assert [[agent["id"] for agent in page["items"]] for page in pages] == [
            ids[offset : offset + 3] for offset in (0, 3, 6, 9, 12)
        ]
        assert {page["total"] for page in pages} == {len(ids)}


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=101", "limit=x", "limit=", "offset=-1", "offset=9999999999999", "page=1", "limit=1&limit=1"],
)
async def test_a_page_that_cannot_be_is_422(query: str, autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        assert (await Caller(world).refused(422, "GET", f"/agents?{query}"))["code"] == "VALIDATION_ERROR"


async def test_an_agent_of_the_servers_is_changed_by_nobody(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        me = Caller(world)
        for agent_id in ("demo", "helper"):
            view = await me.data("GET", f"/agents/{agent_id}")
            assert (view["belongs_to"], view["revision"]) == ("server", None)
            await me.refused(409, "PUT", f"/agents/{agent_id}", json={"llm_config": MINE["llm_config"]})
            await me.refused(409, "DELETE", f"/agents/{agent_id}")
            assert (await me.refused(409, "POST", "/agents", json=MINE | {"id": agent_id}))["details"] == {
                "field": "id"
            }


async def test_an_id_is_there_once(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        me = Caller(world)
        await me.data("POST", "/agents", 201, json=MINE)
        await me.refused(409, "POST", "/agents", json=MINE)


async def test_the_bodys_id_must_be_that_of_the_path(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        me = Caller(world)
        await me.data("POST", "/agents", 201, json=MINE)
        refusal = await me.refused(422, "PUT", "/agents/mine", json=MINE | {"id": "other"})
        assert refusal["details"] == {"field": "id"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"llm_config": {"provider": "nobody"}}, "llm_config"),
        ({"llm_config": {"provider": "openai", "model": "gpt-4o"}}, "llm_config"),  # its key is missing
        ({"llm_config": {"provider": "replay", "model": "/etc/passwd"}}, "llm_config"),
        ({"tools": ["hammer"]}, "tools"),
    ],
    ids=["provider", "key", "recording", "tool"],
)
async def test_an_agent_that_cannot_be_made_is_not_kept(
    change: dict[str, Any], field: str, autojump_clock: MockClock
) -> None:
    async with open_keeping_world() as world:
        me = Caller(world)
        refusal = await me.refused(422, "POST", "/agents", json=MINE | change)
        assert refusal["details"] == {"field": field}
        await me.refused(404, "GET", "/agents/mine")
        await me.data("POST", "/agents", 201, json=MINE)
        await me.refused(422, "PUT", "/agents/mine", json=MINE | change)
        assert (await me.data("GET", "/agents/mine"))["revision"] == 1


async def test_a_record_that_may_not_be_is_422_without_an_id_too(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        body = {"llm_config": MINE["llm_config"], "memory": {"enabled": False}, "working_memory": {}}
        assert "working_memory" in (await Caller(world).refused(422, "POST", "/agents", json=body))["message"]


async def test_an_answer_holds_no_key(autojump_clock: MockClock) -> None:
    environment = {"OPENAI_API_KEY": "sk-very-secret"}
    async with open_keeping_world(environment=environment) as world:
        me = Caller(world)
        config = {"provider": "openai", "model": "gpt-4o", "api_key_env": "OPENAI_API_KEY"}
        made = await me.ask("POST", "/agents", json=MINE | {"llm_config": config})
        assert made.status_code == 201
        for response in (made, await me.ask("GET", "/agents/mine"), await me.ask("GET", "/agents")):
            assert "sk-very-secret" not in response.text
        refusal = await me.ask("POST", "/agents", json=MINE | {"llm_config": config | {"api_key_env": "sk-mine-42"}})
        assert refusal.status_code == 422
        assert "sk-mine-42" not in refusal.text


async def test_if_match_changes_only_what_one_has_seen(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        me = Caller(world)
        await me.data("POST", "/agents", 201, json=MINE)
        old = {"If-Match": '"1"'}
        assert (await me.data("PUT", "/agents/mine", json=MINE, headers=old))["revision"] == 2
        await me.refused(412, "PUT", "/agents/mine", json=MINE, headers=old)
        await me.refused(412, "DELETE", "/agents/mine", headers=old)
        await me.refused(412, "DELETE", "/agents/mine", headers={"If-Match": 'W/"x"'})
        assert (await me.data("GET", "/agents/mine"))["revision"] == 2
        assert (await me.data("PUT", "/agents/mine", json=MINE, headers={"If-Match": "*"}))["revision"] == 3
        await me.gone("DELETE", "/agents/mine", headers={"If-Match": '"2", "3"'})


async def test_a_users_agent_is_his_and_an_admins_is_the_tenants(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        ada = Caller(world, await world.add_key("acme", "ada"))
        bob = Caller(world, await world.add_key("acme", "bob"))
        boss = Caller(world, await world.add_key("acme", "boss", admin=True))
        his = await ada.data("POST", "/agents", 201, json=MINE)
        assert (his["belongs_to"], his["user_id"]) == ("user", "ada")
        all_of_them = await boss.data("POST", "/agents", 201, json=MINE | {"id": "ours"})
        assert (all_of_them["belongs_to"], all_of_them["user_id"]) == ("tenant", None)
        await bob.refused(404, "GET", "/agents/mine")
        await bob.refused(404, "POST", "/agents/mine/chat/lumosai", json={"message": "hi"})
        assert (await bob.data("GET", "/agents/ours"))["id"] == "ours"
        await bob.refused(403, "PUT", "/agents/ours", json=MINE | {"id": "ours"})
        await bob.refused(403, "DELETE", "/agents/ours")
        assert [agent["id"] for agent in (await bob.data("GET", f"/agents?offset={len(BUILT_IN)}"))["items"]] == [
            "ours"
        ]
        assert [agent["id"] for agent in (await boss.data("GET", f"/agents?offset={len(BUILT_IN)}"))["items"]] == [
            "mine",
            "ours",
        ]
        assert (await boss.data("PUT", "/agents/mine", json=MINE))["user_id"] == "ada"
        await boss.gone("DELETE", "/agents/mine")


async def test_only_an_admin_says_where_a_key_goes(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        ada = Caller(world, await world.add_key("acme", "ada"))
        boss = Caller(world, await world.add_key("acme", "boss", admin=True))
        stealing = MINE | {"llm_config": {"provider": "openai", "model": "m", "base_url": "https://thief.example/v1"}}
        for caller in (ada, boss):
            refusal = await caller.refused(403, "POST", "/agents", json=stealing)
            assert refusal["details"]["field"] == "llm_config.base_url"


async def test_the_tools_that_agents_may_name(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        tools = await Caller(world).data("GET", "/tools")
        assert {"calculator", "current_time", "remember"} <= {tool["name"] for tool in tools}
        assert all(tool["description"] for tool in tools)


async def test_who_one_is(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        me = await Caller(world).data("GET", "/me")
        unlimited = {"requests_per_minute": None, "concurrent_runs": None, "tokens_per_day": None}
        assert me == {"tenant_id": "local", "user_id": "local", "admin": True, "key_id": None, "limits": unlimited}
        ada = await Caller(world, await world.add_key("acme", "ada")).data("GET", "/me")
        assert (ada["tenant_id"], ada["user_id"], ada["admin"]) == ("acme", "ada", False)
        assert ada["key_id"]
