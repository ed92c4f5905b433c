"""The route table as it is served: one way for all requests, and chats that keep what they should."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from trio.testing import MockClock

from server.principal import KeyLimits
from server.requests import MAX_BODY_BYTES
from server.routes import ROUTES
from server.routing import PATH_IDS, Route
from server.store.database import Database
from server.store.errors import StoreUnavailableError
from tests.engine.scripted import FOREVER, ScriptedProvider, text
from tests.harness.world import open_keeping_world
from tests.server.api_scene import BASE, HELPER, Caller

CHAT = "/agents/helper/chat/lumosai"
IDS = dict.fromkeys(PATH_IDS, "none")


class FailingDatabase(Database):
    """Answers until it is ``down``."""

    down = False

    async def read(self, query: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        return await self._or_down(super().read, query, *args)

    async def write(self, change: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        return await self._or_down(super().write, change, *args)

    async def _or_down(self, ask: Callable[..., Any], *args: Any) -> Any:
        if self.down:
            raise StoreUnavailableError("it is down")
        return await ask(*args)


def test_no_route_is_there_twice() -> None:
    served = [(route.method, path) for route in ROUTES for path in (route.path, *route.aliases)]
    assert len(set(served)) == len(served)
    assert len({route.name for route in ROUTES}) == len(ROUTES)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: str(route.name))
async def test_what_every_route_refuses(route: Route, autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        path = BASE + route.path.format(**IDS | {"agent_id": "helper"})
        wrong = await world.client.request("BREW", path)
        assert (wrong.status_code, wrong.json()["code"]) == (405, "METHOD_NOT_ALLOWED")
        assert route.method in wrong.headers["Allow"].split(", ")
        if not route.raw_query:
            unknown = await world.client.request(route.method, f"{path}?nothing=1", json=route.example)
            assert (unknown.status_code, unknown.json()["details"]) == (422, {"field": "nothing"})
        if route.body is not None:
            for body, content_type, status in ((b"{}", "text/plain", 415), (b"{", route.body_media_types[0], 400)):
                headers = {"Content-Type": content_type}
                refused = await world.client.request(route.method, path, content=body, headers=headers)
                assert refused.status_code == status
            huge = b" " * (MAX_BODY_BYTES + 1)
            refused = await world.client.request(
                route.method, path, content=huge, headers={"Content-Type": route.body_media_types[0]}
            )
            assert refused.status_code == 413
        assert world.journal.entries == []


async def test_a_store_that_is_down_starts_no_run(autojump_clock: MockClock) -> None:
    database = FailingDatabase.open("sqlite://", inline=True)
    assert isinstance(database, FailingDatabase)
    async with open_keeping_world(HELPER, database=database) as world:
        me = Caller(world)
        assert (await me.chat("helper"))["content"] != ""
        database.down = True
        refusal = await me.ask("POST", CHAT, json={"message": "hi"})
        assert (refusal.status_code, refusal.json()["code"]) == (503, "SERVICE_UNAVAILABLE")
        assert refusal.headers["Retry-After"] == "5"
        await me.refused(503, "GET", "/agents/helper/memories")
        assert world.supervisor.active_runs == 0
    database.close()


async def test_a_run_that_memory_has_dropped_is_known_and_its_events_are_gone(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        me = Caller(world)
        answer = await me.chat("helper")
        live = await me.data("GET", f"/runs/{answer['run_id']}")
        await me.gone("DELETE", f"/runs/{answer['run_id']}")
        stored = await me.data("GET", f"/runs/{answer['run_id']}")
        same = ("run_id", "agent_id", "status", "response", "elapsed_ms", "ttfb_ms")
        assert {name: stored[name] for name in same} == {name: live[name] for name in same}
        assert (stored["last_seq"], stored["terminal"]) == (0, None)
        assert (await me.refused(410, "GET", f"/runs/{answer['run_id']}/events"))["code"] == "GONE"
        await me.refused(404, "POST", f"/runs/{answer['run_id']}/stop")


async def test_a_run_has_a_trace(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        me = Caller(world)
        tree = await me.data("GET", f"/runs/{(await me.chat('helper'))['run_id']}/trace")
        assert (tree["kind"], tree["name"], tree["error"]) == ("run", "helper", None)
        assert tree["children"]


async def test_a_place_is_given_back_when_its_run_ends(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        world.add_agent("slow", ScriptedProvider((0, text("hi")), (FOREVER, ())))
        ada = Caller(world, await world.add_key("acme", "ada", limits=KeyLimits(concurrent_runs=1)))
        body = {"message": "hi", "on_disconnect": "continue"}
        async with ada.open("POST", "/agents/slow/chat/lumosai/stream", json=body) as response:
            run_id = response.headers["X-Run-Id"]
            refusal = await ada.refused(429, "POST", CHAT.replace("helper", "demo"), json={"message": "hi"})
            assert refusal["code"] == "RATE_LIMITED"
        await ada.refused(422, "POST", "/agents/slow/chat/lumosai", json={"message": " "})
        await ada.data("POST", f"/runs/{run_id}/stop")
        async with ada.open("POST", "/agents/slow/chat/lumosai/stream", json=body) as response:
            assert response.status_code == 200


async def test_a_draining_server_keeps_no_message(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        me = Caller(world)
        world.supervisor.draining = True
        await me.refused(503, "POST", CHAT, json={"message": "hi"})
        assert (await me.data("GET", "/agents/helper/chat/history"))["total"] == 0


def test_the_ids_of_paths_have_a_bound() -> None:
    for one in PATH_IDS.values():
        assert re.fullmatch(one.pattern, "a")
        for odd in ("", "x" * 101, "a b", "a\n", "\0", "é", "a/b", "%2F"):
            assert not re.fullmatch(one.pattern, odd, re.ASCII)
