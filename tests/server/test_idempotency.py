"""Requests that are repeated: the same run, whoever asks again and however, and never a second one."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import trio
from trio.testing import MockClock

from engine import RetentionLimits, Run
from engine.provider import ModelRequest
from server.store.database import Database
from server.store.errors import StoreUnavailableError
from server.store.idempotency import KeyClaim, claim_key, find_claim
from server.store.rows import Scope
from tests.engine.scripted import SENT, Line, ScriptedProvider, text
from tests.harness.world import World, open_keeping_world, open_world
from tests.server.api_scene import API, HELPER, Caller

SCRIPT: tuple[Line, ...] = ((0, (SENT,)), *((1 + number, text(f"word{number} ")) for number in range(10)))
LAST = 10.0
CHAT = "/agents/demo/chat/lumosai"
STREAM = f"{CHAT}/stream"
ROUTES = [STREAM, CHAT, f"{CHAT}/simulated"]
LOCAL = Scope("local", "local", "demo")


class CountedProvider(ScriptedProvider):
    """Counts how often it was asked."""

    asked = 0

    async def stream(self, request: ModelRequest, emit: Any) -> None:
        self.asked += 1
        await super().stream(request, emit)


def add_agent(world: World, agent_id: str = "demo") -> CountedProvider:
    provider = CountedProvider(*SCRIPT)
    world.add_agent(agent_id, provider)
    return provider


async def post(world: World, path: str = STREAM, key: str | None = "once", **options: Any) -> httpx.Response:
    """A chat with that key."""
    headers = dict(options.pop("headers", {})) | ({} if key is None else {"Idempotency-Key": key})
    json = {"message": "hi", "on_disconnect": "continue"} | options.pop("json", {})
    return await world.client.post(f"{API}{path}", json=json, headers=headers, **options)


def find_run(world: World, response: httpx.Response) -> Run:
    run = world.supervisor.find(response.headers["X-Run-Id"])
    assert run is not None
    return run


def frames(run: Run, after: int = 0) -> bytes:
    return b"".join(entry.frame for entry in run.log.entries(after))


def assert_refused(response: httpx.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["code"]) == (status, code)


# Keys


@pytest.mark.parametrize("keeping", [False, True], ids=["without store", "with store"])
async def test_requests_with_one_key_at_once_start_one_run(keeping: bool, autojump_clock: MockClock) -> None:
    async with open_keeping_world() if keeping else open_world() as world:
        provider = add_agent(world)
        answers: list[httpx.Response] = []

        async def ask(seconds: float) -> None:
            await trio.sleep(seconds)
            answers.append(await post(world))

        async with trio.open_nursery() as nursery:
            for seconds in (0, 0, 0, 0.5, 3, 3, 9.9, 20):
                nursery.start_soon(ask, seconds)
        assert provider.asked == 1
        run = find_run(world, answers[0])
        assert {answer.content for answer in answers} == {frames(run)}
        assert len([what for what, _, _ in world.journal.entries if what == "started"]) == 1


@pytest.mark.parametrize("again", ROUTES)
@pytest.mark.parametrize("first", ROUTES)
async def test_the_key_is_the_same_on_every_chat_route(first: str, again: str, autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        provider = add_agent(world)
        one, two = await post(world, first), await post(world, again)
        assert provider.asked == 1
        assert one.headers["X-Run-Id"] == two.headers["X-Run-Id"]
        if again == CHAT:
            data = two.json()["data"]
            assert data["content"] == find_run(world, one).response
            assert data["processing_time_ms"] == LAST * 1000
        if first == again:
            assert one.content == two.content


async def test_a_repeated_request_goes_on_after_the_last_event(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        provider = add_agent(world)
        run = find_run(world, await post(world))
        for after in range(run.log.last_seq):
            by_query = await post(world, params={"after": str(after)})
            by_header = await post(world, headers={"Last-Event-ID": f"{run.id}.{after}"})
            assert by_query.content == by_header.content == frames(run, after)
        assert (await post(world, params={"after": str(run.log.last_seq)})).status_code == 204
        assert_refused(await post(world, params={"after": str(run.log.last_seq + 1)}), 400, "INVALID_CURSOR")
        assert provider.asked == 1


async def test_another_body_with_the_key_is_422(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        provider = add_agent(world)
        run = find_run(world, await post(world))
        for json in ({"message": "other"}, {"session_id": "other"}, {"stream": {"text_buffer_size": 7}}):
            refusal = await post(world, json=json)
            assert_refused(refusal, 422, "IDEMPOTENCY_KEY_REUSED")
            assert refusal.json()["details"] == {"run_id": run.id}
            resuming = await post(world, json=json, headers={"Last-Event-ID": f"{run.id}.1"})
            assert_refused(resuming, 422, "IDEMPOTENCY_KEY_REUSED")
        assert (await post(world, json={"on_disconnect": "continue", "message": "hi"})).status_code == 200
        assert provider.asked == 1


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "é", "\x7f"], ids=repr)
async def test_a_key_that_cannot_be_is_400(key: str, autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        provider = add_agent(world)
        for path in ROUTES:
            headers = {b"Idempotency-Key": key.encode("latin-1")}
            refusal = await world.client.post(f"{API}{path}", json={"message": "hi"}, headers=headers)
            assert_refused(refusal, 400, "INVALID_IDEMPOTENCY_KEY")
        two = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
        refusal = await world.client.post(f"{API}{STREAM}", json={"message": "hi"}, headers=two)
        assert_refused(refusal, 400, "INVALID_IDEMPOTENCY_KEY")
        assert provider.asked == 0


@pytest.mark.parametrize("key", ["!", "x" * 255, '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "~'%"])
async def test_any_visible_ascii_is_a_key(key: str, autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        provider = add_agent(world)
        assert (await post(world, key=key)).content == (await post(world, key=key)).content
        assert provider.asked == 1


async def test_a_key_is_the_callers_and_the_agents_own(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        other = add_agent(world, "other")
        callers = [
            Caller(world, await world.add_key(tenant, user)) for tenant, user in (("a", "x"), ("a", "y"), ("b", "x"))
        ]
        headers, json = {"Idempotency-Key": "once"}, {"message": "hi"}
        run_ids = set()
        for caller in callers * 2:
            data = await caller.data("POST", "/agents/helper/chat/lumosai", headers=headers, json=json)
            run_ids.add(data["run_id"])
        assert len(run_ids) == 3
        await callers[0].data("POST", "/agents/other/chat/lumosai", headers=headers, json=json)
        assert other.asked == 1


async def test_a_request_that_was_refused_leaves_the_key_free(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        assert_refused(await post(world, json={"message": " "}), 422, "VALIDATION_ERROR")
        provider = add_agent(world)
        assert_refused(await post(world, params={"after": "1"}), 400, "INVALID_CURSOR")
        assert_refused(await post(world, params={"after": ""}), 400, "INVALID_CURSOR")
        assert_refused(await post(world, params={"before": "1"}), 422, "VALIDATION_ERROR")
        assert provider.asked == 0
        world.supervisor.draining = True
        assert_refused(await post(world), 503, "SERVICE_UNAVAILABLE")
        world.supervisor.draining = False
        assert (await post(world)).status_code == 200
        assert provider.asked == 1


async def test_a_first_request_that_is_given_up_while_it_starts_lets_the_next_one_start(
    autojump_clock: MockClock,
) -> None:
    async with open_keeping_world(HELPER) as world:
        caller = Caller(world)
        database = world.database
        assert database is not None
        write = database.write

        async def slow_write(change: Any, *args: Any) -> Any:
            if change.__name__ == "_begin_turn":
                await trio.sleep(3)
            return await write(change, *args)

        database.write = slow_write  # type: ignore[assignment, method-assign]
        path, headers = "/agents/helper/chat/lumosai", {"Idempotency-Key": "once"}

        async def give_up() -> None:
            with trio.move_on_after(1):
                await caller.ask("POST", path, json={"message": "hi"}, headers=headers)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_up)
            await trio.sleep(0.5)
            data = await caller.data("POST", path, json={"message": "hi"}, headers=headers)
        assert [run_id for what, run_id, _ in world.journal.entries if what == "started"] == [data["run_id"]]


async def test_a_store_that_is_away_starts_nothing(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        provider = add_agent(world)
        assert world.database is not None
        read = world.database.read

        async def fail(*_: object) -> None:
            raise StoreUnavailableError("it is down")

        world.database.read = fail  # type: ignore[assignment, method-assign]
        assert_refused(await post(world), 503, "SERVICE_UNAVAILABLE")
        world.database.read = read  # type: ignore[method-assign]
        assert provider.asked == 0


async def test_a_key_is_kept_as_long_as_its_run_can_be_read(autojump_clock: MockClock) -> None:
    async with open_keeping_world(retention=RetentionLimits(seconds=0.0, runs=0)) as world:
        provider = add_agent(world)
        first = await post(world)
        await trio.sleep(60)
        again = await post(world)
        assert again.content == first.content
        assert again.headers["X-Run-Id"] == first.headers["X-Run-Id"]
        assert provider.asked == 1
        await Caller(world).gone("DELETE", f"/runs/{first.headers['X-Run-Id']}")
        third = await post(world)
        assert third.headers["X-Run-Id"] != first.headers["X-Run-Id"]
        assert provider.asked == 2


async def test_a_key_outlives_the_server(autojump_clock: MockClock) -> None:
    database = Database.open("sqlite://", inline=True)
    async with open_keeping_world(database=database) as world:
        provider = add_agent(world)
        first = await post(world)
        await trio.sleep(1)
    async with open_keeping_world(database=database) as world:
        later = add_agent(world)
        assert (await post(world)).content == first.content
        assert (provider.asked, later.asked) == (1, 0)
    database.close()


async def test_a_run_that_another_process_is_just_starting_is_409(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        provider = add_agent(world)
        assert world.database is not None
        answer = await post(world, key="other")
        claim = await world.database.read(find_claim, LOCAL, "other")
        assert claim is not None
        for created_at, status in ((claim.created_at, 409), ("2020-01-01T00:00:00.000000+00:00", 200)):
            starting = KeyClaim("of-another-process", claim.fingerprint, created_at)
            key = f"key{status}"
            assert await world.database.write(claim_key, LOCAL, key, starting)
            response = await post(world, key=key)
            assert response.status_code == status
        assert provider.asked == 2
        assert answer.headers["X-Run-Id"]


# Last-Event-ID on a POST


async def test_a_whole_answer_is_whole_whatever_events_the_client_has(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        add_agent(world)
        run = find_run(world, await post(world))
        for after in (0, 1, run.log.last_seq - 1, run.log.last_seq):
            headers = {"Last-Event-ID": f"{run.id}.{after}"}
            response = await post(world, CHAT, key=None, headers=headers)
            assert response.json()["data"]["content"] == run.response


@pytest.mark.parametrize("path", ROUTES)
async def test_a_post_with_the_id_of_a_live_run_resumes_it_and_starts_none(
    path: str, autojump_clock: MockClock
) -> None:
    async with open_keeping_world() as world:
        provider = add_agent(world)
        body = {"message": "hi", "on_disconnect": "continue"}
        async with world.client.stream("POST", f"{API}{STREAM}", json=body) as response:
            run = find_run(world, response)
        await trio.sleep(3)
        after = 0 if path.endswith("simulated") else 1
        response = await post(world, path, key=None, headers={"Last-Event-ID": f"{run.id}.{after}"})
        assert response.status_code == 200
        assert trio.current_time() == LAST
        if path == STREAM:
            assert response.content == frames(run, after)
        elif path == CHAT:
            assert response.json()["data"]["content"] == run.response
        assert provider.asked == 1


async def test_a_simulated_answer_goes_on_after_its_own_numbers(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        add_agent(world)
        whole = await post(world, f"{CHAT}/simulated")
        parts = [part + b"\n\n" for part in whole.content.split(b"\n\n")[:-1] if not part.startswith(b":")]
        run_id = whole.headers["X-Run-Id"]
        for after in range(len(parts)):
            headers = {"Last-Event-ID": f"{run_id}.{after}"}
            rest = await post(world, f"{CHAT}/simulated", key=None, headers=headers)
            assert rest.content == b"".join(parts[after:])


async def test_an_id_that_is_none_or_not_the_callers_starts_nothing(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        provider = add_agent(world)
        run_id = find_run(world, await post(world)).id
        add_agent(world, "another")
        for event_id in ("x", ".", "1", ".1", f"{run_id}.", f"{run_id}.x", f"{run_id}.-1", f"{run_id}.99"):
            refusal = await post(world, key=None, headers={"Last-Event-ID": event_id})
            assert_refused(refusal, 400, "INVALID_CURSOR")
        unknown = await post(world, key=None, headers={"Last-Event-ID": f"{'x' * 22}.1"})
        assert_refused(unknown, 404, "NOT_FOUND")
        wrong_agent = await post(
            world, "/agents/another/chat/lumosai/stream", None, headers={"Last-Event-ID": f"{run_id}.1"}
        )
        assert_refused(wrong_agent, 400, "INVALID_CURSOR")
        second = find_run(world, await post(world, key="second")).id
        other_run = await post(world, headers={"Last-Event-ID": f"{second}.1"})
        assert_refused(other_run, 400, "INVALID_CURSOR")
        assert provider.asked == 2
        stranger = Caller(world, await world.add_key("acme", "bob"))
        await stranger.refused(404, "POST", STREAM, json={"message": "hi"}, headers={"Last-Event-ID": f"{run_id}.1"})
        assert provider.asked == 2


async def test_the_id_of_a_forgotten_run_is_410(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        provider = add_agent(world)
        run_id = find_run(world, await post(world)).id
        await Caller(world).gone("DELETE", f"/runs/{run_id}")
        gone = await post(world, key=None, headers={"Last-Event-ID": f"{run_id}.1"})
        assert_refused(gone, 410, "GONE")
        assert provider.asked == 1


async def test_the_order_of_a_bodys_fields_does_not_matter(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        provider = add_agent(world)
        for content in (
            b'{"message":"hi","metadata":{"a":1,"b":{"c":2,"d":3}}}',
            b'{"metadata":{"b":{"d":3,"c":2},"a":1}, "message":"hi", "on_disconnect":"grace"}',
        ):
            headers = {"Idempotency-Key": "once", "Content-Type": "application/json"}
            response = await world.client.post(f"{API}{STREAM}", content=content, headers=headers)
            assert response.status_code == 200
        assert provider.asked == 1
