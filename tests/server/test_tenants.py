"""What is not yours is not there: one case for each route of the table, for a stranger of each kind.

``ada`` of tenant ``acme`` has one of everything. Whoever is not her asks for it by its exact path: a user of her own
tenant, a user of another one, and that one's admin. A route without a case fails the test: add one with the route.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from trio.testing import MockClock

from server.routes import ROUTES
from server.routing import Route
from tests.engine.scripted import FOREVER, ScriptedProvider, text
from tests.harness.world import World, open_keeping_world
from tests.server.api_scene import BASE, HELPER, Caller

STRANGERS = {
    "another user": ("acme", "bob", False),
    "another tenant's user": ("other", "ada", False),
    "another tenant's admin": ("other", "root", True),
}
SECRET = "the moon landing"
RECORD = {"llm_config": {"provider": "replay", "model": "gpt4o-short"}}


@dataclass(frozen=True)
class Case:
    """How a stranger asks, and what he is told: 404, or an answer in which nothing of hers is."""

    status: int = 404
    body: Any = None


SEEN_BY_ALL = Case(200)
CASES: dict[str, Case] = {
    "chat_stream": Case(body={"message": "hi"}),
    "chat_whole": Case(body={"message": "hi"}),
    "chat_simulated": Case(body={"message": "hi"}),
    "get_run": Case(),
    "forget_run": Case(),
    "get_run_events": Case(),
    "stop_run": Case(),
    "share_run": Case(body={}),
    "get_shared_events": Case(),
    "get_run_trace": Case(),
    "batch_stream": Case(200, {"requests": [{"agent_id": "helper", "message": "hi"}]}),
    "get_batch": Case(),
    "get_batch_events": Case(),
    "stop_batch": Case(),
    "create_agent": Case(201, RECORD),
    "list_agents": SEEN_BY_ALL,
    "get_agent": Case(),
    "replace_agent": Case(body=RECORD),
    "delete_agent": Case(),
    "get_history": Case(),
    "list_sessions": Case(),
    "delete_session": Case(),
    "list_memories": Case(),
    "create_memory": Case(body={"text": "x"}),
    "clear_memories": Case(),
    "search_memories": Case(body={"query": SECRET}),
    "get_memory": Case(),
    "replace_memory": Case(body={"text": "x"}),
    "delete_memory": Case(),
    "get_working_memory": Case(),
    "replace_working_memory": Case(body={}),
    "patch_working_memory": Case(body={}),
    "delete_working_memory": Case(),
    "get_me": SEEN_BY_ALL,
    "list_tools": SEEN_BY_ALL,
    "live": SEEN_BY_ALL,
    "ready": SEEN_BY_ALL,
    "get_openapi": SEEN_BY_ALL,
    "show_docs": Case(302),
    "get_docs": SEEN_BY_ALL,
}

# The same with the server's own agent, which all may use: then it is each one's own things that are there, and empty.
OWN_WITH_A_SHARED_AGENT: dict[str, Any] = {
    "get_history": {"items": [], "total": 0, "limit": 50, "offset": 0},
    "list_sessions": {"items": [], "total": 0, "limit": 50, "offset": 0},
    "delete_session": 404,
    "list_memories": {"items": [], "total": 0, "limit": 50, "offset": 0},
    "clear_memories": {"deleted": 0},
    "search_memories": [],
    "get_memory": 404,
    "replace_memory": 404,
    "delete_memory": 404,
    "get_working_memory": {"document": {"name": None}, "max_bytes": 100},
    "replace_working_memory": {"document": {}, "max_bytes": 100},
    "patch_working_memory": {"document": {"name": None}, "max_bytes": 100},
    "delete_working_memory": 204,
}


@dataclass(frozen=True)
class Scene:
    """Ada's things: the ids that fill the paths, and a look at all of them."""

    world: World
    ada: Caller
    ids: dict[str, str]

    async def stranger(self, who: str) -> Caller:
        """A caller with a key of that kind."""
        tenant, user, admin = STRANGERS[who]
        return Caller(self.world, await self.world.add_key(tenant, user, admin=admin))

    async def everything(self) -> Any:
        """What Ada sees of her things with the agent."""
        agent = f"/agents/{self.ids['agent_id']}"
        paths = ("chat/history", "sessions", "memories", "working-memory")
        seen = [await self.ada.data("GET", f"{agent}/{path}") for path in paths]
        run = await self.ada.data("GET", f"/runs/{self.ids['run_id']}")
        batch = await self.ada.data("GET", f"/batch/{self.ids['batch_id']}")
        return [*seen, run["status"], batch["status"], batch["last_seq"]]

    def path(self, route: Route) -> str:
        """The route's path to Ada's things, under ``/api/v1`` if it is there."""
        return route.path.format(**self.ids)


@asynccontextmanager
async def scene(*, shared: bool = False) -> AsyncIterator[Scene]:
    """Ada's own agent, or the server's ``helper``; a session, memories, a working memory, and a run under way."""
    async with open_keeping_world(HELPER) as world:
        world.add_agent("slow", ScriptedProvider((0, text(SECRET)), (FOREVER, ())))
        ada = Caller(world, await world.add_key("acme", "ada"))
        agent_id = "helper"
        if not shared:
            agent_id = "adas"
            own = RECORD | {"id": agent_id, "system": SECRET, "working_memory": {"template": {}}}
            await ada.data("POST", "/agents", 201, json=own)
        await ada.chat(agent_id, f"tell me of {SECRET}", session_id="moon")
        memory = await ada.data("POST", f"/agents/{agent_id}/memories", 201, json={"text": SECRET})
        await ada.data("PUT", f"/agents/{agent_id}/working-memory", json={"topic": SECRET})
        ids = {
            "agent_id": agent_id,
            "run_id": await _run_under_way(ada),
            "token": f"{'z' * 22}.9999999999.{'z' * 43}",  # of hers nobody can guess one
            "batch_id": await _batch_under_way(ada),
            "session_id": "moon",
            "memory_id": memory["id"],
        }
        yield Scene(world, ada, ids)


