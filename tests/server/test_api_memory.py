"""History, memories and working memory over HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from trio.testing import MockClock

from tests.harness.world import open_keeping_world
from tests.server.api_scene import HELPER, Caller

MEMORIES = "/agents/helper/memories"
WORKING = "/agents/helper/working-memory"
HISTORY = "/agents/helper/chat/history"


async def test_what_was_said_is_the_history(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        me = Caller(world)
        answers = [await me.chat("helper", f"message {number}") for number in range(3)]
        page = await me.data("GET", HISTORY)
        assert (page["total"], page["limit"], page["offset"]) == (6, 50, 0)
        said = [(item["role"], item["content"], item["run_id"]) for item in page["items"]]
        expected = [
            entry
            for number, answer in enumerate(answers)
            for entry in (
                ("user", f"message {number}", answer["run_id"]),
                ("assistant", answer["content"], answer["run_id"]),
            )
        ]
        assert said == expected
        assert {item["session_id"] for item in page["items"]} == {"default"}
        newest = await me.data("GET", f"{HISTORY}?limit=2")
        assert newest["items"] == page["items"][4:]
        assert (await me.data("GET", f"{HISTORY}?limit=2&offset=4"))["items"] == page["items"][:2]


async def test_sessions_are_conversations_of_their_own(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        me = Caller(world)
        body = {"message": "hi", "session_id": "s:1"}
        response = await me.ask("POST", "/agents/helper/chat/lumosai", json=body)
        assert response.headers["X-Session-Id"] == "s:1"
        await me.chat("helper", "the other")
        assert [one["session_id"] for one in (await me.data("GET", "/agents/helper/sessions"))["items"]] == [
            "default",
            "s:1",
        ]
        one = await me.data("GET", f"{HISTORY}?session_id=s:1")
        assert [item["content"] for item in one["items"] if item["role"] == "user"] == ["hi"]
        await me.gone("DELETE", "/agents/helper/sessions/s:1")
        await me.refused(404, "DELETE", "/agents/helper/sessions/s:1")
        assert (await me.data("GET", f"{HISTORY}?session_id=s:1"))["items"] == []
        assert (await me.data("GET", HISTORY))["total"] == 2


@pytest.mark.parametrize("session_id", ["", " ", "a b", "a\n", "a\0", "é", "x" * 101, "a/b"])
async def test_an_odd_session_is_422(session_id: str, autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        body = {"message": "hi", "session_id": session_id}
        await Caller(world).refused(422, "POST", "/agents/helper/chat/lumosai", json=body)


async def test_memories_are_kept_read_changed_and_deleted(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        me = Caller(world)
        made = await me.ask("POST", MEMORIES, json={"text": " Her name is Ada. ", "metadata": {"from": "crm"}})
        memory = made.json()["data"]
        assert (made.status_code, made.headers["Location"]) == (201, f"/api/v1{MEMORIES}/{memory['id']}")
        assert (memory["text"], memory["kind"], memory["metadata"]) == ("Her name is Ada.", "fact", {"from": "crm"})
        path = f"{MEMORIES}/{memory['id']}"
        assert await me.data("GET", path) == memory
        changed = await me.data("PUT", path, json={"text": "Her name is Grace."})
        assert (changed["text"], changed["metadata"]) == ("Her name is Grace.", {"from": "crm"})
        assert (await me.data("PUT", path, json={"text": "Grace", "metadata": {}}))["metadata"] == {}
        await me.gone("DELETE", path)
        for method in ("GET", "DELETE"):
            await me.refused(404, method, path)
        await me.refused(404, "PUT", path, json={"text": "x"})


async def test_memories_are_listed_by_kind_in_pages_and_cleared(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        me = Caller(world)
        await me.chat("helper", "I like tea")
        for number in range(3):
            await me.data("POST", MEMORIES, 201, json={"text": f"fact {number}"})
        assert (await me.data("GET", MEMORIES))["total"] == 4
        facts = await me.data("GET", f"{MEMORIES}?kind=fact&limit=2&offset=1")
        assert ([item["text"] for item in facts["items"]], facts["total"]) == (["fact 1", "fact 0"], 3)
        assert [item["text"] for item in (await me.data("GET", f"{MEMORIES}?kind=said"))["items"]] == ["I like tea"]
        await me.refused(422, "GET", f"{MEMORIES}?kind=dream")
        assert await me.data("DELETE", MEMORIES) == {"deleted": 4}
        assert (await me.data("GET", MEMORIES))["items"] == []
        assert (await me.data("GET", HISTORY))["total"] == 2, "the history stays"


async def test_memories_are_searched_cjk_too(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        me = Caller(world)
        for text in ("She drinks green tea", "She has a dog", "她喜欢绿茶"):
            await me.data("POST", MEMORIES, 201, json={"text": text})
        found = await me.data("POST", f"{MEMORIES}/search", json={"query": "tea?"})
        assert [item["text"] for item in found] == ["She drinks green tea"]
        assert found[0]["score"] > 0
        assert [item["text"] for item in await me.data("POST", f"{MEMORIES}/search", json={"query": "绿茶"})] == [
            "她喜欢绿茶"
        ]
        assert await me.data("POST", f"{MEMORIES}/search", json={"query": '" OR * NEAR( \0 ?'}) == []
        assert len(await me.data("POST", f"{MEMORIES}/search", json={"query": "she", "limit": 1})) == 1


@pytest.mark.parametrize(
    "body",
    [{}, {"text": ""}, {"text": " \n"}, {"text": 1}, {"text": "x" * 4001}, {"text": "x", "kind": "said"}, []],
    ids=["nothing", "empty", "blank", "number", "too long", "unknown field", "list"],
)
async def test_what_is_no_memory_is_422(body: Any, autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        await Caller(world).refused(422, "POST", MEMORIES, json=body)


async def test_the_working_memory_begins_as_its_template_and_changes(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        me = Caller(world)
        assert await me.data("GET", WORKING) == {"document": {"name": None}, "max_bytes": 100}
        assert (await me.data("PUT", WORKING, json={"name": "Ada", "goals": ["trio"]}))["document"]["name"] == "Ada"
        for content_type in ("application/merge-patch+json", "application/json"):
            patched = await me.data(
                "PATCH", WORKING, content=b'{"goals":null,"city":"London"}', headers={"Content-Type": content_type}
            )
            assert patched["document"] == {"name": "Ada", "city": "London"}
        await me.refused(415, "PATCH", WORKING, content=b"{}", headers={"Content-Type": "application/json-patch+json"})
        assert (await me.refused(422, "PUT", WORKING, json={"name": "x" * 100}))["code"] == "VALIDATION_ERROR"
        await me.refused(422, "PATCH", WORKING, json={"more": "x" * 100})
        await me.refused(422, "PATCH", WORKING, json=["x"])
        assert (await me.data("GET", WORKING))["document"] == {"name": "Ada", "city": "London"}
        await me.gone("DELETE", WORKING)
        assert (await me.data("GET", WORKING))["document"] == {"name": None}


async def test_an_agent_without_a_working_memory_has_none(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        me = Caller(world)
        requests: list[tuple[str, dict[str, Any]]] = [
            ("GET", {}),
            ("PUT", {"json": {}}),
            ("PATCH", {"json": {}}),
            ("DELETE", {}),
        ]
        for method, options in requests:
            await me.refused(404, method, "/agents/demo/working-memory", **options)


async def test_an_admin_reads_and_writes_for_his_tenants_users(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        ada = Caller(world, await world.add_key("acme", "ada"))
        boss = Caller(world, await world.add_key("acme", "boss", admin=True))
        await ada.chat("helper", "I am Ada")
        await ada.data("PUT", WORKING, json={"name": "Ada"})
        assert (await boss.data("GET", f"{HISTORY}?user_id=ada"))["total"] == 2
        assert (await boss.data("GET", HISTORY))["total"] == 0
        assert (await boss.data("GET", f"{WORKING}?user_id=ada"))["document"] == {"name": "Ada"}
        await boss.data("POST", f"{MEMORIES}?user_id=ada", 201, json={"text": "she is kind"})
        assert (await ada.data("GET", f"{MEMORIES}?kind=fact"))["total"] == 1
        await boss.chat("helper", "for her", user_id="ada")
        assert (await ada.data("GET", HISTORY))["total"] == 4
        await ada.refused(403, "GET", f"{HISTORY}?user_id=boss")
        await ada.refused(403, "POST", "/agents/helper/chat/lumosai", json={"message": "x", "user_id": "boss"})
        await boss.refused(422, "GET", f"{HISTORY}?user_id=%00")


@pytest.mark.parametrize(
    "path",
    [
        "/agents/%00/memories",
        "/agents/helper%2F/memories",
        "/agents/%F0%9F%A6%8A/chat/history",
        f"/agents/{'x' * 101}/sessions",
        "/agents/helper/memories/%00",
        "/agents/helper/memories/a%20b",
        f"/agents/helper/memories/{'x' * 101}",
        "/agents/helper/memories/%E2%80%AE",
        "/runs/%00",
        "/runs/../x",
        "/runs/%0A",
    ],
)
async def test_an_odd_id_is_a_thing_that_is_not(path: str, autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        await Caller(world).refused(404, "GET", path)
