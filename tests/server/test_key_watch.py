"""A stream ends with the key that it is read with: soon, not cleanly, and no other stream with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest
import trio
from trio.testing import MockClock

from engine import Deadlines
from server.auth import KEY_SECONDS
from server.store import keys as key_rows
from server.store.database import Database
from server.store.errors import StoreUnavailableError
from tests.engine.scripted import FOREVER, SENT, ScriptedProvider, text
from tests.harness.world import World, open_keeping_world
from tests.server.api_scene import Caller
from tests.server.raw_http import RawClient, raw_client, request_bytes

BODY = {"message": "hi", "on_disconnect": "continue"}
CHAT = "/agents/talker/chat/lumosai"
WINDOW = 65_536
LATER = "2026-11-23T12:00:00.000000+00:00"
TALKS = ScriptedProvider((0, (SENT,)), *((1 + second, text("word ")) for second in range(40)))


class CountingDatabase(Database):
    """Counts how often it is asked for a key, and can be away."""

    asked = 0
    away = False

    async def read(self, query: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        """As ``Database``, unless it is away."""
        self.asked += query is key_rows.find_key
        if self.away:
            raise StoreUnavailableError("away")
        return await super().read(query, *args)


async def revoke(world: World, headers: dict[str, str]) -> None:
    """The key counts no longer from now on."""
    assert world.database is not None
    await world.database.write(key_rows.revoke_key, headers["Authorization"].split("_")[1], LATER)


async def broken_at(caller: Caller, method: str, path: str, **options: Any) -> tuple[float, bytes]:
    """When the response broke off, and what had come until then."""
    came = b""
    async with caller.open(method, path, **options) as response:
        assert response.status_code == 200
        with pytest.raises(httpx.ReadError, match="incomplete chunked read"):  # noqa: PT012
            async for piece in response.aiter_raw():
                came += piece
    return trio.current_time(), came


async def read_all(caller: Caller) -> bytes:
    """A whole stream."""
    async with caller.open("POST", f"{CHAT}/stream", json=BODY) as response:
        return b"".join([piece async for piece in response.aiter_raw()])


@pytest.mark.parametrize("revoked_at", [0.5, 7.5, 12.25])
async def test_a_stream_breaks_off_after_its_key_is_revoked(revoked_at: float, autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        world.add_agent("talker", TALKS)
        key = await world.add_key("acme", "ada")
        other = Caller(world, await world.add_key("acme", "bob"))
        whole: list[bytes] = []

        async def read_other() -> None:
            whole.append(await read_all(other))

        async def revoke_later() -> None:
            await trio.sleep(revoked_at)
            await revoke(world, key)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_other)
            nursery.start_soon(revoke_later)
            ended_at, came = await broken_at(Caller(world, key), "POST", f"{CHAT}/stream", json=BODY)
        assert revoked_at < ended_at <= revoked_at + KEY_SECONDS + 1
        assert came.count(b'"chunk_type":"content"') <= revoked_at + KEY_SECONDS
        assert b'"stop"' not in came
        assert b'"chunk_type":"done"' in whole[0]


async def test_a_run_that_is_read_again_is_watched_too(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        world.add_agent("talker", TALKS)
        key = await world.add_key("acme", "ada")
        ada = Caller(world, key)
        async with ada.open("POST", f"{CHAT}/stream", json=BODY) as response:
            run_id = response.headers["X-Run-Id"]
        await revoke(world, key)
        ended_at, _ = await broken_at(ada, "GET", f"/runs/{run_id}/events")
        assert ended_at <= KEY_SECONDS + 1
        await ada.refused(401, "GET", f"/runs/{run_id}")
        run = world.supervisor.find(run_id)
        assert run is not None
        assert not run.log.ended, "its run goes on"


async def slowly(client: RawClient) -> tuple[float, int]:
    """Take what fits into the window every half second, to the end: how long that took, and how much came."""
    started, came = trio.current_time(), 0
    with suppress(trio.BrokenResourceError):  # a reset
        while data := await client.stream.receive_some(WINDOW):
            came += len(data)
            await trio.sleep(0.5)
    return trio.current_time() - started, came


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
async def test_a_range_that_is_read_slowly_breaks_off_and_what_a_link_shows_does_not(
    accept: str, autojump_clock: MockClock
) -> None:
    async with open_keeping_world() as world:
        world.add_agent("talker", ScriptedProvider((0, (SENT,)), *((1, text("x" * 20_000)) for _ in range(100))))
        key = await world.add_key("acme", "ada")
        ada = Caller(world, key)
        run_id = (await ada.data("POST", CHAT, json=BODY))["run_id"]
        last = (await ada.data("GET", f"/runs/{run_id}"))["last_seq"]
        link = (await ada.data("POST", f"/runs/{run_id}/share", json={}))["url"]
        headers = [f"Accept: {accept}", "Connection: close"]
        paths = {link: headers, f"/api/v1/runs/{run_id}/events?until={last}": [*headers, f"X-API-Key: {bare(key)}"]}
        found: dict[str, tuple[float, int]] = {}

        async def read(path: str) -> None:
            async with raw_client(world) as client:
                await client.stream.send_all(request_bytes("GET", path, headers=paths[path]))
                found[path] = await slowly(client)

        async with trio.open_nursery() as nursery:
            for path in paths:
                nursery.start_soon(read, path)
            await trio.sleep(2)
            await revoke(world, key)
        (_, of_link), (seconds, of_range) = found[link], found[next(path for path in paths if path != link)]
        assert of_link > 2_000_000
        assert seconds <= 2 + KEY_SECONDS + 1
        assert 0 < of_range < of_link


def bare(headers: dict[str, str]) -> str:
    return headers["Authorization"].removeprefix("Bearer ")


@pytest.mark.parametrize("way", ["stream", "simulated"])
async def test_a_silent_stream_breaks_off_at_its_heartbeat(way: str, autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        world.add_agent("talker", ScriptedProvider((0, (SENT,)), (FOREVER, ())), deadlines=Deadlines(first_token=100))
        key = await world.add_key("acme", "ada")

        async def revoke_later() -> None:
            await trio.sleep(16)
            await revoke(world, key)

        world.nursery.start_soon(revoke_later)
        ended_at, came = await broken_at(Caller(world, key), "POST", f"{CHAT}/{way}", json=BODY)
        assert ended_at == 30
        assert came.count(b": heartbeat") == 1


async def test_the_first_key_ends_the_streams_that_are_read_without_one(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        world.add_agent("talker", TALKS)

        async def add_key_later() -> None:
            await trio.sleep(3)
            await world.add_key("acme", "ada")

        world.nursery.start_soon(add_key_later)
        ended_at, _ = await broken_at(Caller(world), "POST", f"{CHAT}/stream", json=BODY)
        assert 3 < ended_at <= 3 + KEY_SECONDS + 1


async def test_the_store_is_asked_once_for_all_streams_of_a_key_and_may_be_away(autojump_clock: MockClock) -> None:
    database = CountingDatabase.open("sqlite://", inline=True)
    assert isinstance(database, CountingDatabase)
    async with open_keeping_world(database=database) as world:
        world.add_agent("talker", TALKS)
        ada = Caller(world, await world.add_key("acme", "ada"))
        ends: list[bytes] = []

        async def read() -> None:
            ends.append((await read_all(ada))[-500:])

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(read)
            await trio.sleep(20.5)
            assert database.asked <= 20 / KEY_SECONDS + 1
            database.away = True
        assert trio.current_time() == pytest.approx(40, abs=1)
        assert all(b'"chunk_type":"done"' in end for end in ends)
    database.close()