async def _run_under_way(ada: Caller) -> str:
    body = {"message": "hi", "on_disconnect": "continue"}
    request = ada.open("POST", "/agents/slow/chat/lumosai/stream", json=body)
    async with request as response:
        return str(response.headers["X-Run-Id"])


async def _batch_under_way(ada: Caller) -> str:
    body = {"requests": [{"agent_id": "slow", "message": "hi"}], "on_disconnect": "continue"}
    async with ada.open("POST", "/batch/stream", json=body) as response:
        return str(response.headers["X-Batch-Id"])


def _by_name(route: Route) -> str:
    return route.name


def test_every_route_has_a_case() -> None:
    assert sorted(CASES) == sorted(route.name for route in ROUTES)
    shared = {route.name for route in ROUTES if "agent_id" in route.path_ids and route.tag in ("Memory", "History")}
    assert set(OWN_WITH_A_SHARED_AGENT) == shared - {"create_memory"}


@pytest.mark.parametrize("who", STRANGERS)
@pytest.mark.parametrize("route", ROUTES, ids=_by_name)
async def test_a_stranger_gets_nothing_of_hers(route: Route, who: str, autojump_clock: MockClock) -> None:
    case = CASES[route.name]
    async with scene() as its:
        stranger, before = await its.stranger(who), await its.everything()
        response = await stranger.ask_path(route.method, its.path(route), json=case.body)
        assert response.status_code == case.status, response.text
        assert SECRET not in response.text
        assert "adas" not in response.text.replace(f"there is no agent '{its.ids['agent_id']}'", "")
        assert await its.everything() == before
        if case.status == 404:
            nothing = await stranger.ask_path(route.method, route.path.format(**_nothings(its)), json=case.body)
            assert _without_ids(response, its.ids) == _without_ids(nothing, _nothings(its)), "as if there were none"


def _nothings(its: Scene) -> dict[str, str]:
    return {name: "z" * len(text_of_id) for name, text_of_id in its.ids.items()}


def _without_ids(response: httpx.Response, ids: dict[str, str]) -> Any:
    payload = response.json()
    del payload["timestamp"]
    shown = repr(payload)
    for one in sorted(ids.values(), key=len, reverse=True):
        shown = shown.replace(repr(one), "ID")
    return response.status_code, shown


@pytest.mark.parametrize("who", STRANGERS)
@pytest.mark.parametrize("route", [route for route in ROUTES if route.name in OWN_WITH_A_SHARED_AGENT], ids=_by_name)
async def test_a_shared_agent_keeps_its_users_apart(route: Route, who: str, autojump_clock: MockClock) -> None:
    expected = OWN_WITH_A_SHARED_AGENT[route.name]
    async with scene(shared=True) as its:
        stranger, before = await its.stranger(who), await its.everything()
        response = await stranger.ask_path(route.method, its.path(route), json=CASES[route.name].body)
        if isinstance(expected, int):
            assert response.status_code == expected
        else:
            assert response.json() == {"success": True, "data": expected}
        assert await its.everything() == before


@pytest.mark.parametrize("route", ROUTES, ids=_by_name)
async def test_without_a_key_nobody_gets_in(route: Route, autojump_clock: MockClock) -> None:
    async with scene() as its:
        path, body = its.path(route), CASES[route.name].body
        before = await its.everything()
        for headers in ({}, {"Authorization": "Bearer lumos_abcdefghijkl_" + "x" * 43}, {"X-API-Key": "nonsense"}):
            response = await its.world.client.request(route.method, f"{BASE}{path}", json=body, headers=headers)
            assert response.status_code == (CASES[route.name].status if route.open else 401), response.text
            if not route.open:
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert response.json()["code"] == "UNAUTHORIZED"
        assert await its.everything() == before


@pytest.mark.parametrize(
    "route",
    [route for route in ROUTES if route.query is not None and "user_id" in route.query.__struct_fields__],
    ids=_by_name,
)
async def test_nobody_reads_as_another_user(route: Route, autojump_clock: MockClock) -> None:
    async with scene(shared=True) as its:
        bob = await its.stranger("another user")
        before = await its.everything()
        path = f"{its.path(route)}?user_id=ada"
        assert (await bob.ask_path(route.method, path, json=CASES[route.name].body)).status_code == 403
        root = await its.stranger("another tenant's admin")
        response = await root.ask_path(route.method, path, json=CASES[route.name].body)
        assert SECRET not in response.text
        assert await its.everything() == before


async def test_an_admin_sees_and_stops_the_runs_of_his_tenant(autojump_clock: MockClock) -> None:
    async with scene() as its:
        boss = Caller(its.world, await its.world.add_key("acme", "boss", admin=True))
        path = f"/runs/{its.ids['run_id']}"
        assert (await boss.data("GET", path))["status"] == "running"
        assert (await boss.data("POST", f"{path}/stop"))["status"] == "stop"


async def test_an_alias_is_as_closed_as_its_route(autojump_clock: MockClock) -> None:
    async with scene() as its:
        stranger = await its.stranger("another tenant's admin")
        for route in ROUTES:
            for alias in route.aliases:
                response = await stranger.ask_path(route.method, alias.format(**its.ids), json=CASES[route.name].body)
                assert response.status_code == 404
