"""Answers without a body, as bytes: nothing of a 204, a 304 or an answer to HEAD tells a length that is not true."""

from __future__ import annotations

import re

import pytest
import trio
from trio.testing import MockClock

from server.routes import ROUTES
from server.routing import Route
from tests.engine.scripted import FOREVER, SENT, ScriptedProvider, text
from tests.harness.world import World, open_keeping_world
from tests.server.api_scene import HELPER, Caller
from tests.server.raw_http import HEAD_END, RawAnswer, RawClient, raw_client, request_bytes

API = "/api/v1"
GETS = [route for route in ROUTES if route.method == "GET" and route.path != f"{API}/ws"]
EMPTIED = [route for route in ROUTES if route.status == 204]
FRAMING = ("content-length", "transfer-encoding", "content-type")


async def ask_head(client: RawClient, path: str, *headers: str, method: str = "HEAD") -> RawAnswer:
    """Send a request whose answer must not have a body; a byte of one would be taken for the next answer."""
    await client.stream.send_all(request_bytes(method, path, headers=headers))
    status_line, *lines = (await client.read_head())[: -len(HEAD_END)].decode("latin-1").split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    following = await client.ask(request_bytes("GET", "/health/live"))
    assert (following.status, following.body) == (200, b'{"status":"ok"}')
    return RawAnswer(int(status_line.split(" ")[1]), fields, b"")


async def ids_of_everything(world: World) -> dict[str, str]:
    """One of each thing that a path can name; the run and the batch have ended."""
    me = Caller(world)
    run = await me.chat("helper")
    links = await me.data("POST", f"/runs/{run['run_id']}/share", json={"expires_in": 100})
    memory = await me.data("POST", "/agents/helper/memories", 201, json={"text": "It rains."})
    await me.data(
        "POST", "/agents", 201, json={"id": "mine", "llm_config": {"provider": "replay", "model": "gpt4o-short"}}
    )
    batch = await me.ask("POST", "/batch/stream", json={"requests": [{"agent_id": "helper", "message": "hi"}]})
    await trio.sleep(1)  # the store has the run's end
    return {
        "agent_id": "helper",
        "run_id": run["run_id"],
        "token": links["token"],
        "memory_id": memory["id"],
        "session_id": "default",
        "batch_id": batch.headers["X-Batch-Id"],
    }


@pytest.mark.parametrize("route", GETS, ids=lambda route: str(route.name))
async def test_head_tells_the_length_that_get_has_or_none(route: Route, autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world, raw_client(world) as client:
        path = route.path.format(**await ids_of_everything(world))
        got = await client.ask(request_bytes("GET", path))
        told = await ask_head(client, path)
        assert told.status == got.status != 404
        assert {name: told.headers.get(name) for name in FRAMING} == {name: got.headers.get(name) for name in FRAMING}


@pytest.mark.parametrize("what", ["runs", "batch"])
async def test_head_of_a_live_stream_tells_no_length(what: str, autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world, raw_client(world) as client:
        world.add_agent("endless", ScriptedProvider((0, (SENT,)), (1, text("hello")), (FOREVER, ())))
        me = Caller(world)
        wish = {"agent_id": "endless", "message": "hi"}
        path, body = ("/batch/stream", {"requests": [wish]}) if what == "batch" else (None, {"message": "hi"})
        async with me.open("POST", path or "/agents/endless/chat/lumosai/stream", json=body) as live:
            told = await ask_head(client, live.headers["Location"])
            assert (told.status, "content-length" in told.headers) == (200, False)
            assert told.headers["content-type"] == "text/event-stream; charset=utf-8"


@pytest.mark.parametrize("route", EMPTIED, ids=lambda route: str(route.name))
async def test_what_was_deleted_is_a_204_without_a_length(route: Route, autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world, raw_client(world) as client:
        ids = await ids_of_everything(world)
        path = route.path.format(**ids | ({"agent_id": "mine"} if route.path.endswith("/{agent_id}") else {}))
        assert_nothing_of_a_body(await ask_head(client, path, method=route.method), 204)


async def test_events_that_were_all_delivered_are_a_204_without_a_length(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world, raw_client(world) as client:
        ids = await ids_of_everything(world)
        for path in (f"{API}/runs/{ids['run_id']}", f"{API}/batch/{ids['batch_id']}"):
            whole = await client.ask(request_bytes("GET", f"{path}/events"))
            last = re.findall(rb"^id: (\S+)$", whole.body, re.MULTILINE)[-1].decode()
            for method in ("GET", "HEAD"):
                answer = await ask_head(client, f"{path}/events", f"Last-Event-ID: {last}", method=method)
                assert_nothing_of_a_body(answer, 204)
        seq = last_seq = (await Caller(world).data("GET", f"/runs/{ids['run_id']}"))["last_seq"]
        named = f"Last-Event-ID: {ids['run_id']}.{seq}"
        answer = await ask_head(client, f"{API}/runs/{ids['run_id']}/events?until={last_seq}", named, method="GET")
        assert_nothing_of_a_body(answer, 204)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_what_the_client_has_is_a_304_without_a_length(method: str, autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world, raw_client(world) as client:
        ids = await ids_of_everything(world)
        for path in (f"{API}/runs/{ids['run_id']}/events?until=2", f"{API}/shared/{ids['token']}/events"):
            etag = (await client.ask(request_bytes("GET", path))).headers["etag"]
            answer = await ask_head(client, path, f"If-None-Match: {etag}", method=method)
            assert_nothing_of_a_body(answer, 304)
            assert answer.headers["etag"] == etag


def assert_nothing_of_a_body(answer: RawAnswer, status: int) -> None:
    assert answer.status == status
    assert [name for name in FRAMING if name in answer.headers] == []
