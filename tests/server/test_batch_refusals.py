"""What a batch refuses, whole or in part: and then nothing, or only the rest, was started."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from itertools import count
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from server.batch_log import BatchRefusal
from server.batch_start import MAX_REQUESTS, START_SECONDS, refusal_of_all
from server.errors import ApiError
from server.principal import KeyLimits
from tests.engine.scripted import text
from tests.harness.world import World, open_keeping_world, open_world
from tests.server.api_scene import HELPER, Caller
from tests.server.batch_scene import BATCH, ask, assert_one_log, speaking, two, whole_batch

INVALID: dict[str, Any] = {
    "no requests": {"requests": []},
    "too many": ask(*["left"] * (MAX_REQUESTS + 1)),
    "no agent": {"requests": [{"message": "hi"}]},
    "a blank message": {"requests": [{"agent_id": "left", "message": "hi"}, {"agent_id": "left", "message": " "}]},
    "an unknown field": ask("left", colour="red"),
    "an unknown field of one": {"requests": [{"agent_id": "left", "message": "hi", "colour": "red"}]},
    "another end": ask("left", on_disconnect="never"),
    "a list": [],
}


@pytest.mark.parametrize("body", INVALID.values(), ids=INVALID)
async def test_an_invalid_body_starts_nothing(body: Any, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        response = await world.client.post(f"{BATCH}/stream", json=body)
        assert (response.status_code, response.json()["code"]) == (422, "VALIDATION_ERROR")
        assert world.journal.entries == []


async def test_the_field_that_is_wrong_is_named(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        response = await world.client.post(f"{BATCH}/stream", json=INVALID["a blank message"])
        assert response.json()["details"] == {"field": "requests[1].message"}


@pytest.mark.parametrize("nobody", ["nobody", "no such name!", "x" * 1000, ""])
async def test_what_cannot_be_started_is_told_and_the_others_run(nobody: str, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        reader = await whole_batch(world, ask(nobody, "left", nobody))
        assert_one_log(reader)
        assert [run["index"] for run in reader.frames[0]["runs"]] == [1]
        refusals = reader.frames[1:3]
        assert [(one["chunk_type"], one["index"], one["code"]) for one in refusals] == [
            ("batch_error", 0, "NOT_FOUND"),
            ("batch_error", 2, "NOT_FOUND"),
        ]
        assert [what for _, _, what in reader.story][-1] == "done"


async def test_a_batch_of_which_nothing_starts_is_refused_and_each_is_named(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        response = await world.client.post(f"{BATCH}/stream", json=ask("nobody", "no one"))
        assert (response.status_code, response.json()["code"]) == (404, "NOT_FOUND")
        refused = response.json()["details"]["refused"]
        assert [(one["index"], one["agent_id"], one["code"], one["content"]) for one in refused] == [
            (0, "nobody", "NOT_FOUND", "there is no agent 'nobody'"),
            (1, "no one", "NOT_FOUND", "there is no agent 'no one'"),
        ]
        assert "X-Batch-Id" not in response.headers
        assert "Retry-After" not in response.headers


def _refusal(status: int, retry_after: int | None = None) -> tuple[ApiError, BatchRefusal]:
    code = HTTPStatus(status).name
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return ApiError(status, code, "why", headers=headers), BatchRefusal(0, "a", code, "why", None, retry_after)


@pytest.mark.parametrize(
    ("refusals", "expected"),
    [
        ([_refusal(404), _refusal(404)], (404, "NOT_FOUND", None)),
        ([_refusal(429, 3), _refusal(429, 40)], (429, "TOO_MANY_REQUESTS", "40")),
        ([_refusal(503, 5), _refusal(503)], (503, "SERVICE_UNAVAILABLE", "5")),
        ([_refusal(404), _refusal(429, 7)], (503, "SERVICE_UNAVAILABLE", "7")),
        ([_refusal(503, 5), _refusal(404), _refusal(429, 1)], (503, "SERVICE_UNAVAILABLE", "5")),
        ([_refusal(404), _refusal(403)], (422, "VALIDATION_ERROR", None)),
    ],
)
def test_many_refusals_are_one(
    refusals: list[tuple[ApiError, BatchRefusal]], expected: tuple[int, str, str | None]
) -> None:
    whole = refusal_of_all([error for error, _ in refusals], [told for _, told in refusals])
    assert (whole.status, whole.code, whole.headers.get("Retry-After")) == expected
    assert whole.details == {"refused": [told for _, told in refusals]}


async def test_a_full_key_gets_nothing_started_and_is_told_when_to_come_again(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        world.add_agent("a", speaking((9, text("x"))))
        caller = Caller(world, await world.add_key("acme", "ada", limits=KeyLimits(concurrent_runs=1)))
        async with caller.open("POST", "/agents/a/chat/lumosai/stream", json={"message": "hi"}):
            response = await caller.ask("POST", "/batch/stream", json=ask("a", "a"))
        assert (response.status_code, response.json()["code"]) == (429, "RATE_LIMITED")
        assert int(response.headers["Retry-After"]) == response.json()["details"]["refused"][1]["retry_after"] > 0


async def test_what_may_be_started_later_says_when(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        world.add_agent("a", speaking((1, text("x"))))
        key = await world.add_key("acme", "ada", limits=KeyLimits(concurrent_runs=1))
        reader = await whole_batch(world, ask("a", "a", "nobody"), key)
        refusals = [frame for frame in reader.frames if frame["chunk_type"] == "batch_error"]
        assert refusals[0]["retry_after"] == refusals[0]["details"]["retry_after"]
        assert "retry_after" not in refusals[1]


async def test_a_drain_while_a_batch_starts_refuses_the_rest_and_ends_what_began(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_keeping_world() as world:
        two(world)
        assert world.database is not None
        write = world.database.write
        starts = count()

        async def write_slowly(*change: Any) -> Any:
            if next(starts):
                await trio.sleep(1)
            return await write(*change)

        monkeypatch.setattr(world.database, "write", write_slowly)
        async with trio.open_nursery() as nursery:

            async def drain() -> None:
                await trio.sleep(0.5)
                monkeypatch.setattr(world.database, "write", write)
                await world.supervisor.drain(0)

            nursery.start_soon(drain)
            reader = await whole_batch(world, ask("left", "right", "left"))
        codes = {frame["index"]: frame["code"] for frame in reader.frames if frame["chunk_type"] == "batch_error"}
        assert codes == {1: "SERVICE_UNAVAILABLE", 2: "SERVICE_UNAVAILABLE"}
        assert [run["status"] for run in reader.frames[-1]["runs"]] == ["error"]
        assert world.supervisor.active_runs == 0


async def test_who_goes_while_a_batch_starts_leaves_no_run(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_keeping_world(HELPER) as world:
        world.add_agent("a", speaking((50, text("x"))))
        assert world.database is not None

        async def hang(*_: Any) -> None:
            await trio.sleep_forever()

        write = world.database.write

        async def write_once(*change: Any) -> Any:
            monkeypatch.setattr(world.database, "write", hang)
            return await write(*change)

        monkeypatch.setattr(world.database, "write", write_once)
        with trio.move_on_after(2):
            await whole_batch(world, ask("a", "helper", on_disconnect="continue"))
        monkeypatch.setattr(world.database, "write", write)
        await trio.testing.wait_all_tasks_blocked()
        assert [what for what, _, _ in world.journal.entries] == ["started", "ended"]


async def test_a_draining_server_takes_no_batch(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        await world.supervisor.drain(0)
        response = await world.client.post(f"{BATCH}/stream", json=ask("left"))
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) > 0


async def _starts(world: World, headers: dict[str, str], *agents: str) -> Sequence[str]:
    reader = await whole_batch(world, ask(*agents), headers)
    codes = {one["index"]: one["code"] for one in reader.frames if one["chunk_type"] == "batch_error"}
    return [codes.get(index, "started") for index in range(len(agents))]


async def test_each_run_counts_towards_the_keys_limits(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        world.add_agent("a", speaking((1, text("x"))))
        key = await world.add_key("acme", "ada", limits=KeyLimits(concurrent_runs=2))
        assert await _starts(world, key, "a", "a", "a") == ["started", "started", "RATE_LIMITED"]
        assert await _starts(world, key, "a", "a") == ["started", "started"], "the places are free again"
        key = await world.add_key("acme", "ada", limits=KeyLimits(requests_per_minute=3))
        assert await _starts(world, key, "a", "a", "a", "a") == ["started"] * 3 + ["RATE_LIMITED"]


async def test_what_takes_too_long_to_start_is_given_up_and_the_others_are_read(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_keeping_world(HELPER) as world:
        world.add_agent("a", speaking((1, text("x")), (6, text("y"))))
        assert world.database is not None
        write = world.database.write

        async def write_once(*change: Any) -> Any:
            monkeypatch.setattr(world.database, "write", hang)
            return await write(*change)

        async def hang(*_: Any) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(world.database, "write", write_once)
        reader = await whole_batch(world, ask("a", "helper", "a", on_disconnect="cancel"))
        refusals = [(one["index"], one["code"]) for one in reader.frames if one["chunk_type"] == "batch_error"]
        assert refusals == [(1, "SERVICE_UNAVAILABLE"), (2, "SERVICE_UNAVAILABLE")]
        assert reader.arrivals[0] == START_SECONDS
        assert reader.story[-1] == (6, "a", "done")
