"""Whether the server is ready: its store is asked, seldom and not for long; and an outage has an end in the log."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from server.availability import PROBE_KEPT_SECONDS, PROBE_SECONDS, StoreProbe, or_unavailable
from server.errors import ApiError
from server.store.database import Database
from server.store.errors import StoreUnavailableError
from tests.harness.world import open_keeping_world
from tests.server.api_scene import BASE
from tests.server.doors import CountingStore


class FailingDatabase(Database):
    """Answers until it is ``down``."""

    down = False

    async def read(self, query: Any, *args: Any) -> Any:  # type: ignore[override]
        """What there is, if it is up."""
        if self.down:
            raise StoreUnavailableError("it is down")
        return await super().read(query, *args)


async def test_a_server_whose_store_is_down_lives_and_is_not_ready(autojump_clock: MockClock) -> None:
    database = FailingDatabase.open("sqlite://", inline=True)
    assert isinstance(database, FailingDatabase)
    async with open_keeping_world(database=database) as world:
        assert (await world.client.get(f"{BASE}/health/ready")).status_code == 200
        database.down = True
        await trio.sleep(PROBE_KEPT_SECONDS)
        refused = await world.client.get(f"{BASE}/health/ready")
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        assert (refused.json()["code"], refused.json()["details"]) == ("SERVICE_UNAVAILABLE", {"not_ready": ["store"]})
        assert (await world.client.get(f"{BASE}/health/live")).status_code == 200
        database.down = False
        await trio.sleep(PROBE_KEPT_SECONDS)
        assert (await world.client.get(f"{BASE}/health/ready")).status_code == 200
    database.close()


async def test_many_probes_are_one_query_and_the_answer_counts_for_a_while(autojump_clock: MockClock) -> None:
    store, probe, answers = CountingStore(), StoreProbe(), []

    async def ask() -> None:
        answers.append(await probe.answers(store))

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(ask)
    assert (answers, len(store.reads)) == ([True] * 50, 1)
    await trio.sleep(PROBE_KEPT_SECONDS - 0.1)
    await ask()
    assert len(store.reads) == 1
    await trio.sleep(0.1)
    await ask()
    assert len(store.reads) == 2
    store.database.close()


async def test_a_store_that_hangs_is_not_waited_for(autojump_clock: MockClock) -> None:
    store = CountingStore()
    store.seconds = inf
    assert not await StoreProbe().answers(store)
    assert trio.current_time() == PROBE_SECONDS
    store.database.close()


async def test_the_end_of_an_outage_is_told_once(autojump_clock: MockClock) -> None:
    store, probe = CountingStore(), StoreProbe()

    async def fail() -> None:
        raise StoreUnavailableError("it is down")

    async def work() -> int:
        return 1

    assert await or_unavailable(work) == 1  # what another test left is over
    with structlog.testing.capture_logs() as lines:
        with pytest.raises(ApiError):
            await or_unavailable(fail)
        await trio.sleep(7)
        assert await or_unavailable(work) == 1
        assert await or_unavailable(work) == 1
        store.down = True
        assert not await probe.answers(store)
        store.down = False
        await trio.sleep(PROBE_KEPT_SECONDS)
        assert await probe.answers(store)
    assert [line["event"] for line in lines] == ["store.unavailable", "store.available"] * 2
    assert [line["after_seconds"] for line in lines[1::2]] == [7, 2]
    store.database.close()
