"""The route table as it is served: one way for all requests, and chats that keep what they should."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from server.principal import LOCAL_USER, KeyLimits
from server.requests import MAX_BODY_BYTES
from server.routes import ROUTES
from server.routing import PATH_IDS, Route
from server.store import turns
from server.store.database import Database
from server.store.errors import StoreUnavailableError
from server.store.interrupted import interrupt_runs
from server.store.rows import Scope
from server.store.run_events import forget_events
from server.store.turns import begin_run
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


class SlowDatabase(Database):
    """Takes two seconds to keep a turn."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.saving = trio.Event()

    async def keep(self, change: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        if change is turns.save_turn:
            self.saving.set()
            await trio.sleep(2)
        return await super().keep(change, *args)


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
        run = world.supervisor.find(answer["run_id"])
        assert run is not None
        await trio.sleep(1)  # the journal has it
        world.supervisor.forget(run)
        database = world.database
        assert database is not None
        await database.write(forget_events, answer["run_id"])
        stored = await me.data("GET", f"/runs/{answer['run_id']}")
        same = ("run_id", "agent_id", "status", "response", "elapsed_ms", "ttfb_ms")
        assert {name: stored[name] for name in same} == {name: live[name] for name in same}
        assert (stored["last_seq"], stored["terminal"]) == (0, None)
        assert (await me.refused(410, "GET", f"/runs/{answer['run_id']}/events"))["code"] == "GONE"
        assert await me.data("POST", f"/runs/{answer['run_id']}/stop") == stored


@pytest.mark.parametrize("in_memory", [True, False])
async def test_a_deleted_run_is_known_without_its_answer(in_memory: bool, autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        me = Caller(world)
        answer = await me.chat("helper")
        path = f"/runs/{answer['run_id']}"
        run = world.supervisor.find(answer["run_id"])
        assert run is not None
        if not in_memory:
            world.supervisor.forget(run)
        for _ in range(2):
            await me.gone("DELETE", path)
            stored = await me.data("GET", path)
            assert (stored["status"], stored["response"], stored["terminal"]) == ("done", "", None)
        assert (await me.data("GET", "/agents/helper/chat/history"))["items"][-1]["content"] == answer["content"]


@pytest.mark.parametrize("path", ["/runs/{}", "/agents/helper/sessions/default"], ids=["run", "session"])
async def test_what_is_deleted_while_it_is_said_is_not_kept(path: str, autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        me = Caller(world)
        body = {"message": "hi", "on_disconnect": "continue"}
        async with me.open("POST", f"{CHAT}/stream", json=body) as response:
            run_id = response.headers["X-Run-Id"]
            await trio.sleep(1)
        run = world.supervisor.find(run_id)
        assert run is not None
        await me.gone("DELETE", path.format(run_id))
        await run.log.wait_ended()
        await trio.testing.wait_all_tasks_blocked()
        assert run.response != ""
        await trio.sleep(1)  # the journal has it
        world.supervisor.forget(run)
        stored = await me.data("GET", f"/runs/{run_id}")
        assert (stored["status"], stored["response"]) == ("stop" if "runs" in path else "done", "")


async def test_a_run_that_is_deleted_while_it_goes_on_was_stopped_though_the_store_is_slow(
    autojump_clock: MockClock,
) -> None:
    database = SlowDatabase.open("sqlite://", inline=True)
    async with open_keeping_world(HELPER, database=database) as world:
        me = Caller(world)
        async with me.open("POST", f"{CHAT}/stream", json={"message": "hi", "on_disconnect": "continue"}) as response:
            run_id = response.headers["X-Run-Id"]
            await trio.sleep(1)
        await me.gone("DELETE", f"/runs/{run_id}")
        view = await me.data("GET", f"/runs/{run_id}")
        assert (view["status"], view["response"], view["terminal"]) == ("stop", "", None)
        assert (await me.refused(410, "GET", f"/runs/{run_id}/events"))["details"]["status"] == "stop"
    database.close()


@pytest.mark.parametrize("what", ["run", "session", "agent"])
async def test_an_answer_goes_with_its(what: str, autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        me = Caller(world)
        await me.data(
            "POST", "/agents", 201, json={"id": "mine", "llm_config": {"provider": "replay", "model": "gpt4o-short"}}
        )
        run_id = (await me.chat("mine"))["run_id"]
        run = world.supervisor.find(run_id)
        assert run is not None
        await trio.sleep(1)  # the journal has it
        world.supervisor.forget(run)
        assert (await me.data("GET", f"/runs/{run_id}"))["response"] != ""
        paths = {"run": f"/runs/{run_id}", "session": "/agents/mine/sessions/default", "agent": "/agents/mine"}
        await me.gone("DELETE", paths[what])
        assert (await me.data("GET", f"/runs/{run_id}"))["response"] == ""


async def test_a_stop_while_the_whole_answer_is_kept_says_how_it_ended(autojump_clock: MockClock) -> None:
    database = SlowDatabase.open("sqlite://", inline=True)
    assert isinstance(database, SlowDatabase)
    async with open_keeping_world(HELPER, database=database) as world:
        me = Caller(world)
        async with me.open("POST", f"{CHAT}/stream", json={"message": "hi", "on_disconnect": "continue"}) as response:
            run_id = response.headers["X-Run-Id"]
            await database.saving.wait()
            view = await me.data("POST", f"/runs/{run_id}/stop")
        assert (view["status"], view["terminal"]["chunk_type"]) == ("done", "done")
        await me.gone("DELETE", f"/runs/{run_id}")
    database.close()


async def test_a_run_has_a_trace(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        me = Caller(world)
        tree = await me.data("GET", f"/runs/{(await me.chat('helper'))['run_id']}/trace")
        assert (tree["kind"], tree["name"], tree["error"]) == ("run", "helper", None)
        assert tree["children"]


async def test_a_trace_that_is_not_here_is_no_run_that_never_was(autojump_clock: MockClock) -> None:
    """404 is for what is not yours; else the trace was dropped, or it is another process's."""
    async with open_keeping_world(HELPER) as world:
        assert world.database is not None
        me = Caller(world)
        await me.refused(404, "GET", "/runs/unknown/trace")
        scope = Scope(LOCAL_USER.tenant_id, LOCAL_USER.user_id, "helper")
        await world.database.write(begin_run, scope, "default", "elsewhere", None, "2026-11-23T12:00:00.000000+00:00")
        refusal = await me.refused(503, "GET", "/runs/elsewhere/trace")
        assert refusal["code"] == "SERVICE_UNAVAILABLE"
        await world.database.write(interrupt_runs, "2026-11-23T12:00:00.000000+00:00")
        refusal = await me.refused(410, "GET", "/runs/elsewhere/trace")
        assert (refusal["code"], refusal["details"]) == ("GONE", {"run_id": "elsewhere"})


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
        for odd in ("", "x" * 161, "a b", "a\n", "\0", "é", "a/b", "%2F"):
            assert not re.fullmatch(one.pattern, odd, re.ASCII)
