"""The WebSocket: many runs on one connection; a slow one loses nothing, holds nobody; a closed one leaves nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from engine import LogEntry
from server.journal_log import EventsDroppedError
from server.keys import parse_key
from server.principal import KeyLimits
from server.socket_reading import TURN_BYTES
from server.socket_session import MAX_SUBSCRIPTIONS
from server.store import keys as key_rows
from server.store.errors import StoreUnavailableError
from tests.engine.scripted import FOREVER, text
from tests.harness.websocket_client import RefusedError, SocketClosedError, WebSocketClient, open_socket
from tests.harness.world import World, open_keeping_world, open_world
from tests.server.api_scene import API
from tests.server.socket_scene import (
    assert_whole,
    ended,
    events,
    find,
    hear_ends,
    refusal,
    speaking,
    start,
    two,
)

# Several runs


async def test_runs_are_interleaved_as_they_speak(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        two(world)
        assert socket.subprotocol == "lumos.v1"
        left, right = await start(socket, "left"), await start(socket, "right")
        await hear_ends(socket, left, right)
        names = {left: "left", right: "right"}
        said = [(at, one) for at, one in socket.heard if "content" in one.get("event", {})]
        assert [(at, names[one["run_id"]], one["event"]["content"]) for at, one in said] == [
            (1, "left", "l1 "),
            (2, "right", "r1 "),
            (3, "left", "l2 "),
            (4, "right", "r2"),
            (5, "left", "l3"),
        ]
        assert_whole(socket, find(world, left))
        assert_whole(socket, find(world, right))
        await socket.close()
        assert len(world.network.connections) == 1


async def test_a_start_is_answered_with_its_name_and_its_session(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        two(world)
        await socket.say("start", request_id="r", agent_id="left", message="hi", session_id="s")
        started = await socket.hear()
        assert started == {
            "type": "started",
            "request_id": "r",
            "run_id": started["run_id"],
            "session_id": "s",
        }


async def test_one_is_stopped_and_the_other_goes_on(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        two(world)
        left, right = await start(socket, "left"), await start(socket, "right")
        await socket.hear_until("event", run_id=left, seq=2)
        await socket.say("stop", run_id=left)
        assert await socket.hear_until("stopped") == {"type": "stopped", "run_id": left, "status": "stop"}
        await hear_ends(socket, *({left, right} - ended(socket)))
        assert events(socket, left)[-1][1] == {
            "chunk_type": "stop",
            "reason": "requested",
            "response": "l1 ",
            "usage": {"input_tokens": 8, "output_tokens": 1, "estimated": True},
        }
        assert events(socket, right)[-1][1]["chunk_type"] == "done"
        assert await socket.ask("stop", run_id=left) == {"type": "stopped", "run_id": left, "status": "stop"}


@pytest.mark.parametrize("seed", range(10))
async def test_whatever_the_times_every_run_is_whole(seed: int, autojump_clock: MockClock) -> None:
    dice = random.Random(seed)
    async with open_world(window=dice.choice([200, 65_536])) as world, open_socket(world) as socket:
        for number in range(20):
            times = sorted(dice.uniform(0, 5) for _ in range(dice.randrange(1, 30)))
            world.add_agent(f"a{number}", speaking(*((at, text(f"{number} ")) for at in times)))
            await socket.say("start", request_id=str(number), agent_id=f"a{number}", message="hi")
        while len(ended(socket)) < 20:
            await socket.hear()
        for run_id in ended(socket):
            assert_whole(socket, find(world, run_id))


# Slow


async def test_a_slow_socket_loses_nothing_and_holds_nobody(autojump_clock: MockClock) -> None:
    async with open_world(window=1000) as world:
        lines = [(1 + number / 100, text(f"{number} " + "x" * 100)) for number in range(200)]
        for name in ("a", "b"):
            world.add_agent(name, speaking(*lines))
        async with open_socket(world) as slow, open_socket(world) as quick:
            mine = [await start(slow, "a"), await start(slow, "b")]
            theirs = await start(quick, "a")
            await hear_ends(quick, theirs)
            assert trio.current_time() == 2.99
            await trio.sleep_until(15)
            ends = {run_id: at for what, run_id, at in world.journal.entries if what == "ended"}
            assert ends == dict.fromkeys([*mine, theirs], 2.99)
            await hear_ends(slow, *mine)
            for run_id in mine:
                assert_whole(slow, find(world, run_id))


async def test_nothing_is_kept_for_a_slow_socket(autojump_clock: MockClock) -> None:
    """While it does not read, text gathers in the run and becomes few events, as for any busy reader."""
    async with open_world(window=1000) as world:
        world.add_agent("a", speaking(*((1 + number / 1000, text("word ")) for number in range(2000))))
        async with open_socket(world) as slow:
            run_id = await start(slow, "a")
            await trio.sleep_until(10)
            await hear_ends(slow, run_id)
            assert len(events(slow, run_id)) < 50
            assert_whole(slow, find(world, run_id))


async def test_a_socket_that_never_reads_is_cut_at_the_stall_limit(autojump_clock: MockClock) -> None:
    async with open_world(window=1000) as world:
        model = speaking((1, text("x" * 5000)), (60, text("y")))
        world.add_agent("a", model)
        async with open_socket(world) as stuck:
            await start(stuck, "a", deadlines={"total": 100})
            await trio.sleep_until(50)
            assert stuck.stream.connection.server.closed_at == 1 + 20
        assert model.seen[-1] == (1 + 20 + 5, "cancelled")


async def test_large_runs_take_turns(autojump_clock: MockClock) -> None:
    """Of two backlogs neither waits for the other to be whole."""
    async with open_world() as world:
        for name in ("a", "b"):
            world.add_agent(name, speaking(*((1 + number / 100, text("x" * 5000)) for number in range(100))))
        async with open_socket(world) as first:
            runs = [await start(first, name, on_disconnect="continue") for name in ("a", "b")]
            await hear_ends(first, *runs)
        async with open_socket(world) as socket:
            for run_id in runs:
                await socket.say("subscribe", run_id=run_id)
            await hear_ends(socket, *runs)
            for run_id in runs:
                assert_whole(socket, find(world, run_id))
            ahead, furthest = dict.fromkeys(runs, 0), 0
            for _, one in socket.heard:
                if one["type"] == "event" and one["event"]["chunk_type"] == "content":
                    ahead[one["run_id"]] += len(one["event"]["content"])
                    furthest = max(furthest, abs(ahead[runs[0]] - ahead[runs[1]]))
            assert 0 < furthest <= 2 * (TURN_BYTES + 5000), "a turn, and one before the other was there"


# Resumed


async def test_a_run_goes_on_over_another_socket(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        async with open_socket(world) as first:
            run_id = await start(first, "left")
            await first.hear_until("event", seq=3)
        await trio.sleep_until(4.5)
        async with open_socket(world) as second:
            assert await second.ask("subscribe", run_id=run_id, after=3) == {
                "type": "subscribed",
                "run_id": run_id,
                "after": 3,
            }
            await hear_ends(second, run_id)
            assert_whole(second, find(world, run_id), after=3)
            assert events(first, run_id)[-1][0] == 3


@pytest.mark.parametrize("after", range(7))
async def test_an_ended_run_is_read_from_any_number_on(after: int, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        two(world)
        async with open_socket(world) as socket:
            run_id = await start(socket, "left")
            await hear_ends(socket, run_id)
        async with open_socket(world) as socket:
            await socket.say("subscribe", run_id=run_id, after=after)
            await hear_ends(socket, run_id)
            assert_whole(socket, find(world, run_id), after)
            assert (await socket.ask("subscribe", run_id=run_id, after=6))["type"] == "subscribed"
            assert (await socket.hear())["type"] == "end"


async def test_a_run_of_http_is_read_and_one_of_the_socket_by_http(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        two(world)
        world.agents["demo"] = world.agents["left"]
        answer = await world.chat()
        await socket.say("subscribe", run_id=answer.run_id)
        await hear_ends(socket, answer.run_id)
        assert_whole(socket, find(world, answer.run_id))
        mine = await start(socket, "right")
        response = await world.client.get(f"{API}/runs/{mine}/events")
        assert response.content == b"".join(entry.frame for entry in find(world, mine).log.entries())


async def test_two_sockets_read_one_run(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as one, open_socket(world) as other:
        two(world)
        run_id = await start(one, "left")
        await other.say("subscribe", run_id=run_id)
        await hear_ends(one, run_id)
        await hear_ends(other, run_id)
        assert events(one, run_id) == events(other, run_id)


async def test_after_unsubscribing_nothing_comes_and_the_run_has_one_reader_less(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        two(world)
        run_id = await start(socket, "left")
        await socket.hear_until("event", seq=2)
        assert await socket.ask("unsubscribe", run_id=run_id) == {"type": "unsubscribed", "run_id": run_id}
        assert find(world, run_id).log.readers == 0
        await trio.sleep_until(4)
        assert await socket.ask("ping") == {"type": "pong"}, "nothing in between"
        await socket.say("subscribe", run_id=run_id, after=2)
        await hear_ends(socket, run_id)
        assert [seq for seq, _ in events(socket, run_id)] == list(range(1, find(world, run_id).log.last_seq + 1))
        assert await socket.ask("unsubscribe", run_id=run_id) == {"type": "unsubscribed", "run_id": run_id}


@pytest.mark.parametrize("seed", range(5))
async def test_however_often_it_is_subscribed_and_not_nothing_is_lost_or_doubled(
    seed: int, autojump_clock: MockClock
) -> None:
    dice = random.Random(seed)
    async with open_world(window=dice.choice([300, 65_536])) as world, open_socket(world) as socket:
        world.add_agent("a", speaking(*((1 + number / 10, text(f"{number} ")) for number in range(100))))
        run_id = await start(socket, "a", on_disconnect="continue")
        heard: list[int] = []
        while not ended(socket):
            with trio.move_on_after(dice.uniform(0, 1)):
                await hear_ends(socket, run_id)
            if not ended(socket):
                await socket.say("unsubscribe", run_id=run_id)
                await socket.hear_until("unsubscribed")
            heard = [seq for seq, _ in events(socket, run_id)]
            assert heard == list(range(1, len(heard) + 1))
            if not ended(socket):
                await trio.sleep(dice.uniform(0, 0.5))
                await socket.say("subscribe", run_id=run_id, after=len(heard))
                await socket.hear_until("subscribed")
        assert_whole(socket, find(world, run_id))


TROUBLE: dict[str, tuple[Exception, str]] = {
    "dropped": (EventsDroppedError("x"), "GONE"),
    "away": (trio.BrokenResourceError("x"), "SERVICE_UNAVAILABLE"),
    "no store": (StoreUnavailableError("x"), "SERVICE_UNAVAILABLE"),
    "slow": (trio.TooSlowError("x"), "SERVICE_UNAVAILABLE"),
}


@pytest.mark.parametrize("trouble", TROUBLE)
async def test_a_run_that_cannot_be_read_ends_its_subscription_alone(
    trouble: str, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, code = TROUBLE[trouble]
    async with open_world() as world, open_socket(world) as socket:
        two(world)
        left, right = await start(socket, "left"), await start(socket, "right")
        await socket.hear_until("event", run_id=left, seq=2)
        log = find(world, left).log

        async def fail(*_: Any) -> list[LogEntry]:
            raise error

        monkeypatch.setattr(log, "read", fail)
        refused = await socket.hear_until("error")
        assert (refused["code"], refused["run_id"]) == (code, left)
        assert "request_id" not in refused, "it answers nothing"
        assert refused.get("retry_after") == (5 if code == "SERVICE_UNAVAILABLE" else None)
        monkeypatch.undo()
        await socket.say("subscribe", run_id=left, after=len(events(socket, left)))
        await hear_ends(socket, left, right)
        assert_whole(socket, find(world, left))
        assert_whole(socket, find(world, right))


# Left


@pytest.mark.parametrize(("on_disconnect", "grace"), [("cancel", 0.0), ("grace", 5.0)])
async def test_who_closes_a_socket_leaves_each_run(on_disconnect: str, grace: float, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        models = [speaking((1, text("x")), (FOREVER, ())) for _ in range(3)]
        for number, model in enumerate(models):
            world.add_agent(f"a{number}", model)
        async with open_socket(world) as socket:
            for number in range(3):
                await start(socket, f"a{number}", on_disconnect=on_disconnect)
            await trio.sleep_until(10)
        await trio.sleep_until(20)
        assert [model.seen[-1] for model in models] == [(10 + grace, "cancelled")] * 3


async def test_a_thousand_random_disconnects_leave_nothing(autojump_clock: MockClock) -> None:
    dice = random.Random(5)
    async with open_world(window=2000) as world:
        world.add_agent("a", speaking(*((number / 10, text("word " * 50)) for number in range(1, 40))))
        await trio.testing.wait_all_tasks_blocked()
        before = trio.lowlevel.current_statistics().tasks_living

        async def come_and_go() -> None:
            with trio.move_on_after(dice.choice([0.0, 1e-9, dice.uniform(0, 5)])):
                async with open_socket(world) as socket:
                    for number in range(dice.randrange(1, 4)):
                        await socket.say("start", request_id=str(number), agent_id="a", message="hi", **ending)
                    while dice.random() < 0.98:
                        message = await socket.hear()
                        if message["type"] == "started" and dice.random() < 0.3:
                            await socket.say(dice.choice(["stop", "unsubscribe"]), run_id=message["run_id"])
                    if dice.random() < 0.5:
                        await socket.close()
                    elif dice.random() < 0.5:
                        socket.stream.reset()

        ending = {"on_disconnect": "cancel"}
        for _ in range(50):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(come_and_go)
        await trio.sleep(30)
        assert world.supervisor.active_runs == 0
        assert all(connection.server.closed_at is not None for connection in world.network.connections)
        assert trio.lowlevel.current_statistics().tasks_living == before


# Not done


async def test_what_cannot_be_done_is_answered_and_the_socket_stays(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        two(world)
        run_id = await start(socket, "left")
        answers = [
            await refusal(socket, "start", request_id="r", agent_id="nobody", message="hi"),
            await refusal(socket, "start", request_id="r", agent_id="no such name!", message="hi"),
            await refusal(socket, "start", request_id="r", agent_id="left", message=" "),
            await refusal(socket, "subscribe", run_id="nothing"),
            await refusal(socket, "subscribe", run_id=run_id),
            await refusal(socket, "stop", run_id="nothing"),
        ]
        assert answers == [
            {"code": "NOT_FOUND", "request_id": "r"},
            {"code": "NOT_FOUND", "request_id": "r"},
            {"code": "VALIDATION_ERROR", "request_id": "r"},
            {"code": "NOT_FOUND", "run_id": "nothing"},
            {"code": "CONFLICT", "run_id": run_id},
            {"code": "NOT_FOUND", "run_id": "nothing"},
        ]
        await socket.say("unsubscribe", run_id=run_id)
        assert await refusal(socket, "subscribe", run_id=run_id, after=99) == {
            "code": "INVALID_CURSOR",
            "run_id": run_id,
        }


async def test_a_socket_reads_so_many_runs_and_no_more(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        world.add_agent("a", speaking((FOREVER, ())))
        for number in range(MAX_SUBSCRIPTIONS + 1):
            await socket.say("start", request_id=str(number), agent_id="a", message="hi")
        await socket.hear_until("error")
        kinds = [one["type"] for _, one in socket.heard]
        while kinds.count("started") < MAX_SUBSCRIPTIONS:
            kinds.append((await socket.hear())["type"])
        assert world.supervisor.active_runs == MAX_SUBSCRIPTIONS
        assert kinds.count("error") == 1
        started = [one for _, one in socket.heard if one["type"] == "started"]
        await socket.say("unsubscribe", run_id=started[0]["run_id"])
        await start(socket, "a")


# Keys


async def test_another_tenants_runs_are_not_there(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        world.add_agent("a", speaking((20, text("secret"))))
        ada = await world.add_key("acme", "ada")
        async with open_socket(world, headers=ada) as hers:
            run_id = await start(hers, "a")
            for tenant, user, admin in (("other", "ada", True), ("acme", "bob", False)):
                key = await world.add_key(tenant, user, admin=admin)
                async with open_socket(world, headers=key) as theirs:
                    for kind in ("subscribe", "stop"):
                        answer = await theirs.ask(kind, run_id=run_id)
                        nothing = await theirs.ask(kind, run_id="z" * 22)
                        assert answer["code"] == "NOT_FOUND"
                        assert answer["message"].replace(run_id, "z" * 22) == nothing["message"]
            boss = await world.add_key("acme", "boss", admin=True)
            async with open_socket(world, headers=boss) as theirs:
                assert (await theirs.ask("stop", run_id=run_id))["status"] == "stop"


async def test_starts_count_towards_the_keys_limits(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        world.add_agent("a", speaking((1, text("x"))))
        key = await world.add_key("acme", "ada", limits=KeyLimits(requests_per_minute=4, concurrent_runs=2))
        async with open_socket(world, headers=key) as socket:
            first, second = await start(socket, "a"), await start(socket, "a")
            assert (await refusal(socket, "start", request_id="r", agent_id="a", message="hi"))["code"] == (
                "RATE_LIMITED"
            )
            await hear_ends(socket, *({first, second} - ended(socket)))
            assert (await refusal(socket, "start", request_id="r", agent_id="a", message="hi"))["code"] == (
                "RATE_LIMITED"
            ), "five requests, the handshake among them"


@pytest.mark.parametrize("busy", [False, True])
async def test_a_revoked_key_ends_its_sockets_within_five_seconds(busy: bool, autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        world.add_agent("a", speaking((FOREVER, ())))
        key = await world.add_key("acme", "ada")
        other = await world.add_key("acme", "ada")
        if busy:  # others keep the key in mind, at other times
            world.nursery.start_soon(ask_often, world, key)
            await trio.sleep_until(3)
        revoked_at = 11.3 if busy else 12
        async with open_socket(world, headers=key) as socket, open_socket(world, headers=other) as stays:
            run_id = await start(socket, "a")
            await trio.sleep_until(revoked_at)
            await revoke(world, key)
            closed = await socket.wait_closed()
            assert (closed.code, closed.reason) == (1008, "the key is revoked")
            assert trio.current_time() <= revoked_at + 5
            assert await stays.ask("ping") == {"type": "pong"}
            assert find(world, run_id).log.readers == 0
            with pytest.raises(RefusedError, match="401"):
                await WebSocketClient(await world.network.connect("lumos", 80)).shake_hands(headers=key)


async def revoke(world: World, headers: dict[str, str]) -> None:
    assert world.database is not None
    key = parse_key(headers["Authorization"].removeprefix("Bearer "))
    assert key is not None
    assert await world.database.write(key_rows.revoke_key, key.key_id, "2026-11-22T12:00:00+00:00")


async def ask_often(world: World, key: dict[str, str]) -> None:
    """Keep the key in the gatekeeper's memory."""
    while True:
        await world.client.get(f"{API}/me", headers=key)
        await trio.sleep(0.7)


