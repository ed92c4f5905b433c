"""Batches that are asked for again: by key, or by the last event that the client has; never a second one."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import httpx
import pytest
import trio
from trio.testing import MockClock

from server.store.idempotency import KeyClaim, claim_key, find_claim
from server.store.rows import Scope
from server.store.times import time_text
from tests.harness.world import World, open_keeping_world, open_world
from tests.server.api_scene import API, Caller
from tests.server.batch_scene import BATCH, ask, read_again, two

PLACE = Scope("local", "local", "")


async def post(world: World, key: str | None = "once", **options: Any) -> httpx.Response:
    """A batch with that key."""
    headers = dict(options.pop("headers", {})) | ({} if key is None else {"Idempotency-Key": key})
    json = options.pop("json", ask("left", "right", on_disconnect="continue"))
    return await world.client.post(f"{BATCH}/stream", json=json, headers=headers, **options)


def assert_refused(response: httpx.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["code"]) == (status, code)


def started(world: World) -> int:
    return len([what for what, _, _ in world.journal.entries if what == "started"])


@pytest.mark.parametrize("keeping", [False, True], ids=["without store", "with store"])
async def test_requests_with_one_key_are_one_batch(keeping: bool, autojump_clock: MockClock) -> None:
    async with open_keeping_world() if keeping else open_world() as world:
        two(world)
        answers: list[httpx.Response] = []

        async def ask_at(seconds: float) -> None:
            await trio.sleep(seconds)
            answers.append(await post(world))

        async with trio.open_nursery() as nursery:
            for seconds in (0, 0, 0, 2.5, 4.9, 20):
                nursery.start_soon(ask_at, seconds)
        assert len({answer.content for answer in answers}) == 1
        assert len({answer.headers["X-Batch-Id"] for answer in answers}) == 1
        assert started(world) == 2


async def test_a_repeated_batch_goes_on_after_the_last_event(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        two(world)
        whole = await post(world)
        batch_id = whole.headers["X-Batch-Id"]
        frames = [frame + b"\n\n" for frame in whole.content.split(b"\n\n")[:-1]]
        for after in range(len(frames)):
            by_query = await post(world, params={"after": str(after)})
            by_header = await post(world, headers={"Last-Event-ID": f"{batch_id}.{after}"})
            assert by_query.content == by_header.content == b"".join(frames[after:])
        assert (await post(world, params={"after": str(len(frames))})).status_code == 204
        assert_refused(await post(world, params={"after": str(len(frames) + 1)}), 400, "INVALID_CURSOR")
        assert started(world) == 2


async def test_another_body_with_the_key_is_422(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        two(world)
        batch_id = (await post(world)).headers["X-Batch-Id"]
        for json in (ask("left"), ask("right", "left"), ask("left", "right")):
            for headers in ({}, {"Last-Event-ID": f"{batch_id}.1"}):
                refusal = await post(world, json=json, headers=headers)
                assert_refused(refusal, 422, "IDEMPOTENCY_KEY_REUSED")
                assert refusal.json()["details"] == {"batch_id": batch_id}
        assert started(world) == 2


async def test_a_batch_that_another_process_is_just_starting_is_409_and_one_that_is_lost_410(
    autojump_clock: MockClock,
) -> None:
    async with open_keeping_world() as world:
        two(world)
        await post(world, "other")
        assert world.database is not None
        claim = await world.database.read(find_claim, PLACE, "other")
        assert claim is not None
        for created_at, status in ((claim.created_at, 409), ("2020-01-01T00:00:00.000000+00:00", 410)):
            lost = KeyClaim("of-another-process", claim.fingerprint, created_at)
            assert await world.database.write(claim_key, PLACE, str(status), lost)
            refusal = await post(world, str(status))
            assert_refused(refusal, status, "CONFLICT" if status == 409 else "GONE")
        assert refusal.json()["details"] == {"batch_id": "of-another-process"}
        assert started(world) == 2


@pytest.mark.parametrize("keeping", [False, True], ids=["without store", "with store"])
async def test_a_batch_of_which_a_run_is_gone_is_not_started_again(keeping: bool, autojump_clock: MockClock) -> None:
    async with open_keeping_world() if keeping else open_world() as world:
        two(world)
        batch_id = (await post(world)).headers["X-Batch-Id"]
        state = (await world.client.get(f"{BATCH}/{batch_id}")).json()["data"]
        assert (await world.client.delete(f"{API}/runs/{state['runs'][1]['run_id']}")).status_code == 204
        for headers in ({}, {"Last-Event-ID": f"{batch_id}.1"}):
            for key in ("once", None) if headers else ("once",):
                gone = await post(world, key, headers=headers)
                assert_refused(gone, 410, "GONE")
                assert gone.json()["details"]["batch_id"] == batch_id
        assert started(world) == 2


async def test_a_batch_that_was_refused_leaves_the_key_free(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        assert_refused(await post(world), 404, "NOT_FOUND")
        assert_refused(await post(world, json={"requests": []}), 422, "VALIDATION_ERROR")
        two(world)
        assert_refused(await post(world, params={"after": "1"}), 400, "INVALID_CURSOR")
        assert_refused(await post(world, params={"after": "x"}), 400, "INVALID_CURSOR")
        assert started(world) == 0
        assert (await post(world, params={"after": "0"})).status_code == 200
        assert started(world) == 2


async def test_a_key_is_the_callers_own_and_not_the_chats(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        two(world)
        callers = [
            Caller(world, await world.add_key(tenant, user)) for tenant, user in (("a", "x"), ("a", "y"), ("b", "x"))
        ]
        headers = {"Idempotency-Key": "once"}
        ids = set()
        for caller in callers * 2:
            ids.add(
                (await caller.ask("POST", "/batch/stream", headers=headers, json=ask("left"))).headers["X-Batch-Id"]
            )
            await caller.data("POST", "/agents/left/chat/lumosai", headers=headers, json={"message": "hi"})
        assert len(ids) == 3
        assert started(world) == 6


@pytest.mark.parametrize("key", ["", "a b", "x" * 256], ids=repr)
async def test_a_key_that_cannot_be_is_400(key: str, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        assert_refused(await post(world, key), 400, "INVALID_IDEMPOTENCY_KEY")
        assert started(world) == 0


async def test_an_id_that_is_none_or_not_the_callers_starts_nothing(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        two(world)
        batch_id = (await post(world)).headers["X-Batch-Id"]
        for event_id in ("x", ".", "1", ".1", f"{batch_id}.", f"{batch_id}.x", f"{batch_id}.-1", f"{batch_id}.99"):
            refusal = await post(world, None, headers={"Last-Event-ID": event_id})
            assert_refused(refusal, 400, "INVALID_CURSOR")
        two_ids = [("Last-Event-ID", f"{batch_id}.1"), ("Last-Event-ID", f"{'x' * 22}.1")]
        refusal = await world.client.post(f"{BATCH}/stream", json=ask("left"), headers=two_ids)
        assert_refused(refusal, 400, "INVALID_CURSOR")
        unknown = await post(world, None, headers={"Last-Event-ID": f"{'x' * 22}.1"})
        assert_refused(unknown, 404, "NOT_FOUND")
        other = (await post(world, "second")).headers["X-Batch-Id"]
        assert_refused(await post(world, headers={"Last-Event-ID": f"{other}.1"}), 400, "INVALID_CURSOR")
        assert_refused(await post(world, None, params={"before": "1"}), 422, "VALIDATION_ERROR")
        until = await world.client.get(f"{BATCH}/{batch_id}/events", params={"after": "1", "until": "2"})
        assert_refused(until, 422, "VALIDATION_ERROR")
        stranger = Caller(world, await world.add_key("acme", "bob"))
        last = {"Last-Event-ID": f"{batch_id}.1"}
        await stranger.refused(404, "POST", "/batch/stream", json=ask("left"), headers=last)
        assert started(world) == 4


async def test_a_state_asks_the_store_for_runs_that_memory_has_dropped(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        two(world)
        batch_id = (await post(world)).headers["X-Batch-Id"]
        await trio.sleep(700)
        assert (await read_again(world, batch_id)).status_code == 410
        state = (await world.client.get(f"{BATCH}/{batch_id}")).json()["data"]
        assert [run["status"] for run in state["runs"]] == ["done", "done"]


async def test_the_sweep_frees_old_keys_that_stand_for_no_run(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        two(world)
        assert world.database is not None
        assert world.run_journal is not None
        chat = await world.client.post(f"{API}/agents/left/chat/lumosai", json={"message": "hi"})
        ages = {"old batch": ("batch1", 2), "young batch": ("batch2", 0), "old run": (chat.json()["data"]["run_id"], 2)}
        for key, (stands_for, days) in ages.items():
            created_at = time_text(world.wall_clock() - timedelta(days=days))
            assert await world.database.write(claim_key, PLACE, key, KeyClaim(stands_for, b"", created_at))
        world.nursery.start_soon(world.run_journal.sweep, 1.0)
        await trio.sleep(1)
        assert [key for key in ages if await world.database.read(find_claim, PLACE, key)] == ["young batch", "old run"]
