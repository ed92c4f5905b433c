"""A start on a socket with an idempotency key: the same run, whoever asks again and however, and never a second one."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from engine import RetentionLimits
from engine.provider import ModelRequest
from server.principal import KeyLimits
from server.store.idempotency import KeyClaim, claim_key, find_claim
from server.store.rows import Scope
from tests.engine.scripted import FOREVER, SENT, ScriptedProvider, text
from tests.harness.websocket_client import WebSocketClient, open_socket
from tests.harness.world import World, open_keeping_world, open_world
from tests.server.api_scene import API
from tests.server.socket_scene import assert_whole, ended, events, find, hear_ends

START = {"agent_id": "a", "message": "hi", "on_disconnect": "continue", "idempotency_key": "once"}
BODY = {"message": "hi", "on_disconnect": "continue"}
LAST = 10.0
STREAM = f"{API}/agents/a/chat/lumosai/stream"


class CountedProvider(ScriptedProvider):
    """Counts how often it was asked."""

    asked = 0

    async def stream(self, request: ModelRequest, emit: Any) -> None:
        self.asked += 1
        await super().stream(request, emit)


def add_agent(world: World, agent_id: str = "a") -> CountedProvider:
    provider = CountedProvider((0, (SENT,)), *((1 + number, text(f"word{number} ")) for number in range(10)))
    world.add_agent(agent_id, provider)
    return provider


async def start(socket: WebSocketClient, name: str = "r", **fields: Any) -> Any:
    """Start with the key; the answer, whatever it is."""
    await socket.say("start", request_id=name, **START | fields)
    while True:
        answer = await socket.hear()
        if answer.get("request_id") == name:
            return answer


@pytest.mark.parametrize("keeping", [False, True], ids=["without store", "with store"])
async def test_the_same_start_again_joins_from_another_socket_and_over_http(
    keeping: bool, autojump_clock: MockClock
) -> None:
    async with open_keeping_world() if keeping else open_world() as world:
        provider = add_agent(world)
        async with open_socket(world) as first, open_socket(world) as second:
            run_id = (await start(first))["run_id"]
            await trio.sleep_until(3.5)
            started = await start(second, "again")
            assert started == {"type": "started", "request_id": "again", "run_id": run_id, "session_id": "default"}
            await hear_ends(first, run_id)
            await hear_ends(second, run_id)
            run = find(world, run_id)
            assert_whole(first, run)
            assert_whole(second, run)
        over_http = await world.client.post(STREAM, json=BODY, headers={"Idempotency-Key": "once"})
        assert over_http.content == b"".join(entry.frame for entry in run.log.entries())
        assert provider.asked == 1


async def test_a_run_of_http_is_joined_by_its_key(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        provider = add_agent(world)
        answer = await world.client.post(STREAM, json=BODY, headers={"Idempotency-Key": "once"})
        started = await start(socket)
        assert started["run_id"] == answer.headers["X-Run-Id"]
        await hear_ends(socket, started["run_id"])
        assert_whole(socket, find(world, started["run_id"]))
        assert provider.asked == 1


@pytest.mark.parametrize("keeping", [False, True], ids=["without store", "with store"])
async def test_starts_with_one_key_at_once_are_one_run(keeping: bool, autojump_clock: MockClock) -> None:
    """On one socket its events come once; every start is answered."""
    async with open_keeping_world() if keeping else open_world() as world, open_socket(world) as socket:
        provider = add_agent(world)
        for number in range(5):
            await socket.say("start", request_id=str(number), **START)
        while not ended(socket):
            await socket.hear()
        started = [one for _, one in socket.heard if one["type"] == "started"]
        assert {one["request_id"] for one in started} == set("01234")
        (run_id,) = {one["run_id"] for one in started}
        assert_whole(socket, find(world, run_id))
        assert provider.asked == 1


async def test_a_start_again_on_the_same_socket_says_where_its_events_are(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        provider = add_agent(world)
        run_id = (await start(socket))["run_id"]
        await socket.hear_until("event", seq=4)
        again = await start(socket, "again", after=2)
        assert (again["type"], again["run_id"], again["after"]) == ("started", run_id, 4)
        await hear_ends(socket, run_id)
        assert_whole(socket, find(world, run_id))
        last = find(world, run_id).log.last_seq
        heard = len(socket.heard)
        assert (await start(socket, "after its end", after=last - 2))["after"] == last - 2
        await hear_ends(socket, run_id)
        assert [one["seq"] for _, one in socket.heard[heard:] if one["type"] == "event"] == [last - 1, last]
        assert provider.asked == 1


async def test_a_start_again_that_comes_after_its_runs_end_reads_the_run_anew(autojump_clock: MockClock) -> None:
    """It waits for its turn behind the run's last piece, and both behind another run that a slow client holds."""
    async with open_world(window=100) as world, open_socket(world) as socket:
        world.add_agent("slow", ScriptedProvider((0, (SENT,)), (1, text("x" * 5000))))
        world.add_agent("a", ScriptedProvider((0, (SENT,)), (2, text("y"))))
        run_id = (await start(socket))["run_id"]
        await start(socket, "slow", agent_id="slow")
        await trio.sleep_until(5)
        await socket.say("start", request_id="again", **START)
        await trio.sleep(1)
        await hear_ends(socket, run_id)
        await socket.hear_until("started", request_id="again")
        await hear_ends(socket, run_id)
        numbers = [entry.seq for entry in find(world, run_id).log.entries()]
        assert [seq for seq, _ in events(socket, run_id)] == numbers * 2