async def test_the_first_key_ends_the_sockets_that_have_none(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world, open_socket(world) as socket:
        await trio.sleep_until(12)
        await world.add_key("acme", "ada")
        assert (await socket.wait_closed()).code == 1008
        assert trio.current_time() <= 12 + 5


# Drained


async def test_a_draining_server_starts_nothing_and_says_goodbye_at_the_end(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        world.add_agent("a", speaking((1, text("x")), (FOREVER, ())))
        run_id = await start(socket, "a")
        await trio.sleep_until(3)
        world.nursery.start_soon(world.supervisor.drain, 10)
        await trio.sleep_until(5)
        assert await refusal(socket, "start", request_id="r", agent_id="a", message="hi") == {
            "code": "draining",
            "request_id": "r",
        }
        with pytest.raises(SocketClosedError, match="1012"):
            await hear_ends(socket, run_id, "nothing")
        assert trio.current_time() == 13
        assert events(socket, run_id)[-1][1]["code"] == "draining"
        assert_whole(socket, find(world, run_id))


async def test_a_socket_that_does_not_read_does_not_hold_the_end(autojump_clock: MockClock) -> None:
    async with open_world(window=1000) as world, open_socket(world) as socket:
        world.add_agent("a", speaking((1, text("x" * 5000)), (FOREVER, ())))
        await start(socket, "a")
        await trio.sleep_until(3)
        await world.supervisor.drain(2)
        await trio.sleep_until(20)
        assert socket.stream.connection.server.closed_at is not None
        assert socket.stream.connection.server.closed_at <= 5 + 3