@pytest.mark.parametrize("late", [False, True], ids=["live", "after the end"])
@pytest.mark.parametrize("after", [1, 5])
async def test_a_start_again_goes_on_after_the_last_event(after: int, late: bool, autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        provider = add_agent(world)
        async with open_socket(world) as first:
            run_id = (await start(first))["run_id"]
            await first.hear_until("event", seq=5)
        if late:
            await trio.sleep_until(LAST + 1)
        async with open_socket(world) as second:
            started = await start(second, after=after)
            assert (started["run_id"], started["after"]) == (run_id, after)
            await hear_ends(second, run_id)
            assert_whole(second, find(world, run_id), after)
            last = find(world, run_id).log.last_seq
            refusal = await start(second, after=last + 1)
            assert (refusal["type"], refusal["code"]) == ("error", "INVALID_CURSOR")
        assert provider.asked == 1


async def test_another_message_with_the_key_is_refused(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world, open_socket(world) as socket:
        provider = add_agent(world)
        run_id = (await start(socket))["run_id"]
        for fields in ({"message": "other"}, {"session_id": "other"}, {"stream": {"text_buffer_size": 7}}):
            refusal = await start(socket, "again", **fields)
            assert (refusal["type"], refusal["code"]) == ("error", "IDEMPOTENCY_KEY_REUSED")
            assert refusal["details"] == {"run_id": run_id}
        assert provider.asked == 1


async def test_a_key_is_for_one_agent(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        one, other = add_agent(world), add_agent(world, "b")
        runs = [(await start(socket, name, agent_id=name))["run_id"] for name in ("a", "b")]
        await hear_ends(socket, *runs)
        assert (one.asked, other.asked) == (1, 1)


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "é", "\x7f", "a\n"], ids=repr)
async def test_a_key_that_cannot_be_is_refused(key: str, autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        provider = add_agent(world)
        refusal = await start(socket, idempotency_key=key)
        assert (refusal["type"], refusal["code"]) == ("error", "INVALID_IDEMPOTENCY_KEY")
        assert provider.asked == 0


async def test_a_start_that_was_refused_leaves_the_key_free(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world, open_socket(world) as socket:
        assert (await start(socket, message=" "))["code"] == "NOT_FOUND"
        provider = add_agent(world)
        assert (await start(socket, message=" "))["code"] == "VALIDATION_ERROR"
        assert (await start(socket, after=1))["code"] == "INVALID_CURSOR"
        assert (await start(socket, after=1, idempotency_key=None))["code"] == "INVALID_CURSOR"
        world.supervisor.draining = True
        refusal = await start(socket)
        assert (refusal["code"], refusal["retry_after"]) == ("draining", 5)
        world.supervisor.draining = False
        assert (await start(socket))["type"] == "started"
        assert provider.asked == 1


async def test_a_draining_server_lets_a_repeated_start_join(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket, open_socket(world) as other:
        add_agent(world)
        run_id = (await start(socket))["run_id"]
        await trio.sleep_until(2)
        world.nursery.start_soon(world.supervisor.drain, 20)
        assert (await start(other))["run_id"] == run_id
        assert (await start(other, idempotency_key="new"))["code"] == "draining"
        await hear_ends(other, run_id)
        assert_whole(other, find(world, run_id))


async def test_a_run_that_another_process_is_just_starting_is_a_conflict(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world, open_socket(world) as socket:
        provider = add_agent(world)
        await start(socket)
        assert world.database is not None
        scope = Scope("local", "local", "a")
        claim = await world.database.read(find_claim, scope, "once")
        assert claim is not None
        starting = KeyClaim("of-another-process", claim.fingerprint, claim.created_at)
        assert await world.database.write(claim_key, scope, "elsewhere", starting)
        refusal = await start(socket, "again", idempotency_key="elsewhere")
        assert (refusal["code"], refusal["retry_after"]) == ("CONFLICT", 1)
        assert provider.asked == 1


async def test_a_key_is_the_callers_own(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        provider = add_agent(world)
        runs = set()
        for user in ("ada", "bob"):
            async with open_socket(world, headers=await world.add_key("acme", user)) as socket:
                runs.add((await start(socket))["run_id"])
        assert len(runs) == 2
        assert provider.asked == 2


async def test_joining_takes_no_place_of_a_run(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        add_agent(world)
        key = await world.add_key("acme", "ada", limits=KeyLimits(concurrent_runs=1))
        async with open_socket(world, headers=key) as one, open_socket(world, headers=key) as other:
            run_id = (await start(one))["run_id"]
            assert (await start(other))["run_id"] == run_id
            refusal = await start(other, "new", idempotency_key="new")
            assert (refusal["code"], refusal["retry_after"] > 0) == ("RATE_LIMITED", True)


async def test_a_first_start_that_leaves_while_it_waits_lets_the_next_one_start(autojump_clock: MockClock) -> None:
    async with open_keeping_world(retention=RetentionLimits()) as world:
        world.add_agent("a", ScriptedProvider((0, (SENT,)), (FOREVER, ())))
        assert world.database is not None
        write = world.database.write

        async def slow_write(change: Any, *args: Any) -> Any:
            if change.__name__ == "begin_run":
                await trio.sleep(3)
            return await write(change, *args)

        world.database.write = slow_write  # type: ignore[assignment, method-assign]
        async with open_socket(world) as first:
            await first.say("start", request_id="r", **START)
            await trio.sleep(1)
        async with open_socket(world) as second:
            started = await start(second)
            assert [run_id for what, run_id, _ in world.journal.entries if what == "started"] == [started["run_id"]]
            assert events(second, started["run_id"]) == []
